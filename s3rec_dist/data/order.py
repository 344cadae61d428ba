"""The order of samples, as pure functions of (seed, epoch, step, world size).

An epoch lays the dataset's row groups end to end in a shuffled order, which numbers every sample with
a *position* 0..N-1, and cuts the positions into ``streams`` equal parts. Inside a stream, windows of
positions are shuffled. Global batch ``k`` takes the same count from every stream; rank ``r`` of ``W``
serves the streams ``s`` with ``s % W == r``. So any world size that divides ``streams`` sees the same
global batches, a run resumes from its step number alone, and every sample is seen once an epoch; the
last batch is short, and a rank may have no sample in it.

Datasets are mixed by weight: an epoch takes every sample of a part of weight 2 twice, and of a part of
weight 0.25 a quarter of the samples, the next quarter in the next epoch, so that four epochs take each once.
What an epoch takes is rounded to whole samples, at least one, so that all epochs have the same number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from s3rec_dist.hashing import hash64, key_of, uniform_below

MAX_STREAMS = 64

_GROUPS, _WINDOW, _PREFIX, _MIX = 101, 102, 103, 104  # what a key is for; the stages' reconstruction has 1 and 2


class OrderError(ValueError):
    """Streams, batch size and world size that do not fit each other."""


@dataclass(frozen=True)
class SampleSpec:
    """Which samples a row yields; a sample is (row, prefix end) and is never materialised.

    The newest ``holdout`` items of a row are kept for validation and test. Of what is left, the newest
    ``max_items`` are its window. ``all_prefixes`` yields every prefix of the window with at least
    ``min_items`` items, ``full_sequence`` the window alone, and ``one_random_prefix`` a prefix drawn
    anew each epoch.
    """

    samples: Literal["all_prefixes", "full_sequence", "one_random_prefix"]
    max_items: int
    min_items: int = 1
    holdout: int = 2

    def windows(self, lengths: np.ndarray) -> np.ndarray:
        """Items in the window of rows with these full lengths."""
        return np.clip(lengths - self.holdout, 0, self.max_items)

    def counts(self, lengths: np.ndarray) -> np.ndarray:
        """Samples an epoch takes from rows with these full lengths."""
        prefixes = np.maximum(self.windows(lengths) - self.min_items + 1, 0)
        return prefixes if self.samples == "all_prefixes" else np.minimum(prefixes, 1)

    def sample_lengths(self, windows: np.ndarray, which: np.ndarray, rows: np.ndarray, key: int) -> np.ndarray:
        """Items in sample number ``which`` of each row, given the rows' windows and global row numbers."""
        if self.samples == "all_prefixes":
            return which + self.min_items
        if self.samples == "full_sequence":
            return windows
        drawn = hash64(rows.astype(np.int64), key)
        return self.min_items + uniform_below(drawn, windows - self.min_items + 1)


def stage_spec(stage: Literal["pretrain", "finetune"], samples: Any, max_length: int) -> SampleSpec:
    """The samples of a training stage whose encoder sees ``max_length`` items; fine-tuning's have one more, the last
    target."""
    if stage == "pretrain":
        return SampleSpec(samples, max_items=max_length)
    return SampleSpec(samples, max_items=max_length + 1, min_items=2)


def choose_streams(batch_size: int, streams: int = 0) -> int:
    """``streams`` where given, else the largest divisor of the batch size up to 64."""
    if streams == 0:
        return next(s for s in range(min(batch_size, MAX_STREAMS), 0, -1) if batch_size % s == 0)
    if batch_size % streams:
        raise OrderError(
            f"streams={streams} does not divide batch_size={batch_size}; use {_divisors(batch_size)}, or 0 to leave "
            f"the choice to the program"
        )
    return streams


def check_world(streams: int, world_size: int) -> None:
    """Raises :class:`OrderError` unless the streams can be dealt evenly to the ranks."""
    if streams % world_size:
        raise OrderError(
            f"streams={streams} cannot be divided over {world_size} ranks; use {_divisors(streams)} ranks, "
            "or another batch size or data.streams"
        )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's order. ``groups[i]`` is the i-th row group read; its samples from number ``starts[i]`` on have the
    positions ``bounds[i]`` to ``bounds[i+1] - 1``."""

    groups: np.ndarray
    starts: np.ndarray
    bounds: np.ndarray
    streams: int
    batch_size: int
    window: int
    window_key: int
    prefix_key: int

    @property
    def samples(self) -> int:
        """Samples in the epoch."""
        return int(self.bounds[-1])

    @property
    def per_stream(self) -> int:
        """Samples a full batch takes from each stream."""
        return self.batch_size // self.streams

    @property
    def steps(self) -> int:
        """Global batches in the epoch, the short one included."""
        longest = -(-self.samples // self.streams)
        return -(-longest // self.per_stream)

    def stream_bounds(self) -> np.ndarray:
        """Stream s holds the positions ``[s]`` to ``[s + 1] - 1`` of this [streams + 1] array."""
        return np.arange(self.streams + 1, dtype=np.int64) * self.samples // self.streams

    def batch_samples(self, step: int) -> int:
        """Samples of global batch ``step`` over all ranks."""
        lengths = np.diff(self.stream_bounds())
        return int(np.clip(lengths - step * self.per_stream, 0, self.per_stream).sum())

    def batch_positions(self, first: int, last: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's positions in batches ``first`` to ``last - 1``, batch by batch.

        Returns (positions, offsets): batch ``first + i`` is ``positions[offsets[i]:offsets[i + 1]]``.
        The batches must lie in one window (see :meth:`window_end`).
        """
        window = first // self._window_steps
        bounds = self.stream_bounds()
        streams = np.arange(rank, self.streams, world_size)
        start = bounds[streams] + window * self._window_steps * self.per_stream
        size = np.clip(bounds[streams + 1] - start, 0, self._window_steps * self.per_stream)  # [S]
        widest = int(size.max(initial=0))
        place = np.arange(widest, dtype=np.int64)
        keys = hash64(streams.astype(np.int64) * (1 << 32) + window, self.window_key)[:, None]
        low = (1 << widest.bit_length()) - 1  # a draw's low bits hold its place, so that sorting draws sorts places
        draw = hash64(keys, place) & ~low | place
        draw[place >= size[:, None]] = np.iinfo(np.int64).max  # absent places sort last
        draw.sort(axis=1)
        shuffled = draw & low  # [S, widest]
        skip = (first - window * self._window_steps) * self.per_stream
        stop = min((last - window * self._window_steps) * self.per_stream, widest)
        taken = np.arange(skip, stop)
        kept = (taken[None, :] < size[:, None]).reshape(len(streams), -1)
        positions = start[:, None] + shuffled[:, skip:stop]
        batch = np.broadcast_to((taken - skip) // self.per_stream, positions.shape)
        positions, batch = positions[kept], batch[kept]  # stream by stream
        by_batch = np.argsort(batch, kind="stable")
        offsets = np.searchsorted(batch[by_batch], np.arange(last - first + 1))
        return positions[by_batch], offsets

    def window_end(self, step: int) -> int:
        """The first step after the window that ``step`` lies in."""
        return min((step // self._window_steps + 1) * self._window_steps, self.steps)

    @property
    def _window_steps(self) -> int:
        return max(self.window // self.per_stream, 1)


@dataclass(frozen=True)
class Part:
    """One of the datasets that are mixed: how many row groups it has, and how often an epoch takes its samples."""

    groups: int
    weight: float = 1.0


def epoch_order(
    group_samples: np.ndarray,
    *,
    seed: int,
    epoch: int,
    streams: int,
    batch_size: int,
    window: int,
    parts: Sequence[Part] = (),
) -> EpochOrder:
    """The order of an epoch over row groups that yield ``group_samples`` [G] samples each; they belong to ``parts``,
    in that order, or all to one of weight 1."""
    slots = [(np.empty(0, np.int64),) * 3]
    first = 0
    for number, part in enumerate(parts or [Part(len(group_samples))]):
        own = np.arange(first, first + part.groups, dtype=np.int64)
        slots += _slots_of_part(own, group_samples[own], part.weight, key_of(seed, _MIX, number), epoch)
        first += part.groups
    groups, starts, counts = map(np.concatenate, zip(*slots, strict=True))
    shuffle = hash64(groups, key_of(seed, _GROUPS, epoch))
    order = np.argsort(shuffle, kind="stable")
    bounds = np.zeros(len(order) + 1, dtype=np.int64)
    np.cumsum(counts[order], out=bounds[1:])
    return EpochOrder(
        groups=groups[order] % _REPEAT,
        starts=starts[order],
        bounds=bounds,
        streams=streams,
        batch_size=batch_size,
        window=window,
        window_key=key_of(seed, _WINDOW, epoch),
        prefix_key=key_of(seed, _PREFIX, epoch),
    )


_REPEAT = 1 << 32
"""What tells apart the times that an epoch visits a row group, while it is shuffled."""


def _slots_of_part(
    groups: np.ndarray, samples: np.ndarray, weight: float, key: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(row groups, first sample, samples) of the visits that an epoch pays to a part: whole passes, then a share that
    goes on where the epoch before left off."""
    total = int(samples.sum())
    taken = max(round(total * weight), min(total, 1))
    passes, share = divmod(taken, max(total, 1))
    for number in range(passes):
        yield groups + number * _REPEAT, np.zeros_like(groups), samples
    if not share:
        return
    turn = np.argsort(hash64(groups, key), kind="stable")
    ends = np.cumsum(samples[turn])
    begins = ends - samples[turn]
    low = epoch * share % total
    for number, (a, b) in enumerate([(low, min(low + share, total)), (0, low + share - total)], passes):
        from_, to = np.maximum(begins, a), np.minimum(ends, b)
        met = np.flatnonzero(to > from_)
        yield groups[turn[met]] + number * _REPEAT, (from_ - begins)[met], (to - from_)[met]
