"""Sorted events -> row groups of sequences, in bounded memory: the last step of ``prepare``, on every engine.

    fold = Fold(rows=4096, max_history=10_000, items=n_items)
    shards = write_shards(fold.groups(events, names), folder, groups_per_shard)
    fold.cut                                   # what max_history left out

Needs nothing but NumPy and Arrow, so that Spark's executors can import it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s3rec_dist.data.formats import SHARD_SCHEMA


@dataclass
class Cut:
    """What ``max_history`` left out."""

    users: int
    """Users who lost interactions."""
    items: np.ndarray
    """Interactions left out of each item id, int64 [N + 1]."""

    def add(self, other: Cut) -> None:
        """Adds what another part of the users lost."""
        self.users += other.users
        self.items += other.items


class Fold:
    """Folds (u, item) rows that are sorted by user and time; holds ``rows`` finished users and one unfinished."""

    def __init__(self, rows: int, max_history: int, items: int) -> None:
        self.rows, self.max_history = rows, max_history
        self.cut = Cut(0, np.zeros(items + 1, np.int64))
        self._lengths: list[np.ndarray] = []
        self._items: list[np.ndarray] = []
        self._finished = 0
        self._last: list[np.ndarray] = []  # items of the unfinished user, oldest first
        self._held = 0
        self._was_cut = False

    def groups(self, events: Iterator[pa.RecordBatch], names: Iterator[pa.Array]) -> Iterator[pa.RecordBatch]:
        """Batches of ``rows`` (user, items) rows. ``events`` are (u, item), ``names`` each u's raw id in their order;
        a batch's names are asked for when the batch's users are finished."""
        taken = _Names(names)
        user = None
        for batch in events:
            u, items = batch.column(0).to_numpy(), batch.column(1).to_numpy()
            if not len(u):
                continue
            starts = np.flatnonzero(u[1:] != u[:-1]) + 1
            if user is not None and u[0] != user:
                self._finish()
            user = u[-1]
            if not len(starts):
                self._hold(items)
                continue
            self._hold(items[: starts[0]])
            self._finish()
            self._add(np.diff(starts), items[starts[0] : starts[-1]])
            self._hold(items[starts[-1] :])
            if self._finished >= self.rows:
                yield from self._full_groups(taken)
        if user is not None:
            self._finish()
        yield from self._full_groups(taken)
        if self._finished:
            yield _group(*self._gathered(), taken)

    def _hold(self, items: np.ndarray) -> None:
        """Adds to the unfinished user, of whom at most twice ``max_history`` items and a batch are held."""
        self._last.append(items)
        self._held += len(items)
        if self._held > 2 * self.max_history:
            self._trim()

    def _trim(self) -> None:
        items = np.concatenate(self._last)
        if len(items) > self.max_history:
            self._drop(items[: -self.max_history])
            self._was_cut = True
            items = items[-self.max_history :].copy()
        self._last, self._held = [items], len(items)

    def _finish(self) -> None:
        self._trim()
        self.cut.users += self._was_cut
        self._lengths.append(np.array([self._held]))
        self._items += self._last
        self._finished += 1
        self._last, self._held, self._was_cut = [], 0, False

    def _add(self, lengths: np.ndarray, items: np.ndarray) -> None:
        """Finished users."""
        if lengths.max(initial=0) > self.max_history:
            from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(items))
            is_kept = from_end <= self.max_history
            self._drop(items[~is_kept])
            self.cut.users += int((lengths > self.max_history).sum())
            lengths, items = np.minimum(lengths, self.max_history), items[is_kept]
        self._lengths.append(lengths)
        self._items.append(items)
        self._finished += len(lengths)

    def _drop(self, items: np.ndarray) -> None:
        self.cut.items += np.bincount(items, minlength=len(self.cut.items))

    def _gathered(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self._lengths), np.concatenate(self._items)

    def _full_groups(self, names: _Names) -> Iterator[pa.RecordBatch]:
        if self._finished < self.rows:
            return
        lengths, items = self._gathered()
        ends = np.concatenate([[0], np.cumsum(lengths)])
        full = len(lengths) // self.rows * self.rows
        for row in range(0, full, self.rows):
            yield _group(lengths[row : row + self.rows], items[ends[row] : ends[row + self.rows]], names)
        self._lengths, self._items = [lengths[full:]], [items[ends[full] :].copy()]
        self._finished = len(lengths) - full


def _group(lengths: np.ndarray, items: np.ndarray, names: _Names) -> pa.RecordBatch:
    """The next users, of these lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(items, pa.int32()))
    return pa.RecordBatch.from_arrays([names.take(len(lengths)), lists], schema=SHARD_SCHEMA)


class _Names:
    """Takes the next raw ids from arrays of them."""

    def __init__(self, arrays: Iterator[pa.Array]) -> None:
        self._arrays = arrays
        self._rest = pa.array([], pa.string())

    def take(self, rows: int) -> pa.Array:
        pieces = [self._rest]
        while sum(map(len, pieces)) < rows:
            pieces.append(next(self._arrays).cast(pa.string()))
        names = pa.concat_arrays(pieces)
        self._rest = names.slice(rows)
        return names.slice(0, rows)


def split_names(rows: Iterator[pa.RecordBatch]) -> tuple[Iterator[pa.RecordBatch], Iterator[pa.Array]]:
    """(events, names) for :meth:`Fold.groups` of (u, item, raw id) rows that are sorted by u."""
    names: deque[pa.Array] = deque()

    def events() -> Iterator[pa.RecordBatch]:
        before = None
        for batch in rows:
            u = batch.column(0).to_numpy()
            if len(u):
                is_first = np.concatenate([[u[0] != before], u[1:] != u[:-1]])
                names.append(pc.filter(batch.column(2), pa.array(is_first)))
                before = u[-1]
                yield batch.select([0, 1])

    def taken() -> Iterator[pa.Array]:
        while names:  # Fold asks for names of users that have passed by
            yield names.popleft()

    return events(), taken()
