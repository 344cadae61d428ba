"""The losses are their textbook formulas, values and gradients, however many logits they hold at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.model import objectives
from s3rec_dist.model.objectives import binary_loss, pairwise_loss, softmax_loss

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Relative to the largest value of each result. bf16: logits, and then what they are multiplied by, have 8 bits."""

CHUNKS = (1, 40, 64, 1 << 22)
"""Logits at a time: fewer than a row, rows that do not divide the batch, one or two rows, everything."""

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
@pytest.mark.parametrize("rows", [1, 3, 29])
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


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 12),
    size=st.integers(1, 9),
    chunk=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_the_size_of_a_chunk_changes_nothing(rows: int, size: int, chunk: int, seed: int) -> None:
    hidden, table, targets = normal(rows, 4, seed=seed), normal(size, 4, seed=seed + 1), torch.arange(rows) % size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "LOGITS_PER_CHUNK", chunk)
        found = with_gradients(lambda h, t: softmax_loss(h, t, targets), hidden, table)
    expected = with_gradients(lambda h, t: F.cross_entropy(h @ t.T, targets, reduction="sum"), hidden, table)
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)


def test_no_more_logits_than_a_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "LOGITS_PER_CHUNK", 50)
    largest = 0
    product = torch.Tensor.__matmul__

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        result = product(a, b)
        if result.shape[1] == 20:  # a table of 20 rows: logits; its gradient has 16 columns
            largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    hidden, table = normal(30, 16, seed=1).requires_grad_(), normal(20, 16, seed=2).requires_grad_()
    softmax_loss(hidden, table, torch.zeros(30, dtype=torch.int64)).backward()
    assert 20 <= largest <= 50


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
