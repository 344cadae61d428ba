"""Leave-one-out ranking: where does the model put the item that each user took next?

    s3rec evaluate --model runs/beauty/finetune --dataset data/beauty --split test --protocol sampled

``test`` holds out a user's last item, ``validation`` the one before it; the history is what comes before.
The encoder sees the history's latest ``max_length`` items, but all of it counts as seen.

- ``full`` ranks the held-out item among all items not yet seen. A held-out item that the user has had
  before stays a candidate.
- ``sampled`` ranks it against given negatives, or against a hashed draw of distinct items that the user
  never takes: a function of (seed, row), whatever the batches and ranks.

A rank is the count of candidates scored higher by more than rounding, so ties favour the held-out item. Over
several processes each ranks its own part of the rows. Memory is bounded by ``batch_users`` x ``item_chunk`` scores:
the full protocol needs no more than how many scores are higher, less those of seen items. Where the items of a model
are cut over the processes, all rank the same users, each among its own items.

With ``--cold`` the users whose held-out item is cold stand apart too, ranked among all items as before. An item is cold
for a model where the dataset was prepared without it when the model was trained, or where no sample of the stage that
trained it last held it: held-out items do not count, nor what lies before the latest ``max_length`` ones. The dataset's
revisions tell, of which one must be what the model was trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F

from s3rec_dist.config import EngineConfig, EvaluationConfig, from_dict
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.order import SampleSpec, stage_spec
from s3rec_dist.data.stream import sampled_items
from s3rec_dist.hashing import hash64, key_of, uniform_below
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.storage import Storage, add_storage_argument, storage_of
from s3rec_dist.tables import ShardedTable
from s3rec_dist.tables.scored import ItemShard, Scored, WholeItems
from s3rec_dist.training.engine import gather, heeding_peers, start, together
from s3rec_dist.training.weights import MAX_SHARD_BYTES, ROWS_READ, InMemory, StoredRows

Split = Literal["validation", "test"]

_HELD_BACK = {"test": 1, "validation": 2}
"""The held-out item's place, counted from the end of a row."""

_DRAW_KEY = 0xE7A1
_NEGATIVES_AT_ONCE = 1024

_ROUNDING = 2.0**-20
"""Of a score's terms in absolute value: products of other shapes add them in another order, and differ by less."""


class EvaluationError(ValueError):
    """An evaluation that cannot be done or trusted; the message names the user, item, file or setting."""


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics, and what they were measured on."""

    metrics: dict[str, float]
    """HR@k and NDCG@k for each cut-off, and MRR: means over the users."""
    users: int
    protocol: str
    """The split and the candidates, in one line."""


@dataclass(frozen=True)
class Histories:
    """What some users have taken, oldest first: user b's items are ``values[starts[b]:ends[b]]``, at least one."""

    users: pa.Array
    """Raw ids, string [B]."""
    values: np.ndarray
    """Item ids, int32."""
    starts: np.ndarray
    """int64 [B]."""
    ends: np.ndarray
    """int64 [B]."""

    def latest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Each user's latest ``count`` items, packed: items int32 [T] and offsets int32 [B + 1]."""
        lengths = np.minimum(self.ends - self.starts, count)
        items = self.values[_ranges(self.ends - lengths, lengths)]
        return items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """(user's place in the batch, item) of all their items, repeats included, int64 [P] each."""
        lengths = self.ends - self.starts
        rows = np.repeat(np.arange(len(lengths)), lengths)
        return rows, self.values[_ranges(self.starts, lengths)].astype(np.int64)


@dataclass(frozen=True)
class HeldOut:
    """Users with the item each of them took next."""

    histories: Histories
    targets: np.ndarray
    """Held-out item ids, int64 [B]."""
    whole: Histories
    """The same users with all their items, the held-out ones too."""
    rows: np.ndarray
    """Their rows in the dataset, int64 [B]."""


Ranker = Callable[[HeldOut, torch.Tensor, Scored, torch.Tensor], torch.Tensor]
"""(batch, user vectors [B, E], items, target ids [B]) -> ranks [B] from 0, int64."""

Scorer = Callable[[Histories], tuple[torch.Tensor, Scored]]
"""Histories -> user vectors [B, E] and items, with the products of whose vectors they are scored."""


def model_scorer(model: S3Rec, dataset: Dataset, device: torch.device | str) -> Scorer:
    """The scores of a model. Raises :class:`EvaluationError` where it does not fit or has diverged."""
    items = scored_items(model, dataset.n_items, dataset.path)
    return lambda histories: (user_vectors(model, histories, device), items)


def evaluate(
    model: S3Rec, dataset: Dataset, config: EvaluationConfig, split: Split, device: torch.device | str
) -> EvaluationResult:
    """Ranks every user's held-out item. With torch.distributed initialised, all ranks must call it: each takes its
    part of the users, and gets the whole result. Raises :class:`EvaluationError` on every rank where one fails."""
    return evaluate_apart(model, dataset, config, split, device, {})[""]


def evaluate_apart(
    model: S3Rec,
    dataset: Dataset,
    config: EvaluationConfig,
    split: Split,
    device: torch.device | str,
    kinds: Mapping[str, np.ndarray],
) -> dict[str, EvaluationResult]:
    """As :func:`evaluate`, whose result stands under '', and of ``kinds`` of items, bool [N + 2], each by its name: of
    the users whose held-out item is one. Without any it has no metrics."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    cutoffs = tuple(dict.fromkeys(config.cutoffs))
    sums = torch.zeros(1 + len(kinds), 2 * len(cutoffs) + 2, dtype=torch.float64, device=device)
    masks = [torch.from_numpy(is_of_kind).to(device) for is_of_kind in kinds.values()]
    is_cut = isinstance(model.item_rows, ShardedTable)  # over the ranks: then all rank all users
    with together():
        scorer = model_scorer(model, dataset, device)
        rank_of, protocol = _ranker(dataset, config, split)
    with contextlib.nullcontext() if is_cut else together(), torch.no_grad():
        for batch, ranks in _ranked(scorer, rank_of, dataset, config, split, whole=is_cut):
            targets = torch.from_numpy(batch.targets).to(device)
            for own, part in zip(sums, [ranks, *(ranks[mask[targets]] for mask in masks)], strict=True):
                own += F.pad(metric_sums(part, cutoffs), (0, 1), value=len(part))
    if world_size > 1 and not is_cut:
        dist.all_reduce(sums)
    elif world_size > 1:
        dist.broadcast(sums, 0)  # what follows from them is the same on all ranks, whatever rounding differs
    users = sums[:, -1].long().tolist()  # all but those of damaged shards that were left out
    if not users[0]:
        raise EvaluationError(f"{dataset.path}: all its users lie in damaged shards; restore them")
    metrics = [_metrics(own[:-1], cutoffs, count) if count else {} for own, count in zip(sums, users, strict=True)]
    return {
        name: EvaluationResult(found, count, protocol)
        for name, found, count in zip(["", *kinds], metrics, users, strict=True)
    }


def cold_items(dataset: Dataset, fingerprint: str, spec: SampleSpec) -> np.ndarray:
    """Which items training did not have, bool [N + 2]: those that no sample held in the revision of ``dataset`` with
    this ``fingerprint``, and those that came later. Raises :class:`EvaluationError` where it has no such revision."""
    for revision in range(dataset.manifest.revision, 0, -1):
        then = Dataset.open(dataset.path, dataset.storage, revision=revision)
        if then.fingerprint == fingerprint:
            is_cold = np.ones(dataset.n_items + 2, dtype=bool)
            is_cold[: then.n_items + 1] = ~sampled_items(then, spec)[:-1]
            is_cold[[0, -1]] = False
            return is_cold
    raise EvaluationError(
        f"{dataset.path}: none of its revisions is what the model was trained on, so that nothing tells which items "
        "are cold; take the dataset that it was trained on (without data.mix), or leave --cold out"
    )


def user_ranks(scorer: Scorer, dataset: Dataset, config: EvaluationConfig, split: Split) -> tuple[np.ndarray, str]:
    """The rank of each user's held-out item from 0, int64 [U] in the order of the dataset's rows, and the protocol in
    words; over several processes as :func:`evaluate`."""
    with together(), torch.no_grad():
        rank_of, protocol = _ranker(dataset, config, split)
        ranked = _ranked(scorer, rank_of, dataset, config, split)
        parts = [(batch.rows, ranks.cpu().numpy()) for batch, ranks in ranked]
    every = [part for own in gather(parts) for part in own]
    if not every:
        raise EvaluationError(f"{dataset.path}: all its users lie in damaged shards; restore them")
    rows, ranks = (np.concatenate(column) for column in zip(*every, strict=True))
    return ranks[np.argsort(rows)], protocol


def _ranked(
    scorer: Scorer, rank_of: Ranker, dataset: Dataset, config: EvaluationConfig, split: Split, *, whole: bool = False
) -> Iterator[tuple[HeldOut, torch.Tensor]]:
    """Batches of this process's share of the users, or of the whole of them, with their ranks [B]."""
    is_shared = dist.is_initialized() and not whole
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_shared else (0, 1)
    for batch in held_out(dataset, split, config.batch_users, rank, world_size):
        users, items = scorer(batch.histories)
        targets = torch.from_numpy(batch.targets).to(users.device)
        yield batch, rank_of(batch, users, items, targets)


def metric_sums(ranks: torch.Tensor, cutoffs: Sequence[int]) -> torch.Tensor:
    """Sums over ``ranks`` [B], counted from 0: HR@k and NDCG@k for each cut-off, then the reciprocal rank; fp64."""
    places = ranks.double()
    ndcg = 1 / torch.log2(places + 2)
    sums = [value.sum() for k in cutoffs for hit in [ranks < k] for value in (hit.double(), ndcg * hit)]
    return torch.stack([*sums, (1 / (places + 1)).sum()])


def _metrics(sums: torch.Tensor, cutoffs: Sequence[int], users: int) -> dict[str, float]:
    names = [name for k in cutoffs for name in (f"HR@{k}", f"NDCG@{k}")]
    return dict(zip([*names, "MRR"], (sums / users).tolist(), strict=True))


def held_out(dataset: Dataset, split: Split, batch_users: int, rank: int = 0, world_size: int = 1) -> Iterator[HeldOut]:
    """This rank's share of the rows, in batches: contiguous, and equal to within one row."""
    if not dataset.n_rows:
        raise EvaluationError(f"{dataset.path}: has no users to evaluate on")
    low, high = (dataset.n_rows * r // world_size for r in (rank, rank + 1))
    back = _HELD_BACK[split]
    for index, (first, last) in enumerate(itertools.pairwise(dataset.index.first_row.tolist())):
        begin, end = max(low, first) - first, min(high, last) - first
        if begin >= end:
            continue
        shortest = dataset.index.length_counts(index)[0][0]
        if shortest <= back:
            raise EvaluationError(
                f"{dataset.path}: has sequences of {shortest} items; the {split} item and a history need {back + 1}: "
                "prepare the dataset again, which keeps shorter ones out"
            )
        sequences = dataset.read_row_group(index)
        if not len(sequences.users):  # a damaged shard that may be left out
            continue
        for at in range(begin, end, batch_users):
            rows = slice(at, min(at + batch_users, end))
            users = sequences.users[rows]
            starts, ends = sequences.offsets[:-1][rows], sequences.offsets[1:][rows]
            yield HeldOut(
                Histories(users, sequences.values, starts, ends - back),
                sequences.values[ends - back].astype(np.int64),
                Histories(users, sequences.values, starts, ends),
                np.arange(first + rows.start, first + rows.stop),
            )


def scored_items(model: S3Rec, n_items: int, source: str) -> Scored:
    """A model's items; ``source`` names what has ``n_items`` of them."""
    table = model.item_rows
    if not isinstance(table, ShardedTable):
        return WholeItems(item_vectors(model, n_items, source))
    _check_size(model, n_items, source)
    held = table.tensors()
    for ids, rows in zip(held["ids"].split(ROWS_READ), held["rows"].split(ROWS_READ), strict=True):
        _check_finite(rows, ids)
    return ItemShard(table, model.with_features)


def item_vectors(model: S3Rec, n_items: int, source: str) -> torch.Tensor:
    """Item vectors, fp32 [N, E]; row i is item i + 1. ``source`` names what has ``n_items`` items."""
    _check_size(model, n_items, source)
    items = model.catalogue_vectors.detach()[1 : n_items + 1].float()
    _check_finite(items, range(1, n_items + 1))
    return items


def item_vectors_in_parts(model: S3Rec, n_items: int, source: str) -> Iterator[torch.Tensor]:
    """As :func:`item_vectors`, some at a time [K, E]; stored rows are read by as many as a shard has."""
    _check_size(model, n_items, source)
    table = model.item_rows
    stored = table.stored if isinstance(table, StoredRows) else InMemory(model.item_embedding.weight.detach())
    many = max(1, MAX_SHARD_BYTES // (4 * stored.shape[1]))
    for begin in range(1, n_items + 1, many):
        rows = stored.rows(begin, min(begin + many, n_items + 1))
        for at, part in enumerate(rows.split(ROWS_READ)):
            first = begin + at * ROWS_READ
            vectors = model.with_features(torch.arange(first, first + len(part)), part).detach()
            _check_finite(vectors, range(first, first + len(part)))
            yield vectors


def _check_finite(vectors: torch.Tensor, items: Sequence[int] | torch.Tensor) -> None:
    """Raises :class:`EvaluationError` naming one of ``items`` whose vector is not finite."""
    finite = torch.isfinite(vectors).all(1)
    if not finite.all():
        bad = int(items[int(finite.int().argmin())])
        raise EvaluationError(f"item {bad}: its embedding is not finite; the model's training has diverged")


def _check_size(model: S3Rec, n_items: int, source: str) -> None:
    if model.n_items != n_items:
        raise EvaluationError(
            f"the model knows {model.n_items} items, {source} has {n_items}; use the dataset it was trained on"
        )


def user_vectors(model: S3Rec, histories: Histories, device: torch.device | str) -> torch.Tensor:
    """The model's state after each history, fp32 [B, E]."""
    items, offsets = histories.latest(model.config.max_length)
    longest = int(np.diff(offsets).max())
    users = model.encode_last(torch.from_numpy(items).to(device), torch.from_numpy(offsets).to(device), longest).float()
    finite = torch.isfinite(users).all(1)
    if not finite.all():
        bad = histories.users[int(finite.int().argmin())].as_py()
        raise EvaluationError(f"user {bad}: the scores are not finite (NaN or infinity); the model has diverged")
    return users


def full_ranks(
    users: torch.Tensor,
    items: Scored,
    targets: torch.Tensor,
    excluded: tuple[torch.Tensor, torch.Tensor],
    item_chunk: int,
) -> torch.Tensor:
    """Ranks [B] of ``targets`` [B] among all items but the ``excluded`` (user's place, item id) pairs [P].

    The pairs must be distinct, and should hold each target itself, which then never outranks itself.
    """
    scores = _scores_to_beat(users, items.of(targets))
    higher = torch.zeros_like(targets)
    rows, columns = excluded[0], items.places(excluded[1])
    for begin in range(0, len(items), item_chunk):
        chunk = users @ items.part(begin, begin + item_chunk).T  # [B, C]
        higher += (chunk > scores[:, None]).sum(1)
        inside = (columns >= begin) & (columns < begin + item_chunk)
        at = rows[inside]
        higher.index_add_(0, at, (chunk[at, columns[inside] - begin] > scores[at]).long(), alpha=-1)
    return items.summed(higher)


def sampled_ranks(users: torch.Tensor, items: Scored, targets: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Ranks [B] of ``targets`` [B] against ``negatives`` [B, n], item ids all."""
    own = _scores_to_beat(users, items.of(targets))[:, None]
    higher = torch.zeros_like(targets)
    for part in negatives.split(_NEGATIVES_AT_ONCE, 1):
        scores = torch.bmm(items.of(part), users[:, :, None]).squeeze(2)
        higher += (scores > own).sum(1)
    return higher


def _scores_to_beat(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """[B]: the scores of ``items`` [B, E], one for each user, and what rounding may add to an equal one."""
    terms = users * items
    return terms.sum(1) + _ROUNDING * terms.abs().sum(1)


def _ranker(dataset: Dataset, config: EvaluationConfig, split: Split) -> tuple[Ranker, str]:
    """What ranks a batch, and the protocol in words."""
    if config.protocol == "full":
        line = f"{split} item among all {dataset.n_items:,} items except those seen before (full ranking)"
        return partial(_rank_full, item_chunk=config.item_chunk), line
    if config.negatives_file:
        given = GivenNegatives.read(config.negatives_file, dataset)
        name = os.path.basename(config.negatives_file)
        return partial(_rank_sampled, given.of), f"{split} item against {given.count} negatives from {name}"

    def drawn(batch: HeldOut) -> np.ndarray:
        return draw_negatives(batch.whole, batch.rows, dataset.n_items, config.negatives, config.seed)

    line = f"{split} item against {config.negatives} random items the user never took (seed {config.seed})"
    return partial(_rank_sampled, drawn), line


def _rank_full(
    batch: HeldOut, users: torch.Tensor, items: Scored, targets: torch.Tensor, *, item_chunk: int
) -> torch.Tensor:
    rows, seen = batch.histories.seen()
    rows = np.concatenate([rows, np.arange(len(batch.targets))])
    taken = np.concatenate([seen, batch.targets])
    pairs = _distinct(rows, taken, int(taken.max(initial=0)))
    excluded = [torch.from_numpy(part).to(users.device) for part in pairs]
    return full_ranks(users, items, targets, (excluded[0], excluded[1]), item_chunk)


def _rank_sampled(
    negatives_of: Callable[[HeldOut], np.ndarray],
    batch: HeldOut,
    users: torch.Tensor,
    items: Scored,
    targets: torch.Tensor,
) -> torch.Tensor:
    negatives = torch.from_numpy(negatives_of(batch)).to(users.device)
    return sampled_ranks(users, items, targets, negatives)


def draw_negatives(whole: Histories, rows: np.ndarray, n_items: int, count: int, seed: int) -> np.ndarray:
    """``count`` distinct items for each user, uniform over those not in ``whole``, int64 [B, count].

    ``rows`` [B] number the users in the dataset: a draw depends on its seed and row alone. Floyd's algorithm
    picks distinct places among the items left, and the places are mapped past the items taken, so no draw
    is ever repeated.
    """
    users = len(rows)
    taken_by, taken = _distinct(*whole.seen(), n_items)
    first = np.searchsorted(taken_by, np.arange(users + 1))
    left = n_items - np.diff(first)
    if (short := left < count).any():
        at = int(short.argmax())
        raise EvaluationError(
            f"user {whole.users[at]}: has {left[at]} of {n_items} items left that could be negatives; lower "
            f"evaluation.negatives={count}, or rank among all items with evaluation.protocol=full"
        )
    keys = hash64(np.full(users, key_of(seed, _DRAW_KEY)), rows)
    places = np.empty((count, users), dtype=np.int64)
    for i in range(count):
        last = left - count + i
        place = uniform_below(hash64(keys, i), last + 1)
        places[i] = np.where((places[:i] == place).any(0), last, place)
    # An item has `item - 1 - (items taken below it)` free ones below it; place p follows those with at most p.
    free_below = taken - 1 - (np.arange(len(taken)) - first[taken_by])
    stride = n_items + 1
    wanted = np.arange(users) * stride + places
    passed = np.searchsorted(taken_by * stride + free_below, wanted, side="right") - first[:-1]
    return np.ascontiguousarray((places + 1 + passed).T)


@dataclass(frozen=True)
class GivenNegatives:
    """Negatives from a file of lines ``user item item ...`` in raw ids, as many for each user."""

    source: str
    place: Mapping[str, int]
    """Row of ``items`` by raw user id."""
    items: np.ndarray
    """Item ids, int32 [users, count]."""

    @property
    def count(self) -> int:
        return self.items.shape[1]

    @classmethod
    def read(cls, path: str, dataset: Dataset) -> GivenNegatives:
        """Raises :class:`EvaluationError` naming file and line, or a user of the dataset that has none."""
        known = {user for i in range(len(dataset.index)) for user in dataset.read_row_group(i).users.to_pylist()}
        ids = dataset.item_ids()
        place: dict[str, int] = {}
        rows: list[np.ndarray] = []
        for number, (user, *items) in _lines(path, dataset.storage):
            where = f"{path}:{number}"
            if user not in known and not dataset.damaged:
                raise EvaluationError(f"{where}: user {user!r} is not in {dataset.path}; take the line out")
            if user in place:
                raise EvaluationError(f"{where}: user {user!r} has a line already; leave one of them")
            if not items or (rows and len(items) != len(rows[0])):
                expected = len(rows[0]) if rows else "at least 1"
                raise EvaluationError(f"{where}: {len(items)} negatives, expected {expected}, as many for each user")
            try:
                rows.append(np.fromiter((ids[item] for item in items), np.int32, len(items)))
            except KeyError as error:
                raise EvaluationError(
                    f"{where}: item {error.args[0]!r} is not in {dataset.path}; replace it by one that is"
                ) from None
            place[user] = len(place)
        if missing := known - place.keys():
            raise EvaluationError(
                f"{path}: has no line for {len(missing)} of {len(known)} users, among them {min(missing)!r}; "
                "add them, or draw negatives by leaving evaluation.negatives_file empty"
            )
        return cls(path, place, np.stack(rows))

    def of(self, batch: HeldOut) -> np.ndarray:
        """The negatives of a batch's users, int64 [B, count]."""
        return self.items[[self.place[user] for user in batch.histories.users.to_pylist()]].astype(np.int64)


def _lines(path: str, storage: Storage) -> Iterator[tuple[int, list[str]]]:
    """(line number, words) of the lines that are not blank."""
    try:
        with storage.open(path) as file:
            for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8"), 1):
                if words := line.split():
                    yield number, words
    except FileNotFoundError:
        raise EvaluationError(f"{path}: no such file; expected lines 'user item item ...' in raw ids") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 text ({error.reason})") from error


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of the ranges ``starts[b] : starts[b] + lengths[b]``, end to end, int64."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def _distinct(rows: np.ndarray, items: np.ndarray, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (row, item) pairs, sorted."""
    pairs = np.unique(rows * (n_items + 1) + items)
    return pairs // (n_items + 1), pairs % (n_items + 1)


def format_table(results: Mapping[str, EvaluationResult]) -> str:
    """Results beside each other, one row for each name, with their protocol."""
    protocols = list(dict.fromkeys(f"{result.protocol}; {result.users:,} users" for result in results.values()))
    names = list(dict.fromkeys(name for result in results.values() for name in result.metrics))
    rows = [["", *names]]
    for label, result in results.items():
        rows.append([label, *(f"{result.metrics[n]:.4f}" if n in result.metrics else "-" for n in names)])
        if len(protocols) > 1:
            rows[-1][0] += f" [{protocols.index(f'{result.protocol}; {result.users:,} users') + 1}]"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    notes = protocols if len(protocols) == 1 else [f"[{i}] {line}" for i, line in enumerate(protocols, 1)]
    return "\n".join([*(line.rstrip() for line in lines), *notes])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec evaluate``."""
    defaults = EvaluationConfig()
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="[LABEL=]FOLDER",
        help="runs, checkpoints or exported models; several are shown beside each other",
    )
    parser.add_argument(
        "--dataset", "--data", required=True, metavar="URL", help="dataset that 's3rec prepare' wrote: folder or URL"
    )
    parser.add_argument(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="hold out each user's last item (test, the default) or the one before it",
    )
    parser.add_argument(
        "--protocol",
        choices=("sampled", "full"),
        help="rank among sampled negatives, or among all items not seen (default: full; sampled with --negatives-file)",
    )
    parser.add_argument(
        "--negatives",
        type=int,
        default=defaults.negatives,
        metavar="N",
        help=f"negatives drawn for each user under sampled (default: {defaults.negatives})",
    )
    parser.add_argument(
        "--negatives-file", default="", metavar="FILE", help="lines 'user item item ...' in raw ids, instead of a draw"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        metavar="N",
        help=f"seed of the negatives' draw (default: {defaults.seed})",
    )
    parser.add_argument(
        "--cutoffs",
        type=int,
        nargs="+",
        default=defaults.cutoffs,
        metavar="K",
        help=f"cut-offs of HR and NDCG (default: {' '.join(map(str, defaults.cutoffs))})",
    )
    parser.add_argument(
        "--batch-users",
        type=int,
        default=defaults.batch_users,
        metavar="N",
        help=f"users scored together (default: {defaults.batch_users})",
    )
    parser.add_argument(
        "--item-chunk",
        type=int,
        default=defaults.item_chunk,
        metavar="N",
        help=f"items scored together, which bounds memory (default: {defaults.item_chunk})",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="also apart for users whose held-out item is warm or cold: cold ones are new in the dataset since the "
        "model was trained, or no training sample held them",
    )
    add_device_argument(parser)
    add_storage_argument(parser)
    parser.add_argument("--json", metavar="FILE", help="write the results here as well")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """``--device``, for :func:`device_of`."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto, the default, takes a GPU if there is"
    )


def device_of(name: str) -> torch.device:
    """The device that ``--device`` names; joins the other processes where a launcher started several."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return start(EngineConfig(device="cpu" if name == "cpu" else "cuda" if name == "cuda" else "auto")).device
    if name == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("--device cuda, but torch finds no GPU here; use auto or cpu")
    on_cpu = name == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu" if on_cpu else "cuda")


@heeding_peers()
def run(args: argparse.Namespace) -> None:
    """``s3rec evaluate``: a table on stdout, and JSON where asked for."""
    from s3rec_dist.export import open_model

    config = EvaluationConfig(
        protocol=args.protocol or ("sampled" if args.negatives_file else "full"),
        negatives=args.negatives,
        negatives_file=args.negatives_file,
        seed=args.seed,
        cutoffs=tuple(args.cutoffs),
        batch_users=args.batch_users,
        item_chunk=args.item_chunk,
    )
    models = _labelled(args.model)
    device = device_of(args.device)
    with together():
        dataset = Dataset.open(args.dataset, storage_of(args))
    results: dict[str, EvaluationResult] = {}
    entries = []
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    for label, path in models.items():
        with together():
            tell = partial(print, file=sys.stderr) if is_first else lambda _: None
            model, metadata = open_model(path, dataset, device, tell)
            kinds = warm_and_cold(metadata, dataset) if args.cold else {}
        begin = time.perf_counter()
        found = evaluate_apart(model.to(device).eval(), dataset, config, args.split, device, kinds)
        seconds = time.perf_counter() - begin
        for kind, result in found.items():
            results[f"{label}, {kind}" if kind else label] = result
            own = {"items": kind} if kind else {}
            entries.append({"label": label, **own, "model": path, "split": args.split, **dataclasses.asdict(result)})
        if is_first:
            print(f"{label}: ranked {found[''].users:,} users in {seconds:.1f} s", file=sys.stderr)
    if is_first:
        print(format_table(results))
        if args.json:
            dataset.storage.write(args.json, (json.dumps({"results": entries}, indent=1) + "\n").encode())


def warm_and_cold(metadata: Mapping[str, Any], dataset: Dataset) -> dict[str, np.ndarray]:
    """Items by kind, for the model of these ``metadata``."""
    from s3rec_dist.export import trained_on

    stage, path = metadata.get("stage"), metadata["path"]
    fingerprint = trained_on(metadata)
    if not fingerprint or stage not in ("pretrain", "finetune"):
        raise EvaluationError(f"{path}: does not say which data it was trained on, which --cold needs; leave that out")
    config = from_dict(metadata["config"], path)
    spec = stage_spec(stage, getattr(config, stage).samples, config.model.max_length)
    is_cold = cold_items(dataset, fingerprint, spec)
    return {"warm items": ~is_cold, "cold items": is_cold}


def _labelled(arguments: Sequence[str]) -> dict[str, str]:
    """Folder by label, from ``LABEL=FOLDER`` or ``FOLDER``."""
    models: dict[str, str] = {}
    for argument in arguments:
        label, separator, path = argument.partition("=")
        if not separator or "://" in label or os.path.exists(argument):
            label = path = argument
        if label in models:
            raise EvaluationError(f"--model: two models are labelled {label!r}; write LABEL=FOLDER to tell them apart")
        models[label] = path
    return models
