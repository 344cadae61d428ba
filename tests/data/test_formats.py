"""Shards: both formats hold the same rows, other programs read them, and nothing but plain rows is ever decoded.

Where a shard is of other making, index and manifest vouch for its bytes, so that only its contents give it away.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import (
    EXTENSIONS,
    FORMATS,
    arrow_of,
    change_manifest,
    parquet_of,
    parquet_ranges,
    random_groups,
    replace_shard,
    replace_table,
    rows_of,
    shard_batch,
    tar_of,
    tar_ranges,
    write,
)
from hypothesis import given
from hypothesis import strategies as st

from s3rec_dist.data.dataset import Dataset, DatasetError
from s3rec_dist.data.formats import (
    SHARD_SCHEMA,
    Format,
    FormatError,
    _thrift,
    add_contents,
    content_of,
    decode_arrow,
    decode_parquet,
    length_counts,
    parse_parquet_tail,
    put_in_place,
    read_parquet_table,
    sha256_of,
    write_shards,
)

HISTORIES = [[1, 2, 3, 2], [4, 1, 5], [5, 4, 3, 2, 1], [2, 2, 2], [3, 1, 4, 5, 2, 1, 3]]
GROUPS = [HISTORIES[:2], HISTORIES[2:4], HISTORIES[4:]]


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> Format:
    return request.param


def shard_of(format: Format, *batches: pa.RecordBatch) -> bytes:
    """A shard with a row group for each batch, of whatever schema, written by pyarrow."""
    if format == "webdataset":
        return tar_of(arrow_of(batch) for batch in batches)
    file = io.BytesIO()
    with pq.ParquetWriter(file, batches[0].schema, use_dictionary=False, store_schema=False) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return file.getvalue()


def batch(rows: Any, kinds: Any = SHARD_SCHEMA) -> pa.RecordBatch:
    schema = kinds if isinstance(kinds, pa.Schema) else pa.schema(kinds)
    return pa.record_batch([pa.array(rows[name], schema.field(name).type) for name in schema.names], schema=schema)


def refused(folder: Path, message: str, group: int = 0) -> None:
    with pytest.raises(DatasetError, match=message):
        Dataset.open(str(folder)).read_row_group(group)


# What is written.


def test_shards_are_cut_where_told_and_list_their_row_groups(tmp_path: Path, format: Format) -> None:
    batches = [shard_batch([[1] * (row + 3)], row) for row in range(5)]
    shards = write_shards(iter(batches), str(tmp_path), 2, format, prefix="x")
    end = EXTENSIONS[format]
    assert [(s.name, s.rows) for s in shards] == [(f"x00000.{end}", 2), (f"x00001.{end}", 2), (f"x00002.{end}", 1)]
    counts = [[(group.rows, group.lengths.tolist(), group.counts.tolist()) for group in s.groups] for s in shards]
    assert counts == [[(1, [3], [1]), (1, [4], [1])], [(1, [5], [1]), (1, [6], [1])], [(1, [7], [1])]]


def test_places_sizes_and_hashes_are_those_of_the_bytes_on_disk(tmp_path: Path, format: Format) -> None:
    shards = write_shards([shard_batch(rows) for rows in random_groups()], str(tmp_path), 3, format)
    for shard in shards:
        data = (tmp_path / shard.name).read_bytes()
        assert shard.size == len(data) and shard.sha256 == sha256_of(str(tmp_path / shard.name))
        ranges = [(group.offset, group.size) for group in shard.groups]
        assert ranges == (parquet_ranges(data) if format == "parquet" else tar_ranges(data))
        for group in shard.groups:
            assert group.sha256 == hashlib.sha256(data[group.offset : group.offset + group.size]).digest()
        assert shard.tail_sha256 == hashlib.sha256(data[sum(ranges[-1]) :]).hexdigest()


def test_equal_rows_give_equal_bytes(tmp_path: Path, format: Format) -> None:
    written = [
        write_shards([shard_batch(rows) for rows in random_groups()], str(tmp_path / name), 3, format) for name in "ab"
    ]
    assert [shard.sha256 for shard in written[0]] == [shard.sha256 for shard in written[1]]


def test_a_slice_is_written_as_what_it_shows(tmp_path: Path, format: Format) -> None:
    whole = shard_batch(HISTORIES)
    for name, part in (("slice", whole.slice(1, 3)), ("own", shard_batch(HISTORIES[1:4], 1))):
        write_shards([part], str(tmp_path / name), 1, format)
    paths = [tmp_path / name / f"00000.{EXTENSIONS[format]}" for name in ("slice", "own")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_batches_without_rows_are_left_out(tmp_path: Path, format: Format) -> None:
    dataset = write(tmp_path, [[], HISTORIES[:1], [], HISTORIES[1:], []], format, groups_per_shard=1)
    assert dataset.index.rows.tolist() == [1, 4] and [items for _, items in rows_of(dataset)] == HISTORIES


def test_a_writer_that_fails_leaves_no_open_file(tmp_path: Path, format: Format) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield shard_batch(HISTORIES)
        raise RuntimeError("no more")

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match="no more"):
        write_shards(batches(), str(tmp_path), 2, format)
    assert len(os.listdir("/proc/self/fd")) == before


def test_length_counts_ascend() -> None:
    for offsets, expected in (([0, 5, 8, 13, 16], ([3, 5], [2, 2])), ([0], ([], []))):
        found = length_counts(np.array(offsets))
        assert tuple(part.tolist() for part in found) == expected
        assert {part.dtype for part in found} == {np.dtype(np.int32)}


def test_names_and_histories_of_any_length_come_back(tmp_path: Path, format: Format) -> None:
    rows = {"user": ["", "ü" * 5000, "a\x00b", "😀"], "items": [[1], [], list(range(1, 70_000)), [2, 1]]}
    shards = write_shards([batch(rows)], str(tmp_path / "shards"), 1, format)
    assert shards[0].groups[0].lengths.tolist() == [0, 1, 2, 69_999]
    dataset = write(tmp_path, [rows["items"]], format)
    (tmp_path / "again").mkdir()
    write_shards([batch(rows)], str(tmp_path / "again"), 1, format)
    replace_shard(tmp_path, (tmp_path / f"again/00000.{EXTENSIONS[format]}").read_bytes())
    assert rows_of(Dataset.open(dataset.path)) == list(zip(rows["user"], rows["items"], strict=True))


# Hash of the rows.

ROWS = st.lists(st.tuples(st.text(max_size=4), st.lists(st.integers(1, 2**31 - 1), max_size=4)), max_size=6)


def content(rows: list[tuple[str, list[int]]]) -> tuple[int, int]:
    users = pa.array([user for user, _ in rows], pa.string())
    offsets = np.cumsum([0, *(len(items) for _, items in rows)])
    return content_of(users, np.array([i for _, items in rows for i in items], np.int32), offsets)


@given(rows=ROWS, cut=st.integers(0, 6), seed=st.randoms())
def test_content_does_not_depend_on_order_and_cuts(rows: list[tuple[str, list[int]]], cut: int, seed: Any) -> None:
    other = list(rows)
    seed.shuffle(other)
    assert content(rows) == add_contents([content(other[:cut]), content(other[cut:])])


@given(first=ROWS, second=ROWS)
def test_other_rows_have_another_content(
    first: list[tuple[str, list[int]]], second: list[tuple[str, list[int]]]
) -> None:
    assert (content(first) == content(second)) == (sorted(first) == sorted(second))


def test_content_tells_apart_what_looks_alike() -> None:
    alike = [
        [("ab", [1, 2])],
        [("ab", [2, 1])],
        [("a", [1, 2])],
        [("ab", [1, 2, 0])],
        [("ab", [1]), ("", [2])],
        [("ab", []), ("", [1, 2])],
        [("a", [1, 2]), ("b", [])],
        [("ab", [1, 2]), ("ab", [1, 2])],
        [],
    ]
    assert len({content(rows) for rows in alike}) == len(alike)


def test_content_reads_slices_and_does_not_change_its_input() -> None:
    users = pa.array(["x", "ab", "c"]).slice(1)
    values = np.array([1, 2, 3], np.int32)
    values.flags.writeable = False
    assert content_of(users, values, np.array([0, 2, 3])) == content([("ab", [1, 2]), ("c", [3])])


# Read by others.


def test_the_webdataset_library_reads_the_tars_and_pyarrow_their_members(tmp_path: Path) -> None:
    import webdataset

    groups = random_groups(5)
    dataset = write(tmp_path, groups, "webdataset")
    urls = [str(tmp_path / shard.path) for shard in dataset.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [
        f"{n:05d}-{i:05d}" for n, i in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))
    ]
    read = []
    for sample in samples:
        with pa.ipc.open_stream(sample["arrow"]) as stream:
            assert stream.schema == SHARD_SCHEMA
            read += stream.read_all().to_pylist()
    assert [(row["user"], row["items"]) for row in read] == rows_of(dataset)


def test_tar_members_are_plain_files_of_nobody(tmp_path: Path) -> None:
    write(tmp_path, GROUPS, "webdataset")
    with tarfile.open(tmp_path / "shards/00000.tar") as tar:
        for member in tar.getmembers():
            assert member.isreg() and not member.pax_headers
            assert (member.uname, member.gname, member.uid, member.gid, member.mtime) == ("", "", 0, 0, 0)


def test_any_parquet_reader_reads_the_shards(tmp_path: Path) -> None:
    dataset = write(tmp_path, random_groups(), "parquet")
    table = pq.read_table(tmp_path / "shards")
    assert list(zip(table["user"].to_pylist(), table["items"].to_pylist(), strict=True)) == rows_of(dataset)
    footer = pq.read_metadata(tmp_path / "shards/00000.parquet")
    assert footer.metadata is None and footer.row_group(0).column(0).statistics is None


# What is refused, with its bytes vouched for.


def test_a_shard_by_another_writer_is_read_where_it_holds_plain_rows(tmp_path: Path, format: Format) -> None:
    write(tmp_path, GROUPS, format)
    replace_shard(tmp_path, shard_of(format, shard_batch(GROUPS[0]), shard_batch(GROUPS[1], 2)))
    dataset = Dataset.open(str(tmp_path))
    dataset.verify()
    assert [items for _, items in rows_of(dataset)] == HISTORIES


@pytest.mark.parametrize("item", [0, -3, 6, 7])
def test_ids_out_of_range_name_shard_and_row(tmp_path: Path, format: Format, item: int) -> None:
    write(tmp_path, GROUPS, format)
    replace_shard(tmp_path, shard_of(format, shard_batch(GROUPS[0]), shard_batch([GROUPS[1][0], [2, item, 2]], 2)))
    dataset = Dataset.open(str(tmp_path))
    dataset.verify()
    dataset.read_row_group(0)
    refused(tmp_path, rf"00000\.{EXTENSIONS[format]}: row group 1: row 3 holds item id {item}, expected 1\.\.5", 1)


def test_other_lengths_than_the_index_says_are_refused(tmp_path: Path, format: Format) -> None:
    write(tmp_path, GROUPS, format)
    swapped = shard_batch([[1, 2, 3], [4, 1, 5, 1]])
    replace_shard(tmp_path, shard_of(format, swapped, shard_batch([[5, 4, 3, 2], [2, 2, 2]], 2)))
    dataset = Dataset.open(str(tmp_path))
    dataset.read_row_group(0)  # the same lengths in another order are the same to the order of an epoch
    refused(tmp_path, "row group 1: sequence lengths differ from the index's", 1)


@pytest.mark.parametrize("rows", [1, 3])
def test_other_rows_than_the_index_says_are_refused(tmp_path: Path, format: Format, rows: int) -> None:
    write(tmp_path, GROUPS, format)
    replace_shard(tmp_path, shard_of(format, shard_batch([[1, 2, 3, 2]] * rows), shard_batch(GROUPS[1], 2)))
    refused(tmp_path, rf"00000\.{EXTENSIONS[format]}: .*differ from the index's")


def test_row_groups_that_are_not_there_are_refused(tmp_path: Path) -> None:
    write(tmp_path, GROUPS, "parquet")
    data = shard_of("parquet", shard_batch(HISTORIES[:4]))
    replace_shard(tmp_path, data, parquet_ranges(data) * 2)
    refused(tmp_path, r"00000\.parquet: the rows of its row groups differ from the index's", 1)


OTHER_SCHEMAS: dict[str, dict[str, pa.DataType]] = {
    "large items": {"user": pa.string(), "items": pa.list_(pa.int64())},
    "unsigned items": {"user": pa.string(), "items": pa.list_(pa.uint32())},
    "real items": {"user": pa.string(), "items": pa.list_(pa.float32())},
    "binary users": {"user": pa.binary(), "items": pa.list_(pa.int32())},
    "users by number": {"user": pa.int32(), "items": pa.list_(pa.int32())},
    "other order": {"items": pa.list_(pa.int32()), "user": pa.string()},
    "one column more": {"user": pa.string(), "items": pa.list_(pa.int32()), "extra": pa.int8()},
    "one column less": {"items": pa.list_(pa.int32())},
    "other name": {"user": pa.string(), "item": pa.list_(pa.int32())},
}
ARROW_SCHEMAS: dict[str, dict[str, pa.DataType]] = {
    "large strings": {"user": pa.large_string(), "items": pa.list_(pa.int32())},
    "large lists": {"user": pa.string(), "items": pa.large_list(pa.int32())},
    "string views": {"user": pa.string_view(), "items": pa.list_(pa.int32())},
    "fixed lists": {"user": pa.string(), "items": pa.list_(pa.int32(), 3)},
}


@pytest.mark.parametrize(
    ("format", "kinds"),
    [
        pytest.param(format, kinds, id=f"{format}-{name}")
        for format in FORMATS
        for name, kinds in {**OTHER_SCHEMAS, **(ARROW_SCHEMAS if format == "webdataset" else {})}.items()
    ],
)
def test_only_the_plain_schema_is_read(tmp_path: Path, format: Format, kinds: dict[str, pa.DataType]) -> None:
    write(tmp_path, [[[1, 1, 1]]], format)
    user = 1 if kinds.get("user") == pa.int32() else "a"
    values = {"user": [user], "items": [[1, 1, 1]], "item": [[1, 1, 1]], "extra": [1]}
    replace_shard(tmp_path, shard_of(format, batch(values, kinds.items())))
    refused(tmp_path, r"expected columns user: string, items: list<.*int32>; found")


@pytest.mark.parametrize(
    "rows",
    [
        {"user": ["a", None], "items": [[1, 2, 3, 2], [4, 1, 5]]},
        {"user": ["a", "b"], "items": [[1, 2, 3, None], [4, 1, 5]]},
        {"user": ["a", "b"], "items": [[1, 2, 3, 2], None]},
    ],
)
def test_nulls_are_refused(tmp_path: Path, format: Format, rows: dict[str, Any]) -> None:
    write(tmp_path, GROUPS, format)
    replace_shard(tmp_path, shard_of(format, batch(rows), shard_batch(GROUPS[1], 2)))
    refused(tmp_path, r"row group 0: holds nulls")


def test_users_that_are_not_utf8_are_refused(tmp_path: Path, format: Format) -> None:
    users = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    )
    write(tmp_path, GROUPS, format)
    bad = pa.record_batch([users, shard_batch(GROUPS[0])["items"]], schema=SHARD_SCHEMA)
    replace_shard(tmp_path, shard_of(format, bad, shard_batch(GROUPS[1], 2)))
    refused(tmp_path, "row group 0: .*Invalid UTF8")


class Trap(pa.ExtensionType):
    """An extension type as another library of the process may have registered: decoding a schema runs its code."""

    sprung = 0

    def __init__(self, storage: pa.DataType) -> None:
        super().__init__(storage, "tests.trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"pickle"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Trap:
        cls.sprung += 1
        return cls(storage)


@pytest.fixture
def trap() -> Iterator[type[Trap]]:
    pa.register_extension_type(Trap(pa.string()))
    yield Trap
    pa.unregister_extension_type("tests.trap")


@pytest.mark.parametrize("where", ["user", "items", "elements"])
def test_no_extension_type_is_decoded(tmp_path: Path, format: Format, where: str, trap: type[Trap]) -> None:
    """Such as Ray's, which ran code from Parquet metadata (GHSA-mw35-8rx3-xf9r)."""
    write(tmp_path, GROUPS, format)
    plain = shard_batch(GROUPS[0])
    columns = {"user": plain["user"], "items": plain["items"]}
    if where == "elements":
        elements = pa.ExtensionArray.from_storage(trap(pa.int32()), plain["items"].values)
        columns["items"] = pa.ListArray.from_arrays(plain["items"].offsets, elements)
    else:
        columns[where] = pa.ExtensionArray.from_storage(trap(columns[where].type), columns[where])
    table = pa.table(columns)
    if format == "parquet":
        data = parquet_of(table, store_schema=True)
        ranges = parquet_ranges(data) * 2
    else:
        data = tar_of([arrow_of(*table.to_batches())] * 2)
        ranges = tar_ranges(data)
    replace_shard(tmp_path, data, ranges)
    trap.sprung = 0
    reason = "carries an Arrow schema of its own" if format == "parquet" else "has extension types"
    refused(tmp_path, f"{reason}, which files of a dataset never do")
    assert trap.sprung == 0
    assert pa.ipc.open_stream(arrow_of(*table.to_batches())).schema and trap.sprung  # the trap works


@pytest.mark.parametrize("name", ["index.parquet", "items.parquet", "attributes.parquet"])
def test_no_extension_type_is_decoded_from_index_and_catalogue(tmp_path: Path, name: str, trap: type[Trap]) -> None:
    dataset = write(tmp_path, GROUPS)
    table = pq.read_table(tmp_path / name)
    column = table.column(0).combine_chunks()
    table = table.set_column(0, table.column_names[0], pa.ExtensionArray.from_storage(trap(column.type), column))
    data = parquet_of(table, store_schema=True)
    (tmp_path / name).write_bytes(data)
    change_manifest(tmp_path, files={**dataset.manifest.files, name: hashlib.sha256(data).hexdigest()})
    trap.sprung = 0
    dataset = Dataset.open(dataset.path)
    dataset.verify()
    with pytest.raises(DatasetError, match=rf"{name}: carries an Arrow schema of its own"):
        assert dataset.index and dataset.items_table() and dataset.attributes_table()
    assert trap.sprung == 0


def hostile_members() -> dict[str, tuple[bytes, str]]:
    """Contents of a member, and why they are refused."""
    one = shard_batch(GROUPS[0])
    stream = arrow_of(one)
    dictionary = pa.schema([("user", pa.dictionary(pa.int8(), pa.string())), SHARD_SCHEMA.field("items")])
    encoded = pa.record_batch([one["user"].dictionary_encode().cast(dictionary[0].type), one["items"]], dictionary)
    schema_size = pa.ipc.MessageReader.open_stream(stream).read_next_message().serialize().size
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, SHARD_SCHEMA) as file:
        file.write_batch(one)
    return {
        "several batches": (arrow_of(one, one), "expected one record batch; a record batch follows it"),
        "no batch": (stream[:schema_size] + b"\xff\xff\xff\xff\0\0\0\0", "the Arrow stream ends early"),
        "only a batch": (stream[schema_size:], "the Arrow stream ends early"),
        "a dictionary": (arrow_of(encoded), "expected a schema and a record batch, found schema and dictionary"),
        "compressed with zstd": (arrow_of(one, compression="zstd"), "is compressed; expected a plain record batch"),
        "compressed with lz4": (arrow_of(one, compression="lz4"), "is compressed; expected a plain record batch"),
        "an Arrow file": (sink.getvalue(), r"expected a batch of|expected a schema"),
        "nothing": (b"", "the Arrow stream ends early"),
        "zeros": (bytes(4096), "the Arrow stream ends early"),
        "text": (b"hello, world. " * 30, "expected a batch of user: string, items: list"),
        "a Parquet file": (parquet_of(pa.Table.from_batches([one])), "expected a batch of user: string, items: list"),
        "a pickle": (pickle.dumps(Bomb("pickle")), "expected a batch of user: string, items: list"),
    }


class Bomb:
    """What unpickling it does is noticed."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ.get("S3REC_TEST_BOMB", "/nonexistent/bomb"),))


@pytest.mark.parametrize("kind", hostile_members())
def test_a_member_is_one_plain_batch_or_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3REC_TEST_BOMB", str(tmp_path / "bomb"))
    write(tmp_path / "data", GROUPS, "webdataset")
    content, message = hostile_members()[kind]
    suffix = "pkl" if kind == "a pickle" else "arrow"
    replace_shard(tmp_path / "data", tar_of([content, arrow_of(shard_batch(GROUPS[1], 2))], suffix))
    refused(tmp_path / "data", rf"00000\.tar: row group 0: {message}")
    assert not (tmp_path / "bomb").exists()


def test_a_cut_stream_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    write(tmp_path, GROUPS, "webdataset")
    stream = arrow_of(shard_batch(GROUPS[0]))
    for size in range(0, len(stream) - 8, 7):  # the last eight bytes only say that this is the end
        replace_shard(tmp_path, tar_of([stream[:size], arrow_of(shard_batch(GROUPS[1], 2))]))
        refused(tmp_path, r"00000\.tar: row group 0: ")


# What expands.


def limited(script: str, *arguments: str) -> tuple[str, int]:
    """Output of a process that may hold 3 GiB of address space, and its peak resident memory in MiB."""
    prelude = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
    ending = "\nprint(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    done = subprocess.run(
        [sys.executable, "-c", prelude + script + ending, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *lines, peak = done.stdout.splitlines()
    return "\n".join(lines), int(peak) >> 10


READ = """
from s3rec_dist.data.dataset import Dataset, DatasetError
try:
    Dataset.open(sys.argv[1]).read_row_group(0)
except DatasetError as error:
    print(error)
"""


def varint(value: int) -> bytes:
    """A Thrift compact integer, zigzag."""
    value = value << 1 ^ value >> 63
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def page_header(expanded: int, compressed: int, values: int, checksum: int) -> bytes:
    """A Parquet page header: a data page of plain values."""
    signed = checksum - (1 << 32) if checksum >> 31 else checksum
    fields = b"".join(b"\x15" + varint(value) for value in (0, expanded, compressed, signed))
    inner = b"".join(b"\x15" + varint(value) for value in (values, 0, 3, 3))
    return fields + b"\x1c" + inner + b"\0\0"


def with_zstd_bomb(expanded: int) -> bytes:
    """A shard of our own whose one page of items is replaced by one that says it expands to ``expanded`` bytes of
    zeros, and does; the footer tells nothing of it."""
    items = np.random.default_rng(0).integers(1, 2**31 - 1, 100_000, dtype=np.int32)
    plain = pa.record_batch([["a"], pa.ListArray.from_arrays([0, len(items)], items)], schema=SHARD_SCHEMA)
    data = bytearray(parquet_of(pa.Table.from_batches([plain]), data_page_size=1 << 30))
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(1)
    start, size = column.data_page_offset, column.total_compressed_size
    frame = pa.Codec("zstd").compress(bytes(32 << 20), asbytes=True)
    body = frame * (expanded // (32 << 20))
    header = len(page_header(expanded, size, column.num_values, 1 << 30))
    while True:  # the header's own length depends on what it says
        padding = size - header - len(body) - 8
        skipped = body + b"\x50\x2a\x4d\x18" + padding.to_bytes(4, "little") + bytes(padding)  # a skippable frame
        page = page_header(expanded, len(skipped), column.num_values, zlib.crc32(skipped))
        if len(page) == header:
            break
        header = len(page)
    data[start : start + size] = page + skipped
    return bytes(data)


def list_of(values: pa.Array) -> pa.Table:
    return pa.table({"user": ["a"], "items": pa.ListArray.from_arrays([0, len(values)], values)}, schema=SHARD_SCHEMA)


def named(*users: str) -> pa.Table:
    return pa.table({"user": users, "items": [[1, 1, 1]] * len(users)}, SHARD_SCHEMA)


def repeated_name() -> pa.Table:
    """Four gigabytes of names, all the same."""
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4096, np.int8)), ["x" * (1 << 20)])
    return pa.table({"user": names, "items": pa.array([[1, 1, 1]] * 4096, SHARD_SCHEMA.field("items").type)})


def encoded(**encoding: str) -> bytes:
    return parquet_of(list_of(pa.array(np.zeros(3_000_000, np.int32))), column_encoding=encoding)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a page of which the footer does not tell": (lambda: with_zstd_bomb(60 << 25), r"expand to 2,01[0-9,]+, expected"),
    "zeros": (lambda: parquet_of(list_of(pa.array(np.zeros(30_000_000, np.int32)))), r"expected [0-9,]+ at most"),
    "nulls": (lambda: parquet_of(list_of(pa.nulls(12_000_000, pa.int32()))), r"expected [0-9,]+ at most"),
    "a name": (lambda: parquet_of(named("x" * (80 << 20))), "expand to 83,886,[0-9]+, expected"),
    "a name that is repeated": (lambda: parquet_of(repeated_name(), use_dictionary=["user"]), "has dictionaries"),
    "delta encoding": (lambda: encoded(**{"items.list.element": "DELTA_BINARY_PACKED"}), "unexpected pages"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_row_group_that_expands_beyond_what_the_index_announces_is_refused_before_it_does(
    tmp_path: Path, kind: str
) -> None:
    make, message = BOMBS[kind]
    write(tmp_path, [[[1, 1, 1]] * (4096 if kind == "a name that is repeated" else 1)])
    data = make()
    assert len(data) < 1 << 20
    replace_shard(tmp_path, data)
    said, peak = limited(READ, str(tmp_path))
    assert re.search(rf"shards/00000\.parquet: .*{message}", said)
    assert peak < 200


def test_a_catalogue_that_expands_far_beyond_its_bytes_is_refused_before_it_does(tmp_path: Path) -> None:
    dataset = write(tmp_path, [[[1, 1, 1]]])
    items = dataset.items_table()
    names = pa.array(["x" * (300 << 20), *items.column("raw").to_pylist()[1:]])
    replace_table(tmp_path, "items.parquet", items.set_column(1, "raw", names))
    assert (tmp_path / "items.parquet").stat().st_size < 1 << 20
    said, peak = limited(READ.replace("read_row_group(0)", "items_table()"), str(tmp_path))
    assert re.search(r"items\.parquet: its [0-9,]+ bytes expand to 314,5[0-9,]+, expected", said)
    assert peak < 200


def test_much_of_the_same_is_no_bomb_where_the_index_announces_it(tmp_path: Path) -> None:
    dataset = write(tmp_path, [[[1] * 6_000_000]])
    assert dataset.index.size[0] < 10_000
    assert len(dataset.read_row_group(0).values) == 6_000_000


def test_a_footer_that_announces_other_values_than_the_pages_hold_is_refused(tmp_path: Path) -> None:
    """Memory is set aside by the footer's count."""
    write(tmp_path, [[[1 + i % 5 for i in range(300)]]])
    data = bytearray((tmp_path / "shards/00000.parquet").read_bytes())
    count = b"\x16" + varint(300) + b"\x16"  # num_values, then the next field
    at = data.index(count, sum(parquet_ranges(data)[0]))
    data[at : at + len(count)] = b"\x16" + varint(8191) + b"\x16"
    assert pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(1).num_values == 8191
    replace_shard(tmp_path, bytes(data))
    refused(tmp_path, "unexpected pages .*page headers and footer disagree")


def spoilt(data: bytes, random: Random) -> bytes:
    """``data`` with a few other bytes, or cut off."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 4])):
        at = random.randrange(len(changed))
        if random.random() < 0.1:
            del changed[at + 1 :]
        else:
            changed[at] = random.randrange(256)
    return bytes(changed)


def test_whatever_bytes_are_vouched_for_end_in_an_error_or_are_rows() -> None:
    """No other exception, no crash: page checksums, which would notice most of it, are absent."""
    random = Random(0)
    one = shard_batch(random_groups(1, rows=30)[0])
    stream = arrow_of(one)
    data = parquet_of(pa.Table.from_batches([one]), write_page_checksum=False)
    ((offset, size),) = parquet_ranges(data)
    body, tail = data[offset : offset + size], data[offset + size :]
    whole = parse_parquet_tail(tail, "x")
    kinds: dict[str, Callable[[], Any]] = {
        "stream": lambda: decode_arrow(spoilt(stream, random), "x"),
        "pages": lambda: decode_parquet(spoilt(body, random), offset, whole, 0, ["user", "items"], 500, "x"),
        "footer": lambda: decode_parquet(
            body, offset, parse_parquet_tail(spoilt(tail, random), "x"), 0, ["user", "items"], 500, "x"
        ),
        "table": lambda: read_parquet_table(spoilt(data, random), SHARD_SCHEMA, "x"),
    }
    for decode in kinds.values():
        errors = 0
        for _ in range(500):
            try:
                decode()
            except FormatError:
                errors += 1
        assert 0 < errors < 500


def test_page_headers_are_read_as_the_writer_means_them() -> None:
    text = page_header(1 << 31, 77, 300, 0xFFFFFFFE)
    expected = {1: 0, 2: 1 << 31, 3: 77, 4: -2, 5: {1: 300, 2: 0, 3: 3, 4: 3}}
    assert _thrift(b"??" + text + b"rest", 2, 12) == (expected, 2 + len(text))
    with pytest.raises(ValueError, match="field 2 comes twice"):
        _thrift(b"\x15\x00\x15\x02\x05\x04\x04\x00", 0, 12)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_interrupted_replacement_leaves_the_old_folder_or_the_new_one_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    for name in ("new", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    rename, done = os.rename, 0

    def interrupted(source: str, target: str) -> None:
        nonlocal done
        if done < renames:
            rename(source, target)
        done += 1
        if done == max(renames, 1):
            raise KeyboardInterrupt
        if done > renames:
            rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(str(tmp_path / "new"), str(tmp_path / "place"), str(tmp_path / "replaced"))
    assert (tmp_path / "place" / "which").read_text() == ("new" if renames == 2 else "place")
