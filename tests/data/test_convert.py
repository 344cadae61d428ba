"""Converting: other files, the same dataset; the output appears whole or not at all, on local and other storage."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from s3rec_dist.__main__ import main
from s3rec_dist.config import StorageConfig
from s3rec_dist.data import convert as module
from s3rec_dist.data.convert import READ_AHEAD, ConvertError, convert
from s3rec_dist.data.dataset import Dataset, DatasetError, Sequences, new_manifest
from s3rec_dist.data.formats import SHARD_SCHEMA, content_of, sha256_of, write_shards
from s3rec_dist.data.output import OutputError
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.storage import DamagedFile, Storage, StorageError

FORMATS = ("parquet", "webdataset")
EXTENSIONS = {"parquet": ".parquet", "webdataset": ".tar"}


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Dataset]:
    """``prepared("webdataset", rows_per_group=3)``: 23 users of 3 to 25 items, some with attributes."""

    def make(format: str = "parquet", **sizes: int) -> Dataset:
        lines = (f"user{u} {' '.join(str(1 + (u * n) % 30) for n in range(1, 4 + u))}\n" for u in range(23))
        (tmp_path / "toy.txt").write_text("".join(lines))
        (tmp_path / "toy_item2attributes.json").write_text(json.dumps({str(i): [i % 4 + 1] for i in range(1, 20)}))
        folder = tmp_path / f"{format}-{'-'.join(map(str, sizes.values()))}"
        prepare(
            PrepareSettings(source="s3rec", input=str(tmp_path / "toy.txt"), output=str(folder), format=format, **sizes)
        )
        return Dataset.open(str(folder))

    return make


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of an empty folder on fsspec's storage in memory."""
    yield "memory://bucket"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/bucket"):
        filesystem.rm("/bucket", recursive=True)


def rows_of(dataset: Dataset) -> list[tuple[str, list[int]]]:
    rows = []
    for index in range(len(dataset.index)):
        group = dataset.read_row_group(index)
        assert group.first_row == len(rows)
        pieces = np.split(group.values, group.offsets[1:-1])
        rows += [(user, piece.tolist()) for user, piece in zip(group.users.to_pylist(), pieces, strict=True)]
    return rows


def second_revision(dataset: Dataset) -> Dataset:
    """The dataset with user1 and user5 replaced by user1 with other items and user99."""
    rows = rows_of(dataset)
    gone = [(place, row) for place, row in enumerate(rows) if row[0] in ("user1", "user5")]
    ends = dataset.index.first_row
    dead: dict[int, list[int]] = {}
    for place, _ in gone:
        group = int(np.searchsorted(ends, place, side="right")) - 1
        dead.setdefault(group, []).append(place - int(ends[group]))
    old = pa.RecordBatch.from_pydict({"user": [r[0] for _, r in gone], "items": [r[1] for _, r in gone]}, SHARD_SCHEMA)
    new = pa.RecordBatch.from_pydict({"user": ["user1", "user99"], "items": [[3, 2, 1, 7], [9, 9, 9]]}, SHARD_SCHEMA)
    users, lists = old.columns
    new_manifest(
        dataset.path,
        name=dataset.manifest.name,
        format=dataset.manifest.format,
        shards=write_shards([new], os.path.join(dataset.path, "v2", "shards"), 64, dataset.manifest.format),
        items=dataset.items_table(),
        attributes=dataset.attributes_table(),
        preparation=dataset.manifest.preparation,
        created_with=dataset.manifest.created_with,
        before=dataset,
        dead={group: np.array(places) for group, places in dead.items()},
        dead_content=content_of(users, lists.values.to_numpy(), lists.offsets.to_numpy().astype(np.int64)),
    )
    return Dataset.open(dataset.path)


def assert_same(new: Dataset, old: Dataset) -> None:
    assert rows_of(new) == rows_of(old)
    assert new.items_table().equals(old.items_table()) and new.attributes_table().equals(old.attributes_table())
    assert (new.manifest.content, new.manifest.catalogue) == (old.manifest.content, old.manifest.catalogue)
    assert new.manifest.name == old.manifest.name
    new.verify()


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 2), (4, 64), (23, 1), (100, 5)])
def test_rows_order_ids_and_content_stay_whatever_the_format_and_sizes(
    source: str, target: str, rows: int, groups: int, prepared: Callable[..., Dataset], tmp_path: Path
) -> None:
    old = prepared(source, rows_per_group=5, groups_per_shard=2)
    output = str(tmp_path / "new")
    manifest = convert(old, output, format=target, rows_per_group=rows, groups_per_shard=groups)
    new = Dataset.open(output)
    assert new.manifest == manifest
    assert_same(new, old)
    assert new.index.rows.tolist() == [min(rows, 23 - at) for at in range(0, 23, rows)]
    assert np.bincount(new.index.shard).max() <= groups
    assert all(shard.path.endswith(EXTENSIONS[target]) for shard in manifest.shards)


@pytest.mark.parametrize("through", FORMATS)
def test_there_and_back_gives_the_prepared_dataset_byte_for_byte(
    through: str, prepared: Callable[..., Dataset], tmp_path: Path
) -> None:
    old = prepared("parquet", rows_per_group=5, groups_per_shard=2)
    convert(old, str(tmp_path / "between"), format=through, rows_per_group=7, groups_per_shard=1)
    between = Dataset.open(str(tmp_path / "between"))
    back = convert(between, str(tmp_path / "back"), format="parquet", rows_per_group=5, groups_per_shard=2)
    assert back.fingerprint == old.fingerprint != between.fingerprint


def test_what_is_not_given_stays_as_it_is(prepared: Callable[..., Dataset], tmp_path: Path) -> None:
    old = prepared("webdataset", rows_per_group=5, groups_per_shard=2)
    convert(old, str(tmp_path / "new"))
    new = Dataset.open(str(tmp_path / "new"))
    assert new.manifest.format == "webdataset"
    assert new.index.rows.tolist() == old.index.rows.tolist() == [5, 5, 5, 5, 3]
    assert new.index.shard.tolist() == old.index.shard.tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_replaced_rows_are_left_out_and_an_earlier_revision_can_be_converted(
    format: str, prepared: Callable[..., Dataset], tmp_path: Path
) -> None:
    first = prepared(format, rows_per_group=5, groups_per_shard=2)
    before = rows_of(first)
    second = second_revision(first)
    convert(second, str(tmp_path / "new"))
    new = Dataset.open(str(tmp_path / "new"))
    assert_same(new, second)
    assert [user for user, _ in rows_of(new)] == [u for u, _ in before if u not in ("user1", "user5")] + [
        "user1",
        "user99",
    ]
    assert new.manifest.revision == 1 and not len(new.index.dead)
    old = Dataset.open(first.path, revision=1)
    convert(old, str(tmp_path / "old"))
    assert rows_of(Dataset.open(str(tmp_path / "old"))) == before


def test_files_beside_the_catalogue_go_along(prepared: Callable[..., Dataset], tmp_path: Path) -> None:
    old = prepared("parquet", rows_per_group=5, groups_per_shard=2)
    (Path(old.path) / "more.bin").write_bytes(b"more")
    manifest = dataclasses.replace(
        old.manifest, files={**old.manifest.files, "more.bin": sha256_of(f"{old.path}/more.bin")}
    )
    convert(Dataset(old.path, manifest), str(tmp_path / "new"), format="webdataset")
    new = Dataset.open(str(tmp_path / "new"))
    assert_same(new, old)
    assert (tmp_path / "new" / "more.bin").read_bytes() == b"more"
    (Path(old.path) / "more.bin").write_bytes(b"less")
    with pytest.raises(DamagedFile, match=r"more\.bin: SHA-256 is .*, its manifest says"):
        convert(Dataset(old.path, manifest), str(tmp_path / "other"))


def test_at_most_some_row_groups_are_held_at_a_time(
    prepared: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = prepared("parquet", rows_per_group=1, groups_per_shard=64)
    read: list[int] = []
    ahead: list[int] = []

    def noted(index: int, with_users: bool = True) -> Sequences:
        read.append(index)
        return Dataset.read_row_group(old, index, with_users)

    def used(groups: Iterable[Sequences], rows: int) -> Iterator[pa.RecordBatch]:
        for number, batch in enumerate(module_regrouped(groups, rows)):
            ahead.append(len(read) - number)
            yield batch

    module_regrouped = module.regrouped
    monkeypatch.setattr(old, "read_row_group", noted)
    monkeypatch.setattr(module, "regrouped", used)
    convert(old, str(tmp_path / "new"))
    assert sorted(read) == list(range(23))
    assert 1 < max(ahead) <= READ_AHEAD


def test_a_damaged_source_is_named_and_leaves_nothing_behind(prepared: Callable[..., Dataset], tmp_path: Path) -> None:
    old = prepared("parquet", rows_per_group=5, groups_per_shard=2)
    shard = Path(old.path) / old.manifest.shards[1].path
    data = bytearray(shard.read_bytes())
    data[int(old.index.offset[2]) + 5] ^= 1
    shard.write_bytes(data)
    there = sorted(os.listdir(tmp_path))
    with pytest.raises(DatasetError, match=r"shards/00001\.parquet: row group 0: .* another SHA-256"):
        convert(old, str(tmp_path / "new"))
    assert sorted(os.listdir(tmp_path)) == there


def test_a_result_that_differs_is_an_error_and_is_not_written(
    prepared: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = prepared("parquet", rows_per_group=5, groups_per_shard=2)
    lying = Dataset(old.path, dataclasses.replace(old.manifest, content="0" * 64))
    with pytest.raises(ConvertError, match="says something else than this one"):
        convert(lying, str(tmp_path / "new"))

    def turned(groups: Iterable[Sequences], rows: int) -> Iterator[pa.RecordBatch]:
        for batch in regrouped(groups, rows):
            yield batch.take(pa.array(range(batch.num_rows)[::-1]))  # the same rows: only their order differs

    regrouped = module.regrouped
    monkeypatch.setattr(module, "regrouped", turned)
    with pytest.raises(ConvertError, match="says something else than this one"):
        convert(old, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_an_output_that_exists_is_replaced_only_on_request_and_only_a_dataset(
    prepared: Callable[..., Dataset], tmp_path: Path
) -> None:
    old = prepared("parquet", rows_per_group=5, groups_per_shard=2)
    with pytest.raises(OutputError, match="exists already; choose another output, or pass --overwrite"):
        convert(old, old.path)
    convert(old, old.path, rows_per_group=2, overwrite=True)
    assert Dataset.open(old.path).index.rows.max() == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("notes")
    with pytest.raises(OutputError, match="not a dataset, so --overwrite leaves it alone"):
        convert(Dataset.open(old.path), str(tmp_path / "mine"), overwrite=True)
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]
    (Path(old.path) / "pretrain").mkdir()  # as output=DATASET makes
    with pytest.raises(OutputError, match="holds pretrain too, which --overwrite would remove with the dataset"):
        convert(Dataset.open(old.path), old.path, overwrite=True)
    assert (Path(old.path) / "pretrain").is_dir()


@pytest.mark.parametrize("sizes", [{"rows_per_group": -1}, {"groups_per_shard": -2}])
def test_sizes_below_one_are_refused(sizes: dict[str, int], prepared: Callable[..., Dataset], tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="expected at least 1"):
        convert(prepared(), str(tmp_path / "new"), **sizes)


@pytest.mark.parametrize("format", FORMATS)
def test_to_remote_storage_and_back(format: str, prepared: Callable[..., Dataset], tmp_path: Path, memory: str) -> None:
    storage = Storage(StorageConfig(scratch_dir=str(tmp_path / "scratch")))
    old = prepared("parquet", rows_per_group=5, groups_per_shard=2)
    convert(old, f"{memory}/there", format=format, rows_per_group=3, storage=storage)
    assert os.listdir(tmp_path / "scratch") == []
    there = Dataset.open(f"{memory}/there")
    assert_same(there, old)
    back = convert(there, str(tmp_path / "back"), format="parquet", rows_per_group=5)
    assert back.fingerprint == old.fingerprint


def test_remote_output_is_replaced_only_on_request_and_what_lies_beside_it_stays(
    prepared: Callable[..., Dataset], memory: str
) -> None:
    old = prepared("parquet", rows_per_group=5, groups_per_shard=1)
    storage = Storage()
    storage.write(f"{memory}/notes.txt", b"notes")
    with pytest.raises(OutputError, match="memory://bucket: exists already"):
        convert(old, memory)
    with pytest.raises(OutputError, match="not a dataset, so --overwrite leaves it alone"):
        convert(old, memory, overwrite=True)
    storage.write(f"{memory}/events/2024.parquet", b"events")
    with pytest.raises(OutputError, match="not a dataset, so --overwrite leaves it alone"):
        convert(old, f"{memory}/events", overwrite=True)
    convert(old, f"{memory}/data")
    storage.write(f"{memory}/data/notes.txt", b"notes")
    convert(old, f"{memory}/data", format="webdataset", groups_per_shard=4, overwrite=True)
    new, *rest = storage.names(f"{memory}/data")
    assert storage.names(f"{memory}/data/{new}/shards") == ["00000.tar", "00001.tar"]
    assert rest == ["manifest.json", "notes.txt"]
    assert storage.read(f"{memory}/data/notes.txt") == storage.read(f"{memory}/notes.txt") == b"notes"
    assert_same(Dataset.open(f"{memory}/data"), old)


def test_an_upload_that_was_killed_can_be_replaced(prepared: Callable[..., Dataset], memory: str) -> None:
    old = prepared()
    convert(old, f"{memory}/data")
    Storage().remove(f"{memory}/data/manifest.json")
    with pytest.raises(OutputError, match="exists already"):
        convert(old, f"{memory}/data")
    convert(old, f"{memory}/data", overwrite=True)
    assert_same(Dataset.open(f"{memory}/data"), old)


def test_an_upload_that_fails_leaves_nothing_and_what_it_would_replace(
    prepared: Callable[..., Dataset], memory: str
) -> None:
    class Failing(Storage):
        def upload(self, path: str, url: str) -> None:
            if url.endswith("items.parquet"):
                raise StorageError(f"{url}: failed")
            super().upload(path, url)

    old = prepared()
    with pytest.raises(StorageError, match=r"items\.parquet: failed"):
        convert(old, f"{memory}/data", storage=Failing())
    assert Storage().names(f"{memory}/data/shards") == Storage().names(f"{memory}/data") == []

    convert(old, f"{memory}/data")
    before = Storage().names(f"{memory}/data")
    with pytest.raises(StorageError, match=r"items\.parquet: failed"):
        convert(old, f"{memory}/data", format="webdataset", overwrite=True, storage=Failing())
    assert Storage().names(f"{memory}/data") == before
    assert_same(Dataset.open(f"{memory}/data"), old)


def test_the_command_says_what_it_wrote(
    prepared: Callable[..., Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = prepared("parquet", rows_per_group=5, groups_per_shard=2)
    output = str(tmp_path / "new")
    arguments: list[Any] = ["convert", old.path, "--output", output, "--format", "webdataset", "--rows_per_group", "4"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{output}: 23 users in 3 webdataset shards (")
    assert f"content {old.manifest.content[:12]} as before" in captured.out
    assert "reading it back" in captured.err
    assert_same(Dataset.open(output), old)
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"s3rec: error: {output}: exists already; " + (
        "choose another output, or pass --overwrite to replace it\n"
    )
