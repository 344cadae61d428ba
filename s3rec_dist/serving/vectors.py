"""Item vectors for other systems: ``s3rec export RUN --dataset D --format vectors --output DIR``.

    DIR/vectors.parquet    id int32, item string (raw id), count int64, vector fixed-size list of float32
    DIR/vectors.npy        float32 [N, E]; row i is item id i + 1
    DIR/index.faiss        inner products, ids are item ids; items that nobody has taken are not in it

An item's score for a user is the product of its vector with the user's, which ``--format onnx`` and ``torch`` compute.
The index is exact up to 100,000 items and beyond that one of inverted lists (IVF), which looks at an eighth of them;
how many of the exact ten best it finds for real users is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.formats import parquet_writer
from s3rec_dist.data.output import file_output
from s3rec_dist.evaluation import item_vectors, user_vectors
from s3rec_dist.export import ExportError
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.recommend import Candidates
from s3rec_dist.serving.padded import real_histories

FILES = ("vectors.parquet", "vectors.npy", "index.faiss")
MOST_EXACT = 100_000
"""Items up to which the index is exact where nothing else is asked for."""
LISTS_PER_ROOT, PROBED, ROWS_PER_LIST = 4, 8, 64
"""Of an IVF index: lists by the root of its items; the share of lists that is searched; rows trained on by list."""
CUTOFF, QUERIES = 10, 1000
_ROWS = 1 << 16


def write_vectors(model: S3Rec, dataset: Dataset, args: argparse.Namespace) -> None:
    """Writes the three files below ``args.output``. Raises :class:`ExportError` without faiss, OutputError where one
    of them is there and not ``args.overwrite``."""
    try:
        import faiss
    except ImportError as error:
        raise ExportError("--format vectors needs faiss: pip install 's3rec-dist[faiss]'") from error
    candidates = Candidates.of(model, dataset, "cpu")
    places = [f"{args.output.rstrip('/')}/{name}" for name in FILES]
    table, array, index_file = (file_output(place, dataset.storage, overwrite=args.overwrite) for place in places)
    with table as table_path, array as array_path, index_file as index_path:
        vectors = item_vectors(model, dataset.n_items, dataset.path).numpy()
        _write_table(vectors, dataset, table_path)
        with open(array_path, "wb") as file:
            np.save(file, vectors)
        kind = args.index if args.index != "auto" else "flat" if len(candidates.ids) <= MOST_EXACT else "ivf"
        index = build_index(candidates.vectors.numpy(), candidates.ids, kind)
        faiss.write_index(index, index_path)
        found = faiss.read_index(index_path)
        print(_told(found, kind, model, dataset, candidates))


def _write_table(vectors: np.ndarray, dataset: Dataset, path: str) -> None:
    items = dataset.items_table().select(["raw", "count"]).rename_columns(["item", "count"])
    schema = pa.schema(
        [("id", pa.int32()), *items.schema, ("vector", pa.list_(pa.float32(), vectors.shape[1]))],
    )
    writer = parquet_writer(path, schema)
    try:
        for at in range(0, len(vectors), _ROWS):
            rows = vectors[at : at + _ROWS]
            own = items.slice(at, _ROWS)
            ids = pa.array(np.arange(at + 1, at + 1 + len(rows), dtype=np.int32))
            listed = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), vectors.shape[1])
            writer.write_table(pa.table([ids, *own.columns, listed], schema=schema))
    finally:
        writer.close()


def build_index(vectors: np.ndarray, ids: np.ndarray, kind: str) -> Any:
    """A faiss index of inner products over ``vectors`` [C, E] under their ``ids`` [C]: ``flat``, which is exact, or
    ``ivf``. Rows are added some at a time."""
    import faiss

    count, width = vectors.shape
    index: Any
    if kind == "flat":
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(width))
    else:
        lists = max(1, min(int(LISTS_PER_ROOT * count**0.5), count))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(1, lists // PROBED)
        every = max(1, count // (lists * ROWS_PER_LIST))
        index.cp.min_points_per_centroid = 1  # else it warns of a small catalogue
        index.train(np.ascontiguousarray(vectors[::every]))
    for at in range(0, count, _ROWS):
        index.add_with_ids(np.ascontiguousarray(vectors[at : at + _ROWS]), ids[at : at + _ROWS])
    return index


def _told(index: Any, kind: str, model: S3Rec, dataset: Dataset, candidates: Candidates) -> str:
    """Recall and speed beside exact search, for real users."""
    with torch.no_grad():
        users = user_vectors(model, real_histories(dataset, QUERIES), "cpu")
    exact, exact_s = _timed(lambda: candidates.best(users, CUTOFF)[0])
    found, found_s = _timed(lambda: index.search(users.numpy(), CUTOFF)[1])
    recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)]))
    queries = len(users)
    return (
        f"{kind} index of {index.ntotal:,} items: recall@{CUTOFF} {recall:.4f} against exact search for {queries:,} "
        f"users, {queries / found_s:,.0f} queries/s (exact search {queries / exact_s:,.0f})"
    )


def _timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    call()
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The options of ``--format vectors``."""
    group.add_argument(
        "--index",
        choices=("auto", "flat", "ivf"),
        default="auto",
        help="flat is exact, ivf searches a part; auto, the default, takes ivf beyond 100,000 items",
    )
