"""Dropout whose mask is a hash of (sample, position, site, feature) instead of a generator's next number.

A training run's dropout is thereby independent of batch composition and world size, and a resumed run
repeats it. On a CPU it is also many times faster than ``F.dropout``, whose generator is sequential.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from s3rec_dist.hashing import hash64, keep_mask, keep_scale


@dataclass(frozen=True)
class DropoutKeys:
    """What a pass's dropout is hashed from."""

    tokens: torch.Tensor
    """int64 [T], one for each packed token."""
    sequences: torch.Tensor
    """int64 [B], one for each sequence, for attention probabilities."""

    @staticmethod
    def of(sequence_keys: torch.Tensor, sequence: torch.Tensor, positions: torch.Tensor) -> DropoutKeys:
        """Keys for tokens at ``positions`` [T] of ``sequence`` [T] (indices into ``sequence_keys`` [B])."""
        return DropoutKeys(hash64(sequence_keys[sequence], positions), sequence_keys)

    def take(self, tokens: torch.Tensor) -> DropoutKeys:
        """The keys of a subset of the tokens."""
        return DropoutKeys(self.tokens[tokens], self.sequences)


def dropout(x: torch.Tensor, keys: DropoutKeys | None, site: int, p: float) -> torch.Tensor:
    """``x`` [T, E] with dropout, or as it is where there are no keys."""
    if keys is None or p == 0:
        return x
    return _apply_mask(x, keep_mask(keys.tokens, x.shape[1], site, p), keep_scale(p))


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.where(keep, x * scale, 0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, grads[0] * ctx.scale, 0), None, None


def _apply_mask(x: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
    masked: torch.Tensor = _Masked.apply(x, keep, scale)
    return masked
