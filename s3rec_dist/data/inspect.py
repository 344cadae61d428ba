"""What is in a dataset, and whether it is whole: ``s3rec inspect``.

    facts = inspect(Dataset.open("s3://bucket/beauty"))
    print(format_facts(facts))

All but the checks comes from the manifest, the index and the catalogue: no shard is read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from s3rec_dist.config import Config
from s3rec_dist.data.dataset import Dataset, DatasetError, Index, ItemAttributes, Shard
from s3rec_dist.data.formats import add_contents, content_of
from s3rec_dist.data.order import stage_spec
from s3rec_dist.data.output import Progress, progress_on_stderr
from s3rec_dist.storage import DamagedFile, add_storage_argument, storage_of

Facts = dict[str, Any]

_CHECKS = 8
"""Files or row groups checked at a time."""
_PATIENCE_S = 5.0
"""Seconds between two lines about a long check."""
_BAR = 32
"""Width of the longest bar."""
_SHOWN = 3
"""Problems of a file that are shown."""
_READ_ANYWAY = ("index.parquet", "items.parquet", "attributes.parquet")
"""Files whose hashes are compared on reading."""


def inspect(dataset: Dataset, *, verify: bool = False, progress: Progress = lambda line: None) -> Facts:
    """Facts about ``dataset``, as JSON can hold them; those that a damaged file keeps back are absent.

    ``checks`` lists all that is wrong, file by file: the shards' sizes are compared; with ``verify`` every hash, and
    every row is decoded. Raises StorageError where the storage does not answer.
    """
    manifest = dataset.manifest
    readers: dict[str, Callable[[], Any]] = {
        "index": lambda: dataset.index,
        "items": lambda: (dataset.items_table(), dataset.item_attributes()),
        "attributes": dataset.attributes_table,
    }
    tables = {name: _attempt(read) for name, read in readers.items()}
    index, items, attributes = (None if isinstance(table, Exception) else table for table in tables.values())
    facts: Facts = {
        "path": dataset.path,
        **{name: getattr(manifest, name) for name in ("name", "format", "revision", "created_with")},
        **{name: getattr(manifest, name) for name in ("users", "items", "interactions", "attributes")},
        "density": manifest.interactions / max(manifest.users * manifest.items, 1),
    }
    if index is not None:
        facts["lengths"] = length_facts(index.lengths, index.counts)
        facts["samples"] = sample_facts(index.lengths, index.counts)
    if items is not None:
        facts["popularity"] = popularity_facts(items[0].column("count").to_numpy())
        if attributes is not None:
            facts["attribute_fields"] = attribute_facts(items[1], attributes.column("field"))
    facts["shards"] = _spread([shard.size for shard in manifest.shards])
    if index is not None:
        facts["row_groups"] = {**_spread(index.size), "rows": _spread(index.rows), "dead_rows": len(index.dead)}
    facts["preparation"] = manifest.preparation
    facts["fingerprint"], facts["content"] = manifest.fingerprint, manifest.content
    begin = time.perf_counter()
    wrong = [(f"{manifest.folder}{name}.parquet", t) for name, t in tables.items() if isinstance(t, Exception)]
    wrong += _check(dataset, index, verify, progress)
    facts["checks"] = {
        "verified": verify,
        "seconds": time.perf_counter() - begin,
        "problems": [{"file": file, "problem": _text(error, f"{dataset.path}/{file}: ")} for file, error in wrong],
    }
    return facts


def length_facts(lengths: np.ndarray, counts: np.ndarray) -> Facts:
    """Of ``counts`` users for each of ``lengths``, which may repeat: mean, median, extremes and a histogram, whose
    buckets grow by a half or a third: 1, 2, 3, 4-5, 6-7, 8-11, 12-15, 16-23 and on."""
    users = np.bincount(lengths, counts).astype(np.int64)  # by length
    ends = np.cumsum(users)
    middle = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")
    edges = [1, 2, 3]
    while edges[-1] < len(users):
        edges.append(2 * edges[-2])
    histogram = [
        {"from": low, "to": high - 1, "users": int(users[low:high].sum())} for low, high in itertools.pairwise(edges)
    ]
    return {
        "mean": float(np.arange(len(users)) @ users / ends[-1]),
        "median": float(middle.mean()),
        "min": int(lengths.min()),
        "max": int(lengths.max()),
        "histogram": [bucket for bucket in histogram if bucket["to"] >= lengths.min()],
    }


def sample_facts(lengths: np.ndarray, counts: np.ndarray) -> Facts:
    """Samples that an epoch of either stage takes under the default settings."""
    config = Config()
    length = config.model.max_length
    pretrain = stage_spec("pretrain", config.pretrain.samples, length)
    finetune = stage_spec("finetune", config.finetune.samples, length)
    return {
        "max_length": length,
        "pretrain": int(pretrain.counts(lengths.astype(np.int64)) @ counts),
        "finetune": int(finetune.counts(lengths.astype(np.int64)) @ counts),
    }


def popularity_facts(counts: np.ndarray) -> Facts:
    """How unevenly interactions fall on the items that somebody took: shares of the most popular ones, and the Gini
    coefficient, 0 where all are equally popular and near 1 where one has nearly everything."""
    taken = np.sort(counts[counts > 0])[::-1]
    n, total = len(taken), max(int(taken.sum()), 1)
    tops = {"top_item": 1, "top_1_percent": math.ceil(n / 100), "top_10_percent": math.ceil(n / 10)}
    return {
        "never_taken": len(counts) - n,
        **{name: int(taken[:first].sum()) / total for name, first in tops.items()},
        "gini": float((n + 1 - 2 * np.arange(1, n + 1)) @ taken / (max(n, 1) * total)),
    }


def attribute_facts(lists: ItemAttributes, fields: pa.ChunkedArray) -> Facts:
    """By field, and for all together where there are several: the share of items with an attribute, distinct values in
    use, and attributes of an item on average. ``fields`` holds each attribute's field."""
    encoded = fields.combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy()[lists.values - 1]
    owners = np.repeat(np.arange(len(lists.offsets) - 1), np.diff(lists.offsets))
    n_items = max(len(lists.offsets) - 3, 1)
    chosen = {name: codes == code for code, name in enumerate(names)}
    if len(names) > 1:
        chosen["all"] = codes >= 0
    return {
        name: {
            "items": len(np.unique(owners[own])) / n_items,
            "values": len(np.unique(lists.values[own])),
            "mean": int(own.sum()) / n_items,
        }
        for name, own in chosen.items()
    }


def _spread(sizes: Sequence[int] | np.ndarray) -> Facts:
    return {
        "count": len(sizes),
        "total": int(np.sum(sizes, dtype=np.int64)),
        "min": int(np.min(sizes)),
        "median": int(np.median(sizes)),
        "max": int(np.max(sizes)),
    }


def _check(dataset: Dataset, index: Index | None, verify: bool, progress: Progress) -> list[tuple[str, Exception]]:
    """(file, error) of all that is wrong: with the shards' sizes, or with ``verify`` with any hash, with any row group,
    and with what the rows together say."""
    manifest = dataset.manifest
    tasks: list[tuple[str, Callable[[], Any]]] = [
        (shard.path, partial(_compare, dataset, (shard,), {}, verify)) for shard in manifest.shards
    ]
    if verify:
        others = {name: sha256 for name, sha256 in manifest.files.items() if name not in _READ_ANYWAY}
        tasks += [
            (manifest.folder + name, partial(_compare, dataset, (), {name: sha256}, True))
            for name, sha256 in others.items()
        ]
        shard_of = [] if index is None else index.shard.tolist()
        tasks += [(manifest.shards[n].path, partial(_content, dataset, group)) for group, n in enumerate(shard_of)]
    wrong, contents = [], []
    with ThreadPoolExecutor(_CHECKS, thread_name_prefix="s3rec-inspect") as pool:
        try:
            results = pool.map(_attempt, [call for _, call in tasks])
            for (file, _), result in zip(tasks, _told(results, len(tasks), progress), strict=True):
                if isinstance(result, Exception):
                    wrong.append((file, result))
                elif result is not None:
                    contents.append(result)
        finally:
            pool.shutdown(cancel_futures=True)
    if verify and index is not None and not wrong and add_contents(contents) != manifest.rows_content:
        wrong.append(("manifest.json", DatasetError("the rows' content is not the one that it names")))
    return wrong


def _compare(dataset: Dataset, shards: tuple[Shard, ...], files: dict[str, str], hashes: bool) -> None:
    """Verifies only these shards and files of the dataset. Raises :class:`~s3rec_dist.data.dataset.DatasetError`."""
    part = replace(dataset.manifest, shards=shards, files=files)
    Dataset(dataset.path, part, dataset.storage).verify(hashes=hashes)


def _content(dataset: Dataset, group: int) -> tuple[int, int]:
    """Decodes a row group."""
    rows = dataset.read_row_group(group)
    return content_of(rows.users, rows.values, rows.offsets)


def _attempt(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or the exception that says what is wrong with a file."""
    try:
        return call()
    except (DatasetError, DamagedFile, OSError) as error:
        return error


def _text(error: Exception, prefix: str) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.removeprefix(prefix)


def _told(results: Iterable[Any], total: int, progress: Progress) -> Iterator[Any]:
    """Passes results through, with a line now and then about how many there are yet."""
    told = time.monotonic()
    for done, result in enumerate(results):
        if time.monotonic() - told > _PATIENCE_S:
            told = time.monotonic()
            progress(f"{done:,} of {total:,} checks done")
        yield result


def format_facts(facts: Facts) -> str:
    """Facts for a person to read."""
    origin = f"{facts['format']}, revision {facts['revision']}, made with {facts['created_with']}"
    counts = [[name, f"{facts[name]:,}"] for name in ("users", "items", "interactions", "attributes")]
    parts = [
        [f"{facts['name']}: {origin}", *_table(*counts, ["density", f"{facts['density']:.4%}"])],
        _lengths(facts.get("lengths")),
        _popularity(facts.get("popularity")),
        _attributes(facts.get("attribute_fields")),
        _samples(facts.get("samples")),
        _files(facts["shards"], facts.get("row_groups")),
        _preparation(facts["preparation"]),
        [f"fingerprint  {facts['fingerprint']}", f"content      {facts['content']}"],
        _checks(facts["checks"], facts["shards"], facts.get("row_groups")),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _lengths(lengths: Facts | None) -> list[str]:
    if lengths is None:
        return []
    buckets = lengths["histogram"]
    total, most = sum(b["users"] for b in buckets), max(b["users"] for b in buckets)
    rows = [
        [
            f"{b['from']:,}" if b["from"] == b["to"] else f"{b['from']:,}-{b['to']:,}",
            f"{b['users']:,}",
            f"{b['users'] / total:.1%}",
            ("#" * math.ceil(_BAR * b["users"] / most)).ljust(_BAR),
        ]
        for b in buckets
    ]
    spread = f"{lengths['min']:,} to {lengths['max']:,}, mean {lengths['mean']:.2f}, median {lengths['median']:g}"
    return [f"interactions of a user: {spread}", *_table(*rows)]


def _popularity(popularity: Facts | None) -> list[str]:
    if popularity is None:
        return []
    return _table(
        ["most popular item", f"{popularity['top_item']:.2%}"],
        ["top 1%", f"{popularity['top_1_percent']:.2%}"],
        ["top 10%", f"{popularity['top_10_percent']:.2%}"],
        ["Gini coefficient", f"{popularity['gini']:.3f}"],
        ["never taken", f"{popularity['never_taken']:,}"],
        title="popularity of items, as a share of interactions",
    )


def _attributes(fields: Facts | None) -> list[str]:
    rows = [[name, f"{f['items']:.1%}", f"{f['values']:,}", f"{f['mean']:.2f}"] for name, f in (fields or {}).items()]
    return _table(*rows, title="attributes", head=["items with any", "values", "mean per item"]) if rows else []


def _samples(samples: Facts | None) -> list[str]:
    if samples is None:
        return []
    title = f"samples of an epoch, model.max_length={samples['max_length']}"
    return _table(*([stage, f"{samples[stage]:,}"] for stage in ("pretrain", "finetune")), title=title)


def _files(shards: Facts, groups: Facts | None) -> list[str]:
    def row(name: str, spread: Facts, shown: Callable[[int], str]) -> list[str]:
        return [name, f"{spread['count']:,}", *(shown(spread[key]) for key in ("total", "min", "median", "max"))]

    rows = [row("shards", shards, _bytes)]
    notes = []
    if groups is not None:
        rows += [row("row groups", groups, _bytes), row("their rows", groups["rows"], "{:,}".format)]
        rows[-1][1] = ""
        if groups["dead_rows"]:
            notes = [f"  {groups['dead_rows']:,} of these rows have been replaced since, and are not read"]
    return [*_table(*rows, title="files", head=["count", "total", "smallest", "median", "largest"]), *notes]


def _preparation(preparation: Facts) -> list[str]:
    """What was read and left out, but for what was 0; rows that could not be read."""
    numbers = {name: value for name, value in preparation.items() if type(value) is int and value}
    counts = [(name, value) for name, value in numbers.items() if name != "last_time"]
    counts.sort(key=lambda count: (not count[0].endswith("_read"), count[0]))
    rows = [[name.replace("_", " "), f"{value:,}"] for name, value in counts]
    source = preparation.get("settings", {}).get("input", "")
    lines = _table(*rows, title=f"preparation{' from ' if source else ''}{source}") if rows else []
    return lines + [f"  {example}" for example in preparation.get("bad_row_examples", [])]


def _checks(checks: Facts, shards: Facts, groups: Facts | None) -> list[str]:
    problems, size, seconds = checks["problems"], shards["total"], checks["seconds"]
    if not problems and not checks["verified"]:
        return ["checks: all shards have the right size; --verify reads them too"]
    if not problems and groups is not None:
        rate = f"{_bytes(size)} in {seconds:.1f} s, {size / 1e6 / seconds:,.0f} MB/s"
        return [f"checks: all hashes and all {groups['count']:,} row groups are right ({rate})"]
    files: dict[str, list[str]] = {}
    for problem in problems:
        files.setdefault(problem["file"], []).append(problem["problem"].partition("; ")[0])
    those = "1 file; restore it" if len(files) == 1 else f"{len(files):,} files; restore them"
    lines = [f"checks: FAILED for {those} or prepare the dataset again"]
    for file, told in files.items():
        told = list(dict.fromkeys(told))
        lines += [f"  {file}", *(f"    {line}" for line in told[:_SHOWN])]
        lines += [f"    and {len(told) - _SHOWN:,} more"] if len(told) > _SHOWN else []
    return lines


def _table(*rows: Sequence[str], title: str = "", head: Sequence[str] = ()) -> list[str]:
    """Indented rows with aligned columns, the first one to the left, below a title and the other columns' heads."""
    rows = tuple([f"  {name}", *cells] for name, *cells in rows)
    if head:
        rows = ([title, *head], *rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))]).rstrip()
        for name, *cells in rows
    ]
    return lines if head or not title else [title, *lines]


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec inspect``."""
    parser.add_argument("dataset", metavar="DATASET", help="dataset: folder or URL")
    parser.add_argument("--verify", action="store_true", help="read everything: every hash, and every row decoded")
    parser.add_argument(
        "--revision", type=int, default=0, metavar="N", help="an earlier revision (default: the newest)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the facts here as well")
    add_storage_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``s3rec inspect``: the facts on stdout, and as JSON where asked for; status 1 where something is wrong."""
    progress = progress_on_stderr()
    storage = storage_of(args)
    facts = inspect(Dataset.open(args.dataset, storage, revision=args.revision), verify=args.verify, progress=progress)
    print(format_facts(facts))
    if args.json:
        storage.write(args.json, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    return 1 if facts["checks"]["problems"] else 0
