"""Raw interactions -> dataset: ``s3rec prepare``.

    manifest = prepare(PrepareSettings(source="s3rec", input="Beauty.txt", output="data/beauty"))

Steps, in this order: read and check every row; drop ratings below the threshold; drop duplicates;
iterate the k-core; keep out users too short for the split; give out ids (all of it SQL: ``plan``, which
``engines`` run); sort by (user, time, input order); fold the sorted rows into sequences in Arrow, which is
several times faster and leaner than ``list(... ORDER BY ...)`` in SQL. Users stand in the order of their
first appearance in the input.

Equal input and settings give equal bytes, whatever the threads and the memory limit. The dataset is
built in a scratch folder and put in its place when it is whole.
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
import tempfile
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from s3rec_dist import __version__
from s3rec_dist.data import plan
from s3rec_dist.data.dataset import MIN_SEQUENCE, SAMPLE_END_BITS, DatasetError, Manifest, new_manifest
from s3rec_dist.data.engines import DuckDB, Engine, EngineError, Layout, engine_errors
from s3rec_dist.data.formats import Format
from s3rec_dist.data.output import OutputError, Progress, clean_up_on_sigterm, dataset_output, progress_on_stderr
from s3rec_dist.data.plan import WHOLE_HISTORIES, BadRows, PrepareError
from s3rec_dist.data.sources import Columns, RecBole, S3RecPair, Source, SourceError, Table, WebDatasetTars
from s3rec_dist.storage import Storage, StorageError, add_storage_argument, storage_of


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """One preparation."""

    source: Literal["s3rec", "recbole", "table", "webdataset"]
    """What the input is: the S3-Rec pair, RecBole's atomic files, Parquet, CSV, JSONL with a row per interaction, or
    tars with a sample per user."""
    input: str
    """File or folder; for tables and tars also a pattern."""
    output: str
    """Dataset folder or URL to write."""
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
    max_history: int = 10_000
    """Of a longer history the latest interactions are kept."""
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
    engine: Literal["duckdb", "spark"] = "duckdb"
    """What runs the SQL. Both give datasets with the same content."""
    master: str = "local[*]"
    """Spark's master; on a cluster, ``work_dir`` and ``output`` must be on a disk that all hosts share."""
    memory_limit: str = "1200MB"
    """DuckDB's memory, to which Python's 300 MB come, or the heap of a local Spark; both spill to disk beyond it."""
    threads: int = 0
    """DuckDB's threads; 0 is one per core."""
    work_dir: str = ""
    """Folder for what spills and for tables; empty takes the output's own, or the system's temporary folder."""
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
            ("max_history", MIN_SEQUENCE),
        ):
            if getattr(self, name) < low:
                raise PrepareError(f"{name}={getattr(self, name)}: expected at least {low}")
        for name in ("input", "output", "user_column", "item_column"):
            if not getattr(self, name):
                raise PrepareError(f"{name} is empty; it must be given")
        if self.min_rating is not None and not math.isfinite(self.min_rating):
            raise PrepareError(f"min_rating={self.min_rating}: expected a finite number")
        if self.max_history >> SAMPLE_END_BITS:
            raise PrepareError(f"max_history={self.max_history}: expected less than {1 << SAMPLE_END_BITS}")


def prepare(
    settings: PrepareSettings, progress: Progress = lambda line: None, storage: Storage | None = None
) -> Manifest:
    """Writes the dataset and returns its manifest. Raises :class:`PrepareError`, leaving the output as it was."""
    with explained(settings):
        storage = scratch_storage(settings, storage or Storage())
        source = open_source(settings, storage)
        with dataset_output(settings.output, storage, overwrite=settings.overwrite, progress=progress) as places:
            with open_engine(settings, places[1]) as engine:
                return _build(settings, source, engine, places[0], progress)


@contextlib.contextmanager
def explained(settings: PrepareSettings) -> Iterator[None]:
    """What goes wrong in the block becomes a :class:`PrepareError`."""
    try:
        yield
    except (SourceError, StorageError, OutputError, EngineError, DatasetError) as error:
        raise PrepareError(str(error)) from error
    except engine_errors() as error:
        raise _explain(error, settings) from error
    except RuntimeError as error:
        if "interrupted" in str(error).lower():  # DuckDB's word for Ctrl-C during a query
            raise KeyboardInterrupt from None
        raise


def scratch_storage(settings: PrepareSettings, storage: Storage) -> Storage:
    """``storage`` with ``work_dir`` as the place where uploads are built."""
    if not settings.work_dir:
        return storage
    return Storage(dataclasses.replace(storage.config, scratch_dir=settings.work_dir))


def open_source(settings: PrepareSettings, storage: Storage) -> Source:
    """The input. Raises :class:`SourceError` or :class:`PrepareError`."""
    columns = Columns(
        user=settings.user_column,
        item=settings.item_column,
        rating=settings.rating_column if settings.min_rating is not None else "",
        time=settings.time_column,
    )
    if settings.source in WHOLE_HISTORIES and settings.min_rating is not None:
        raise PrepareError(f"min_rating: source {settings.source} holds no ratings; use source recbole or table")
    if settings.source == "s3rec":
        return S3RecPair(settings.input, settings.attributes, storage)
    if settings.source == "recbole":
        return RecBole(settings.input, settings.attributes, columns, settings.attribute_fields, storage)
    kind = Table if settings.source == "table" else WebDatasetTars
    return kind(
        settings.input, settings.attributes, columns, settings.attribute_fields, settings.attribute_separator, storage
    )


@contextlib.contextmanager
def open_engine(settings: PrepareSettings, work: str) -> Iterator[Engine]:
    """The engine, at work in a folder of ``work_dir``, which is gone after the block, or else in ``work``."""
    if settings.work_dir:
        os.makedirs(settings.work_dir, exist_ok=True)
        work = tempfile.mkdtemp(prefix="s3rec-prepare-", dir=settings.work_dir)
    try:
        with contextlib.closing(_start_engine(settings, work)) as engine:
            yield engine
    finally:
        if settings.work_dir:
            shutil.rmtree(work, ignore_errors=True)


def _start_engine(settings: PrepareSettings, work: str) -> Engine:
    if settings.engine == "spark":
        from s3rec_dist.data.spark import Spark

        return Spark(work, settings.master, settings.memory_limit)
    return DuckDB(work, settings.memory_limit, settings.threads)


def _build(settings: PrepareSettings, source: Source, engine: Engine, folder: str, progress: Progress) -> Manifest:
    facts: dict[str, Any] = {}
    bad = BadRows(settings)
    plan.load_events(settings, source, engine, bad, facts, progress)
    plan.load_attributes(source, engine, bad, facts)
    facts["bad_rows"], facts["bad_row_examples"] = bad.count, bad.examples
    plan.filter_events(settings, engine, facts, progress)
    plan.require_users(settings, engine, facts)
    plan.write_leftover(engine, facts, os.path.join(folder, plan.LEFTOVER_FILE))
    items = plan.number_items(settings, engine, facts)
    plan.number_attributes(settings, engine, facts)
    progress("writing sequences, in order of user and time")
    shards, cut = engine.sequences(*plan.SEQUENCES, os.path.join(folder, "shards"), layout(settings), items)
    facts["users_truncated"], facts["interactions_truncated"] = cut.users, int(cut.items.sum())
    return new_manifest(
        folder,
        name=settings.name or _default_name(settings),
        format=settings.format,
        shards=shards,
        items=plan.items_table(engine, cut),
        attributes=plan.attributes_table(engine),
        preparation={"settings": _shaping_settings(settings), **facts},
        created_with=f"s3rec_dist {__version__}",
        more_files=[plan.LEFTOVER_FILE],
    )


def layout(settings: PrepareSettings) -> Layout:
    """How sequences are written."""
    return Layout(settings.format, settings.rows_per_group, settings.groups_per_shard, settings.max_history)


def _default_name(settings: PrepareSettings) -> str:
    """The file's or folder's name; of a pattern, that of the folder it looks in."""
    parts = (settings.input if "://" in settings.input else os.path.abspath(settings.input)).split("/")
    plain = [part for part in parts if not glob.has_magic(part)]
    return os.path.splitext(plain[-1])[0] or "dataset"


def _shaping_settings(settings: PrepareSettings) -> dict[str, Any]:
    """The settings that decide what the dataset holds; of paths only the last part, so that folders do not matter."""
    shaping = dataclasses.asdict(settings)
    for name in ("output", "name", "format", "engine", "master", "memory_limit", "threads", "work_dir", "overwrite"):
        del shaping[name]
    for name in ("input", "attributes"):
        shaping[name] = os.path.basename(shaping[name].rstrip("/"))
    shaping["attribute_fields"] = list(settings.attribute_fields)
    return shaping


def _explain(error: Exception, settings: PrepareSettings) -> PrepareError:
    text = str(error)
    lines = [line.lstrip(": ") for line in text.splitlines() if line.strip()]
    first_line = next((line for line in lines if not line.startswith("An error occurred while calling")), "no details")
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "max_temp_directory_size" in text:
        return PrepareError(
            f"{settings.output}: no room on the output's disk ({first_line}); free some space or choose an output on "
            "another disk. Nothing has been changed"
        )
    if "Out of Memory" in text:
        return PrepareError(
            f"memory_limit={settings.memory_limit}: too small for this input ({first_line}); raise --memory-limit"
        )
    if isinstance(error, OSError):
        return PrepareError(f"{error.filename or settings.output}: {error.strerror or error}")
    return PrepareError(f"{settings.input}: the engine could not prepare it ({first_line})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec prepare``."""
    defaults = PrepareSettings(source="s3rec", input="-", output="-")

    def option(group: Any, name: str, help: str, **more: Any) -> None:
        default = getattr(defaults, name)
        shown = f" (default: {default})" if default not in ("", None, (), False) else ""
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=help + shown, **more)

    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--source",
        default=argparse.SUPPRESS,
        choices=("s3rec", "recbole", "table", "webdataset"),
        help="what the input is: NAME.txt with NAME_item2attributes.json; RecBole atomic files; "
        "Parquet, CSV, JSONL with a row per interaction; or tars with a sample per user, KEY.npy, .json or .txt",
    )
    group.add_argument("--input", required=True, help="file or folder; for tables and tars also a pattern")
    group.add_argument("--output", required=True, help="dataset folder or URL to write")
    option(group, "name", "the dataset's name; by default the input's")
    option(group, "overwrite", "replace the output if it is a dataset already", action="store_true")
    group.add_argument(
        "--append",
        action="store_true",
        help="add the input to the dataset that is there, as its next revision, with the dataset's own settings",
    )
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
    option(group, "max_history", "keep a longer history's latest interactions", type=int, metavar="N")
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
    option(group, "engine", "what runs the SQL; both give the same content", choices=("duckdb", "spark"))
    option(group, "master", "Spark's master; on a cluster, hosts must share --work-dir and --output", metavar="URL")
    option(
        group,
        "memory_limit",
        "DuckDB's memory, besides Python's 300 MB, or a local Spark's heap; both spill beyond it",
        metavar="SIZE",
    )
    option(group, "threads", "DuckDB's threads; 0 is one per core", type=int, metavar="N")
    option(group, "work_dir", "folder for tables and what spills; by default beside the output", metavar="DIR")
    add_storage_argument(parser)


def run(args: argparse.Namespace) -> None:
    """``s3rec prepare``: progress on stderr, a summary on stdout. Raises :class:`PrepareError`."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(PrepareSettings) if hasattr(args, f.name)}
    if "attribute_fields" in values:
        values["attribute_fields"] = tuple(values["attribute_fields"])
    start = time.monotonic()
    progress = progress_on_stderr()
    clean_up_on_sigterm()
    if args.append:
        from s3rec_dist.data.append import append

        manifest = append(values, progress, storage_of(args))
    elif "source" not in values:
        raise PrepareError("say what the input is with --source: s3rec, recbole, table or webdataset")
    else:
        manifest = prepare(PrepareSettings(**values), progress, storage_of(args))
    print(summary(manifest, args.output, time.monotonic() - start))


def summary(manifest: Manifest, output: str, seconds: float) -> str:
    """What a person wants to know of a new dataset."""
    facts = manifest.preparation
    revision = f", revision {manifest.revision}" if manifest.revision > 1 else ""
    lines = [
        f"{manifest.name} -> {output}{revision}",
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
    if facts["users_truncated"]:
        lines.append(
            f"  longest histories cut to {facts['settings']['max_history']:,}: {facts['users_truncated']:,} users lose "
            f"{facts['interactions_truncated']:,} older interactions"
        )
    lines += [f"    {example}" for example in facts["bad_row_examples"]]
    return "\n".join(lines)
