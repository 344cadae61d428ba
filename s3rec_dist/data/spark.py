"""What runs prepare's SQL on many hosts: Spark (``pip install 's3rec-dist[spark]'``).

Tables are Parquet files in the work folder, and sequences are folded and written by the executors, so on a cluster
work folder and output must lie on a disk that all hosts share, and this package be installed on all of them. Memory
and cores of executors are Spark's own settings (``spark-defaults.conf``).
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s3rec_dist.data.engines import FETCH_ROWS, EngineError, Layout, number, spool
from s3rec_dist.data.fold import Cut, Fold, split_names
from s3rec_dist.data.formats import WrittenShard, write_shards
from s3rec_dist.data.sources import FILE_BITS, Lake

_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.caseSensitive": "true",
    "spark.sql.files.ignoreCorruptFiles": "false",
    "spark.sql.files.ignoreMissingFiles": "false",
    "spark.sql.legacy.parquet.nanosAsLong": "true",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInRead": "CORRECTED",
    "parquet.page.verify-checksum.enabled": "true",
}
"""With these, the plan's SQL means what it means on DuckDB."""


class Spark:
    """Spark as an :class:`~s3rec_dist.data.engines.Engine`; joins the session that is active, or starts its own."""

    def __init__(self, work: str, master: str, memory_limit: str) -> None:
        try:
            from pyspark.errors import PySparkException
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise EngineError(f"engine=spark: {error}; pip install 's3rec-dist[spark]'") from error
        self._work, self._made = os.path.abspath(work), 0
        self._folders: dict[str, str] = {}
        active = SparkSession.getActiveSession()
        self._is_own = active is None
        try:
            session = active or _start(SparkSession.builder, work, master, memory_limit)
        except (PySparkException, RuntimeError) as error:
            raise EngineError(
                f"engine=spark master={master}: Spark did not start ({error}); it needs Java 17 or newer"
            ) from error
        self._session = session.newSession()  # its own settings and names
        for key, value in _SETTINGS.items():
            self._session.conf.set(key, value)

    def scan(self, name: str, lake: Lake) -> None:
        """As in :class:`~s3rec_dist.data.engines.Engine`; executors verify page checksums while they read."""
        files = self._session.read.parquet(*map(_pattern, lake.paths))
        kinds = {field.name: field.dataType.typeName() for field in files.schema.fields}
        columns = [
            f"{_spark_value(theirs, kind, kinds[theirs])} AS {ours}" for ours, (theirs, kind) in lake.columns.items()
        ]
        rows = files.selectExpr("_metadata.file_path AS path", "_metadata.row_index AS row", *columns)
        numbers = {path: number for number, path in enumerate(lake.paths)}
        found = [path for (path,) in rows.select("path").distinct().collect()]
        places = [(path, numbers[os.path.abspath(unquote(urlsplit(path).path))]) for path in found]
        places_of = self._session.createDataFrame(places, "path STRING, file BIGINT")
        position = f"(file << {FILE_BITS}) + row + 1 AS position"
        rows.join(places_of.hint("broadcast"), "path").selectExpr(position, *lake.columns).createOrReplaceTempView(name)

    def view(self, name: str, sql: str) -> None:
        """As in :class:`~s3rec_dist.data.engines.Engine`."""
        self._session.sql(sql).createOrReplaceTempView(name)

    def table(self, name: str, sql: str) -> None:
        """As in :class:`~s3rec_dist.data.engines.Engine`."""
        rows = self._session.sql(sql)
        folder = self._new_path(name)
        rows.write.parquet(f"file://{folder}")
        self.drop(name)
        self._folders[name] = folder
        self._session.read.schema(rows.schema).parquet(_pattern(folder)).createOrReplaceTempView(name)

    def load(self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> pa.Schema:
        """As in :class:`~s3rec_dist.data.engines.Engine`."""
        folder = self._new_path(name)
        os.mkdir(folder)
        schema = spool(os.path.join(folder, "rows.parquet"), schema, batches)
        self._folders[name] = folder
        self._session.read.parquet(_pattern(folder)).createOrReplaceTempView(name)
        return schema

    def drop(self, name: str) -> None:
        """As in :class:`~s3rec_dist.data.engines.Engine`."""
        self._session.catalog.dropTempView(name)
        if folder := self._folders.pop(name, None):
            shutil.rmtree(folder)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """As in :class:`~s3rec_dist.data.engines.Engine`."""
        return [tuple(row) for row in self._session.sql(sql).collect()]

    def stream(self, sql: str) -> Iterator[pa.RecordBatch]:
        """As in :class:`~s3rec_dist.data.engines.Engine`, by way of files, so that the driver need not hold it."""
        folder = self._new_path("stream")
        self._session.sql(sql).write.parquet(f"file://{folder}")
        try:
            for name in sorted(name for name in os.listdir(folder) if name.endswith(".parquet")):
                with pq.ParquetFile(os.path.join(folder, name)) as file:
                    yield from file.iter_batches(FETCH_ROWS)
        finally:
            shutil.rmtree(folder)

    def sequences(
        self, events: str, users: str, folder: str, layout: Layout, items: int
    ) -> tuple[list[WrittenShard], Cut]:
        """As in :class:`~s3rec_dist.data.engines.Engine`; a range of users is one executor's."""
        groups = -(-number(self, f"SELECT count(*) FROM ({users}) AS users") // layout.rows_per_group)
        shards = -(-groups // layout.groups_per_shard)
        ranges = max(shards, min(groups, self._session.sparkContext.defaultParallelism), 1)
        rows = self._session.sql(
            "SELECT events.u, events.t, events.position, events.item, users.raw "
            f"FROM ({events}) AS events JOIN ({users}) AS users ON users.u = events.u"
        )
        rows = rows.repartitionByRange(ranges, "u").sortWithinPartitions("u", "t", "position")
        written: list[WrittenShard] = []
        cut = Cut(0, np.zeros(items + 1, np.int64))
        os.makedirs(folder, exist_ok=True)
        told = rows.select("u", "item", "raw").mapInArrow(_writer(folder, layout, items), "told BINARY")
        for (pickled,) in told.collect():
            own, users_cut, lost, counts = pickle.loads(pickled)  # from our own executors
            written += own
            cut.users += users_cut
            cut.items[lost] += counts
        return sorted(written, key=lambda shard: shard.name), cut

    def close(self) -> None:
        """As in :class:`~s3rec_dist.data.engines.Engine`."""
        if self._is_own:
            self._session.stop()

    def _new_path(self, name: str) -> str:
        self._made += 1
        return os.path.join(self._work, f"{name}-{self._made}")


def _pattern(path: str) -> str:
    """What Spark reads as this one file or folder, whatever its default file system: it takes paths for patterns."""
    return "file://" + re.sub(r"([\\*?{}\[\]])", r"\\\1", path)


def _start(builder: Any, work: str, master: str, memory_limit: str) -> Any:
    settings = {
        "spark.log.level": "ERROR",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.warehouse.dir": os.path.join(work, "warehouse"),
    }
    if master.startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        settings |= {
            "spark.driver.memory": _megabytes(memory_limit),
            "spark.local.dir": os.path.join(work, "spill"),
            "spark.pyspark.python": sys.executable,
        }
    return builder.master(master).appName("s3rec prepare").config(map=settings).getOrCreate()


def _megabytes(size: str) -> str:
    """A size like DuckDB's, 2GB, as Spark writes it."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MG])i?B", size, re.IGNORECASE)
    if not found:
        raise EngineError(f"memory_limit={size!r}: expected a size, as in 2GB or 500MB")
    return f"{int(float(found[1]) * (1024 if found[2].upper() == 'G' else 1))}m"


def _spark_value(name: str, kind: pa.DataType, spark_kind: str) -> str:
    """SQL for a column of a Parquet file as the plan takes it."""
    column = "`" + name.replace("`", "``") + "`"
    if pa.types.is_timestamp(kind) and spark_kind == "long":  # nanoseconds
        return f"{column} div 1000"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return f"unix_micros(CAST({column} AS TIMESTAMP))"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return f"CAST({column} AS DOUBLE)"
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return f"CAST({column} AS BIGINT)"
    return column


def _writer(folder: str, layout: Layout, items: int) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """What an executor does with the sorted (u, item, raw) rows of its users."""

    def write(rows: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None
        fold = Fold(layout.rows_per_group, layout.max_history, items)
        groups = fold.groups(*split_names(rows))
        shards = write_shards(groups, folder, layout.groups_per_shard, layout.format, f"{context.partitionId():05d}-")
        lost = np.flatnonzero(fold.cut.items)
        told = pickle.dumps((shards, fold.cut.users, lost, fold.cut.items[lost]))
        yield pa.record_batch({"told": pa.array([told], pa.binary())})

    return write
