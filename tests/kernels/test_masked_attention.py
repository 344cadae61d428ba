"""Every backend computes the one definition: outputs, gradients and dropout bits, whatever the lengths and layouts.

Inputs and the output's gradient are standard normal; errors are absolute, or relative to the largest expected value
where that is above 1.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_case import Case, assert_close, cu_seqlens, last, parts
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.hashing import hash64, keep_mask
from s3rec_dist.kernels.backends import BACKENDS
from s3rec_dist.kernels.masked_attention import masked_attention, sdpa

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}
"""fp32: a few roundings of sums of up to 300 terms. bf16: scores, probabilities and their gradients are each rounded
to 8 bits (2^-9 relative), where the reference rounds only its inputs and results."""

ODD_LENGTHS = (1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 33, 47, 59, 60, 1)
LONG = (300, 1, 299, 40)
FAST = tuple(backend for backend in BACKENDS if backend != "reference")


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
    lengths = tuple(draw(st.lists(st.integers(0, 60), max_size=10)))
    some = st.tuples(*(st.integers(min(1, length), length) for length in lengths))
    return Case(
        lengths,
        queries=draw(st.none() | some),
        causal=draw(st.booleans() | st.tuples(*(st.booleans() for _ in lengths))),
        p=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9])),
        heads=draw(st.sampled_from([1, 2, 4])),
        d=draw(st.sampled_from([16, 32, 64])),
        layout=draw(st.sampled_from(["separate", "heads first", "features first"])),
        invalid=draw(st.sampled_from(["none", "some", "all"])),
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [None, 2])
def test_each_sequence_may_be_causal_or_not(backend: str, queries: int | None) -> None:
    each = tuple(i % 3 == 0 for i in range(len(ODD_LENGTHS)))
    counts = last(queries or 60, ODD_LENGTHS)
    case = Case(ODD_LENGTHS, counts if queries else None, each, 0.5)
    mixed = case.results(backend)
    for is_causal in (True, False):
        for name, value in replace(case, causal=is_causal).results(backend).items():
            sizes = counts if name in ("output", "grad of q") else ODD_LENGTHS
            for own, alone, chosen in zip(parts(mixed[name], sizes), parts(value, sizes), each, strict=True):
                if chosen == is_causal:
                    assert_close(own, alone, TOLERANCE[torch.float32], name)


# Masked keys and empty sequences


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_are_not_valid_might_as_well_not_be_there(backend: str, p: float, causal: bool) -> None:
    """In the dropout bits and in ``causal`` a key keeps its position, so this holds of the last query's keys."""
    case = Case((6, 4), queries=(1, 1), causal=causal, p=0.0, invalid="some")
    valid = case.key_valid()
    assert valid is not None
    valid[6:] = torch.tensor([True, False, False, True])
    q, k, v, _ = replace(case, invalid="none").tensors()
    out = masked_attention(
        q, k, v, cu_seqlens((6, 4)), 6, causal=causal, cu_seqlens_q=cu_seqlens((1, 1)), key_valid=valid, backend=backend
    )
    left = (int(valid[:6].sum()), 2)
    expected = masked_attention(
        q, k[valid], v[valid], cu_seqlens(left), 6, causal=causal, cu_seqlens_q=cu_seqlens((1, 1)), backend=backend
    )
    assert_close(out, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_without_a_valid_key_gives_zeros_and_no_gradient_and_masked_keys_get_none(
    backend: str, causal: bool
) -> None:
    case = Case((5, 3, 7), causal=causal, p=0.5, invalid="some")
    valid = case.key_valid()
    assert valid is not None and not valid[5:8].any() and valid.any()
    results = case.results(backend)
    for name, value in results.items():
        assert value.isfinite().all(), name
        assert not value[5:8].any(), name
    assert not results["grad of k"][~valid].any() and not results["grad of v"][~valid].any()
    q, k, v, _ = case.tensors()
    with torch.no_grad():
        assert not replace(case, p=0.0).attend(backend, q, k, v)[5:8].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("invalid", ["none", "some"])
def test_empty_sequences_change_nothing(backend: str, p: float, invalid: str) -> None:
    """But the names of the others: dropout goes by each one's key."""
    full = Case((4, 1, 9), p=p, invalid=invalid, causal=(True, False, True))
    sparse = replace(full, lengths=(0, 4, 0, 0, 1, 9, 0), causal=(False, True, True, False, False, True, True))
    q, k, v, grad = full.tensors()
    results = []
    for lengths, keys, causal in (
        (full.lengths, full.keys(), full.causal),
        (sparse.lengths, sparse.keys().scatter(0, torch.tensor([1, 4, 5]), full.keys()), sparse.causal),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = masked_attention(
            *leaves,
            cu_seqlens(lengths),
            9,
            causal=torch.tensor(causal),
            key_valid=full.key_valid(),
            dropout_p=p,
            dropout_keys=keys,
            backend=backend,
        )
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_empty_sequences_give_nothing(backend: str) -> None:
    for name, value in Case((0, 0), p=0.5).results(backend).items():
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
        ({"backend": "flash"}, r"backend='flash': expected auto, reference, sdpa, triton"),
        ({"cu_seqlens": cu_seqlens((3, 4))}, r"cu_seqlens .* from 0 to 7, .* expected from 0 to 8"),
        ({"cu_seqlens": cu_seqlens((3, 6, -1))}, r"cu_seqlens .* lengths -1 to 6; expected from 0 to 5"),
        ({"max_seqlen": 4}, r"cu_seqlens .* lengths 3 to 5; expected from 0 to 4"),
        ({"q": torch.zeros(1, 2, 16), "cu_seqlens_q": cu_seqlens((0, 1))}, r"tokens and no query; expected at least"),
        ({"causal": torch.ones(3, dtype=torch.bool)}, r"causal is torch.bool \[3\]; expected bool \[2\], .* sequence"),
        ({"causal": torch.ones(2)}, r"causal is torch.float32 \[2\]; expected bool \[2\]"),
        ({"key_valid": torch.ones(2, dtype=torch.bool)}, r"key_valid is .* \[2\]; expected bool \[8\], .* each key"),
        ({"q": torch.zeros(9, 2, 16), "cu_seqlens_q": cu_seqlens((4, 5))}, r"more queries than tokens"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_what_was_expected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


# The length buckets of sdpa


@pytest.mark.parametrize("padding", [0, 1000, 1 << 40])
@pytest.mark.parametrize("queries", [None, 1])
def test_bucket_widths_change_no_result(monkeypatch: pytest.MonkeyPatch, padding: int, queries: int | None) -> None:
    monkeypatch.setattr(sdpa, "PADDING_PER_BUCKET", padding)
    subset = None if queries is None else last(queries, ODD_LENGTHS)
    assert_backend_equals_the_reference(Case(ODD_LENGTHS, subset, False, 0.5), "sdpa")


@given(st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=60), st.integers(1, 8))
def test_a_bucket_pads_no_more_than_another_one_costs_and_as_much_as_it_may(
    drawn: list[tuple[int, bool]], heads: int
) -> None:
    kinds = sorted((many and length > 1, length) for length, many in drawn)
    cuts = sdpa._cuts(torch.tensor([length + (many << 32) for many, length in kinds], dtype=torch.int64), heads)
    assert cuts[0] == 0 and cuts[-1] == len(kinds)

    def padding(bucket: list[tuple[bool, int]]) -> int:
        many, width = bucket[-1]
        return sum(heads * (width - n) * ((width if many else 1) + sdpa.SCORES_PER_ROW) for _, n in bucket)

    for first, end in itertools.pairwise(cuts):
        bucket = kinds[first:end]
        assert bucket[0][0] == bucket[-1][0] and padding(bucket) <= sdpa.PADDING_PER_BUCKET
        if first and kinds[first - 1][0] == bucket[0][0]:
            shorter = [kind for kind in kinds[:first] if kind == kinds[first - 1]]
            assert padding(shorter + bucket) > sdpa.PADDING_PER_BUCKET


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
