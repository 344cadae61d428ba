"""Small datasets by the project's own writer, and shards of other making that index and manifest vouch for: what is
wrong with those can only be noticed in what they hold."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s3rec_dist.data.dataset import ATTRIBUTES_SCHEMA, ITEMS_SCHEMA, Dataset, Index, new_manifest, sealed
from s3rec_dist.data.formats import SHARD_SCHEMA, Format, write_parquet_table, write_shards
from s3rec_dist.data.order import SampleSpec

FORMATS: tuple[Format, ...] = ("parquet", "webdataset")
EXTENSIONS = {"parquet": "parquet", "webdataset": "tar"}

Groups = list[list[list[int]]]
"""Row groups of histories."""


def shard_batch(histories: Sequence[list[int]], first_row: int = 0) -> pa.RecordBatch:
    """A row group; row r is user ``u{r}``."""
    users = [f"u{row}" for row in range(first_row, first_row + len(histories))]
    return pa.record_batch({"user": users, "items": histories}, schema=SHARD_SCHEMA)


def write(folder: Path, groups: Groups, format: Format = "parquet", groups_per_shard: int = 2, **more: Any) -> Dataset:
    """A dataset of these row groups, with the items up to the largest and no attributes; ``more`` opens it."""
    starts = np.cumsum([0, *map(len, groups)])
    batches = [shard_batch(rows, int(first)) for first, rows in zip(starts, groups, strict=False)]
    n_items = max((item for rows in groups for history in rows for item in history), default=0)
    ids = list(range(1, n_items + 1))
    items = {"id": ids, "raw": [f"i{i}" for i in ids], "count": [1] * n_items, "attributes": [[]] * n_items}
    new_manifest(
        str(folder),
        name="toy",
        format=format,
        shards=write_shards(batches, str(folder / "shards"), groups_per_shard, format),
        items=pa.table(items, schema=ITEMS_SCHEMA),
        attributes=pa.table({"id": [], "field": [], "raw": []}, schema=ATTRIBUTES_SCHEMA),
        preparation={},
        created_with="tests",
    )
    return Dataset.open(str(folder), **more)


def random_groups(groups: int = 7, rows: int = 12, seed: int = 0, longest: int = 14) -> Groups:
    """Histories of 3 to ``longest`` of 39 items."""
    generator = np.random.default_rng(seed)
    return [
        [generator.integers(1, 40, generator.integers(3, longest + 1)).tolist() for _ in range(rows)]
        for _ in range(groups)
    ]


def rows_of(dataset: Dataset) -> list[tuple[str, list[int]]]:
    """(user, items) of every row."""
    rows = []
    for group in map(dataset.read_row_group, range(len(dataset.index))):
        histories = [group.values[a:b].tolist() for a, b in pairwise(group.offsets)]
        rows += list(zip(group.users.to_pylist(), histories, strict=True))
    return rows


def change_manifest(folder: Path, /, **changes: Any) -> None:
    """Writes other fields into the manifest."""
    path = folder / "manifest.json"
    tree = {**json.loads(path.read_text()), **changes}
    del tree["sha256"]
    path.write_text(sealed(tree))


def change_index(folder: Path, **changes: Any) -> None:
    """Writes other fields into the index, which the manifest then vouches for."""
    index = Index.from_table(pq.read_table(folder / "index.parquet"))
    replace_table(folder, "index.parquet", dataclasses.replace(index, **changes).to_table())


def replace_table(folder: Path, name: str, table: pa.Table) -> None:
    """Writes another table in the place of one, which the manifest then vouches for."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    change_manifest(folder, files={**files, name: write_parquet_table(table, str(folder / name))})


def replace_shard(folder: Path, data: bytes, ranges: Sequence[tuple[int, int]] | None = None) -> None:
    """Puts ``data`` in the place of the first shard, with row groups at ``ranges`` (offset, size), by default those
    that it has; index and manifest then vouch for its bytes, and announce the same rows as before."""
    tree = json.loads((folder / "manifest.json").read_text())
    shard = tree["shards"][0]
    (folder / shard["path"]).write_bytes(data)
    ranges = ranges or (parquet_ranges(data) if tree["format"] == "parquet" else tar_ranges(data))
    tail = data[ranges[-1][0] + ranges[-1][1] :]
    shard |= {"size": len(data), "sha256": sha256(data), "tail_sha256": sha256(tail)}
    change_manifest(folder, shards=tree["shards"])
    index = Index.from_table(pq.read_table(folder / "index.parquet"))
    own = int((index.shard == 0).sum())
    offset, size = index.offset.copy(), index.size.copy()
    offset[:own], size[:own] = zip(*ranges, strict=True)
    digests = [hashlib.sha256(data[a : a + n]).digest() for a, n in ranges]
    change_index(folder, offset=offset, size=size, sha256=[*digests, *index.sha256[own:]])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parquet_ranges(data: bytes) -> list[tuple[int, int]]:
    """(offset, size) of each row group."""
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    ranges = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = [group.column(i) for i in range(group.num_columns)]
        first = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
        ranges.append((first, sum(c.total_compressed_size for c in columns)))
    return ranges


def tar_ranges(data: bytes) -> list[tuple[int, int]]:
    """(offset, size) of each member's contents."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.offset_data, member.size) for member in tar.getmembers()]


def tar_of(members: Iterable[bytes], suffix: str = "arrow") -> bytes:
    """A tar of these contents."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, content in enumerate(members):
            member = tarfile.TarInfo(f"00000-{number:05d}.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    """The table as a Parquet file such as ours, but for ``options``."""
    file = io.BytesIO()
    plain = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True, "store_schema": False}
    pq.write_table(table, file, **{**plain, **options})
    return file.getvalue()


def arrow_of(*batches: pa.RecordBatch, **options: Any) -> bytes:
    """An Arrow IPC stream."""
    file = io.BytesIO()
    with pa.ipc.new_stream(file, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return file.getvalue()


def prefixes(histories: Sequence[list[int]], spec: SampleSpec) -> dict[int, dict[int, list[int]]]:
    """{row: {sample id: items}} of every prefix that the spec allows."""
    found: dict[int, dict[int, list[int]]] = {}
    for row, history in enumerate(histories):
        trained = history[: max(len(history) - spec.holdout, 0)]
        window = trained[-spec.max_items :]
        before = len(trained) - len(window)
        ends = [n for n in range(1, len(window) + 1) if n >= spec.min_items]
        if ends:
            found[row] = {row << 24 | before + n: window[:n] for n in ends}
    return found
