"""``s3rec sweep``: every trial once, the best first, whatever fails or is cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from shop import write_shop

from s3rec_dist.__main__ import main
from s3rec_dist.config import load_config
from s3rec_dist.reports import sweep as sweep_module
from s3rec_dist.reports.sweep import SweepError, jobs_of, read_sweep

SMALL = {
    "model.hidden_size": 8, "model.inner_size": 8, "model.layers": 1, "model.max_length": 8, "pretrain.epochs": 1,
    "finetune.epochs": 2, "engine.threads": 1, "data.path": "data/mine",
}  # fmt: skip


def write_sweep(path: Path, **tree: Any) -> str:
    path.write_text(yaml.safe_dump({"output": "runs/sweep", "settings": SMALL, **tree}))
    return str(path)


def random_of(count: int, **settings: Any) -> dict[str, Any]:
    return {"count": count, "seed": 3, "settings": settings}


def test_a_random_sample_stays_within_its_rules_and_grows_by_its_end(tmp_path: Path) -> None:
    rules = {
        "finetune.learning_rate": {"log_uniform": [1e-6, 1e-2]},
        "model.hidden_dropout": {"uniform": [0.1, 0.5]},
        "model.layers": {"choice": [1, 2, 3]},
    }
    few = read_sweep(write_sweep(tmp_path / "a.yaml", random=random_of(5, **rules))).trials
    many = read_sweep(write_sweep(tmp_path / "b.yaml", random=random_of(200, **rules))).trials
    assert many[:5] == few
    rates = [trial["finetune.learning_rate"] for trial in many]
    assert 1e-6 <= min(rates) < 1e-5 and 1e-3 < max(rates) <= 1e-2
    assert 70 < sum(rate < 1e-4 for rate in rates) < 130  # half of the decades
    assert all(0.1 <= trial["model.hidden_dropout"] <= 0.5 for trial in many)
    assert {trial["model.layers"] for trial in many} == {1, 2, 3}


def test_trials_that_differ_in_fine_tuning_share_one_pretraining(tmp_path: Path) -> None:
    trials = [{"finetune.loss": "ce"}, {"finetune.loss": "bce"}, {"seed": 7}]
    jobs = list(jobs_of(read_sweep(write_sweep(tmp_path / "s.yaml", list=trials))))
    assert [(job.trial, job.stage) for job in jobs] == [
        (0, "pretrain"), (0, "finetune"), (1, "finetune"), (2, "pretrain"), (2, "finetune"),
    ]  # fmt: skip
    shared = [job.config.finetune.pretrained for job in jobs if job.stage == "finetune"]
    assert shared[0] == shared[1] == jobs[0].folder and shared[2] == jobs[3].folder != shared[0]
    for job in jobs:
        arguments = list(job.command[3:])
        assert arguments[0] == job.stage and load_config(None, arguments[1:]) == job.config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "expected either list or random"),
        ({"list": []}, "list: expected a list of settings"),
        ({"list": [{"finetune.los": "ce"}]}, "trial 0: command line: unknown setting finetune.los; did you mean"),
        ({"list": [{}], "stages": ["train"]}, "stages: expected some of pretrain, finetune"),
        ({"list": [{}], "launcher": ["deepspeed"]}, "launcher: expected text"),
        ({"list": [{}], "metric": "NDCG@7"}, "metric NDCG@7: trial 0 does not have it: .*evaluation.cutoffs"),
        ({"list": [{}], "trials": 3}, "unknown key 'trials'"),
        ({"random": {"count": 0, "settings": {"seed": {"choice": [1]}}}}, "random: expected count, at least 1"),
        ({"random": random_of(1, seed={"uniform": [2, 1]})}, r"random: seed: expected choice: \[...\], uniform"),
        ({"random": random_of(1, seed={"log_uniform": [0, 1]})}, "random: seed: expected choice"),
    ],
)
def test_what_a_file_says_wrong_is_named(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        read_sweep(write_sweep(tmp_path / "s.yaml", **tree))


def test_the_example_files_are_sweeps(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    sweep = read_sweep("configs/sweeps/random.yaml")
    assert len(sweep.trials) == 12 and sum(job.stage == "pretrain" for job in jobs_of(sweep)) == 1
    # W&B's own: its agent puts key=value for each parameter in the place of ${args_no_hyphens}
    tree = yaml.safe_load(Path("configs/sweeps/wandb.yaml").read_text())
    before = [word for word in tree["command"] if not word.startswith("${")]
    assert before[:2] == ["bash", "launch/wandb_agent.sh"] and tree["command"][-1] == "${args_no_hyphens}"
    for loss in tree["parameters"]["finetune.loss"]["values"]:
        load_config(before[4], [*before[5:], f"finetune.loss={loss}", "finetune.learning_rate=0.001"])


def test_an_agent_s_run_has_its_folder_and_its_id(repository: Path, tmp_path: Path) -> None:
    environment = {"WANDB_RUN_ID": "abc123", "S3REC_OUTPUT": str(tmp_path / "runs")}
    printed = subprocess.run(
        ["bash", "launch/wandb_agent.sh", "finetune", "--print-config", "finetune.learning_rate=0.002"],
        cwd=repository,
        env={**os.environ, **environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    config = yaml.safe_load(printed)
    assert config["output"] == str(tmp_path / "runs/abc123") and config["tracking"]["wandb"] == "online"


def test_what_a_w_b_agent_makes_of_parameters_are_settings() -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    drawn = {"finetune.learning_rate": {"value": 3.2e-05}, "finetune.loss": {"value": "ce"}}
    config = load_config(None, utils.create_sweep_command_args({"args": drawn})["args_no_hyphens"])
    assert config.finetune.learning_rate == 3.2e-05 and config.finetune.loss == "ce"


def test_no_trial_is_fine_tuned_from_a_pretraining_that_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "launcher.py"
    script.write_text("import sys\nprint('started', sys.argv[1])\nsys.exit(3)\n")
    trials = [{"finetune.learning_rate": 0.01}, {"finetune.learning_rate": 0.001}]
    file = write_sweep(tmp_path / "s.yaml", list=trials, launcher=f"{sys.executable} {script}")
    assert main(["sweep", file]) == 1
    out, err = capfd.readouterr()
    assert out.count("started pretrain") == 1 and "started finetune" not in out
    assert "trial 1: its pretraining, which is trial 0's too, failed" in err and "no trial is finished" in out


def test_a_signal_reaches_what_a_launcher_started_and_is_waited_for(tmp_path: Path) -> None:
    ready, left = tmp_path / "ready", tmp_path / "left"
    worker = (
        "import pathlib, signal, sys, time\n"
        f"def leave(*_):\n    time.sleep(1)\n    pathlib.Path({str(left)!r}).touch()\n    sys.exit(75)\n"
        f"signal.signal(signal.SIGTERM, leave)\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)\n"
    )
    launcher = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {worker!r}]).wait()\n"

    def tell() -> None:
        deadline = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=tell)
    thread.start()
    status = sweep_module._call([sys.executable, "-c", launcher])  # the launcher is gone at once, the worker is not
    thread.join()
    assert status == 75 and left.exists() and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_sweep_runs_every_trial_once_and_the_others_where_one_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    write_shop(tmp_path)
    monkeypatch.chdir(tmp_path)
    columns = ["--user-column", "user", "--item-column", "item", "--time-column", "ts"]
    source = ["--source", "table", "--input", "events/*.parquet", *columns]
    assert main(["prepare", *source, "--output", "data/mine"]) == 0
    trials = [{"finetune.learning_rate": 0.01}, {"model.max_length": 500}, {"finetune.learning_rate": 0.001}]
    file = write_sweep(tmp_path / "s.yaml", list=trials)
    # a run that is told to leave takes the sweep with it, and both go on
    command = [sys.executable, "-m", "s3rec_dist", "sweep", file]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("finetune start"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 75, rest
    assert main(["sweep", file]) == 1
    out, err = capfd.readouterr()
    assert err.count("trial 1: pretrain ended with status 2") == 2  # when it happens, and at the end
    assert "pretrain start" not in out.split("== trial 1")[0]
    found = json.loads((tmp_path / "runs/sweep/sweep.json").read_text())
    assert {result["trial"] for result in found["results"]} == {0, 2} and len(found["failures"]) == 1
    values = [result["metrics"]["MRR"] for result in found["results"]]
    assert values == sorted(values, reverse=True)
    assert "<h2>Settings that differ: finetune" in (tmp_path / "runs/sweep/report.html").read_text()
    began = time.monotonic()
    assert main(["sweep", file]) == 1
    assert "finetune start" not in capfd.readouterr().out and time.monotonic() - began < 30
