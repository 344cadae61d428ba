"""Ways to compute the same thing, compared: each is held against the definition first, and timed where it is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Most that a rival may be off the definition, relative to its root mean square."""


def wrong(
    names: Sequence[str], found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], most: float
) -> str | None:
    """How a rival's results, by name, differ from the definition's, which are fp32, if they do."""
    for name, value, right in zip(names, found, expected, strict=True):
        error = float((value.float() - right).norm() / right.norm())
        if not error <= most:
            return f"its {name} is off by {error:.2g} of the root mean square, more than {most:g}"
    return None


def is_left_out(name: str, check: Callable[[], str | None], *, is_ours: bool) -> bool:
    """Whether a rival fails, or ``check`` finds its results wrong; it is then named on the terminal with the reason.
    Raises RuntimeError if it is ours."""
    try:
        reason = check()
    except Exception as error:  # whatever a rival raises
        reason = f"{type(error).__name__}: {error}"
    if reason and is_ours:
        raise RuntimeError(f"{name} fails: {reason}")
    if reason:
        print(f"{name} is left out: {reason.splitlines()[0]}")
    return bool(reason)


def seconds_of(call: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    """Of each repetition, after three that are not counted. On a GPU of its own time; a large buffer that is written
    between calls empties the cache and lets the host, launching the next call, run ahead."""
    seconds = []
    buffer = torch.empty(1 << 30, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    for repetition in range(repetitions + 3):
        if buffer is None:
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            buffer.zero_()
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            elapsed = begin.elapsed_time(end) / 1e3
        if repetition >= 3:
            seconds.append(elapsed)
    return seconds
