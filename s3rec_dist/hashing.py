"""Stateless random numbers: every draw is an integer hash of what it is drawn for.

``hash64(key, counter, ...)`` mixes integers into 64 uniform bits. It is written with operators that
mean the same on NumPy int64 arrays and on torch int64 tensors (CPU and CUDA), and 64-bit integer
arithmetic wraps alike on all three, so a draw has the same bits wherever it is made. There is no
generator state to save, to split over ranks or to restore.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # preparing and inspecting datasets do without torch, which takes a second to load
    import torch

IntArray = TypeVar("IntArray", np.ndarray, "torch.Tensor")

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 / phi as a signed 64-bit integer: the stride between counters, so that near ones land far apart."""

_MULTIPLIER_1 = 0xD6E8FEB86659FD93 - (1 << 64)
_MULTIPLIER_2 = 0xA0761D6478BD642F - (1 << 64)
_LOW_32 = 0xFFFFFFFF
_LOW_64 = (1 << 64) - 1
_LANE_VALUES = 1 << 16  # four lanes to a hash: probabilities are exact to 2^-16
SITE_STRIDE = 1 << 20
"""Words between those of one site and the next."""


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
    """Folds Python integers (seed, epoch, task, ...) into one signed 64-bit key: ``hash64(key, part + 1)`` for each.

    In Python's own integers, because every step folds a few and arrays of one number take twenty times as long.
    """
    key = 0
    for part in parts:
        key = (key + (part + 1) * GOLDEN) * _MULTIPLIER_1 & _LOW_64
        key = (key ^ key >> 32) * _MULTIPLIER_2 & _LOW_64
        key ^= key >> 32
    return _wrap(key)


def uniform_below(bits: IntArray, bound: IntArray | int) -> IntArray:
    """Uniform integers in [0, bound), for a positive ``bound``; the bias is below bound / 2^64."""
    return bits % bound


def keep_mask(keys: torch.Tensor, features: int, site: int, p: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Dropout: [..., features] of ``dtype`` (default bool), 0 with probability ``p``, hashed from int64 ``keys`` [...].

    Lane j of a row is 16 bits of the row's word j // 4, so that one hash serves four features. ``site`` tells apart
    the places that share keys. ``p`` is rounded to a multiple of 2^-16 and must stay below 1.
    """
    import torch

    words = torch.arange(-(-features // 4), device=keys.device) + site * SITE_STRIDE
    lanes = hash64(keys[..., None], words).view(torch.int16)[..., :features]
    # Zeros and ones of the values' own type multiply several times faster than bool selects.
    kept = torch.empty(lanes.shape, dtype=dtype or torch.bool, device=lanes.device)
    return torch.ge(lanes, keep_threshold(p), out=kept)


def keep_threshold(p: float) -> int:
    """The least of a lane's 16 bits, as a signed number, that keeps a value."""
    return round(p * _LANE_VALUES) - _LANE_VALUES // 2


def keep_scale(p: float) -> float:
    """What kept values are multiplied by, for the probability that the lanes can express."""
    return 1.0 / (1.0 - round(p * _LANE_VALUES) / _LANE_VALUES)


def _wrap(value: int) -> int:
    """``value`` modulo 2^64, as a signed 64-bit integer."""
    value &= _LOW_64
    return value - (1 << 64) if value >> 63 else value
