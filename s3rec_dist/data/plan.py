"""What prepare does, as SQL that DuckDB and Spark run alike: raw interactions -> checked, filtered, numbered events.

    raw        position, user, item[, rating][, time]     as the source gives them
    checked    raw and t, a sortable time, enough, whether it is rated well, and reason, why a row is malformed, or NULL
    valid      position, user, item, t, enough             without malformed rows; in append, with what was left over
    users      u, id, raw                                  u = 1.. in order of first appearance
    catalogue  i, id, raw                                  i likewise
    offered    position, u, i, t                           events that count: well rated, no duplicates
    core       position, u, i, t                           those of users and items that pass the k-core
    events     position, u, i, t                           those of users who are long enough
    kept       u                                           those users
    counts     i, n                                        items in events
    items      i, id, raw, n                               the ids of the dataset, with i NULL where nobody has met one
    attributes, item_attributes

    known_users, known_items                               u and i that need not pass the k-core: none, but in append

Every order and tie is decided in the SQL, so that equal input gives equal rows.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from s3rec_dist.data.dataset import ATTRIBUTES_SCHEMA, ITEMS_SCHEMA, MIN_SEQUENCE
from s3rec_dist.data.engines import Engine, number, row
from s3rec_dist.data.fold import Cut
from s3rec_dist.data.formats import parquet_writer, sync_file
from s3rec_dist.data.output import Progress
from s3rec_dist.data.sources import LINE_BITS, S3RecPair, Source, Table

if TYPE_CHECKING:
    from s3rec_dist.data.prepare import PrepareSettings

Facts = dict[str, Any]

WHOLE_HISTORIES = {"s3rec": "line", "webdataset": "sample"}
"""Sources that give a user's whole history at once, and what in."""

INTEGER_ID = "^[1-9][0-9]{0,8}$"
"""Raw ids that can be ids as they are."""

SPARSE_IDS = 1_000_000
"""Kept ids may reach this, plus ten times the ids that are used."""

INTEGER = "^-?[0-9]{1,18}$"
FLOAT = "^ *[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)? *$"
DATE = (
    "^[0-9]{4}-[0-9]{2}-[0-9]{2}([ T]([01][0-9]|2[0-3]):[0-9]{2}"
    "(:[0-9]{2}([.][0-9]{1,9})?(Z|[+-](0[0-9]|1[0-4])(:?[0-9]{2})?)?)?)?$"
)
"""Texts that engines read alike, as an integer, a float and a moment."""

RAW_SCHEMA = pa.schema([("position", pa.int64()), ("user", pa.string()), ("item", pa.string())])
DESCRIBED_SCHEMA = pa.schema(
    [("position", pa.int64()), ("item", pa.string()), ("field", pa.string()), ("value", pa.string())]
)


class PrepareError(ValueError):
    """Input or settings that cannot become a dataset; nothing has been written to the output."""


class BadRows:
    """Counts malformed rows; stops at the first, or beyond the limit under ``skip``."""

    EXAMPLES = 10

    def __init__(self, settings: PrepareSettings) -> None:
        self.settings = settings
        self.count = 0
        self.examples: list[str] = []

    @property
    def limit(self) -> int:
        """Bad rows worth looking at: one more than may be skipped."""
        return self.settings.max_bad_rows + 1

    def add(self, place: str, reason: str) -> None:
        """Counts one. Raises :class:`PrepareError`."""
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


@dataclass(frozen=True)
class Time:
    """What the input's times are."""

    kind: str
    """'order' where the input's own order is time, 'date' for text (microseconds since 1970), 'integer' or 'float'."""
    sql: str
    """A sortable value of the raw column, NULL where it is none."""


@dataclass(frozen=True)
class Before:
    """The dataset that events are appended to, whose leftover(position, user, item, t) the engine has."""

    time_kind: str
    last_time: Any
    """Its newest event's time; None where input order is time."""


def load_events(
    settings: PrepareSettings,
    source: Source,
    engine: Engine,
    bad: BadRows,
    facts: Facts,
    progress: Progress,
    before: Before | None = None,
) -> None:
    """The input as offered, users and catalogue."""
    progress(f"reading {', '.join(source.files[:3])}{' ...' if len(source.files) > 3 else ''}")
    lake = source.lake() if isinstance(source, Table) else None
    if lake is not None:
        engine.scan("raw", lake)
        kinds = lake.kinds()
    else:
        batches = source.events(lambda position, reason: bad.add(source.place(position), reason))
        kinds = {field.name: field.type for field in engine.load("raw", RAW_SCHEMA, batches)}
    read = number(engine, "SELECT count(*) FROM raw")
    if lake is not None and read != lake.rows:
        raise PrepareError(f"{settings.input}: {read:,} of {lake.rows:,} rows were found; does something write to it?")
    facts["rows_read"] = read + bad.count
    if not facts["rows_read"]:
        raise PrepareError(f"{settings.input}: no interactions; expected at least one row")
    if settings.source in WHOLE_HISTORIES:
        _reject_second_histories(settings, source, engine, bad)
    time = _time(engine, kinds, before.time_kind if before else "")
    engine.view("checked", _checked(settings, kinds, time, before))
    rows, wrong, low = row(
        engine, "SELECT count(*), count(reason), count(*) FILTER (WHERE reason IS NULL AND NOT enough) FROM checked"
    )
    if wrong:
        _tell_bad_rows(source, engine, kinds, time, bad)
    facts["below_min_rating"] = low
    if before and rows == wrong + low:
        raise PrepareError(f"{settings.input}: nothing to append: none of its {facts['rows_read']:,} rows is left")
    where = " WHERE reason IS NULL" if wrong else ""
    if before is None:
        engine.view("valid", f"SELECT position, user, item, t, enough FROM checked{where}")
    else:
        engine.view(
            "valid",
            "SELECT position, user, item, t, TRUE AS enough FROM leftover UNION ALL SELECT position, "
            f"CAST(user AS STRING) AS user, CAST(item AS STRING) AS item, t, enough FROM checked{where}",
        )
    engine.table("users", f"SELECT number AS u, id, raw FROM ({_appearances('user')}) AS seen")
    engine.table("catalogue", f"SELECT number AS i, id, raw FROM ({_appearances('item')}) AS seen")
    engine.table(
        "offered",
        "SELECT valid.position, users.u, catalogue.i, valid.t FROM valid JOIN users ON users.id = valid.user "
        f"JOIN catalogue ON catalogue.id = valid.item{' WHERE enough' if low else ''}",
    )
    engine.drop("raw")
    engine.view("known_users", "SELECT u FROM users WHERE FALSE")
    engine.view("known_items", "SELECT i FROM catalogue WHERE FALSE")
    facts["users_read"] = number(engine, "SELECT count(*) FROM users")
    facts["items_read"] = number(engine, "SELECT count(*) FROM catalogue")
    facts["time_kind"], facts["last_time"] = time.kind, None
    if time.kind != "order":
        facts["last_time"] = row(engine, "SELECT max(t) FROM offered")[0]


def _appearances(column: str) -> str:
    """SQL: the distinct ids of a column, numbered from 1 in order of first appearance."""
    return (
        "SELECT CAST(row_number() OVER (ORDER BY first_position) AS INTEGER) AS number, id, CAST(id AS STRING) AS raw "
        f"FROM (SELECT {column} AS id, min(position) AS first_position FROM valid GROUP BY {column}) AS ids"
    )


def _time(engine: Engine, kinds: dict[str, pa.DataType], known_kind: str) -> Time:
    """How raw times are read, as ``known_kind`` where there is one. Text is otherwise integers where all of it is, else
    dates where the first one is, else floats."""
    if "time" not in kinds:
        return Time("order", "CAST(0 AS BIGINT)")
    if not pa.types.is_string(kinds["time"]):
        kind = "integer" if pa.types.is_integer(kinds["time"]) else "float"
        if known_kind not in ("", kind, "float"):
            raise PrepareError(f"times are of kind {kind}, those of the dataset of kind {known_kind}; give them alike")
        if "float" in (known_kind, kind):
            return Time("float", "CAST(time AS DOUBLE)")
        return Time("integer", "TRY_CAST(time AS BIGINT)")
    first = engine.rows("SELECT time FROM raw WHERE time <> '' ORDER BY position LIMIT 1")
    is_date = bool(first) and re.fullmatch(DATE, first[0][0]) is not None
    if known_kind == "date" or (not known_kind and is_date):
        return Time("date", f"CASE WHEN regexp_like(time, '{DATE}') THEN unix_micros(try_to_timestamp(time)) END")
    integer = f"regexp_like(time, '{INTEGER}')"
    if known_kind == "integer":
        return Time("integer", f"CASE WHEN {integer} THEN TRY_CAST(time AS BIGINT) END")
    if not known_kind and row(engine, f"SELECT bool_and({integer}) FROM raw")[0]:
        return Time("integer", "TRY_CAST(time AS BIGINT)")
    return Time("float", _float("time"))


def _float(column: str) -> str:
    return f"CASE WHEN regexp_like({column}, '{FLOAT}') THEN TRY_CAST({column} AS DOUBLE) END"


def _checked(settings: PrepareSettings, kinds: dict[str, pa.DataType], time: Time, before: Before | None) -> str:
    """SQL for checked; a reason is the name of the column at fault, 'kept' for an item id that cannot be kept, or
    'late' for an event older than the dataset."""
    reasons = []
    for name in ("user", "item"):
        empty = f" OR {name} = ''" if pa.types.is_string(kinds[name]) else ""
        reasons.append(f"WHEN {name} IS NULL{empty} THEN '{name}'")
    if settings.ids == "keep":
        reasons.append(f"WHEN NOT regexp_like(CAST(item AS STRING), '{INTEGER_ID}') THEN 'kept'")
    enough = "TRUE"
    if "rating" in kinds:
        score = _float("rating") if pa.types.is_string(kinds["rating"]) else "CAST(rating AS DOUBLE)"
        reasons.append(_not_finite("rating", score, is_float=True))
        enough = f"{score} >= {_literal(float(settings.min_rating or 0))}"
    if "time" in kinds:
        reasons.append(_not_finite("time", time.sql, time.kind == "float"))
        if before:
            reasons.append(f"WHEN {time.sql} < {_literal(before.last_time)} THEN 'late'")
    return f"SELECT *, {time.sql} AS t, {enough} AS enough, CASE {' '.join(reasons)} END AS reason FROM raw"


def _literal(value: int | float) -> str:
    return f"CAST('{value!r}' AS {'BIGINT' if isinstance(value, int) else 'DOUBLE'})"


def _not_finite(name: str, value: str, is_float: bool) -> str:
    """SQL: WHEN the value is missing, not a number, NaN (which sorts above all numbers) or infinite."""
    infinite = f" OR NOT abs({value}) <= {_literal(sys.float_info.max)}" if is_float else ""
    return f"WHEN {value} IS NULL{infinite} THEN '{name}'"


def _tell_bad_rows(source: Source, engine: Engine, kinds: dict[str, pa.DataType], time: Time, bad: BadRows) -> None:
    names = [name for name in ("item", "rating", "time") if name in kinds]
    for position, reason, *values in engine.rows(
        f"SELECT position, reason, {', '.join(names)} FROM checked WHERE reason IS NOT NULL "
        f"ORDER BY position LIMIT {bad.limit}"
    ):
        texts = {name: "" if value is None else str(value) for name, value in zip(names, values, strict=True)}
        number_kind = "date" if reason == "time" and time.kind == "date" else "finite number"
        told = {
            "user": "empty user id",
            "item": "empty item id",
            "kept": f'item id "{texts["item"]}" cannot be kept, expected an integer from 1 to 999999999',
            "late": f'time "{texts.get("time")}" is older than the newest in the dataset',
        }.get(reason) or f'{reason} "{texts[reason]}" is not a {number_kind}'
        bad.add(source.place(position), told)


def _reject_second_histories(settings: PrepareSettings, source: Source, engine: Engine, bad: BadRows) -> None:
    """Where a line or sample is a user's whole history, a second one of the same user is malformed."""
    engine.table("firsts", f"SELECT user, min(position >> {LINE_BITS}) AS line FROM raw GROUP BY user")
    joined = f"FROM raw JOIN firsts ON firsts.user = raw.user WHERE (raw.position >> {LINE_BITS})"
    repeated = engine.rows(
        f"SELECT min(raw.position), min(raw.user) {joined} > firsts.line "
        f"GROUP BY raw.position >> {LINE_BITS} ORDER BY 1 LIMIT {bad.limit}"
    )
    for position, user in repeated:
        bad.add(source.place(position), f"user {user!r} has a {WHOLE_HISTORIES[settings.source]} already")
    if repeated:
        engine.table("raw", f"SELECT raw.* {joined} = firsts.line")
    engine.drop("firsts")


def load_attributes(source: Source, engine: Engine, bad: BadRows, facts: Facts) -> None:
    """The attribute file as described(position, item, field, value)."""
    before = bad.count
    batches = source.attributes(lambda position, reason: bad.add(source.attribute_place(position), reason))
    engine.load("described", DESCRIBED_SCHEMA, batches)
    facts["attribute_rows_read"] = number(engine, "SELECT count(*) FROM described") + bad.count - before
    for (position,) in engine.rows(
        f"SELECT DISTINCT position FROM described WHERE item IS NULL OR item = '' ORDER BY position LIMIT {bad.limit}"
    ):
        bad.add(source.attribute_place(position), "empty item id")


def filter_events(settings: PrepareSettings, engine: Engine, facts: Facts, progress: Progress) -> None:
    """Duplicates on offered; then events, without what falls to the k-core and users who are too short."""
    duplicate = {
        "keep": "",
        "drop_consecutive": "lag(i) OVER (PARTITION BY u ORDER BY t, position) = i",
        "drop_repeats": "row_number() OVER (PARTITION BY u, i ORDER BY t, position) > 1",
    }[settings.duplicates]
    facts["duplicates_dropped"] = 0
    if duplicate:
        progress("dropping duplicates")
        facts["duplicates_dropped"] = narrow(
            engine,
            "offered",
            "SELECT position, u, i, t FROM "
            f"(SELECT position, u, i, t, COALESCE({duplicate}, FALSE) AS is_duplicate FROM offered) AS marked "
            "WHERE NOT is_duplicate",
        )
    engine.view("core", "SELECT * FROM offered")
    facts["core_rounds"], facts["users_dropped_by_core"], facts["items_dropped_by_core"] = 0, 0, 0
    if max(settings.min_user_count, settings.min_item_count) > 1:
        before = _distinct(engine)
        while dropped := _drop_weak(settings, engine):
            facts["core_rounds"] += 1
            progress(f"k-core round {facts['core_rounds']}: {dropped:,} interactions dropped")
        users, items = _distinct(engine)
        facts["users_dropped_by_core"], facts["items_dropped_by_core"] = before[0] - users, before[1] - items
    engine.table("lengths", "SELECT u, count(*) AS n FROM core GROUP BY u")
    engine.table("short", f"SELECT u, n FROM lengths WHERE n < {MIN_SEQUENCE} AND u NOT IN (SELECT u FROM known_users)")
    engine.table("kept", "SELECT u FROM lengths WHERE u NOT IN (SELECT u FROM short)")
    short, interactions = row(engine, "SELECT count(*), sum(n) FROM short")
    where = " WHERE u NOT IN (SELECT u FROM short)" if short else ""
    engine.view("events", f"SELECT position, u, i, t FROM core{where}")
    engine.table("counts", COUNTS)
    users = number(engine, "SELECT count(*) FROM kept")
    facts["short_users"] = facts["users_read"] - facts["users_dropped_by_core"] - users
    facts["short_user_interactions"] = interactions or 0


COUNTS = "SELECT i, count(*) AS n FROM events GROUP BY i"


def require_users(settings: PrepareSettings, engine: Engine, facts: Facts) -> None:
    """Raises :class:`PrepareError` where the filters left nobody."""
    if not number(engine, "SELECT count(*) FROM kept"):
        raise PrepareError(
            f"{settings.input}: no user is left with at least {MIN_SEQUENCE} interactions, of "
            f"{facts['users_read']:,} users and {facts['rows_read']:,} rows read; loosen the thresholds "
            f"({facts['below_min_rating']:,} rows under min_rating, {facts['duplicates_dropped']:,} duplicates, "
            f"{facts['users_dropped_by_core']:,} users under the k-core)"
        )


def narrow(engine: Engine, table: str, query: str) -> int:
    """Replaces a table by ``query``'s rows; returns how many went."""
    before = number(engine, f"SELECT count(*) FROM {table}")
    engine.table(table, query)
    return before - number(engine, f"SELECT count(*) FROM {table}")


def _drop_weak(settings: PrepareSettings, engine: Engine) -> int:
    """One round of the k-core; returns how many events went. What is known already may stay."""
    conditions = []
    for table, column, least in (("users", "u", settings.min_user_count), ("items", "i", settings.min_item_count)):
        if least > 1:
            engine.table(
                f"weak_{table}",
                f"SELECT {column} FROM core GROUP BY {column} HAVING count(*) < {least} "
                f"AND {column} NOT IN (SELECT {column} FROM known_{table})",
            )
            if number(engine, f"SELECT count(*) FROM weak_{table}"):
                conditions.append(f"{column} NOT IN (SELECT {column} FROM weak_{table})")
    if not conditions:
        return 0
    return narrow(engine, "core", f"SELECT position, u, i, t FROM core WHERE {' AND '.join(conditions)}")


def _distinct(engine: Engine) -> tuple[Any, ...]:
    return row(engine, "SELECT count(DISTINCT u), count(DISTINCT i) FROM core")


def number_items(settings: PrepareSettings, engine: Engine, facts: Facts) -> int:
    """items(i, id, raw, n) with ids 1..N; returns N. A kept id that nobody interacted with has a row too, n = 0."""
    known, whole, largest = row(
        engine,
        f"SELECT count(*), bool_and(regexp_like(raw, '{INTEGER_ID}')), max(TRY_CAST(raw AS BIGINT)) FROM catalogue",
    )
    keep = settings.ids == "keep" or (
        settings.ids == "auto" and settings.source == "s3rec" and whole and largest == known
    )
    facts["ids"] = "keep" if keep else "count"
    if not keep:
        engine.table(
            "items",
            "SELECT counts.i, CAST(row_number() OVER (ORDER BY n DESC, raw) AS INTEGER) AS id, raw, n "
            "FROM counts JOIN catalogue ON catalogue.i = counts.i",
        )
        return number(engine, "SELECT count(*) FROM items")
    require_dense(settings, largest, known)
    engine.table(
        "items",
        "SELECT catalogue.i, CAST(ids.id AS INTEGER) AS id, CAST(ids.id AS STRING) AS raw, COALESCE(counts.n, 0) AS n "
        f"FROM range(1, {largest + 1}) AS ids(id) LEFT JOIN catalogue ON catalogue.raw = CAST(ids.id AS STRING) "
        "LEFT JOIN counts ON counts.i = catalogue.i",
    )
    return int(largest)


def require_dense(settings: PrepareSettings, largest: int, known: int) -> None:
    """Raises :class:`PrepareError` where kept ids would leave the table mostly empty."""
    if largest > SPARSE_IDS + 10 * known:
        raise PrepareError(
            f"{settings.input}: ids=keep with ids up to {largest:,} for {known:,} items would make a table of mostly "
            "unused rows; use --ids count"
        )


def number_attributes(settings: PrepareSettings, engine: Engine, facts: Facts) -> None:
    """attributes(id, field, raw) with ids 1..A and item_attributes(item, attribute)."""
    engine.table("item_values", ITEM_VALUES)
    whole, largest, known = row(
        engine,
        f"SELECT bool_and(regexp_like(value, '{INTEGER_ID}')), max(TRY_CAST(value AS BIGINT)), "
        "count(DISTINCT value) FROM described",
    )
    keep = settings.source == "s3rec" and facts["ids"] == "keep" and whole and largest <= SPARSE_IDS + 10 * known
    facts["attribute_ids"] = "keep" if keep else "count"
    if keep:
        engine.table("attributes", f"{KEPT_ATTRIBUTES} FROM range(1, {largest + 1}) AS ids(id)")
    else:
        engine.table(
            "attributes",
            "SELECT CAST(row_number() OVER (ORDER BY n DESC, field, value) AS INTEGER) AS id, field, value AS raw "
            "FROM (SELECT field, value, count(*) AS n FROM item_values GROUP BY field, value) AS counts",
        )
    engine.table("item_attributes", ITEM_ATTRIBUTES)
    count_attributes(engine, facts)


KEPT_ATTRIBUTES = f"SELECT CAST(id AS INTEGER) AS id, '{S3RecPair.FIELD}' AS field, CAST(id AS STRING) AS raw"
ITEM_VALUES = "SELECT DISTINCT items.id AS item, field, value FROM described JOIN items ON items.raw = described.item"
ITEM_ATTRIBUTES = (
    "SELECT item, attributes.id AS attribute FROM item_values "
    "JOIN attributes ON attributes.field = item_values.field AND attributes.raw = item_values.value"
)


def count_attributes(engine: Engine, facts: Facts) -> None:
    """Items that are described and unknown, or the other way round."""
    facts["described_items_unknown"] = number(
        engine,
        "SELECT count(DISTINCT item) FROM described WHERE item <> '' "
        "AND NOT EXISTS (SELECT 1 FROM items WHERE items.raw = described.item)",
    )
    facts["items_without_attributes"] = number(
        engine,
        "SELECT count(*) FROM items WHERE n > 0 "
        "AND NOT EXISTS (SELECT 1 FROM item_attributes WHERE item_attributes.item = items.id)",
    )


LEFTOVER_FILE = "leftover.parquet"


def leftover_schema(time_kind: str) -> pa.Schema:
    """Columns of ``LEFTOVER_FILE``."""
    return pa.schema(
        [("user", pa.string()), ("item", pa.string()), ("t", pa.float64() if time_kind == "float" else pa.int64())]
    )


def write_leftover(engine: Engine, facts: Facts, path: str) -> None:
    """What the k-core and short users left out of events, in input order, for the next append."""
    schema = leftover_schema(facts["time_kind"])
    left = number(engine, "SELECT count(*) FROM offered") > number(engine, "SELECT sum(n) FROM counts")
    if left:
        engine.table("gone_users", "SELECT u FROM users WHERE u NOT IN (SELECT u FROM kept)")
        engine.table("gone_items", "SELECT i FROM catalogue WHERE i NOT IN (SELECT i FROM counts)")
    with parquet_writer(path, schema, statistics=False) as writer:
        for batch in engine.stream(_LEFTOVER) if left else ():
            writer.write_table(pa.Table.from_batches([batch]).cast(schema))
    sync_file(path)


_LEFTOVER = (
    "SELECT users.raw AS user, catalogue.raw AS item, gone.t FROM (SELECT position, u, i, t FROM offered "
    "WHERE u IN (SELECT u FROM gone_users) OR i IN (SELECT i FROM gone_items)) AS gone "
    "JOIN users ON users.u = gone.u JOIN catalogue ON catalogue.i = gone.i ORDER BY gone.position"
)

SEQUENCES = (
    "SELECT events.u, events.t, events.position, items.id AS item FROM events JOIN items ON items.i = events.i",
    "SELECT u, raw FROM users WHERE u IN (SELECT u FROM kept)",
)
"""Events, and the users they belong to, as :meth:`~s3rec_dist.data.engines.Engine.sequences` takes them."""


def attributes_table(engine: Engine) -> pa.Table:
    """The attributes, by id."""
    return _collected(engine.stream("SELECT id, field, raw FROM attributes ORDER BY id"), ATTRIBUTES_SCHEMA)


def items_table(engine: Engine, cut: Cut) -> pa.Table:
    """The items, by id, with what is left of their counts."""
    catalogue = _collected(
        engine.stream("SELECT id, raw, n FROM items ORDER BY id"),
        pa.schema([("id", pa.int32()), ("raw", pa.string()), ("n", pa.int64())]),
    )
    pairs = _collected(
        engine.stream("SELECT item, attribute FROM item_attributes ORDER BY item, attribute"),
        pa.schema([("item", pa.int32()), ("attribute", pa.int32())]),
    )
    offsets = np.searchsorted(pairs.column("item").to_numpy(), np.arange(1, len(catalogue) + 2)).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pairs.column("attribute").combine_chunks())
    counts = catalogue.column("n").to_numpy() - cut.items[1:]
    columns = [catalogue.column("id"), catalogue.column("raw"), pa.array(counts), lists]
    return pa.Table.from_arrays(columns, schema=ITEMS_SCHEMA)


def _collected(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    pieces = [pa.Table.from_batches([batch]).cast(schema) for batch in batches]
    return pa.concat_tables(pieces) if pieces else schema.empty_table()
