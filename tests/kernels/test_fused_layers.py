"""The fused layers compute what their definitions compute, compiled on a GPU and interpreted without one.

Errors are relative: the root mean square of the difference to the definition, which is in fp64 on the same inputs, over
that of the definition. Uninitialized memory holds NaN throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from s3rec_dist.hashing import hash64, keep_mask, keep_scale
from s3rec_dist.kernels.fused_layers import bias_gelu, dropout_add_norm, embed
from s3rec_dist.kernels.fused_layers.reference import (
    reference_bias_gelu,
    reference_dropout_add_norm,
    reference_embed,
)

triton = pytest.importorskip("triton", reason="needs the package triton")

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")

ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""fp32: roundings of sums. The others: results are rounded to 11 and 8 bits, the gradient of the tables twice (and the
interpreter cuts bits off when it makes bf16)."""

SIZES = [(1, 1), (3, 6), (37, 50), (70, 64), (33, 100), (1100, 8)]
"""Tokens and features: less than a tile and many, powers of two and not."""

OPERATORS = {
    "dropout_add_norm": (dropout_add_norm, reference_dropout_add_norm),
    "embed": (embed, reference_embed),
    "bias_gelu": (bias_gelu, reference_bias_gelu),
}
ITEMS = 13

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Case:
    """One call, with inputs that are a function of the case."""

    operator: str
    tokens: int
    width: int
    p: float = 0.5
    dtype: torch.dtype = torch.float32
    eps: float = 1e-12
    places: int = 5
    """Rows of the position table."""

    def tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Ids, and what has gradients; normal, with a mean."""
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) + 0.3).to(self.dtype).to(DEVICE)

        def ids(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randint(count, (self.tokens,), generator=generator, dtype=dtype).to(DEVICE)

        rows, row = (self.tokens, self.width), (self.width,)
        if self.operator == "bias_gelu":
            return [], [normal(*rows), normal(*row)]
        if self.operator == "dropout_add_norm":
            return [], [normal(*rows), normal(*row), normal(*rows), normal(*row), normal(*row)]
        tables = [normal(ITEMS, self.width), normal(self.places, self.width)]
        return [ids(ITEMS, torch.int32), ids(self.places, torch.int64)], [*tables, normal(*row), normal(*row)]

    def keys(self) -> torch.Tensor:
        return hash64(torch.arange(self.tokens), 99).to(DEVICE)

    def results(
        self, call: Callable[..., torch.Tensor], ids: list[torch.Tensor], leaves: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The output and the gradients."""
        leaves = [x.detach().requires_grad_() for x in leaves]
        options = () if self.operator == "bias_gelu" else (self.eps, self.keys(), 3, self.p)
        out = call(*ids, *leaves, *options)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(self.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype).to(DEVICE))]

    def found(self) -> list[torch.Tensor]:
        return self.results(OPERATORS[self.operator][0], *self.tensors())

    def expected(self) -> list[torch.Tensor]:
        ids, leaves = self.tensors()
        return self.results(OPERATORS[self.operator][1], ids, [x.double() for x in leaves])


def assert_equals_the_definition(case: Case) -> None:
    for i, (value, wanted) in enumerate(zip(case.found(), case.expected(), strict=True)):
        assert value.dtype == case.dtype and value.shape == wanted.shape
        error = float((value.double() - wanted).norm())
        # The second term is for what cancels to nothing, as the gradients of a row of one feature do.
        bound = ERROR[case.dtype] * (float(wanted.norm()) + wanted.numel() ** 0.5)
        assert error <= bound, f"result {i} of {case}: error {error:.3g}, expected at most {bound:.3g}"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("tokens", "width"), SIZES)
def test_outputs_and_gradients_at_all_sizes(
    operator: str, tokens: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s3rec_dist.kernels.fused_layers.triton.PROGRAMS", 2)  # each with several tiles
    assert_equals_the_definition(Case(operator, tokens, width, eps=1e-12 if width > 1 else 0.1))


@pytest.mark.parametrize("operator", ["dropout_add_norm", "bias_gelu"])
@pytest.mark.parametrize("width", [1000, 1024])
def test_wide_rows(operator: str, width: int) -> None:
    assert_equals_the_definition(Case(operator, 3, width))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_of_16_bits_are_those_of_fp64_rounded(operator: str, dtype: torch.dtype) -> None:
    assert_equals_the_definition(Case(operator, 70, 50, dtype=dtype))


@pytest.mark.parametrize("operator", ["dropout_add_norm", "embed"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
def test_dropout_rates(operator: str, p: float) -> None:
    assert_equals_the_definition(Case(operator, 33, 20, p))


def test_more_positions_than_a_program_sums() -> None:
    assert_equals_the_definition(Case("embed", 150, 6, places=130))


def test_dropout_keeps_what_keep_mask_keeps() -> None:
    ones, zero = torch.ones(70, 50, device=DEVICE), torch.zeros(50, device=DEVICE)
    keys = Case("embed", 70, 50).keys()
    out = embed(
        torch.zeros(70, dtype=torch.int32, device=DEVICE),
        torch.zeros(70, dtype=torch.int64, device=DEVICE),
        ones,
        ones,
        zero,
        zero + 1,
        1e-12,
        keys,
        3,
        0.3,
    )
    assert torch.equal(out, keep_mask(keys, 50, 3, 0.3) * torch.tensor(keep_scale(0.3)))


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_tokens_give_nothing_and_gradients_of_zero(operator: str) -> None:
    for value, (x, *_) in zip(Case(operator, 0, 8).found()[1:], zip(Case(operator, 0, 8).tensors()[1]), strict=True):
        assert torch.equal(value, torch.zeros_like(x))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_call_repeats_to_the_bit_in_every_layout(operator: str) -> None:
    case = Case(operator, 70, 50, dtype=torch.bfloat16)
    ids, leaves = case.tensors()
    turned = [x.T.contiguous().T if x.dim() == 2 else x for x in leaves]
    for one, other in zip(case.found(), case.results(OPERATORS[operator][0], ids, turned), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_but_inputs_and_two_numbers_a_row_is_kept_for_the_backward_pass(operator: str) -> None:
    case = Case(operator, 40, 8)
    ids, leaves = case.tensors()
    given = {x.data_ptr() for x in (*ids, *leaves)}
    made: list[torch.Size] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in given:
            made.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.results(OPERATORS[operator][0], ids, leaves)
    rows = 0 if operator == "bias_gelu" else 3  # mean, deviation, key
    assert made == [torch.Size([40])] * rows


def test_gradients_hold_without_a_deviation_and_far_from_zero() -> None:
    """Rows of one value, and rows whose mean is a thousand times their deviation."""
    case = Case("dropout_add_norm", 6, 20, p=0.0, eps=1e-5)
    _, leaves = case.tensors()
    leaves[0][:3], leaves[1][:], leaves[2][:3] = 1.0, 0.0, 2.0
    leaves[2][3:] += 1000
    found = case.results(dropout_add_norm, [], leaves)
    expected = case.results(reference_dropout_add_norm, [], [x.double() for x in leaves])
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=1e-3)


# The operators


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_operators_keep_pytorchs_rules(operator: str) -> None:
    from s3rec_dist.kernels.fused_layers import triton as operators

    case = Case(operator, 9, 6)
    ids, leaves = case.tensors()
    options = () if operator == "bias_gelu" else (case.keys(), 0.1, 3, 0.5)
    torch.library.opcheck(
        getattr(operators, operator), (*ids, *(x.requires_grad_() for x in leaves), *options), rtol=1e-4, atol=1e-4
    )


def test_torch_compile_keeps_them_in_one_graph_for_all_counts_of_tokens() -> None:
    def layers(x: torch.Tensor, bias: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return dropout_add_norm(bias_gelu(x * 2, bias), bias, x, bias, bias, 0.1, keys, 1, 0.5).sigmoid()

    torch._dynamo.reset()
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layers, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (5, 9, 33):
        x, bias = (torch.randn(*shape, 6, device=DEVICE, requires_grad=True) for shape in ((tokens,), ()))
        keys = hash64(torch.arange(tokens), 1).to(DEVICE)
        results = []
        for function in (layers, compiled):
            out = function(x, bias, keys)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, bias))))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(eager, graph)
    assert len(compilations) == 1


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(8)}, r"x is \[8\]; expected rows"),
        ({2: torch.zeros(4, 7)}, r"residual is torch.float32 \[4, 7\]; expected torch.float32 \[4, 8\]"),
        ({2: torch.zeros(4, 8).half()}, r"residual is torch.float16 \[4, 8\]; expected torch.float32"),
        ({3: torch.zeros(7)}, r"weight is torch.float32 \[7\]; expected torch.float32 \[8\]"),
        ({6: torch.zeros(4)}, r"keys is torch.float32 \[4\]; expected torch.int64 \[4\]"),
        ({8: 1.0}, "p=1.0: expected a probability from 0 to below 1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_what_was_expected(changes: dict[int, object], message: str) -> None:
    case = Case("dropout_add_norm", 4, 8)
    arguments = [*(x.cpu() for x in case.tensors()[1]), 1e-12, case.keys().cpu(), 1, 0.5]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        dropout_add_norm(*arguments)


@pytest.mark.parametrize("which", [0, 1])
def test_ids_outside_of_their_table_are_refused_on_a_cpu(which: int) -> None:
    case = Case("embed", 4, 8)
    ids, leaves = case.tensors()
    ids, leaves = [x.cpu() for x in ids], [x.cpu() for x in leaves]
    ids[which][2] = 99
    with pytest.raises(ValueError, match="to 99; expected from 0 to"):
        embed(*ids, *leaves, 1e-12)


def test_what_triton_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes float32, float16, bfloat16, not torch\.float64; use reference"):
        bias_gelu(torch.zeros(2, 3).double(), torch.zeros(3).double())


# On a GPU


@needs_cuda
@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_is_read_by_the_host(operator: str) -> None:
    case = Case(operator, 5000, 64, dtype=torch.bfloat16)
    ids, leaves = case.tensors()
    case.results(OPERATORS[operator][0], ids, leaves)
    leaves = [x.requires_grad_() for x in leaves]
    options = () if operator == "bias_gelu" else (1e-12, case.keys(), 3, 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(OPERATORS[operator][0](*ids, *leaves, *options).sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
