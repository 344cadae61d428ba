"""The dataset on disk: what is written reads back, and whatever has changed since is refused by name."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s3rec_dist.data.dataset import Dataset, DatasetError, Manifest
from s3rec_dist.data.formats import SHARD_SCHEMA, length_counts, sha256_of, write_parquet_shards
from s3rec_dist.data.prepare import PrepareSettings, prepare

HISTORIES = {
    "ann": [1, 2, 3, 2],
    "bob": [4, 1, 5],
    "cyd": [5, 4, 3, 2, 1],
    "dan": [2, 2, 2],
    "eve": [3, 1, 4, 5, 2, 1, 3],
}
ATTRIBUTES = {"1": [2, 1, 2], "2": [3], "4": [1], "5": []}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five users, five items, two users a row group, two row groups a shard."""
    text = "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in HISTORIES.items())
    (tmp_path / "toy.txt").write_text(text)
    (tmp_path / "toy_item2attributes.json").write_text(json.dumps(ATTRIBUTES))
    prepare(
        PrepareSettings(
            source="s3rec",
            input=str(tmp_path / "toy.txt"),
            output=str(tmp_path / "dataset"),
            rows_per_group=2,
            groups_per_shard=2,
        )
    )
    return tmp_path / "dataset"


def rewrite_shard(folder: Path, table: pa.Table, **options: object) -> None:
    """Replaces the first shard, and its SHA-256 in the manifest, so that only its content can give it away."""
    path = folder / "shards" / "00000.parquet"
    pq.write_table(table, path, **options)
    tree = json.loads((folder / "manifest.json").read_text())
    tree["shards"][0]["sha256"] = sha256_of(str(path))
    (folder / "manifest.json").write_text(json.dumps(tree))


def shard_table(rows: dict[str, list[int]]) -> pa.Table:
    return pa.table({"user": list(rows), "items": list(rows.values())}, schema=SHARD_SCHEMA)


def test_rows_come_back_in_order_with_their_numbers(folder: Path) -> None:
    dataset = Dataset.open(str(folder))
    assert (dataset.n_rows, dataset.n_items, dataset.n_attributes, dataset.mask_id) == (5, 5, 3, 6)
    assert [shard.rows for shard in dataset.manifest.shards] == [4, 1]
    read: dict[str, list[int]] = {}
    for index, (_, _, first_row, group) in enumerate(dataset.row_groups):
        sequences = dataset.read_row_group(index)
        assert sequences.first_row == first_row == len(read)
        assert sequences.values.dtype == np.int32 and sequences.offsets.dtype == np.int64
        assert len(sequences.users) == group.rows == len(sequences.offsets) - 1
        for row, user in enumerate(sequences.users.to_pylist()):
            read[user] = sequences.values[sequences.offsets[row] : sequences.offsets[row + 1]].tolist()
    assert read == HISTORIES and list(read) == list(HISTORIES)


def test_row_groups_know_their_lengths_without_being_read(folder: Path) -> None:
    groups = [group.length_counts for _, _, _, group in Dataset.open(str(folder)).row_groups]
    assert groups == [((3, 1), (4, 1)), ((3, 1), (5, 1)), ((7, 1),)]


def test_values_are_views_of_the_decoded_buffer(folder: Path) -> None:
    values = Dataset.open(str(folder)).read_row_group(0).values
    assert not values.flags.owndata and not values.flags.writeable


def test_attribute_lists_are_unique_ascending_and_may_be_missing(folder: Path) -> None:
    lists = Dataset.open(str(folder)).item_attributes()
    assert lists.offsets.dtype == np.int64 and lists.values.dtype == np.int32
    per_id = [lists.values[a:b].tolist() for a, b in zip(lists.offsets, lists.offsets[1:], strict=False)]
    assert per_id == [[], [1, 2], [3], [], [1], [], []]  # padding, items 1..5, mask


def test_raw_ids_map_both_ways(folder: Path) -> None:
    dataset = Dataset.open(str(folder))
    raw = dataset.item_raw_ids()
    assert raw.tolist() == ["", "1", "2", "3", "4", "5", ""]
    assert all(raw[number] == name for name, number in dataset.item_ids().items())
    assert dataset.attributes_table().to_pylist() == [{"id": i, "field": "attribute", "raw": str(i)} for i in (1, 2, 3)]
    assert dataset.items_table().column("count").to_pylist() == [5, 7, 4, 3, 3]


def test_segment_pool_holds_each_row_without_its_last_items(folder: Path) -> None:
    dataset = Dataset.open(str(folder))
    pool = dataset.segment_pool(holdout=2)
    assert pool.dtype == np.int32
    assert sorted(pool.tolist()) == sorted(item for items in HISTORIES.values() for item in items[:-2])
    assert sorted(dataset.segment_pool(0).tolist()) == sorted(item for items in HISTORIES.values() for item in items)
    assert dataset.segment_pool(2, limit=4).tolist() == pool[:4].tolist()


def test_manifest_reads_back_equal_and_its_fingerprint_follows_its_content(folder: Path) -> None:
    manifest = Dataset.open(str(folder)).manifest
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest and again.fingerprint == manifest.fingerprint
    assert dataclasses.replace(manifest, name="other").fingerprint != manifest.fingerprint


def test_reads_through_fsspec(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/lake/toy", recursive=True)
    try:
        remote, local = Dataset.open("memory://lake/toy"), Dataset.open(str(folder))
        remote.verify()
        assert remote.fingerprint == local.fingerprint
        assert remote.read_row_group(1).values.tolist() == local.read_row_group(1).values.tolist()
        assert remote.item_raw_ids().tolist() == local.item_raw_ids().tolist()
    finally:
        memory.rm("/lake", recursive=True)


def test_threads_may_read_at_once(folder: Path) -> None:
    dataset = Dataset.open(str(folder))
    expected = [dataset.read_row_group(index).values.tolist() for index in range(3)]
    wrong: list[int] = []

    def read(seed: int) -> None:
        for index in random.Random(seed).choices(range(3), k=50):
            if dataset.read_row_group(index).values.tolist() != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_missing_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere/manifest\.json: no such file; expected a dataset folder"):
        Dataset.open(str(tmp_path / "nowhere"))


def test_folder_without_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        Dataset.open(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "dataset version 99, this program reads version 1"),
        ({"format": "something else"}, "not a s3rec_dist dataset's manifest"),
        ({"users": -1}, "counts must be"),
        ({"users": 4}, "users and the shards' rows disagree"),
        ({"shards": [{"path": "../x", "rows": 5, "sha256": "", "row_groups": []}]}, "leaves the dataset's folder"),
        ({"shards": [{"path": "s3://x", "rows": 5, "sha256": "", "row_groups": []}]}, "leaves the dataset's folder"),
        ({"shards": 3}, "malformed manifest"),
        ({"surprise": 1}, "malformed manifest"),
    ],
)
def test_manifest_of_another_kind_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DatasetError, match=message):
        Dataset.open(str(folder))


def test_manifest_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DatasetError, match=r"manifest\.json: not valid JSON"):
        Dataset.open(str(folder))


@pytest.mark.parametrize("name", ["shards/00001.parquet", "items.parquet", "attributes.parquet"])
def test_verify_names_a_changed_file(folder: Path, name: str) -> None:
    Dataset.open(str(folder)).verify()
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DatasetError, match=rf"{name}: SHA-256 is .* the file has changed since it was prepared"):
        Dataset.open(str(folder)).verify()


@pytest.mark.parametrize("name", ["shards/00000.parquet", "items.parquet", "attributes.parquet"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    dataset = Dataset.open(str(folder))
    with pytest.raises(DatasetError, match=rf"{name}: no such file, but the manifest lists it"):
        dataset.verify()
    with pytest.raises(DatasetError, match=rf"{name}: no such file"):
        dataset.read_row_group(0), dataset.items_table(), dataset.attributes_table()


def test_truncated_shard_is_refused(folder: Path) -> None:
    path = folder / "shards" / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"00000\.parquet: not a readable Parquet file"):
        Dataset.open(str(folder)).read_row_group(0)


def test_a_flipped_bit_in_the_data_is_never_read_as_data(folder: Path) -> None:
    """Page checksums cover the pages; the rest of the file is covered by verify()."""

    def read(dataset: Dataset, index: int) -> tuple[list[str], list[int]]:
        sequences = dataset.read_row_group(index)
        return sequences.users.to_pylist(), sequences.values.tolist()

    path = folder / "shards" / "00000.parquet"
    clean = path.read_bytes()
    expected = [read(Dataset.open(str(folder)), index) for index in range(2)]
    found = 0
    for position in range(4, len(clean)):
        damaged = bytearray(clean)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        dataset = Dataset.open(str(folder))
        try:
            assert [read(dataset, index) for index in range(2)] == expected
        except DatasetError:
            found += 1
    assert found > 100


@pytest.mark.parametrize("item", [0, -3, 6, 7])
def test_ids_out_of_range_name_shard_and_row(folder: Path, item: int) -> None:
    rows = {"ann": [1, 2, 3, 2], "bob": [4, 1, 5], "cyd": [5, 4, 3, 2, 1], "dan": [2, item, 2]}
    rewrite_shard(folder, shard_table(rows), row_group_size=2)
    dataset = Dataset.open(str(folder))
    dataset.verify()
    dataset.read_row_group(0)
    with pytest.raises(
        DatasetError, match=rf"00000\.parquet: row group 1: row 3 holds item id {item}, expected 1\.\.5"
    ):
        dataset.read_row_group(1)


def test_other_lengths_than_the_manifest_says_are_refused(folder: Path) -> None:
    rows = {"ann": [1, 2, 3], "bob": [4, 1, 5, 1], "cyd": [5, 4, 3, 2], "dan": [2, 2, 2]}
    rewrite_shard(folder, shard_table(rows), row_group_size=2)
    dataset = Dataset.open(str(folder))
    dataset.read_row_group(0)  # the same lengths in another order are the same to the order of an epoch
    with pytest.raises(DatasetError, match="row group 1: sequence lengths differ from the manifest's"):
        dataset.read_row_group(1)


def test_other_row_groups_than_the_manifest_says_are_refused(folder: Path) -> None:
    rewrite_shard(folder, shard_table({user: HISTORIES[user] for user in ("ann", "bob", "cyd", "dan")}))
    with pytest.raises(DatasetError, match="4 rows in 1 row groups, the manifest says 4 in 2"):
        Dataset.open(str(folder)).read_row_group(0)


@pytest.mark.parametrize(
    "kinds",
    [
        {"user": pa.string(), "items": pa.list_(pa.int64())},
        {"user": pa.large_string(), "items": pa.list_(pa.int32())},
        {"user": pa.binary(), "items": pa.list_(pa.int32())},
        {"items": pa.list_(pa.int32()), "user": pa.string()},
        {"user": pa.string(), "items": pa.list_(pa.int32()), "extra": pa.int8()},
    ],
)
def test_only_the_plain_schema_is_read(folder: Path, kinds: dict[str, pa.DataType]) -> None:
    values = {"user": ["a", "b", "c", "d"], "items": [[1, 1, 1]] * 4, "extra": [1] * 4}
    schema = pa.schema(kinds.items())
    rewrite_shard(folder, pa.table({name: values[name] for name in kinds}, schema=schema), row_group_size=2)
    with pytest.raises(DatasetError, match=r"expected columns user: string, items: list<.*int32>; found"):
        Dataset.open(str(folder)).read_row_group(0)


def test_nulls_are_refused(folder: Path) -> None:
    table = pa.table({"user": ["a", None, "c", "d"], "items": [[1, 1, 1, 1], [1, 1, 1], [1] * 5, [1] * 3]})
    rewrite_shard(folder, table.cast(SHARD_SCHEMA), row_group_size=2)
    with pytest.raises(DatasetError, match="holds nulls"):
        Dataset.open(str(folder)).read_row_group(0)


def test_shards_cut_where_told_and_list_their_rows(tmp_path: Path) -> None:
    batches = [shard_table({f"u{i}": [1] * (i + 3)}).to_batches()[0] for i in range(5)]
    shards = write_parquet_shards(iter(batches), str(tmp_path), groups_per_shard=2)
    assert [(shard.name, shard.rows) for shard in shards] == [
        ("00000.parquet", 2),
        ("00001.parquet", 2),
        ("00002.parquet", 1),
    ]
    assert [shard.row_groups for shard in shards] == [(((3, 1),), ((4, 1),)), (((5, 1),), ((6, 1),)), (((7, 1),),)]
    assert all(sha256_of(str(tmp_path / shard.name)) == shard.sha256 for shard in shards)


def test_length_counts_ascend() -> None:
    assert length_counts(np.array([0, 5, 8, 13, 16])) == ((3, 2), (5, 2))
    assert length_counts(np.array([0])) == ()
