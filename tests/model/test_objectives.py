"""The losses are their textbook formulas, values and gradients, however many logits they hold at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from s3rec_dist.data.reconstruct import Popularity, attribute_negatives, in_batch_negatives, shared_negatives
from s3rec_dist.kernels.attribute_loss import attribute_loss
from s3rec_dist.model import objectives
from s3rec_dist.model.objectives import (
    binary_loss,
    pairwise_loss,
    sampled_attribute_loss,
    sampled_softmax_loss,
    softmax_loss,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Relative to the largest value of each result. bf16: logits, and then what they are multiplied by, have 8 bits."""

CHUNKS = (1, 40, 64, 1 << 22)
"""Logits at a time: one, tiles that divide neither the batch nor the classes, or both not quite, everything."""

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Loss, gradient of the hidden states, gradient of the table."""


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    table: torch.Tensor,
    weight: float = 1.0,
) -> Result:
    hidden, table = hidden.detach().requires_grad_(), table.detach().requires_grad_()
    value = loss(hidden, table)
    return value.detach(), *torch.autograd.grad(value * weight, (hidden, table))


def assert_results_equal(found: Result, expected: Result, dtype: torch.dtype) -> None:
    for name, actual, value in zip(("loss", "grad of hidden", "grad of table"), found, expected, strict=True):
        assert actual.dtype == (torch.float32 if name == "loss" else dtype), name
        assert actual.shape == value.shape, name
        scale = float(value.abs().max()) if value.numel() else 0.0
        error = float((actual.double() - value).abs().max()) if value.numel() else 0.0
        assert error <= TOLERANCE[dtype] * scale, f"{name}: off by {error} of {scale}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("rows", [1, 3, 29, 64])
def test_softmax_loss_is_the_cross_entropy_against_every_item(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int, rows: int
) -> None:
    monkeypatch.setattr(objectives, "LOGITS_PER_CHUNK", chunk)
    hidden, table = normal(rows, 16, seed=1, dtype=dtype), normal(13, 16, seed=2, dtype=dtype)
    targets = torch.arange(rows) * 5 % 13
    found = with_gradients(lambda h, t: softmax_loss(h, t, targets), hidden, table, 0.7)
    expected = with_gradients(
        lambda h, t: F.cross_entropy(h @ t.T, targets, reduction="sum"), hidden.double(), table.double(), 0.7
    )
    assert_results_equal(found, expected, dtype)


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(0, 12),
    size=st.integers(1, 9),
    chunk=st.integers(1, 60),
    least=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_the_size_of_a_tile_changes_nothing(rows: int, size: int, chunk: int, least: int, seed: int) -> None:
    hidden, table, targets = normal(rows, 4, seed=seed), normal(size, 4, seed=seed + 1), torch.arange(rows) % size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "LOGITS_PER_CHUNK", chunk)
        patch.setattr(objectives, "LEAST_ROWS", least)
        found = with_gradients(lambda h, t: softmax_loss(h, t, targets), hidden, table)
    expected = with_gradients(lambda h, t: F.cross_entropy(h @ t.T, targets, reduction="sum"), hidden, table)
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that an operator makes; a view makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor) and made._base is None:
                self.numbers = max(self.numbers, made.numel())
        return result


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(300, 2), (2, 300), (90, 110), (40, 1000)])
def test_a_softmax_loss_makes_nothing_larger_than_its_gradients_and_a_chunk(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, classes: int
) -> None:
    monkeypatch.setattr(objectives, "LOGITS_PER_CHUNK", 700)
    monkeypatch.setattr(objectives, "LEAST_ROWS", 10)
    hidden = normal(rows, 3, seed=1, dtype=dtype).requires_grad_()
    table = normal(classes, 3, seed=2, dtype=dtype).requires_grad_()
    with LargestTensor() as largest:
        softmax_loss(hidden, table, torch.arange(rows) % classes).backward()
    assert largest.numbers <= max(700, hidden.numel(), table.numel())


def test_classes_are_taken_by_tiles_only_where_too_few_rows_would_fit_a_chunk() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert objectives._tile(4096, 12_101, cpu) == objectives._tile(4096, 12_101, gpu) == (346, 12_101)
    assert objectives._tile(3, 1_000_000, cpu) == (4, 1_000_000)
    assert objectives._tile(100_000, 1_000_000, gpu) == objectives._tile(10**9, 10**8, gpu) == (2048, 2048)
    assert objectives._tile(10**9, 10**8, cpu) == (512, 512)


def test_a_sum_over_very_many_tiles_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 what a tile adds would be rounded 30,000 times, always alike."""
    monkeypatch.setattr(objectives, "LOGITS_PER_CHUNK", 64)
    hidden, table = torch.ones(2, 1), torch.full((60_000, 1), 9.0)
    loss = float(softmax_loss(hidden, table, torch.zeros(2, dtype=torch.int64)))
    assert loss == pytest.approx(2 * math.log(60_000), rel=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_rows_the_loss_is_zero_and_so_is_the_tables_gradient(dtype: torch.dtype) -> None:
    hidden, table = normal(0, 16, seed=1, dtype=dtype), normal(13, 16, seed=2, dtype=dtype)
    none = torch.zeros(0, dtype=torch.int64)
    value, grad_hidden, grad_table = with_gradients(lambda h, t: softmax_loss(h, t, none), hidden, table)
    assert float(value) == 0 and grad_hidden.shape == (0, 16)
    assert torch.equal(grad_table, torch.zeros_like(table))


@pytest.mark.parametrize("frozen", ["hidden", "table", "both"])
def test_the_loss_is_the_same_where_one_side_or_none_learns(frozen: str) -> None:
    hidden, table, targets = normal(9, 16, seed=1), normal(13, 16, seed=2), torch.arange(9)
    value, grad_hidden, grad_table = with_gradients(lambda h, t: softmax_loss(h, t, targets), hidden, table)
    h = hidden.clone().requires_grad_(frozen == "table")
    t = table.clone().requires_grad_(frozen == "hidden")
    other = softmax_loss(h, t, targets)
    assert torch.equal(other.detach(), value)
    assert other.requires_grad == (frozen != "both")
    if frozen != "both":
        other.backward()
        learns, expected = (h, grad_hidden) if frozen == "table" else (t, grad_table)
        assert learns.grad is not None and torch.equal(learns.grad, expected)


def test_logits_far_from_zero_stay_finite() -> None:
    hidden, table = normal(5, 16, seed=1) * 1e3, normal(13, 16, seed=2)
    for value in with_gradients(lambda h, t: softmax_loss(h, t, torch.arange(5)), hidden, table):
        assert value.isfinite().all()
    for kind in ("original", "bpr"):
        assert pairwise_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]), kind).isfinite()
    assert float(binary_loss(torch.tensor([-1e4]), torch.tensor([1e4]))) == 2e4


# Losses of score pairs


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_pairwise_original_is_the_double_sigmoid_and_bpr_the_single_one(dtype: torch.dtype) -> None:
    positive, negative = normal(50, seed=1, dtype=dtype), normal(50, seed=2, dtype=dtype)
    formulas: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "original": lambda p, n: -(p.sigmoid() - n.sigmoid()).sigmoid().log().sum(),
        "bpr": lambda p, n: -(p - n).sigmoid().log().sum(),
    }
    for kind, formula in formulas.items():
        found = with_gradients(lambda p, n, kind=kind: pairwise_loss(p, n, kind), positive, negative)
        assert_results_equal(found, with_gradients(formula, positive.double(), negative.double()), dtype)


@settings(deadline=None)
@given(positive=st.floats(-1e6, 1e6, width=32), negative=st.floats(-1e6, 1e6, width=32))
def test_a_term_of_the_double_sigmoid_lies_within_313_and_1313(positive: float, negative: float) -> None:
    loss = float(pairwise_loss(torch.tensor([positive]), torch.tensor([negative]), "original"))
    assert math.log1p(math.exp(-1)) - 1e-6 <= loss <= math.log1p(math.exp(1)) + 1e-6


def test_the_double_sigmoid_reaches_its_bounds() -> None:
    far = torch.tensor([100.0])
    assert float(pairwise_loss(far, -far, "original")) == pytest.approx(0.31326, abs=1e-5)
    assert float(pairwise_loss(-far, far, "original")) == pytest.approx(1.31326, abs=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_binary_loss_is_the_cross_entropy_of_both_scores(dtype: torch.dtype) -> None:
    positive, negative = normal(50, seed=1, dtype=dtype), normal(50, seed=2, dtype=dtype)
    found = with_gradients(binary_loss, positive, negative)
    expected = with_gradients(
        lambda p, n: -(p.sigmoid().log() + (1 - n.sigmoid()).log()).sum(), positive.double(), negative.double()
    )
    assert_results_equal(found, expected, dtype)


def test_losses_of_no_pairs_are_zero() -> None:
    none = torch.zeros(0)
    losses = [pairwise_loss(none, none, "original"), pairwise_loss(none, none, "bpr"), binary_loss(none, none)]
    assert [float(loss) for loss in losses] == [0, 0, 0]


# Sampled softmax


def sampled(
    h: torch.Tensor, t: torch.Tensor, targets: torch.Tensor, drawn: torch.Tensor, log_expected: torch.Tensor
) -> torch.Tensor:
    return sampled_softmax_loss(h, t[targets], t[drawn], lambda rows: targets[rows, None] == drawn, log_expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_sampled_softmax_loss_is_its_definition(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(objectives, "LOGITS_PER_CHUNK", chunk)
    hidden, table = normal(29, 16, seed=1, dtype=dtype), normal(13, 16, seed=2, dtype=dtype)
    targets, drawn = torch.arange(29) * 5 % 13, torch.tensor([3, 3, 0, 7, 12])
    log_expected = normal(5, seed=3)

    def definition(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        score = (h * t[targets]).sum(1)
        others = (h @ t[drawn].T - log_expected.double()).exp() * (targets[:, None] != drawn)
        return ((score.exp() + others.sum(1)).log() - score).sum()

    found = with_gradients(lambda h, t: sampled(h, t, targets, drawn, log_expected), hidden, table, 0.7)
    assert_results_equal(found, with_gradients(definition, hidden.double(), table.double(), 0.7), dtype)


def test_every_item_drawn_as_often_as_expected_gives_the_exact_softmax() -> None:
    hidden, table, targets = normal(29, 16, seed=1), normal(13, 16, seed=2), torch.arange(29) * 5 % 13
    drawn = torch.arange(13).repeat(3)
    found = with_gradients(lambda h, t: sampled(h, t, targets, drawn, torch.full((39,), math.log(3))), hidden, table)
    exact = with_gradients(lambda h, t: softmax_loss(h, t, targets), hidden, table)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares", [None, torch.tensor([0.4, 0.0, 0.1, 0.2, 0.3], dtype=torch.float64)])
def test_the_sum_over_the_other_items_is_estimated_without_bias(shares: torch.Tensor | None) -> None:
    """exp(loss) of one position is linear in it; an item that is never drawn has no part."""
    hidden, table, targets = normal(1, 8, seed=1), normal(5, 8, seed=2), torch.tensor([3])
    popularity = None if shares is None else Popularity.of(shares)
    estimates = []
    for key in range(4000):
        shared = shared_negatives(8, 5, key, popularity, "cpu")
        estimates.append(sampled(hidden, table, targets, shared.items - 1, shared.log_expected).exp())
    scores = hidden @ table.T - hidden @ table[targets].T
    if shares is not None:
        scores[0, 1] = -torch.inf
    expected = float(scores.exp().sum())
    error = float(torch.stack(estimates).std()) / 4000**0.5
    assert abs(float(torch.stack(estimates).mean()) - expected) < 4 * error


def test_items_are_drawn_as_often_as_they_are_to_be_and_alike_for_a_key() -> None:
    shares = torch.tensor([0.5, 0.0, 0.125, 0.375], dtype=torch.float64)
    drawn = shared_negatives(80_000, 4, 7, Popularity.of(shares), "cpu")
    frequency = drawn.items.bincount(minlength=5)[1:] / 80_000
    assert torch.allclose(frequency.double(), shares, atol=0.01) and frequency[1] == 0
    assert torch.allclose(drawn.log_expected.exp(), 80_000 * shares[drawn.items - 1].float())
    uniform = shared_negatives(80_000, 4, 7, None, "cpu")
    assert torch.allclose(uniform.items.bincount(minlength=5)[1:] / 80_000, torch.tensor(0.25), atol=0.01)
    assert torch.equal(shared_negatives(80_000, 4, 7, None, "cpu").items, uniform.items)
    assert not torch.equal(shared_negatives(80_000, 4, 8, None, "cpu").items, uniform.items)


def test_in_batch_negatives_are_targets_of_the_batch_however_they_lie_on_ranks() -> None:
    shares = torch.tensor([0.5, 0.1, 0.1, 0.3], dtype=torch.float64)
    targets = torch.tensor([4, 1, 1, 3], dtype=torch.int32)
    drawn = in_batch_negatives(80_000, targets, 7, shares)
    frequency = drawn.items.bincount(minlength=5)[1:] / 80_000
    assert torch.allclose(frequency, torch.tensor([0.5, 0.0, 0.25, 0.25]), atol=0.01)
    assert torch.allclose(drawn.log_expected.exp(), 80_000 * shares[drawn.items - 1].float())
    other = in_batch_negatives(80_000, torch.tensor([0, 1, 4, 0, 0, 3, 1]), 7, shares)
    assert torch.equal(drawn.items, other.items)
    assert not torch.equal(drawn.items, in_batch_negatives(80_000, targets, 8, shares).items)
    for none in (targets[:0], torch.zeros(5, dtype=torch.int32)):
        nothing = in_batch_negatives(3, none, 7, shares)
        assert nothing.items.tolist() == [1, 1, 1] and nothing.log_expected.isfinite().all()


def test_the_loss_against_the_targets_of_large_batches_comes_near_the_exact_one() -> None:
    """Batches are drawn by popularity here, as sequences taken at random have their items."""
    shares = torch.tensor([0.4, 0.05, 0.15, 0.2, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    hidden, table, targets = normal(6, 8, seed=1), normal(5, 8, seed=2), torch.arange(6) % 5
    exact = with_gradients(lambda h, t: softmax_loss(h, t, targets), hidden, table)
    batch = shares.multinomial(40_000, replacement=True, generator=generator) + 1
    shared = in_batch_negatives(40_000, batch, 5, shares)
    found = with_gradients(lambda h, t: sampled(h, t, targets, shared.items - 1, shared.log_expected), hidden, table)
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=0.01)
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


# Sampled attribute losses

ATTRIBUTES = 11
LISTS = [[], [0, 3, 10], [4], [], [1, 2, 3, 4, 5, 6, 7, 8, 9], [10], []]
"""The attributes of seven rows."""


def positives() -> tuple[torch.Tensor, torch.Tensor]:
    rows = [row for row, found in enumerate(LISTS) for _ in found]
    return torch.tensor(rows), torch.tensor([attribute for found in LISTS for attribute in found])


def all_attributes(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    offsets = torch.tensor([0, *(len(found) for found in LISTS)]).cumsum(0)
    return attribute_loss(h, t, torch.arange(len(LISTS)), offsets, positives()[1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", [1, 13, 1 << 22])
@pytest.mark.parametrize("drawn", [[4], [3, 3, 0, 9, 3, 10], [5, 1, 2, 2]])
def test_sampled_attribute_loss_is_its_definition(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int, drawn: list[int]
) -> None:
    monkeypatch.setattr(objectives, "LOGITS_PER_CHUNK", chunk)
    hidden, table = normal(7, 16, seed=1, dtype=dtype), normal(ATTRIBUTES, 16, seed=2, dtype=dtype)
    negatives = torch.tensor(drawn)

    def definition(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        is_positive = torch.zeros(7, ATTRIBUTES, dtype=torch.bool).index_put_(positives(), torch.tensor(True))
        own = F.softplus(-(h @ t.T))[is_positive].sum()
        return own + 2.5 * (F.softplus(h @ t[negatives].T) * ~is_positive[:, negatives]).sum()

    found = with_gradients(lambda h, t: sampled_attribute_loss(h, t, *positives(), negatives, 2.5), hidden, table, 0.7)
    assert_results_equal(found, with_gradients(definition, hidden.double(), table.double(), 0.7), dtype)


@pytest.mark.parametrize("times", [1, 3])
def test_every_attribute_drawn_as_often_as_expected_gives_the_loss_against_all(times: int) -> None:
    hidden, table = normal(7, 16, seed=1), normal(ATTRIBUTES, 16, seed=2)
    drawn = torch.arange(ATTRIBUTES).repeat(times)
    found = with_gradients(lambda h, t: sampled_attribute_loss(h, t, *positives(), drawn, 1 / times), hidden, table)
    for ours, theirs in zip(found, with_gradients(all_attributes, hidden, table), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_attribute_loss_and_its_gradients_are_estimated_without_bias() -> None:
    hidden, table, draws = normal(7, 4, seed=1), normal(ATTRIBUTES, 4, seed=2), 3000
    estimates = []
    for key in range(draws):
        drawn = attribute_negatives(3, ATTRIBUTES - 1, key, "cpu")
        found = with_gradients(
            lambda h, t, drawn=drawn: sampled_attribute_loss(h, t, *positives(), drawn, ATTRIBUTES / 3), hidden, table
        )
        estimates.append(torch.cat([result.flatten() for result in found]))
    exact = torch.cat([result.flatten() for result in with_gradients(all_attributes, hidden, table)])
    error = torch.stack(estimates).std(0) / draws**0.5
    assert bool(((torch.stack(estimates).mean(0) - exact).abs() < 4.5 * error + 1e-5).all())


def test_attributes_are_drawn_alike_with_the_unused_one_among_them() -> None:
    drawn = attribute_negatives(80_000, 3, 7, "cpu")
    assert torch.allclose(drawn.bincount() / 80_000, torch.full((4,), 0.25), atol=0.01)
    assert not torch.equal(drawn, attribute_negatives(80_000, 3, 8, "cpu"))


def test_only_the_attributes_that_are_spoken_of_need_be_in_the_table() -> None:
    hidden, table, drawn = normal(7, 16, seed=1), normal(1000, 16, seed=2), torch.tensor([7, 900, 900, 4, 3])
    rows, attributes = positives()
    whole = with_gradients(lambda h, t: sampled_attribute_loss(h, t, rows, attributes, drawn, 9.0), hidden, table)
    spoken_of, local = torch.cat((attributes, drawn)).unique(return_inverse=True)
    own, others = local.split([len(attributes), len(drawn)])
    found = with_gradients(lambda h, t: sampled_attribute_loss(h, t, rows, own, others, 9.0), hidden, table[spoken_of])
    for ours, theirs in zip(found, (*whole[:2], whole[2][spoken_of]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_sampled_attribute_loss_of_no_rows_and_of_rows_without_attributes() -> None:
    none, table, drawn = torch.zeros(0, dtype=torch.int64), normal(5, 16, seed=2), torch.tensor([1, 4])
    value, grad_hidden, grad_table = with_gradients(
        lambda h, t: sampled_attribute_loss(h, t, none, none, drawn, 2.5), normal(0, 16, seed=1), table
    )
    assert float(value) == 0 and grad_hidden.shape == (0, 16) and not grad_table.any()
    hidden = normal(3, 16, seed=1)
    expected = 2.5 * F.softplus(hidden @ table[drawn].T).sum()
    torch.testing.assert_close(sampled_attribute_loss(hidden, table, none, none, drawn, 2.5), expected)


def test_the_sampled_attribute_loss_makes_nothing_larger_than_its_gradients_and_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objectives, "LOGITS_PER_CHUNK", 500)
    hidden, table = normal(400, 4, seed=1).requires_grad_(), normal(300, 4, seed=2).requires_grad_()
    rows, attributes = torch.arange(400).repeat_interleave(3), torch.arange(1200) % 300
    with LargestTensor() as largest:
        sampled_attribute_loss(hidden, table, rows, attributes, torch.arange(50), 6.0).backward()
    assert largest.numbers <= max(hidden.numel(), len(rows))
