"""Every backend computes the one definition: outputs, gradients and dropout bits, whatever the lengths and layouts.

Inputs and the output's gradient are standard normal; errors are absolute, or relative to the largest expected value
where that is above 1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.hashing import hash64, keep_mask
from s3rec_dist.kernels.masked_attention import BACKENDS, choose_backend, masked_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}
"""fp32: a few roundings of sums of up to 300 terms. bf16: scores, probabilities and their gradients are each rounded
to 8 bits (2^-9 relative), where the reference rounds only its inputs and results."""

ODD_LENGTHS = (1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 33, 47, 59, 60, 1)
LONG = (300, 1, 299, 40)
FAST = tuple(backend for backend in BACKENDS if backend != "reference")


@dataclass(frozen=True)
class Case:
    """One call of masked_attention, with inputs that are a function of the case."""

    lengths: tuple[int, ...]
    queries: tuple[int, ...] | None = None
    """Queries of each sequence, its last ones; None is all of them."""
    causal: bool = False
    p: float = 0.0
    heads: int = 2
    d: int = 32
    dtype: torch.dtype = torch.float32
    layout: str = "separate"
    device: str = "cpu"

    def tensors(self) -> list[torch.Tensor]:
        """q, k, v and the output's gradient, the same values in every layout."""
        generator = torch.Generator().manual_seed(1)
        count = sum(self.lengths if self.queries is None else self.queries)
        rows = (count, sum(self.lengths), sum(self.lengths), count)
        return [
            torch.randn(n, self.heads, self.d, generator=generator).to(self.device, self.dtype, non_blocking=True)
            for n in rows
        ]

    def keys(self) -> torch.Tensor:
        return hash64(torch.arange(len(self.lengths)), 99).to(self.device)

    def attend(self, backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return masked_attention(
            q,
            k,
            v,
            cu_seqlens(self.lengths).to(self.device),
            max(self.lengths, default=0),
            causal=self.causal,
            cu_seqlens_q=None if self.queries is None else cu_seqlens(self.queries).to(self.device),
            dropout_p=self.p,
            dropout_keys=self.keys() if self.p else None,
            backend=backend,
        )

    def results(self, backend: str) -> dict[str, torch.Tensor]:
        """The output and the gradients of q, k and v."""
        q, k, v, grad = self.tensors()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if self.layout == "one qkv projection":
            base = torch.cat([q, k, v], 1).detach().requires_grad_()
            views = base.view(len(base), 3, self.heads, self.d).unbind(1)
            leaves = [base]
        elif self.layout == "heads first":
            views = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
        elif self.layout == "features first":
            views = tuple(x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v))
        else:
            views = (q, k, v)
        out = self.attend(backend, *views)
        grads = torch.autograd.grad(out, leaves, grad)
        if len(grads) == 1:
            grads = grads[0].view(-1, 3, self.heads, self.d).unbind(1)
        return {"output": out.detach()} | dict(zip(("grad of q", "grad of k", "grad of v"), grads, strict=True))


def cu_seqlens(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def parts(x: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """``x`` [T, ...] by sequence."""
    return x.split(list(lengths))


def last(count: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(count, length) for length in lengths)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    assert actual.shape == expected.shape, what
    expected = expected.detach().to(actual.device, torch.float64)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}"
    )


def assert_backend_equals_the_reference(case: Case, backend: str) -> None:
    expected = replace(case, layout="separate", device="cpu").results("reference")
    for name, value in case.results(backend).items():
        assert value.dtype == case.dtype
        assert_close(value, expected[name], TOLERANCE[case.dtype], f"{name} of {case}")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [None, 1, 4])
@pytest.mark.parametrize(("heads", "d"), [(1, 64), (2, 32), (4, 16)])
def test_outputs_gradients_and_dropout_bits_equal_the_references(
    backend: str, dtype: torch.dtype, p: float, causal: bool, queries: int | None, heads: int, d: int
) -> None:
    subset = None if queries is None else last(queries, ODD_LENGTHS)
    assert_backend_equals_the_reference(Case(ODD_LENGTHS, subset, causal, p, heads, d, dtype), backend)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = tuple(draw(st.lists(st.integers(1, 60), max_size=10)))
    some = st.tuples(*(st.integers(1, length) for length in lengths))
    return Case(
        lengths,
        queries=draw(st.none() | some),
        causal=draw(st.booleans()),
        p=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9])),
        heads=draw(st.sampled_from([1, 2, 4])),
        d=draw(st.sampled_from([16, 32, 64])),
        layout=draw(st.sampled_from(["separate", "heads first", "features first"])),
    )


@pytest.mark.parametrize("backend", FAST)
@settings(deadline=None, max_examples=100)
@given(case=cases())
def test_any_lengths_query_counts_and_layouts_equal_the_reference(backend: str, case: Case) -> None:
    assert_backend_equals_the_reference(case, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_far_longer_than_the_others_equals_the_reference(
    backend: str, dtype: torch.dtype, p: float, causal: bool
) -> None:
    assert_backend_equals_the_reference(Case(LONG, None, causal, p, dtype=dtype), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [None, 1, 4])
def test_without_gradients_the_output_is_the_same(
    backend: str, dtype: torch.dtype, causal: bool, queries: int | None
) -> None:
    lengths = ODD_LENGTHS + LONG
    case = Case(lengths, None if queries is None else last(queries, lengths), causal, dtype=dtype)
    q, k, v, _ = case.tensors()
    with torch.no_grad():
        assert_close(case.attend(backend, q, k, v), case.attend("reference", q, k, v), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("layout", ["one qkv projection", "heads first", "features first"])
def test_strides_do_not_change_a_bit(backend: str, heads: int, layout: str) -> None:
    case = Case(ODD_LENGTHS, causal=True, p=0.5, heads=heads)
    expected = case.results(backend)
    for name, value in replace(case, layout=layout).results(backend).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("count", [None, 3])
def test_each_sequence_equals_pytorchs_attention_in_double_precision(
    backend: str, causal: bool, count: int | None
) -> None:
    queries = last(count or 60, ODD_LENGTHS)
    case = Case(ODD_LENGTHS, queries if count else None, causal)
    found = case.results(backend)
    q, k, v, grad = (x.double() for x in case.tensors())
    for b, (query, key, value, grad_out) in enumerate(
        zip(parts(q, queries), parts(k, ODD_LENGTHS), parts(v, ODD_LENGTHS), parts(grad, queries), strict=True)
    ):
        leaves = [x.detach().transpose(0, 1).requires_grad_() for x in (query, key, value)]
        size = len(key)
        allowed = torch.ones(size, size, dtype=torch.bool)
        allowed = (allowed.tril() if causal else allowed)[size - len(query) :]
        out = F.scaled_dot_product_attention(*leaves, attn_mask=allowed)
        grads = torch.autograd.grad(out, leaves, grad_out.transpose(0, 1))
        for (name, actual), expected in zip(found.items(), (out, *grads), strict=True):
            own = parts(actual, queries if name in ("output", "grad of q") else ODD_LENGTHS)[b]
            assert_close(own.transpose(0, 1), expected, TOLERANCE[torch.float32], f"{name} of sequence {b}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("count", [None, 2])
def test_gradients_are_those_of_finite_differences(backend: str, p: float, count: int | None) -> None:
    """In float64 around a softmax in fp32, whose rounding sets step and tolerance."""
    lengths = (1, 4, 3, 6)
    case = Case(lengths, last(count, lengths) if count else None, True, p, 2, 4)
    inputs = [x.double().requires_grad_() for x in case.tensors()[:3]]
    assert torch.autograd.gradcheck(
        lambda q, k, v: case.attend(backend, q, k, v), inputs, eps=1e-2, atol=2e-3, rtol=2e-3
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_multiplies_the_scores(backend: str) -> None:
    case = Case(ODD_LENGTHS)
    q, k, v, _ = case.tensors()

    def attend(q: torch.Tensor, scale: float | None) -> torch.Tensor:
        return masked_attention(q, k, v, cu_seqlens(ODD_LENGTHS), 60, causal=False, scale=scale, backend=backend)

    assert torch.equal(attend(q, None), attend(q, 32**-0.5))
    assert_close(attend(q, 0.25), attend(q * 0.5, 0.5), TOLERANCE[torch.float32])
    assert not torch.allclose(attend(q, 0.25), attend(q, None), atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scores_far_apart_do_not_overflow(backend: str, dtype: torch.dtype) -> None:
    case = Case(ODD_LENGTHS, causal=True, dtype=dtype)
    q, k, v, _ = case.tensors()
    out = case.attend(backend, (q * 1e3).requires_grad_(), k * 1e3, v)
    out.sum().backward()
    assert out.isfinite().all()
    if dtype == torch.float32:  # in bf16 the largest of such scores is decided by rounding
        assert_close(out, case.attend("reference", q * 1e3, k * 1e3, v), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [None, ()])
def test_without_sequences_output_and_gradients_are_empty(backend: str, queries: tuple[int, ...] | None) -> None:
    for p in (0.0, 0.5):
        for name, value in Case((), queries, p=p).results(backend).items():
            assert value.shape == (0, 2, 32), name


# Sequences do not see each other


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("poison", [3.0, float("nan")])
def test_what_one_sequence_holds_changes_nothing_in_the_others(
    backend: str, p: float, causal: bool, poison: float
) -> None:
    lengths = (7, 8, 7, 1, 6, 30)
    case = Case(lengths, causal=causal, p=p)
    before = case.results(backend)
    for b in range(len(lengths)):
        tensors = case.tensors()
        for x in tensors:
            parts(x, lengths)[b].mul_(poison)
        leaves = [x.requires_grad_() for x in tensors[:3]]
        out = case.attend(backend, *leaves)
        after = [out, *torch.autograd.grad(out, leaves, tensors[3])]
        for (name, old), new in zip(before.items(), after, strict=True):
            same = [torch.equal(x, y) for x, y in zip(parts(old, lengths), parts(new, lengths), strict=True)]
            # the softmax of a single score is constant: that sequence has no gradient in q and k to change
            constant = lengths[b] == 1 and poison == 3 and name in ("grad of q", "grad of k")
            assert same == [i != b or constant for i in range(len(lengths))], f"{name}, sequence {b} changed"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_sequence_alone_gives_what_it_gives_among_others(backend: str, p: float) -> None:
    case = Case(ODD_LENGTHS, causal=True, p=p)
    together = case.attend(backend, *case.tensors()[:3])
    for b, (own, *qkv) in enumerate(
        zip(parts(together, ODD_LENGTHS), *(parts(x, ODD_LENGTHS) for x in case.tensors()[:3]), strict=True)
    ):
        alone = masked_attention(
            *qkv,
            cu_seqlens(ODD_LENGTHS[b : b + 1]),
            ODD_LENGTHS[b],
            causal=True,
            dropout_p=p,
            dropout_keys=case.keys()[b : b + 1],
            backend=backend,
        )
        assert_close(alone, own, TOLERANCE[torch.float32], f"sequence {b}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_causal_token_sees_nothing_that_follows(backend: str) -> None:
    lengths = (12, 9)
    case = Case(lengths, causal=True)
    q, k, v, _ = case.tensors()
    before = case.attend(backend, q, k, v)
    for x in (q, k, v):
        x[5] += 1
    changed = (case.attend(backend, q, k, v) != before).flatten(1).any(1)
    assert changed.tolist() == [5 <= i < 12 for i in range(21)]


# Dropout


def dropout_weights(backend: str, case: Case) -> list[torch.Tensor]:
    """What each sequence's probabilities are multiplied by, [H, Lq, L]: all scores are equal, and the values single
    out each key."""
    q, k, v, _ = (torch.zeros_like(x) for x in case.tensors())
    for own in parts(v, case.lengths):
        own += torch.eye(case.d)[: len(own), None]
    out = case.attend(backend, q, k, v)
    queries = case.lengths if case.queries is None else case.queries
    return [
        (own.transpose(0, 1) * length)[:, :, :length]
        for own, length in zip(parts(out, queries), case.lengths, strict=True)
    ]


SQUARE = (64,) * 24
"""24 sequences x 4 heads x 64 x 64 probabilities: 393,216 bits."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_preserves_the_mean(backend: str, p: float) -> None:
    weights = torch.stack(dropout_weights(backend, Case(SQUARE, p=p, heads=4, d=64)))
    kept = weights != 0
    assert torch.allclose(weights[kept], torch.tensor(1 / (1 - p)), rtol=1e-3)
    deviation = (p * (1 - p)) ** 0.5
    for axes in [(0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]:  # over all; each sequence, head, query, key
        error = (kept.double().mean(axes) - (1 - p)).abs().max()
        assert error < 5 * deviation / (kept.numel() / kept.double().mean(axes).numel()) ** 0.5
    assert abs(float(weights.double().mean()) - 1) < 5 * deviation / (1 - p) / kept.numel() ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_bits_are_unrelated_between_sequences_heads_queries_and_keys(backend: str) -> None:
    kept = torch.stack(dropout_weights(backend, Case(SQUARE, p=0.5, heads=4, d=64))) != 0
    for axis in range(4):
        for distance in (1, 2, 3):
            here, there = kept.narrow(axis, 0, kept.shape[axis] - distance), kept.roll(-distance, axis)
            agreement = (here == there.narrow(axis, 0, here.shape[axis])).double().mean()
            assert abs(float(agreement) - 0.5) < 5 * 0.5 / here.numel() ** 0.5, f"axis {axis}, {distance} apart"


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_bits_are_the_documented_hash_of_key_head_query_and_key_position(backend: str) -> None:
    case = Case((5, 9, 1, 60), p=0.5, heads=4, d=64)
    for weights, key in zip(dropout_weights(backend, case), case.keys(), strict=True):
        for h, i in itertools.product(range(4), range(weights.shape[1])):
            row = hash64(key[None], i + (h << 32))
            assert torch.equal(weights[h, i] != 0, keep_mask(row, weights.shape[2], 0, 0.5)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_of_the_last_few_tokens_give_the_rows_of_the_full_call(backend: str, causal: bool) -> None:
    """With dropout: its bits belong to a query's position, not to its place among the queries."""
    lengths = (1, 9, 12, 60, 33, 12)
    counts = (1, 9, 3, 1, 20, 5)
    full = Case(lengths, causal=causal, p=0.5)
    q, k, v, _ = full.tensors()
    wanted = torch.cat([own[len(own) - n :] for own, n in zip(parts(q, lengths), counts, strict=True)])
    expected = torch.cat(
        [own[len(own) - n :] for own, n in zip(parts(full.attend(backend, q, k, v), lengths), counts, strict=True)]
    )
    assert_close(replace(full, queries=counts).attend(backend, wanted, k, v), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_keys_drop_other_probabilities_and_the_same_ones_repeat(backend: str) -> None:
    case = Case(ODD_LENGTHS, p=0.5)
    q, k, v, _ = case.tensors()

    def attend(keys: torch.Tensor) -> torch.Tensor:
        return masked_attention(
            q, k, v, cu_seqlens(ODD_LENGTHS), 60, causal=False, dropout_p=0.5, dropout_keys=keys, backend=backend
        )

    assert torch.equal(attend(case.keys()), attend(case.keys()))
    assert not torch.equal(attend(case.keys()), attend(case.keys() + 1))


# What is refused


def call(**changes: object) -> torch.Tensor:
    """A call that is right but for ``changes``: sequences of 3 and 5 tokens."""
    x = torch.randn(8, 2, 16)
    arguments = {"q": x, "k": x, "v": x, "cu_seqlens": cu_seqlens((3, 5)), "max_seqlen": 5, "causal": False}
    return masked_attention(**{**arguments, **changes})  # type: ignore[arg-type]


def test_the_call_that_the_refused_ones_change_is_right() -> None:
    assert call().shape == (8, 2, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(8, 32)}, r"expected q \[Q, H, D\], k and v \[T, H, D\]; got \[8, 32\]"),
        ({"k": torch.zeros(8, 4, 16)}, r"expected q .*; got \[8, 2, 16\], \[8, 4, 16\], \[8, 2, 16\]"),
        ({"v": torch.zeros(7, 2, 16)}, r"expected q .*; got \[8, 2, 16\], \[8, 2, 16\], \[7, 2, 16\]"),
        ({"q": torch.zeros(2, 2, 16)}, r"q has 2 rows, k has 8; give cu_seqlens_q"),
        ({"q": torch.zeros(2, 2, 16), "cu_seqlens_q": cu_seqlens((2,))}, r"cu_seqlens_q is \[2\], cu_seqlens is \[3\]"),
        ({"dropout_p": 1.0}, r"dropout_p=1.0: expected a probability from 0 to below 1"),
        ({"dropout_p": -0.1}, r"dropout_p=-0.1: expected a probability"),
        ({"dropout_p": 0.5}, r"dropout_p needs dropout_keys, int64 \[B\]"),
        ({"dropout_p": 0.5, "dropout_keys": torch.arange(3)}, r"dropout_p needs dropout_keys, int64 \[B\]"),
        ({"backend": "flash"}, r"backend='flash': expected auto, reference, sdpa"),
        ({"cu_seqlens": cu_seqlens((3, 4))}, r"cu_seqlens .* from 0 to 7, .* expected from 0 to 8"),
        ({"cu_seqlens": cu_seqlens((3, 5, 0))}, r"cu_seqlens .* lengths 0 to 5; expected from 1 to 5"),
        ({"max_seqlen": 4}, r"cu_seqlens .* lengths 3 to 5; expected from 1 to 4"),
        ({"q": torch.zeros(1, 2, 16), "cu_seqlens_q": cu_seqlens((0, 1))}, r"cu_seqlens_q .* lengths 0 to 1; expected"),
        ({"q": torch.zeros(9, 2, 16), "cu_seqlens_q": cu_seqlens((4, 5))}, r"more queries than tokens"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_what_was_expected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_auto_is_a_fast_backend() -> None:
    assert choose_backend() in FAST
    x = torch.randn(8, 2, 16)
    assert torch.equal(call(q=x, k=x, v=x), call(q=x, k=x, v=x, backend=choose_backend()))


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [None, 1, 4])
def test_cuda_equals_the_reference_on_the_cpu(
    backend: str, dtype: torch.dtype, p: float, causal: bool, queries: int | None
) -> None:
    subset = None if queries is None else last(queries, ODD_LENGTHS)
    assert_backend_equals_the_reference(Case(ODD_LENGTHS, subset, causal, p, dtype=dtype, device="cuda"), backend)
