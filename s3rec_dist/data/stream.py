"""Streams packed batches of a dataset: ``order`` says which samples, threads read and pack ahead.

    stream = Stream(dataset, spec, batch_size=256, streams=64, seed=42, rank=0, world_size=1)
    for packed in stream.iterate(epoch=0, start_step=120):
        ...

Its only state is the step number. Batches are packed many at a time, so that one batch is a slice of
tensors that are already there. From remote storage the row groups of such a chunk are read side by side.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch

from s3rec_dist.data.dataset import SAMPLE_END_BITS, Dataset
from s3rec_dist.data.order import EpochOrder, Part, SampleSpec, check_world, choose_streams, epoch_order

CHUNK_SAMPLES = 16384
"""Samples packed in one go, fewer where they are long, but at least one batch."""

READS = 32
"""Row groups read from remote storage at a time."""


@dataclass(frozen=True)
class PackedSequences:
    """B sequences laid end to end. B and T may be 0."""

    items: torch.Tensor
    """Item ids, int32 [T]."""
    offsets: torch.Tensor
    """Sequence b is ``items[offsets[b]:offsets[b + 1]]``, int32 [B + 1]."""
    sample_ids: torch.Tensor
    """row << 24 | prefix end, int64 [B]: what a sample's random draws are hashed from."""
    max_length: int
    """The longest sequence's length; the whole's for the pieces of :meth:`split`."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device) -> PackedSequences:
        """The same sequences on ``device``. A GPU is not waited for, which takes pinned memory to copy from."""
        tensors = [self.items, self.offsets, self.sample_ids]
        if device.type == "cuda" and not self.items.is_cuda:
            tensors = [tensor.pin_memory() for tensor in tensors]
        items, offsets, sample_ids = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return PackedSequences(items, offsets, sample_ids, self.max_length)

    def split(self, parts: int) -> list[PackedSequences]:
        """``parts`` consecutive pieces of near-equal sample counts, some perhaps empty."""
        cuts = [len(self) * i // parts for i in range(parts + 1)]
        return [self._slice(a, b) for a, b in itertools.pairwise(cuts)]

    def _slice(self, first: int, last: int) -> PackedSequences:
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        offsets = self.offsets[first : last + 1] - start
        return PackedSequences(self.items[start:stop], offsets, self.sample_ids[first:last], self.max_length)


class Stream:
    """This rank's part of every global batch, in order. See the module's docstring.

    ``mix`` are further datasets with their weights, of the same catalogue; ``dataset`` has weight 1, and rows of the
    others are numbered on from its last. At most ``prefetch_bytes`` of packed batches wait to be used, but one
    batch at least, and as many bytes are read from remote storage at a time; ``cache_bytes`` of decoded row groups are
    kept.

    Raises :class:`~s3rec_dist.data.order.OrderError` where streams, batch size and world size do not fit.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: SampleSpec,
        *,
        batch_size: int,
        seed: int,
        streams: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_window: int = 8192,
        prefetch_threads: int = 2,
        prefetch_bytes: int = 16 << 20,
        cache_bytes: int = 256 << 20,
        mix: Sequence[tuple[Dataset, float]] = (),
    ) -> None:
        self.dataset, self.spec = dataset, spec
        self.batch_size, self.seed = batch_size, seed
        self.streams = choose_streams(batch_size, streams)
        check_world(self.streams, world_size)
        self.rank, self.world_size, self.shuffle_window = rank, world_size, shuffle_window
        datasets = [dataset, *(other for other, _ in mix)]
        self._parts = [Part(len(d.index), w) for d, w in zip(datasets, [1.0, *(w for _, w in mix)], strict=True)]
        counts = [d.index.per_group(spec.counts(d.index.lengths.astype(np.int64)) * d.index.counts) for d in datasets]
        self._group_samples = np.concatenate(counts).astype(np.int64)
        self._groups = _GroupCache(datasets, spec, cache_bytes, prefetch_bytes)
        largest = batch_size // world_size * (4 * spec.max_items + 16)  # bytes of this rank's part of a batch
        affordable = prefetch_bytes // (prefetch_threads + 1) // largest  # a chunk for each thread while one is used
        self._chunk_steps = max(min(CHUNK_SAMPLES * world_size // batch_size, affordable), 1)
        self._depth = max(prefetch_bytes // (self._chunk_steps * largest), 2)
        self._pool = ThreadPoolExecutor(prefetch_threads, thread_name_prefix="s3rec-stream")

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch over all ranks."""
        return self.order(0).samples

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch, the short one included."""
        return self.order(0).steps

    def order(self, epoch: int) -> EpochOrder:
        """The epoch's order."""
        return epoch_order(
            self._group_samples,
            seed=self.seed,
            epoch=epoch,
            streams=self.streams,
            batch_size=self.batch_size,
            window=self.shuffle_window,
            parts=self._parts,
        )

    def iterate(self, epoch: int, start_step: int = 0) -> Iterator[PackedSequences]:
        """This rank's part of batches ``start_step``, ``start_step + 1``, ... to the end of the epoch."""
        order = self.order(epoch)
        pending: deque[Future[list[PackedSequences]]] = deque()
        step = start_step
        try:
            while pending or step < order.steps:
                while step < order.steps and len(pending) < self._depth:
                    last = min(step + self._chunk_steps, order.window_end(step))
                    pending.append(self._pool.submit(self._pack, order, step, last))
                    step = last
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Stops the threads."""
        self._groups.close(wait=False)  # or packing would wait for reads that have not begun
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._groups.close()

    def _pack(self, order: EpochOrder, first: int, last: int) -> list[PackedSequences]:
        positions, batch_offsets = order.batch_positions(first, last, self.rank, self.world_size)
        slots = np.searchsorted(order.bounds, positions, side="right") - 1
        by_slot = np.argsort(slots, kind="stable")
        sorted_slots = slots[by_slot]
        starts = np.flatnonzero(np.diff(sorted_slots, prepend=-1))
        ends = np.append(starts, len(by_slot))[1:]
        visited = sorted_slots[starts]
        groups = self._groups.get(order.groups[visited].tolist())
        pieces, lengths, ids, gone = [], [], [], []
        for slot, group, start, stop in zip(visited, groups, starts, ends, strict=True):
            if not len(group.ends):  # a damaged shard that may be left out
                gone.append(by_slot[start:stop])
                continue
            offsets = order.starts[slot] + positions[by_slot[start:stop]] - order.bounds[slot]
            piece, piece_lengths, piece_ids = group.samples(offsets, order.prefix_key)
            pieces.append(piece)
            lengths.append(piece_lengths)
            ids.append(piece_ids)
        if gone:
            kept = np.ones(len(positions), dtype=bool)
            kept[np.concatenate(gone)] = False
            batch_offsets = np.concatenate([[0], np.cumsum(kept)])[batch_offsets]
            by_slot = (np.cumsum(kept) - 1)[by_slot[kept[by_slot]]]
        if not pieces:
            empty = torch.zeros(0, dtype=torch.int32)
            none = PackedSequences(empty, torch.zeros(1, dtype=torch.int32), empty.long(), 0)
            return [none] * (last - first)
        place = np.empty_like(by_slot)
        place[by_slot] = np.arange(len(by_slot))
        sizes = np.concatenate(lengths)
        begins = np.cumsum(sizes) - sizes
        sizes = sizes[place]
        items = torch.from_numpy(_ragged_take(np.concatenate(pieces), begins[place], sizes))
        sample_ids = torch.from_numpy(np.concatenate(ids)[place])
        offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=offsets[1:])
        batches = []
        for a, b in itertools.pairwise(batch_offsets):
            own = torch.from_numpy((offsets[a : b + 1] - offsets[a]).astype(np.int32))
            longest = int(sizes[a:b].max(initial=0))
            batches.append(PackedSequences(items[offsets[a] : offsets[b]], own, sample_ids[a:b], longest))
        return batches


class _Group:
    """A decoded row group, cut to the items that samples can use."""

    def __init__(self, dataset: Dataset, spec: SampleSpec, index: int, rows_before: int) -> None:
        sequences = dataset.read_row_group(index, with_users=False)
        lengths = np.diff(sequences.offsets)
        self.spec, self.first_row = spec, sequences.first_row + rows_before
        self.windows = spec.windows(lengths)
        starts = sequences.offsets[1:] - spec.holdout - self.windows
        self.values = _ragged_take(sequences.values, starts, self.windows)
        self.offsets = np.cumsum(self.windows) - self.windows
        self.ends = np.cumsum(spec.counts(lengths))
        self.skipped = np.maximum(lengths - spec.holdout, 0) - self.windows
        self.size = self.values.nbytes + 4 * self.ends.nbytes

    def samples(self, offsets: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items laid end to end, lengths and sample ids of the group's samples number ``offsets``."""
        rows = np.searchsorted(self.ends, offsets, side="right")
        which = offsets - np.where(rows > 0, self.ends[rows - 1], 0)
        lengths = self.spec.sample_lengths(self.windows[rows], which, rows + self.first_row, key)
        ids = (rows + self.first_row) << SAMPLE_END_BITS | (self.skipped[rows] + lengths)
        return _ragged_take(self.values, self.offsets[rows], lengths), lengths, ids


class _GroupCache:
    """Decoded row groups of all datasets, least recently used ones dropped above a byte limit. Safe between threads."""

    def __init__(self, datasets: Sequence[Dataset], spec: SampleSpec, limit: int, ahead: int) -> None:
        self._spec, self._limit, self._ahead = spec, limit, ahead
        self._owners: list[tuple[Dataset, int, int]] = []  # dataset, row group in it, rows before the dataset
        rows = 0
        for dataset in datasets:
            self._owners += [(dataset, index, rows) for index in range(len(dataset.index))]
            rows += dataset.n_rows
        self._groups: OrderedDict[int, Future[_Group]] = OrderedDict()
        self._used = 0
        self._lock = Lock()
        is_remote = any(dataset.storage.local(dataset.path) is None for dataset in datasets)
        self._pool = ThreadPoolExecutor(READS, thread_name_prefix="s3rec-read") if is_remote else None

    def get(self, indices: Sequence[int]) -> list[_Group]:
        """These row groups. Afterwards the least recently used ones are dropped, but none of these: a stream goes on
        where it is, so that the next chunk needs most of them again."""
        if self._pool is None:
            groups = [self._get(index) for index in indices]
        else:
            groups = [group for some in self._affordable(indices) for group in self._pool.map(self._get, some)]
        kept = set(indices)
        with self._lock:
            for index in list(self._groups):
                if self._used <= self._limit:
                    break
                if index not in kept and self._groups[index].done():
                    self._used -= self._groups.pop(index).result().size
        return groups

    def _get(self, index: int) -> _Group:
        with self._lock:
            found = self._groups.get(index)
            if found is not None:
                self._groups.move_to_end(index)
            else:
                own = self._groups[index] = Future()
        if found is not None:
            return found.result()
        try:
            dataset, inner, rows = self._owners[index]
            group = _Group(dataset, self._spec, inner, rows)
        except BaseException as error:
            with self._lock:
                del self._groups[index]
            own.set_exception(error)
            raise
        with self._lock:
            self._used += group.size
        own.set_result(group)
        return group

    def _affordable(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """The row groups in turns of at most ``ahead`` bytes, or one."""
        turn: list[int] = []
        size = 0
        for index in indices:
            dataset, inner, _ = self._owners[index]
            more = int(dataset.index.size[inner])
            if turn and size + more > self._ahead:
                yield turn
                turn, size = [], 0
            turn.append(index)
            size += more
        yield turn

    def close(self, wait: bool = True) -> None:
        """Begins no further reads, and waits for those that run."""
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)


def _ragged_take(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``values[starts[i]:starts[i] + lengths[i]]`` for every i, laid end to end."""
    ends = np.cumsum(lengths)
    index = np.repeat(starts - ends + lengths, lengths)
    index += np.arange(len(index))
    return values[index]


def sampled_items(dataset: Dataset, spec: SampleSpec) -> np.ndarray:
    """Whether a sample may hold an item, bool [N + 2] by item id. Reads the whole dataset."""
    is_sampled = np.zeros(dataset.n_items + 2, dtype=bool)
    for group in range(len(dataset.index)):
        sequences = dataset.read_row_group(group, with_users=False)
        windows = spec.windows(np.diff(sequences.offsets))
        windows = np.where(windows >= spec.min_items, windows, 0)
        first_after = np.repeat(sequences.offsets[1:] - spec.holdout, windows)
        place = np.arange(len(first_after)) - np.repeat(np.cumsum(windows), windows)
        is_sampled[sequences.values[first_after + place]] = True
    return is_sampled
