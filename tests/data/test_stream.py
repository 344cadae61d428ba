"""The stream: exactly the samples that a plain definition lists, in the same batches on any number of ranks."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest
import torch
from handmade import EXTENSIONS, FORMATS, Groups, prefixes, random_groups, rows_of, write
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.data import stream as module
from s3rec_dist.data.dataset import Dataset, DatasetError
from s3rec_dist.data.formats import Format
from s3rec_dist.data.order import OrderError, SampleSpec
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.data.stream import PackedSequences, Stream

WORLDS = (1, 2, 3, 4, 6, 8)
ALL = SampleSpec("all_prefixes", max_items=50, min_items=1, holdout=2)


@pytest.fixture(scope="module")
def groups() -> Groups:
    return random_groups()


@pytest.fixture(scope="module", params=FORMATS)
def dataset(groups: Groups, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Dataset:
    """Seven row groups of twelve users, on four shards."""
    return write(tmp_path_factory.mktemp("stream"), groups, request.param)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row groups as they are read."""
    indices: list[int] = []
    original = Dataset.read_row_group

    def counted(self: Dataset, index: int, with_users: bool = True) -> Any:
        indices.append(index)
        return original(self, index, with_users)

    monkeypatch.setattr(Dataset, "read_row_group", counted)
    return indices


# Batches as plain lists: [(sample id, items), ...].

Batch = list[tuple[int, list[int]]]


def plain(packed: PackedSequences) -> Batch:
    offsets, items = packed.offsets.tolist(), packed.items.tolist()
    assert packed.items.dtype == packed.offsets.dtype == torch.int32 and packed.sample_ids.dtype == torch.int64
    assert offsets[0] == 0 and offsets[-1] == len(items) and len(offsets) == len(packed) + 1
    samples = [items[a:b] for a, b in pairwise(offsets)]
    assert packed.max_length == max(map(len, samples), default=0)
    return list(zip(packed.sample_ids.tolist(), samples, strict=True))


def read(
    dataset: Dataset, spec: SampleSpec = ALL, *, epoch: int = 0, start: int = 0, batch_size: int = 24, **options: Any
) -> list[Batch]:
    """One rank's batches of an epoch from step ``start`` on."""
    stream = Stream(dataset, spec, batch_size=batch_size, **{"seed": 42, **options})
    try:
        return [plain(packed) for packed in stream.iterate(epoch, start)]
    finally:
        stream.close()


def merged(ranks: Iterable[list[Batch]]) -> list[Batch]:
    """Global batches, samples sorted by id."""
    return [sorted(sample for part in parts for sample in part) for parts in zip(*ranks, strict=True)]


def check_epoch(epoch: Batch, histories: list[list[int]], spec: SampleSpec) -> None:
    """``epoch`` holds exactly the samples of ``histories``."""
    allowed = prefixes(histories, spec)
    ids = [sample_id for sample_id, _ in epoch]
    assert len(set(ids)) == len(ids)
    if spec.samples == "all_prefixes":
        assert dict(epoch) == {i: items for row in allowed.values() for i, items in row.items()}
    elif spec.samples == "full_sequence":
        assert dict(epoch) == {max(row): row[max(row)] for row in allowed.values()}
    else:
        assert sorted(i >> 24 for i in ids) == sorted(allowed)
        assert all(allowed[i >> 24][i] == items for i, items in epoch)


@dataclass
class Case:
    groups: Groups
    format: Format
    spec: SampleSpec
    options: dict[str, Any]
    chunk: int
    epoch: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Uneven, tiny and empty row groups, rows too short for a sample, epochs shorter than a batch, small chunks."""
    history = st.lists(st.integers(1, 30), min_size=1, max_size=10)
    streams = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 24]))
    return Case(
        draw(st.lists(st.lists(history, max_size=6), max_size=5)),
        draw(st.sampled_from(FORMATS)),
        SampleSpec(
            draw(st.sampled_from(["all_prefixes", "full_sequence", "one_random_prefix"])),
            max_items=draw(st.integers(1, 8)),
            min_items=draw(st.integers(1, 3)),
            holdout=draw(st.integers(0, 3)),
        ),
        {
            "batch_size": streams * draw(st.integers(1, 3)),
            "streams": streams,
            "seed": draw(st.integers(0, 2**31)),
            "shuffle_window": draw(st.integers(1, 12)),
            "cache_bytes": draw(st.sampled_from([0, 1000, 1 << 28])),
            "prefetch_threads": draw(st.integers(1, 3)),
            "prefetch_bytes": draw(st.sampled_from([1, 1 << 24])),
        },
        draw(st.sampled_from([1, 16, 16384])),
        draw(st.integers(0, 100)),
    )


@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=50)
def test_any_epoch_is_the_plain_samples_once_in_the_same_batches_on_any_ranks_and_from_any_step(
    case: Case, data: st.DataObject
) -> None:
    histories = [history for rows in case.groups for history in rows]
    worlds = [world for world in WORLDS if case.options["streams"] % world == 0]
    world = data.draw(st.sampled_from(worlds), label="world")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(module, "CHUNK_SAMPLES", case.chunk):
        dataset = write(Path(folder), case.groups, case.format)
        alone = read(dataset, case.spec, epoch=case.epoch, **case.options)
        check_epoch([sample for batch in alone for sample in batch], histories, case.spec)
        ranks = [
            read(dataset, case.spec, epoch=case.epoch, rank=rank, world_size=world, **case.options)
            for rank in range(world)
        ]
        assert merged(ranks) == merged([alone])
        start = data.draw(st.integers(0, len(alone)), label="start")
        rank = data.draw(st.integers(0, world - 1), label="rank")
        rest = read(dataset, case.spec, epoch=case.epoch, start=start, rank=rank, world_size=world, **case.options)
        assert rest == ranks[rank][start:]


def test_published_data_is_streamed_as_the_original_cuts_it(published_data: Path, tmp_path: Path) -> None:
    source = published_data / "LastFM.txt"
    prepare(PrepareSettings(source="s3rec", input=str(source), output=str(tmp_path / "dataset"), rows_per_group=200))
    dataset = Dataset.open(str(tmp_path / "dataset"))
    raw = dataset.item_raw_ids()
    lines = [line.split() for line in source.read_text().splitlines()]
    by_user = {user: items for user, *items in lines}
    expected: Counter[tuple[str, ...]] = Counter()
    for items in by_user.values():
        window = items[-(50 + 2) : -2]
        expected.update(tuple(window[:n]) for n in range(1, len(window) + 1))
    streamed = Counter(
        tuple(raw[items])
        for world in range(2)
        for batch in read(dataset, rank=world, world_size=2)
        for _, items in batch
    )
    assert streamed == expected
    assert sum(expected.values()) == 25_726


def test_preparation_and_stream_agree_on_users_rows_and_items(ml100k: Path, tmp_path: Path) -> None:
    """Every user's window, from RecBole's files, in another batch size and kind of sample."""
    prepare(
        PrepareSettings(
            source="recbole", input=str(ml100k), output=str(tmp_path / "ml"), attributes="none", rows_per_group=100
        )
    )
    dataset = Dataset.open(str(tmp_path / "ml"))
    histories = [items for _, items in rows_of(dataset)]
    spec = SampleSpec("full_sequence", max_items=51, min_items=2, holdout=2)
    batches = read(dataset, spec, batch_size=100)
    expected = {row << 24 | len(h) - 2: h[-(51 + 2) : -2] for row, h in enumerate(histories) if len(h) >= 4}
    assert dict(sample for batch in batches for sample in batch) == expected
    assert [len(batch) for batch in batches[:-1]] == [100] * (len(batches) - 1)


@pytest.mark.parametrize("samples", ["all_prefixes", "full_sequence", "one_random_prefix"])
def test_validation_and_test_items_never_reach_a_batch(samples: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    histories = [[*range(1, generator.integers(2, 9)), 1001, 1002] for _ in range(60)]
    histories += [[1002], [1001, 1002]]  # nothing to train on
    dataset = write(tmp_path, [histories[i : i + 10] for i in range(0, 62, 10)])
    for epoch in range(3):
        batches = read(dataset, SampleSpec(samples, max_items=5, min_items=1, holdout=2), epoch=epoch)
        items = {item for batch in batches for _, sample in batch for item in sample}
        assert items and max(items) < 1001
        assert {i >> 24 for batch in batches for i, _ in batch} == set(range(60))


def test_sample_ids_are_row_and_prefix_end(tmp_path: Path) -> None:
    dataset = write(tmp_path, [[[1, 2, 3]], [[4, 5, 6, 7, 8, 9, 10]]])
    (batch,) = read(dataset, SampleSpec("all_prefixes", max_items=3, min_items=2, holdout=2))
    assert sorted(batch) == [(1 << 24 | 4, [6, 7]), (1 << 24 | 5, [6, 7, 8])]


def test_rows_with_fewer_than_min_items_give_no_samples(tmp_path: Path) -> None:
    dataset = write(tmp_path, [[[1, 2, 3], [1, 2, 3, 4]], [[5]], [[1, 2, 3, 4, 5]]])
    batches = read(dataset, SampleSpec("full_sequence", max_items=9, min_items=3, holdout=2))
    assert batches == [[(3 << 24 | 3, [1, 2, 3])]]


def test_a_dataset_without_samples_has_no_batches(tmp_path: Path) -> None:
    empty: list[Groups] = [[], [[]], [[[1, 2]], [[1]]]]
    for groups in empty:
        dataset = write(tmp_path / str(len(groups)) / str(sum(map(len, groups))), groups)
        stream = Stream(dataset, ALL, batch_size=4, seed=0)
        assert stream.samples_per_epoch == stream.steps_per_epoch == 0
        assert list(stream.iterate(0)) == []
        stream.close()


def test_a_rank_without_samples_gets_empty_batches_at_every_step(tmp_path: Path) -> None:
    dataset = write(tmp_path, [[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    ranks = [read(dataset, batch_size=8, rank=rank, world_size=8) for rank in range(8)]
    assert [len(batches) for batches in ranks] == [1] * 8
    assert sorted(len(batches[0]) for batches in ranks) == [0] * 5 + [1] * 3


def test_step_and_sample_counts_are_known_before_reading(
    dataset: Dataset, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sum(len(h) - 2 for rows in groups for h in rows)
    batches = read(dataset)
    monkeypatch.setattr(Dataset, "read_row_group", lambda *arguments, **options: pytest.fail("read"))
    stream = Stream(dataset, ALL, batch_size=24, seed=42)
    assert stream.samples_per_epoch == expected == sum(map(len, batches))
    assert stream.steps_per_epoch == len(batches) == -(-expected // 24)
    stream.close()


def test_epochs_and_seeds_give_other_batches_of_the_same_samples(dataset: Dataset) -> None:
    first = read(dataset, epoch=0)
    assert read(dataset, epoch=0) == first
    everything = sorted(sample for batch in first for sample in batch)
    for other in (read(dataset, epoch=1), read(dataset, seed=43)):
        assert merged([other]) != merged([first])
        assert sorted(sample for batch in other for sample in batch) == everything


def test_a_batch_mixes_rows_and_row_groups(dataset: Dataset) -> None:
    for batch in read(dataset)[:-1]:
        assert len({(i >> 24) // 12 for i, _ in batch}) >= 4  # of 7 row groups
        assert len({i >> 24 for i, _ in batch}) >= 12  # of 24 samples


def test_a_random_prefix_is_another_in_another_epoch(dataset: Dataset, groups: Groups) -> None:
    spec = SampleSpec("one_random_prefix", max_items=50, min_items=1, holdout=2)
    epochs = [dict(sample for batch in read(dataset, spec, epoch=e) for sample in batch) for e in range(20)]
    assert all(len(epoch) == 84 for epoch in epochs)
    seen: Counter[int] = Counter(i for epoch in epochs for i in epoch)
    every = sum(len(row) for row in prefixes([h for rows in groups for h in rows], spec).values())
    assert len(seen) > 0.85 * every  # 20 draws from at most 12 prefixes: nearly all of them are met


@pytest.mark.parametrize("options", [{"cache_bytes": 0}, {"cache_bytes": 3000}, {"prefetch_threads": 4}])
def test_cache_and_threads_change_no_batch(dataset: Dataset, options: dict[str, Any]) -> None:
    assert read(dataset, **options) == read(dataset)


def test_a_cache_that_holds_the_dataset_reads_each_row_group_once_and_without_one_once_an_epoch(
    dataset: Dataset, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_SAMPLES", 24)
    for cache_bytes, fewest in ((1 << 28, 0), (0, 4)):
        stream = Stream(
            dataset,
            ALL,
            batch_size=24,
            streams=1,
            seed=42,
            prefetch_threads=1,
            cache_bytes=cache_bytes,
            shuffle_window=24,
        )
        for epoch in range(3):
            reads.clear()
            assert len(list(stream.iterate(epoch))) > 10
            assert len(set(reads)) == len(reads)
            assert len(reads) == 7 if epoch == 0 else fewest <= len(reads) <= 7 * (cache_bytes == 0)
        stream.close()


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_slow_consumer_is_read_ahead_of_by_a_bounded_number_of_bytes(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    dataset = write(tmp_path, [[[1, 2, 3]] * 8 for _ in range(30)], groups_per_shard=30)
    monkeypatch.setattr(module, "CHUNK_SAMPLES", 8)
    spec = SampleSpec("all_prefixes", max_items=1, min_items=1, holdout=2)
    options: dict[str, Any] = {"batch_size": 8, "streams": 1, "seed": 0, "shuffle_window": 8, "prefetch_threads": 4}
    samples = 8 * (4 + 4 + 8 + 4)  # an item, an offset, an id, and one offset more for a batch of one
    stream = Stream(dataset, spec, prefetch_bytes=chunks * samples, **options)
    batches = stream.iterate(0)
    next(batches)
    ahead = max(chunks, 2)  # the next batch is packed while one is used
    deadline = time.monotonic() + 10
    while len(reads) < ahead and time.monotonic() < deadline:
        time.sleep(0.01)
    stream.close()  # waits for what runs
    assert len(reads) == ahead


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("longest", [50, 200, 2000])
def test_every_thread_packs_ahead_within_the_default_bytes_however_long_sequences_are(
    tmp_path: Path, longest: int, threads: int
) -> None:
    dataset = write(tmp_path, random_groups(10, rows=100), groups_per_shard=10)
    spec = SampleSpec("all_prefixes", max_items=longest, holdout=2)
    stream = Stream(dataset, spec, batch_size=256, seed=0, prefetch_threads=threads)
    packs = itertools.count(1)
    enough = threading.Event()
    pack = stream._pack

    def counted(*arguments: Any) -> list[PackedSequences]:
        if next(packs) == threads + 1:
            enough.set()
        return pack(*arguments)

    with mock.patch.object(stream, "_pack", counted), mock.patch.object(stream, "_chunk_steps", 1):
        batches = stream.iterate(0)
        next(batches)
        is_ahead = enough.wait(10)
        stream.close()
    assert is_ahead


def test_what_waits_to_be_used_stays_within_the_bytes_that_were_asked_for(tmp_path: Path) -> None:
    dataset = write(tmp_path, random_groups(40, rows=50, longest=52), groups_per_shard=10)
    limit = 400_000
    with mock.patch.object(module, "CHUNK_SAMPLES", 512):
        stream = Stream(dataset, ALL, batch_size=64, seed=0, shuffle_window=64, prefetch_bytes=limit)
        packed: list[int] = []
        pack = stream._pack

        def counted(*arguments: Any) -> list[PackedSequences]:
            batches = pack(*arguments)
            packed.append(sum(t.nbytes for b in batches for t in (b.items, b.offsets, b.sample_ids)))
            return batches

        with mock.patch.object(stream, "_pack", counted):
            batches = stream.iterate(0)
            next(batches)
            stream.close()
    assert 1 < len(packed) < stream.steps_per_epoch / 8 and sum(packed) <= limit


def test_a_rank_reads_only_the_row_groups_of_its_streams(dataset: Dataset, reads: list[int]) -> None:
    read(dataset, batch_size=8, streams=8, rank=3, world_size=8)
    assert 1 <= len(set(reads)) <= 3  # an eighth of seven row groups


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("s3rec-stream")]


def test_closing_ends_the_threads_after_an_epoch_an_early_exit_and_an_error(tmp_path: Path) -> None:
    dataset = write(tmp_path, random_groups())
    before = set(stream_threads())

    def partly(stream: Stream) -> Iterator[PackedSequences]:
        for step, packed in enumerate(stream.iterate(0)):
            if step == 2:
                return
            yield packed

    for leave in (list, next, lambda _: None):
        stream = Stream(dataset, ALL, batch_size=8, seed=0, prefetch_threads=3)
        leave(partly(stream))
        list(stream.iterate(1))
        assert set(stream_threads()) - before
        stream.close()
        stream.close()  # closing again does no harm
        assert set(stream_threads()) == before
    (tmp_path / "shards/00001.parquet").unlink()
    stream = Stream(Dataset.open(str(tmp_path)), ALL, batch_size=8, seed=0)
    with pytest.raises(DatasetError):
        list(stream.iterate(0))
    stream.close()
    assert set(stream_threads()) == before


def test_closing_waits_for_no_read_that_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, random_groups())
    fsspec.filesystem("memory").put(str(tmp_path), "/closing", recursive=True)
    original, reads = Dataset.read_row_group, itertools.count(1)
    reading, go_on = threading.Event(), threading.Event()

    def held(self: Dataset, index: int, with_users: bool = True) -> Any:
        next(reads)
        reading.set()
        assert go_on.wait(10)
        return original(self, index, with_users)

    monkeypatch.setattr(Dataset, "read_row_group", held)
    monkeypatch.setattr(module, "READS", 1)
    stream = Stream(Dataset.open("memory://closing"), ALL, batch_size=24, seed=0)
    close = stream._groups.close

    def closed(wait: bool = True) -> None:
        close(wait)
        go_on.set()

    with mock.patch.object(stream._groups, "close", closed), ThreadPoolExecutor(1) as pool:
        batch = pool.submit(next, stream.iterate(0))
        assert reading.wait(10)
        stream.close()
        with pytest.raises(CancelledError):
            batch.result(10)
    assert next(reads) == 2
    fsspec.filesystem("memory").rm("/closing", recursive=True)


def test_a_stream_left_early_serves_the_next_epoch_whole(dataset: Dataset) -> None:
    expected = read(dataset, epoch=1)
    with mock.patch.object(module, "CHUNK_SAMPLES", 24):
        stream = Stream(dataset, ALL, batch_size=24, seed=42)
        for packed in stream.iterate(0):
            assert len(packed) == 24
            break
        assert [plain(packed) for packed in stream.iterate(1)] == expected
        stream.close()


def test_two_epochs_may_be_read_at_once(dataset: Dataset) -> None:
    stream = Stream(dataset, ALL, batch_size=24, seed=42)
    both = list(zip(stream.iterate(0), stream.iterate(1), strict=True))
    stream.close()
    assert [plain(a) for a, _ in both] == read(dataset, epoch=0)
    assert [plain(b) for _, b in both] == read(dataset, epoch=1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "another"])
def test_damage_reaches_the_consumer_and_names_the_file(tmp_path: Path, format: Format, damage: str) -> None:
    dataset = write(tmp_path, random_groups(), format)
    path = tmp_path / f"shards/00002.{EXTENSIONS[format]}"
    content = bytearray(path.read_bytes())
    own = np.flatnonzero(dataset.index.shard == 2)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: dataset.index.offset[own[-1]] + dataset.index.size[own[-1]] - 1])
    elif damage == "flipped":
        content[dataset.index.offset[own[0]] + 10] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(path.with_stem("00000").read_bytes())
    for rank in (0, 1):
        with pytest.raises(DatasetError, match=rf"shards/00002\.{EXTENSIONS[format]}"):
            read(dataset, rank=rank, world_size=2)


def test_batches_before_the_damage_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_SAMPLES", 8)
    dataset = write(tmp_path, [[[1, 2, 3]] * 8 for _ in range(6)], groups_per_shard=1)
    options: dict[str, Any] = {"batch_size": 8, "streams": 1, "shuffle_window": 8, "seed": 5}
    whole = read(dataset, **options)
    last = whole[-1][0][0] >> 24  # a row of the row group that comes last
    (tmp_path / f"shards/{last // 8:05d}.parquet").unlink()
    stream = Stream(Dataset.open(str(tmp_path)), ALL, **options)
    found = []
    with pytest.raises(DatasetError, match=f"{last // 8:05d}"):
        for packed in stream.iterate(0):
            found.append(plain(packed))
    stream.close()
    assert found == whole[:-1]


def test_streams_batch_size_and_world_size_that_do_not_fit_are_refused(dataset: Dataset) -> None:
    with pytest.raises(OrderError, match="streams=24 cannot be divided over 5 ranks"):
        Stream(dataset, ALL, batch_size=24, seed=0, world_size=5)
    with pytest.raises(OrderError, match="streams=7 does not divide batch_size=24"):
        Stream(dataset, ALL, batch_size=24, seed=0, streams=7)


def test_a_split_covers_every_sample_in_order_with_near_equal_counts(dataset: Dataset) -> None:
    stream = Stream(dataset, ALL, batch_size=24, seed=42)
    packed = next(stream.iterate(0))
    stream.close()
    for parts in (1, 2, 5, 24, 30):
        pieces = packed.split(parts)
        assert len(pieces) == parts
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
        assert torch.equal(torch.cat([piece.items for piece in pieces]), packed.items)
        assert torch.equal(torch.cat([piece.sample_ids for piece in pieces]), packed.sample_ids)
        lengths = [piece.offsets.diff() for piece in pieces]
        assert torch.equal(torch.cat(lengths), packed.offsets.diff())
        for piece, own in zip(pieces, lengths, strict=True):
            assert piece.offsets[0] == 0 and piece.offsets[-1] == len(piece.items)
            assert piece.max_length >= max(own.tolist(), default=0)


def test_an_empty_batch_splits_into_empty_pieces() -> None:
    none = PackedSequences(torch.zeros(0).int(), torch.zeros(1).int(), torch.zeros(0).long(), 0)
    assert [plain(piece) for piece in none.split(3)] == [[], [], []]


def test_moving_a_batch_changes_nothing_but_its_device(dataset: Dataset) -> None:
    stream = Stream(dataset, ALL, batch_size=24, seed=42)
    packed = next(stream.iterate(0))
    stream.close()
    moved = packed.to(torch.device("meta"))
    assert {t.device.type for t in (moved.items, moved.offsets, moved.sample_ids)} == {"meta"}
    assert moved.max_length == packed.max_length and len(moved) == len(packed)
    assert plain(packed.to(torch.device("cpu"))) == plain(packed)
