"""Which way computes an operator: the one place that chooses, and says why.

Attention has three ways: ``reference``, ``sdpa`` and ``triton``. The other operators have two, ``reference`` in plain
PyTorch, which is also their fast path on a CPU, and ``triton``. The setting ``model.attention`` chooses for a model;
:func:`forced_backend` overrides it for a block of code.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

BACKENDS = ("reference", "sdpa")
"""Those of attention that run on every device and take every head size; ``triton`` is the third one."""

TRITON_HEAD_SIZES = (16, 32, 64, 128)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_forced: ContextVar[str | None] = ContextVar("_forced", default=None)


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Within the block, in this thread, all operators take the backend ``name``, whatever they were set to.

    Operators without ``sdpa`` then take ``reference``. Code under ``torch.compile`` cannot look at this, and goes by
    its settings. Raises ValueError for an unknown name here, and in an operator that ``triton`` cannot compute.
    """
    if name not in (*BACKENDS, "triton"):
        raise ValueError(f"backend={name!r}: expected {', '.join(BACKENDS)}, triton")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The backend of attention for such tensors: the one that is wanted, or for ``auto`` the fastest that takes them.

    Raises ValueError for a wanted one that is unknown or does not take them.
    """
    return explain_backend(wanted, device, dtype, head_size)[0]


def explain_backend(wanted: str, device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[str, str]:
    """:func:`choose_backend`, and why, for people to read."""
    wanted = _wanted(wanted)
    if wanted in BACKENDS:
        return wanted, "asked for"
    obstacle = _triton_obstacle(device, dtype, head_size)
    if wanted == "triton":
        _refuse(obstacle, BACKENDS)
        return wanted, "asked for"
    if device.type == "cpu":
        return "sdpa", "the fast path on a CPU"
    return ("sdpa", f"triton {obstacle}") if obstacle else ("triton", "the fast path on a GPU")


def use_triton(
    device: torch.device, dtype: torch.dtype, wanted: str = "auto", *, own_obstacle: str | None = None
) -> bool:
    """Whether an operator that has no ``sdpa`` runs its Triton kernels on such tensors, rather than its reference.

    ``wanted`` is attention's: ``sdpa`` means the reference. ``own_obstacle`` is what keeps this operator's kernels from
    them, if anything does, to be read after "triton". Raises ValueError as :func:`choose_backend` does.
    """
    wanted = _wanted(wanted)
    if wanted in BACKENDS or (wanted == "auto" and device.type == "cpu"):
        return False
    obstacle = _triton_obstacle(device, dtype) or own_obstacle
    if wanted == "triton":
        _refuse(obstacle, ("reference",))
    return obstacle is None


def _wanted(setting: str) -> str:
    if setting not in ("auto", *BACKENDS, "triton"):
        raise ValueError(f"backend={setting!r}: expected auto, {', '.join(BACKENDS)}, triton")
    return setting if torch.compiler.is_compiling() else _forced.get() or setting


def _refuse(obstacle: str | None, others: tuple[str, ...]) -> None:
    if obstacle:
        raise ValueError(f"backend='triton' {obstacle}; use {' or '.join(others)}")


def _triton_obstacle(device: torch.device, dtype: torch.dtype, head_size: int | None = None) -> str | None:
    """What keeps the Triton kernels from such tensors, to be read after their name. ``head_size`` is attention's."""
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed"
    if dtype not in TRITON_DTYPES:
        return f"takes {', '.join(str(t).removeprefix('torch.') for t in TRITON_DTYPES)}, not {dtype}"
    if head_size is not None and head_size not in TRITON_HEAD_SIZES:
        return f"takes head sizes {', '.join(map(str, TRITON_HEAD_SIZES))}, not {head_size}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA device, or the environment variable TRITON_INTERPRET=1 to be interpreted on a CPU"
    if device.type not in ("cpu", "cuda"):
        return f"runs on CUDA, not on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a device of compute capability 8.0 or above"
    return None
