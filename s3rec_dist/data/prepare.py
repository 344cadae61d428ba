"""Raw interactions -> dataset, as SQL on DuckDB inside a memory limit: ``s3rec prepare``.

    manifest = prepare(PrepareSettings(source="s3rec", input="Beauty.txt", output="data/beauty"))

Steps, in this order: read and check every row; drop ratings below the threshold; drop duplicates;
iterate the k-core; keep out users too short for the split; give out ids; sort by (user, time, input
order); fold the sorted rows into sequences in Arrow, which is several times faster and leaner than
``list(... ORDER BY ...)`` in SQL. Users stand in the order of their first appearance in the input.

Equal input and settings give equal bytes, whatever the threads and the memory limit. The dataset is
built in a folder beside ``output`` and renamed when it is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import glob
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa

from s3rec_dist import __version__
from s3rec_dist.data.dataset import (
    ATTRIBUTES_SCHEMA,
    ITEMS_SCHEMA,
    MIN_SEQUENCE,
    SAMPLE_END_BITS,
    Manifest,
    new_manifest,
)
from s3rec_dist.data.formats import SHARD_SCHEMA, Format, put_in_place, write_shards
from s3rec_dist.data.sources import (
    LINE_BITS,
    Columns,
    RecBole,
    S3RecPair,
    Source,
    SourceError,
    Table,
    WebDatasetTars,
)

FETCH_ROWS = 1 << 17

_WHOLE_HISTORIES = {"s3rec": "line", "webdataset": "sample"}
"""Sources that give a user's whole history at once, and what in."""

INTEGER_ID = "^[1-9][0-9]{0,8}$"
"""Raw ids that can be ids as they are."""

SPARSE_IDS = 1_000_000
"""Kept ids may reach this, plus ten times the ids that are used."""


class PrepareError(ValueError):
    """Input or settings that cannot become a dataset; nothing has been written to the output."""


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """One preparation."""

    source: Literal["s3rec", "recbole", "table", "webdataset"]
    """What the input is: the S3-Rec pair, RecBole's atomic files, Parquet, CSV, JSONL with a row per interaction, or
    tars with a sample per user."""
    input: str
    """File or folder; for tables and tars also a pattern."""
    output: str
    """Dataset folder to write."""
    attributes: str = ""
    """Attribute file: '' takes the one beside the input, 'none' goes without. For tables a file, folder or pattern."""
    attribute_fields: tuple[str, ...] = ()
    """Fields of the attribute file to use; empty takes every token_seq field of a RecBole .item file."""
    attribute_separator: str = ""
    """Splits a table's text attributes, as '|' does in 'Comedy|Drama'; empty does not split."""
    name: str = ""
    """The dataset's name; empty takes the input's."""
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str = "timestamp"
    """Empty takes the input's own order as time."""
    rating_column: str = "rating"
    """Read only where min_rating is set."""
    min_rating: float | None = None
    """Interactions rated lower are dropped."""
    duplicates: Literal["keep", "drop_consecutive", "drop_repeats"] = "keep"
    """Repeats of an item by a user: kept, dropped where they follow each other, or all dropped but the first."""
    min_user_count: int = 0
    """Users with fewer interactions are dropped, repeatedly, together with min_item_count; 0 and 1 are off."""
    min_item_count: int = 0
    """Items with fewer interactions are dropped, repeatedly."""
    ids: Literal["auto", "keep", "count"] = "auto"
    """Item ids: the raw ids themselves, or by descending count, then raw id. ``auto`` keeps an S3-Rec pair's that are
    1..N already, and counts otherwise."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A malformed row stops the preparation, or is counted and left out."""
    max_bad_rows: int = 1000
    """Bad rows beyond which ``skip`` stops after all."""
    format: Format = "parquet"
    """Format of the shards."""
    rows_per_group: int = 4096
    """Users per row group, the unit that training reads."""
    groups_per_shard: int = 64
    """Row groups per shard."""
    memory_limit: str = "2GB"
    """DuckDB's memory; it spills to disk, beside the output, beyond it."""
    threads: int = 0
    """DuckDB's threads; 0 is one per core."""
    overwrite: bool = False
    """Replace the output if it is a dataset already."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(PrepareSettings).items():
            if typing.get_origin(hint) is Literal and getattr(self, name) not in typing.get_args(hint):
                choices = ", ".join(typing.get_args(hint))
                raise PrepareError(f"{name}={getattr(self, name)!r}: expected one of {choices}")
        for name, low in (
            ("min_user_count", 0),
            ("min_item_count", 0),
            ("max_bad_rows", 0),
            ("rows_per_group", 1),
            ("groups_per_shard", 1),
            ("threads", 0),
        ):
            if getattr(self, name) < low:
                raise PrepareError(f"{name}={getattr(self, name)}: expected at least {low}")
        for name in ("input", "output", "user_column", "item_column"):
            if not getattr(self, name):
                raise PrepareError(f"{name} is empty; it must be given")
        if self.min_rating is not None and not math.isfinite(self.min_rating):
            raise PrepareError(f"min_rating={self.min_rating}: expected a finite number")
        if "://" in self.output:
            raise PrepareError(f"output={self.output!r}: expected a local folder")


Progress = Callable[[str], None]


def prepare(settings: PrepareSettings, progress: Progress = lambda line: None) -> Manifest:
    """Writes the dataset and returns its manifest. Raises :class:`PrepareError`, leaving the output as it was."""
    try:
        source = _open_source(settings)
        with _output_folder(settings.output, settings.overwrite, progress) as (folder, work):
            with _Database(settings, work) as database:
                manifest = _build(settings, source, database, folder, progress)
        return manifest
    except SourceError as error:
        raise PrepareError(str(error)) from error
    except (OSError, duckdb.Error) as error:
        raise _explain(error, settings) from error


def _open_source(settings: PrepareSettings) -> Source:
    columns = Columns(
        user=settings.user_column,
        item=settings.item_column,
        rating=settings.rating_column if settings.min_rating is not None else "",
        time=settings.time_column,
    )
    if settings.source in _WHOLE_HISTORIES and settings.min_rating is not None:
        raise PrepareError(f"min_rating: source {settings.source} holds no ratings; use source recbole or table")
    if settings.source == "s3rec":
        return S3RecPair(settings.input, settings.attributes)
    if settings.source == "recbole":
        return RecBole(settings.input, settings.attributes, columns, settings.attribute_fields)
    kind = Table if settings.source == "table" else WebDatasetTars
    return kind(settings.input, settings.attributes, columns, settings.attribute_fields, settings.attribute_separator)


class _Database:
    """DuckDB on a file in ``work``, so that tables beyond the memory limit live on disk, compressed."""

    def __init__(self, settings: PrepareSettings, work: str) -> None:
        options: dict[str, Any] = {"memory_limit": settings.memory_limit, "temp_directory": os.path.join(work, "spill")}
        if settings.threads:
            options["threads"] = settings.threads
        try:
            self.connection = duckdb.connect(os.path.join(work, "prepare.duckdb"), config=options)
        except duckdb.ParserException as error:
            raise PrepareError(
                f"memory_limit={settings.memory_limit!r}: expected a size, as in 2GB or 500MB ({error})"
            ) from error

    def __enter__(self) -> _Database:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()

    def run(self, sql: str) -> None:
        self.connection.execute(sql)

    def row(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...]:
        row = self.connection.execute(sql, list(values)).fetchone()
        assert row is not None
        return row

    def number(self, sql: str) -> int:
        return int(self.row(sql)[0] or 0)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql).fetchall()

    def stream(self, sql: str) -> Iterator[pa.RecordBatch]:
        """The result, batch by batch, on a cursor of its own."""
        cursor = self.connection.cursor()
        try:
            yield from cursor.sql(sql).to_arrow_reader(FETCH_ROWS)
        finally:
            cursor.close()

    def load(self, table: str, columns: dict[str, str], batches: Iterator[pa.RecordBatch]) -> None:
        """Fills a new table; ``columns`` says its types where no batch comes."""
        made = False
        for batch in batches:  # a commit each: DuckDB holds open transactions in memory, outside its limit
            self.connection.register("batch", pa.Table.from_batches([batch]))
            names = ", ".join(batch.schema.names)
            head = f"INSERT INTO {table} ({names})" if made else f"CREATE TABLE {table} AS"
            self.run(f"{head} SELECT {names} FROM batch")
            self.connection.unregister("batch")
            made = True
        if not made:
            self.run(f"CREATE TABLE {table} ({', '.join(f'{name} {kind}' for name, kind in columns.items())})")


class _BadRows:
    """Counts malformed rows; stops at the first, or beyond the limit under ``skip``."""

    EXAMPLES = 10

    def __init__(self, settings: PrepareSettings) -> None:
        self.settings = settings
        self.count = 0
        self.examples: list[str] = []

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        if self.settings.on_bad_row == "error":
            raise PrepareError(f"{place}: {reason}; mend the input, or leave such rows out with --on-bad-row skip")
        if len(self.examples) < self.EXAMPLES:
            self.examples.append(f"{os.path.basename(place)}: {reason}")
        if self.count > self.settings.max_bad_rows:
            raise PrepareError(
                f"{place}: {reason}; this is bad row {self.count:,}, more than --max-bad-rows "
                f"{self.settings.max_bad_rows:,}"
            )


def _build(settings: PrepareSettings, source: Source, database: _Database, folder: str, progress: Progress) -> Manifest:
    facts: dict[str, Any] = {}
    bad = _BadRows(settings)
    _load_events(settings, source, database, bad, facts, progress)
    _load_attributes(settings, source, database, bad, facts)
    facts["bad_rows"], facts["bad_row_examples"] = bad.count, bad.examples
    _filter(settings, database, facts, progress)
    items = _number_items(settings, database, facts)
    _number_attributes(settings, database, facts)
    progress("writing sequences, in order of user and time")
    events = database.stream(
        "SELECT events.u, CAST(items.id AS INTEGER) AS item FROM events JOIN items ON items.i = events.i "
        "ORDER BY events.u, events.t, events.position"
    )
    users = database.stream("SELECT raw FROM users WHERE u IN (SELECT u FROM events) ORDER BY u")
    shards = write_shards(
        fold(events, users, settings.rows_per_group),
        os.path.join(folder, "shards"),
        settings.groups_per_shard,
        settings.format,
    )
    return new_manifest(
        folder,
        name=settings.name or _default_name(settings),
        format=settings.format,
        shards=shards,
        items=_items_table(database, items),
        attributes=_table(database.stream("SELECT id, field, raw FROM attributes ORDER BY id"), ATTRIBUTES_SCHEMA),
        preparation={"settings": _shaping_settings(settings), **facts},
        created_with=f"s3rec_dist {__version__}",
    )


def _load_events(
    settings: PrepareSettings,
    source: Source,
    database: _Database,
    bad: _BadRows,
    facts: dict[str, Any],
    progress: Progress,
) -> None:
    """The input as events(position, u, i, t), users(u, id, raw), catalogue(i, id, raw).

    u and i are a user's and an item's first positions: integers for the steps between, in order of first appearance.
    """
    progress(f"reading {', '.join(source.files[:3])}{' ...' if len(source.files) > 3 else ''}")
    database.load(
        "raw",
        {"position": "BIGINT", "user": "VARCHAR", "item": "VARCHAR"},
        source.events(lambda position, reason: bad.add(source.place(position), reason)),
    )
    facts["rows_read"] = database.number("SELECT count(*) FROM raw") + bad.count
    if not facts["rows_read"]:
        raise PrepareError(f"{settings.input}: no interactions; expected at least one row")
    if settings.source in _WHOLE_HISTORIES:
        _reject_second_lines(settings, source, database, bad)
    database.run(f"CREATE VIEW checked AS {_checked(settings, database)}")
    for position, reason in database.rows(
        f"SELECT position, reason FROM checked WHERE reason IS NOT NULL ORDER BY position LIMIT {_limit(settings)}"
    ):
        bad.add(source.place(position), reason)
    database.run(
        "CREATE TABLE users AS SELECT min(position) AS u, user AS id, CAST(user AS VARCHAR) AS raw "
        "FROM checked WHERE reason IS NULL GROUP BY user"
    )
    database.run(
        "CREATE TABLE catalogue AS SELECT min(position) AS i, item AS id, CAST(item AS VARCHAR) AS raw "
        "FROM checked WHERE reason IS NULL GROUP BY item"
    )
    enough = "" if settings.min_rating is None else f" AND rating >= {settings.min_rating!r}"
    database.run(
        "CREATE TABLE events AS SELECT checked.position, users.u, catalogue.i, checked.t FROM checked "
        "JOIN users ON users.id = checked.user JOIN catalogue ON catalogue.id = checked.item "
        f"WHERE reason IS NULL{enough}"
    )
    facts["users_read"] = database.number("SELECT count(*) FROM users")
    facts["items_read"] = database.number("SELECT count(*) FROM catalogue")
    valid = database.number("SELECT count(*) FROM checked WHERE reason IS NULL")
    facts["below_min_rating"] = valid - database.number("SELECT count(*) FROM events")
    database.run("DROP VIEW checked")
    database.run("DROP TABLE raw")


def _checked(settings: PrepareSettings, database: _Database) -> str:
    """SQL: the raw rows with a sortable time t, a numeric rating, and the reason why a row is malformed, else NULL."""
    kinds = dict(
        database.rows("SELECT column_name, data_type FROM information_schema.columns WHERE table_name = 'raw'")
    )
    reasons = []
    for name in ("user", "item"):
        empty = f" OR {name} = ''" if kinds[name] == "VARCHAR" else ""
        reasons.append(f"WHEN {name} IS NULL{empty} THEN 'empty {name} id'")
    if settings.ids == "keep":
        shown = "CAST(item AS VARCHAR)"
        reasons.append(
            f"WHEN NOT regexp_matches({shown}, '{INTEGER_ID}') "
            f"THEN concat('item id \"', {shown}, '\" cannot be kept, expected an integer from 1 to 999999999')"
        )
    rating, time_value = "0", "0"
    if "rating" in kinds:
        rating = "TRY_CAST(rating AS DOUBLE)"
        reasons.append(_not_a_number("rating", rating, True))
    if "time" in kinds:
        time_value, is_float = _time_value(database, kinds["time"])
        reasons.append(_not_a_number("time", time_value, is_float))
    return (
        f"SELECT position, user, item, {time_value} AS t, {rating} AS rating, "
        f"CASE {' '.join(reasons)} END AS reason FROM raw"
    )


def _time_value(database: _Database, kind: str) -> tuple[str, bool]:
    """SQL for a sortable time, and whether it is a float. Text is integers where all of it is, else dates or floats."""
    if kind != "VARCHAR":
        return "time", kind in ("DOUBLE", "FLOAT")
    first = database.rows("SELECT time FROM raw WHERE time <> '' ORDER BY position LIMIT 1")
    if (
        first
        and database.row("SELECT TRY_CAST($1 AS DOUBLE) IS NULL AND TRY_CAST($1 AS TIMESTAMP) IS NOT NULL", first[0])[0]
    ):
        return "TRY_CAST(time AS TIMESTAMP)", False
    if database.row("SELECT bool_and(regexp_matches(time, '^-?[0-9]{1,18}$')) FROM raw")[0]:
        return "TRY_CAST(time AS BIGINT)", False
    return "TRY_CAST(time AS DOUBLE)", True


def _not_a_number(name: str, value: str, is_float: bool) -> str:
    """SQL: WHEN the value is missing, not a number, NaN (which sorts above all numbers) or infinite."""
    infinite = f" OR NOT abs({value}) <= {sys.float_info.max!r}" if is_float else ""
    kind = "date" if "TIMESTAMP" in value else "finite number"
    return f"WHEN {value} IS NULL{infinite} THEN concat('{name} \"', CAST({name} AS VARCHAR), '\" is not a {kind}')"


def _reject_second_lines(settings: PrepareSettings, source: Source, database: _Database, bad: _BadRows) -> None:
    """Where a line or sample is a user's whole history, a second one of the same user is malformed."""
    line = f"position >> {LINE_BITS}"
    repeated = database.rows(
        f"SELECT min(position), min(user) FROM (SELECT position, user, {line} AS line, "
        f"min({line}) OVER (PARTITION BY user) AS first FROM raw) AS lines "
        f"WHERE line > first GROUP BY line ORDER BY line LIMIT {_limit(settings)}"
    )
    for position, user in repeated:
        bad.add(source.place(position), f"user {user!r} has a {_WHOLE_HISTORIES[settings.source]} already")
    if repeated:
        lines = ", ".join(str(position >> LINE_BITS) for position, _ in repeated)
        database.run(f"DELETE FROM raw WHERE {line} IN ({lines})")


def _load_attributes(
    settings: PrepareSettings, source: Source, database: _Database, bad: _BadRows, facts: dict[str, Any]
) -> None:
    """The attribute file as described(position, item, field, value)."""
    before = bad.count
    database.load(
        "described",
        {"position": "BIGINT", "item": "VARCHAR", "field": "VARCHAR", "value": "VARCHAR"},
        source.attributes(lambda position, reason: bad.add(source.attribute_place(position), reason)),
    )
    facts["attribute_rows_read"] = database.number("SELECT count(*) FROM described") + bad.count - before
    for (position,) in database.rows(
        "SELECT DISTINCT position FROM described WHERE item IS NULL OR item = '' "
        f"ORDER BY position LIMIT {_limit(settings)}"
    ):
        bad.add(source.attribute_place(position), "empty item id")


def _filter(settings: PrepareSettings, database: _Database, facts: dict[str, Any], progress: Progress) -> None:
    """Duplicates, k-core and short users, on events."""
    duplicate = {
        "keep": "",
        "drop_consecutive": "lag(i) OVER (PARTITION BY u ORDER BY t, position) = i",
        "drop_repeats": "row_number() OVER (PARTITION BY u, i ORDER BY t, position) > 1",
    }[settings.duplicates]
    facts["duplicates_dropped"] = 0
    if duplicate:
        progress("dropping duplicates")
        facts["duplicates_dropped"] = _narrow(
            database,
            "SELECT position, u, i, t FROM "
            f"(SELECT position, u, i, t, COALESCE({duplicate}, FALSE) AS is_duplicate FROM events) AS marked "
            "WHERE NOT is_duplicate",
        )

    facts["core_rounds"], facts["users_dropped_by_core"], facts["items_dropped_by_core"] = 0, 0, 0
    if max(settings.min_user_count, settings.min_item_count) > 1:
        users, items = database.row("SELECT count(DISTINCT u), count(DISTINCT i) FROM events")
        while dropped := _narrow(
            database,
            "SELECT position, u, i, t FROM events WHERE "
            f"u IN (SELECT u FROM events GROUP BY u HAVING count(*) >= {settings.min_user_count}) AND "
            f"i IN (SELECT i FROM events GROUP BY i HAVING count(*) >= {settings.min_item_count})",
        ):
            facts["core_rounds"] += 1
            progress(f"k-core round {facts['core_rounds']}: {dropped:,} interactions dropped")
        left = database.row("SELECT count(DISTINCT u), count(DISTINCT i) FROM events")
        facts["users_dropped_by_core"], facts["items_dropped_by_core"] = users - left[0], items - left[1]

    facts["short_user_interactions"] = _narrow(
        database,
        "SELECT position, u, i, t FROM events WHERE "
        f"u IN (SELECT u FROM events GROUP BY u HAVING count(*) >= {MIN_SEQUENCE})",
    )
    users = database.number("SELECT count(DISTINCT u) FROM events")
    facts["short_users"] = facts["users_read"] - facts["users_dropped_by_core"] - users
    if not users:
        raise PrepareError(
            f"{settings.input}: no user is left with at least {MIN_SEQUENCE} interactions, of "
            f"{facts['users_read']:,} users and {facts['rows_read']:,} rows read; loosen the thresholds "
            f"({facts['below_min_rating']:,} rows under min_rating, {facts['duplicates_dropped']:,} duplicates, "
            f"{facts['users_dropped_by_core']:,} users under the k-core)"
        )
    longest = database.number("SELECT max(n) FROM (SELECT count(*) AS n FROM events GROUP BY u) AS lengths")
    if longest >> SAMPLE_END_BITS:
        raise PrepareError(
            f"{settings.input}: a user has {longest:,} interactions, more than {(1 << SAMPLE_END_BITS) - 1:,}; "
            "drop duplicates or cut the history"
        )


def _narrow(database: _Database, query: str) -> int:
    """Replaces events by ``query``'s rows; returns how many went."""
    before = database.number("SELECT count(*) FROM events")
    database.run(f"CREATE TABLE narrowed AS {query}")
    database.run("DROP TABLE events")
    database.run("ALTER TABLE narrowed RENAME TO events")
    return before - database.number("SELECT count(*) FROM events")


def _number_items(settings: PrepareSettings, database: _Database, facts: dict[str, Any]) -> int:
    """items(i, id, raw, n) with ids 1..N; returns N. A kept id that nobody interacted with has a row too, n = 0."""
    known, whole, largest = database.row(
        f"SELECT count(*), bool_and(regexp_matches(raw, '{INTEGER_ID}')), max(TRY_CAST(raw AS BIGINT)) FROM catalogue"
    )
    keep = settings.ids == "keep" or (
        settings.ids == "auto" and settings.source == "s3rec" and whole and largest == known
    )
    facts["ids"] = "keep" if keep else "count"
    if not keep:
        database.run(
            "CREATE TABLE items AS SELECT counts.i, row_number() OVER (ORDER BY n DESC, raw) AS id, raw, n "
            "FROM (SELECT i, count(*) AS n FROM events GROUP BY i) AS counts "
            "JOIN catalogue ON catalogue.i = counts.i"
        )
        return database.number("SELECT count(*) FROM items")
    if largest > SPARSE_IDS + 10 * known:
        raise PrepareError(
            f"{settings.input}: ids=keep with ids up to {largest:,} for {known:,} items would make a table of mostly "
            "unused rows; use --ids count"
        )
    database.run(
        "CREATE TABLE items AS SELECT catalogue.i, ids.id, CAST(ids.id AS VARCHAR) AS raw, COALESCE(counts.n, 0) AS n "
        f"FROM (SELECT range AS id FROM range(1, {largest + 1})) AS ids "
        "LEFT JOIN catalogue ON catalogue.raw = CAST(ids.id AS VARCHAR) "
        "LEFT JOIN (SELECT i, count(*) AS n FROM events GROUP BY i) AS counts ON counts.i = catalogue.i"
    )
    return int(largest)


def _number_attributes(settings: PrepareSettings, database: _Database, facts: dict[str, Any]) -> int:
    """attributes(id, field, raw) with ids 1..A and item_attributes(item, attribute); returns A."""
    database.run(
        "CREATE TABLE item_values AS SELECT DISTINCT items.id AS item, field, value FROM described "
        "JOIN items ON items.raw = described.item"
    )
    facts["described_items_unknown"] = database.number(
        "SELECT count(DISTINCT item) FROM described WHERE item <> '' AND item NOT IN (SELECT raw FROM items)"
    )
    whole, largest, known = database.row(
        f"SELECT bool_and(regexp_matches(value, '{INTEGER_ID}')), max(TRY_CAST(value AS BIGINT)), "
        "count(DISTINCT value) FROM described"
    )
    keep = settings.source == "s3rec" and facts["ids"] == "keep" and whole and largest <= SPARSE_IDS + 10 * known
    facts["attribute_ids"] = "keep" if keep else "count"
    if keep:
        database.run(
            f"CREATE TABLE attributes AS SELECT range AS id, '{S3RecPair.FIELD}' AS field, "
            f"CAST(range AS VARCHAR) AS raw FROM range(1, {largest + 1})"
        )
    else:
        database.run(
            "CREATE TABLE attributes AS SELECT row_number() OVER (ORDER BY n DESC, field, value) AS id, field, "
            "value AS raw FROM (SELECT field, value, count(*) AS n FROM item_values GROUP BY field, value) AS counts"
        )
    database.run(
        "CREATE TABLE item_attributes AS SELECT item, attributes.id AS attribute FROM item_values "
        "JOIN attributes ON attributes.field = item_values.field AND attributes.raw = item_values.value"
    )
    facts["items_without_attributes"] = database.number(
        "SELECT count(*) FROM items WHERE n > 0 AND id NOT IN (SELECT item FROM item_attributes)"
    )
    return database.number("SELECT max(id) FROM attributes")


def _items_table(database: _Database, items: int) -> pa.Table:
    pairs = _table(
        database.stream("SELECT item, attribute FROM item_attributes ORDER BY item, attribute"),
        pa.schema([("item", pa.int32()), ("attribute", pa.int32())]),
    )
    offsets = np.searchsorted(pairs.column("item").to_numpy(), np.arange(1, items + 2)).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pairs.column("attribute").combine_chunks())
    catalogue = _table(
        database.stream("SELECT id, raw, n FROM items ORDER BY id"),
        pa.schema([("id", pa.int32()), ("raw", pa.string()), ("n", pa.int64())]),
    )
    return pa.Table.from_arrays([*catalogue.columns, lists], schema=ITEMS_SCHEMA)


def _table(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    pieces = [pa.Table.from_batches([batch]).cast(schema) for batch in batches]
    return pa.concat_tables(pieces) if pieces else schema.empty_table()


def fold(events: Iterator[pa.RecordBatch], users: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Sorted (u, item) rows, and each u's raw id in the same order, as batches of ``rows`` (user, items) rows."""
    names = _Names(users)
    u, items = np.empty(0, np.int64), np.empty(0, np.int32)
    for batch in events:
        u = np.concatenate([u, batch.column(0).to_numpy()])
        items = np.concatenate([items, batch.column(1).to_numpy()])
        starts = np.flatnonzero(np.diff(u, prepend=-1))
        done = 0
        while len(starts) - done > rows:  # the last user may go on in the next batch
            yield _group(starts[done : done + rows + 1], items, names)
            done += rows
        if done:
            u, items = u[starts[done] :], items[starts[done] :]
    starts = np.flatnonzero(np.diff(u, prepend=-1))
    for done in range(0, len(starts), rows):
        yield _group(np.append(starts, len(u))[done : done + rows + 1], items, names)


def _group(starts: np.ndarray, items: np.ndarray, names: _Names) -> pa.RecordBatch:
    """The users whose items begin at ``starts[:-1]`` and end at ``starts[1:]``."""
    offsets = pa.array((starts - starts[0]).astype(np.int32))
    lists = pa.ListArray.from_arrays(offsets, pa.array(items[starts[0] : starts[-1]], pa.int32()))
    return pa.RecordBatch.from_arrays([names.take(len(starts) - 1), lists], schema=SHARD_SCHEMA)


class _Names:
    """Takes the next raw ids from a stream of batches."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._rest = pa.array([], pa.string())

    def take(self, rows: int) -> pa.Array:
        pieces = [self._rest]
        while sum(map(len, pieces)) < rows:
            pieces.append(next(self._batches).column(0).cast(pa.string()))
        names = pa.concat_arrays(pieces)
        self._rest = names.slice(rows)
        return names.slice(0, rows)


def _limit(settings: PrepareSettings) -> int:
    """Bad rows worth looking at: one more than may be skipped."""
    return settings.max_bad_rows + 1


def _default_name(settings: PrepareSettings) -> str:
    """The file's or folder's name; of a pattern, that of the folder it looks in."""
    parts = os.path.abspath(settings.input).split(os.sep)
    plain = [part for part in parts if not glob.has_magic(part)]
    return os.path.splitext(plain[-1])[0] or "dataset"


def _shaping_settings(settings: PrepareSettings) -> dict[str, Any]:
    """The settings that decide what the dataset holds; of paths only the last part, so that folders do not matter."""
    shaping = dataclasses.asdict(settings)
    for name in ("output", "name", "format", "memory_limit", "threads", "overwrite"):
        del shaping[name]
    for name in ("input", "attributes"):
        shaping[name] = os.path.basename(shaping[name].rstrip("/"))
    shaping["attribute_fields"] = list(settings.attribute_fields)
    return shaping


@contextlib.contextmanager
def _output_folder(output: str, overwrite: bool, progress: Progress) -> Iterator[tuple[str, str]]:
    """(dataset folder, scratch folder) beside ``output``; the first takes its place when the block ends well."""
    output = os.path.abspath(output)
    if os.path.lexists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        if not overwrite:
            raise PrepareError(f"{output}: exists already; choose another output, or pass --overwrite to replace it")
        if not os.path.isfile(os.path.join(output, "manifest.json")):
            raise PrepareError(f"{output}: not a dataset, so --overwrite leaves it alone; choose another output")
    parent, name = os.path.split(output)
    os.makedirs(parent, exist_ok=True)
    for leftover in glob.glob(os.path.join(glob.escape(parent), f".{glob.escape(name)}.partial-*")):
        progress(f"{leftover}: left by a preparation that was killed or still runs; remove it if none does")
    partial = tempfile.mkdtemp(prefix=f".{name}.partial-", dir=parent)
    try:
        folder, work = os.path.join(partial, "dataset"), os.path.join(partial, "work")
        os.mkdir(folder)
        os.mkdir(work)
        yield folder, work
        put_in_place(folder, output, os.path.join(partial, "replaced"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _explain(error: Exception, settings: PrepareSettings) -> PrepareError:
    text = str(error)
    first_line = text.strip().splitlines()[0] if text.strip() else "no details"
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "max_temp_directory_size" in text:
        return PrepareError(
            f"{settings.output}: no room on the output's disk ({first_line}); free some space or choose an output on "
            "another disk. Nothing has been changed"
        )
    if isinstance(error, duckdb.OutOfMemoryException) or "Out of Memory" in text:
        return PrepareError(
            f"memory_limit={settings.memory_limit}: too small for this input ({first_line}); raise --memory-limit"
        )
    if isinstance(error, OSError):
        return PrepareError(f"{error.filename or settings.output}: {error.strerror or error}")
    return PrepareError(f"{settings.input}: DuckDB could not prepare it ({first_line})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec prepare``."""
    defaults = PrepareSettings(source="s3rec", input="-", output="-")

    def option(group: Any, name: str, help: str, **more: Any) -> None:
        default = getattr(defaults, name)
        shown = f" (default: {default})" if default not in ("", None, (), False) else ""
        group.add_argument(f"--{name.replace('_', '-')}", default=default, help=help + shown, **more)

    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--source",
        required=True,
        choices=("s3rec", "recbole", "table", "webdataset"),
        help="what the input is: NAME.txt with NAME_item2attributes.json; RecBole atomic files; "
        "Parquet, CSV, JSONL with a row per interaction; or tars with a sample per user, KEY.npy, .json or .txt",
    )
    group.add_argument("--input", required=True, help="file or folder; for tables and tars also a pattern")
    group.add_argument("--output", required=True, help="dataset folder to write")
    option(group, "name", "the dataset's name; by default the input's")
    group.add_argument("--overwrite", action="store_true", help="replace the output if it is a dataset already")
    group = parser.add_argument_group("columns and attributes")
    option(group, "user_column", "user id", metavar="NAME")
    option(group, "item_column", "item id", metavar="NAME")
    option(group, "time_column", "time; '' takes the input's own order", metavar="NAME")
    option(group, "rating_column", "rating, read where --min-rating is given", metavar="NAME")
    option(
        group, "attributes", "attribute file; by default the one beside the input; none goes without", metavar="FILE"
    )
    option(
        group,
        "attribute_fields",
        "fields of the attribute file; by default every token_seq field of RecBole's .item",
        nargs="+",
        metavar="FIELD",
    )
    option(group, "attribute_separator", "splits text attributes of tables, as '|' in Comedy|Drama", metavar="TEXT")
    group = parser.add_argument_group("filters, in this order, and ids")
    option(group, "min_rating", "drop interactions rated lower", type=float, metavar="R")
    option(
        group,
        "duplicates",
        "a user's repeats of an item: keep, drop those that follow each other, or all but the first",
        choices=("keep", "drop_consecutive", "drop_repeats"),
    )
    option(group, "min_user_count", "k-core: drop users with fewer interactions; 0 is off", type=int, metavar="K")
    option(group, "min_item_count", "k-core: drop items with fewer interactions; 0 is off", type=int, metavar="K")
    option(
        group,
        "ids",
        "item ids: keep raw integers, or number by descending count; auto keeps an S3-Rec pair's 1..N",
        choices=("auto", "keep", "count"),
    )
    group = parser.add_argument_group("bad rows")
    option(group, "on_bad_row", "stop at a malformed row, or count it and go on", choices=("error", "skip"))
    option(group, "max_bad_rows", "bad rows beyond which skip stops too", type=int, metavar="N")
    group = parser.add_argument_group("shards and resources")
    option(
        group,
        "format",
        "of the shards: parquet, or plain tars that the webdataset library reads",
        choices=("parquet", "webdataset"),
    )
    option(group, "rows_per_group", "users per row group", type=int, metavar="N")
    option(group, "groups_per_shard", "row groups per shard file", type=int, metavar="N")
    option(group, "memory_limit", "DuckDB's memory; it spills beside the output beyond it", metavar="SIZE")
    option(group, "threads", "DuckDB's threads; 0 is one per core", type=int, metavar="N")


def run(args: argparse.Namespace) -> None:
    """``s3rec prepare``: progress on stderr, a summary on stdout. Raises :class:`PrepareError`."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(PrepareSettings)}
    values["attribute_fields"] = tuple(values["attribute_fields"])
    settings = PrepareSettings(**values)
    start = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that scratch files are removed
    manifest = prepare(settings, progress)
    print(summary(manifest, settings.output, time.monotonic() - start))


def summary(manifest: Manifest, output: str, seconds: float) -> str:
    """What a person wants to know of a new dataset."""
    facts = manifest.preparation
    lines = [
        f"{manifest.name} -> {output}",
        f"  users         {manifest.users:>12,}",
        f"  items         {manifest.items:>12,}",
        f"  interactions  {manifest.interactions:>12,}",
        f"  attributes    {manifest.attributes:>12,}",
        f"  mean length   {manifest.interactions / manifest.users:>12.2f}",
        f"  density       {manifest.interactions / manifest.users / manifest.items:>12.4%}",
        f"  shards        {len(manifest.shards):>12,}",
        f"  seconds       {seconds:>12.1f}",
    ]
    left_out = {
        "bad rows": facts["bad_rows"],
        "rows under the rating threshold": facts["below_min_rating"],
        "duplicates": facts["duplicates_dropped"],
        "users under the k-core": facts["users_dropped_by_core"],
        "items under the k-core": facts["items_dropped_by_core"],
        f"users with fewer than {MIN_SEQUENCE} interactions": facts["short_users"],
    }
    told = [f"{count:,} {what}" for what, count in left_out.items() if count]
    if told:
        lines.append(f"  left out: {', '.join(told)}")
    lines += [f"    {example}" for example in facts["bad_row_examples"]]
    return "\n".join(lines)
