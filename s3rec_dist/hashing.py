"""Stateless random numbers: every draw is an integer hash of what it is drawn for.

``hash64(key, counter, ...)`` mixes integers into 64 uniform bits. It is written with operators that
mean the same on NumPy int64 arrays and on torch int64 tensors (CPU and CUDA), and 64-bit integer
arithmetic wraps alike on all three, so a draw has the same bits wherever it is made. There is no
generator state to save, to split over ranks or to restore.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

IntArray = TypeVar("IntArray", np.ndarray, torch.Tensor)

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 / phi as a signed 64-bit integer: the stride between counters, so that near ones land far apart."""

_MULTIPLIER_1 = 0xD6E8FEB86659FD93 - (1 << 64)
_MULTIPLIER_2 = 0xA0761D6478BD642F - (1 << 64)
_LOW_32 = 0xFFFFFFFF


def mix(x: IntArray) -> IntArray:
    """A bijection of int64 that scatters every input bit over all output bits. ``x`` may be changed in place."""
    x *= _MULTIPLIER_1
    x ^= (x >> 32) & _LOW_32
    x *= _MULTIPLIER_2
    x ^= (x >> 32) & _LOW_32
    return x


def hash64(key: IntArray, counter: IntArray | int) -> IntArray:
    """64 uniform bits for each (key, counter), as int64 of the broadcast shape."""
    if isinstance(counter, int):
        return mix(key + _wrap(counter * GOLDEN))
    return mix(key + counter * GOLDEN)


def key_of(*parts: int) -> int:
    """Folds Python integers (seed, epoch, task, ...) into one signed 64-bit key."""
    key = np.zeros(1, dtype=np.int64)
    for part in parts:
        key = hash64(key, part + 1)
    return int(key[0])


def uniform_below(bits: IntArray, bound: IntArray | int) -> IntArray:
    """Uniform integers in [0, bound), for a positive ``bound``; the bias is below bound / 2^64."""
    return bits % bound


def _wrap(value: int) -> int:
    """``value`` modulo 2^64, as a signed 64-bit integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
