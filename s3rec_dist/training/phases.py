"""Where the time of a training step goes, and what its collectives send.

    clock = PhaseClock(device)
    clock.enter("forward")                  # time counts as forward from here on
    with clock.during("communication"):     # and as communication inside
        ...
    clock.read()                            # {"forward": 0.7, ...}: seconds since the last read

On a CPU this is the host's time. On a GPU it is the device's: each change of phase records an event on the stream that
computes, and nothing waits for one before the clock is read. A phase is then the time from its first event to the next
one: work, and waiting for the host or for other ranks. Communication that overlaps with computing takes none.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

PHASES = ("data", "reconstruct", "forward", "backward", "communication", "optimizer", "other")
"""Waiting for data; making samples on the device; the passes; collectives, waiting for other ranks included; Adam."""

IDLE = ""
"""The phase that is not counted: validation, checkpoints."""

_PENDING = 1024
"""Spans on a GPU after which those that are over are counted and their events used again."""


class PhaseClock:
    """Seconds by phase."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._stream = torch.cuda.current_stream(device) if self._device else None
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = IDLE
        self._since: Any = None  # when the phase began: seconds, or an event
        self._pending: deque[tuple[str, Any, Any]] = deque()
        self._free: list[Any] = []

    @property
    def is_idle(self) -> bool:
        """Whether time counts as nothing."""
        return self._phase == IDLE

    def enter(self, phase: str) -> str:
        """Time counts as ``phase`` from here on. Returns what it counted as before."""
        before, began = self._phase, self._since
        now = time.perf_counter() if self._device is None else self._event()
        if before and self._device is None:
            self._seconds[before] += now - began
        elif before:
            self._pending.append((before, began, now))
            if len(self._pending) >= _PENDING:
                self._count(wait=False)
        self._phase, self._since = phase, now
        return before

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Counts a block as ``phase``, unless the clock is idle. A block that runs on another stream of a GPU goes on
        beside what this clock times, and is not counted."""
        if self.is_idle or (self._device is not None and torch.cuda.current_stream(self._device) != self._stream):
            yield
            return
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last read. Waits for a GPU."""
        self.enter(self._phase)
        self._count(wait=True)
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def _event(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _count(self, *, wait: bool) -> None:
        while self._pending:
            phase, began, ended = self._pending[0]
            if wait:
                ended.synchronize()
            elif not ended.query():
                return
            self._pending.popleft()
            self._seconds[phase] += began.elapsed_time(ended) / 1e3
            self._free.append(began)


def wire_bytes(kind: str, size: float, ranks: int) -> float:
    """Bytes that each of ``ranks`` sends, on average, in a collective over ``size`` bytes: the whole tensor's, not a
    part's. By the ring algorithms, which send the least."""
    return (2.0 if kind == "all_reduce" else 1.0) * size * (ranks - 1) / ranks


_WHOLE = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "all_gather": (0, "tensor_list"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "all_gather_coalesced": (0, "output_tensors"),
    "reduce_scatter": (1, "input_list"),
    "reduce_scatter_tensor": (1, "input_tensor"),
}
"""The methods of DeepSpeed's backend, and the argument of each that is the whole tensor."""


class Collectives:
    """Watches the collectives of DeepSpeed's ``backend``, by taking the place of its methods on this object: their time
    counts as communication, and ``sent`` has the bytes of the tensors by kind."""

    def __init__(self, backend: Any, clock: PhaseClock) -> None:
        self._backend, self._clock = backend, clock
        self.sent: Counter[str] = Counter()
        for name in _WHOLE:
            setattr(backend, name, partial(self._call, name, getattr(type(backend), name).__get__(backend)))

    def _call(self, name: str, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        place, argument = _WHOLE[name]
        whole = named[argument] if argument in named else arguments[place]
        tensors = [whole] if isinstance(whole, torch.Tensor) else whole
        if not self._clock.is_idle:
            self.sent[name] += sum(tensor.nbytes for tensor in tensors)
        with self._clock.during("communication"):
            work = method(*arguments, **named)
        return work if work is None else _Waiting(work, self._clock)

    def close(self) -> None:
        """Gives the backend its methods back."""
        for name in _WHOLE:
            vars(self._backend).pop(name, None)


class _Waiting:
    """A collective under way; waiting for it counts as communication."""

    def __init__(self, work: Any, clock: PhaseClock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *arguments: Any) -> Any:
        with self._clock.during("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
