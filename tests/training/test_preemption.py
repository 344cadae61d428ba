"""SIGTERM and SIGUSR1, whenever they come: a whole checkpoint, status 75, and a run that goes on bit by bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preempted import signalled
from runs import arguments, curve, events, make_config, metrics, run, weights

from s3rec_dist.config import to_dict
from s3rec_dist.training import checkpoint
from s3rec_dist.training.preemption import STATUS, Preempted

RUNS, SCRIPT = (str(Path(__file__).with_name(name)) for name in ("runs.py", "preempted.py"))
STEPS = {"start": 1, "training": 25, "end of an epoch": 30, "validation": 10, "save": 21}
"""Where fine-tuning, of ten steps an epoch, stands when it has had the signal at a moment."""


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("finetune", make_config(dataset, tmp_path_factory.mktemp("undisturbed")))


def assert_left(folder: Path, step: int, name: str) -> None:
    """What a run leaves behind that was preempted after ``step``."""
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None and not found.damaged and found.state["step"] == step
    (event,) = events(folder, "preempted")
    assert (event["step"], event["signal"], event["status"]) == (step, name, 75)
    assert event["checkpoint"] == found.folder.name
    assert metrics(folder)[-1]["status"] == "preempted"
    assert not list((folder / "checkpoints").glob(".*"))


def assert_same_run(folder: Path, expected: Path) -> None:
    assert metrics(folder)[-1]["status"] == "finished"
    for name in ("train/loss", "validation/MRR"):
        assert curve(folder, name) == curve(expected, name)
    ours, theirs = weights(folder), weights(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    states = [checkpoint.newest(place / "checkpoints") for place in (folder, expected)]
    assert states[0] and states[1] and states[0].state["best"] == states[1].state["best"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("moment", STEPS)
def test_a_signal_at_any_moment_leaves_a_whole_checkpoint_and_the_run_goes_on_bit_by_bit(
    dataset: Path, undisturbed: Path, tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    config = make_config(dataset, tmp_path, finetune__checkpoint_async=False)  # else steps go on during a save
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    with signalled(moment, number), pytest.raises(Preempted) as left:
        run("finetune", config)
    assert left.value.code == STATUS == 75
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)] == before
    folder = tmp_path / "finetune"
    assert_left(folder, STEPS[moment], number.name)
    assert STEPS[moment] not in curve(folder, "validation/MRR")
    run("finetune", config)
    assert_same_run(folder, undisturbed)


def test_a_run_may_be_preempted_again_where_it_stands(dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path, finetune__keep_checkpoints=1)
    with signalled("validation"), pytest.raises(Preempted):
        run("finetune", config)
    with signalled("start"), pytest.raises(Preempted):  # heard of in the validation, which comes first
        run("finetune", config)
    assert [event["step"] for event in events(tmp_path / "finetune", "preempted")] == [10, 10]
    run("finetune", config)
    assert_same_run(tmp_path / "finetune", undisturbed)


def test_pretraining_goes_on_bit_by_bit_from_the_middle_and_the_end_of_an_epoch(dataset: Path, tmp_path: Path) -> None:
    ten_steps_an_epoch = {"pretrain__batch_size": 52, "pretrain__epochs": 4}
    config = make_config(dataset, tmp_path, **ten_steps_an_epoch)
    for moment in ("training", "end of an epoch"):
        with signalled(moment), pytest.raises(Preempted):
            run("pretrain", config)
    folder = run("pretrain", config)
    assert [event["step"] for event in events(folder, "preempted")] == [25, 30]
    whole = run("pretrain", make_config(dataset, tmp_path / "whole", **ten_steps_an_epoch))
    assert curve(folder) == curve(whole) and len(curve(whole)) == 40
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(folder).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "status", "words"),
    [("SIGTERM", 75, "finetune preempted: step 25, signal SIGTERM"), ("SIGTERM*2", 143, ""), ("SIGUSR1*2", 138, "")],
)
def test_the_process_ends_with_the_status_of_the_first_signal_or_at_once_with_that_of_the_second(
    dataset: Path, tmp_path: Path, launch: Callable[..., list[str]], signals: str, status: int, words: str
) -> None:
    command = [SCRIPT, "0", "training", signals, "finetune", *arguments(dataset, tmp_path)]
    (output,) = launch(1, command, expect=status)
    assert words in output and "Traceback" not in output
    found = checkpoint.newest(tmp_path / "finetune" / "checkpoints")
    assert found is not None and found.state["step"] == (25 if status == 75 else 20)


@pytest.mark.slow
def test_two_processes_leave_together_after_the_same_step_and_go_on_bit_by_bit(
    dataset: Path, tmp_path: Path, launch: Callable[..., list[str]]
) -> None:
    cases = [(0, "training", 0, 26), (1, "validation", 1, 10), (1, "end of an epoch", 0, 30), (-1, "save", 3, 22)]
    jobs = {}
    for rank, moment, zero, step in cases:  # -1: both have the signal
        settings: dict[str, Any] = {"engine__zero_stage": zero, "finetune__epochs": 4}
        settings["finetune__checkpoint_async"] = False  # else steps go on during a save
        output = tmp_path / moment
        command = ["finetune", *arguments(dataset, output, **settings)]
        outputs = launch(2, [SCRIPT, str(rank), moment, "SIGTERM", *command], expect=75)
        assert all("Traceback" not in printed for printed in outputs)
        assert_left(output / "finetune", step, "SIGTERM")
        for name, place in ((moment, output), (f"whole {zero}", tmp_path / str(zero))):
            jobs[name] = {"stage": "finetune", "config": to_dict(make_config(dataset, place, **settings))}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    launch(2, [RUNS, str(tmp_path / "jobs.json")])
    for _, moment, zero, _ in cases:
        assert_same_run(tmp_path / moment / "finetune", tmp_path / str(zero) / "finetune")
