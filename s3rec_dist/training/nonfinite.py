"""Steps whose loss or gradient is not a finite number. The engine leaves them out, on all ranks; here they are counted.

    skips = Skips(limit=10)
    launched = Launched(step, result, count)  # a GPU may still be at it
    ...
    if launched.was_skipped():
        facts = skips.add(launched)  # for the log; raises Diverged after so many in a row

A run that has diverged goes back to its last checkpoint, and stops where it has done so before in vain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from s3rec_dist.training.engine import Engine, StepResult, gather
from s3rec_dist.training.later import Later

_AT_ONCE = 1 << 24


class Diverged(ValueError):
    """Training that has come to numbers that are not finite; its argument says to which."""

    def __str__(self) -> str:
        return (
            f"training has diverged: {self.args[0]}. Lower the learning rate, set gradient_clipping, or use "
            "engine.precision=fp32, and start over with --no_resume. Checkpoints are as they were, from before"
        )


class Launched:
    """A step that this process is done with; ``count`` is the rank's part of what the loss is divided by."""

    def __init__(self, step: int, result: StepResult, count: int) -> None:
        self.step, self.losses, self.count = step, result.losses, count
        self._skipped = Later(result.skipped)

    def was_skipped(self) -> bool:
        """Whether it was left out, once that is known."""
        return bool(self._skipped.read())


class Skips:
    """Counts the steps of a run that were left out."""

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine, self._limit = engine, limit
        self.total = 0
        self.in_a_row = 0

    def add(self, launched: Launched) -> dict[str, object]:
        """Counts one; returns what is to be told of it. All ranks must call it. Where fp16's loss scale can still fall,
        which may be all that is needed, the step counts as none ``in_a_row``."""
        self.total += 1
        self.in_a_row += not self._engine.loss_scale_may_fall
        ranks = gather(_not_finite(launched))
        found = "; ".join(f"{', '.join(names)} on rank {rank}" for rank, names in enumerate(ranks) if names)
        found = found or "the gradient, of finite losses"
        return {"step": launched.step, "not_finite": found, "in_a_row": self.in_a_row}

    def check(self, facts: dict[str, object]) -> None:
        """Raises :class:`Diverged`, on all ranks, where too many were left out in a row."""
        if self.in_a_row >= self._limit:
            raise Diverged(
                f"the last {self.in_a_row} steps were skipped; in step {facts['step']} this was not a finite number: "
                f"{facts['not_finite']}"
            )


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Raises :class:`Diverged` where a weight is not a finite number."""
    for name, tensor in weights.items():
        if not all(torch.isfinite(part).all() for part in tensor.flatten().split(_AT_ONCE)):
            raise Diverged(f"{name} holds values that are not finite numbers")


def _not_finite(launched: Launched) -> list[str]:
    """The loss terms of this rank that are not finite numbers."""
    sums = [{"loss": part.total, **part.terms} for part in launched.losses]
    return sorted({name for part in sums for name, value in part.items() if not math.isfinite(value.item())})
