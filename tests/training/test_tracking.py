"""A run's numbers arrive in metrics.jsonl, on the terminal and in W&B, and none of these can stop it."""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from processes import start_process, wait_for
from rich.console import Console
from wandb_offline import read_offline_run

from s3rec_dist.config import Config, TrackingConfig
from s3rec_dist.training.tracking import (
    JsonlTracker,
    TerminalTracker,
    Tracker,
    WandbTracker,
    open_tracker,
    read_metrics,
)

NUMBERS = {"train/loss": 2.5, "train/mip": 0.7, "train/samples_per_second": 1234.0, "train/data_wait": 0.01}


def test_each_entry_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"train/loss": 2.0}, step=10)
    tracker.event("checkpoint", tag="step-00000010")
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in e.items() if k != "time"} for e in entries] == [
        {"step": 10, "train/loss": 2.0},
        {"event": "checkpoint", "tag": "step-00000010"},
    ]
    tracker.finish("failed")
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["status"] == "failed"


def test_a_resumed_run_appends_and_its_later_numbers_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path)
    for step in (1, 2, 3):
        first.log({"train/loss": float(step)}, step)
    first.log({"validation/MRR": 0.5}, 3)
    with open(path, "a") as file:
        file.write('{"step": 4, "train/lo')  # what a kill leaves
    again = JsonlTracker(path)
    again.event("resume", step=2)
    again.log({"train/loss": 30.0}, 3)
    again.finish()
    losses = {e["step"]: e["train/loss"] for e in read_metrics(path) if "train/loss" in e}
    assert losses == {1: 1.0, 2: 2.0, 3: 30.0}
    assert [e["event"] for e in read_metrics(path) if "event" in e] == ["resume", "end"]
    assert any("validation/MRR" in e for e in read_metrics(path))


def show(is_terminal: bool, width: int = 160) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=width, highlight=False)
    tracker = TerminalTracker("pretrain", console)
    tracker.begin(step=100, total_steps=400)
    tracker.event("start", processes=2)
    for step in range(101, 201):
        tracker.progress(step)
    tracker.log(NUMBERS, step=200)
    tracker.log({"validation/NDCG@10": 0.125}, step=200)
    tracker.event("checkpoint", tag="step-00000200")
    tracker.finish()
    return output.getvalue()


def test_without_a_terminal_each_log_is_one_plain_line() -> None:
    lines = show(False).splitlines()
    assert lines[0] == "pretrain start: processes 2"
    assert lines[1].startswith("pretrain 200/400, 0:00:0") and lines[1].endswith(
        " left: loss 2.5  mip 0.7  1,234 samples/s"
    )
    assert lines[2] == "pretrain 200/400, validation: NDCG@10 0.1250"
    assert len(lines) == 3 and "\x1b" not in show(False)


def test_a_terminal_gets_a_bar_with_the_time_left() -> None:
    shown = show(True)
    assert "200/400" in shown and "left" in shown and "loss 2.5" in shown and "1,234 samples/s" in shown
    assert "NDCG@10 0.1250" in shown


def test_the_bar_and_all_numbers_fit_a_narrow_terminal() -> None:
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", show(True, width=60))
    bar, *numbers = shown.rpartition("pretrain ")[2].splitlines()
    assert bar.split()[0].strip("━╸╺") == "" and len(bar.split()[0]) > 20 and "200/400" in bar
    assert " ".join(" ".join(numbers).split()) == "loss 2.5 mip 0.7 1,234 samples/s"


def config(tmp_path: Path, **tracking: Any) -> Config:
    return Config(output=str(tmp_path / "beauty"), tracking=TrackingConfig(**{"wandb": "offline", **tracking}))


def test_an_offline_wandb_run_holds_the_settings_and_every_number(tmp_path: Path) -> None:
    folder = tmp_path / "beauty" / "pretrain"
    folder.mkdir(parents=True)
    tracker = open_tracker(config(tmp_path), "pretrain", folder)
    for step in (50, 100):
        tracker.log({**NUMBERS, "train/learning_rate": 1 / step}, step)
    tracker.log({"validation/MRR": 0.25}, 100)
    tracker.event("best", metric="MRR", value=0.25, epoch=3)
    tracker.event("rewind", step=100, to=50, reason="training has diverged")
    tracker.finish()
    run = read_offline_run(folder)
    assert (run["project"], run["name"], run["group"]) == ("s3rec-dist", "beauty/pretrain", "beauty")
    assert run["config"]["model"]["hidden_size"] == 64
    rows = [row for row in run["history"] if "train/loss" in row]
    assert [row["step"] for row in rows] == [50, 100]
    assert rows[1]["train/mip"] == 0.7 and rows[1]["train/learning_rate"] == 0.01
    assert any(row.get("validation/MRR") == 0.25 for row in run["history"])
    assert run["summary"]["best/value"] == 0.25 and run["exit"] == 0
    assert run["summary"]["rewind/to"] == 50
    assert run["alerts"] == [("rewind", "step 100, to 50, reason training has diverged")]
    assert [e["step"] for e in read_metrics(folder / "metrics.jsonl") if "train/loss" in e] == [50, 100]


def test_a_resumed_run_keeps_its_wandb_id(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(2):
        tracker = WandbTracker(config(tmp_path, name="run", project="other"), "finetune", folder)
        tracker.log({"train/loss": 1.0}, 1)
        tracker.finish()
    ids = {path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*/run-*.wandb")}
    assert ids == {(folder / "wandb_id").read_text() + ".wandb"}


def test_a_run_of_a_wandb_sweep_is_the_one_that_its_agent_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "run2")
    tracker = WandbTracker(config(tmp_path), "finetune", tmp_path)
    tracker.log({"validation/MRR": 0.25}, 1)
    tracker.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/run-run2.wandb"))


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_wandb_that_fails_is_told_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    import wandb

    class Broken:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any, **options: Any) -> None:
                if name == failing:
                    raise OSError("no network")

            return call

    def init(**options: Any) -> Broken:
        if failing == "init":
            raise OSError("no network")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker = open_tracker(config(tmp_path), "pretrain", tmp_path)
        for step in range(3):
            tracker.log({"train/loss": 1.0}, step)
        tracker.finish()
    told = [str(w.message) for w in caught if "W&B is off" in str(w.message)]
    assert len(told) == 1 and "no network" in told[0]
    assert len([e for e in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in e]) == 3


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    tracker = open_tracker(config(tmp_path), "pretrain", tmp_path, rank=1)
    tracker.begin(step=0, total_steps=1)
    tracker.progress(1)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.event("start")
    tracker.finish()
    assert type(tracker) is Tracker and not list(tmp_path.iterdir())


def test_peak_memory_is_this_program_s_own_in_mebibytes() -> None:
    own = "import s3rec_dist.training.tracking as t; held = bytearray(200 << 20); del held; print(t.peak_memory_mb())"
    started_by_a_large_one = (
        f"import subprocess, sys; held = bytearray(1000 << 20); subprocess.run([sys.executable, '-c', {own!r}])"
    )
    (output,) = wait_for([start_process([sys.executable, "-c", started_by_a_large_one], {})], 60)
    assert 200 < float(output) < 700
