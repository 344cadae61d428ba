"""Damage: whatever byte of a dataset changes is noticed, and on request what is damaged is left out on all ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from handmade import EXTENSIONS, FORMATS, Groups, random_groups, rows_of, write

from s3rec_dist.config import EvaluationConfig, ModelConfig
from s3rec_dist.data import stream as module
from s3rec_dist.data.dataset import Dataset, DatasetError, Manifest
from s3rec_dist.data.order import SampleSpec
from s3rec_dist.data.stream import Stream
from s3rec_dist.evaluation import evaluate
from s3rec_dist.model import S3Rec

pytestmark = pytest.mark.timeout(120)

GROUPS: Groups = random_groups(6, rows=5, seed=7)
SPEC = SampleSpec("all_prefixes", max_items=8, min_items=1, holdout=2)
OPTIONS: dict[str, Any] = {"batch_size": 16, "streams": 8, "seed": 3, "shuffle_window": 12}


@pytest.fixture(scope="module", params=FORMATS)
def whole(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Dataset:
    """Six row groups of five users on three shards."""
    return write(tmp_path_factory.mktemp("whole"), GROUPS, request.param)


@pytest.fixture
def folder(whole: Dataset, tmp_path: Path) -> Path:
    """A copy of ``whole``, to be damaged."""
    return Path(shutil.copytree(whole.path, tmp_path / "dataset"))


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "shards").iterdir())


def spoil(data: bytes, random: Random) -> tuple[bytes, range]:
    """One byte changed, or the end cut off; and where."""
    at = random.randrange(len(data))
    if random.random() < 0.2:
        return data[:at], range(at, len(data))
    return data[:at] + bytes([data[at] ^ random.randrange(1, 256)]) + data[at + 1 :], range(at, at + 1)


def read(dataset: Dataset, group: int) -> tuple[list[str], list[int], list[int]]:
    sequences = dataset.read_row_group(group)
    return sequences.users.to_pylist(), sequences.values.tolist(), sequences.offsets.tolist()


def test_500_changed_bytes_and_cuts_of_shards_are_all_noticed_and_none_is_read_as_data(
    whole: Dataset, folder: Path
) -> None:
    """The row groups that a changed byte belongs to are refused, and the others are what they were; verify() names the
    file even where the byte is none of a row group, as Parquet's first four and a tar's padding are."""
    random = Random(0)
    index = whole.index
    expected = [read(whole, group) for group in range(6)]
    counts = [0, 0, 0]
    for _ in range(500):
        number = random.randrange(3)
        path = shards_of(folder)[number]
        clean = path.read_bytes()
        spoilt, changed = spoil(clean, random)
        path.write_bytes(spoilt)
        first, second = 2 * number, 2 * number + 1
        hit = {
            g
            for g in (first, second)
            if changed.start < index.offset[g] + index.size[g] and changed.stop > index.offset[g]
        }
        if whole.manifest.format == "parquet" and changed.stop > index.offset[second] + index.size[second]:
            hit = {first, second}  # the footer
        counts[len(hit)] += 1
        dataset = Dataset.open(str(folder))
        for group in range(6):
            if group in hit:
                with pytest.raises(DatasetError, match=rf"shards/{path.name}: "):
                    dataset.read_row_group(group)
            else:
                assert read(dataset, group) == expected[group]
        with pytest.raises(DatasetError, match=rf"shards/{path.name}: "):
            dataset.verify(hashes=True)
        path.write_bytes(clean)
    assert all(counts)
    Dataset.open(str(folder)).verify()


@pytest.mark.parametrize("name", ["index.parquet", "items.parquet", "attributes.parquet"])
def test_changed_bytes_and_cuts_of_index_and_catalogue_are_noticed_before_they_are_used(
    whole: Dataset, folder: Path, name: str
) -> None:
    random = Random(name)
    path = folder / name
    clean = path.read_bytes()
    uses: dict[str, Callable[[Dataset], Any]] = {
        "index.parquet": lambda dataset: dataset.read_row_group(0),
        "items.parquet": Dataset.item_attributes,
        "attributes.parquet": Dataset.attributes_table,
    }
    for _ in range(150):
        path.write_bytes(spoil(clean, random)[0])
        for use in (uses[name], Dataset.verify):
            with pytest.raises(DatasetError, match=rf"/{name}: .*the file has changed since it was prepared"):
                use(Dataset.open(str(folder)))


def test_every_changed_bit_of_the_manifest_is_an_error(whole: Dataset) -> None:
    clean = (Path(whole.path) / "manifest.json").read_bytes()
    for at in range(len(clean)):
        for bit in range(8):
            changed = clean[:at] + bytes([clean[at] ^ 1 << bit]) + clean[at + 1 :]
            with pytest.raises((DatasetError, UnicodeDecodeError)):
                Manifest.from_json(changed.decode())


def test_a_manifest_cut_anywhere_is_an_error(whole: Dataset, folder: Path) -> None:
    path = folder / "manifest.json"
    clean = path.read_bytes()
    for size in range(0, len(clean) - 1, 5):
        path.write_bytes(clean[:size])
        with pytest.raises(DatasetError, match=r"manifest\.json: "):
            Dataset.open(str(folder))


def test_a_manifest_that_is_no_text_is_an_error(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DatasetError, match=r"manifest\.json: cannot be read"):
        Dataset.open(str(folder))


# What is damaged may be left out.


def damage_group(folder: Path, whole: Dataset, group: int) -> None:
    """Changes a byte of a row group."""
    path = shards_of(folder)[int(whole.index.shard[group])]
    data = bytearray(path.read_bytes())
    data[int(whole.index.offset[group]) + 3] ^= 0x40
    path.write_bytes(data)


def cut_within(folder: Path, whole: Dataset, group: int) -> None:
    """Cuts a shard off within a row group."""
    path = shards_of(folder)[int(whole.index.shard[group])]
    path.write_bytes(path.read_bytes()[: int(whole.index.offset[group]) + 5])


def batches(folder: str, world: int, bad: int = 3, epochs: int = 2, **options: Any) -> tuple[list[Any], set[int]]:
    """Global batches, sorted by sample, on ``world`` ranks that open the dataset on their own, and the row groups that
    any of them left out."""
    ranks, damaged = [], set()
    for rank in range(world):
        dataset = Dataset.open(folder, max_bad_shards=bad)
        stream = Stream(dataset, SPEC, rank=rank, world_size=world, **{**OPTIONS, **options})
        try:
            ranks.append([b for epoch in range(epochs) for b in stream.iterate(epoch)])
        finally:
            stream.close()
        damaged |= set(dataset.damaged)
    together = []
    for parts in zip(*ranks, strict=True):
        together.append(
            sorted(
                (sample_id, tuple(part.items[a:b].tolist()))
                for part in parts
                for sample_id, (a, b) in zip(part.sample_ids.tolist(), pairwise(part.offsets.tolist()), strict=True)
            )
        )
        assert all(part.max_length == max(part.offsets.diff().tolist(), default=0) for part in parts)
    return together, damaged


DAMAGES: dict[str, tuple[Callable[[Path, Dataset], Any], set[int]]] = {
    "a byte of a row group": (lambda f, w: damage_group(f, w, 2), {2}),
    "two shards": (lambda f, w: [damage_group(f, w, g) for g in (1, 4, 5)], {1, 4, 5}),
    "a deleted shard": (lambda f, w: shards_of(f)[1].unlink(), {2, 3}),
    "a shard cut off": (lambda f, w: cut_within(f, w, 3), {3}),
    "an empty shard": (lambda f, w: shards_of(f)[0].write_bytes(b""), {0, 1}),
    "all shards": (lambda f, w: [path.unlink() for path in shards_of(f)], set(range(6))),
}
"""What is done to a dataset, and the row groups that are gone."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_row_groups_are_left_out_of_the_same_batches_on_any_number_of_ranks(
    whole: Dataset, folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_SAMPLES", 16)
    do, gone = DAMAGES[damage]
    do(folder, whole)
    if damage == "a shard cut off" and whole.manifest.format == "parquet":
        gone = {2, 3}  # without its footer a shard is gone whole
    complete, _ = batches(whole.path, 1)
    first_row = whole.index.first_row
    group_of = np.repeat(np.arange(6), np.diff(first_row))
    expected = [[(i, items) for i, items in batch if group_of[i >> 24] not in gone] for batch in complete]
    for world in (1, 2, 4, 8):
        assert batches(str(folder), world) == (expected, gone)
    assert batches(str(folder), 2, prefetch_threads=4, cache_bytes=0) == (expected, gone)


def test_damage_in_remote_storage_is_left_out_too(whole: Dataset, folder: Path) -> None:
    damage_group(folder, whole, 2)
    shards_of(folder)[2].unlink()
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/damage/toy", recursive=True)
    try:
        assert batches("memory://damage/toy", 2) == batches(str(folder), 2)
    finally:
        memory.rm("/damage", recursive=True)


def test_what_was_left_out_is_listed_with_its_shard_and_reason(whole: Dataset, folder: Path) -> None:
    end = EXTENSIONS[whole.manifest.format]
    damage_group(folder, whole, 0)
    shards_of(folder)[2].unlink()
    dataset = Dataset.open(str(folder), max_bad_shards=2)
    assert [items for _, items in rows_of(dataset)] == [h for rows in GROUPS[1:4] for h in rows]
    assert set(dataset.damaged) == {0, 4, 5}
    assert f"shards/00000.{end}: row group 0: bytes " in dataset.damaged[0]
    assert "have another SHA-256" in dataset.damaged[0]
    assert dataset.damaged[4].endswith(f"shards/00002.{end}: no such file, but the manifest lists it")
    rows_of(dataset)
    assert set(dataset.damaged) == {0, 4, 5}  # however often they are met


def test_more_damaged_shards_than_may_be_are_an_error_that_names_the_last(whole: Dataset, folder: Path) -> None:
    end = EXTENSIONS[whole.manifest.format]
    damage_group(folder, whole, 0)
    damage_group(folder, whole, 1)
    shards_of(folder)[2].unlink()
    dataset = Dataset.open(str(folder), max_bad_shards=1)
    for group in range(4):  # two row groups of one shard
        dataset.read_row_group(group)
    message = rf"shards/00002\.{end}: no such file.* This is damaged shard 2, more than may be left out"
    for _ in range(2):  # and it stays one
        with pytest.raises(DatasetError, match=message):
            dataset.read_row_group(4)
    with pytest.raises(DatasetError, match=rf"shards/00002\.{end}"):
        batches(str(folder), 1, bad=1)


def test_without_leave_to_do_without_the_first_damage_is_an_error(whole: Dataset, folder: Path) -> None:
    damage_group(folder, whole, 3)
    dataset = Dataset.open(str(folder))
    with pytest.raises(DatasetError, match=r"row group 1: bytes .* restore it or prepare the dataset again$"):
        dataset.read_row_group(3)
    assert not dataset.damaged


def test_the_segment_pool_is_of_what_is_left(whole: Dataset, folder: Path) -> None:
    damage_group(folder, whole, 3)
    pool = Dataset.open(str(folder), max_bad_shards=1).segment_pool(2)
    left = [item for number, rows in enumerate(GROUPS) if number != 3 for history in rows for item in history[:-2]]
    assert sorted(pool.tolist()) == sorted(left)


@pytest.mark.parametrize("protocol", ["full", "sampled"])
def test_evaluation_ranks_the_users_that_are_left_as_it_does_among_all(
    whole: Dataset, tmp_path: Path, protocol: Any
) -> None:
    """The sums over one half of the users and the other are those over all."""
    torch.manual_seed(0)
    settings = ModelConfig(hidden_size=8, layers=1, heads=2, inner_size=8, max_length=6, initializer_range=0.5)
    model = S3Rec(settings, whole.n_items, 0).eval()
    config = EvaluationConfig(protocol=protocol, negatives=5, batch_users=3)
    everyone = evaluate(model, whole, config, "test", "cpu")
    assert everyone.users == 30 and 0 < everyone.metrics["MRR"] < 1
    halves = []
    for name, groups in (("one", (1, 4, 5)), ("other", (0, 2, 3))):
        folder = Path(shutil.copytree(whole.path, tmp_path / name))
        for group in groups:
            damage_group(folder, whole, group)
        dataset = Dataset.open(str(folder), max_bad_shards=2)
        halves.append(evaluate(model, dataset, config, "test", "cpu"))
        assert halves[-1].users == 15 and set(dataset.damaged) == set(groups)
    for name, value in everyone.metrics.items():
        assert value * 30 == pytest.approx(sum(half.metrics[name] * 15 for half in halves))
