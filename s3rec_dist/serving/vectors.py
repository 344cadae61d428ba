"""Item vectors for other systems: ``s3rec export RUN --dataset D --format vectors --output DIR``.

    DIR/vectors.parquet    id int32, item string (raw id), count int64, vector fixed-size list of float32
    DIR/vectors.npy        float32 [N, E]; row i is item id i + 1
    DIR/index.faiss        inner products, ids are item ids; items that nobody has taken are not in it

An item's score for a user is the product of its vector with the user's, which ``--format onnx`` and ``torch`` compute.
The index is exact up to 100,000 items and beyond that one of inverted lists (IVF), which looks at an eighth of them;
how many of the exact ten best it finds for real users is printed. Vectors are made, written and indexed some at a time,
so that memory is bounded, but for the index: faiss holds it whole. ``--index none`` leaves it out.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.formats import parquet_writer
from s3rec_dist.data.output import file_output
from s3rec_dist.evaluation import item_vectors_in_parts, user_vectors
from s3rec_dist.export import ExportError
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.recommend import Candidates, is_taken
from s3rec_dist.serving.padded import real_histories
from s3rec_dist.tables.scored import WholeItems
from s3rec_dist.training.weights import ROWS_READ

FILES = ("vectors.parquet", "vectors.npy", "index.faiss")
MOST_EXACT = 100_000
"""Items up to which the index is exact where nothing else is asked for."""
LISTS_PER_ROOT, PROBED, ROWS_PER_LIST = 4, 8, 64
"""Of an IVF index: lists by the root of its items; the share of lists that is searched; rows trained on by list."""
CUTOFF, QUERIES = 10, 1000


def write_vectors(model: S3Rec, dataset: Dataset, args: argparse.Namespace) -> None:
    """Writes the three files below ``args.output``, of a model in memory or of a
    :func:`s3rec_dist.export.streamed_model`. Raises :class:`ExportError` without faiss, OutputError where one of them
    is there and not ``args.overwrite``."""
    wants_index = args.index != "none"
    if wants_index:
        try:
            import faiss
        except ImportError as error:
            raise ExportError(
                "--format vectors needs faiss: pip install 's3rec-dist[faiss]', or leave the index out: --index none"
            ) from error
    with contextlib.ExitStack() as stack:
        names = FILES if wants_index else FILES[:2]
        places = [f"{args.output.rstrip('/')}/{name}" for name in names]
        outputs = [file_output(place, dataset.storage, overwrite=args.overwrite) for place in places]
        paths = [stack.enter_context(output) for output in outputs]
        _write_vectors(model, dataset, *paths[:2])
        if wants_index:
            vectors = np.load(paths[1], mmap_mode="c")
            rows = np.flatnonzero(is_taken(dataset))
            kind = args.index if args.index != "auto" else "flat" if len(rows) <= MOST_EXACT else "ivf"
            faiss.write_index(build_index(vectors, rows, kind), paths[2])
            print(_told(faiss.read_index(paths[2]), kind, model, dataset, vectors))


def _write_vectors(model: S3Rec, dataset: Dataset, table_path: str, array_path: str) -> None:
    shape = (dataset.n_items, model.config.hidden_size)
    items = dataset.items_table().select(["raw", "count"]).rename_columns(["item", "count"])
    schema = pa.schema([("id", pa.int32()), *items.schema, ("vector", pa.list_(pa.float32(), shape[1]))])
    writer = parquet_writer(table_path, schema)
    try:
        with open(array_path, "wb") as array:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(array, {**header, "shape": shape})
            at = 0
            for part in item_vectors_in_parts(model, dataset.n_items, dataset.path):
                rows = np.ascontiguousarray(part.numpy())
                array.write(rows.data)
                ids = pa.array(np.arange(at + 1, at + 1 + len(rows), dtype=np.int32))
                listed = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), shape[1])
                own = items.slice(at, len(rows))
                writer.write_table(pa.table([ids, *own.columns, listed], schema=schema))
                at += len(rows)
    finally:
        writer.close()


def build_index(vectors: np.ndarray, rows: np.ndarray, kind: str) -> Any:
    """A faiss index of inner products over the ``rows`` [C], ascending, of ``vectors`` [N, E], each under its item's
    id, row + 1: ``flat``, which is exact, or ``ivf``. Rows are added some at a time."""
    import faiss

    count, width = len(rows), vectors.shape[1]
    index: Any
    if kind == "flat":
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(width))
    else:
        lists = max(1, min(int(LISTS_PER_ROOT * count**0.5), count))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(1, lists // PROBED)
        every = max(1, count // (lists * ROWS_PER_LIST))
        index.cp.min_points_per_centroid = 1  # else it warns of a small catalogue
        index.train(vectors[rows[::every]])
    for at in range(0, count, ROWS_READ):
        part = rows[at : at + ROWS_READ]
        index.add_with_ids(vectors[part], part + 1)
    return index


def _told(index: Any, kind: str, model: S3Rec, dataset: Dataset, vectors: np.ndarray) -> str:
    """Recall and speed beside exact search, for real users."""
    candidates = Candidates(WholeItems(torch.from_numpy(vectors)), torch.from_numpy(~is_taken(dataset)))
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
        choices=("auto", "flat", "ivf", "none"),
        default="auto",
        help="flat is exact, ivf searches a part; auto, the default, takes ivf beyond 100,000 items; none writes none",
    )
