"""``s3rec completion SHELL``: a script that lets a shell complete commands, options, settings and file names.

    s3rec completion bash > ~/.local/share/bash-completion/completions/s3rec
    s3rec completion zsh > "${fpath[1]}/_s3rec"

The script is made once from the commands' own parsers, by shtab; completing starts no Python.
"""

from __future__ import annotations

import argparse

import shtab

_SETTING_WITHOUT_SPACE = """
_s3rec() {
  _shtab_s3rec
  if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
complete -o bashdefault -F _s3rec s3rec"""
"""In bash, after a completed ``pretrain.epochs=`` comes its value, not the next word."""


def script(shell: str) -> str:
    """The completion script of ``shell``, one of shtab's."""
    from s3rec_dist.__main__ import COMMANDS
    from s3rec_dist.config import Config, flat, to_dict

    settings = [f"{key}=" for key in flat(to_dict(Config()))]
    parser = argparse.ArgumentParser(prog="s3rec")
    commands = parser.add_subparsers(dest="command")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.summary, description=command.summary)
        command.build(own)
        for action in own._actions:
            if action.dest == "overrides":
                action.choices = settings
            elif action.choices is None and action.nargs != 0 and action.type is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    text = shtab.complete(parser, shell=shell)
    return text + _SETTING_WITHOUT_SPACE if shell == "bash" else text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec completion``."""
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell that reads the script")


def run(args: argparse.Namespace) -> None:
    """``s3rec completion``: the script on stdout."""
    print(script(args.shell))
