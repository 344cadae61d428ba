"""The dataset on disk: what is written reads back, and whatever has changed since is refused by name."""

from __future__ import annotations

import dataclasses
import errno
import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from handmade import FORMATS, change_index, change_manifest, replace_table, rows_of

from s3rec_dist.data.dataset import Dataset, DatasetError, Manifest
from s3rec_dist.data.formats import Format
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.storage import Storage

HISTORIES = {
    "ann": [1, 2, 3, 2],
    "bob": [4, 1, 5],
    "cyd": [5, 4, 3, 2, 1],
    "dan": [2, 2, 2],
    "eve": [3, 1, 4, 5, 2, 1, 3],
}
ATTRIBUTES = {"1": [2, 1, 2], "2": [3], "4": [1], "5": []}


def prepared(folder: Path, format: Format) -> Path:
    """Five users, five items, two users a row group, two row groups a shard."""
    text = "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in HISTORIES.items())
    (folder / "toy.txt").write_text(text)
    (folder / "toy_item2attributes.json").write_text(json.dumps(ATTRIBUTES))
    prepare(
        PrepareSettings(
            source="s3rec",
            input=str(folder / "toy.txt"),
            output=str(folder / "dataset"),
            format=format,
            rows_per_group=2,
            groups_per_shard=2,
        )
    )
    return folder / "dataset"


@pytest.fixture(scope="module", params=FORMATS)
def whole(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return prepared(tmp_path_factory.mktemp("dataset"), request.param)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of ``whole``, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "dataset"))


def shard_name(folder: Path, number: int = 0) -> str:
    return json.loads((folder / "manifest.json").read_text())["shards"][number]["path"]


def test_rows_come_back_in_order_with_their_numbers(folder: Path) -> None:
    dataset = Dataset.open(str(folder))
    assert (dataset.n_rows, dataset.n_items, dataset.n_attributes, dataset.mask_id) == (5, 5, 3, 6)
    assert [shard.rows for shard in dataset.manifest.shards] == [4, 1]
    rows = 0
    for number in range(len(dataset.index)):
        sequences = dataset.read_row_group(number)
        assert sequences.first_row == dataset.index.first_row[number] == rows
        assert sequences.values.dtype == np.int32 and sequences.offsets.dtype == np.int64
        assert len(sequences.users) == dataset.index.rows[number] == len(sequences.offsets) - 1
        without = dataset.read_row_group(number, with_users=False)
        assert without.users is None and without.values.tolist() == sequences.values.tolist()
        rows += len(sequences.users)
    assert rows_of(dataset) == list(HISTORIES.items())


def test_row_groups_know_their_lengths_without_being_read(folder: Path) -> None:
    index = Dataset.open(str(folder)).index
    lengths = [[part.tolist() for part in index.length_counts(group)] for group in range(3)]
    assert lengths == [[[3, 4], [1, 1]], [[3, 5], [1, 1]], [[7], [1]]]
    assert index.first_row.tolist() == [0, 2, 4, 5] and index.shard.tolist() == [0, 0, 1]


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    manifests = []
    for format in FORMATS:
        (tmp_path / format).mkdir()
        manifests.append(Dataset.open(str(prepared(tmp_path / format, format))).manifest)
    first, second = manifests
    assert first.content == second.content and first.catalogue == second.catalogue
    assert first.fingerprint != second.fingerprint


def test_values_are_views_of_the_decoded_buffer(folder: Path) -> None:
    values = Dataset.open(str(folder)).read_row_group(0).values
    assert values.tolist() == HISTORIES["ann"] + HISTORIES["bob"]
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
        ({"version": 99}, "dataset version 99, this program reads version 2"),
        ({"version": 1, "format": "s3rec_dist dataset", "kind": None}, "dataset version 1, this program reads version"),
        ({"kind": "something else"}, "not a s3rec_dist dataset's manifest"),
        ({"format": "pickle"}, "format 'pickle', expected parquet or webdataset"),
        ({"users": -1}, "users is -1, expected a number from 0"),
        ({"items": 5.0}, r"items is 5\.0, expected a number from 0"),
        ({"attributes": True}, "attributes is True, expected a number from 0"),
        ({"interactions": 1 << 63}, "interactions is 9223372036854775808, expected a number"),
        ({"name": ["toy"]}, r"name is \['toy'\], expected text"),
        ({"shards": 3}, "malformed manifest"),
        ({"shards": [3]}, "malformed manifest"),
        ({"rows_content": [1, 2, 3]}, "malformed manifest"),
        ({"rows_content": ["1", 2]}, "rows_content two numbers"),
        ({"preparation": []}, "preparation must be a mapping"),
        ({"files": []}, "malformed manifest"),
        ({"files": {}}, "files lacks attributes.parquet, index.parquet, items.parquet"),
        ({"folder": "/etc/"}, "leaves the dataset's folder"),
        ({"folder": "../other/"}, "leaves the dataset's folder"),
        ({"surprise": 1}, "malformed manifest"),
    ],
)
def test_manifest_of_another_kind_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    change_manifest(folder, **change)
    with pytest.raises(DatasetError, match=message):
        Dataset.open(str(folder))


OUTSIDE = ["../x", "/x", "shards/../../x", "shards//x", "./x", "", "a\\b", "x\x00y", "x\ny", 5, None, ["x"]]


@pytest.mark.parametrize("path", [*OUTSIDE, "pipe:ls", "s3::x", "s3://x/y", "simplecache::s3://x"])
def test_shards_lie_in_the_datasets_folder_or_nowhere(folder: Path, path: object) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    change_manifest(folder, shards=[{**shards[0], "path": path}, *shards[1:]])
    with pytest.raises(DatasetError, match=r"manifest\.json: malformed manifest \(path "):
        Dataset.open(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": -1}, "size is -1"),
        ({"rows": 4.0}, r"rows is 4\.0"),
        ({"sha256": "xyz"}, "non-hexadecimal"),
        ({"tail_sha256": "ab"}, "'ab' is not a SHA-256"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_shards_are_described_in_full(folder: Path, change: dict[str, object], message: str) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    change_manifest(folder, shards=[{**shards[0], **change}, *shards[1:]])
    with pytest.raises(DatasetError, match=message):
        Dataset.open(str(folder))


def test_a_manifest_nested_beyond_measure_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DatasetError, match="not valid JSON"):
        Dataset.open(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"users": 4},
        {"interactions": 21},
        {"shards": "the first one only"},
    ],
)
def test_a_manifest_that_the_index_disagrees_with_is_refused(folder: Path, change: dict[str, Any]) -> None:
    if "shards" in change:
        change = {"shards": json.loads((folder / "manifest.json").read_text())["shards"][:1]}
    change_manifest(folder, **change)
    with pytest.raises(DatasetError, match=r"index\.parquet: its row groups and the manifest disagree"):
        assert Dataset.open(str(folder)).index


INDEX_CHANGES: dict[str, Any] = {
    "a shard that is not there": {"shard": [0, 0, 2]},
    "a negative shard": {"shard": [-1, 0, 1]},
    "a shard without row groups": {"shard": [0, 0, 0]},
    "shards out of order": {"shard": [1, 0, 0]},
    "row groups out of order": {"group": [1, 0, 0]},
    "a row group that is not there": {"group": [0, 7, 0]},
    "bytes before the shard": {"offset": [-4, 700, 4]},
    "bytes after the shard": {"offset": [4, 1 << 40, 4]},
    "more bytes than the shard": {"size": [1 << 62, 10, 10]},
    "fewer than no bytes": {"size": [-1, 10, 10]},
    "rows that have no length": {"rows": [3, 1, 1]},
    "negative lengths": {"lengths": [-3, 4, 3, 5, 7]},
    "lengths beyond what a sample's id holds": {"lengths": [3, 4, 3, 5, 1 << 24]},
    "negative counts": {"counts": [3, -1, 1, 1, 1]},
    "other lengths in sum": {"lengths": [3, 4, 3, 5, 8]},
    "dead rows that are not counted": {"dead": [1], "dead_offsets": [0, 1, 1, 1]},
}


@pytest.mark.parametrize("change", INDEX_CHANGES)
def test_an_index_that_contradicts_itself_or_the_manifest_is_refused(folder: Path, change: str) -> None:
    index = Dataset.open(str(folder)).index
    fields = {name: np.array(v, getattr(index, name).dtype) for name, v in INDEX_CHANGES[change].items()}
    if fields.keys() & {"lengths", "counts"} and change != "other lengths in sum":
        lengths, counts = fields.get("lengths", index.lengths), fields.get("counts", index.counts)
        change_manifest(folder, interactions=int(lengths @ counts))
    change_index(folder, **fields)
    with pytest.raises(DatasetError, match=r"index\.parquet: its row groups and the manifest disagree"):
        assert Dataset.open(str(folder)).index


@pytest.mark.parametrize(
    "change",
    [
        {"counts": [[1, 1], [1], [1]]},
        {"shard": [0, None, 1]},
        {"lengths": [[3, 4], [3, None], [7]]},
        {"dead": [None, [], []]},
        {"sha256": [b"1" * 32, None, b"3" * 32]},
    ],
)
def test_an_index_with_gaps_is_refused(folder: Path, change: dict[str, list[Any]]) -> None:
    table = Dataset.open(str(folder)).index.to_table()
    for name, values in change.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    replace_table(folder, "index.parquet", table)
    with pytest.raises(DatasetError, match=r"index\.parquet: its row groups and the manifest disagree"):
        assert Dataset.open(str(folder)).index


@pytest.mark.parametrize(("dead", "is_valid"), [(1, True), (2, False), (-1, False)])
def test_dead_rows_are_left_out_and_must_be_there(folder: Path, dead: int, is_valid: bool) -> None:
    change_manifest(folder, users=4, interactions=19)
    change_index(
        folder,
        lengths=np.array([4, 3, 5, 7], np.int32),
        counts=np.ones(4, np.int32),
        length_offsets=np.array([0, 1, 3, 4]),
        dead=np.array([dead], np.int32),
        dead_offsets=np.array([0, 1, 1, 1]),
    )
    dataset = Dataset.open(str(folder))
    if is_valid:
        assert rows_of(dataset) == [(user, items) for user, items in HISTORIES.items() if user != "bob"]
        assert dataset.read_row_group(1).first_row == 1
        assert dataset.read_row_group(0, with_users=False).values.tolist() == HISTORIES["ann"]
    else:
        with pytest.raises(DatasetError, match="the manifest disagree"):
            assert dataset.index


def test_manifest_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DatasetError, match=r"manifest\.json: not valid JSON"):
        Dataset.open(str(folder))


FILES = ["shard", "index.parquet", "items.parquet", "attributes.parquet"]


@pytest.mark.parametrize("name", FILES)
def test_verify_names_a_changed_file(folder: Path, name: str) -> None:
    Dataset.open(str(folder)).verify()
    path = folder / name.replace("shard", shard_name(folder, 1))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        DatasetError, match=rf"{path.name}: its SHA-256 is not .* the file has changed since it was prepared"
    ):
        Dataset.open(str(folder)).verify()
    Dataset.open(str(folder)).verify(hashes=False)


def test_verify_without_hashes_compares_sizes(folder: Path) -> None:
    path = folder / shard_name(folder, 1)
    path.write_bytes(path.read_bytes() + b"\0")
    size = path.stat().st_size
    with pytest.raises(DatasetError, match=rf"{path.name}: has {size:,} bytes, the manifest says {size - 1:,}"):
        Dataset.open(str(folder)).verify(hashes=False)


def test_parts_of_a_check_cover_every_file_between_them(folder: Path) -> None:
    for name in FILES:
        path = folder / name.replace("shard", shard_name(folder, 1))
        clean = path.read_bytes()
        path.write_bytes(clean[:-1] + b"?")
        failed = 0
        for part in range(3):
            try:
                Dataset.open(str(folder)).verify(part, 3)
            except DatasetError:
                failed += 1
        assert failed == 1, name
        path.write_bytes(clean)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_named(folder: Path, name: str) -> None:
    path = folder / name.replace("shard", shard_name(folder))
    path.unlink()
    dataset = Dataset.open(str(folder))
    with pytest.raises(DatasetError, match=rf"{path.name}: no such file, but the manifest lists it"):
        dataset.verify()
    with pytest.raises(DatasetError, match=rf"{path.name}: no such file"):
        dataset.read_row_group(0), dataset.items_table(), dataset.attributes_table()


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read_are_named(folder: Path, name: str) -> None:
    path = folder / name.replace("shard", shard_name(folder))
    path.unlink()
    path.mkdir()
    dataset = Dataset.open(str(folder))
    with pytest.raises(DatasetError, match=path.name):
        dataset.verify()
    with pytest.raises(DatasetError, match=rf"{path.name}: cannot be read \(.*Is a directory"):
        dataset.read_row_group(0), dataset.items_table(), dataset.attributes_table()


@pytest.mark.parametrize(("reason", "may_be_left_out"), [(errno.EIO, True), (errno.EMFILE, False)])
def test_a_bad_sector_is_damage_and_too_many_open_files_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reason: int, may_be_left_out: bool
) -> None:
    dataset = Dataset.open(str(folder), max_bad_shards=1)
    assert len(dataset.index) == 3

    def fails(*arguments: object) -> bytes:
        raise OSError(reason, "the disk says so")

    monkeypatch.setattr(Storage, "read_checked", fails)
    if may_be_left_out:
        assert len(dataset.read_row_group(0).users) == 0 and list(dataset.damaged) == [0]
    else:
        with pytest.raises(DatasetError, match=r"cannot be read .*the disk says so"):
            dataset.read_row_group(0)
        assert not dataset.damaged
