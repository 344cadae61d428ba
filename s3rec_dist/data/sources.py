"""Raw inputs, read as Arrow batches: the S3-Rec pair, RecBole's atomic files, Parquet, CSV, JSONL and tars.

A source gives two streams of flat rows and leaves everything relational to ``prepare``:

    events       position, user, item[, rating][, time]
    attributes   position, item, field, value

``position`` is an int64 that grows in input order and from which ``place`` tells file and line. A row
that cannot even be split into columns is reported to ``bad`` (position, reason) and left out. Inputs are paths or
URLs; Parquet on this machine is left for an engine to scan (:class:`Lake`), which is several times faster.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import gzip
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from s3rec_dist.data.tars import TarError, histories
from s3rec_dist.storage import Storage, StorageError

BadRow = Callable[[int, str], None]
"""Called with (position, reason) for a row that is left out; may raise to stop."""

LINE_BITS = 24
"""Items of one line of the S3-Rec pair are numbered in this many bits of ``position``."""
FILE_BITS = 40
"""Rows of one file of a table are numbered in this many bits of ``position``."""

LINES_PER_BATCH = 1 << 16
BLOCK_BYTES = 8 << 20

TAR_NAMES = (".tar", ".tar.gz", ".tgz")


class SourceError(ValueError):
    """Input that cannot be read at all; the message says what was expected, what came and what to do."""


@dataclass(frozen=True)
class Columns:
    """Names of the event columns; '' is a column that is not read."""

    user: str
    item: str
    rating: str
    time: str

    def wanted(self) -> dict[str, str]:
        """{name here: name in the input} of the columns that are read."""
        pairs = {"user": self.user, "item": self.item, "rating": self.rating, "time": self.time}
        return {ours: theirs for ours, theirs in pairs.items() if theirs}


@dataclass(frozen=True)
class Lake:
    """Parquet files on this machine, the same types in all, that an engine may scan itself."""

    paths: tuple[str, ...]
    """Absolute, in input order: ``position`` is the file's number << FILE_BITS | the row's number from 1."""
    columns: dict[str, tuple[str, pa.DataType]]
    """{name here: (name in the files, type there)}."""
    rows: int

    def kinds(self) -> dict[str, pa.DataType]:
        """{name here: type here}, as in :meth:`Table.events`."""
        return {ours: _plain_array(pa.array([], kind)).type for ours, (_, kind) in self.columns.items()}


class S3RecPair:
    """``NAME.txt``, a user's items a line, in time order, and ``NAME_item2attributes.json``, {item: [attribute]}."""

    FIELD = "attribute"

    def __init__(self, path: str, attributes: str, storage: Storage | None = None) -> None:
        self.storage = storage or Storage()
        if self.storage.is_folder(path):
            path = _only_file(self.storage, path, ".txt", "the S3-Rec pair's NAME.txt")
        self.path = _existing(self.storage, path)
        beside = os.path.splitext(path)[0] + "_item2attributes.json"
        self.attributes_path = _attribute_file(self.storage, attributes, beside)
        self.files = [self.path, *filter(None, [self.attributes_path])]

    def events(self, bad: BadRow) -> Iterator[pa.RecordBatch]:
        """position, user, item; a row per item."""
        for first, lines in _lines(self.storage, self.path, lambda line, reason: bad(line << LINE_BITS, reason)):
            words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(lines))
            lengths = pc.list_value_length(words).to_numpy(zero_copy_only=False)
            numbers = first
            empty = pc.equal(pc.utf8_trim_whitespace(lines), "").to_numpy(zero_copy_only=False)
            for row in np.flatnonzero((lengths < 2) | empty):
                reason = "empty line, expected 'user item item ...'" if empty[row] else "a user without items"
                bad(int(numbers[row]) << LINE_BITS, reason)
            if lengths.max(initial=0) > 1 << LINE_BITS:
                raise SourceError(
                    f"{self.path}: a line with more than {1 << LINE_BITS:,} items; split the user's history or "
                    "give it as a table"
                )
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            flat = words.flatten()
            within = np.arange(len(flat)) - np.repeat(offsets[:-1], lengths)
            is_item = within > 0
            position = (np.repeat(numbers, lengths) << LINE_BITS) + within
            users = flat.take(pa.array(np.repeat(offsets[:-1], lengths)[is_item]))
            yield pa.record_batch(
                {"position": position[is_item], "user": users, "item": flat.filter(pa.array(is_item))}
            )

    def attributes(self, bad: BadRow) -> Iterator[pa.RecordBatch]:
        """position, item, field, value."""
        if not self.attributes_path:
            return
        tree = _json_object(self.storage, self.attributes_path)
        items: list[str] = []
        values: list[str] = []
        for item, listed in tree.items():
            plain = isinstance(listed, list) and all(
                isinstance(value, (int, str)) and not isinstance(value, bool) and value != "" for value in listed
            )
            if not plain or not item:
                raise SourceError(
                    f"{self.attributes_path}: item {item!r}: expected a list of attribute ids, got {str(listed)[:80]!r}"
                )
            items.extend([item] * len(listed))
            values.extend(map(str, listed))
        yield _attribute_batch(range(len(items)), items, self.FIELD, values)

    def place(self, position: int) -> str:
        """File and line of an event's position."""
        return f"{self.path}:{position >> LINE_BITS}"

    def attribute_place(self, position: int) -> str:
        """File of an attribute's position."""
        return str(self.attributes_path)


class RecBole:
    """Atomic files: ``NAME.inter`` and ``NAME.item``, tab-separated, a header of ``field:type``."""

    def __init__(
        self,
        path: str,
        attributes: str,
        columns: Columns,
        attribute_fields: Sequence[str],
        storage: Storage | None = None,
    ) -> None:
        self.storage = storage or Storage()
        if self.storage.is_folder(path):
            path = _only_file(self.storage, path, ".inter", "RecBole's NAME.inter")
        elif not self.storage.exists(path) and self.storage.exists(path + ".inter"):
            path += ".inter"
        self.path, self.columns = _existing(self.storage, path), columns
        self.attributes_path = _attribute_file(self.storage, attributes, os.path.splitext(path)[0] + ".item")
        self.fields: dict[str, str] = {}
        """{attribute field: token or token_seq}"""
        if self.attributes_path:
            self.fields = self._choose_fields(tuple(attribute_fields))
        self.files = [self.path, *filter(None, [self.attributes_path])]

    def events(self, bad: BadRow) -> Iterator[pa.RecordBatch]:
        """position, user, item and, where wanted, rating and time, as text."""
        kinds = _recbole_header(self.storage, self.path)
        names = {}
        for ours, theirs in self.columns.wanted().items():
            if theirs not in kinds:
                raise _no_column(self.path, ours, theirs, kinds)
            names[ours] = f"{theirs}:{kinds[theirs]}"
        yield from _delimited(self.storage, self.path, "\t", False, names, 0, bad)

    def attributes(self, bad: BadRow) -> Iterator[pa.RecordBatch]:
        """position, item, field, value; token_seq values split at spaces."""
        if not self.attributes_path:
            return
        kinds = _recbole_header(self.storage, self.attributes_path)
        names = {"item": f"{self.columns.item}:{kinds[self.columns.item]}"}
        names |= {f"field_{i}": f"{field}:{kind}" for i, (field, kind) in enumerate(self.fields.items())}
        for batch in _delimited(self.storage, self.attributes_path, "\t", False, names, 0, bad):
            for i, (field, kind) in enumerate(self.fields.items()):
                values = batch.column(f"field_{i}")
                lists = pc.split_pattern(values, " ") if kind == "token_seq" else _singletons(values)
                yield _flatten_attributes(batch, lists, field)

    def place(self, position: int) -> str:
        """File and line of an event's position."""
        return f"{self.path}:{position}"

    def attribute_place(self, position: int) -> str:
        """File and line of an attribute's position."""
        return f"{self.attributes_path}:{position}"

    def _choose_fields(self, wanted: tuple[str, ...]) -> dict[str, str]:
        kinds = _recbole_header(self.storage, self.attributes_path)
        if self.columns.item not in kinds:
            raise _no_column(self.attributes_path, "item", self.columns.item, kinds)
        usable = {
            name: kind for name, kind in kinds.items() if kind in ("token", "token_seq") and name != self.columns.item
        }
        chosen = wanted or tuple(name for name, kind in usable.items() if kind == "token_seq")
        if not chosen:
            raise SourceError(
                f"{self.attributes_path}: no token_seq field to take attributes from; name fields with "
                f"--attribute-fields (there are: {', '.join(usable) or 'none'}) or pass --attributes none"
            )
        for name in chosen:
            if name not in usable:
                kind = f"is {kinds[name]}" if name in kinds else "is not there"
                raise SourceError(
                    f"{self.attributes_path}: attribute field {name!r} {kind}; expected token or token_seq fields, "
                    f"as in {', '.join(usable) or 'none here'}"
                )
        return {name: usable[name] for name in chosen}


def recbole_tokens(path: str, item: str, attribute: str, storage: Storage) -> dict[str, list[str]]:
    """The tokens of the fields ``item`` and ``attribute`` in the order in which RecBole numbers them from 1, after
    ``[PAD]``, where its settings filter nothing: by first appearance in the .inter file, without items that the .item
    file lacks, and then in the .item file. Raises :class:`SourceError`."""
    columns = Columns(user="", item=item, rating="", time="")
    inter = RecBole(path, "none", columns, (), storage).path
    item_file = f"{os.path.splitext(inter)[0]}.item"
    if not storage.exists(item_file):
        raise SourceError(f"{inter}: there is no .item file beside it, which would have the attributes {attribute!r}")
    source = RecBole(inter, item_file, columns, (attribute,), storage)

    def bad(position: int, reason: str) -> None:
        raise SourceError(f"{inter} or its .item file, line {position}: {reason}")

    names = {"item": f"{item}:{_recbole_header(storage, item_file)[item]}"}
    described = [batch.column("item") for batch in _delimited(storage, item_file, "\t", False, names, 0, bad)]
    known = pa.chunked_array(described, pa.string())
    seen = pa.chunked_array([batch.column("item") for batch in source.events(bad)], pa.string())
    items = pc.unique(pa.chunked_array([*seen.filter(pc.is_in(seen, known)).chunks, *described], pa.string()))
    values = [batch.column("value") for batch in source.attributes(bad)]
    attributes = pc.unique(pa.chunked_array(values, pa.string()))
    return {
        name: ["[PAD]", *filter(None, column.to_pylist())] for name, column in ((item, items), (attribute, attributes))
    }


def read_names(path: str, item: str, name: str, storage: Storage) -> dict[str, str]:
    """What the items are called, by raw id: columns ``item`` and ``name`` of a Parquet, CSV, TSV or JSONL file, or of
    RecBole's NAME.item. Raises :class:`SourceError`."""

    def bad(position: int, reason: str) -> None:
        raise SourceError(f"{path}:{position}: {reason}")

    if path.endswith(".item"):
        kinds = _recbole_header(storage, _existing(storage, path))
        for ours, theirs in (("item", item), ("name", name)):
            if theirs not in kinds:
                raise _no_column(path, ours, theirs, kinds)
        names = {"item": f"{item}:{kinds[item]}", "name": f"{name}:{kinds[name]}"}
        batches = _delimited(storage, path, "\t", False, names, 0, bad)
    elif _table_kind(path):
        batches = _table_batches(storage, _existing(storage, path), {"item": item, "name": name}, 0, bad)
    else:
        raise SourceError(
            f"{path}: unknown kind of table; expected a name that ends in {', '.join(TABLE_KINDS)}, .item"
        )
    found: dict[str, str] = {}
    for batch in batches:
        columns = [batch.column(column).cast(pa.string()).to_pylist() for column in ("item", "name")]
        found.update((raw, title) for raw, title in zip(*columns, strict=True) if title)
    return found


class Table:
    """Parquet, CSV or JSONL files with a row per interaction, columns named by the caller."""

    def __init__(
        self,
        path: str,
        attributes: str,
        columns: Columns,
        attribute_fields: Sequence[str],
        attribute_separator: str,
        storage: Storage | None = None,
    ) -> None:
        self.storage = storage or Storage()
        self.paths, self.columns = self.find(path), columns
        self.attribute_paths = [] if attributes in ("", "none") else _table_files(self.storage, attributes)
        if self.attribute_paths and not attribute_fields:
            raise SourceError(f"{attributes}: name the columns that hold attributes with --attribute-fields")
        self.fields = tuple(attribute_fields)
        self.separator = attribute_separator
        self.files = [*self.paths, *self.attribute_paths]

    def find(self, path: str) -> list[str]:
        """The files behind a path, a folder or a pattern."""
        return _table_files(self.storage, path)

    def lake(self) -> Lake | None:
        """The files as an engine may scan them itself, or None where it must take :meth:`events`: files that are
        not Parquet, lie elsewhere or differ in their types."""
        if any(_table_kind(path) != "parquet" or self.storage.local(path) is None for path in self.paths):
            return None
        names = self.columns.wanted()
        found: list[dict[str, pa.DataType]] = []
        scannable, rows = True, 0
        for path in self.paths:
            with _parquet_file(self.storage, path) as file:
                found.append(_parquet_types(path, file.schema_arrow, names, lists=False))
                scannable &= _is_scannable(file.schema_arrow, found[-1])
                rows += file.metadata.num_rows
            _check_ids(path, names, found[-1])
        if not scannable or any(kinds != found[0] for kinds in found):
            return None
        paths = tuple(os.path.abspath(str(self.storage.local(path))) for path in self.paths)
        return Lake(paths, {ours: (theirs, found[0][ours]) for ours, theirs in names.items()}, rows)

    def events(self, bad: BadRow) -> Iterator[pa.RecordBatch]:
        """position, user, item and, where wanted, rating and time: integers, floats or text, the same in all files."""
        names = self.columns.wanted()
        first: dict[str, pa.DataType] = {}
        for number, path in enumerate(self.paths):
            for batch in _table_batches(self.storage, path, names, number << FILE_BITS, bad):
                kinds = {ours: batch.schema.field(ours).type for ours in names}
                _check_ids(path, names, kinds)
                first = first or kinds
                for ours, kind in kinds.items():
                    if kind != first[ours]:
                        raise SourceError(
                            f"{path}: column {names[ours]!r} holds {kind}, but {first[ours]} in {self.paths[0]}; "
                            "expected one kind in all files"
                        )
                yield batch

    def attributes(self, bad: BadRow) -> Iterator[pa.RecordBatch]:
        """position, item, field, value; list columns give a row per element."""
        names = {"item": self.columns.item} | {f"field_{i}": field for i, field in enumerate(self.fields)}
        for number, path in enumerate(self.attribute_paths):
            for batch in _table_batches(self.storage, path, names, number << FILE_BITS, bad, lists=True):
                for i, field in enumerate(self.fields):
                    values = batch.column(f"field_{i}")
                    if pa.types.is_list(values.type):
                        lists = values
                    elif self.separator:
                        lists = pc.split_pattern(values.cast(pa.string()), self.separator)
                    else:
                        lists = _singletons(values)
                    yield _flatten_attributes(batch, lists, field)

    def place(self, position: int) -> str:
        """File and line (of text) or row (of Parquet) of an event's position."""
        return _table_place(self.paths, position)

    def attribute_place(self, position: int) -> str:
        """File and line or row of an attribute's position."""
        return _table_place(self.attribute_paths, position)


class WebDatasetTars(Table):
    """Tars that others wrote, a sample per user (:mod:`~s3rec_dist.data.tars`); attributes come from a table."""

    def find(self, path: str) -> list[str]:
        """The tars behind a path or URL, a folder or a pattern."""
        self._before: list[int] = []  # samples before each file, as far as files have been read
        try:
            return _tar_files(path, self.storage)
        except StorageError as error:
            raise SourceError(str(error)) from error

    def events(self, bad: BadRow) -> Iterator[pa.RecordBatch]:
        """position, user, item, as text; a row per item."""
        last = 0

        def left_out(number: int, reason: str) -> None:
            nonlocal last
            last = max(last, self._before[-1] + number)
            bad(self._before[-1] + number << LINE_BITS, reason)

        for path in self.paths:
            before = last
            self._before.append(before)
            try:
                with self.storage.open(path) as raw, _unzipped(raw, path) as file:
                    for samples in _gathered(histories(file, left_out)):
                        last = max(last, before + samples[-1][0])
                        yield _sample_batch(before, samples)
            except (TarError, StorageError) as error:
                raise SourceError(f"{path}: cannot be read: {error}") from error

    def place(self, position: int) -> str:
        """File and sample of an event's position."""
        sample = position >> LINE_BITS
        file = bisect.bisect_left(self._before, sample) - 1
        return f"{self.paths[file]}: sample {sample - self._before[file]}"


Source = S3RecPair | RecBole | Table | WebDatasetTars


def _is_file(storage: Storage, path: str) -> bool:
    return storage.exists(path) and not storage.is_folder(path)


def _existing(storage: Storage, path: str) -> str:
    if not _is_file(storage, path):
        raise SourceError(f"{path}: no such input file")
    if storage.size(path) == 0:
        raise SourceError(f"{path}: the file is empty")
    return path


def _only_file(storage: Storage, folder: str, suffix: str, what: str) -> str:
    found = [name for name in storage.names(folder) if name.endswith(suffix)]
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise SourceError(f"{folder}: expected one *{suffix} file ({what}), found {names}; give the file's own path")
    return os.path.join(folder, found[0])


def _attribute_file(storage: Storage, given: str, beside: str) -> str:
    """The attribute file's path, or '' where there shall be none."""
    if given == "none":
        return ""
    if not given and not _is_file(storage, beside):
        raise SourceError(
            f"{beside}: no such attribute file; name it with --attributes, or pass --attributes none to train without"
        )
    return _existing(storage, given or beside)


def _no_column(path: str, ours: str, theirs: str, found: Any) -> SourceError:
    remedy = "; pass an empty name to take the input's own order as time" if ours == "time" else ""
    return SourceError(
        f"{path}: no column {theirs!r} for the {ours}; there are {', '.join(found)}. Set --{ours}-column{remedy}"
    )


def _lines(storage: Storage, path: str, bad: BadRow) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """(line numbers, lines) of a UTF-8 text file, many lines at a time."""
    with storage.open(path, "infer") as file:
        numbered = enumerate(file, start=1)
        while chunk := list(itertools.islice(numbered, LINES_PER_BATCH)):
            numbers, lines = [], []
            for number, line in chunk:
                try:
                    lines.append(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8"))
                    numbers.append(number)
                except UnicodeDecodeError as error:
                    bad(number, f"not UTF-8 text ({error.reason} at byte {error.start})")
            yield np.array(numbers, dtype=np.int64), pa.array(lines, pa.string())


def _json_object(storage: Storage, path: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise SourceError(f"{path}: {twice!r} appears twice; merge its lists into one")
        return tree

    try:
        with storage.open(path, "infer") as file:
            tree = json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not isinstance(tree, dict):
        raise SourceError(f"{path}: expected an object {{item: [attribute, ...]}}, got {type(tree).__name__}")
    return tree


def _recbole_header(storage: Storage, path: str) -> dict[str, str]:
    """{field: type} of an atomic file."""
    with storage.open(path, "infer") as file:
        header = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    kinds = {}
    for column in header.split("\t"):
        field, separator, kind = column.rpartition(":")
        if not separator or not field or kind not in ("token", "token_seq", "float", "float_seq"):
            raise SourceError(
                f"{path}:1: expected a header of tab-separated field:type "
                f"(token, token_seq, float, float_seq), got {column[:80]!r}"
            )
        if field in kinds:
            raise SourceError(f"{path}:1: field {field!r} appears twice")
        kinds[field] = kind
    return kinds


def _delimited(
    storage: Storage, path: str, delimiter: str, quote: str | bool, names: dict[str, str], base: int, bad: BadRow
) -> Iterator[pa.RecordBatch]:
    """Columns ``names`` {ours: theirs} of delimited text with a header, as strings, with ``position`` = base + line."""
    wrong: deque[Any] = deque()  # told outside pyarrow's handler, which no exception can leave
    skipped: list[int] = []

    def wrong_count(row: Any) -> str:
        wrong.append(row)
        skipped.append(row.number)
        return "skip"

    def tell() -> None:
        while wrong:
            row = wrong.popleft()
            bad(base + row.number, f"{row.actual_columns} columns, expected {row.expected_columns}")

    theirs = list(dict.fromkeys(names.values()))
    with storage.open(path, "infer") as file:
        try:
            reader = pyarrow.csv.open_csv(
                pa.PythonFile(file, mode="r"),
                read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=delimiter,
                    quote_char=quote,
                    newlines_in_values=bool(quote),
                    ignore_empty_lines=False,
                    invalid_row_handler=wrong_count,
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types={name: pa.binary() for name in theirs},
                    include_columns=theirs,
                    strings_can_be_null=False,
                ),
            )
            line = 1  # the header
            for batch in reader:
                tell()
                lines = _surviving_lines(line, batch.num_rows, skipped)
                if len(lines):
                    line = int(lines[-1])
                    yield _decode_text(batch, names, base + lines, bad)
            tell()
        except pa.ArrowException as error:
            raise SourceError(f"{path}: cannot be read as delimited text ({error})") from error


def _surviving_lines(last: int, rows: int, skipped: list[int]) -> np.ndarray:
    """Numbers of the next ``rows`` lines after ``last`` that are not ``skipped``."""
    later = [number for number in skipped if number > last]
    candidates = np.arange(last + 1, last + 1 + rows + len(later), dtype=np.int64)
    return candidates[~np.isin(candidates, later)][:rows]


def _decode_text(batch: pa.RecordBatch, names: dict[str, str], positions: np.ndarray, bad: BadRow) -> pa.RecordBatch:
    """Binary columns as UTF-8 strings under our names; rows that are not UTF-8 are reported and left out."""
    try:
        columns = {ours: batch.column(theirs).cast(pa.string()) for ours, theirs in names.items()}
    except pa.ArrowInvalid:
        good = []
        for row, values in enumerate(zip(*(batch.column(name).to_pylist() for name in names.values()), strict=True)):
            try:
                for value in values:
                    value.decode()
                good.append(row)
            except UnicodeDecodeError as error:
                bad(int(positions[row]), f"not UTF-8 text ({error.reason})")
        batch, positions = batch.take(pa.array(good, pa.int64())), positions[good]
        columns = {ours: batch.column(theirs).cast(pa.string()) for ours, theirs in names.items()}
    return pa.record_batch({"position": positions, **columns})


TABLE_KINDS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


def _table_kind(path: str) -> str | None:
    name = path.removesuffix(".gz")
    return TABLE_KINDS.get(os.path.splitext(name)[1].lower())


def _table_files(storage: Storage, path: str) -> list[str]:
    """The files behind a path, a folder or a glob pattern, by name."""
    if storage.is_folder(path):
        found = [os.path.join(path, name) for name in storage.names(path) if _table_kind(name)]
    else:
        found = [path] if storage.exists(path) else storage.glob(path)
    if not found:
        raise SourceError(f"{path}: no input there; expected a file, folder or pattern of {', '.join(TABLE_KINDS)}")
    for name in found:
        if not _table_kind(name):
            raise SourceError(f"{name}: unknown kind of table; expected a name that ends in {', '.join(TABLE_KINDS)}")
        _existing(storage, name)
    return found


def _tar_files(path: str, storage: Storage) -> list[str]:
    """The tars behind a path, a folder or a pattern, by name."""
    if storage.is_folder(path):
        names = [name for name in storage.names(path) if name.lower().endswith(TAR_NAMES)]
        found = [f"{path.rstrip('/')}/{name}" for name in names]
    else:
        found = [path] if storage.exists(path) else storage.glob(path)
    if not found:
        raise SourceError(f"{path}: no input there; expected a file, folder or pattern of {', '.join(TAR_NAMES)}")
    for name in found:
        if not name.lower().endswith(TAR_NAMES):
            raise SourceError(f"{name}: expected a name that ends in {', '.join(TAR_NAMES)}")
    return found


def _unzipped(file: Any, path: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext(file) if path.lower().endswith(".tar") else gzip.GzipFile(fileobj=file)


Sample = tuple[int, str, pa.Array]
"""Number in its file, user, items."""


def _gathered(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    """Samples in lists of ``LINES_PER_BATCH`` items or a few more."""
    gathered: list[Sample] = []
    items = 0
    for sample in samples:
        gathered.append(sample)
        items += len(sample[2])
        if items >= LINES_PER_BATCH:
            yield gathered
            gathered, items = [], 0
    if gathered:
        yield gathered


def _sample_batch(before: int, samples: list[Sample]) -> pa.RecordBatch:
    """position, user, item of samples of a file that has ``before`` samples before it."""
    numbers, users, items = zip(*samples, strict=True)
    lengths = np.array([len(array) for array in items])
    within = np.arange(1, lengths.sum() + 1) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = (np.repeat(np.array(numbers, np.int64) + before, lengths) << LINE_BITS) + within
    rows = pa.array(np.repeat(np.arange(len(users)), lengths))
    return pa.record_batch(
        {"position": position, "user": pa.array(users, pa.string()).take(rows), "item": pa.concat_arrays(items)}
    )


def _table_place(paths: list[str], position: int) -> str:
    return f"{paths[position >> FILE_BITS]}:{position & ((1 << FILE_BITS) - 1)}"


def _table_batches(
    storage: Storage, path: str, names: dict[str, str], base: int, bad: BadRow, lists: bool = False
) -> Iterator[pa.RecordBatch]:
    """Columns ``names`` {ours: theirs} of one table with their positions."""
    kind = _table_kind(path)
    if kind == "parquet":
        yield from _parquet_batches(storage, path, names, base, lists)
    elif kind == "jsonl":
        yield from _jsonl_batches(storage, path, names, base, bad, lists)
    else:
        delimiter = "," if kind == "csv" else "\t"
        with storage.open(path, "infer") as file:
            header = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
        found = next(csv.reader([header], delimiter=delimiter))
        for ours, theirs in names.items():
            if theirs not in found:
                raise _no_column(path, ours, theirs, found)
        yield from _delimited(storage, path, delimiter, '"', names, base, bad)


def _parquet_batches(
    storage: Storage, path: str, names: dict[str, str], base: int, lists: bool
) -> Iterator[pa.RecordBatch]:
    with _parquet_file(storage, path) as file:
        _parquet_types(path, file.schema_arrow, names, lists)
        row = 1
        for batch in file.iter_batches(batch_size=1 << 17, columns=list(dict.fromkeys(names.values()))):
            positions = base + np.arange(row, row + batch.num_rows, dtype=np.int64)
            columns = {ours: _plain_array(batch.column(theirs)) for ours, theirs in names.items()}
            yield pa.record_batch({"position": positions, **columns})
            row += batch.num_rows


@contextlib.contextmanager
def _parquet_file(storage: Storage, path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose page checksums are verified on reading."""
    try:
        with contextlib.ExitStack() as stack:
            source = storage.local(path) or stack.enter_context(storage.open(path))
            yield stack.enter_context(pq.ParquetFile(source, page_checksum_verification=True))
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: not a readable Parquet file ({error})") from error


def verify_pages(lake: Lake) -> None:
    """Reads what will be scanned once, for the page checksums that some engines do not look at."""
    columns = list(dict.fromkeys(theirs for theirs, _ in lake.columns.values()))
    for path in lake.paths:
        with _parquet_file(Storage(), path) as file:
            for _ in file.iter_batches(batch_size=1 << 17, columns=columns):
                pass


def _parquet_types(path: str, schema: pa.Schema, names: dict[str, str], lists: bool) -> dict[str, pa.DataType]:
    """Types of the wanted columns, of those that are allowed."""
    kinds = {}
    for ours, theirs in names.items():
        if theirs not in schema.names:
            raise _no_column(path, ours, theirs, schema.names)
        kinds[ours] = _plain_type(path, theirs, schema.field(theirs).type, lists and ours != "item")
    return kinds


def _plain_type(path: str, name: str, kind: pa.DataType, lists: bool) -> pa.DataType:
    """``kind``, or that of its dictionary's values; raises :class:`SourceError` where it is not allowed."""
    inner = kind.value_type if lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind)) else kind
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    plain = (
        pa.types.is_integer(inner)
        or pa.types.is_floating(inner)
        or pa.types.is_string(inner)
        or pa.types.is_large_string(inner)
        or pa.types.is_timestamp(inner)
        or pa.types.is_date(inner)
        or pa.types.is_decimal(inner)
    )
    if not plain:
        raise SourceError(
            f"{path}: column {name!r} holds {kind}; expected integers, floats, strings, dates or timestamps"
        )
    return inner


def _is_scannable(schema: pa.Schema, kinds: dict[str, pa.DataType]) -> bool:
    """Whether every engine reads such a file as Arrow does: names that differ by more than case and are none of an
    engine's own, no types that one of them lacks."""
    names = [name.lower() for name in schema.names]
    return (
        len(set(names)) == len(names)
        and not {"filename", "file_row_number", "file_index", "_metadata"} & set(names)
        and not any(pa.types.is_float16(kind) or pa.types.is_decimal256(kind) for kind in kinds.values())
    )


def _check_ids(path: str, names: dict[str, str], kinds: dict[str, pa.DataType]) -> None:
    for ours in ("user", "item"):
        kind = kinds[ours]
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise SourceError(f"{path}: column {names[ours]!r} holds {kind}; ids must be integers or strings")


def _plain_array(values: pa.Array) -> pa.Array:
    """Dictionaries decoded, strings as string, moments as int64 microseconds, other numbers as int64 (but for
    uint64) and doubles."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values = values.dictionary_decode()
        kind = values.type
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return values.cast(pa.int64())
    if pa.types.is_large_string(kind):
        return values.cast(pa.string())
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return values.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    if pa.types.is_decimal(kind) or pa.types.is_floating(kind):
        return values.cast(pa.float64())
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return values.cast(pa.list_(pa.string()))
    return values


def _jsonl_batches(
    storage: Storage, path: str, names: dict[str, str], base: int, bad: BadRow, lists: bool
) -> Iterator[pa.RecordBatch]:
    for numbers, lines in _lines(storage, path, lambda line, reason: bad(base + line, reason)):
        positions: list[int] = []
        columns: dict[str, list[Any]] = {ours: [] for ours in names}
        for number, line in zip(numbers.tolist(), lines.to_pylist(), strict=True):
            try:
                row = json.loads(line)
                values = [_json_value(row, ours, theirs, lists) for ours, theirs in names.items()]
            except json.JSONDecodeError as error:
                bad(base + number, f"not valid JSON: {error.msg} at column {error.colno}")
                continue
            except ValueError as error:
                bad(base + number, str(error))
                continue
            positions.append(base + number)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        arrays = {
            ours: pa.array(values, pa.list_(pa.string()) if lists and ours != "item" else pa.string())
            for ours, values in columns.items()
        }
        yield pa.record_batch({"position": pa.array(positions, pa.int64()), **arrays})


def _json_value(row: Any, ours: str, theirs: str, lists: bool) -> str | list[str] | None:
    """One field of a JSON object, as text; an absent id, rating or time is the SQL's to judge."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    value = row.get(theirs)
    if lists and ours != "item":
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, (int, float, str)) and not isinstance(v, bool) for v in values):
            raise ValueError(f"field {theirs!r}: expected strings or numbers, got {str(value)[:80]}")
        return [str(v) for v in values]
    if value is None:
        return None
    allowed = (int, str) if ours in ("user", "item") else (int, float, str)
    if isinstance(value, bool) or not isinstance(value, allowed):
        expected = "an integer or a string" if ours in ("user", "item") else "a number"
        raise ValueError(f"field {theirs!r}: expected {expected}, got {json.dumps(value)[:80]}")
    return str(value)


def _singletons(values: pa.Array) -> pa.Array:
    """Each value as a list of itself; null as a null list."""
    offsets = pa.array(np.arange(len(values) + 1, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, values.cast(pa.string()))


def _flatten_attributes(batch: pa.RecordBatch, lists: pa.Array, field: str) -> pa.RecordBatch:
    """A row per list element that is not empty."""
    parents = pc.list_parent_indices(lists)
    values = pc.list_flatten(lists)
    present = pc.fill_null(pc.not_equal(values, ""), False)
    parents, values = parents.filter(present), values.filter(present)
    items = batch.column("item").cast(pa.string()).take(parents)
    return _attribute_batch(batch.column("position").take(parents), items, field, values)


def _attribute_batch(positions: Any, items: Any, field: str, values: Any) -> pa.RecordBatch:
    return pa.record_batch(
        {
            "position": pa.array(positions, pa.int64()),
            "item": pa.array(items, pa.string()),
            "field": pa.array([field] * len(values), pa.string()),
            "value": pa.array(values, pa.string()),
        }
    )
