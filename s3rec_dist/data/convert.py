"""Rewrites a dataset in the other format or with other shard sizes: ``s3rec convert``.

    manifest = convert(Dataset.open("data/beauty"), "s3://bucket/beauty-tars", format="webdataset")

Users, their order, ids and catalogue stay as they are, and so does ``Manifest.content``; rows that a later revision
has replaced are left out. At the end the new shards are read back and compared with what was read.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from s3rec_dist import __version__
from s3rec_dist.data.dataset import Dataset, Manifest, Sequences, new_manifest
from s3rec_dist.data.formats import SHARD_SCHEMA, Format, write_shards
from s3rec_dist.data.output import Progress, clean_up_on_sigterm, dataset_output, progress_on_stderr
from s3rec_dist.storage import Storage, add_storage_argument, storage_of

READ_AHEAD = 8
"""Row groups read before they are needed."""

_CATALOGUE = ("items.parquet", "attributes.parquet", "index.parquet")


class ConvertError(ValueError):
    """A conversion that cannot be done, or whose result is not the dataset; the output is as it was."""


def convert(
    dataset: Dataset,
    output: str,
    *,
    format: Format | None = None,
    rows_per_group: int = 0,
    groups_per_shard: int = 0,
    overwrite: bool = False,
    storage: Storage | None = None,
    progress: Progress = lambda line: None,
) -> Manifest:
    """Writes ``dataset`` to ``output``, a path or URL, and returns the new manifest; what is not given stays as it is.

    Memory holds ``READ_AHEAD`` row groups and one new one. Raises :class:`ConvertError`, OutputError, DatasetError
    or DamagedFile where the dataset is damaged, or StorageError.
    """
    rows, groups = _sizes(dataset, rows_per_group, groups_per_shard)
    old = dataset.manifest
    before, after = _RowsDigest(), _RowsDigest()
    with dataset_output(output, storage or Storage(), overwrite=overwrite, progress=progress) as (folder, _):
        progress(f"writing {old.users:,} users")
        shards = write_shards(
            regrouped(before.over(_row_groups(dataset)), rows),
            os.path.join(folder, "shards"),
            groups,
            format or old.format,
        )
        more = [name for name in old.files if name not in _CATALOGUE]
        for name in more:
            dataset.storage.download(dataset.file(name), os.path.join(folder, name), sha256=old.files[name])
        manifest = new_manifest(
            folder,
            name=old.name,
            format=format or old.format,
            shards=shards,
            items=dataset.items_table(),
            attributes=dataset.attributes_table(),
            preparation=_preparation(old, rows_per_group, groups_per_shard),
            created_with=f"s3rec_dist {__version__}",
            more_files=more,
        )
        progress("reading it back")
        for _ in after.over(_row_groups(Dataset(folder, manifest))):
            pass
        expected = (old.content, old.catalogue, before.hexdigest())
        if (manifest.content, manifest.catalogue, after.hexdigest()) != expected:
            raise ConvertError(
                f"{dataset.path}: the rewritten dataset says something else than this one (content {manifest.content}, "
                f"expected {old.content}); nothing has been written. Check it with 's3rec inspect --verify'"
            )
    return manifest


def _sizes(dataset: Dataset, rows_per_group: int, groups_per_shard: int) -> tuple[int, int]:
    for name, value in (("rows_per_group", rows_per_group), ("groups_per_shard", groups_per_shard)):
        if value < 0:
            raise ConvertError(f"{name}={value}: expected at least 1, or 0 for the dataset's own")
    rows = rows_per_group or int(dataset.index.rows.max())
    return rows, groups_per_shard or int(np.bincount(dataset.index.shard).max())


def _preparation(old: Manifest, rows_per_group: int, groups_per_shard: int) -> dict[str, object]:
    """The facts of the preparation, with the sizes that the dataset now has."""
    given = {"rows_per_group": rows_per_group, "groups_per_shard": groups_per_shard}
    changed = {name: value for name, value in given.items() if value}
    return {**old.preparation, "settings": {**old.preparation.get("settings", {}), **changed}}


def _row_groups(dataset: Dataset) -> Iterator[Sequences]:
    """Every row group in order, the next ones being read meanwhile."""
    pending: deque[Future[Sequences]] = deque()
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="s3rec-convert") as pool:
        try:
            for index in range(len(dataset.index)):
                pending.append(pool.submit(dataset.read_row_group, index))
                if len(pending) == READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def regrouped(groups: Iterable[Sequences], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows as batches of ``rows``, the last one perhaps smaller."""
    waiting: list[pa.RecordBatch] = []
    held = 0
    for group in groups:
        lists = pa.ListArray.from_arrays(pa.array(group.offsets, pa.int32()), pa.array(group.values))
        waiting.append(pa.RecordBatch.from_arrays([group.users, lists], schema=SHARD_SCHEMA))
        held += len(lists)
        if held >= rows:
            table = pa.Table.from_batches(waiting)
            whole = held - held % rows
            for at in range(0, whole, rows):
                yield _one_batch(table.slice(at, rows))
            waiting = table.slice(whole).to_batches()
            held -= whole
    if held:
        yield _one_batch(pa.Table.from_batches(waiting))


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0]


class _RowsDigest:
    """A hash of rows in their order, however they are cut into row groups."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256() for _ in range(4)]

    def over(self, groups: Iterable[Sequences]) -> Iterator[Sequences]:
        """Passes row groups through and takes note of them."""
        for group in groups:
            names = group.users.cast(pa.large_binary())
            offsets = np.frombuffer(names.buffers()[1], np.int64)[names.offset : names.offset + len(names) + 1]
            text = memoryview(names.buffers()[2] or b"")[offsets[0] : offsets[-1]]
            parts: list[Any] = [np.diff(offsets), text, np.diff(group.offsets), group.values]
            for digest, part in zip(self._parts, parts, strict=True):
                digest.update(part)
            yield group

    def hexdigest(self) -> str:
        """One name for all rows so far."""
        return "".join(digest.hexdigest() for digest in self._parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec convert``."""
    parser.add_argument("dataset", metavar="DATASET", help="dataset to rewrite: folder or URL")
    parser.add_argument("--output", required=True, metavar="DIR", help="dataset to write: folder or URL")
    parser.add_argument(
        "--format",
        choices=("parquet", "webdataset"),
        help="of the new shards: parquet, or plain tars that the webdataset library reads (default: as it is)",
    )
    parser.add_argument(
        "--rows-per-group", type=int, default=0, metavar="N", help="users per row group (default: as it is)"
    )
    parser.add_argument(
        "--groups-per-shard", type=int, default=0, metavar="N", help="row groups per shard file (default: as it is)"
    )
    parser.add_argument(
        "--revision", type=int, default=0, metavar="N", help="an earlier revision (default: the newest)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is a dataset already")
    add_storage_argument(parser)


def run(args: argparse.Namespace) -> None:
    """``s3rec convert``: progress on stderr, a line on stdout."""
    begin = time.monotonic()
    progress = progress_on_stderr()
    clean_up_on_sigterm()
    storage = storage_of(args)
    manifest = convert(
        Dataset.open(args.dataset, storage, revision=args.revision),
        args.output,
        format=args.format,
        rows_per_group=args.rows_per_group,
        groups_per_shard=args.groups_per_shard,
        overwrite=args.overwrite,
        storage=storage,
        progress=progress,
    )
    shards, size = len(manifest.shards), sum(shard.size for shard in manifest.shards) / 1e6
    print(
        f"{args.output}: {manifest.users:,} users in {shards:,} {manifest.format} shards ({size:,.1f} MB), "
        f"in {time.monotonic() - begin:.1f} s; content {manifest.content[:12]} as before"
    )
