"""The ledger: every (row, prefix) exactly once an epoch, in the same global batches, whatever the number of ranks and
threads, the format, the storage, and however often a run is stopped and goes on with another number of ranks."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch
from handmade import FORMATS, Groups, prefixes, random_groups, write
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.data import stream as module
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.formats import Format
from s3rec_dist.data.order import SampleSpec
from s3rec_dist.data.stream import PackedSequences, Stream

pytestmark = pytest.mark.timeout(120)

WORLDS = (1, 2, 4, 8)
SPEC = SampleSpec("all_prefixes", max_items=6, min_items=1, holdout=2)
OPTIONS: dict[str, Any] = {"batch_size": 16, "streams": 8, "seed": 42, "shuffle_window": 12, "prefetch_bytes": 1}

Sample = tuple[int, tuple[int, ...]]
"""(sample id, items)."""
Batch = list[Sample]


def samples(packed: PackedSequences) -> Batch:
    items, offsets = packed.items.tolist(), packed.offsets.tolist()
    return [(i, tuple(items[a:b])) for i, (a, b) in zip(packed.sample_ids.tolist(), pairwise(offsets), strict=True)]


@dataclass
class Run:
    """Batches as ranks in step see them: global ones, sorted by sample."""

    dataset: Dataset
    spec: SampleSpec = SPEC
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))

    def part(self, epoch: int, start: int, stop: int, world: int) -> Iterator[Batch]:
        """Steps ``start`` to ``stop - 1`` of an epoch on ``world`` ranks, every one of which must have each step."""
        with ExitStack() as stack:
            ranks = [Stream(self.dataset, self.spec, rank=r, world_size=world, **self.options) for r in range(world)]
            for rank in ranks:
                stack.callback(rank.close)
            batches = zip(*(rank.iterate(epoch, start) for rank in ranks), strict=True)
            for step, parts in enumerate(batches, start):
                if step == stop:
                    return
                yield sorted(sample for part in parts for sample in samples(part))

    def steps(self) -> int:
        stream = Stream(self.dataset, self.spec, **self.options)
        stream.close()
        return stream.steps_per_epoch

    def whole(self, epochs: int, world: int = 1) -> list[list[Batch]]:
        """All batches of the epochs, without a stop."""
        return [list(self.part(epoch, 0, 1 << 40, world)) for epoch in range(epochs)]

    def elastic(self, epochs: int, stops: Sequence[int], worlds: Sequence[int]) -> list[list[Batch]]:
        """The same with a new run, on the next number of ranks, from each step in ``stops`` of an epoch on."""
        turn = 0
        found: list[list[Batch]] = []
        for epoch in range(epochs):
            found.append([])
            for start, stop in pairwise([0, *stops, 1 << 40]):
                found[-1] += self.part(epoch, start, stop, worlds[turn % len(worlds)])
                turn += 1
        return found


def check_once(epoch: list[Batch], histories: list[list[int]], spec: SampleSpec = SPEC) -> None:
    """An epoch of all prefixes is every prefix of every row, once."""
    every = {i: tuple(items) for row in prefixes(histories, spec).values() for i, items in row.items()}
    assert sorted(sample for batch in epoch for sample in batch) == sorted(every.items())


UNEVEN = [40, 1, 1, 2, 25, 1, 3, 1, 1, 7, 1, 38]

LAYOUTS: dict[str, tuple[Groups, int]] = {
    "even": (random_groups(9, rows=10, longest=12), 3),
    "uneven and tiny": ([g[:n] for g, n in zip(random_groups(12, rows=40, seed=1), UNEVEN, strict=True)], 1),
    "one shard of one row group": (random_groups(1, rows=60, seed=2), 1),
    "rows without samples": ([[[1, 2]] * 5, [[1, 2, 3], [4]], [[5]] * 3, *random_groups(2, rows=9, seed=3)], 2),
    "fewer samples than a batch": ([[[1, 2, 3]], [[4, 5, 6, 7]], [[8, 9]]], 1),
    "fewer samples than ranks": ([[[3, 2, 1]]], 1),
    "one huge row": ([[[1 + i % 37 for i in range(3000)]], *random_groups(3, rows=2, seed=4)], 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_prefix_once_in_the_same_batches_over_worlds_threads_formats_restarts(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_SAMPLES", 16)
    groups, per_shard = LAYOUTS[layout]
    histories = [history for rows in groups for history in rows]
    reference = Run(write(tmp_path / "reference", groups, "parquet", per_shard)).whole(epochs=2)
    for epoch in reference:
        check_once(epoch, histories)
    generator = random.Random(layout)
    for format in FORMATS:
        dataset = write(tmp_path / format, groups, format, per_shard)
        for threads in (1, 4):
            run = Run(dataset, options={**OPTIONS, "prefetch_threads": threads})
            steps = run.steps()
            assert steps == len(reference[0])
            for world in WORLDS:
                assert run.whole(2, world) == reference
                stops = sorted(generator.choices(range(steps + 1), k=3))
                worlds = [world, *generator.sample(WORLDS, 3)]
                assert run.elastic(2, stops, worlds) == reference, (format, threads, stops, worlds)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Groups, int, SampleSpec, dict[str, Any], int]:
    """Shards of one row to many, rows too short for a sample, epochs shorter than a batch, small chunks and windows."""
    history = st.lists(st.integers(1, 30), min_size=1, max_size=10)
    rows = st.one_of(st.lists(history, min_size=1, max_size=2), st.lists(history, min_size=1, max_size=12))
    options = {
        "batch_size": 8 * draw(st.integers(1, 3)),
        "streams": 8,
        "seed": draw(st.integers(0, 2**31)),
        "shuffle_window": draw(st.integers(1, 12)),
        "cache_bytes": draw(st.sampled_from([0, 500, 1 << 28])),
        "prefetch_threads": draw(st.sampled_from([1, 4])),
        "prefetch_bytes": draw(st.sampled_from([1, 1 << 24])),
    }
    spec = SampleSpec(
        draw(st.sampled_from(["all_prefixes", "full_sequence", "one_random_prefix"])),
        max_items=draw(st.integers(1, 8)),
        min_items=draw(st.integers(1, 3)),
        holdout=2,
    )
    groups = draw(st.lists(rows, min_size=1, max_size=6))
    return groups, draw(st.integers(1, 4)), spec, options, draw(st.sampled_from([1, 24, 16384]))


@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=40)
def test_any_layout_stopped_anywhere_goes_on_to_the_same_batches_on_other_ranks(
    case: tuple[Groups, int, SampleSpec, dict[str, Any], int], data: st.DataObject
) -> None:
    groups, per_shard, spec, options, chunk = case
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(module, "CHUNK_SAMPLES", chunk):
        first, second = (
            Run(write(Path(folder) / format, groups, format, per_shard), spec, options) for format in FORMATS
        )
        reference = first.whole(2)
        allowed = prefixes([history for rows in groups for history in rows], spec)
        for epoch in reference:
            seen = Counter(i >> 24 for batch in epoch for i, _ in batch)
            once = spec.samples != "all_prefixes"
            assert seen == {row: 1 if once else len(ends) for row, ends in allowed.items()}
            assert len({i for batch in epoch for i, _ in batch}) == sum(seen.values())
            assert all(allowed[i >> 24][i] == list(items) for batch in epoch for i, items in batch)
        stops = sorted(data.draw(st.lists(st.integers(0, len(reference[0])), max_size=3), label="stops"))
        worlds = data.draw(st.lists(st.sampled_from(WORLDS), min_size=1, max_size=4), label="worlds")
        assert second.elastic(2, stops, worlds) == reference


def tensors(dataset: Dataset, **options: Any) -> list[list[bytes]]:
    """The bytes of every batch."""
    stream = Stream(dataset, SPEC, **{**OPTIONS, **options})
    try:
        return [
            [t.numpy().tobytes() for t in (b.items, b.offsets, b.sample_ids, torch.tensor(b.max_length))]
            for epoch in range(2)
            for b in stream.iterate(epoch)
        ]
    finally:
        stream.close()


def test_batches_are_the_same_bits_from_both_formats_and_from_local_and_remote_storage(tmp_path: Path) -> None:
    groups = random_groups(9, rows=10)
    memory = fsspec.filesystem("memory")
    expected = tensors(write(tmp_path / "reference", groups))
    try:
        for format in FORMATS:
            write(tmp_path / format, groups, format)
            memory.put(str(tmp_path / format), f"/ledger/{format}", recursive=True)
            for url in (str(tmp_path / format), f"memory://ledger/{format}"):
                for options in ({}, {"cache_bytes": 0}, {"prefetch_threads": 4, "prefetch_bytes": 1 << 24}):
                    assert tensors(Dataset.open(url), **options) == expected
    finally:
        memory.rm("/ledger", recursive=True)


# Mixing. The parts' histories tell where a sample is from: the first item of every row is the row's number.

WEIGHTS = (1.0, 2.0, 0.25, 0.3)


@dataclass
class Mixed:
    """Four datasets of 40 to 60 rows of a sample each, in both formats, and their first row numbers."""

    datasets: list[Dataset]
    firsts: list[int]

    @classmethod
    def write(cls, folder: Path, formats: Sequence[Format]) -> Mixed:
        sizes = (57, 43, 40, 60)  # 40 has quarters
        firsts = [0, 57, 100, 140]
        datasets = []
        for first, size, format in zip(firsts, sizes, formats, strict=True):
            rows = [[first + row + 1, 7, 8] for row in range(size)]
            cuts = [0, 1, 3, 20, 21, size]
            groups = [rows[a:b] for a, b in pairwise(cuts)]
            datasets.append(write(folder / str(first), groups, format, groups_per_shard=2))
        return cls(datasets, firsts)

    def run(self, **options: Any) -> Run:
        mix = list(zip(self.datasets[1:], WEIGHTS[1:], strict=True))
        return Run(self.datasets[0], options={**OPTIONS, "batch_size": 24, "mix": mix, **options})

    def parts(self, epoch: list[Batch]) -> list[Counter[int]]:
        """How often the epoch has each row of each part."""
        ends = [*self.firsts[1:], 200]
        rows = [sample_id >> 24 for batch in epoch for sample_id, _ in batch]
        return [Counter(r for r in rows if a <= r < b) for a, b in zip(self.firsts, ends, strict=True)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed.write(tmp_path_factory.mktemp("mixed"), ["parquet", "webdataset", "webdataset", "parquet"])


@pytest.fixture(scope="module")
def mixed_epochs(mixed: Mixed) -> list[list[Batch]]:
    return mixed.run().whole(epochs=20)


def test_rows_of_mixed_datasets_are_numbered_on_and_keep_their_items(mixed_epochs: list[list[Batch]]) -> None:
    for sample_id, items in (sample for epoch in mixed_epochs for batch in epoch for sample in batch):
        assert items == ((sample_id >> 24) + 1,) and sample_id & 0xFFFFFF == 1


def test_an_epoch_has_a_part_of_whole_weight_that_often(mixed: Mixed, mixed_epochs: list[list[Batch]]) -> None:
    for epoch in mixed_epochs:
        once, twice, *_ = mixed.parts(epoch)
        assert once == dict.fromkeys(range(57), 1) and twice == dict.fromkeys(range(57, 100), 2)


def test_a_quarter_of_a_part_an_epoch_has_each_sample_once_in_four_epochs(
    mixed: Mixed, mixed_epochs: list[list[Batch]]
) -> None:
    quarters = [mixed.parts(epoch)[2] for epoch in mixed_epochs]
    assert all(quarter.total() == 10 for quarter in quarters)
    for first in range(17):  # any four epochs in a row
        assert sum(quarters[first : first + 4], Counter()) == dict.fromkeys(range(100, 140), 1)


def test_any_share_takes_all_samples_equally_often(mixed: Mixed, mixed_epochs: list[list[Batch]]) -> None:
    seen: Counter[int] = Counter()
    for done, epoch in enumerate(mixed_epochs, 1):
        share = mixed.parts(epoch)[3]
        assert share.total() == len(share) == 18
        seen += share
        times = {seen[row] for row in range(140, 200)}
        assert times <= {done * 18 // 60, done * 18 // 60 + 1}


def test_epochs_of_a_mix_have_equal_steps_and_a_batch_mixes_the_parts(
    mixed: Mixed, mixed_epochs: list[list[Batch]]
) -> None:
    total = 57 + 2 * 43 + 10 + 18
    assert {len(epoch) for epoch in mixed_epochs} == {-(-total // 24)} == {mixed.run().steps()}
    assert {sum(map(len, epoch)) for epoch in mixed_epochs} == {total}
    together = [sum(bool(part) for part in mixed.parts([batch])) for epoch in mixed_epochs for batch in epoch[:-1]]
    assert sum(together) / len(together) > 3


@pytest.mark.parametrize("threads", [1, 4])
def test_a_mix_is_elastic_and_goes_on_from_any_step(
    mixed: Mixed, mixed_epochs: list[list[Batch]], tmp_path: Path, threads: int
) -> None:
    generator = random.Random(threads)
    other = Mixed.write(tmp_path, ["webdataset", "parquet", "parquet", "parquet"])
    for each in (mixed, other):
        run = each.run(prefetch_threads=threads)
        for world in WORLDS:
            assert run.whole(2, world) == mixed_epochs[:2]
            for _ in range(2):
                stops = sorted(generator.choices(range(run.steps() + 1), k=3))
                worlds = generator.choices(WORLDS, k=4)
                assert run.elastic(3, stops, worlds) == mixed_epochs[:3], (stops, worlds)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 3), min_size=4, max_size=4),
    data=st.data(),
)
@settings(deadline=None, max_examples=25)
def test_any_mix_takes_the_samples_of_a_part_equally_often(
    sizes: list[int], weights: list[float], data: st.DataObject
) -> None:
    """Parts of no rows, of fewer than one sample an epoch by weight, and rows of several prefixes."""
    epochs = 5
    with tempfile.TemporaryDirectory() as folder:
        datasets, expected, first = [], [], 0
        for number, size in enumerate([5, *sizes]):
            histories = [[1, 2, 3, *range(1, row % 4 + 1)] for row in range(size)]
            datasets.append(write(Path(folder) / str(number), [histories[:2], histories[2:]]))
            every = {first + (i >> 24) << 24 | i & 0xFFFFFF for row in prefixes(histories, SPEC).values() for i in row}
            expected.append(every)
            first += size
        run = Run(datasets[0], options={**OPTIONS, "mix": list(zip(datasets[1:], weights, strict=False))})
        alone = run.whole(epochs)
        for every, weight in zip(expected, [1.0, *weights], strict=False):
            taken = max(round(len(every) * weight), bool(every))
            seen: Counter[int] = Counter()
            for done, epoch in enumerate(alone, 1):
                now = Counter(i for batch in epoch for i, _ in batch if i in every)
                assert now.total() == taken
                seen += now
                low = done * taken // len(every) if every else 0
                assert {seen[i] for i in every} <= {low, low + 1}
        assert len({len(epoch) for epoch in alone}) == 1
        stops = sorted(data.draw(st.lists(st.integers(0, len(alone[0])), max_size=3), label="stops"))
        worlds = data.draw(st.lists(st.sampled_from(WORLDS), min_size=1, max_size=4), label="worlds")
        assert run.elastic(epochs, stops, worlds) == alone
