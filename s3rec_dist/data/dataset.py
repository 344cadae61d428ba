"""The dataset on disk: what ``s3rec prepare`` writes and everything else reads.

    DIR/manifest.json        counts, shards, SHA-256 of every file; written last
    DIR/index.parquet        a row per row group: its bytes in its shard and their SHA-256, rows, sequence lengths
    DIR/items.parquet        id, raw, count, attributes (ids); a row per item, 1..N in order
    DIR/attributes.parquet   id, field, raw; a row per attribute, 1..A in order
    DIR/shards/00000.parquet user, items: a row per user, its whole history in time order (or 00000.tar)

    dataset = Dataset.open("data/beauty")
    sequences = dataset.read_row_group(0)       # NumPy views of the decoded Arrow buffers

Item id 0 is padding, 1..N are items, N + 1 is the mask; attribute ids are 1..A, 0 unused. The split is
leave-one-out: a row's last item is the test target, the one before it the validation target, the rest
is training data.

Appending makes a new revision n: its files lie in DIR/v{n}, rows that it replaces are marked dead in its index,
and the manifest before it becomes DIR/manifests/{n - 1}.json. Files never change, so that every revision can
still be opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s3rec_dist.data.formats import (
    SHARD_SCHEMA,
    Format,
    FormatError,
    WrittenShard,
    add_contents,
    decode_arrow,
    decode_parquet,
    length_counts,
    parse_parquet_tail,
    read_parquet_table,
    sha256_of,
    sync_file,
    write_parquet_table,
)
from s3rec_dist.hashing import hash64, key_of
from s3rec_dist.storage import DamagedFile, Storage

FORMAT = "s3rec_dist dataset"
VERSION = 2

SAMPLE_END_BITS = 24
"""A sample's id is ``row << SAMPLE_END_BITS | prefix end``, which bounds a sequence's length."""

MIN_SEQUENCE = 3
"""Shortest history that leaves a training item beside the validation and the test item."""

ITEMS_SCHEMA = pa.schema(
    [("id", pa.int32()), ("raw", pa.string()), ("count", pa.int64()), ("attributes", pa.list_(pa.int32()))]
)
ATTRIBUTES_SCHEMA = pa.schema([("id", pa.int32()), ("field", pa.string()), ("raw", pa.string())])
INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("group", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.binary(32)),
        ("rows", pa.int32()),
        ("lengths", pa.list_(pa.int32())),
        ("counts", pa.list_(pa.int32())),
        ("dead", pa.list_(pa.int32())),
    ]
)

_CHECKS = 16
"""Files checked at a time."""


class DatasetError(ValueError):
    """A dataset that is missing, damaged or of another version; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """One file of sequences."""

    path: str
    """Relative to the dataset."""
    rows: int
    size: int
    """Bytes."""
    sha256: str
    tail_sha256: str
    """Of what follows the last row group."""


@dataclass(frozen=True)
class Index:
    """What scheduling and reading need to know of the G row groups, without reading them."""

    shard: np.ndarray
    """Number of each row group's shard, int32 [G]."""
    group: np.ndarray
    """Its number within the shard, int32 [G]."""
    offset: np.ndarray
    """Its first byte in the shard, int64 [G]."""
    size: np.ndarray
    """Its bytes, int64 [G]."""
    sha256: list[bytes]
    """Of its bytes."""
    rows: np.ndarray
    """Rows it holds, dead ones included, int32 [G]."""
    lengths: np.ndarray
    """Sequence lengths that occur among its living rows, ascending, all row groups end to end, int32."""
    counts: np.ndarray
    """Living rows of each of ``lengths``, int32."""
    length_offsets: np.ndarray
    """Row group g has ``lengths[length_offsets[g]:length_offsets[g + 1]]``, int64 [G + 1]."""
    dead: np.ndarray
    """Rows that a later revision has replaced, ascending numbers within their row groups, end to end, int32."""
    dead_offsets: np.ndarray
    """As ``length_offsets``, of ``dead``."""

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def first_row(self) -> np.ndarray:
        """Number of each row group's first living row in the whole dataset, and the end, int64 [G + 1]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.per_group(self.counts.astype(np.int64)))])

    def per_group(self, values: np.ndarray) -> np.ndarray:
        """Sums [G] of values that belong to ``lengths``."""
        ends = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
        return ends[self.length_offsets[1:]] - ends[self.length_offsets[:-1]]

    def length_counts(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """The living rows' lengths, ascending, and the rows of each."""
        here = slice(*self.length_offsets[group : group + 2])
        return self.lengths[here], self.counts[here]

    def items(self, group: int) -> int:
        """Items of a row group's living rows."""
        lengths, counts = self.length_counts(group)
        return int(lengths.astype(np.int64) @ counts)

    def living_rows(self, group: int) -> np.ndarray:
        """Rows of a row group that are not dead, as stored."""
        return np.setdiff1d(np.arange(self.rows[group]), self.dead_rows(group))

    def dead_rows(self, group: int) -> np.ndarray:
        """Rows of a row group that are dead."""
        return self.dead[slice(*self.dead_offsets[group : group + 2])]

    def agrees_with(self, manifest: Manifest) -> bool:
        """Whether it lists the manifest's shards and rows, row groups in order, each within its shard."""
        if len(self.lengths) != len(self.counts):
            return False
        shards = np.arange(len(manifest.shards))
        first, end = (np.searchsorted(self.shard, shards, side=side) for side in ("left", "right"))
        sizes = np.array([shard.size for shard in manifest.shards], dtype=np.int64)
        if (np.diff(self.shard) < 0).any() or (end - first).sum() != len(self) or (end == first).any():
            return False
        dead = np.diff(self.dead_offsets)
        living = self.per_group(self.counts.astype(np.int64))
        return bool(
            np.array_equal(self.group, np.arange(len(self)) - np.repeat(first, end - first))
            and np.array_equal(np.bincount(self.shard, self.rows, len(shards)), [s.rows for s in manifest.shards])
            and np.array_equal(living + dead, self.rows)
            and min(self.offset.min(initial=0), self.size.min(initial=0), self.lengths.min(initial=0)) >= 0
            and self.lengths.max(initial=0) < 1 << SAMPLE_END_BITS
            and (self.size <= sizes[self.shard] - self.offset).all()
            and self.counts.min(initial=1) > 0
            and self.dead.min(initial=0) >= 0
            and (self.dead < np.repeat(self.rows, dead)).all()
            and living.sum() == manifest.users
            and self.lengths.astype(np.int64) @ self.counts == manifest.interactions
        )

    def to_table(self) -> pa.Table:
        """The rows of index.parquet."""
        lists = [
            pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
            for offsets, values in (
                (self.length_offsets, self.lengths),
                (self.length_offsets, self.counts),
                (self.dead_offsets, self.dead),
            )
        ]
        digests = pa.array(self.sha256, pa.binary(32))
        return pa.Table.from_arrays(
            [pa.array(self.shard), pa.array(self.group), pa.array(self.offset), pa.array(self.size), digests]
            + [pa.array(self.rows), *lists],
            schema=INDEX_SCHEMA,
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Index:
        """Reads :meth:`to_table`."""
        table = table.combine_chunks()
        numbers = {name: table.column(name).to_numpy() for name in ("shard", "group", "offset", "size", "rows")}
        lists = {name: _ragged(table.column(name)) for name in ("lengths", "counts", "dead")}
        return cls(
            **numbers,
            sha256=table.column("sha256").to_pylist(),
            lengths=lists["lengths"][0],
            counts=lists["counts"][0],
            length_offsets=lists["lengths"][1],
            dead=lists["dead"][0],
            dead_offsets=lists["dead"][1],
        )

    @classmethod
    def of_shards(cls, shards: Sequence[WrittenShard], first_shard: int = 0) -> Index:
        """The index of newly written shards, the first of which is number ``first_shard``."""
        groups = [(n, i, group) for n, shard in enumerate(shards, first_shard) for i, group in enumerate(shard.groups)]
        empty = [np.empty(0, np.int32)]
        sizes = np.array([0] + [len(group.lengths) for *_, group in groups], dtype=np.int64)
        return cls(
            shard=np.array([n for n, _, _ in groups], dtype=np.int32),
            group=np.array([i for _, i, _ in groups], dtype=np.int32),
            offset=np.array([group.offset for *_, group in groups], dtype=np.int64),
            size=np.array([group.size for *_, group in groups], dtype=np.int64),
            sha256=[group.sha256 for *_, group in groups],
            rows=np.array([group.rows for *_, group in groups], dtype=np.int32),
            lengths=np.concatenate(empty + [group.lengths for *_, group in groups]),
            counts=np.concatenate(empty + [group.counts for *_, group in groups]),
            length_offsets=np.cumsum(sizes),
            dead=empty[0],
            dead_offsets=np.zeros(len(groups) + 1, dtype=np.int64),
        )


@dataclass(frozen=True)
class Manifest:
    """The dataset's description, ``manifest.json``."""

    name: str
    format: Format
    users: int
    items: int
    """N, the largest item id."""
    attributes: int
    """A, the largest attribute id."""
    interactions: int
    content: str
    """Hash of what the dataset says, whatever its format, shards, row groups and the order of its rows."""
    rows_content: tuple[int, int]
    """The rows' part of ``content``, a sum over rows (``formats.content_of``)."""
    catalogue: str
    """SHA-256 of the items' raw ids in order: what each item id means."""
    shards: tuple[Shard, ...]
    files: dict[str, str]
    """SHA-256 of the other files."""
    preparation: dict[str, Any]
    """The settings of prepare that shape the data, and what it counted."""
    created_with: str
    revision: int = 1
    """Counts the appends to a dataset, from 1."""
    folder: str = ""
    """Where ``files`` lie, relative to the dataset: '' or as in 'v2/'."""
    split: str = "leave_one_out"
    version: int = VERSION

    def below(self, folder: str) -> Manifest:
        """The same dataset with all its files moved into ``folder``, '' or as in 'new/'."""
        shards = tuple(dataclasses.replace(shard, path=f"{folder}{shard.path}") for shard in self.shards)
        return dataclasses.replace(self, shards=shards, folder=f"{folder}{self.folder}")

    def to_json(self) -> str:
        """Text for manifest.json; equal manifests give equal text."""
        return sealed({"kind": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str, source: str = "manifest.json") -> Manifest:
        """Reads :meth:`to_json`; ``source`` names the file in errors. Raises :class:`DatasetError`."""
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{source}: not valid JSON ({error}); prepare the dataset again") from error
        if not isinstance(tree, dict) or FORMAT not in (tree.get("kind"), tree.get("format")):  # the latter: version 1
            raise DatasetError(f"{source}: not a {FORMAT}'s manifest; expected a folder that 's3rec prepare' wrote")
        if tree.get("version") != VERSION:
            raise DatasetError(
                f"{source}: dataset version {tree.get('version')!r}, this program reads version {VERSION}; "
                "prepare the dataset again with this version"
            )
        if sealed({name: value for name, value in tree.items() if name != _SEAL}) != text:
            raise DatasetError(f"{source}: has changed since it was written; {_RESTORE}")
        del tree["kind"], tree[_SEAL]
        try:
            shards = tuple(Shard(**shard) for shard in tree.pop("shards"))
            first, second = tree.pop("rows_content")
            manifest = cls(shards=shards, rows_content=(first, second), **tree)
            _check_fields(manifest)
            if not isinstance(manifest.preparation, dict) or not all(type(n) is int for n in manifest.rows_content):
                raise ValueError("preparation must be a mapping, rows_content two numbers")
            if manifest.format not in ("parquet", "webdataset"):
                raise ValueError(f"format {manifest.format!r}, expected parquet or webdataset")
            for shard in shards:
                _check_fields(shard)
                _inside(shard.path)
                _check_sha256(shard.sha256)
                _check_sha256(shard.tail_sha256)
            for name, sha256 in manifest.files.items():
                _inside(f"{manifest.folder}{name}")
                _check_sha256(sha256)
            if missing := {"index.parquet", "items.parquet", "attributes.parquet"} - manifest.files.keys():
                raise ValueError(f"files lacks {', '.join(sorted(missing))}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{source}: malformed manifest ({error}); prepare the dataset again") from error
        return manifest

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest's text: one name for this exact dataset."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


_SEAL = "sha256"


def sealed(tree: Mapping[str, Any]) -> str:
    """Canonical JSON of a manifest with the SHA-256 of what it says."""

    def text(fields: Mapping[str, Any]) -> str:
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"

    return text({**tree, _SEAL: hashlib.sha256(text(tree).encode()).hexdigest()})


@dataclass(frozen=True)
class Sequences:
    """One decoded row group; the arrays are read-only views of Arrow buffers."""

    users: Any
    """Raw user ids, a string array [rows]; None where they were not asked for."""
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
    """A prepared dataset, opened for reading. Methods may be called from several threads.

    Row groups that turn out to be damaged are errors; where up to ``max_bad_shards`` shards may be, they read as
    empty ones and are listed in ``damaged``.
    """

    def __init__(
        self, path: str, manifest: Manifest, storage: Storage | None = None, *, max_bad_shards: int = 0
    ) -> None:
        self.path, self.manifest, self.storage = path, manifest, storage or Storage()
        self.max_bad_shards = max_bad_shards
        self.damaged: dict[int, str] = {}
        """Row groups that were left out, each with the reason."""
        self._footers: dict[int, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str, storage: Storage | None = None, *, revision: int = 0, max_bad_shards: int = 0) -> Dataset:
        """Reads the manifest of a folder or fsspec URL; of an earlier ``revision`` where it is not 0.

        Raises :class:`DatasetError`, or StorageError where the storage may not be used or does not answer.
        """
        storage = storage or Storage()
        path = str(path).rstrip("/") or "/"
        source = f"{path}/manifest.json"
        manifest = cls._read_manifest(source, path, storage)
        if revision not in (0, manifest.revision):
            if not 0 < revision < manifest.revision:
                known = f"revisions 1 to {manifest.revision}" if manifest.revision > 1 else "only revision 1"
                raise DatasetError(f"{source}: has {known}, not {revision}")
            manifest = cls._read_manifest(f"{path}/manifests/{revision}.json", path, storage)
        return cls(path, manifest, storage, max_bad_shards=max_bad_shards)

    @staticmethod
    def _read_manifest(source: str, path: str, storage: Storage) -> Manifest:
        try:
            text = storage.read(source).decode()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DatasetError(
                f"{source}: no such file; expected a dataset folder that 's3rec prepare --output {path}' writes"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        return Manifest.from_json(text, source)

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

    @cached_property
    def index(self) -> Index:
        """The row groups."""
        table = self._read_table("index.parquet", INDEX_SCHEMA)
        index = None if _has_nulls(table) else Index.from_table(table)
        if index is None or not index.agrees_with(self.manifest):
            raise DatasetError(f"{self.file('index.parquet')}: its row groups and the manifest disagree; {_RESTORE}")
        return index

    def verify(self, part: int = 0, parts: int = 1, *, hashes: bool = True) -> None:
        """Compares the files' sizes and, with ``hashes``, their SHA-256 with the manifest: of ``parts`` shares of the
        shards this one. Raises :class:`DatasetError` naming a file that differs."""
        shares: list[tuple[str, int, str]] = [
            (shard.path, shard.size, shard.sha256) for shard in self.manifest.shards[part::parts]
        ]
        if hashes and part == 0:
            shares += [(f"{self.manifest.folder}{name}", -1, sha) for name, sha in self.manifest.files.items()]
        with ThreadPoolExecutor(_CHECKS, thread_name_prefix="s3rec-verify") as pool:
            try:
                list(pool.map(lambda share: self._verify_file(share, hashes), shares))
            finally:
                pool.shutdown(cancel_futures=True)

    def _verify_file(self, share: tuple[str, int, str], hashes: bool) -> None:
        name, size, sha256 = share
        url = f"{self.path}/{name}"
        try:
            if size >= 0 and (found := self.storage.size(url)) != size:
                raise DatasetError(f"{url}: has {found:,} bytes, the manifest says {size:,}; {_RESTORE}")
            if hashes and sha256 not in (self.storage.sha256(url) for _ in range(2)):  # once spoilt by the network
                raise DatasetError(f"{url}: {_CHANGED}")
        except FileNotFoundError as error:
            raise self._missing(name) from error
        except OSError as error:
            raise DatasetError(f"{url}: cannot be read ({error})") from error

    def read_row_group(self, index: int, with_users: bool = True) -> Sequences:
        """Decodes row group ``index``, its SHA-256 verified, without copying values; without ``with_users`` in less
        time. Dead rows are left out.

        Raises :class:`DatasetError`, naming the shard, where it is damaged; see :class:`Dataset` for how to do without.
        """
        try:
            return self._sequences(index, with_users)
        except _Damaged as error:
            with self._lock:
                if self.max_bad_shards:
                    self.damaged[index] = str(error)
                bad = {int(self.index.shard[i]) for i in self.damaged}
            if len(bad) > self.max_bad_shards or not self.max_bad_shards:
                raise DatasetError(
                    f"{error}; {_RESTORE}"
                    + (f". This is damaged shard {len(bad)}, more than may be left out" if self.damaged else "")
                ) from error
        return Sequences(
            pa.array([], pa.string()), np.empty(0, np.int32), np.zeros(1, np.int64), int(self.index.first_row[index])
        )

    def read_users(self, index: int) -> pa.Array:
        """Raw user ids of row group ``index``, dead rows left out. Of Parquet only their column is read, of which page
        checksums are verified and not the row group's SHA-256. Raises as :meth:`read_row_group`."""
        if self.manifest.format != "parquet":
            return self.read_row_group(index).users
        shard, group = int(self.index.shard[index]), int(self.index.group[index])
        url = f"{self.path}/{self.manifest.shards[shard].path}"
        where = f"{url}: row group {group}"
        with _telling_damage(url, where):
            footer = self._footer(shard)
            offset, size, _ = footer.chunks[group][SHARD_SCHEMA.get_field_index("user")]
            data = self.storage.read_range(url, offset, size)
            users = decode_parquet(data, offset, footer, group, ["user"], self.index.items(index), where).column("user")
        return users.take(pa.array(self.index.living_rows(index)))

    def _sequences(self, index: int, with_users: bool) -> Sequences:
        entry, name = self.index, self.manifest.shards[self.index.shard[index]].path
        group = int(entry.group[index])
        url = f"{self.path}/{name}"
        where = f"{url}: row group {group}"
        with _telling_damage(url, where):
            offset = int(entry.offset[index])
            data = self.storage.read_checked(url, offset, int(entry.size[index]), entry.sha256[index])
            if self.manifest.format == "parquet":
                footer = self._footer(int(entry.shard[index]))
                columns = SHARD_SCHEMA.names if with_users else ["items"]
                batch = decode_parquet(data, offset, footer, group, columns, entry.items(index), where)
            else:
                batch = decode_arrow(data, where)
        lists = batch.column("items")
        users = batch.column("user") if with_users else None
        offsets = lists.offsets.to_numpy().astype(np.int64)
        values = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
        offsets -= offsets[0]
        if (users is not None and users.null_count) or lists.null_count or values.null_count:
            raise _Damaged(f"{where}: holds nulls")
        items = values.to_numpy(zero_copy_only=True)
        if len(dead := entry.dead_rows(index)):
            is_living = np.ones(len(lists), dtype=bool)
            is_living[dead] = False
            lengths = np.diff(offsets)
            items = items[np.repeat(is_living, lengths)]
            offsets = np.concatenate([offsets[:1], np.cumsum(lengths[is_living])])
            users = users.filter(pa.array(is_living)) if users is not None else None
        if not all(map(np.array_equal, length_counts(offsets), entry.length_counts(index))):
            raise _Damaged(f"{where}: sequence lengths differ from the index's")
        first_row = int(entry.first_row[index])
        if len(items) and not (items.min() >= 1 and items.max() <= self.n_items):
            position = int(np.argmax((items < 1) | (items > self.n_items)))
            row = first_row + int(np.searchsorted(offsets, position, side="right")) - 1
            raise _Damaged(f"{where}: row {row} holds item id {items[position]}, expected 1..{self.n_items}")
        return Sequences(users, items, offsets, first_row)

    def item_attributes(self) -> ItemAttributes:
        """Attribute ids of every item id, padding and mask included."""
        values, offsets = _ragged(self._items.column("attributes"))
        if len(values) and not (values.min() >= 1 and values.max() <= self.n_attributes):
            raise DatasetError(
                f"{self.file('items.parquet')}: attribute ids must lie in 1..{self.n_attributes}, "
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
        return self._read_catalogue("attributes.parquet", ATTRIBUTES_SCHEMA, self.n_attributes)

    def items_digest(self, count: int) -> str:
        """What ``manifest.catalogue`` was when the dataset had its first ``count`` items; '' where it has fewer."""
        if count == self.n_items:
            return self.manifest.catalogue
        return _digest(self._items.select(["raw"]).slice(0, count)) if count < self.n_items else ""

    def attributes_digest(self, count: int) -> str:
        """SHA-256 of the fields and raw values of its first ``count`` attributes; '' where it has fewer."""
        named = self.attributes_table().select(["field", "raw"])
        return _digest(named.slice(0, count)) if count <= self.n_attributes else ""

    def segment_pool(self, holdout: int, limit: int = 1 << 22) -> np.ndarray:
        """Up to ``limit`` items of rows laid end to end, each row without its last ``holdout`` items; int32.

        Row groups come in a fixed hashed order, so that a pool that cannot hold all of them is no
        slice of one end of the dataset. The same on every rank.
        """
        keys = np.full(len(self.index), key_of(0x5E6), dtype=np.int64)
        order = np.argsort(hash64(keys, np.arange(len(keys), dtype=np.int64)), kind="stable")
        pieces: list[np.ndarray] = []
        total = 0
        for index in order:
            if total >= limit:
                break
            sequences = self.read_row_group(int(index), with_users=False)
            lengths = np.diff(sequences.offsets)
            from_end = np.repeat(sequences.offsets[1:], lengths) - np.arange(len(sequences.values))
            piece = sequences.values[from_end > holdout]
            pieces.append(piece)
            total += len(piece)
        return np.concatenate([np.empty(0, np.int32), *pieces])[:limit]

    def release_catalogue(self) -> None:
        """Lets go of the memory of the item catalogue, which is read again when it is asked for."""
        vars(self).pop("_items", None)

    @cached_property
    def _items(self) -> pa.Table:
        return self._read_catalogue("items.parquet", ITEMS_SCHEMA, self.n_items)

    def _read_catalogue(self, name: str, schema: pa.Schema, rows: int) -> pa.Table:
        table = self._read_table(name, schema)
        if not np.array_equal(table.column("id").to_numpy(), np.arange(1, rows + 1)):
            raise DatasetError(f"{self.file(name)}: expected ids 1..{rows}, a row each; prepare the dataset again")
        return table

    def _read_table(self, name: str, schema: pa.Schema) -> pa.Table:
        """One of the manifest's files, its SHA-256 verified."""
        url = self.file(name)
        try:
            sha256 = bytes.fromhex(self.manifest.files[name])
            data = self.storage.read_checked(url, 0, self.storage.size(url), sha256)
            return read_parquet_table(data, schema, url)
        except FileNotFoundError as error:
            raise self._missing(f"{self.manifest.folder}{name}") from error
        except DamagedFile as error:
            raise DatasetError(f"{url}: {_CHANGED}") from error
        except OSError as error:
            raise DatasetError(f"{url}: cannot be read ({error})") from error
        except FormatError as error:
            raise DatasetError(f"{error}; {_RESTORE}") from error

    def _footer(self, shard_index: int) -> Any:
        """The shard's parsed footer, read once."""
        with self._lock:
            footer = self._footers.get(shard_index)
        if footer is None:
            shard = self.manifest.shards[shard_index]
            url = f"{self.path}/{shard.path}"
            own = np.flatnonzero(self.index.shard == shard_index)
            offset = int((self.index.offset[own] + self.index.size[own]).max())
            tail = self.storage.read_checked(url, offset, shard.size - offset, bytes.fromhex(shard.tail_sha256))
            footer = parse_parquet_tail(tail, url)
            if footer.rows != self.index.rows[own].tolist():
                raise FormatError(f"{url}: the rows of its row groups differ from the index's")
            with self._lock:
                self._footers[shard_index] = footer
        return footer

    def file(self, name: str) -> str:
        """Path or URL of one of the manifest's ``files``."""
        return f"{self.path}/{self.manifest.folder}{name}"

    def _missing(self, name: str) -> DatasetError:
        return DatasetError(f"{self.path}/{name}: no such file, but the manifest lists it; {_RESTORE}")


_RESTORE = "restore it or prepare the dataset again"
_CHANGED = f"its SHA-256 is not the manifest's; the file has changed since it was prepared: {_RESTORE}"


@contextlib.contextmanager
def _telling_damage(url: str, where: str) -> Iterator[None]:
    """Errors of reading a row group as :class:`DatasetError`."""
    try:
        yield
    except FileNotFoundError:
        raise _Damaged(f"{url}: no such file, but the manifest lists it") from None
    except OSError as error:  # a bad sector is damage; what else stands in the way may pass
        kind = _Damaged if error.errno == errno.EIO else DatasetError
        raise kind(f"{url}: cannot be read ({error})") from error
    except DamagedFile as error:
        raise _Damaged(f"{where}: {str(error).removeprefix(url + ': ')}") from error
    except FormatError as error:
        raise _Damaged(str(error)) from error


class _Damaged(DatasetError):
    """A row group that cannot be had from its shard, now or later."""


def new_manifest(
    folder: str,
    *,
    name: str,
    format: Format,
    shards: Sequence[WrittenShard],
    items: pa.Table,
    attributes: pa.Table,
    preparation: Mapping[str, Any],
    created_with: str,
    more_files: Iterable[str] = (),
    before: Dataset | None = None,
    dead: Mapping[int, np.ndarray] | None = None,
    dead_content: tuple[int, int] = (0, 0),
) -> Manifest:
    """Writes the catalogue, the index and then the manifest of a dataset into ``folder``, where the new ``shards``
    lie under ``shards/``.

    With ``before`` it is the next revision of that dataset: files and shards belong into ``folder``/v{n}, the index
    goes on from the one before, the rows ``dead`` {row group: numbers of rows in it, as stored} are replaced, whose
    content (``formats.content_of``) is ``dead_content``. ``more_files`` are names of files that lie beside the
    catalogue already.
    """
    revision = before.manifest.revision + 1 if before else 1
    sub = f"v{revision}/" if before else ""
    where = os.path.join(folder, sub)
    old_shards = before.manifest.shards if before else ()
    index = Index.of_shards(shards, len(old_shards))
    content = add_contents(shard.content for shard in shards)
    if before is not None:
        index = _joined(_with_dead(before, dead or {}), index)
        minus = (-dead_content[0], -dead_content[1])
        content = add_contents([before.manifest.rows_content, content, minus])
    items, attributes = items.cast(ITEMS_SCHEMA), attributes.cast(ATTRIBUTES_SCHEMA)
    tables = {"items.parquet": items, "attributes.parquet": attributes, "index.parquet": index.to_table()}
    files = {file: write_parquet_table(table, os.path.join(where, file)) for file, table in tables.items()}
    files |= {file: sha256_of(os.path.join(where, file)) for file in more_files}
    told = [*content, _digest(items), _digest(attributes)]
    manifest = Manifest(
        name=name,
        format=format,
        users=int(index.first_row[-1]),
        items=len(items),
        attributes=len(attributes),
        interactions=int(index.lengths.astype(np.int64) @ index.counts),
        content=hashlib.sha256(json.dumps(told).encode()).hexdigest(),
        rows_content=content,
        catalogue=_digest(items.select(["raw"])),
        shards=(
            *old_shards,
            *(Shard(f"{sub}shards/{s.name}", s.rows, s.size, s.sha256, s.tail_sha256) for s in shards),
        ),
        files=files,
        preparation=dict(preparation),
        created_with=created_with,
        revision=revision,
        folder=sub,
    )
    storage = Storage()
    if before is not None:
        storage.write(os.path.join(folder, "manifests", f"{revision - 1}.json"), before.manifest.to_json().encode())
    storage.write(os.path.join(folder, "manifest.json"), manifest.to_json().encode())
    for name in (os.path.join(where, "shards"), where, folder):
        if os.path.isdir(name):
            sync_file(name)
    return manifest


def _with_dead(dataset: Dataset, dead: Mapping[int, np.ndarray]) -> Index:
    """The dataset's index with further dead rows."""
    index = dataset.index
    lengths, counts, rows = [], [], []
    for group in range(len(index)):
        kept = index.length_counts(group)
        more = dead.get(group)
        if more is not None:
            kept = _without(dataset, group, more)
        lengths.append(kept[0])
        counts.append(kept[1])
        rows.append(np.union1d(index.dead_rows(group), more if more is not None else []).astype(np.int32))
    return dataclasses.replace(
        index,
        lengths=np.concatenate([np.empty(0, np.int32), *lengths]),
        counts=np.concatenate([np.empty(0, np.int32), *counts]),
        length_offsets=np.cumsum([0, *map(len, lengths)], dtype=np.int64),
        dead=np.concatenate([np.empty(0, np.int32), *rows]),
        dead_offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
    )


def _without(dataset: Dataset, group: int, dead: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Length counts of a row group without the stored rows ``dead``."""
    living = dataset.index.living_rows(group)
    lengths = np.diff(dataset.read_row_group(group, with_users=False).offsets)[~np.isin(living, dead)]
    return length_counts(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))


def _joined(first: Index, second: Index) -> Index:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Index):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if field.name.endswith("_offsets"):
            values[field.name] = np.concatenate([a, b[1:] + a[-1]])
        else:
            values[field.name] = a + b if isinstance(a, list) else np.concatenate([a, b])
    return Index(**values)


def _digest(table: pa.Table) -> str:
    """SHA-256 of a table's values, however its chunks and buffers lie."""
    digest = hashlib.sha256()
    for column in table.columns:
        kind = column.type
        if pa.types.is_string(kind) or pa.types.is_list(kind):
            lengths = pc.binary_length(column) if pa.types.is_string(kind) else pc.list_value_length(column)
            digest.update(lengths.combine_chunks().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            for chunk in column.chunks:
                if pa.types.is_list(kind):
                    digest.update(chunk.flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
                else:
                    digest.update(b"".join(_string_bytes(chunk)))
        else:
            digest.update(column.combine_chunks().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


def _string_bytes(array: pa.Array) -> Iterable[bytes]:
    array = array.cast(pa.large_string())
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    yield bytes(memoryview(array.buffers()[2] or b"")[offsets[0] : offsets[-1]])


def _has_nulls(table: pa.Table) -> bool:
    """Whether a column holds nulls, or a list does."""
    lists = [column for column in table.columns if pa.types.is_list(column.type)]
    return any(column.null_count for column in [*table.columns, *map(pc.list_flatten, lists)])


def _ragged(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """(values end to end, offsets int64) of a list column."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy(zero_copy_only=False)
    return values, offsets - offsets[0]


def _check_fields(described: Manifest | Shard) -> None:
    """Raises :class:`ValueError` unless the fields that are text and counts are that."""
    for field in dataclasses.fields(described):
        value = getattr(described, field.name)
        if (field.type == "str" and type(value) is not str) or (
            field.type == "int" and (type(value) is not int or not 0 <= value < 1 << 63)
        ):
            raise ValueError(f"{field.name} is {value!r}, expected {_EXPECTED[field.type]}")


_EXPECTED = {"str": "text", "int": "a number from 0"}


def _check_sha256(text: str) -> None:
    if len(bytes.fromhex(text)) != 32:
        raise ValueError(f"{text!r} is not a SHA-256")


def _inside(path: str) -> None:
    """Raises :class:`ValueError` unless a relative path stays in the dataset's folder."""
    parts = path.split("/")
    if not path.isprintable() or ":" in path or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"path {path!r} leaves the dataset's folder")
