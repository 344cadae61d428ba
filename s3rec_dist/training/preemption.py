"""SIGTERM and SIGUSR1, by which clusters announce that they want their machines back.

    with Preemption() as preemption:
        ...  # after every step:
        if number := preemption.agreed(world):
            ...  # save, then
            raise Preempted(number)

One process that has had a signal is enough: all learn of it after the same step, save, and leave with status 75. A
second signal, unless it comes on the heels of the first as when a launcher and its process group pass it on both, ends
the process at once with status 128 + its number, in whatever call it may be.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from s3rec_dist.training.engine import World, gather
from s3rec_dist.training.later import Later

STATUS = 75
"""EX_TEMPFAIL of sysexits.h: the same command, run again, goes on."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

SAME_SIGNAL_S = 2.0
"""Signals within this time are one."""


class Preempted(SystemExit):
    """A run that has saved its checkpoint and leaves because of a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(STATUS)
        self.signal = signal.Signals(number).name


class CutShort(Exception):
    """A validation that was broken off because of the signal ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Preemption:
    """Notes signals while it is entered; in a thread other than the main one, which cannot have any, none."""

    def __init__(self) -> None:
        self._received = 0
        self._pending: _Flag | None = None

    def __enter__(self) -> Preemption:
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # Handlers in Python wait for the main thread to return from a collective; this thread does not.
            reading, self._writing = socket.socketpair()
            self._writing.setblocking(False)
            self._watcher = threading.Thread(target=self._watch, args=(reading,), daemon=True)
            self._watcher.start()
            self._wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            for number in SIGNALS:
                signal.siginterrupt(number, False)  # system calls of libraries go on
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        preempted = kind is Preempted
        if kind is None or preempted:
            self._read()
        if preempted:
            with contextlib.suppress(RuntimeError):
                gather(None)  # a launcher ends the others as soon as it sees one leave
        if self._handlers:
            for number, handler in self._handlers.items():
                leaves_others = preempted and dist.is_initialized() and dist.get_world_size() > 1
                signal.signal(number, signal.SIG_IGN if leaves_others else handler)
            signal.set_wakeup_fd(self._wakeup)
            self._writing.close()
            self._watcher.join()

    def _watch(self, reading: socket.socket) -> None:
        first = 0.0
        with reading:
            while number := int.from_bytes(reading.recv(1), "big"):
                if number not in SIGNALS:
                    continue
                if not self._received:
                    self._received, first = number, time.monotonic()
                elif time.monotonic() - first > SAME_SIGNAL_S:
                    os._exit(128 + number)

    def agreed(self, world: World) -> int:
        """The signal that a process had by the end of the step before, the same number on all ranks, or 0. All call
        it after every step; none waits for more than the step before."""
        if world.size == 1:
            return self._received
        found = self._read()
        self._pending = _Flag(self._received, world.device)
        return found

    def _read(self) -> int:
        pending, self._pending = self._pending, None
        return 0 if pending is None else pending.read()

    @contextlib.contextmanager
    def cutting_short(self, module: nn.Module, world: World | None = None) -> Iterator[None]:
        """A block that raises :class:`CutShort` when ``module`` is called after this process has had a signal, or,
        where all ranks of a ``world`` call it alike, after one of them has, on all of them."""

        def check(*_: object) -> None:
            if number := self.agreed(world) if world else self._received:
                raise CutShort(number)

        hook = module.register_forward_pre_hook(check)
        try:
            yield
        finally:
            hook.remove()


class _Flag:
    """The largest of all ranks' numbers, on its way. A GPU is not waited for until it is read."""

    def __init__(self, number: int, device: torch.device) -> None:
        value = torch.full((1,), number, dtype=torch.int32, device=device)
        self._work = dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True)
        if device.type == "cuda":
            self._work.wait()  # of the GPU's stream, not of this thread
        self._largest = Later(value)

    def read(self) -> int:
        self._work.wait()
        return int(self._largest.read())
