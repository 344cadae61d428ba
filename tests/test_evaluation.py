"""Leave-one-out ranking: ranks are those of brute force, negatives are drawn fairly, every user counts once."""

from __future__ import annotations

import itertools
import json
import math
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from s3rec_dist import __main__ as cli
from s3rec_dist.config import Config, EvaluationConfig, ModelConfig
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.evaluation import (
    EvaluationError,
    EvaluationResult,
    GivenNegatives,
    Histories,
    draw_negatives,
    evaluate,
    format_table,
    full_ranks,
    held_out,
    metric_sums,
    sampled_ranks,
)
from s3rec_dist.export import write_model
from s3rec_dist.model import S3Rec
from s3rec_dist.tables.scored import WholeItems

Split = Literal["validation", "test"]

N_ITEMS = 30
MODEL = ModelConfig(hidden_size=8, layers=1, heads=2, inner_size=8, max_length=6, initializer_range=0.5)
SPLITS: tuple[Split, ...] = ("validation", "test")


def toy_rows() -> dict[str, list[int]]:
    """22 users: histories shorter and longer than the model sees, repeats, held-out items that were seen before."""
    rng = np.random.default_rng(3)
    rows = {f"u{i}": rng.integers(1, N_ITEMS + 1, 3 + i % 13).tolist() for i in range(20)}
    rows["again"] = [4, 7, 4, 9, 7, 4]
    rows["same"] = [5, 5, 5]
    return rows


def prepared(folder: Path, rows: dict[str, list[int]]) -> Dataset:
    """Four users a row group, two row groups a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.txt").write_text("".join(f"{user} {' '.join(map(str, items))}\n" for user, items in rows.items()))
    (folder / "toy_item2attributes.json").write_text(json.dumps({"1": [1]}))
    output = str(folder / "dataset")
    prepare(
        PrepareSettings(
            source="s3rec", input=str(folder / "toy.txt"), output=output, rows_per_group=4, groups_per_shard=2
        )
    )
    return Dataset.open(output)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    dataset = prepared(tmp_path_factory.mktemp("toy"), toy_rows())
    assert dataset.n_items == N_ITEMS and len(dataset.index) == 6
    return dataset


def make_model(n_items: int = N_ITEMS, **settings: Any) -> S3Rec:
    torch.manual_seed(0)
    return S3Rec(replace(MODEL, **settings), n_items, 1).eval()


@pytest.fixture
def model() -> S3Rec:
    return make_model()


def rows_of(dataset: Dataset) -> list[tuple[str, list[int]]]:
    """(user, item ids) of every row, in order."""
    rows = []
    for index in range(len(dataset.index)):
        group = dataset.read_row_group(index)
        parts = [group.values[a:b].tolist() for a, b in itertools.pairwise(group.offsets)]
        rows += list(zip(group.users.to_pylist(), parts, strict=True))
    return rows


def split_row(items: list[int], split: Split) -> tuple[list[int], int]:
    """History and held-out item."""
    return (items[:-1], items[-1]) if split == "test" else (items[:-2], items[-2])


def scores_of(model: S3Rec, history: list[int]) -> np.ndarray:
    """Score of each item after one history, by item id; fp64 products of the model's own states."""
    latest = history[-model.config.max_length :]
    with torch.no_grad():
        state = model.encode_last(
            torch.tensor(latest, dtype=torch.int32), torch.tensor([0, len(latest)], dtype=torch.int32), len(latest)
        )
    return (model.item_embedding.weight.detach().double() @ state[0].double()).numpy()


def naive_metrics(ranks: list[int], cutoffs: tuple[int, ...]) -> dict[str, float]:
    """A user at a time; ranks from 0."""
    sums: Counter[str] = Counter()
    for rank in ranks:
        for k in cutoffs:
            if rank < k:
                sums[f"HR@{k}"] += 1
                sums[f"NDCG@{k}"] += 1 / math.log2(rank + 2)
        sums["MRR"] += 1 / (rank + 1)
    names = [name for k in cutoffs for name in (f"HR@{k}", f"NDCG@{k}")] + ["MRR"]
    return {name: sums[name] / len(ranks) for name in names}


def histories_of(rows: list[list[int]]) -> Histories:
    ends = np.cumsum([len(items) for items in rows]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    users = pa.array([f"user{i}" for i in range(len(rows))])
    return Histories(users, np.array(list(itertools.chain(*rows)), dtype=np.int32), starts, ends)


# Metrics


def test_metrics_of_hand_computed_ranks() -> None:
    sums = metric_sums(torch.tensor([0, 2, 4, 100]), (1, 5)).tolist()
    # HR@1, NDCG@1, HR@5, NDCG@5 = 1 + 1/log2(4) + 1/log2(6), MRR = 1 + 1/3 + 1/5 + 1/101
    assert sums == pytest.approx([1, 1, 3, 1 + 0.5 + 0.38685280723454163, 1.5432343234323432])


@settings(deadline=None)
@given(
    ranks=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    cutoffs=st.lists(st.integers(1, 25), min_size=1, max_size=4, unique=True).map(tuple),
)
def test_metrics_equal_a_loop_over_users(ranks: list[int], cutoffs: tuple[int, ...]) -> None:
    sums = metric_sums(torch.tensor(ranks), cutoffs)
    assert sums.dtype == torch.float64
    assert (sums / len(ranks)).tolist() == pytest.approx(list(naive_metrics(ranks, cutoffs).values()))


# Full ranking


@st.composite
def rankings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Users, items of few distinct integer scores, so with exact ties; targets; (user, item) pairs to leave out."""
    users, items = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    values = st.integers(-2, 2)

    def matrix(rows: int) -> torch.Tensor:
        entries = draw(st.lists(values, min_size=rows * 2, max_size=rows * 2))
        return torch.tensor(entries, dtype=torch.float32).view(-1, 2)

    targets = draw(st.lists(st.integers(1, items), min_size=users, max_size=users))
    pairs = draw(st.sets(st.tuples(st.integers(0, users - 1), st.integers(1, items))))
    pairs |= set(enumerate(targets))
    return matrix(users), matrix(items), torch.tensor(targets), sorted(pairs)


@settings(deadline=None, max_examples=100)
@given(ranking=rankings(), item_chunk=st.integers(1, 13))
def test_a_full_rank_counts_the_items_not_left_out_that_score_higher(ranking: Any, item_chunk: int) -> None:
    users, items, targets, pairs = ranking
    rows, ids = (torch.tensor(part) for part in zip(*pairs, strict=True))
    found = full_ranks(users, WholeItems(items), targets, (rows, ids), item_chunk)
    scores = users @ items.T
    expected = [
        sum(
            float(scores[b, item - 1]) > float(scores[b, target - 1])
            for item in range(1, len(items) + 1)
            if (b, item) not in pairs
        )
        for b, target in enumerate(targets.tolist())
    ]
    assert found.tolist() == expected and found.dtype == torch.int64


@pytest.mark.parametrize("size", [8, 64, 300])
@pytest.mark.parametrize("users", [1, 7, 64])
def test_an_item_with_the_held_out_items_embedding_does_not_outrank_it(size: int, users: int) -> None:
    """Products of other shapes add in another order: without care, rounding decides."""
    generator = torch.Generator().manual_seed(0)
    states, items = torch.randn(users, size, generator=generator), torch.randn(1000, size, generator=generator)
    items[500:] = items[:500]
    scores = states.double() @ items.double().T
    targets = torch.randint(1, 501, (users,), generator=generator)
    rows = torch.arange(users)
    expected = (scores > scores[rows, targets - 1, None] + 1e-9).sum(1)
    for item_chunk in (1, 3, 64, 300, 1000):
        assert torch.equal(full_ranks(states, WholeItems(items), targets, (rows, targets), item_chunk), expected)
    everything = torch.arange(1, 1001).expand(users, -1)
    assert torch.equal(sampled_ranks(states, WholeItems(items), targets, everything), expected)


@pytest.mark.parametrize("split", SPLITS)
def test_full_metrics_equal_brute_force_over_all_items_not_seen(dataset: Dataset, model: S3Rec, split: Split) -> None:
    ranks = []
    for _, items in rows_of(dataset):
        history, target = split_row(items, split)
        scores = scores_of(model, history)
        candidates = set(range(1, N_ITEMS + 1)) - set(history) - {target}
        ranks.append(sum(scores[item] > scores[target] for item in candidates))
    result = evaluate(model, dataset, EvaluationConfig(cutoffs=(1, 5, 10)), split, "cpu")
    assert result.metrics == pytest.approx(naive_metrics(ranks, (1, 5, 10)))
    assert list(result.metrics) == ["HR@1", "NDCG@1", "HR@5", "NDCG@5", "HR@10", "NDCG@10", "MRR"]
    assert result.users == 22
    assert result.protocol == f"{split} item among all 30 items except those seen before (full ranking)"
    assert len(set(ranks)) > 5  # neither a perfect nor a dead model: the comparison has something to compare


def test_a_held_out_item_seen_before_is_a_candidate_and_its_rank_leaves_the_seen_ones_out() -> None:
    users = torch.tensor([[1.0]])
    items = torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]])
    seen_and_target = (torch.zeros(3, dtype=torch.int64), torch.tensor([1, 3, 4]))
    found = full_ranks(users, WholeItems(items), torch.tensor([4]), seen_and_target, 2)
    assert found.tolist() == [1]  # only item 2 is above


def test_the_test_item_is_a_candidate_under_validation_and_the_validation_item_none_under_test(
    tmp_path: Path, model: S3Rec
) -> None:
    dataset = prepared(tmp_path, {"user": [1, 2, 3, 28, 30], "all": list(range(1, N_ITEMS + 1))})
    with torch.no_grad():  # an item's score is its id
        for parameter in model.parameters():
            parameter.zero_()
        model.blocks[0].output_norm.bias.fill_(1 / 8)
        model.item_embedding.weight[:] = torch.arange(N_ITEMS + 2)[:, None]
    validation = evaluate(model, dataset, EvaluationConfig(cutoffs=(2, 3)), "validation", "cpu")
    # 28 comes after 29 and 30, 29 after 30
    assert (validation.metrics["HR@2"], validation.metrics["HR@3"]) == (0.5, 1.0)
    assert validation.metrics["MRR"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    test = evaluate(model, dataset, EvaluationConfig(cutoffs=(1,)), "test", "cpu")
    assert test.metrics == {"HR@1": 1.0, "NDCG@1": 1.0, "MRR": 1.0}


@pytest.mark.parametrize("protocol", ["full", "sampled"])
def test_a_model_that_scores_all_items_alike_ranks_every_held_out_item_first(
    dataset: Dataset, model: S3Rec, protocol: Any
) -> None:
    with torch.no_grad():
        model.item_embedding.weight[:] = model.item_embedding.weight[3]
    result = evaluate(model, dataset, EvaluationConfig(protocol=protocol, negatives=10), "test", "cpu")
    assert set(result.metrics.values()) == {1.0}


@pytest.mark.parametrize("batch_users", [1, 3, 256])
@pytest.mark.parametrize("item_chunk", [1, 7, 65536])
@pytest.mark.parametrize("split", SPLITS)
def test_batch_and_chunk_sizes_change_nothing(
    dataset: Dataset, model: S3Rec, batch_users: int, item_chunk: int, split: Split
) -> None:
    expected = evaluate(model, dataset, EvaluationConfig(), split, "cpu")
    config = EvaluationConfig(batch_users=batch_users, item_chunk=item_chunk)
    found = evaluate(model, dataset, config, split, "cpu")
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-12)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is made inside the block; views of ``inputs`` are not made there."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in inputs}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("item_chunk", [100, 1000])
def test_full_ranking_holds_one_chunk_of_scores_at_a_time_whatever_the_catalogue(item_chunk: int) -> None:
    users, targets = torch.randn(64, 8), torch.arange(1, 65)
    for n_items in (1000, 5000):
        items = torch.randn(n_items, 8)
        with LargestTensor(users, items) as largest:
            full_ranks(users, WholeItems(items), targets, (torch.arange(64), targets), item_chunk)
        assert largest.bytes == 64 * item_chunk * 4


def test_the_encoder_sees_the_latest_items_but_all_count_as_seen(dataset: Dataset) -> None:
    short = make_model(max_length=2)
    batch = next(held_out(dataset, "test", 4))
    items, offsets = batch.histories.latest(2)
    rows, seen = batch.histories.seen()
    for b, (_, row) in enumerate(rows_of(dataset)[:4]):
        assert items[offsets[b] : offsets[b + 1]].tolist() == row[:-1][-2:]
        assert seen[rows == b].tolist() == row[:-1]
    ranks = []
    for _, row in rows_of(dataset):
        history, target = split_row(row, "test")
        scores = scores_of(short, history)
        ranks.append(sum(scores[i] > scores[target] for i in set(range(1, 31)) - set(history) - {target}))
    found = evaluate(short, dataset, EvaluationConfig(), "test", "cpu")
    assert found.metrics == pytest.approx(naive_metrics(ranks, (1, 5, 10, 20)))


# Who is held out


@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_holds_each_users_history_held_out_item_and_whole_row(dataset: Dataset, split: Split) -> None:
    rows = rows_of(dataset)
    assert [user for user, _ in rows] == list(toy_rows())
    found: dict[int, tuple[str, list[int], int]] = {}
    for batch in held_out(dataset, split, batch_users=3):
        for b, (row, user) in enumerate(zip(batch.rows.tolist(), batch.histories.users.to_pylist(), strict=True)):
            histories, whole = batch.histories, batch.whole
            history = histories.values[histories.starts[b] : histories.ends[b]].tolist()
            assert whole.values[whole.starts[b] : whole.ends[b]].tolist() == rows[row][1]
            assert whole.users[b].as_py() == user
            found[row] = (user, history, int(batch.targets[b]))
    assert found == {i: (user, *split_row(items, split)) for i, (user, items) in enumerate(rows)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 22, 40])
@pytest.mark.parametrize("batch_users", [1, 3, 100])
def test_ranks_share_the_rows_without_overlap_and_evenly(dataset: Dataset, world_size: int, batch_users: int) -> None:
    shares = []
    for rank in range(world_size):
        batches = list(held_out(dataset, "test", batch_users, rank, world_size))
        assert all(1 <= len(batch.targets) <= batch_users for batch in batches)
        shares.append([row for batch in batches for row in batch.rows.tolist()])
    assert list(itertools.chain(*shares)) == list(range(22))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def fake(rows: int, shortest: int) -> Any:
    lengths = np.array([shortest]), np.array([rows])
    index = types.SimpleNamespace(first_row=np.array([0, rows]), length_counts=lambda group: lengths)
    return types.SimpleNamespace(path="data/toy", n_rows=rows, index=index)


def test_sequences_too_short_to_hold_out_from_are_refused() -> None:
    message = "data/toy: has sequences of 2 items; the validation item and a history need 3"
    with pytest.raises(EvaluationError, match=message):
        next(held_out(fake(4, 2), "validation", 10))
    with pytest.raises(EvaluationError, match="has sequences of 1 items; the test item and a history need 2"):
        next(held_out(fake(4, 1), "test", 10))


def test_a_dataset_without_users_is_refused() -> None:
    with pytest.raises(EvaluationError, match="data/toy: has no users to evaluate on"):
        next(held_out(fake(0, 3), "test", 10))


# Sampled ranking


@pytest.mark.parametrize("count", [1, 5, 1024, 1025, 3000])
def test_a_sampled_rank_counts_the_negatives_that_score_higher(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randint(-3, 4, (n, 4), generator=generator).float() for n in (6, 50))
    targets = torch.randint(1, 51, (6,), generator=generator)
    negatives = torch.randint(1, 51, (6, count), generator=generator)
    scores = users @ items.T
    expected = [
        sum(float(scores[b, n - 1]) > float(scores[b, targets[b] - 1]) for n in negatives[b].tolist()) for b in range(6)
    ]
    assert sampled_ranks(users, WholeItems(items), targets, negatives).tolist() == expected


@settings(deadline=None, max_examples=100)
@given(
    n_items=st.integers(1, 30),
    taken=st.lists(st.sets(st.integers(1, 30), min_size=1), min_size=1, max_size=6),
    data=st.data(),
)
def test_drawn_negatives_are_distinct_and_never_among_the_users_items(
    n_items: int, taken: list[set[int]], data: st.DataObject
) -> None:
    rows = [[item for item in sorted(items) if item <= n_items] or [1] for items in taken]
    rows = [items + items[:1] for items in rows]  # repeats
    left = [set(range(1, n_items + 1)) - set(items) for items in rows]
    count = data.draw(st.integers(0, min(map(len, left))))
    drawn = draw_negatives(histories_of(rows), np.arange(len(rows)), n_items, count, seed=1)
    assert drawn.shape == (len(rows), count) and drawn.dtype == np.int64
    for negatives, allowed in zip(drawn.tolist(), left, strict=True):
        assert len(set(negatives)) == count and set(negatives) <= allowed
        if count == len(allowed):
            assert set(negatives) == allowed


def chi_square_z(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float((((counts - expected) ** 2).sum() / expected - (counts.size - 1)) / (2 * (counts.size - 1)) ** 0.5)


USERS = 20_000


@pytest.mark.parametrize("seed", [0, 2020])
def test_every_set_of_free_items_is_drawn_equally_often(seed: int) -> None:
    """Items 1, 4, 5 and 10 of 10 are taken, so 3 of 6 are drawn: 20 sets."""
    histories = histories_of([[4, 1, 10, 5, 4]] * USERS)
    drawn = draw_negatives(histories, np.arange(USERS), 10, 3, seed)
    sets = Counter(tuple(sorted(row)) for row in drawn.tolist())
    assert sets.keys() == set(itertools.combinations([2, 3, 6, 7, 8, 9], 3))
    assert abs(chi_square_z(np.array(list(sets.values())))) < 5


def test_draws_are_uniform_over_a_large_catalogue() -> None:
    rng = np.random.default_rng(0)
    histories = histories_of([rng.integers(1, 1001, 20).tolist() for _ in range(4000)])
    drawn = draw_negatives(histories, np.arange(4000), 1000, 99, seed=7)
    taken = np.zeros(1001)
    rows, seen = histories.seen()
    np.add.at(taken, np.unique(rows * 1001 + seen) % 1001, 1)
    chance = (4000 - taken[1:]) / 4000  # of users for whom an item is free
    counts = np.bincount(drawn.ravel(), minlength=1001)[1:] / chance
    deviations = (counts - counts.mean()) / counts.mean() ** 0.5
    assert np.abs(deviations).max() < 5 and abs(float((deviations**2).mean()) - 1) < 5 * (2 / 1000) ** 0.5


def test_a_draw_depends_on_seed_and_row_alone(dataset: Dataset) -> None:
    def draws(batch_users: int, world_size: int, seed: int = 1, split: Split = "test") -> dict[int, list[int]]:
        return {
            row: negatives
            for rank in range(world_size)
            for batch in held_out(dataset, split, batch_users, rank, world_size)
            for row, negatives in zip(
                batch.rows.tolist(),
                draw_negatives(batch.whole, batch.rows, N_ITEMS, 5, seed).tolist(),
                strict=True,
            )
        }

    base = draws(100, 1)
    assert base == draws(1, 1) == draws(3, 2) == draws(4, 5) == draws(100, 1, split="validation")
    other = draws(100, 1, seed=2)
    assert sum(base[row] == other[row] for row in base) <= 1


# What evaluate() does with a draw or with given negatives


def naive_sampled(model: S3Rec, dataset: Dataset, split: Split, negatives: dict[int, list[int]]) -> list[int]:
    ranks = []
    for row, (_, items) in enumerate(rows_of(dataset)):
        history, target = split_row(items, split)
        scores = scores_of(model, history)
        ranks.append(sum(scores[n] > scores[target] for n in negatives[row]))
    return ranks


@pytest.mark.parametrize("split", SPLITS)
def test_sampled_metrics_equal_brute_force_over_the_drawn_negatives(
    dataset: Dataset, model: S3Rec, split: Split
) -> None:
    config = EvaluationConfig(protocol="sampled", negatives=9, seed=5, cutoffs=(1, 5), batch_users=4)
    drawn = {
        row: negatives
        for batch in held_out(dataset, split, 100)
        for row, negatives in zip(
            batch.rows.tolist(), draw_negatives(batch.whole, batch.rows, N_ITEMS, 9, 5).tolist(), strict=True
        )
    }
    ranks = naive_sampled(model, dataset, split, drawn)
    result = evaluate(model, dataset, config, split, "cpu")
    assert result.metrics == pytest.approx(naive_metrics(ranks, (1, 5)))
    assert result.protocol == f"{split} item against 9 random items the user never took (seed 5)"
    other = evaluate(model, dataset, replace(config, seed=6), split, "cpu")
    assert other.metrics != result.metrics
    again = evaluate(model, dataset, replace(config, batch_users=1), split, "cpu")
    assert again.metrics == pytest.approx(result.metrics, rel=1e-12)


def test_a_user_with_too_few_items_left_is_named(tmp_path: Path, model: S3Rec) -> None:
    rows = {"few": [1, 2, 3], "many": [*range(1, 29), 1]}
    dataset = prepared(tmp_path, rows | {"rest": [29, 30, 1]})
    message = "user many: has 2 of 30 items left that could be negatives; lower evaluation.negatives=3, or"
    with pytest.raises(EvaluationError, match=message):
        evaluate(model, dataset, EvaluationConfig(protocol="sampled", negatives=3), "test", "cpu")
    evaluate(model, dataset, EvaluationConfig(protocol="sampled", negatives=2), "test", "cpu")


def negatives_of(dataset: Dataset, count: int = 4) -> dict[str, list[int]]:
    """Negatives by user, in another order than the dataset's."""
    rng = np.random.default_rng(8)
    users = [user for user, _ in rows_of(dataset)]
    return {user: rng.choice(np.arange(1, N_ITEMS + 1), count, replace=False).tolist() for user in reversed(users)}


def lines(negatives: dict[str, list[int]]) -> list[str]:
    return [f"{user} {' '.join(map(str, items))}" for user, items in negatives.items()]


@pytest.mark.parametrize("split", SPLITS)
def test_given_negatives_are_ranked_against_whatever_their_order(
    dataset: Dataset, model: S3Rec, tmp_path: Path, split: Split
) -> None:
    negatives = negatives_of(dataset)
    path = tmp_path / "negatives.txt"
    path.write_text("\n\n".join(lines(negatives)))
    by_row = {row: negatives[user] for row, (user, _) in enumerate(rows_of(dataset))}
    config = EvaluationConfig(protocol="sampled", negatives_file=str(path), cutoffs=(1, 3), batch_users=5)
    result = evaluate(model, dataset, config, split, "cpu")
    assert result.metrics == pytest.approx(naive_metrics(naive_sampled(model, dataset, split, by_row), (1, 3)))
    assert result.protocol == f"{split} item against 4 negatives from negatives.txt"


def test_raw_ids_of_negatives_are_mapped_to_item_ids(tmp_path: Path) -> None:
    rows = {"ann": "pear apple fig", "bob": "fig plum apple"}
    (tmp_path / "fruit.txt").write_text("".join(f"{user} {items}\n" for user, items in rows.items()))
    output = str(tmp_path / "dataset")
    prepare(PrepareSettings(source="s3rec", input=str(tmp_path / "fruit.txt"), output=output, attributes="none"))
    dataset = Dataset.open(output)
    (tmp_path / "negatives").write_text("bob pear plum\nann plum fig\n")
    found = GivenNegatives.read(str(tmp_path / "negatives"), dataset)
    ids = dataset.item_ids()
    batch = next(held_out(dataset, "test", 10))
    by_user = dict(zip(batch.histories.users.to_pylist(), found.of(batch).tolist(), strict=True))
    assert by_user == {"bob": [ids["pear"], ids["plum"]], "ann": [ids["plum"], ids["fig"]]}
    assert found.count == 2


def change(line: int, to: str) -> Callable[[list[str]], list[str]]:
    return lambda text: [*text[:line], to, *text[line + 1 :]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(2, "zoe 1 2 3 4"), r"negatives.txt:3: user 'zoe' is not in .*dataset; take the line out"),
        (change(2, "u3 1 2 3 99"), r"negatives.txt:3: item '99' is not in .*dataset; replace it by one that is"),
        (change(2, "u3 1 2 3"), r"negatives.txt:3: 3 negatives, expected 4, as many for each user"),
        (change(2, "u3 1 2 3 4 5"), r"negatives.txt:3: 5 negatives, expected 4, as many for each user"),
        (change(0, "u3"), r"negatives.txt:1: 0 negatives, expected at least 1, as many for each user"),
        (lambda text: [*text, text[0]], r"negatives.txt:23: user '\w+' has a line already; leave one of them"),
        (lambda text: text[:-2], r"negatives.txt: has no line for 2 of 22 users, among them 'u0'; add them, or"),
        (lambda text: [], r"negatives.txt: has no line for 22 of 22 users, among them 'again'; add them, or"),
    ],
)
def test_a_line_of_negatives_that_does_not_fit_is_named(
    dataset: Dataset, tmp_path: Path, edit: Callable[[list[str]], list[str]], message: str
) -> None:
    path = tmp_path / "negatives.txt"
    path.write_text("\n".join(edit(lines(negatives_of(dataset)))))
    with pytest.raises(EvaluationError, match=message):
        GivenNegatives.read(str(path), dataset)


def test_a_file_of_negatives_that_is_missing_or_no_text_is_named(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"nowhere.txt: no such file; expected lines 'user item item"):
        GivenNegatives.read(str(tmp_path / "nowhere.txt"), dataset)
    (tmp_path / "binary").write_bytes(b"u0 \xff\xfe 1\n")
    with pytest.raises(EvaluationError, match="binary: not UTF-8 text"):
        GivenNegatives.read(str(tmp_path / "binary"), dataset)


def test_the_published_negatives_of_lastfm_cover_its_users(published_data: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "lastfm")
    prepare(PrepareSettings(source="s3rec", input=str(published_data / "LastFM.txt"), output=output))
    dataset = Dataset.open(output)
    found = GivenNegatives.read(str(published_data / "LastFM_sample.txt"), dataset)
    assert found.items.shape == (1090, 99)
    for batch in held_out(dataset, "test", 256):
        negatives = found.of(batch)
        assert negatives.shape == (len(batch.targets), 99)
        rows, seen = batch.whole.seen()
        taken = set(zip(rows.tolist(), seen.tolist(), strict=True))
        assert not any((b, item) in taken for b, row in enumerate(negatives.tolist()) for item in row)


# Models that cannot be evaluated


def test_a_model_of_another_catalogue_is_refused(dataset: Dataset) -> None:
    with pytest.raises(EvaluationError, match=r"the model knows 31 items, .*dataset has 30; use the dataset it was"):
        evaluate(make_model(31), dataset, EvaluationConfig(), "test", "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_item_embedding_that_is_not_finite_is_refused_by_id(dataset: Dataset, model: S3Rec, value: float) -> None:
    with torch.no_grad():
        model.item_embedding.weight[7, 2] = value
    with pytest.raises(EvaluationError, match="item 7: its embedding is not finite; the model's training has diverged"):
        evaluate(model, dataset, EvaluationConfig(), "test", "cpu")


@pytest.mark.parametrize("protocol", ["full", "sampled"])
def test_a_users_state_that_is_not_finite_is_refused_by_name(dataset: Dataset, protocol: Any) -> None:
    model = make_model()
    with torch.no_grad():
        model.position_embedding.weight[0] = float("nan")  # of histories of six items and more: the first has 7 - 1
    first = next(user for user, items in rows_of(dataset) if len(items) >= 7)
    with pytest.raises(EvaluationError, match=f"user {first}: the scores are not finite .*the model has diverged"):
        evaluate(model, dataset, EvaluationConfig(protocol=protocol, negatives=5), "test", "cpu")


def test_the_padding_and_mask_rows_do_not_matter(dataset: Dataset, model: S3Rec) -> None:
    expected = evaluate(model, dataset, EvaluationConfig(), "test", "cpu")
    with torch.no_grad():
        model.item_embedding.weight[[0, N_ITEMS + 1]] = float("nan")
    assert evaluate(model, dataset, EvaluationConfig(), "test", "cpu") == expected


# Several processes

WORKER = """
import dataclasses, json, sys
import torch
from s3rec_dist.config import EngineConfig, EvaluationConfig, ModelConfig
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.evaluation import EvaluationError, evaluate
from s3rec_dist.model import S3Rec
from s3rec_dist.training.engine import start

world = start(EngineConfig(device="cpu", threads=1))
dataset = Dataset.open(sys.argv[1])
torch.manual_seed(0)
model = S3Rec(ModelConfig(**json.loads(sys.argv[2])), dataset.n_items, 1)
found = []
for protocol, negatives in (("full", 1), ("sampled", 10), ("sampled", 20)):
    try:
        config = EvaluationConfig(protocol=protocol, negatives=negatives)
        found.append(dataclasses.asdict(evaluate(model, dataset, config, "test", world.device)))
    except EvaluationError as error:
        found.append(str(error))
print("RESULT", json.dumps(found), flush=True)
"""


def test_two_processes_count_each_user_once_and_fail_together(
    dataset: Dataset, model: S3Rec, launch: Callable[..., list[str]]
) -> None:
    """With 20 negatives, only users of one rank's part have too few items left."""
    settings = json.dumps({name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__})
    outputs = launch(2, ["-c", WORKER, dataset.path, settings])
    results = [
        json.loads(next(line for line in text.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))
        for text in outputs
    ]
    assert results[0] == results[1]
    for found, config in zip(
        results[0][:2], [EvaluationConfig(), EvaluationConfig(protocol="sampled", negatives=10)], strict=True
    ):
        alone = evaluate(model, dataset, config, "test", "cpu")
        assert found["users"] == alone.users == 22 and found["protocol"] == alone.protocol
        assert found["metrics"] == pytest.approx(alone.metrics, rel=1e-12)
    crowded = [row for row, (_, items) in enumerate(rows_of(dataset)) if N_ITEMS - len(set(items)) < 20]
    assert crowded and (max(crowded) < 11 or min(crowded) >= 11)
    assert f"user {rows_of(dataset)[crowded[0]][0]}: has " in results[0][2]


# The table


def result(metrics: dict[str, float], protocol: str = "test item among all 30 items") -> EvaluationResult:
    return EvaluationResult(metrics, 1234, protocol)


def test_results_of_one_protocol_share_a_table_and_name_it_once() -> None:
    table = format_table({"S3-Rec": result({"HR@5": 0.5, "MRR": 0.25}), "SASRec": result({"HR@5": 0.125, "MRR": 1.0})})
    assert table.splitlines() == [
        "          HR@5     MRR",
        "S3-Rec  0.5000  0.2500",
        "SASRec  0.1250  1.0000",
        "test item among all 30 items; 1,234 users",
    ]


def test_results_of_several_protocols_refer_to_theirs_and_leave_gaps() -> None:
    results = {"a": result({"HR@5": 0.5}), "b": result({"HR@10": 0.25}, "other"), "c": result({"HR@5": 1.0})}
    table = format_table(results)
    assert table.splitlines() == [
        "         HR@5   HR@10",
        "a [1]  0.5000       -",
        "b [2]       -  0.2500",
        "c [1]  1.0000       -",
        "[1] test item among all 30 items; 1,234 users",
        "[2] other; 1,234 users",
    ]


# s3rec evaluate


@pytest.fixture
def exported(dataset: Dataset, model: S3Rec, tmp_path: Path) -> str:
    folder = str(tmp_path / "model")
    write_model(model, folder, {"stage": "finetune"}, Config(model=MODEL), dataset)
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield


def test_the_command_prints_the_table_and_writes_json(
    dataset: Dataset, model: S3Rec, exported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "metrics.json"
    arguments = ["evaluate", "--model", f"ours={exported}", exported, "--dataset", dataset.path, "--device", "cpu"]
    assert cli.main([*arguments, "--cutoffs", "3", "1", "3", "--json", str(target)]) == 0
    expected = evaluate(model, dataset, EvaluationConfig(cutoffs=(3, 1)), "test", "cpu")
    out, log = capsys.readouterr()
    assert out == format_table({"ours": expected, exported: expected}) + "\n"
    assert "ours: ranked 22 users in" in log
    ours, plain = json.loads(target.read_text())["results"]
    assert (ours["label"], plain["label"], ours["model"], ours["split"]) == ("ours", exported, exported, "test")
    assert ours["metrics"] == plain["metrics"] == pytest.approx(expected.metrics, rel=1e-12)
    assert list(ours["metrics"]) == ["HR@3", "NDCG@3", "HR@1", "NDCG@1", "MRR"]
    assert ours["users"] == 22 and ours["protocol"] == expected.protocol
    assert [path.name for path in target.parent.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    ("options", "config", "split"),
    [
        (["--split", "validation"], EvaluationConfig(), "validation"),
        (["--protocol", "sampled", "--negatives", "7", "--seed", "3"], {"negatives": 7, "seed": 3}, "test"),
        (["--negatives-file", "FILE"], {"negatives_file": "FILE"}, "test"),
        (["--batch-users", "2", "--item-chunk", "5"], EvaluationConfig(batch_users=2, item_chunk=5), "test"),
    ],
)
def test_options_are_the_settings_and_a_file_of_negatives_implies_sampling(
    dataset: Dataset,
    model: S3Rec,
    exported: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    config: Any,
    split: Split,
) -> None:
    path = tmp_path / "negatives.txt"
    path.write_text("\n".join(lines(negatives_of(dataset))))
    options = [str(path) if word == "FILE" else word for word in options]
    if isinstance(config, dict):
        config = EvaluationConfig(protocol="sampled", **{k: str(path) if v == "FILE" else v for k, v in config.items()})
    arguments = ["evaluate", "--model", f"m={exported}", "--dataset", dataset.path, "--device", "cpu"]
    assert cli.main([*arguments, *options]) == 0
    assert capsys.readouterr().out == format_table({"m": evaluate(model, dataset, config, split, "cpu")}) + "\n"


def test_mistakes_on_the_command_line_are_named(
    dataset: Dataset, exported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*options: str, model: str = exported, data: str = dataset.path) -> str:
        assert cli.main(["evaluate", "--model", model, "--dataset", data, "--device", "cpu", *options]) != 0
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    assert "expected positive integers" in fails("--cutoffs", "0")
    assert "negatives_file needs evaluation.protocol=sampled" in fails("--protocol", "full", "--negatives-file", "x")
    assert "no such file" in fails(data=str(tmp_path / "nowhere"))
    assert str(tmp_path / "nothing") in fails(model=str(tmp_path / "nothing"))
    assert cli.main(["evaluate", "--model", exported, exported, "--dataset", dataset.path]) != 0
    assert f"two models are labelled {exported!r}; write LABEL=FOLDER" in capsys.readouterr().err
