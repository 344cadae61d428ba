"""Batch recommendation: histories in, each user's best k items out, Parquet on both sides.

    s3rec recommend models/beauty --dataset data/beauty --k 10 --output recommendations.parquet
    s3rec recommend models/beauty --histories histories.parquet --output recommendations.parquet

Users come from the dataset, with their whole histories (the held-out items too: this is for use, evaluation
is for measuring), or from a Parquet file with a row per user:

    user    string or integer
    items   list of raw item ids (strings or integers), oldest first

The output has a row per recommendation, best first, users in the order of the input:

    user string, rank int32 (from 1), item string (raw id), score float32

Candidates are the items that somebody in the dataset has taken, less those of the user's own history. A user
with fewer than k candidates gets fewer rows. Equal scores are ranked by item id. Memory is bounded by
``batch_users`` x ``item_chunk`` scores, and the output file appears only when it is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.formats import DAMAGE, parquet_writer
from s3rec_dist.data.output import file_output
from s3rec_dist.evaluation import (
    Histories,
    add_device_argument,
    device_of,
    scored_items,
    user_vectors,
)
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.storage import Storage, add_storage_argument, storage_of
from s3rec_dist.tables import ShardedTable
from s3rec_dist.tables.scored import Scored
from s3rec_dist.training.engine import heeding_peers, together

SCHEMA = pa.schema([("user", pa.string()), ("rank", pa.int32()), ("item", pa.string()), ("score", pa.float32())])

BATCH_USERS, ITEM_CHUNK = 256, 16384
"""Users and items scored together by default; on a CPU 16384 items are 1.6 times as fast as 65536, on 500,000 items."""

_ROWS_READ = 4096
_ROWS_WRITTEN = 1 << 17
_LOW_32 = 0xFFFFFFFF


class RecommendError(ValueError):
    """Recommendations that cannot be made or written; the message names the file, row, user or item."""


@dataclass
class Counts:
    """What was read, left out and written."""

    users: int = 0
    """Users with recommendations."""
    rows: int = 0
    """Recommendations."""
    unknown_items: int = 0
    """Items of given histories that the catalogue lacks, dropped."""
    empty_users: int = 0
    """Users of given histories without a known item, left out."""


def top_k(
    users: torch.Tensor,
    items: Scored,
    k: int,
    excluded: tuple[torch.Tensor, torch.Tensor],
    item_chunk: int,
    closed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` of ``items`` that have the highest scores with ``users`` [B, E]: ids int64 [B, K] and scores fp32
    [B, K], best first, K = min(k, N).

    The ``excluded`` (user's place, item id) pairs [P] are no candidates, nor are items of which ``closed``, bool [C] in
    the order of those that are here, is True; places that no candidate is left for have a score of minus infinity. Of
    equal scores the lower item id comes first. No more than [B, item_chunk] scores exist at a time.
    """
    rows, columns = excluded[0], items.places(excluded[1])
    best = torch.empty(len(users), 0, dtype=torch.int64, device=users.device)
    for begin in range(0, len(items), item_chunk):
        scores = users @ items.part(begin, begin + item_chunk).T  # [B, C]
        inside = (columns >= begin) & (columns < begin + item_chunk)
        scores[rows[inside], columns[inside] - begin] = -torch.inf
        if closed is not None:
            scores.masked_fill_(closed[begin : begin + item_chunk], -torch.inf)
        best = torch.cat((best, _best_of_chunk(scores, items.ids(begin, begin + scores.shape[1]), k)), 1)
        best = best.topk(min(k, best.shape[1])).values
    best = items.joined(best)
    return _decode(best.topk(min(k, best.shape[1])).values)


def is_taken(catalogue: Dataset) -> np.ndarray:
    """Which items somebody has taken, bool [N]: ids kept from a source with gaps name no item."""
    taken: np.ndarray = catalogue.items_table().column("count").to_numpy() > 0
    return taken


@dataclass(frozen=True)
class Candidates:
    """The items that somebody has taken. Of a model whose items are cut over the ranks, all call :meth:`best` alike."""

    items: Scored
    closed: torch.Tensor
    """bool [C], in the order of the items that are here: those that are no candidates."""

    @classmethod
    def of(cls, model: S3Rec, catalogue: Dataset) -> Candidates:
        """Those of a catalogue. Raises EvaluationError where the model does not fit or has diverged."""
        items = scored_items(model, catalogue.n_items, catalogue.path)
        own = items.ids(0, len(items))
        return cls(items, torch.from_numpy(~is_taken(catalogue)).to(own.device)[own - 1])

    def best(
        self,
        users: torch.Tensor,
        k: int,
        left_out: tuple[np.ndarray, np.ndarray] | None = None,
        item_chunk: int = ITEM_CHUNK,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Item ids int64 and scores fp32 of the best for ``users`` [B, E], as :func:`top_k` has them, without the
        ``left_out`` (user's place, item id) pairs [P]."""
        rows, ids = (np.empty(0, np.int64),) * 2 if left_out is None else left_out
        excluded = torch.from_numpy(rows).to(users.device), torch.from_numpy(ids).to(users.device)
        best, scores = top_k(users, self.items, k, excluded, item_chunk, self.closed)
        return best.cpu().numpy(), scores.cpu().numpy()


def _best_of_chunk(scores: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
    """Keys int64 [B, >= min(k, C)] of the best of the items ``ids`` [C] by their [B, C] scores."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]))
    keys = _encode(values, ids[columns])
    if values.shape[1] > k:
        # topk chose any of the items that tie at the cut-off; here the lowest ids win
        tied = ((values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)).nonzero().squeeze(1)
        if len(tied):
            keys[tied] = _encode(scores[tied], ids).topk(keys.shape[1]).values
    return keys


def _encode(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys whose order is that of the scores, then of falling ids. Adding 0 makes -0 equal to 0."""
    bits = (scores.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) + (_LOW_32 - ids)


def _decode(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return _LOW_32 - (keys & _LOW_32), bits.view(torch.float32)


def dataset_histories(dataset: Dataset) -> Iterator[Histories]:
    """Every user's whole history, a row group at a time."""
    for index in range(len(dataset.index)):
        sequences = dataset.read_row_group(index)
        yield Histories(sequences.users, sequences.values, sequences.offsets[:-1], sequences.offsets[1:])


def file_histories(path: str, catalogue: Dataset, counts: Counts, *, skip_unknown: bool = False) -> Iterator[Histories]:
    """The histories of a Parquet file (see the module's docstring), some thousand at a time.

    An item that ``catalogue`` lacks raises :class:`RecommendError` naming file, row and item, or is dropped with
    ``skip_unknown``; a user without a known item is left out. Both are counted in ``counts``.
    """
    known = catalogue.items_table().column("raw").combine_chunks()
    try:
        with catalogue.storage.open(path) as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            _check_columns(path, file.schema_arrow)
            first_row = 1
            for batch in file.iter_batches(batch_size=_ROWS_READ, columns=["user", "items"]):
                yield _known_histories(batch, known, f"{path}: row", first_row, counts, skip_unknown)
                first_row += batch.num_rows
    except FileNotFoundError as error:
        raise RecommendError(f"{path}: no such file; expected Parquet with columns user and items") from error
    except DAMAGE as error:
        raise RecommendError(f"{path}: not a readable Parquet file ({error})") from error


def _check_columns(path: str, schema: pa.Schema) -> None:
    def is_plain(kind: pa.DataType) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)

    def is_list(kind: pa.DataType) -> bool:
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_plain(kind.value_type)

    for name, is_right, expected in (
        ("user", is_plain, "strings or integers"),
        ("items", is_list, "lists of strings or integers"),
    ):
        if schema.get_all_field_indices(name) == []:
            raise RecommendError(f"{path}: has no column {name!r}, only {', '.join(schema.names)}; expected {expected}")
        if not is_right(schema.field(name).type):
            raise RecommendError(f"{path}: column {name!r} holds {schema.field(name).type}; expected {expected}")


def _known_histories(
    batch: pa.RecordBatch, known: pa.Array, where: str, first_row: int, counts: Counts, skip_unknown: bool
) -> Histories:
    users, lists = batch.column("user").cast(pa.string()), batch.column("items")
    for name, column in (("user", users), ("items", lists)):
        if column.null_count:
            row = first_row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise RecommendError(f"{where} {row}: {name} is null; give every row both, or take it out")
    lengths = pc.list_value_length(lists).to_numpy()
    raw = lists.flatten().cast(pa.string())
    found = pc.index_in(raw, value_set=known)  # null where unknown
    is_known = found.is_valid().to_numpy(zero_copy_only=False)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    if not is_known.all() and not skip_unknown:
        place = int(np.argmin(is_known))
        raise RecommendError(
            f"{where} {first_row + owners[place]}: item {raw[place].as_py()!r} is not in the catalogue; take it out, "
            "or drop all such items with --unknown-items skip"
        )
    values = found.drop_null().to_numpy() + 1
    lengths = np.bincount(owners[is_known], minlength=len(lengths))
    ends = np.cumsum(lengths)
    is_left = lengths > 0
    counts.unknown_items += int((~is_known).sum())
    counts.empty_users += int((~is_left).sum())
    return Histories(users.filter(pa.array(is_left)), values, (ends - lengths)[is_left], ends[is_left])


def chosen(histories: Iterable[Histories], users: Iterable[str]) -> Iterator[Histories]:
    """The histories of the given raw user ids. Raises :class:`RecommendError` at the end if one has none."""
    missing = set(users)
    wanted = pa.array(sorted(missing), pa.string())
    for part in histories:
        is_wanted = pc.is_in(part.users, value_set=wanted)
        kept = is_wanted.to_numpy(zero_copy_only=False)
        found = part.users.filter(is_wanted)
        missing.difference_update(found.to_pylist())
        yield Histories(found, part.values, part.starts[kept], part.ends[kept])
    if missing:
        count = len(missing)
        raise RecommendError(f"--users: {count} without a history, among them {min(missing)!r}; leave them out")


def recommend(
    model: S3Rec,
    histories: Iterable[Histories],
    catalogue: Dataset,
    output: str,
    counts: Counts,
    *,
    k: int,
    device: torch.device | str = "cpu",
    include_seen: bool = False,
    batch_users: int = BATCH_USERS,
    item_chunk: int = ITEM_CHUNK,
) -> None:
    """Writes each user's ``k`` best items to the Parquet file ``output``, a path or URL under the storage of
    ``catalogue``, whole or not at all, and counts them.

    With ``include_seen`` the items of a user's own history are candidates too. Where the model's items are cut over
    ranks, all of them call this alike, and rank 0 writes. Raises :class:`RecommendError`
    where the file cannot be written, EvaluationError where the model does not fit or its scores are not finite.
    """
    raw = catalogue.items_table().column("raw").combine_chunks()
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    writer = _whole_table(output, catalogue.storage) if is_first else contextlib.nullcontext(lambda table: None)
    with torch.no_grad(), writer as write:
        with together():
            candidates = Candidates.of(model, catalogue)
        for batch in _batches(histories, batch_users):
            seen = None if include_seen else batch.seen()
            items, scores = candidates.best(user_vectors(model, batch, device), k, seen, item_chunk)
            table = _rows(batch.users, items, scores, raw)
            write(table)
            counts.users += len(batch.users)
            counts.rows += table.num_rows


def _batches(histories: Iterable[Histories], size: int) -> Iterator[Histories]:
    for part in histories:
        for at in range(0, len(part.users), size):
            rows = slice(at, at + size)
            yield Histories(part.users[rows], part.values, part.starts[rows], part.ends[rows])


def _rows(users: pa.Array, items: np.ndarray, scores: np.ndarray, raw: pa.Array) -> pa.Table:
    """A table of SCHEMA from item ids [B, K] and scores [B, K]; minus infinity is no row."""
    row, column = np.nonzero(scores > -np.inf)
    columns = [
        users.take(pa.array(row)),
        pa.array(column + 1, pa.int32()),
        raw.take(pa.array(items[row, column] - 1)),
        pa.array(scores[row, column], pa.float32()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


@contextlib.contextmanager
def _whole_table(output: str, storage: Storage) -> Iterator[Callable[[pa.Table], None]]:
    """What writes a table's rows to a file that takes the place of ``output`` when the block ends well."""
    waiting: list[pa.Table] = []

    def write(table: pa.Table) -> None:
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= _ROWS_WRITTEN:
            flush()

    def flush() -> None:
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
            waiting.clear()

    with file_output(output, storage, overwrite=True) as draft:
        writer = parquet_writer(draft, SCHEMA)
        try:
            yield write
            flush()
        except BaseException:
            with contextlib.suppress(OSError):  # the error that brought us here is the one to report
                writer.close()
            raise
        writer.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec recommend``."""
    parser.add_argument("model", metavar="MODEL", help="model folder, or with --dataset a run or checkpoint")
    parser.add_argument(
        "--dataset",
        "--data",
        metavar="URL",
        help="dataset, folder or URL, whose users are recommended to and whose catalogue is used (default: the model "
        "folder's catalogue)",
    )
    parser.add_argument(
        "--histories", metavar="URL", help="Parquet with columns user and items (raw ids, oldest first), used instead"
    )
    parser.add_argument(
        "--unknown-items",
        choices=("error", "skip"),
        default="error",
        help="stop at an item of --histories that is not in the catalogue (error, the default), or drop it",
    )
    parser.add_argument("--users", nargs="+", metavar="USER", help="raw ids of the users wanted (default: all)")
    parser.add_argument("--k", type=_positive, default=10, metavar="K", help="items for each user (default: 10)")
    parser.add_argument("--include-seen", action="store_true", help="recommend items of the user's own history as well")
    parser.add_argument(
        "--output", required=True, metavar="URL", help="Parquet to write, a path or URL: user, rank, item, score"
    )
    parser.add_argument(
        "--batch-users",
        type=_positive,
        default=BATCH_USERS,
        metavar="N",
        help=f"users scored together (default: {BATCH_USERS})",
    )
    parser.add_argument(
        "--item-chunk",
        type=_positive,
        default=ITEM_CHUNK,
        metavar="N",
        help=f"items scored together, which bounds memory (default: {ITEM_CHUNK})",
    )
    add_device_argument(parser)
    add_storage_argument(parser)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least 1")
    return int(text)


@heeding_peers()
def run(args: argparse.Namespace) -> None:
    """``s3rec recommend``: the file, and a line about it on stdout."""
    from s3rec_dist.export import load_model, open_catalogue

    if not args.dataset and not args.histories:
        raise RecommendError("nobody to recommend to; give --dataset for its users, or --histories for others")
    begin = time.perf_counter()
    device = device_of(args.device)
    counts, storage = Counts(), storage_of(args)
    with together():
        if args.dataset:
            catalogue = Dataset.open(args.dataset, storage)
        else:
            found = open_catalogue(args.model, storage=storage)
            if found is None:
                raise RecommendError(
                    f"{args.model}: has no catalogue, so raw ids mean nothing to it; give --dataset too"
                )
            catalogue = found
        model = load_model(args.model, catalogue, device, partial(print, file=sys.stderr))
        if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not isinstance(model.item_rows, ShardedTable):
            raise RecommendError(
                f"{args.model}: was not trained over a sharded item table, so recommend runs as one process; start it "
                "without a launcher, once for each part of the users if need be"
            )
    if args.histories:
        skip = args.unknown_items == "skip"
        histories = file_histories(args.histories, catalogue, counts, skip_unknown=skip)
    else:
        histories = dataset_histories(catalogue)
    if args.users:
        histories = chosen(histories, args.users)
    recommend(
        model.to(device).eval(),
        histories,
        catalogue,
        args.output,
        counts,
        k=args.k,
        device=device,
        include_seen=args.include_seen,
        batch_users=args.batch_users,
        item_chunk=args.item_chunk,
    )
    if dist.is_initialized() and dist.get_rank():
        return
    print(
        f"{args.output}: {counts.rows:,} recommendations for {counts.users:,} users among {catalogue.n_items:,} items, "
        f"in {time.perf_counter() - begin:.1f} s"
    )
    if counts.unknown_items:
        print(f"{args.histories}: dropped {counts.unknown_items:,} items that the catalogue lacks")
    if counts.empty_users:
        print(f"{args.histories}: left out {counts.empty_users:,} users without a known item")
