"""Requests that come at the same time are answered together, by one thread that never waits for more than a moment."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Overloaded(Exception):
    """More requests wait than may."""


@dataclass(frozen=True)
class _Waiting(Generic[Q, A]):
    request: Q
    answer: asyncio.Future[A]
    loop: asyncio.AbstractEventLoop


class Batcher(Generic[Q, A]):
    """Calls ``answer_all`` with up to ``most`` requests: as many as wait, and those of the next ``wait_s`` where there
    are fewer. At most ``most_waiting`` wait. An error of a batch is each of its requests' error."""

    def __init__(
        self,
        answer_all: Callable[[Sequence[Q]], Sequence[A]],
        *,
        most: int,
        wait_s: float,
        most_waiting: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._answer_all, self._most, self._wait_s, self._on_batch = answer_all, most, wait_s, on_batch
        self._waiting: queue.Queue[_Waiting[Q, A] | None] = queue.Queue(most_waiting)
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._waiting.qsize()

    async def ask(self, request: Q) -> A:
        """The answer to one request. Raises :class:`Overloaded`, or what answering raised."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[A] = loop.create_future()
        try:
            self._waiting.put_nowait(_Waiting(request, answer, loop))
        except queue.Full:
            raise Overloaded from None
        return await answer

    def close(self) -> None:
        """Answers what waits, and ends."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            first = self._waiting.get()
            if first is None:
                return
            batch, is_last = [first], False
            until = time.monotonic() + self._wait_s
            while len(batch) < self._most:
                try:
                    more = self._waiting.get(timeout=max(until - time.monotonic(), 0))
                except queue.Empty:
                    break
                if more is None:
                    is_last = True
                    break
                batch.append(more)
            self._on_batch(len(batch))
            try:
                answers: Sequence[A | BaseException] = self._answer_all([waiting.request for waiting in batch])
            except Exception as error:
                answers = [error] * len(batch)
            for waiting, found in zip(batch, answers, strict=True):
                waiting.loop.call_soon_threadsafe(_settle, waiting.answer, found)
            if is_last:
                return


def _settle(answer: asyncio.Future[A], found: A | BaseException) -> None:
    if answer.cancelled():  # whoever asked has gone
        return
    if isinstance(found, BaseException):
        answer.set_exception(found)
    else:
        answer.set_result(found)
