"""What training measures of itself between two logs: loss means, throughput, waiting, memory."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.training.engine import LossSums, World, together
from s3rec_dist.training.tracking import peak_memory_mb


class TrainingError(ValueError):
    """Training that cannot go on; the message says why and what to change."""


class Meter:
    """Training's numbers between two logs. Loss sums stay on the device until they are read."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: torch.Tensor | None = None  # [1 + tasks]: total, then each task's
        self._tasks: list[str] = []
        self._reset()
        self._mark = time.perf_counter()

    def _reset(self) -> None:
        self._sums = None
        self._counts: dict[str, int] = {}
        self._averaged_over = self._samples = self._tokens = 0
        self._active = self._waited = 0.0

    def go(self) -> None:
        """Time counts as training from here on."""
        self._mark = time.perf_counter()

    def pause(self) -> None:
        """Time counts as something else from here on."""
        self._active += time.perf_counter() - self._mark

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def add(self, losses: Sequence[LossSums], packed: PackedSequences, count: int) -> None:
        """One step of this rank; ``count`` is its part of what the loss is divided by."""
        for part in losses:
            self._tasks = list(part.terms)
            sums = torch.stack([part.total.detach(), *part.terms.values()]).double()
            self._sums = sums if self._sums is None else self._sums + sums
            for task, terms in part.counts.items():
                self._counts[task] = self._counts.get(task, 0) + terms
        self._averaged_over += count
        self._samples += len(packed)
        self._tokens += len(packed.items)

    def check(self, step: int) -> None:
        """Raises :class:`TrainingError`, on all ranks, where a loss is not a number."""
        with together():
            if self._sums is not None and not math.isfinite(self._sums[0].item()):
                self._fail(step)

    def read(self, step: int) -> dict[str, float]:
        """The numbers over all ranks, which start anew. All ranks must call it."""
        self.pause()
        self.go()
        assert self._sums is not None
        counts = [self._counts[task] for task in self._tasks]
        host = [*counts, self._averaged_over, self._samples, self._tokens, self._active, self._waited]
        row = torch.cat((self._sums, torch.tensor(host, dtype=torch.float64, device=self._sums.device)))
        memory = torch.tensor([peak_memory_mb(), _device_memory_mb(self._world.device)], device=row.device)
        if self._world.size > 1:
            dist.all_reduce(row)
            dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        total, *rest = row.tolist()
        sums, rest = rest[: len(counts)], rest[len(counts) :]
        counts, (averaged_over, samples, tokens, active, waited) = rest[: len(counts)], rest[len(counts) :]
        if not math.isfinite(total):
            self._fail(step)
        seconds = active / self._world.size
        numbers = {"train/loss": total / max(averaged_over, 1)}
        numbers |= {f"train/{t}": s / max(c, 1) for t, s, c in zip(self._tasks, sums, counts, strict=True)}
        numbers |= {
            "train/samples_per_second": samples / seconds,
            "train/tokens_per_second": tokens / seconds,
            "train/data_wait": waited / active,
            "train/memory_mb": memory[0].item(),
        }
        if self._world.device.type == "cuda":
            numbers["train/device_memory_mb"] = memory[1].item()
        self._reset()
        return numbers

    def _fail(self, step: int) -> None:
        raise TrainingError(
            f"the training loss is not a finite number any more by step {step}; lower the learning rate, set "
            "gradient_clipping, or use engine.precision=fp32, and start over with --no_resume. Checkpoints are as they "
            "were, from before"
        )


def _device_memory_mb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
