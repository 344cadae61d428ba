"""Ends a process that waits for another in vain, with the reason: a killed rank, a lost host, a hung collective.

    with Watchdog(world, config.engine) as watchdog:
        watchdog.working("reading data")  # alone; others may wait for it for engine.stall_seconds
        watchdog.stepping(412)            # with all the others

Threads of all processes tell each other, through the store in which they met, that they are alive and what they are
at. Where nothing has moved here for ``engine.hang_seconds``, and a process is not heard of for as long, or all of them
are alive in a step that does not end, this one prints what it has waited for and exits with status 69. A process that
is at work is waited for, whatever it takes, up to ``engine.stall_seconds``. Time in which this process itself was
stopped, as by a suspended laptop, does not count.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from s3rec_dist.config import EngineConfig
from s3rec_dist.training.engine import World, gather

STATUS = 69
"""EX_UNAVAILABLE of sysexits.h: what this process needs does not answer."""

RECORD_S = 5.0
"""Seconds that writing down why a run ends may take."""

SLOWER = 10
"""Times the longest step so far that a step may take, where that is more than ``hang_seconds``."""


@dataclass(frozen=True)
class Sign:
    """What a process says of itself."""

    host: str
    at: str
    """What it does: ``step 412``, ``reading data``."""
    seconds: float
    """For how long."""
    in_step: bool
    """Whether that is a step, which it takes with the others."""
    longest_step: float
    """In seconds, the first one, which may compile, aside."""
    done: bool
    """Whether it has left because there was nothing more to do."""
    beat: int
    """Counts up."""


def in_vain(
    rank: int, signs: Mapping[int, Sign], silent: Mapping[int, float], hang_s: float, stall_s: float
) -> tuple[str, list[int]] | None:
    """Why waiting on is in vain for ``rank``, and for which ranks; None where it is not. ``silent`` are the seconds
    since the newest sign of each, and of itself, since the store has last answered."""
    there = {other: sign for other, sign in signs.items() if not sign.done}
    if signs[rank].seconds < hang_s or 0 not in there:
        return None
    if silent[rank] >= hang_s:
        host = signs[0].host
        lost = [other for other, sign in signs.items() if other == 0 or sign.host == host != signs[rank].host]
        return f"the process of rank 0 on {host} has not answered for {silent[rank]:.0f} s", lost
    if lost := [other for other in there if silent[other] >= hang_s]:
        last = [f"rank {r} on {signs[r].host} for {silent[r]:.0f} s (last at: {signs[r].at})" for r in lost]
        return f"no sign of life from {_first(last)}", lost
    slow = SLOWER * max(sign.longest_step for sign in there.values())
    if all(sign.in_step and sign.seconds >= max(hang_s, slow) for sign in there.values()):
        where = [f"rank {r} on {sign.host} in {sign.at} for {sign.seconds:.0f} s" for r, sign in there.items()]
        return f"all processes are alive, and none of them moves: {_first(where)}", []
    if stalled := [r for r, sign in there.items() if not sign.in_step and sign.seconds >= stall_s]:
        where = [f"rank {r} on {signs[r].host}, {signs[r].at} for {signs[r].seconds:.0f} s" for r in stalled]
        return f"engine.stall_seconds={stall_s:g} are over for {_first(where)}", stalled
    return None


def _first(words: list[str]) -> str:
    return "; ".join(words[:8]) + (f"; and {len(words) - 8} more" if len(words) > 8 else "")


class Watchdog:
    """Watches while it is entered, where there are other processes; all ranks must enter it."""

    def __init__(self, world: World, config: EngineConfig) -> None:
        self._world, self._hang_s, self._stall_s = world, config.hang_seconds, config.stall_seconds
        self._compiles = config.compile  # at the first step, and perhaps when a batch of one sample comes
        self._interval = max(self._hang_s / 15, world.size / 100)
        self._host = socket.gethostname()
        self._at, self._in_step, self._since = "starting", False, time.monotonic()
        self._steps, self._longest = 0, 0.0
        self._left, self._done = threading.Event(), False
        self._threads: list[threading.Thread] = []
        self.record: Callable[[dict[str, Any]], None] = lambda facts: None
        """Writes down, on the first of the ranks that are left, why the run ends."""

    def __enter__(self) -> Watchdog:
        self._watched = threading.get_ident()
        if self._world.size > 1 and self._hang_s:
            prefix = gather(secrets.token_hex(4))[0]  # a restart may meet the store of the run before it
            self._keys = [f"watchdog/{prefix}/{rank}" for rank in range(self._world.size)]
            self._store = self._connect()
            self._tell(0)
            self._signs = dict(enumerate(gather(self._sign(0))))
            self._heard = dict.fromkeys(self._signs, time.monotonic())
            self._threads = [
                threading.Thread(target=target, daemon=True) for target in (self._exchange_signs, self._watch)
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._done = kind is None or issubclass(kind, SystemExit)
        self._left.set()
        for thread in self._threads:
            thread.join(timeout=2)

    def working(self, at: str) -> None:
        """From here on this process is at something of its own."""
        self._reach(at, in_step=False)

    def stepping(self, step: int) -> None:
        """From here on it takes a step with the others."""
        self._steps += 1
        self._reach(f"step {step}", in_step=self._steps > 1 and not self._compiles)

    def _reach(self, at: str, in_step: bool) -> None:
        now = time.monotonic()
        if self._in_step:
            self._longest = max(self._longest, now - self._since)
        self._at, self._in_step, self._since = at, in_step, now

    def _sign(self, beat: int) -> Sign:
        seconds = time.monotonic() - self._since
        return Sign(self._host, self._at, seconds, self._in_step, self._longest, self._done, beat)

    def _tell(self, beat: int) -> None:
        self._store.set(self._keys[self._world.rank], json.dumps(asdict(self._sign(beat))))

    def _connect(self) -> dist.TCPStore:
        """A client of its own: the main thread may wait in the other one."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((address, port), timeout=self._hang_s).close()  # fails without many words
        return dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=self._hang_s))

    def _exchange_signs(self) -> None:
        for beat in range(1, sys.maxsize):
            self._left.wait(self._interval)
            try:
                self._tell(beat)
                if self._left.is_set():
                    return
                for rank, text in enumerate(self._store.multi_get(self._keys)):
                    sign = Sign(**json.loads(text))
                    if sign.beat != self._signs[rank].beat:
                        self._signs[rank], self._heard[rank] = sign, time.monotonic()
            except RuntimeError:  # the store's process or its host is gone, or only the connection
                if self._left.is_set():
                    return
                with contextlib.suppress(OSError, RuntimeError):
                    self._store = self._connect()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._left.wait(self._interval):
            now = time.monotonic()
            if now - before > self._interval + self._hang_s / 3:  # this process was stopped
                self._since = now
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            own, signs = self._world.rank, {**self._signs, self._world.rank: self._sign(0)}
            silent = {rank: now - heard for rank, heard in self._heard.items()}
            if found := in_vain(own, signs, silent, self._hang_s, self._stall_s):
                self._end(signs[own], *found)

    def _end(self, own: Sign, reason: str, lost: list[int]) -> NoReturn:
        try:
            where = self._where()
            print(
                f"s3rec: error (rank {self._world.rank} on {own.host}): no progress in {own.at} for {own.seconds:.0f} "
                f"s, in {where}: {reason}. The same command goes on from the newest checkpoint; "
                f"engine.hang_seconds={self._hang_s:g} is how long this may last",
                file=sys.stderr,
                flush=True,
            )
            if self._world.rank == min(set(self._signs) - set(lost), default=self._world.rank):
                facts = {"at": own.at, "seconds": round(own.seconds), "where": where, "reason": reason}
                recording = threading.Thread(target=self.record, args=(facts | {"status": STATUS},), daemon=True)
                recording.start()
                recording.join(RECORD_S)
        finally:
            os._exit(STATUS)

    def _where(self) -> str:
        """The innermost call of the watched thread, and the innermost of this package."""
        frames = traceback.extract_stack(sys._current_frames()[self._watched])[::-1]
        package = str(Path(__file__).parents[1])
        ours = next((frame for frame in frames if frame.filename.startswith(package)), frames[0])
        calls = [f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})" for frame in (frames[0], ours)]
        return " of ".join(dict.fromkeys(calls))
