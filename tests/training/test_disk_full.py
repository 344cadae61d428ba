"""A disk that is full: training goes on, says so, keeps what it has, and catches up once there is room."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from runs import curve, events, make_config, metrics, run, weights

from s3rec_dist.evaluation import EvaluationResult
from s3rec_dist.training import checkpoint, loop
from s3rec_dist.training.checkpoint import CheckpointError
from s3rec_dist.training.tracking import JsonlTracker


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("pretrain", make_config(dataset, tmp_path_factory.mktemp("undisturbed")))


Resize = Callable[[str], None]


@pytest.fixture
def disk(undisturbed: Path, tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A file system with room for a run's checkpoint and the half of another, and what gives it another size."""
    place = tmp_path / "disk"
    place.mkdir()
    files = [f for f in undisturbed.rglob("*") if f.is_file() and "step-00000034" not in str(f)]
    size = sum(f.stat().st_size for f in files) + 60_000
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        yield place, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def whole_tags(folder: Path) -> list[int]:
    found = sorted((folder / "checkpoints").glob("step-*"))
    return [checkpoint.verify(str(tag))["step"] for tag in found]


def test_training_goes_on_without_a_checkpoint_and_catches_up_once_there_is_room(
    dataset: Path, undisturbed: Path, disk: tuple[Path, Resize], capfd: pytest.CaptureFixture[str]
) -> None:
    place, resize = disk
    rate = loop.learning_rate

    def make_room(stage: Any, step: int, total: int) -> float:
        if step == 45:
            assert whole_tags(place / "pretrain") == [17] and not list((place / "pretrain/checkpoints").glob(".*"))
            resize("10m")
        return rate(stage, step, total)

    with mock.patch.object(loop, "learning_rate", make_room):
        folder = run("pretrain", make_config(dataset, place, pretrain__keep_checkpoints=9))
    (failed,) = events(folder, "checkpoint_failed")
    assert failed["step"] == 34 and "could not write checkpoint step-00000034" in failed["reason"]
    assert "pretrain checkpoint failed: step 34" in capfd.readouterr().err
    assert whole_tags(folder) == [17, 51]
    assert curve(folder) == curve(undisturbed)
    assert all(torch.equal(value, weights(undisturbed)[name]) for name, value in weights(folder).items())


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_the_run_goes_on_once_there_is_room(
    dataset: Path, undisturbed: Path, disk: tuple[Path, Resize]
) -> None:
    place, resize = disk
    config = make_config(dataset, place, pretrain__keep_checkpoints=9)
    with pytest.raises(CheckpointError, match=r"could not write checkpoint step-00000051.*make room.*Run the command"):
        run("pretrain", config)
    folder = place / "pretrain"
    assert whole_tags(folder) == [17] and not list((folder / "checkpoints").glob(".*"))
    resize("10m")
    run("pretrain", config)
    assert metrics(folder)[-1]["status"] == "finished"
    assert curve(folder) == curve(undisturbed)
    assert all(torch.equal(value, weights(undisturbed)[name]) for name, value in weights(folder).items())


def test_the_best_is_the_best_of_those_that_could_be_saved(dataset: Path, tmp_path: Path) -> None:
    scores, save, calls = iter([0.1, 0.3, 0.2]), checkpoint.save_file, []

    def full_once(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(*arguments, **options)

    def scripted(*arguments: Any) -> EvaluationResult:
        return EvaluationResult({"MRR": next(scores), "HR@5": 0.5}, 1, "scripted")

    with mock.patch.object(checkpoint, "save_file", full_once), mock.patch.object(loop, "evaluate", scripted):
        folder = run("finetune", make_config(dataset, tmp_path, finetune__epochs=3))
    assert [event["step"] for event in events(folder, "checkpoint_failed")] == [20]
    assert events(folder, "best")[0]["value"] == 0.2
    assert checkpoint.load_weights(str(folder))[1]["step"] == 30


@pytest.mark.parametrize("has_room_again", [True, False])
def test_lines_that_a_full_disk_does_not_take_are_written_later_or_counted(
    disk: tuple[Path, Resize], has_room_again: bool
) -> None:
    place, _ = disk
    told: list[tuple[str, dict[str, Any]]] = []
    tracker = JsonlTracker(place / "metrics.jsonl", lambda name, **facts: told.append((name, facts)))
    numbers = {f"train/number_{i}": 1.0 for i in range(300)}  # lines longer than a page of the disk
    tracker.log(numbers, 1)
    with contextlib.suppress(OSError), open(place / "other", "wb", buffering=0) as other:
        while other.write(bytes(4096)):
            pass
    for step in (2, 3):
        tracker.log(numbers, step)
    assert told == [("metrics_failed", {"file": f"{place}/metrics.jsonl", "reason": "No space left on device"})]
    if has_room_again:
        (place / "other").unlink()
        tracker.finish()
        assert [entry.get("step") for entry in metrics(place)] == [1, 2, 3, None]
    else:
        with pytest.warns(UserWarning, match=r"metrics\.jsonl lacks its last 3 lines"):
            tracker.finish()
