"""Dropout whose mask is a hash of (sample, position, site, feature) instead of a generator's next number.

A training run's dropout is thereby independent of batch composition and world size, and a resumed run
repeats it. On a CPU it is also many times faster than ``F.dropout``, whose generator is sequential.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from s3rec_dist.hashing import hash64, keep_mask, keep_scale

not_compiled = torch.compiler.disable
"""For functions that hash: the compiler takes a product with a counter for an index, which must not overflow."""


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


@not_compiled
def dropout(x: torch.Tensor, keys: DropoutKeys | None, site: int, p: float) -> torch.Tensor:
    """``x`` [T, E] with dropout, or as it is where there are no keys. ``site`` tells the layers of a model apart."""
    if keys is None or p == 0:
        return x
    dropped: torch.Tensor = _Dropout.apply(x, keep_mask(keys.tokens, x.shape[1], site, p, x.dtype), keep_scale(p))
    return dropped


@not_compiled
def dropout_add(x: torch.Tensor, residual: torch.Tensor, keys: DropoutKeys | None, site: int, p: float) -> torch.Tensor:
    """``residual + dropout(x)``, in one pass."""
    if keys is None or p == 0:
        return residual + x
    keep = keep_mask(keys.tokens, x.shape[1], site, p, x.dtype)
    added: torch.Tensor = _DropoutAdd.apply(x, residual, keep, keep_scale(p))
    return added


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (grads[0] * keep).mul_(ctx.scale), None, None


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.addcmul(residual, x, keep, value=scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (grads[0] * keep).mul_(ctx.scale), grads[0], None, None
