"""What runs prepare's SQL: DuckDB, inside a memory limit, spilling to disk. (Spark is in ``spark``.)

An engine keeps named views and tables, and understands the common dialect that the SQL in ``plan`` is written in:
standard types with STRING, TRY_CAST, window functions, and of functions that are not standard regexp_like,
try_to_timestamp and unix_micros. Whatever the engine, threads and memory, the same SQL gives the same rows.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from s3rec_dist.data.fold import Cut, Fold
from s3rec_dist.data.formats import Format, WrittenShard, write_shards
from s3rec_dist.data.sources import FILE_BITS, Lake, verify_pages

FETCH_ROWS = 1 << 17


class EngineError(ValueError):
    """An engine that cannot be started as asked."""


@dataclass(frozen=True)
class Layout:
    """How sequences are cut and written."""

    format: Format
    rows_per_group: int
    groups_per_shard: int
    max_history: int


class Engine(Protocol):
    """Runs SQL over named views and tables."""

    def scan(self, name: str, lake: Lake) -> None:
        """A view of files: position and the lake's columns, numbers as BIGINT or DOUBLE, moments in microseconds."""

    def view(self, name: str, sql: str) -> None:
        """Names a query."""

    def table(self, name: str, sql: str) -> None:
        """Keeps a query's rows, in place of those that were kept under this name, which it may read."""

    def load(self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> pa.Schema:
        """Keeps rows from Python; returns their schema, which is ``schema`` where no batch comes."""

    def drop(self, name: str) -> None:
        """Forgets a view or table, if there is one."""

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """A few rows."""

    def stream(self, sql: str) -> Iterator[pa.RecordBatch]:
        """Many rows."""

    def sequences(
        self, events: str, users: str, folder: str, layout: Layout, items: int
    ) -> tuple[list[WrittenShard], Cut]:
        """Writes shards of ``events`` (u, t, position, item), in order of u, t and position; ``users`` (u, raw) names
        every u. Item ids are 1..``items``."""

    def close(self) -> None:
        """Frees memory and disk."""


def engine_errors() -> tuple[type[Exception], ...]:
    """What an engine may raise while it runs."""
    if "pyspark" not in sys.modules:
        return OSError, duckdb.Error
    errors, py4j = sys.modules["pyspark.errors"], sys.modules["py4j.protocol"]
    return OSError, duckdb.Error, errors.PySparkException, py4j.Py4JError


def row(engine: Engine, sql: str) -> tuple[Any, ...]:
    """The one row of a query."""
    return engine.rows(sql)[0]


def number(engine: Engine, sql: str) -> int:
    """The one number of a query; 0 for NULL."""
    return int(row(engine, sql)[0] or 0)


def spool(path: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> pa.Schema:
    """Writes batches to a Parquet file for an engine to read; returns its schema, ``schema`` where none comes."""
    first = next(batches, None)
    schema = schema if first is None else first.schema
    with pq.ParquetWriter(path, schema, compression="snappy", write_statistics=False) as writer:
        if first is not None:
            writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
    return schema


class DuckDB:
    """DuckDB on a file in ``work``, so that tables beyond the memory limit live on disk, compressed."""

    MACROS = (
        "regexp_like(text, pattern) AS regexp_matches(text, pattern)",
        "try_to_timestamp(text) AS TRY_CAST(text AS TIMESTAMPTZ)",
        "unix_micros(moment) AS epoch_us(moment)",
    )

    def __init__(self, work: str, memory_limit: str, threads: int) -> None:
        self._work = work
        options: dict[str, Any] = {
            "memory_limit": memory_limit,
            "temp_directory": os.path.join(work, "spill"),
            "preserve_insertion_order": False,  # every order that matters is in the SQL
        }
        if threads:
            options["threads"] = threads
        try:
            self._connection = duckdb.connect(os.path.join(work, "prepare.duckdb"), config=options)
        except duckdb.ParserException as error:
            raise EngineError(
                f"memory_limit={memory_limit!r}: expected a size, as in 2GB or 500MB ({error})"
            ) from error
        self._run("SET TimeZone = 'UTC'")
        for macro in self.MACROS:
            self._run(f"CREATE MACRO {macro}")

    def scan(self, name: str, lake: Lake) -> None:
        """As in :class:`Engine`; page checksums are verified first, which DuckDB does not do."""
        verify_pages(lake)
        columns = [f"{_duckdb_value(theirs, kind)} AS {ours}" for ours, (theirs, kind) in lake.columns.items()]
        position = f"(CAST(file_index AS BIGINT) << {FILE_BITS}) + file_row_number + 1"
        files = ", ".join(map(_quoted, lake.paths))
        self.view(name, f"SELECT {position} AS position, {', '.join(columns)} FROM read_parquet([{files}])")

    def view(self, name: str, sql: str) -> None:
        """As in :class:`Engine`."""
        self._run(f"CREATE OR REPLACE VIEW {name} AS {sql}")

    def table(self, name: str, sql: str) -> None:
        """As in :class:`Engine`."""
        self._run(f"CREATE TABLE making AS {sql}")
        self.drop(name)
        self._run(f"ALTER TABLE making RENAME TO {name}")

    def load(self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> pa.Schema:
        """As in :class:`Engine`."""
        path = os.path.join(self._work, f"{name}.parquet")
        schema = spool(path, schema, batches)
        self.view(name, f"SELECT * FROM read_parquet({_quoted(path)})")
        return schema

    def drop(self, name: str) -> None:
        """As in :class:`Engine`."""
        path = os.path.join(self._work, f"{name}.parquet")
        for kind in self.rows(f"SELECT table_type FROM information_schema.tables WHERE table_name = '{name}'"):
            self._run(f"DROP {'VIEW' if kind == ('VIEW',) else 'TABLE'} {name}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """As in :class:`Engine`."""
        return self._connection.execute(sql).fetchall()

    def stream(self, sql: str) -> Iterator[pa.RecordBatch]:
        """As in :class:`Engine`, on a cursor of its own."""
        cursor = self._connection.cursor()
        try:
            yield from cursor.sql(sql).to_arrow_reader(FETCH_ROWS)
        finally:
            cursor.close()

    def sequences(
        self, events: str, users: str, folder: str, layout: Layout, items: int
    ) -> tuple[list[WrittenShard], Cut]:
        """As in :class:`Engine`."""
        fold = Fold(layout.rows_per_group, layout.max_history, items)
        names = self.stream(f"SELECT raw FROM ({users}) AS users ORDER BY u")
        groups = fold.groups(
            self.stream(f"SELECT u, item FROM ({events}) AS events ORDER BY u, t, position"),
            (batch.column(0) for batch in names),
        )
        return write_shards(groups, folder, layout.groups_per_shard, layout.format), fold.cut

    def close(self) -> None:
        """As in :class:`Engine`."""
        self._connection.close()

    def _run(self, sql: str) -> None:
        self._connection.execute(sql)


def _quoted(text: str) -> str:
    """A string literal."""
    return "'" + text.replace("'", "''") + "'"


def _duckdb_value(name: str, kind: pa.DataType) -> str:
    """SQL for a column of a Parquet file as the plan takes it."""
    column = '"' + name.replace('"', '""') + '"'
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return f"epoch_ns({column}) // 1000"
    if pa.types.is_timestamp(kind):
        return f"epoch_us({column})"
    if pa.types.is_date(kind):
        return f"epoch_us(CAST({column} AS TIMESTAMP))"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return f"CAST({column} AS DOUBLE)"
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return f"CAST({column} AS BIGINT)"
    return column
