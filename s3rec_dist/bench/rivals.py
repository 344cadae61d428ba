"""MosaicML Streaming and LitData on the same sequences as our stream: the rivals of ``s3rec bench stream --rivals``.

    rates = rivals(Dataset.open("data/beauty"), SampleSpec("full_sequence", 50), batch_size=256, repetitions=5)

Each rival gets the sequences in its own format, as its documentation advises for arrays of any length, and hands them
over shuffled through its own dataset and loader, packed by a collate function. Every encoding is tried in this
process and with one worker process, and the fastest way counts. Neither compresses or checks what it reads.

Both packages are for this comparison only: ``pip install mosaicml-streaming litdata``.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.order import SampleSpec

CHUNK = "64MB"
"""Both rivals' advice for the size of a file."""
_BLOCK = 4096
"""Sequences that LitData's writer is given at a time."""

Packed = tuple[torch.Tensor, torch.Tensor]
"""Items [T] and offsets [B + 1] of a batch, int32."""
Collate = Callable[[Sequence[Any]], Packed]


class RivalsError(ValueError):
    """Rivals that cannot be measured, or that hand over other sequences than they were given."""


@dataclass(frozen=True)
class Way:
    """One way to stream sequences with a rival."""

    rival: str
    encoding: str
    write: Callable[[Iterable[np.ndarray], str], None]
    """Writes sequences to a folder."""
    loader: Callable[[str, int, int], Iterable[Packed]]
    """Shuffled packed batches of a folder, by batch size and worker processes; a pass over it is an epoch."""


def rivals(
    dataset: Dataset,
    spec: SampleSpec,
    *,
    batch_size: int,
    repetitions: int,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, list[float]]:
    """Sequences per second, by rival: of its fastest way, one value for each of ``repetitions`` epochs.

    ``progress`` takes a line about each way. Raises :class:`RivalsError`.
    """
    for package in ("streaming", "litdata"):
        _imported(package)
    sequences = list(_sequences(dataset, spec))
    expected = _sums(map(_pack_arrays, [sequences]))
    best: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="s3rec-rivals-") as folder, _temporary_files_in(folder):
        for way in WAYS:
            place = os.path.join(folder, f"{way.rival} {way.encoding}")
            way.write(sequences, place)
            for workers in (0, 1):
                loader = way.loader(place, batch_size, workers)
                if (found := _sums(loader)) != expected:  # this epoch also warms up
                    raise RivalsError(f"{way.rival} ({way.encoding}): count, items and squares {found}, not {expected}")
                rates = [len(sequences) / _seconds(loader) for _ in range(repetitions)]
                del loader
                median = statistics.median(rates)
                progress(f"{way.rival}, {way.encoding}, {workers} workers: {median:,.0f} sequences/s")
                if way.rival not in best or median > statistics.median(best[way.rival]):
                    best[way.rival] = rates
    return best


def _imported(package: str) -> Any:
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask PyPI
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RivalsError(f"cannot import {package} ({error}); pip install mosaicml-streaming litdata") from error


@contextlib.contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """The rivals' locks and caches, which they leave behind, go to ``folder``."""
    names = ("TMPDIR", "DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER")
    before, own = {name: os.environ.get(name) for name in names}, tempfile.tempdir
    os.environ.update(dict.fromkeys(names, folder))
    tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = own
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _sequences(dataset: Dataset, spec: SampleSpec) -> Iterator[np.ndarray]:
    """The windows that ``full_sequence`` streams, int32 each."""
    for index in range(len(dataset.index)):
        group = dataset.read_row_group(index, with_users=False)
        ends = group.offsets[1:] - spec.holdout
        for end, window in zip(ends.tolist(), spec.windows(np.diff(group.offsets)).tolist(), strict=True):
            if window >= spec.min_items:
                yield group.values[end - window : end].copy()


def _sums(batches: Iterable[Packed]) -> tuple[int, int, int]:
    """Sequences, sum of items, and sum of squared lengths: the same in any order."""
    totals = np.zeros(3, np.int64)
    for items, offsets in batches:
        squares = torch.diff(offsets).square().sum(dtype=torch.int64)
        totals += len(offsets) - 1, int(items.sum(dtype=torch.int64)), int(squares)
    count, total, squared = totals.tolist()
    return count, total, squared


def _seconds(loader: Iterable[Packed]) -> float:
    begin = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - begin


def _pack_arrays(arrays: Sequence[np.ndarray]) -> Packed:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return torch.from_numpy(np.concatenate(arrays)), torch.from_numpy(offsets)


def _pack_bytes(texts: Sequence[bytes]) -> Packed:
    offsets = np.zeros(len(texts) + 1, dtype=np.int32)
    np.cumsum([len(text) // 4 for text in texts], out=offsets[1:])
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.int32), torch.from_numpy(offsets)


def _pack_array_rows(rows: Sequence[dict[str, np.ndarray]]) -> Packed:
    return _pack_arrays([row["items"] for row in rows])


def _pack_bytes_rows(rows: Sequence[dict[str, bytes]]) -> Packed:
    return _pack_bytes([row["items"] for row in rows])


def _mds(encoding: str, convert: Callable[[np.ndarray], Any], collate: Collate) -> Way:
    """MosaicML's Mosaic Data Shards, one column."""

    def write(sequences: Iterable[np.ndarray], folder: str) -> None:
        streaming = _imported("streaming")
        with streaming.MDSWriter(out=folder, columns={"items": encoding}, size_limit=CHUNK.lower()) as writer:
            for sequence in sequences:
                writer.write({"items": convert(sequence)})

    def loader(folder: str, batch_size: int, workers: int) -> Iterable[Packed]:
        streaming = _imported("streaming")
        dataset = streaming.StreamingDataset(local=folder, shuffle=True, batch_size=batch_size, num_canonical_nodes=1)
        return streaming.StreamingDataLoader(
            dataset, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate
        )

    return Way("MosaicML Streaming", encoding, write, loader)


def _litdata(encoding: str, samples: Callable[[list[np.ndarray]], Iterator[Any]], collate: Collate) -> Way:
    """LitData's chunks; ``samples`` turns a block of sequences to what is stored."""

    def write(sequences: Iterable[np.ndarray], folder: str) -> None:
        left = iter(sequences)
        blocks = list(iter(lambda: list(itertools.islice(left, _BLOCK)), []))
        _imported("litdata").optimize(
            fn=samples, inputs=blocks, output_dir=folder, chunk_bytes=CHUNK, num_workers=1, verbose=False
        )

    def loader(folder: str, batch_size: int, workers: int) -> Iterable[Packed]:
        litdata = _imported("litdata")
        dataset = litdata.StreamingDataset(folder, shuffle=True)
        return litdata.StreamingDataLoader(
            dataset, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate
        )

    return Way("LitData", encoding, write, loader)


def _as_arrays(block: list[np.ndarray]) -> Iterator[np.ndarray]:
    yield from block


def _as_bytes(block: list[np.ndarray]) -> Iterator[bytes]:
    for sequence in block:
        yield sequence.tobytes()


WAYS = (
    _mds("ndarray:int32", lambda sequence: sequence, _pack_array_rows),
    _mds("bytes", lambda sequence: sequence.tobytes(), _pack_bytes_rows),
    _litdata("numpy", _as_arrays, _pack_arrays),
    _litdata("bytes", _as_bytes, _pack_bytes),
)
