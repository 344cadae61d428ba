"""Reading and writing one shard. A shard holds whole row groups; every format gives the same Arrow table.

``SHARD_SCHEMA`` is all a shard may hold: ``user: string``, ``items: list<int32>``, a row per user, its
whole history in time order.

    parquet      a row group is a Parquet row group; pages carry checksums
    webdataset   a plain tar, which the webdataset library reads; a row group is the member SHARD-GROUP.arrow,
                 an Arrow IPC stream of one batch

Either way a row group is one range of bytes, of which the dataset's index has place and SHA-256. Nothing else of a
file is trusted: no schema but ours is decoded, so no pickle, no extension type, and nothing that is compressed
beyond what the index announces.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s3rec_dist.hashing import GOLDEN, hash64, key_of, mix

Format = Literal["parquet", "webdataset"]

SHARD_SCHEMA = pa.schema([("user", pa.string()), ("items", pa.list_(pa.int32()))])

DAMAGE = (OSError, pa.ArrowException, UnicodeDecodeError, OverflowError)
"""What pyarrow raises on damaged files."""

MOST_EXPANSION = 64
"""A row group or a small table may decode to this many times its bytes, and ``FREE_EXPANSION`` and what its announced
items take on top."""

FREE_EXPANSION = 64 << 20
"""Bytes."""

_EXTENSIONS: dict[Format, str] = {"parquet": "parquet", "webdataset": "tar"}
_LOW_64 = (1 << 64) - 1


class FormatError(ValueError):
    """A file that is not what its format promises."""


@dataclass(frozen=True)
class WrittenGroup:
    """A row group as it lies in its shard: its bytes and their SHA-256, its rows and their lengths."""

    offset: int
    size: int
    """Bytes."""
    sha256: bytes
    rows: int
    lengths: np.ndarray
    """Sequence lengths that occur, ascending, int32."""
    counts: np.ndarray
    """Rows of each length, int32."""


@dataclass(frozen=True)
class WrittenShard:
    """A shard as it now lies on disk."""

    name: str
    rows: int
    size: int
    """Bytes."""
    sha256: str
    tail_sha256: str
    """Of what follows the last row group: Parquet's footer."""
    content: tuple[int, int]
    """Two sums of row hashes modulo 2^64 (:func:`content_of`)."""
    groups: tuple[WrittenGroup, ...]


def length_counts(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sequence lengths that occur, ascending, and the rows of each, both int32, for list offsets [rows + 1]."""
    lengths, counts = np.unique(np.diff(offsets), return_counts=True)
    return lengths.astype(np.int32), counts.astype(np.int32)


def content_of(users: pa.Array, values: np.ndarray, offsets: np.ndarray) -> tuple[int, int]:
    """A hash of the rows' users (strings) and items that is a sum over rows: two numbers modulo 2^64.

    So it does not depend on how rows are cut into row groups and shards, or in which format they lie.
    """
    users = users.cast(pa.large_binary())
    name_offsets = np.frombuffer(users.buffers()[1], np.int64)[users.offset : users.offset + len(users) + 1]
    names = np.frombuffer(users.buffers()[2] or b"", np.uint8)[name_offsets[0] : name_offsets[-1]]
    sums = []
    for lane in (1, 2):
        rows = _row_hashes(values, offsets, key_of(lane, 1)) ^ _row_hashes(
            names, name_offsets - name_offsets[0], key_of(lane, 2)
        )
        sums.append(int(mix(rows).sum()) & _LOW_64)
    return sums[0], sums[1]


def _row_hashes(values: np.ndarray, offsets: np.ndarray, key: int) -> np.ndarray:
    """A hash of each row of a ragged array, int64 [rows]."""
    lengths = np.diff(offsets)
    place = np.arange(len(values), dtype=np.int64) - np.repeat(offsets[:-1], lengths)
    hashes = mix(values.astype(np.int64) * (GOLDEN >> 7) + (place * GOLDEN + key))
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(hashes)])
    return hash64(ends[offsets[1:]] - ends[offsets[:-1]] + key, lengths.astype(np.int64))  # the key: empty rows too


def add_contents(contents: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The content of rows together, from that of their parts."""
    first = second = 0
    for a, b in contents:
        first, second = (first + a) & _LOW_64, (second + b) & _LOW_64
    return first, second


def write_shards(
    groups: Iterable[pa.RecordBatch], folder: str, groups_per_shard: int, format: Format = "parquet", prefix: str = ""
) -> list[WrittenShard]:
    """Writes each batch as one row group, ``groups_per_shard`` a file: ``PREFIX00000.parquet`` (or ``.tar``) and on.
    Batches without rows are left out."""
    os.makedirs(folder, exist_ok=True)
    shards: list[WrittenShard] = []
    writer: _ParquetShard | _TarShard | None = None
    written: list[tuple[int, np.ndarray, np.ndarray, tuple[int, int]]] = []

    def close() -> None:
        nonlocal writer, written
        if writer is not None:
            closing, writer = writer, None
            ranges = closing.close()
            shards.append(_written_shard(closing.path, ranges, written))
            written = []

    try:
        for batch in groups:
            if not batch.num_rows:
                continue
            if writer is None:
                name = f"{prefix}{len(shards):05d}.{_EXTENSIONS[format]}"
                path = os.path.join(folder, name)
                writer = _ParquetShard(path) if format == "parquet" else _TarShard(path)
            writer.write(batch)
            users, lists = batch.columns
            offsets = lists.offsets.to_numpy().astype(np.int64)
            values = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
            offsets -= offsets[0]
            written.append((batch.num_rows, *length_counts(offsets), content_of(users, values, offsets)))
            if len(written) == groups_per_shard:
                close()
        close()
    except BaseException:
        if writer is not None:
            with contextlib.suppress(*DAMAGE):  # the error that brought us here is the one to report
                writer.close()
        raise
    return shards


def _written_shard(path: str, ranges: list[tuple[int, int]], written: list[Any]) -> WrittenShard:
    """Reads a new shard once more, for its hashes."""
    whole = hashlib.sha256()
    groups: list[WrittenGroup] = []
    with open(path, "rb") as file:
        for (offset, size), (rows, lengths, counts, _) in zip(ranges, written, strict=True):
            whole.update(file.read(offset - file.tell()))
            data = file.read(size)
            whole.update(data)
            groups.append(WrittenGroup(offset, size, hashlib.sha256(data).digest(), rows, lengths, counts))
        tail = file.read()
        whole.update(tail)
        size = file.tell()
        os.fsync(file.fileno())
    return WrittenShard(
        name=os.path.basename(path),
        rows=sum(group.rows for group in groups),
        size=size,
        sha256=whole.hexdigest(),
        tail_sha256=hashlib.sha256(tail).hexdigest(),
        content=add_contents(content for *_, content in written),
        groups=tuple(groups),
    )


class _ParquetShard:
    def __init__(self, path: str) -> None:
        self.path = path
        self._writer = parquet_writer(path, SHARD_SCHEMA, statistics=False)

    def write(self, batch: pa.RecordBatch) -> None:
        table = pa.Table.from_batches([batch], schema=SHARD_SCHEMA)
        self._writer.write_table(table, row_group_size=batch.num_rows)

    def close(self) -> list[tuple[int, int]]:
        """(offset, bytes) of each row group, all its column chunks."""
        self._writer.close()
        metadata = pq.read_metadata(self.path)
        return [_group_range(metadata.row_group(i)) for i in range(metadata.num_row_groups)]


def _group_range(group: Any) -> tuple[int, int]:
    columns = [group.column(i) for i in range(group.num_columns)]
    first = min(column.data_page_offset for column in columns)  # no dictionaries: data comes first
    last = max(column.data_page_offset + column.total_compressed_size for column in columns)
    return first, last - first


class _TarShard:
    def __init__(self, path: str) -> None:
        import webdataset

        self.path = path
        self._key = os.path.splitext(os.path.basename(path))[0]
        self._file = open(path, "wb")  # noqa: SIM115 -- close() closes it
        self._writer = webdataset.TarWriter(self._file, encoder=False, user="", group="", mtime=0)
        self._ranges: list[tuple[int, int]] = []

    def write(self, batch: pa.RecordBatch) -> None:
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, SHARD_SCHEMA) as stream:
            whole = [pa.concat_arrays([column]) for column in batch.columns]  # without what a slice leaves around it
            stream.write_batch(pa.RecordBatch.from_arrays(whole, schema=SHARD_SCHEMA))
        data = sink.getvalue()
        offset = self._writer.tarstream.offset + 512  # after the member's header
        self._writer.write({"__key__": f"{self._key}-{len(self._ranges):05d}", "arrow": data})
        self._ranges.append((offset, len(data)))

    def close(self) -> list[tuple[int, int]]:
        """(offset, bytes) of each row group, its member's contents."""
        self._writer.close()
        self._file.close()
        return self._ranges


def parquet_writer(path: str, schema: pa.Schema, statistics: bool = True) -> pq.ParquetWriter:
    """A writer of plain Parquet with page checksums and no embedded Arrow schema; without ``statistics`` no value
    stands in the footer."""
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=False,
        write_statistics=statistics,
        write_page_checksum=True,
        store_schema=False,
    )


def write_parquet_table(table: pa.Table, path: str) -> str:
    """Writes a small table, synced to disk; returns its SHA-256."""
    writer = parquet_writer(path, table.schema, statistics=False)
    try:
        writer.write_table(table)
    except BaseException:
        with contextlib.suppress(*DAMAGE):
            writer.close()
        raise
    writer.close()
    sync_file(path)
    return sha256_of(path)


@contextlib.contextmanager
def _open_parquet(data: bytes, schema: pa.Schema, where: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file, or the end of one, whose columns are exactly ``schema``; page checksums are verified on reading.

    Raises :class:`FormatError`, naming ``where``, for another schema or a damaged file.
    """
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") :]
    if b"ARROW:schema" in footer:  # opening such a file would already decode it, extension types included
        raise FormatError(f"{where}: carries an Arrow schema of its own, which files of a dataset never do")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True))
            found = file.schema_arrow
        except DAMAGE as error:
            raise FormatError(f"{where}: not a readable Parquet file ({error})") from error
        _check_schema(found, schema, where)
        yield file


def read_parquet_table(data: bytes, schema: pa.Schema, where: str) -> pa.Table:
    """A whole small table. Raises :class:`FormatError`, naming ``where``, for another schema or damage, and before
    anything is decompressed where that would take much more than its bytes."""
    footer = parse_parquet_tail(data, where, schema)
    _check_expansion(data, 0, [chunk for group in footer.chunks for chunk in group], 0, where)
    try:
        with pq.ParquetFile(pa.BufferReader(data), metadata=footer.metadata, page_checksum_verification=True) as file:
            return file.read()
    except DAMAGE as error:
        raise FormatError(f"{where}: damaged ({error})") from error


@dataclass(frozen=True)
class ParquetFooter:
    """What a Parquet file says of its row groups."""

    metadata: Any
    """As pyarrow reads it. Asking it about column chunks may end the process where the footer is not sound."""
    rows: list[int]
    """Of each row group."""
    chunks: list[list[tuple[int, int, int]]]
    """Of each row group the column chunks: first byte, bytes, values."""


def parse_parquet_tail(tail: bytes, where: str, schema: pa.Schema = SHARD_SCHEMA) -> ParquetFooter:
    """The footer in ``tail``, a Parquet file or all of it after its last row group. Raises :class:`FormatError`."""
    with _open_parquet(tail, schema, where) as file:
        metadata = file.metadata
    try:
        fields, _ = _thrift(tail, len(tail) - 8 - int.from_bytes(tail[-8:-4], "little"), _STRUCT)
        groups = fields[4]
        columns = [[chunk[3] for chunk in group[1]] for group in groups]
        if any(11 in column for group in columns for column in group):
            raise ValueError("has dictionaries")
        chunks = [[(column[9], column[7], column[5]) for column in group] for group in columns]
        return ParquetFooter(metadata, [group[3] for group in groups], chunks)
    except _UNSOUND as error:
        raise FormatError(f"{where}: unexpected footer ({type(error).__name__}: {error})") from error


def decode_parquet(
    data: bytes, offset: int, footer: ParquetFooter, index: int, columns: Sequence[str], items: int, where: str
) -> pa.RecordBatch:
    """``columns`` of row group ``index`` of a Parquet shard from bytes that hold them and lie at ``offset``; ``items``
    were announced.

    Raises :class:`FormatError`, before anything is decompressed where that would take much more than was announced.
    """
    window = pa.PythonFile(_Window(data, offset), "r")
    chunks = [footer.chunks[index][SHARD_SCHEMA.get_field_index(name)] for name in columns]
    _check_expansion(data, offset, chunks, items, where)
    try:
        with pq.ParquetFile(window, metadata=footer.metadata, page_checksum_verification=True) as file:
            table = file.read_row_group(index, columns=columns, use_threads=False)
        arrays = [column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() for column in table.columns]
        batch = pa.RecordBatch.from_arrays(arrays, names=table.column_names)
        batch.validate(full=True)
    except DAMAGE as error:
        raise FormatError(f"{where}: damaged ({error})") from error
    return batch


def _check_expansion(data: bytes, offset: int, chunks: list[tuple[int, int, int]], items: int, where: str) -> None:
    """Raises :class:`FormatError` where the column ``chunks`` in ``data`` decode to much more than their bytes and
    ``items`` announced ones call for."""
    most = MOST_EXPANSION * len(data) + FREE_EXPANSION + 16 * items
    try:
        expanded = _expanded_size(data, offset, chunks)
    except _UNSOUND as error:
        raise FormatError(f"{where}: unexpected pages ({type(error).__name__}: {error})") from error
    if expanded > most:
        raise FormatError(f"{where}: its {len(data):,} bytes expand to {expanded:,}, expected {most:,} at most")


def _expanded_size(data: bytes, offset: int, chunks: list[tuple[int, int, int]]) -> int:
    """Bytes that column chunks take while they are decoded, as its page headers say, which the decoder goes by.

    Raises one of ``_UNSOUND`` where they are not plain data pages.
    """
    total = 0
    for first, size, values in chunks:
        at, end = first - offset, first - offset + size
        if not 0 <= at <= end <= len(data):
            raise ValueError("a column chunk lies outside the row group")
        while at < end:
            header, at = _thrift(data, at, _STRUCT)
            kind, expanded, compressed, page = header[1], header[2], header[3], header[5]
            if (kind, page[2], page[3], page[4]) != (0, 0, 3, 3) or min(expanded, compressed, page[1]) < 0:
                raise ValueError("a page is not one of plain values")
            values -= page[1]
            total += expanded + 8 * page[1]  # levels, and what a null takes
            at += compressed
        if at != end or values:
            raise ValueError("page headers and footer disagree")
    return total


_STRUCT = 12
_UNSOUND = (KeyError, IndexError, TypeError, RecursionError, ValueError)
"""What :func:`_thrift` raises on bytes of another kind, and looking into what it read."""


def _thrift(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    """A value of Thrift's compact protocol, structs as {field: value}, and where it ends."""
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):  # integers
        value, at = _varint(data, at)
        return value >> 1 ^ -(value & 1), at
    if kind == 8:  # bytes
        size, at = _varint(data, at)
        return data[at : at + size], at + size
    if kind == 9:
        count, element, at = data[at] >> 4, data[at] & 15, at + 1
        if count == 15:
            count, at = _varint(data, at)
        if element in (1, 2) or count > len(data):
            raise ValueError("a list of truths, or longer than the file")
        elements = []
        for _ in range(count):
            value, at = _thrift(data, at, element)
            elements.append(value)
        return elements, at
    if kind != _STRUCT:
        raise ValueError(f"a value of kind {kind}")
    fields: dict[int, Any] = {}
    field = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            field += head >> 4
        else:
            field, at = _thrift(data, at, 4)
        if field in fields:
            raise ValueError(f"field {field} comes twice")
        fields[field], at = _thrift(data, at, head & 15)
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("an integer is longer than 64 bits")


def decode_arrow(data: bytes, where: str) -> pa.RecordBatch:
    """The one batch of an Arrow IPC stream, without copying it. Raises :class:`FormatError`."""
    try:
        reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(data))
        schema, message = reader.read_next_message(), reader.read_next_message()
        if schema.type != "schema" or message.type != "record batch":
            raise FormatError(f"{where}: expected a schema and a record batch, found {schema.type} and {message.type}")
        if b"ARROW:extension:name" in memoryview(schema.metadata).tobytes():  # decoding it could run code
            raise FormatError(f"{where}: has extension types, which files of a dataset never do")
        _check_schema(pa.ipc.read_schema(schema), SHARD_SCHEMA, where)
        if _is_compressed(memoryview(message.metadata)):
            raise FormatError(f"{where}: is compressed; expected a plain record batch")
        batch = pa.ipc.read_record_batch(message, SHARD_SCHEMA)
        batch.validate(full=True)
        for more in reader:
            raise FormatError(f"{where}: expected one record batch; a {more.type} follows it")
    except StopIteration:
        raise FormatError(f"{where}: the Arrow stream ends early") from None
    except (*DAMAGE, struct.error) as error:
        raise FormatError(f"{where}: expected a batch of {describe(SHARD_SCHEMA)} ({error})") from error
    return batch


def _check_schema(found: pa.Schema, expected: pa.Schema, where: str) -> None:
    if not plain_schema(found).equals(expected):
        raise FormatError(f"{where}: expected columns {describe(expected)}; found {describe(found)}")


def _is_compressed(message: memoryview) -> bool:
    """Whether the record batch of an IPC message (a flatbuffer: Message.header.compression) is compressed."""

    def field(table: int, slot: int) -> int:
        """Where a table's field lies, or 0 where it is absent."""
        vtable = table - struct.unpack_from("<i", message, table)[0]
        entry = 4 + 2 * slot
        if entry >= struct.unpack_from("<H", message, vtable)[0]:
            return 0
        place = struct.unpack_from("<H", message, vtable + entry)[0]
        return table + place if place else 0

    def follow(place: int) -> int:
        return place + struct.unpack_from("<I", message, place)[0]

    header = field(follow(0), 2)
    return header == 0 or field(follow(header), 3) != 0


class _Window(io.RawIOBase):
    """A file of which only the bytes from ``offset`` on are there; its end is theirs."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._data, self._offset, self._end = memoryview(data), offset, offset + len(data)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._end if size is None or size < 0 else min(self._at + size, self._end)
        if self._at < self._offset:
            raise OSError(f"byte {self._at} lies outside the row group")
        data = bytes(self._data[self._at - self._offset : stop - self._offset])
        self._at += len(data)
        return data


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """``schema`` without what does not matter here: nullability and the name of list elements."""

    def plain(kind: pa.DataType) -> pa.DataType:
        return pa.list_(plain(kind.value_type)) if pa.types.is_list(kind) else kind

    return pa.schema([(field.name, plain(field.type)) for field in schema])


def describe(schema: pa.Schema) -> str:
    """A schema on one line."""
    return ", ".join(f"{field.name}: {field.type}" for field in plain_schema(schema))


def sha256_of(path: str) -> str:
    """SHA-256 of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_file(path: str) -> None:
    """Waits until a local file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(folder: str, output: str, replaced: str) -> None:
    """Renames ``folder`` to ``output``, all three on one disk. What was there before goes to ``replaced``, and comes
    back where the rename fails."""
    try:
        if os.path.lexists(output):
            os.rename(output, replaced)
        os.rename(folder, output)
    except BaseException:  # a signal between the two as well
        if os.path.lexists(replaced) and not os.path.lexists(output):
            os.rename(replaced, output)
        raise
    sync_file(os.path.dirname(output))
