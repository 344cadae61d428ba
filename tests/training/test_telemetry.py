"""Throughput, where the time goes, who is slow: by arithmetic, by a scripted clock, and from runs of two ranks."""

from __future__ import annotations

import json
import socket
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from runs import events, make_config, metrics

from s3rec_dist.config import to_dict
from s3rec_dist.training import phases
from s3rec_dist.training.phases import IDLE, PHASES, PhaseClock, wire_bytes
from s3rec_dist.training.telemetry import RANKS_SHOWN, Stragglers, peak_tflops, throughput

RUNS = str(Path(__file__).with_name("runs.py"))
STAGES = {0: "finetune", 1: "pretrain", 2: "pretrain", 3: "pretrain"}
"""By ZeRO stage; fine-tuning also sums what its loss is averaged over."""


def drive(clock: PhaseClock, at: Callable[[float], None]) -> dict[str, float]:
    """Two steps with a checkpoint between them; ``at`` sets the time of what comes next."""
    for begin in (0.0, 100.0):
        at(begin)
        clock.enter("data")
        at(begin + 1)
        clock.enter("forward")
        at(begin + 3)
        clock.enter("backward")
        at(begin + 4)
        with clock.during("communication"):
            at(begin + 9)
        at(begin + 10)
        clock.enter(IDLE)
        with clock.during("communication"):
            at(begin + 50)
    return clock.read()


EXPECTED = {"data": 2.0, "forward": 4.0, "backward": 4.0, "communication": 10.0}


def test_time_counts_as_the_phase_that_was_entered_last_and_idle_time_as_none() -> None:
    now = mock.Mock()
    with mock.patch.object(phases.time, "perf_counter", now):
        clock = PhaseClock(torch.device("cpu"))
        found = drive(clock, lambda seconds: now.configure_mock(return_value=seconds))
        assert found == {**dict.fromkeys(PHASES, 0.0), **EXPECTED}
        assert not any(clock.read().values())


class Gpu:
    """A device that runs late: what is recorded is done once the host waits for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.made = self.waits = 0

    def event(self, enable_timing: bool) -> Any:
        gpu, event = self, mock.Mock()
        gpu.made += 1
        event.record = lambda stream: setattr(event, "at", gpu.now)
        event.synchronize = lambda: setattr(gpu, "waits", gpu.waits + 1)
        event.query = lambda: event.at < gpu.now - 1000
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "compute")
    return found


def test_on_a_gpu_events_time_the_phases_and_are_waited_for_only_when_read(gpu: Gpu) -> None:
    clock = PhaseClock(torch.device("cuda"))
    with mock.patch.object(clock, "_count", wraps=clock._count) as count:
        found = drive(clock, lambda seconds: setattr(gpu, "now", seconds))
    assert found == {**dict.fromkeys(PHASES, 0.0), **EXPECTED} and gpu.waits > 0
    count.assert_called_once_with(wait=True)


def test_many_steps_between_two_reads_neither_wait_nor_hoard_events(gpu: Gpu) -> None:
    clock = PhaseClock(torch.device("cuda"))
    for step in range(10_000):
        gpu.now = step
        clock.enter("forward")
        gpu.now = step + 0.75
        clock.enter("backward")
    assert gpu.waits == 0 and gpu.made < 5000
    seconds = clock.read()
    assert (seconds["forward"], seconds["backward"]) == (pytest.approx(7500), pytest.approx(2500 - 0.25))


def test_communication_on_another_stream_is_beside_the_computing(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PhaseClock(torch.device("cuda"))
    clock.enter("backward")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "reducing")
    with clock.during("communication"):
        gpu.now = 2.0
    assert clock.read() == {**dict.fromkeys(PHASES, 0.0), "backward": 2.0}


def ranks(*seconds: dict[str, float]) -> list[dict[str, float]]:
    counted = {"samples": 100.0, "tokens": 1000.0, "sent": 2.0**21, "memory": 50.0, "device_memory": 0.0}
    return [{**dict.fromkeys(PHASES, 0.0), **counted, **own} for own in seconds]


def test_rates_are_over_the_time_that_all_ranks_took() -> None:
    own = {"data": 0.5, "forward": 1.5, "communication": 2.0}
    numbers = throughput(ranks(own, own), steps=4, flops=32e12, peak=20.0)
    assert numbers["train/samples_per_second"] == 50 and numbers["train/tokens_per_second"] == 500
    assert numbers["rank/1/samples_per_second"] == 25 and numbers["rank/1/busy_ms"] == 500
    assert numbers["train/step_ms"] == 1000 and numbers["time/data_ms"] == 125
    assert numbers["train/data_wait"] == 0.125 and numbers["train/sent_mb"] == 0.5
    assert numbers["train/tflops_per_device"] == 4 and numbers["train/mfu"] == 0.2
    assert "train/device_memory_mb" not in numbers


def test_the_straggler_is_who_the_others_wait_for() -> None:
    fast, slow = {"forward": 1.0, "communication": 1.5}, {"forward": 2.4, "communication": 0.1}
    numbers = throughput(ranks(fast, fast, slow, fast), steps=1, flops=0.0, peak=None)
    assert numbers["train/straggler_rank"] == 2 and numbers["train/straggler_ratio"] == pytest.approx(2.4)
    assert "train/mfu" not in numbers


def test_ranks_are_not_listed_one_by_one_where_they_are_many() -> None:
    numbers = throughput(ranks(*[{"forward": 1.0}] * (RANKS_SHOWN + 1)), steps=1, flops=0.0, peak=None)
    assert len(numbers) < 30 and numbers["train/straggler_ratio"] == 1


def test_one_process_has_no_straggler() -> None:
    numbers = throughput(ranks({"forward": 1.0}), steps=1, flops=0.0, peak=None)
    assert not any("straggler" in name or name.startswith("rank") for name in numbers)


def test_a_rank_that_stays_slow_is_told_once_with_its_host(world: object) -> None:
    stragglers = Stragglers()

    def see(rank: int, ratio: float) -> Any:
        return stragglers.see({"train/straggler_rank": rank, "train/straggler_ratio": ratio})

    assert [see(0, 1.5) for _ in range(4)] == [None] * 4
    assert see(0, 1.1) is None  # as fast as the others this time
    found = [see(0, 1.5) for _ in range(8)]
    assert found.pop(4) == {"rank": 0, "host": socket.gethostname(), "ratio": 1.5, "logs": 5}
    assert found == [None] * 7
    assert stragglers.see({}) is None


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA A10G", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("", None, None),
    ],
)
def test_a_gpu_s_peak_is_known_by_its_whole_name(name: str, bf16: float | None, fp32: float | None) -> None:
    assert (peak_tflops(name, "bf16"), peak_tflops(name, "fp32")) == (bf16, fp32)


@pytest.fixture(scope="module")
def two_ranks(
    dataset: Path, launch: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Runs of two processes by ZeRO stage, in which the second takes 0.1 s longer to make a batch."""
    place = tmp_path_factory.mktemp("telemetry")
    jobs, folders = {}, {}
    for zero, stage in STAGES.items():
        changes = {f"{stage}__epochs": 1, f"{stage}__log_every_steps": 3, "engine__zero_stage": zero}
        config = make_config(dataset, place / f"zero {zero}", **changes)
        jobs[str(zero)] = {"stage": stage, "config": to_dict(config), "slow": 0.1, "slow_rank": 1}
        folders[zero] = place / f"zero {zero}" / stage
    (place / "jobs.json").write_text(json.dumps(jobs))
    printed = launch(2, [RUNS, str(place / "jobs.json")], timeout=280)[0]
    raised = json.loads(next(line for line in printed.splitlines() if line.startswith("RESULT "))[7:])
    assert raised == {str(zero): ["", ""] for zero in STAGES}
    return folders


@pytest.mark.parametrize("zero", STAGES)
def test_two_ranks_measure_phases_and_name_the_slow_one(two_ranks: dict[int, Path], zero: int) -> None:
    rows = [row for row in metrics(two_ranks[zero]) if "train/loss" in row]
    for row in rows:
        assert sum(row[f"time/{phase}_ms"] for phase in PHASES) == pytest.approx(row["train/step_ms"])
        assert all(row[f"time/{phase}_ms"] > 0 for phase in PHASES)
        for name in ("samples", "tokens"):
            whole = sum(row[f"rank/{rank}/{name}_per_second"] for rank in (0, 1))
            assert whole == pytest.approx(row[f"train/{name}_per_second"])
        assert row["train/tflops_per_device"] > 0
        assert row["time/reconstruct_ms"] > 50  # on average over the two
    assert statistics.mode(row["train/straggler_rank"] for row in rows) == 1


@pytest.mark.parametrize(("zero", "collectives"), [(0, 2), (1, 3), (2, 3), (3, 2)])
def test_each_zero_stage_sends_its_collectives_of_the_weights_size(
    two_ranks: dict[int, Path], zero: int, collectives: int
) -> None:
    """An all-reduce of the gradients counts twice, a reduce-scatter and an all-gather once. DeepSpeed's stages 1 and 2
    all-reduce gradients and gather weights. In stage 3 all weights of a model as small as this stay whole in a step."""
    (start,) = events(two_ranks[zero], "start")
    sent = [row["train/sent_mb"] for row in metrics(two_ranks[zero]) if "train/sent_mb" in row]
    expected = wire_bytes("all_gather", collectives * 4 * start["parameters"] / 2**20, 2)
    assert sent[-1] == pytest.approx(expected, rel=0.01)


def test_a_rank_that_stays_slow_is_an_event(two_ranks: dict[int, Path]) -> None:
    found = [event for folder in two_ranks.values() for event in events(folder, "straggler")]
    assert found and all((event["rank"], event["host"]) == (1, socket.gethostname()) for event in found)
