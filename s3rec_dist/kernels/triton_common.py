"""What Triton kernels share: the hash of dropout, and matrix products."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from s3rec_dist import hashing

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
GOLDEN = tl.constexpr(hashing.GOLDEN)
MULTIPLIER_1 = tl.constexpr(hashing._MULTIPLIER_1)
MULTIPLIER_2 = tl.constexpr(hashing._MULTIPLIER_2)
LOW_32 = tl.constexpr(hashing._LOW_32)


@triton.jit
def hash64(key: tl.tensor, counter: tl.tensor) -> tl.tensor:
    """``hashing.hash64``, for an int64 counter."""
    x = (key + counter * GOLDEN) * MULTIPLIER_1
    x = (x ^ ((x >> 32) & LOW_32)) * MULTIPLIER_2
    return x ^ ((x >> 32) & LOW_32)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr = "ieee") -> tl.tensor:
    """In fp32. ``PRECISION`` is of fp32 inputs. The interpreter's own product of bf16 is wrong."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)
