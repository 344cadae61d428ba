"""The dataset on disk: what ``s3rec prepare`` writes and everything else reads.

    DIR/manifest.json        versions, counts, shards with their row groups, SHA-256 of every file
    DIR/items.parquet        id, raw, count, attributes (ids); a row per item, 1..N in order
    DIR/attributes.parquet   id, field, raw; a row per attribute, 1..A in order
    DIR/shards/00000.parquet user, items: a row per user, its whole history in time order

    dataset = Dataset.open("data/beauty")
    sequences = dataset.read_row_group(0)       # NumPy views of the decoded Arrow buffers

Item id 0 is padding, 1..N are items, N + 1 is the mask; attribute ids are 1..A, 0 unused. The split is
leave-one-out: a row's last item is the test target, the one before it the validation target, the rest
is training data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from s3rec_dist.data.formats import (
    SHARD_SCHEMA,
    FormatError,
    length_counts,
    open_parquet,
    read_parquet_row_group,
    read_parquet_table,
    sha256_of,
)

FORMAT = "s3rec_dist dataset"
VERSION = 1

SAMPLE_END_BITS = 24
"""A sample's id is ``row << SAMPLE_END_BITS | prefix end``, which bounds a sequence's length."""

MIN_SEQUENCE = 3
"""Shortest history that leaves a training item beside the validation and the test item."""

ITEMS_SCHEMA = pa.schema(
    [("id", pa.int32()), ("raw", pa.string()), ("count", pa.int64()), ("attributes", pa.list_(pa.int32()))]
)
ATTRIBUTES_SCHEMA = pa.schema([("id", pa.int32()), ("field", pa.string()), ("raw", pa.string())])


class DatasetError(ValueError):
    """A dataset that is missing, damaged or of another version; the message names the file."""


@dataclass(frozen=True)
class RowGroup:
    """What scheduling needs to know of a row group without reading it."""

    rows: int
    length_counts: tuple[tuple[int, int], ...]
    """(full sequence length, rows of that length), lengths ascending."""


@dataclass(frozen=True)
class Shard:
    """One file of sequences."""

    path: str
    """Relative to the dataset."""
    rows: int
    sha256: str
    row_groups: tuple[RowGroup, ...]


@dataclass(frozen=True)
class Manifest:
    """The dataset's description, ``manifest.json``."""

    name: str
    users: int
    items: int
    """N, the largest item id."""
    attributes: int
    """A, the largest attribute id."""
    interactions: int
    shards: tuple[Shard, ...]
    files: dict[str, str]
    """SHA-256 of items.parquet and attributes.parquet."""
    preparation: dict[str, Any]
    """The settings of prepare that shape the data, and what it counted."""
    created_with: str
    split: str = "leave_one_out"
    version: int = VERSION

    def to_json(self) -> str:
        """Text for manifest.json; equal manifests give equal text."""
        tree = {"format": FORMAT, **dataclasses.asdict(self)}
        tree["shards"] = [
            {
                "path": shard.path,
                "rows": shard.rows,
                "sha256": shard.sha256,
                "row_groups": [{"rows": g.rows, "length_counts": g.length_counts} for g in shard.row_groups],
            }
            for shard in self.shards
        ]
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "manifest.json") -> Manifest:
        """Reads :meth:`to_json`; ``source`` names the file in errors. Raises :class:`DatasetError`."""
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise DatasetError(f"{source}: not valid JSON ({error}); prepare the dataset again") from error
        if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
            raise DatasetError(f"{source}: not a {FORMAT}'s manifest; expected a folder that 's3rec prepare' wrote")
        if tree.get("version") != VERSION:
            raise DatasetError(
                f"{source}: dataset version {tree.get('version')!r}, this program reads version {VERSION}; "
                "prepare the dataset again with this version"
            )
        try:
            shards = tuple(
                Shard(
                    _inside(shard["path"]),
                    int(shard["rows"]),
                    str(shard["sha256"]),
                    tuple(
                        RowGroup(int(g["rows"]), tuple((int(n), int(rows)) for n, rows in g["length_counts"]))
                        for g in shard["row_groups"]
                    ),
                )
                for shard in tree.pop("shards")
            )
            manifest = cls(shards=shards, **tree)
            counts = (manifest.users, manifest.items, manifest.attributes, manifest.interactions)
            if not all(isinstance(n, int) and n >= 0 for n in counts):
                raise ValueError("counts must be non-negative integers")
            for shard in shards:
                if shard.rows != sum(g.rows for g in shard.row_groups):
                    raise ValueError(f"{shard.path}: rows and row groups disagree")
            if manifest.users != sum(shard.rows for shard in shards):
                raise ValueError("users and the shards' rows disagree")
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{source}: malformed manifest ({error}); prepare the dataset again") from error
        return manifest

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest's text: one name for this exact dataset."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class Sequences:
    """One decoded row group; the arrays are read-only views of Arrow buffers."""

    users: pa.Array
    """Raw user ids, string [rows]."""
    values: np.ndarray
    """Item ids of all rows end to end, int32 [T]."""
    offsets: np.ndarray
    """Row r is ``values[offsets[r]:offsets[r + 1]]``, int64 [rows + 1]."""
    first_row: int
    """Number of its first row in the whole dataset."""


@dataclass(frozen=True)
class ItemAttributes:
    """Attribute ids of each item, as CSR over the item ids 0..N+1; padding and mask have none."""

    offsets: np.ndarray
    """int64 [N + 3]."""
    values: np.ndarray
    """Attribute ids 1..A, unique and ascending within an item, int32."""


class Dataset:
    """A prepared dataset, opened for reading. Methods may be called from several threads."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.row_groups: list[tuple[int, int, int, RowGroup]] = []
        """(shard index, row group index in the shard, number of its first row, row group), in file order."""
        first_row = 0
        for shard_index, shard in enumerate(manifest.shards):
            for group_index, group in enumerate(shard.row_groups):
                self.row_groups.append((shard_index, group_index, first_row, group))
                first_row += group.rows
        self._footers: dict[int, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str) -> Dataset:
        """Reads the manifest of a folder or fsspec URL. Raises :class:`DatasetError`."""
        path = str(path).rstrip("/") or "/"
        source = f"{path}/manifest.json"
        try:
            with fsspec.open(source, "rb") as file:
                text = file.read().decode()
        except FileNotFoundError as error:
            raise DatasetError(
                f"{source}: no such file; expected a dataset folder that 's3rec prepare --output {path}' writes"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{source}: cannot be read ({error})") from error
        return cls(path, Manifest.from_json(text, source))

    @property
    def n_items(self) -> int:
        """N, the largest item id."""
        return self.manifest.items

    @property
    def n_attributes(self) -> int:
        """A, the largest attribute id."""
        return self.manifest.attributes

    @property
    def mask_id(self) -> int:
        """The mask token's item id."""
        return self.manifest.items + 1

    @property
    def n_rows(self) -> int:
        """Users."""
        return self.manifest.users

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest."""
        return self.manifest.fingerprint

    def verify(self) -> None:
        """Compares every file's SHA-256 with the manifest. Raises :class:`DatasetError` naming one that differs."""
        expected = {**self.manifest.files, **{shard.path: shard.sha256 for shard in self.manifest.shards}}
        for name, digest in expected.items():
            try:
                found = sha256_of(self._file(name))
            except FileNotFoundError as error:
                raise self._missing(name) from error
            if found != digest:
                raise DatasetError(
                    f"{self._file(name)}: SHA-256 is {found}, the manifest says {digest}; "
                    "the file has changed since it was prepared: restore it or prepare the dataset again"
                )

    def read_row_group(self, index: int) -> Sequences:
        """Decodes row group ``index`` of :attr:`row_groups`, checksums verified, without copying values."""
        shard_index, group_index, first_row, group = self.row_groups[index]
        name = self.manifest.shards[shard_index].path
        try:
            batch = read_parquet_row_group(self._file(name), group_index, self._footer(shard_index))
        except FileNotFoundError as error:
            raise self._missing(name) from error
        except FormatError as error:
            raise DatasetError(f"{error}; restore the file or prepare the dataset again") from error
        users, lists = batch.columns
        where = f"{self._file(name)}: row group {group_index}"
        offsets = lists.offsets.to_numpy().astype(np.int64)
        values = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
        offsets -= offsets[0]
        if users.null_count or lists.null_count or values.null_count:
            raise DatasetError(f"{where}: holds nulls; prepare the dataset again")
        if length_counts(offsets) != group.length_counts:
            raise DatasetError(f"{where}: sequence lengths differ from the manifest's; prepare the dataset again")
        items = values.to_numpy(zero_copy_only=True)
        if len(items) and not (items.min() >= 1 and items.max() <= self.n_items):
            position = int(np.argmax((items < 1) | (items > self.n_items)))
            row = first_row + int(np.searchsorted(offsets, position, side="right")) - 1
            raise DatasetError(
                f"{where}: row {row} holds item id {items[position]}, expected 1..{self.n_items}; "
                "prepare the dataset again"
            )
        return Sequences(users, items, offsets, first_row)

    def item_attributes(self) -> ItemAttributes:
        """Attribute ids of every item id, padding and mask included."""
        lists = self._items.column("attributes").combine_chunks()
        offsets = lists.offsets.to_numpy().astype(np.int64)
        values = lists.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy(zero_copy_only=False)
        offsets -= offsets[0]
        if len(values) and not (values.min() >= 1 and values.max() <= self.n_attributes):
            raise DatasetError(
                f"{self._file('items.parquet')}: attribute ids must lie in 1..{self.n_attributes}, "
                f"found {values.min()}..{values.max()}; prepare the dataset again"
            )
        return ItemAttributes(np.concatenate([offsets[:1], offsets, offsets[-1:]]), values.astype(np.int32, copy=False))

    def item_raw_ids(self) -> np.ndarray:
        """Raw ids by item id, str objects [N + 2]; padding and mask are ''."""
        raw = np.full(self.n_items + 2, "", dtype=object)
        raw[1:-1] = self._items.column("raw").to_numpy(zero_copy_only=False)
        return raw

    def item_ids(self) -> dict[str, int]:
        """Item id by raw id."""
        return dict(zip(self._items.column("raw").to_pylist(), range(1, self.n_items + 1), strict=True))

    def items_table(self) -> pa.Table:
        """id, raw, count, attributes; row i is item i + 1."""
        return self._items

    def attributes_table(self) -> pa.Table:
        """id, field, raw; row a is attribute a + 1."""
        return self._read_table("attributes.parquet", ATTRIBUTES_SCHEMA, self.n_attributes)

    def segment_pool(self, holdout: int, limit: int = 1 << 22) -> np.ndarray:
        """Up to ``limit`` items of rows laid end to end, each row without its last ``holdout`` items; int32.

        Row groups come in a fixed hashed order, so that a pool that cannot hold all of them is no
        slice of one end of the dataset. The same on every rank.
        """
        from s3rec_dist.hashing import hash64, key_of  # imports torch, which preparing and inspecting do without

        keys = np.full(len(self.row_groups), key_of(0x5E6), dtype=np.int64)
        order = np.argsort(hash64(keys, np.arange(len(keys), dtype=np.int64)), kind="stable")
        pieces: list[np.ndarray] = []
        total = 0
        for index in order:
            if total >= limit:
                break
            sequences = self.read_row_group(int(index))
            lengths = np.diff(sequences.offsets)
            from_end = np.repeat(sequences.offsets[1:], lengths) - np.arange(len(sequences.values))
            piece = sequences.values[from_end > holdout]
            pieces.append(piece)
            total += len(piece)
        return np.concatenate([np.empty(0, np.int32), *pieces])[:limit]

    @cached_property
    def _items(self) -> pa.Table:
        return self._read_table("items.parquet", ITEMS_SCHEMA, self.n_items)

    def _read_table(self, name: str, schema: pa.Schema, rows: int) -> pa.Table:
        try:
            table = read_parquet_table(self._file(name), schema)
        except FileNotFoundError as error:
            raise self._missing(name) from error
        except FormatError as error:
            raise DatasetError(f"{error}; restore the file or prepare the dataset again") from error
        if not np.array_equal(table.column("id").to_numpy(), np.arange(1, rows + 1)):
            raise DatasetError(f"{self._file(name)}: expected ids 1..{rows}, a row each; prepare the dataset again")
        return table

    def _footer(self, shard_index: int) -> Any:
        """The shard's parsed footer, read once."""
        with self._lock:
            footer = self._footers.get(shard_index)
        if footer is None:
            shard = self.manifest.shards[shard_index]
            with open_parquet(self._file(shard.path), SHARD_SCHEMA) as file:
                footer = file.metadata
            if footer.num_row_groups != len(shard.row_groups) or footer.num_rows != shard.rows:
                raise DatasetError(
                    f"{self._file(shard.path)}: {footer.num_rows} rows in {footer.num_row_groups} row groups, "
                    f"the manifest says {shard.rows} in {len(shard.row_groups)}; "
                    "restore the file or prepare the dataset again"
                )
            with self._lock:
                self._footers[shard_index] = footer
        return footer

    def _file(self, name: str) -> str:
        return f"{self.path}/{name}"

    def _missing(self, name: str) -> DatasetError:
        return DatasetError(
            f"{self._file(name)}: no such file, but the manifest lists it; restore it or prepare the dataset again"
        )


def _inside(path: str) -> str:
    """A relative path that stays in the dataset's folder."""
    parts = path.split("/")
    if not path or ":" in path or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"shard path {path!r} leaves the dataset's folder")
    return path
