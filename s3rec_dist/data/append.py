"""New events as the next revision of a dataset: ``s3rec prepare --append``.

    manifest = append({"input": "events/2026-11-25.parquet", "output": "data/shop"})

The settings are those the dataset was prepared with. Items and attributes keep their ids, new ones get the next. A user
with new events gets a new row, the history so far and then the new events; the row before is marked dead in the index.
Everything else stays where it is and is shared between revisions: of the old shards only the users are read, and the
row groups in which some of them have come back.

Events must not be older than the dataset's newest. Those that filters left out then are offered again together with the
new ones, and follow the history of a user who has one already. Users and items that are in the dataset need not pass
the k-core again. New attributes of items add to those they have.

A revision is built apart and its manifest put in place last, so that an append that is killed leaves the dataset as it
was; the next one removes what it left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s3rec_dist import __version__
from s3rec_dist.data import plan
from s3rec_dist.data.dataset import Dataset, DatasetError, Manifest, new_manifest
from s3rec_dist.data.engines import Engine, number, row
from s3rec_dist.data.formats import add_contents, content_of, sha256_of, sync_file
from s3rec_dist.data.output import Progress
from s3rec_dist.data.plan import BadRows, PrepareError
from s3rec_dist.data.prepare import PrepareSettings, explained, layout, open_engine, open_source, scratch_storage
from s3rec_dist.data.sources import Lake
from s3rec_dist.storage import Storage, StorageError

OF_THE_INPUT = ("input", "attributes", "on_bad_row", "max_bad_rows")
"""Settings that say something of one input, not of the dataset."""

GROUP_BITS = 32
"""An old row's number is its row group << GROUP_BITS | its number there among the living."""


def append(
    given: Mapping[str, Any], progress: Progress = lambda line: None, storage: Storage | None = None
) -> Manifest:
    """Appends ``given["input"]`` to the dataset ``given["output"]`` and returns the new manifest.

    ``given`` may hold any of :class:`PrepareSettings` that does not shape the dataset. Raises :class:`PrepareError`,
    leaving the dataset as it was.
    """
    storage = storage or Storage()
    try:
        dataset = Dataset.open(given["output"], storage)
    except (DatasetError, StorageError) as error:
        raise PrepareError(str(error)) from error
    settings = _settings(given, dataset)
    with explained(settings):
        source = open_source(settings, storage)
        with _next_revision(dataset, scratch_storage(settings, storage)) as (folder, work):
            with open_engine(settings, work) as engine:
                bad, facts = BadRows(settings), dict[str, Any]()
                before = _load_dataset(dataset, engine, work)
                plan.load_events(settings, source, engine, bad, facts, progress, before)
                plan.load_attributes(source, engine, bad, facts)
                facts["bad_rows"], facts["bad_row_examples"] = bad.count, bad.examples
                progress("looking for their users in the dataset")
                _find_known(dataset, engine)
                plan.filter_events(settings, engine, facts, progress)
                own = os.path.join(folder, f"v{dataset.manifest.revision + 1}")
                os.mkdir(own)
                plan.write_leftover(engine, facts, os.path.join(own, plan.LEFTOVER_FILE))
                dead = _load_histories(dataset, engine)
                facts["duplicates_dropped"] += _drop_duplicates_of_histories(settings, engine)
                items = _number_items(settings, dataset, engine, facts)
                _number_attributes(settings, dataset, engine, facts)
                progress("writing sequences of users with new events")
                shards, cut = engine.sequences(
                    _sequences(before), plan.SEQUENCES[1], os.path.join(own, "shards"), layout(settings), items
                )
                facts["users_truncated"], facts["interactions_truncated"] = cut.users, int(cut.items.sum())
                return new_manifest(
                    folder,
                    name=dataset.manifest.name,
                    format=dataset.manifest.format,
                    shards=shards,
                    items=plan.items_table(engine, cut),
                    attributes=plan.attributes_table(engine),
                    preparation={"settings": dataset.manifest.preparation["settings"], **facts},
                    created_with=f"s3rec_dist {__version__}",
                    more_files=[plan.LEFTOVER_FILE],
                    before=dataset,
                    dead=dead.rows,
                    dead_content=dead.content,
                )


def _settings(given: Mapping[str, Any], dataset: Dataset) -> PrepareSettings:
    """The dataset's own settings for a new input. Raises :class:`PrepareError` where ``given`` contradicts them."""
    facts = dataset.manifest.preparation
    if "time_kind" not in facts or plan.LEFTOVER_FILE not in dataset.manifest.files:
        raise PrepareError(f"{dataset.path}: does not hold what an append needs; prepare it again with all its input")
    shape = {
        **{name: tuple(value) if isinstance(value, list) else value for name, value in facts["settings"].items()},
        "name": dataset.manifest.name,
        "format": dataset.manifest.format,
        "overwrite": False,
    }
    for name in OF_THE_INPUT:
        del shape[name]
    for name, value in given.items():
        if shape.get(name, value) != value:
            raise PrepareError(
                f"{name}={value!r}: {dataset.path} was prepared with {shape[name]!r}, which an append keeps to; "
                f"leave --{name.replace('_', '-')} out"
            )
    return PrepareSettings(**{**shape, **given, "ids": facts["ids"]})


@contextlib.contextmanager
def _next_revision(dataset: Dataset, storage: Storage) -> Iterator[tuple[str, str]]:
    """(folder, scratch folder), both local and empty; the folder's files join the dataset, its manifest last, when the
    block ends well. Raises :class:`PrepareError` where the dataset has changed meanwhile."""
    path = storage.local(dataset.path)
    with contextlib.ExitStack() as stack:
        if path is not None:
            stack.enter_context(_locked(path))
        _require_unchanged(dataset, storage)
        new = f"{dataset.path}/v{dataset.manifest.revision + 1}"
        storage.remove(new)  # left by an append that was killed
        if path is not None:
            scratch = os.path.join(path, ".append")
            shutil.rmtree(scratch, ignore_errors=True)  # as well
            os.mkdir(scratch)
        else:
            beside = storage.config.scratch_dir or None
            scratch = tempfile.mkdtemp(prefix=".append-", dir=beside)
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        folder, work = os.path.join(scratch, "dataset"), os.path.join(scratch, "work")
        os.mkdir(folder)
        os.mkdir(work)
        yield folder, work
        _require_unchanged(dataset, storage)
        try:
            if path is not None:
                _move_in(folder, path)
            else:
                storage.publish(folder, dataset.path)
        except BaseException:
            with contextlib.suppress(Exception):  # the error that brought us here is the one to report
                storage.remove(new)
            raise


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PrepareError(f"{path}: another append is at work on it; wait for it to end") from error
        yield
    finally:
        os.close(descriptor)


def _require_unchanged(dataset: Dataset, storage: Storage) -> None:
    if Dataset.open(dataset.path, storage).fingerprint != dataset.fingerprint:
        raise PrepareError(f"{dataset.path}: has changed meanwhile; append again")


def _move_in(folder: str, path: str) -> None:
    """Renames what is in ``folder`` into the dataset at ``path``, the manifest last."""
    os.makedirs(os.path.join(path, "manifests"), exist_ok=True)
    names = [f"manifests/{name}" for name in os.listdir(os.path.join(folder, "manifests"))]
    names += [name for name in os.listdir(folder) if name.startswith("v")]
    for name in names:
        os.rename(os.path.join(folder, name), os.path.join(path, name))
    for changed in ("manifests", "."):
        sync_file(os.path.join(path, changed))
    os.rename(os.path.join(folder, "manifest.json"), os.path.join(path, "manifest.json"))
    sync_file(path)


def _load_dataset(dataset: Dataset, engine: Engine, work: str) -> plan.Before:
    """The dataset's catalogue as old_items(id, raw, n), old_attributes(id, field, raw), old_pairs(item, attribute), and
    what it left over as leftover(position, user, item, t), before all that is new."""
    path = os.path.join(work, plan.LEFTOVER_FILE)
    url = dataset.file(plan.LEFTOVER_FILE)
    dataset.storage.download(url, path)
    if sha256_of(path) != dataset.manifest.files[plan.LEFTOVER_FILE]:
        raise DatasetError(f"{url}: its SHA-256 is not the manifest's; restore it or prepare the dataset again")
    facts = dataset.manifest.preparation
    columns = {field.name: (field.name, field.type) for field in plan.leftover_schema(facts["time_kind"])}
    rows = pq.read_metadata(path).num_rows
    engine.scan("leftover_rows", Lake((path,), columns, rows))
    engine.view("leftover", f"SELECT position - {rows + 1} AS position, user, item, t FROM leftover_rows")
    items = dataset.items_table().select(["id", "raw", "count"]).rename_columns(["id", "raw", "n"])
    lists = dataset.item_attributes()
    owners = np.repeat(np.arange(len(lists.offsets) - 1, dtype=np.int32), np.diff(lists.offsets))
    pairs = pa.table({"item": owners, "attribute": lists.values})
    tables = {"old_items": items, "old_attributes": dataset.attributes_table(), "old_pairs": pairs}
    for name, table in tables.items():
        engine.load(name, table.schema, iter(table.to_batches()))
    return plan.Before(facts["time_kind"], facts["last_time"])


def _find_known(dataset: Dataset, engine: Engine) -> None:
    """Of the users offered, those with a row as returned(u, old); what need not pass the k-core again."""

    def users() -> Iterator[pa.RecordBatch]:
        for group in range(len(dataset.index)):
            raw = dataset.read_users(group)
            old = np.arange(len(raw), dtype=np.int64) + (group << GROUP_BITS)
            yield pa.record_batch({"old": old, "raw": raw})

    engine.load("old_users", pa.schema([("old", pa.int64()), ("raw", pa.string())]), users())
    engine.table("returned", "SELECT users.u, old_users.old FROM users JOIN old_users ON old_users.raw = users.raw")
    engine.drop("old_users")
    engine.table(
        "met", "SELECT catalogue.i, old_items.id FROM catalogue JOIN old_items ON old_items.raw = catalogue.raw"
    )
    engine.view("known_users", "SELECT u FROM returned")
    engine.view("known_items", "SELECT i FROM met")


@dataclass
class _Dead:
    """Rows that are replaced."""

    rows: dict[int, np.ndarray]
    """{row group: numbers of rows in it, as stored}."""
    content: tuple[int, int]


HISTORY_SCHEMA = pa.schema([("old", pa.int64()), ("place", pa.int64()), ("item", pa.int32()), ("is_last", pa.bool_())])


def _load_histories(dataset: Dataset, engine: Engine) -> _Dead:
    """history(old, place, item, is_last), what users with new events have so far."""
    query = "SELECT old FROM returned WHERE u IN (SELECT u FROM kept) ORDER BY old"
    old = np.concatenate([np.empty(0, np.int64), *(batch.column(0).to_numpy() for batch in engine.stream(query))])
    dead = _Dead({}, (0, 0))

    def histories() -> Iterator[pa.RecordBatch]:
        for own in np.split(old, np.flatnonzero(np.diff(old >> GROUP_BITS)) + 1) if len(old) else ():
            group, rows = int(own[0] >> GROUP_BITS), own & ((1 << GROUP_BITS) - 1)
            found = dataset.read_row_group(group)
            lengths = np.diff(found.offsets)[rows]
            ends = np.concatenate([[0], np.cumsum(lengths)])
            place = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
            items = found.values[np.repeat(found.offsets[rows], lengths) + place]
            dead.rows[group] = dataset.index.living_rows(group)[rows]
            dead.content = add_contents([dead.content, content_of(found.users.take(pa.array(rows)), items, ends)])
            yield pa.record_batch(
                [np.repeat(own, lengths), place, items, place == np.repeat(lengths, lengths) - 1], schema=HISTORY_SCHEMA
            )

    engine.load("history", HISTORY_SCHEMA, histories())
    return dead


def _drop_duplicates_of_histories(settings: PrepareSettings, engine: Engine) -> int:
    """Drops events whose item the user's history holds already, or ends with; returns how many went."""
    if settings.duplicates == "keep":
        return 0
    consecutive = settings.duplicates == "drop_consecutive"
    had = (
        "SELECT DISTINCT returned.u, met.i FROM history JOIN returned ON returned.old = history.old "
        f"JOIN met ON met.id = history.item{' WHERE history.is_last' if consecutive else ''}"
    )
    dropped = plan.narrow(
        engine,
        "events",
        "SELECT numbered.position, numbered.u, numbered.i, numbered.t FROM "
        "(SELECT position, u, i, t, row_number() OVER (PARTITION BY u ORDER BY t, position) AS nth FROM events) "
        f"AS numbered LEFT JOIN ({had}) AS had ON had.u = numbered.u AND had.i = numbered.i "
        f"WHERE had.u IS NULL{' OR nth > 1' if consecutive else ''}",
    )
    engine.table("counts", plan.COUNTS)
    return dropped


def _number_items(settings: PrepareSettings, dataset: Dataset, engine: Engine, facts: plan.Facts) -> int:
    """items(i, id, raw, n), old ones as they were with their new counts; returns how many there are now."""
    facts["ids"], known = settings.ids, dataset.n_items
    new = (
        "SELECT counts.i, catalogue.raw, counts.n FROM counts JOIN catalogue ON catalogue.i = counts.i "
        "WHERE counts.i NOT IN (SELECT i FROM met)"
    )
    if settings.ids == "count":
        number_sql = f"CAST({known} + row_number() OVER (ORDER BY n DESC, raw) AS INTEGER)"
        new = f"SELECT i, {number_sql} AS id, raw, n FROM ({new}) AS new"
    else:
        largest = max(known, number(engine, f"SELECT max(CAST(raw AS BIGINT)) FROM ({new}) AS new"))
        plan.require_dense(settings, largest, number(engine, f"SELECT count(*) FROM ({new}) AS new") + known)
        new = (
            "SELECT new.i, CAST(ids.id AS INTEGER) AS id, CAST(ids.id AS STRING) AS raw, COALESCE(new.n, 0) AS n "
            f"FROM range({known + 1}, {largest + 1}) AS ids(id) LEFT JOIN ({new}) AS new "
            "ON new.raw = CAST(ids.id AS STRING)"
        )
    engine.table(
        "items",
        "SELECT met.i, old_items.id, old_items.raw, old_items.n + COALESCE(counts.n, 0) AS n FROM old_items "
        f"LEFT JOIN met ON met.id = old_items.id LEFT JOIN counts ON counts.i = met.i UNION ALL {new}",
    )
    return number(engine, "SELECT count(*) FROM items")


def _number_attributes(settings: PrepareSettings, dataset: Dataset, engine: Engine, facts: plan.Facts) -> None:
    """attributes(id, field, raw) and item_attributes(item, attribute), old ones as they were."""
    known = dataset.n_attributes
    facts["attribute_ids"] = dataset.manifest.preparation["attribute_ids"]
    engine.table("item_values", plan.ITEM_VALUES)
    if facts["attribute_ids"] == "keep":
        whole, largest = row(
            engine,
            f"SELECT bool_and(regexp_like(value, '{plan.INTEGER_ID}')), max(TRY_CAST(value AS BIGINT)) FROM described",
        )
        if whole is False:
            raise PrepareError(
                f"{settings.input}: the dataset's attributes are integers; expected such in the new ones"
            )
        largest = max(known, largest or 0)
        plan.require_dense(settings, largest, number(engine, "SELECT count(DISTINCT value) FROM described") + known)
        new = f"{plan.KEPT_ATTRIBUTES} FROM range({known + 1}, {largest + 1}) AS ids(id)"
    else:
        new = (
            f"SELECT CAST({known} + row_number() OVER (ORDER BY n DESC, field, value) AS INTEGER) AS id, field, "
            "value AS raw FROM (SELECT field, value, count(*) AS n FROM item_values WHERE NOT EXISTS (SELECT 1 FROM "
            "old_attributes WHERE old_attributes.field = item_values.field AND old_attributes.raw = item_values.value) "
            "GROUP BY field, value) AS counts"
        )
    engine.table("attributes", f"SELECT id, field, raw FROM old_attributes UNION ALL {new}")
    engine.table("item_attributes", f"SELECT item, attribute FROM old_pairs UNION {plan.ITEM_ATTRIBUTES}")
    plan.count_attributes(engine, facts)


def _sequences(before: plan.Before) -> str:
    """Histories and then new events, as :data:`plan.SEQUENCES` has events."""
    oldest = "-1.7976931348623157e308' AS DOUBLE" if before.time_kind == "float" else f"{-(1 << 63)}' AS BIGINT"
    return (
        f"SELECT returned.u, CAST('{oldest}) AS t, history.place - {1 << 62} AS position, history.item "
        f"FROM history JOIN returned ON returned.old = history.old UNION ALL {plan.SEQUENCES[0]}"
    )
