"""``s3rec completion``: the script, in a real bash."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from s3rec_dist.completion import script


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "s3rec"
    path.write_text(script("bash"))
    return path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["pre"], ["prepare", "pretrain"]),
        (["pretrain", "--no"], ["--no-resume"]),
        (["evaluate", "--protocol", ""], ["full", "sampled"]),
        (["bench", "res"], ["resume"]),
        (["pretrain", "pretrain.ep"], ["pretrain.epochs="]),
        (["finetune", "seed=1", "finetune.pat"], ["finetune.patience="]),
        (["pretrain", "--config", "configs/b"], ["configs/beauty.yaml"]),
    ],
)
def test_what_bash_offers(bash_script: Path, repository: Path, typed: list[str], offered: list[str]) -> None:
    words = shlex.join(["s3rec", *typed])
    commands = (
        f"source {shlex.quote(str(bash_script))}; compopt() {{ echo compopt $*; }}\n"
        f'COMP_WORDS=({words}) COMP_CWORD={len(typed)}; _s3rec; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    printed = subprocess.run(["bash", "-c", commands], cwd=repository, capture_output=True, text=True, timeout=20)
    assert printed.stderr == ""
    lines = printed.stdout.splitlines()
    assert sorted(line for line in lines if not line.startswith("compopt")) == offered
    assert ("compopt -o nospace" in lines) == offered[0].endswith("=")  # a setting is followed by its value


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_get_a_script_with_every_command(shell: str) -> None:
    text = script(shell)
    for command in ("prepare", "finetune", "completion"):
        assert command in text
