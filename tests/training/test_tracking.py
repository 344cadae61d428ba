"""A run's numbers arrive in metrics.jsonl, on the terminal and in W&B, and none of these can stop it."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from s3rec_dist.config import Config, TrackingConfig
from s3rec_dist.training.tracking import (
    JsonlTracker,
    TerminalTracker,
    Tracker,
    WandbTracker,
    open_tracker,
    peak_memory_mb,
    read_metrics,
)

NUMBERS = {"train/loss": 2.5, "train/mip": 0.7, "train/samples_per_second": 1234.0, "train/data_wait": 0.01}


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run file: LevelDB's log framing, in blocks of 32 KiB."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, pieces = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if not (checksum or length or kind):
            return
        body = data[position + 7 : position + 7 + length]
        position += 7 + length
        assert zlib.crc32(bytes([kind]) + body) == checksum
        pieces += body
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield pieces
            pieces = b""


def read_offline_run(folder: Path) -> dict[str, Any]:
    """History rows, config, summary, project and name of the one offline run under ``folder``."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    run: dict[str, Any] = {"history": [], "config": {}, "summary": {}}

    def key(item: Any) -> str:
        return item.key or "/".join(item.nested_key)

    for data in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            run["history"].append({key(i): json.loads(i.value_json) for i in record.history.item})
        if record.HasField("run"):
            run |= {"project": record.run.project, "name": record.run.display_name, "group": record.run.run_group}
            run["config"] |= {key(u): json.loads(u.value_json) for u in record.run.config.update}
        if record.HasField("summary"):
            run["summary"] |= {key(u): json.loads(u.value_json) for u in record.summary.update}
        if record.HasField("exit"):
            run["exit"] = record.exit.exit_code
    return run


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


def show(is_terminal: bool) -> str:
    output = io.StringIO()
    tracker = TerminalTracker("pretrain", Console(file=output, force_terminal=is_terminal, width=160, highlight=False))
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
    assert lines[2] == "pretrain 200/400, validation: NDCG@10 0.125"
    assert len(lines) == 3 and "\x1b" not in show(False)


def test_a_terminal_gets_a_bar_with_the_time_left() -> None:
    shown = show(True)
    assert "200/400" in shown and "left" in shown and "loss 2.5" in shown and "1,234 samples/s" in shown
    assert "NDCG@10 0.125" in shown


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
    tracker.finish()
    run = read_offline_run(folder)
    assert (run["project"], run["name"], run["group"]) == ("s3rec-dist", "beauty/pretrain", "beauty")
    assert run["config"]["model"]["hidden_size"] == 64
    rows = [row for row in run["history"] if "train/loss" in row]
    assert [row["step"] for row in rows] == [50, 100]
    assert rows[1]["train/mip"] == 0.7 and rows[1]["train/learning_rate"] == 0.01
    assert any(row.get("validation/MRR") == 0.25 for row in run["history"])
    assert run["summary"]["best/value"] == 0.25 and run["exit"] == 0
    assert [e["step"] for e in read_metrics(folder / "metrics.jsonl") if "train/loss" in e] == [50, 100]


def test_a_resumed_run_keeps_its_wandb_id(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(2):
        tracker = WandbTracker(config(tmp_path, name="run", project="other"), "finetune", folder)
        tracker.log({"train/loss": 1.0}, 1)
        tracker.finish()
    ids = {path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*/run-*.wandb")}
    assert ids == {(folder / "wandb_id").read_text() + ".wandb"}


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


def test_peak_memory_is_in_mebibytes() -> None:
    assert 10 < peak_memory_mb() < 100_000
