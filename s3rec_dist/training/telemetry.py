"""What training measures of itself between two logs: losses, throughput, where the time goes, who is slow, memory.

    meter = Meter(engine, flops)
    meter.streamed(packed), meter.add(launched)  # in each step
    numbers = meter.read()                  # all ranks: {"train/loss": ..., "time/forward_ms": ..., ...}

Nothing waits for a GPU between two reads. A read is one all-reduce, in which every rank learns every rank's numbers.
"""

from __future__ import annotations

import re
import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.training.engine import Engine, Precision, gather
from s3rec_dist.training.nonfinite import Launched
from s3rec_dist.training.phases import PHASES, wire_bytes
from s3rec_dist.training.tracking import peak_memory_mb

RANKS_SHOWN = 64
"""Ranks whose numbers are logged one by one; of more, only the straggler is named."""

PEAK_TFLOPS = {
    r"B200": (2250, 75.0),
    r"H[12]00 NVL": (835, 60.0),
    r"H200|GH200": (989, 67.0),
    r"H100 PCIe": (756, 51.0),
    r"H100": (989, 67.0),
    r"A100": (312, 19.5),
    r"L40S": (362, 91.6),
    r"L4": (121, 30.3),
    r"A10": (125, 31.2),
    r"V100-SXM2": (125, 15.7),
    r"T4": (65, 8.1),
}
"""TFLOP/s of dense matrix products in 16 bits and in fp32 (no TF32), from the makers' data sheets, by a part of the
name that CUDA gives; the first that fits counts."""


def peak_tflops(name: str, precision: Precision) -> float | None:
    """What the GPU called ``name`` can do at most, where that is known. A slice of a GPU is none that is known."""
    if "MIG" in name:
        return None
    found = next((peak for pattern, peak in PEAK_TFLOPS.items() if re.search(rf"\b({pattern})\b", name)), None)
    return found and found[precision == "fp32"]


@dataclass(frozen=True)
class Work:
    """What was trained on: a batch's size, or that of many."""

    samples: float
    tokens: float
    squares: float
    """Sum of the squared sequence lengths."""
    counts: Mapping[str, float]
    """Terms in each task's sum, as in :class:`LossSums`."""


class Meter:
    """Training's numbers between two logs. Loss sums stay on the device until they are read. ``flops`` says what an
    amount of work takes."""

    def __init__(self, engine: Engine, flops: Callable[[Work], float]) -> None:
        self._engine, self._world, self._clock, self._flops = engine, engine.world, engine.clock, flops
        on_gpu = self._world.device.type == "cuda"
        name = torch.cuda.get_device_name(self._world.device) if on_gpu else ""
        self._peak = peak_tflops(name, engine.precision)
        self._sums: torch.Tensor | None = None  # [1 + tasks]: total, then each task's
        self._tasks: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self._sums = None
        self._counts: dict[str, int] = {}
        self._averaged_over = self._steps = self._samples = self._tokens = self._squares = 0
        self._engine.collectives.sent.clear()
        self._rows_sent = self._engine.table_bytes_sent

    def streamed(self, packed: PackedSequences) -> None:
        """One step of this rank begins; ``packed`` is on the host still."""
        self._steps += 1
        self._samples += len(packed)
        self._tokens += len(packed.items)
        lengths = np.diff(packed.offsets.numpy()).astype(np.int64)
        self._squares += int(lengths @ lengths)

    def add(self, launched: Launched) -> None:
        """One step of this rank that was not skipped."""
        for part in launched.losses:
            self._tasks = list(part.terms)
            sums = torch.stack([part.total.detach(), *part.terms.values()]).double()
            self._sums = sums if self._sums is None else self._sums + sums
            for task, terms in part.counts.items():
                self._counts[task] = self._counts.get(task, 0) + terms
        self._averaged_over += launched.count

    def read(self) -> dict[str, float]:
        """The numbers over all ranks, without losses where all steps were skipped; they start anew. All ranks must call
        it."""
        tasks = [] if self._sums is None else self._tasks
        nothing = torch.zeros(0, dtype=torch.float64, device=self._world.device)
        sums, ranks = self._gather(nothing if self._sums is None else self._sums, tasks)
        counts = {task: sum(rank[f"terms {task}"] for rank in ranks) for task in tasks}
        total = {name: sum(rank[name] for rank in ranks) for name in ("over", "samples", "tokens", "squares")}
        numbers = {"train/loss": sums[0] / max(total["over"], 1)} if tasks else {}
        numbers |= {f"train/{t}": s / max(counts[t], 1) for t, s in zip(tasks, sums[1:], strict=True)}
        work = Work(total["samples"], total["tokens"], total["squares"], counts)
        numbers |= throughput(ranks, self._steps, self._flops(work) if tasks else 0.0, self._peak)
        self.reset()
        return numbers

    def _gather(self, sums: torch.Tensor, tasks: Sequence[str]) -> tuple[list[float], list[dict[str, float]]]:
        """Loss sums over all ranks, and every rank's other numbers."""
        world = self._world
        seconds = self._clock.read()
        own: dict[str, float] = {f"terms {task}": self._counts[task] for task in tasks}
        own |= {"over": self._averaged_over, "samples": self._samples, "tokens": self._tokens, "squares": self._squares}
        sent = self._engine.collectives.sent.items()
        of_rows = self._engine.table_bytes_sent - self._rows_sent
        own |= {"sent": of_rows + sum(wire_bytes(kind, size, world.size) for kind, size in sent), **seconds}
        own |= {"memory": peak_memory_mb(), "device_memory": _device_memory_mb(world.device)}
        row = torch.cat((sums, torch.tensor(list(own.values()), dtype=torch.float64, device=sums.device)))
        if world.size == 1:
            table = row[None]
        else:
            table = row.new_zeros(world.size, len(row))
            table[world.rank] = row
            with self._clock.during("communication"):
                dist.all_reduce(table)
        rows = table.tolist()
        whole = [sum(column) for column in zip(*(row[: len(sums)] for row in rows), strict=True)]
        return whole, [dict(zip(own, row[len(sums) :], strict=True)) for row in rows]


def throughput(ranks: Sequence[Mapping[str, float]], steps: int, flops: float, peak: float | None) -> dict[str, float]:
    """Numbers from what each rank has measured over ``steps`` steps: ``samples``, ``tokens``, seconds by phase, bytes
    ``sent``, ``memory`` and ``device_memory`` in MiB; ``flops`` are those of all, ``peak`` a device's TFLOP/s."""
    size = len(ranks)
    seconds = [max(sum(rank[phase] for phase in PHASES), 1e-9) for rank in ranks]
    busy = [all_of - rank["communication"] for all_of, rank in zip(seconds, ranks, strict=True)]
    elapsed = statistics.fmean(seconds)
    numbers = {
        f"train/{name}_per_second": sum(rank[name] for rank in ranks) / elapsed for name in ("samples", "tokens")
    }
    tflops = flops / elapsed / size / 1e12
    numbers |= {
        "train/step_ms": elapsed / steps * 1e3,
        "train/data_wait": sum(rank["data"] for rank in ranks) / sum(seconds),
        "train/tflops_per_device": tflops,
        "train/memory_mb": max(rank["memory"] for rank in ranks),
    }
    if device_memory := max(rank["device_memory"] for rank in ranks):
        numbers["train/device_memory_mb"] = device_memory
    if peak:
        numbers["train/mfu"] = tflops / peak
    numbers |= {f"time/{p}_ms": statistics.fmean(rank[p] for rank in ranks) / steps * 1e3 for p in PHASES}
    if size > 1:
        slowest = max(range(size), key=busy.__getitem__)
        others = statistics.median(busy[:slowest] + busy[slowest + 1 :])
        numbers |= {
            "train/sent_mb": statistics.fmean(rank["sent"] for rank in ranks) / steps / 2**20,
            "train/straggler_rank": slowest,
            "train/straggler_ratio": busy[slowest] / max(others, 1e-9),
        }
    if 1 < size <= RANKS_SHOWN:
        for i, rank in enumerate(ranks):
            numbers |= {
                f"rank/{i}/samples_per_second": rank["samples"] / elapsed,
                f"rank/{i}/tokens_per_second": rank["tokens"] / elapsed,
                f"rank/{i}/busy_ms": busy[i] / steps * 1e3,
                f"rank/{i}/memory_mb": rank["memory"],
            }
    return numbers


class Stragglers:
    """Notices a rank that stays the slowest. A step takes as long as its slowest rank."""

    LOGS, RATIO = 5, 1.2
    """So many logs in a row, and in each so much slower than the median of the others, are told of, once."""

    def __init__(self) -> None:
        self._hosts = gather(socket.gethostname())
        self._rank, self._logs = -1, 0

    def see(self, numbers: Mapping[str, float]) -> dict[str, str | int | float] | None:
        """What is to be told after a log, if anything."""
        rank, ratio = int(numbers.get("train/straggler_rank", -1)), numbers.get("train/straggler_ratio", 0.0)
        if ratio < self.RATIO:
            rank = -1
        self._logs = self._logs + 1 if rank == self._rank else 1
        self._rank = rank
        if rank < 0 or self._logs != self.LOGS:
            return None
        return {"rank": rank, "host": self._hosts[rank], "ratio": round(ratio, 2), "logs": self._logs}


def _device_memory_mb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
