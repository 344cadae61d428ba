"""Reading and writing one shard. A shard holds whole row groups; every format gives the same Arrow table.

``SHARD_SCHEMA`` is all a shard may hold: ``user: string``, ``items: list<int32>``, a row per user, its
whole history in time order. Parquet pages carry checksums, written and verified, because Parquet alone
lets a flipped bit through in silence.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SHARD_SCHEMA = pa.schema([("user", pa.string()), ("items", pa.list_(pa.int32()))])


DAMAGE = (OSError, pa.ArrowException, UnicodeDecodeError, OverflowError)
"""What pyarrow raises on damaged files."""


class FormatError(ValueError):
    """A file that is not what its format promises."""


@dataclass(frozen=True)
class WrittenShard:
    """A shard as it now lies on disk: name, rows, SHA-256, and per row group its sequence lengths."""

    name: str
    rows: int
    sha256: str
    row_groups: tuple[tuple[tuple[int, int], ...], ...]
    """For each row group: (sequence length, rows of that length), lengths ascending."""


def length_counts(offsets: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(sequence length, rows of that length) for list offsets [rows + 1], lengths ascending."""
    lengths, rows = np.unique(np.diff(offsets), return_counts=True)
    return tuple(zip(lengths.tolist(), rows.tolist(), strict=True))


def write_parquet_shards(groups: Iterable[pa.RecordBatch], folder: str, groups_per_shard: int) -> list[WrittenShard]:
    """Writes each batch as one row group, ``groups_per_shard`` a file: ``00000.parquet`` and on."""
    os.makedirs(folder, exist_ok=True)
    shards: list[WrittenShard] = []
    writer: pq.ParquetWriter | None = None
    counts: list[tuple[tuple[int, int], ...]] = []
    rows = 0
    name = ""

    def close() -> None:
        nonlocal writer, counts, rows
        if writer is None:
            return
        writer.close()
        writer = None
        path = os.path.join(folder, name)
        sync_file(path)
        shards.append(WrittenShard(name, rows, sha256_of(path), tuple(counts)))
        counts, rows = [], 0

    try:
        for batch in groups:
            if writer is None:
                name = f"{len(shards):05d}.parquet"
                writer = parquet_writer(os.path.join(folder, name), SHARD_SCHEMA)
            table = pa.Table.from_batches([batch], schema=SHARD_SCHEMA)
            writer.write_table(table, row_group_size=max(batch.num_rows, 1))
            counts.append(length_counts(batch.column(1).offsets.to_numpy()))
            rows += batch.num_rows
            if len(counts) == groups_per_shard:
                close()
        close()
    except BaseException:
        if writer is not None:
            _close_quietly(writer)
        raise
    return shards


def parquet_writer(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of plain Parquet with page checksums and no embedded Arrow schema."""
    return pq.ParquetWriter(
        path, schema, compression="zstd", use_dictionary=False, write_page_checksum=True, store_schema=False
    )


def write_parquet_table(table: pa.Table, path: str) -> str:
    """Writes a small table, synced to disk; returns its SHA-256."""
    writer = parquet_writer(path, table.schema)
    try:
        writer.write_table(table)
    except BaseException:
        _close_quietly(writer)
        raise
    writer.close()
    sync_file(path)
    return sha256_of(path)


@contextlib.contextmanager
def open_parquet(path: str, schema: pa.Schema, metadata: Any = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file or fsspec URL whose columns are exactly ``schema``; page checksums are verified on reading.

    Raises :class:`FormatError` for another schema or a damaged file, FileNotFoundError where there is none.
    """
    filesystem, inner = fsspec.core.url_to_fs(path)
    with contextlib.ExitStack() as stack:
        try:
            source = inner if "file" in filesystem.protocol else stack.enter_context(filesystem.open(inner, "rb"))
            file = stack.enter_context(pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True))
        except FileNotFoundError:
            raise
        except DAMAGE as error:
            raise FormatError(f"{path}: not a readable Parquet file ({error})") from error
        if not plain_schema(file.schema_arrow).equals(schema):
            raise FormatError(f"{path}: expected columns {describe(schema)}; found {describe(file.schema_arrow)}")
        yield file


def read_parquet_row_group(path: str, index: int, metadata: Any = None) -> pa.RecordBatch:
    """One row group of a shard as one record batch; errors as in :func:`open_parquet`."""
    with open_parquet(path, SHARD_SCHEMA, metadata) as file:
        try:
            table = file.read_row_group(index, use_threads=False)
        except DAMAGE as error:
            raise FormatError(f"{path}: row group {index} is damaged ({error})") from error
    columns = [column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(columns, names=table.column_names)


def read_parquet_table(path: str, schema: pa.Schema) -> pa.Table:
    """A whole small table; errors as in :func:`open_parquet`."""
    with open_parquet(path, schema) as file:
        try:
            return file.read()
        except DAMAGE as error:
            raise FormatError(f"{path}: damaged ({error})") from error


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """``schema`` without what does not matter here: nullability and the name of list elements."""

    def plain(kind: pa.DataType) -> pa.DataType:
        return pa.list_(plain(kind.value_type)) if pa.types.is_list(kind) else kind

    return pa.schema([(field.name, plain(field.type)) for field in schema])


def describe(schema: pa.Schema) -> str:
    """A schema on one line."""
    return ", ".join(f"{field.name}: {field.type}" for field in plain_schema(schema))


def sha256_of(path: str) -> str:
    """SHA-256 of a file or fsspec URL."""
    digest = hashlib.sha256()
    with fsspec.open(path, "rb") as file:
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
    if os.path.lexists(output):
        os.rename(output, replaced)
    try:
        os.rename(folder, output)
    except OSError:
        if os.path.lexists(replaced):
            os.rename(replaced, output)
        raise
    sync_file(os.path.dirname(output))


def _close_quietly(writer: pq.ParquetWriter) -> None:
    with contextlib.suppress(OSError, pa.ArrowException):  # the error that brought us here is the one to report
        writer.close()
