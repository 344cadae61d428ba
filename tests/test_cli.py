"""The command line: help that answers at once, mistakes named without a traceback, launchers' arguments accepted."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from s3rec_dist import __main__ as cli
from s3rec_dist.config import Config, StorageConfig, from_dict, load_config, to_yaml
from s3rec_dist.storage import StorageError, storage_of
from s3rec_dist.training.profiling import ProfiledSteps

STAGES = ("pretrain", "finetune")
MODULES = {
    "prepare": "s3rec_dist.data.prepare",
    "inspect": "s3rec_dist.data.inspect",
    "convert": "s3rec_dist.data.convert",
    "doctor": "s3rec_dist.training.doctor",
    "evaluate": "s3rec_dist.evaluation",
    "recommend": "s3rec_dist.recommend",
    "export": "s3rec_dist.interchange.command",
    "import": "s3rec_dist.interchange.command",
    "serve": "s3rec_dist.serving.server",
    "compare": "s3rec_dist.reports.compare",
    "sweep": "s3rec_dist.reports.sweep",
    "report": "s3rec_dist.reports.command",
    "push": "s3rec_dist.interchange.hub",
    "config": "s3rec_dist.interchange.settings",
    "bench": "s3rec_dist.bench.command",
    "synth": "s3rec_dist.data.synth",
    "completion": "s3rec_dist.completion",
}


def examples(command: str) -> list[list[str]]:
    """The arguments after the command's name, for each example in its help."""
    epilog = cli.parser_of(command)[0].epilog or ""
    lines = [shlex.split(line) for line in epilog.replace("\\\n", " ").splitlines()]
    found = [words[words.index(command) + 1 :] for words in lines if words[:1] in (["s3rec"], ["deepspeed"])]
    assert found, "no example"
    return found


@pytest.fixture(params=list(cli.COMMANDS))
def command(request: pytest.FixtureRequest) -> str:
    module = MODULES.get(request.param, "s3rec_dist.config")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there yet")
    return request.param


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    """Replaces ``bench`` by a command that raises what is stored in ``Raises.error``."""

    class Raises(Exception):
        error: BaseException

    def run(args: argparse.Namespace) -> None:
        raise Raises.error

    command = cli.Command(summary="", description="", example="", build=lambda parser: run)
    monkeypatch.setitem(cli.COMMANDS, "bench", command)
    return Raises


def test_the_commands_are_those_of_the_documentation() -> None:
    assert list(cli.COMMANDS) == [
        "prepare", "inspect", "convert", "pretrain", "finetune", "doctor", "evaluate", "compare", "sweep", "report",
        "recommend", "serve", "export", "import", "push", "config", "bench", "synth", "completion",
    ]  # fmt: skip


def test_help_names_every_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert any(line.split() == [name, *command.summary.split()] for line in lines)
    assert max(map(len, lines)) <= 100


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_each_commands_help_has_a_description_and_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: s3rec {command}")
    parser, _ = cli.parser_of(command)
    assert parser.description and len(parser.description) > 40
    for action in parser._actions:
        assert action.help, f"{action.dest} has no help text"


def test_the_examples_in_the_help_are_accepted_as_they_stand(command: str) -> None:
    for arguments in examples(command):
        parser, _ = cli.parser_of(command)
        parser.parse_intermixed_args(arguments)


@pytest.mark.parametrize("stage", STAGES)
def test_the_settings_in_the_help_exist(stage: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    for arguments in examples(stage):
        assert cli.main([stage, *arguments, "--print_config"]) == 0


def test_help_and_settings_load_nothing_heavy() -> None:
    script = (
        "import sys; from s3rec_dist.__main__ import main\n"
        "main(['pretrain', '--print_config']); main([])\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'pyarrow', 'duckdb', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_the_package_runs_as_a_module_and_says_its_version() -> None:
    arguments = [sys.executable, "-m", "s3rec_dist", "--version"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout.startswith("s3rec_dist ")


@pytest.mark.parametrize("stage", STAGES)
def test_print_config_prints_what_would_be_used(
    stage: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = repository / "configs" / "beauty.yaml"
    arguments = [stage, "seed=9", "--config", str(path), "engine.zero_stage=2", "--print_config"]
    assert cli.main(arguments) == 0
    printed = from_dict(yaml.safe_load(capsys.readouterr().out), "printed")
    assert printed == load_config(path, ["seed=9", "engine.zero_stage=2"])


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"], ["--local-rank", "1"]])
def test_the_local_rank_of_a_launcher_is_accepted_before_and_after_the_command(
    flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([*flag, "pretrain", "--print_config", "seed=3"], ["pretrain", "seed=3", *flag, "--print_config"]):
        assert cli.main(arguments) == 0
        assert from_dict(yaml.safe_load(capsys.readouterr().out), "printed").seed == 3


def test_options_may_be_written_with_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--print_config"]) == cli.main(["pretrain", "--print-config"]) == 0
    assert capsys.readouterr().out == to_yaml(Config()) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretran"], "unknown command 'pretran'; did you mean pretrain?"),
        (["zzz"], "unknown command 'zzz'; commands: prepare, inspect"),
        (["pretrain", "pretrain.epoch=3"], "unknown setting pretrain.epoch; did you mean pretrain.epochs?"),
        (["finetune", "finetune.loss=hinge"], "finetune.loss='hinge': expected one of bce, bpr, ce"),
        (["pretrain", "configs/beauty.yaml"], "argument 'configs/beauty.yaml': expected key=value"),
        (["pretrain", "--config", "missing.yaml"], "missing.yaml: cannot read the config file"),
    ],
)
def test_a_mistake_is_named_in_one_line_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("s3rec: error: ") and message in captured.err
    assert captured.err.count("\n") == 1


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["pretrain", "--epochs", "3"])
    assert exit.value.code == 2
    assert "unrecognized arguments: --epochs" in capsys.readouterr().err


def test_a_mistake_reaches_the_shell_without_a_traceback() -> None:
    arguments = [sys.executable, "-m", "s3rec_dist", "--local_rank=0", "pretrain", "sed=3"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr == "s3rec: error: command line: unknown setting sed; did you mean seed?\n"


def test_an_error_in_a_distributed_run_names_its_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert cli.main(["pretrain", "sed=3"]) == 2
    assert capsys.readouterr().err.startswith("s3rec: error (rank 2): ")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://AKIA1:hunter2hunter2@bucket/data", "s3://***@bucket/data/manifest.json: the URL carries credentials"),
        ("s3://bucket/data?X-Amz-Signature=hunter2hunter2", "the URL carries credentials"),
        ("simplecache::s3://AKIA1:hunter2hunter2@bucket/data", "chained URLs are refused"),
        ("https://AKIA1:hunter2hunter2@host/data", "protocol 'https' is not allowed"),
        ("memory://nowhere", "memory://nowhere/manifest.json: no such file"),
        ("pipe:cat manifest.json", "pipe: is not a storage"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_url_that_cannot_be_used_is_named_without_its_secrets(
    command: str, url: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "new")] if command == "convert" else []
    assert cli.main([command, url, *output]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("s3rec: error: ") and captured.err.count("\n") == 1
    assert "hunter2" not in captured.out + captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "module", "extra"), [("gs://bucket/data", "gcsfs", "gs"), ("hf://datasets/a/b", "huggingface_hub", "hf")]
)
def test_a_storage_whose_package_is_missing_names_what_to_install(
    url: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["inspect", url]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"s3rec: error: {url}/manifest.json: needs a package") and error.count("\n") == 1
    assert error.endswith(f"pip install 's3rec-dist[{extra}]'\n")


def test_no_error_shows_the_secrets_of_a_url(failing: type, capsys: pytest.CaptureFixture[str]) -> None:
    failing.error = StorageError("s3://AKIA1:hunter2hunter2@bucket/x?token=hunter2hunter2 failed")
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err == "s3rec: error: s3://***@bucket/x?token=*** failed\n"


STORAGE_COMMANDS = {
    "inspect": ["DATA"],
    "convert": ["DATA", "--output", "new"],
    "evaluate": ["--model", "run", "--dataset", "DATA"],
    "recommend": ["run", "--dataset", "DATA", "--output", "new"],
    "export": ["run", "--dataset", "DATA", "--output", "new"],
    "import": ["--checkpoint", "file.pt", "--dataset", "DATA", "--output", "new"],
}


@pytest.mark.parametrize("command", STORAGE_COMMANDS)
def test_storage_settings_may_stand_after_the_other_arguments_before_an_option_and_twice(command: str) -> None:
    parser, _ = cli.parser_of(command)
    arguments = STORAGE_COMMANDS[command]
    settings = ["--storage", "retries=2", "cache_dir=/tmp/a=b", "--storage", "timeout_s=5"]
    options = [i for i, argument in enumerate(arguments) if argument.startswith("--")]
    for place in (*options, len(arguments)):
        args = parser.parse_intermixed_args([*arguments[:place], *settings, *arguments[place:]])
        config = storage_of(args).config
        assert (config.retries, config.cache_dir, config.timeout_s) == (2, "/tmp/a=b", 5.0)
    assert storage_of(parser.parse_intermixed_args(arguments)).config == StorageConfig()


def test_an_argument_that_storage_would_swallow_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for dataset in ("data/beauty", "s3://bucket/day=1/beauty"):
        with pytest.raises(SystemExit) as exit:
            cli.main(["inspect", "--storage", "retries=2", dataset])
        assert exit.value.code == 2
        assert f"argument --storage: {dataset!r}: expected key=value" in capsys.readouterr().err


def test_an_unknown_storage_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "data/beauty", "--storage", "retrys=2"]) == 2
    assert "unknown setting storage.retrys; did you mean storage.retries?" in capsys.readouterr().err


def test_control_c_ends_with_status_130(failing: type) -> None:
    failing.error = KeyboardInterrupt()
    assert cli.main(["bench"]) == 130


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), OSError("a bug"), AssertionError("a bug")])
def test_a_bug_keeps_its_traceback(failing: type, error: Exception) -> None:
    failing.error = error
    with pytest.raises(type(error), match="a bug"):
        cli.main(["bench"])


def test_a_full_disk_says_that_earlier_outputs_are_whole(failing: type, capsys: pytest.CaptureFixture[str]) -> None:
    failing.error = OSError(errno.ENOSPC, "No space left on device", "out/shard")
    assert cli.main(["bench"]) == 2
    assert "the disk is full (out/shard); earlier outputs are whole" in capsys.readouterr().err


def test_a_file_that_cannot_be_opened_is_named(failing: type, capsys: pytest.CaptureFixture[str]) -> None:
    failing.error = PermissionError(errno.EACCES, "Permission denied", "data/beauty")
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err == "s3rec: error: data/beauty: Permission denied\n"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"resume": True, "profile": None}),
        (["--no_resume"], {"resume": False, "profile": None}),
        (["--profile", "20-25"], {"resume": True, "profile": ProfiledSteps(20, 25)}),
        (["--profile", "3", "--profile_all_ranks"], {"resume": True, "profile": ProfiledSteps(3, 3, all_ranks=True)}),
    ],
)
def test_a_stage_gets_its_config_whether_to_resume_and_what_to_profile(
    stage: str, flags: list[str], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Config, dict[str, object]]] = []
    loop = types.ModuleType("s3rec_dist.training.loop")
    setattr(loop, f"run_{stage}", lambda config, **options: calls.append((config, options)))
    monkeypatch.setitem(sys.modules, "s3rec_dist.training.loop", loop)
    assert cli.main([stage, *flags, "output=runs/x"]) == 0
    assert calls == [(Config(output="runs/x"), expected)]
