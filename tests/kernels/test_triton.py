"""The Triton kernels compute what the reference computes, compiled on a GPU and interpreted without one.

Errors are relative: the root mean square of the difference to the reference, which is in fp32 on the same inputs, over
that of the reference. Uninitialized memory holds NaN throughout.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_case import Case, cu_seqlens, last, parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s3rec_dist.hashing import hash64
from s3rec_dist.kernels.backends import TRITON_HEAD_SIZES
from s3rec_dist.kernels.masked_attention import masked_attention

triton = pytest.importorskip("triton", reason="needs the package triton")

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""fp32: roundings of sums. The others: probabilities, their gradients and the results are rounded to 11 and 8 bits,
which adds up to about half of this (the interpreter cuts off bits when it makes bf16, which doubles it)."""

LENGTHS = (1, 2, 15, 16, 17, 50, 64, 65, 200)
SHORT = (7, 0, 1, 16, 2, 33, 0, 9, 40, 3, 0)
LONG = (3, 70, 0, 90, 1, 12)


def alternating(lengths: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(i % 2 == 0 for i in range(len(lengths)))


def assert_equals_the_reference(case: Case) -> None:
    found = replace(case, device=DEVICE).results("triton")
    inputs = [x.float().requires_grad_() for x in replace(case, device="cpu").tensors()]
    out = replace(case, device="cpu").attend("reference", *inputs[:3])
    expected = [out.detach(), *torch.autograd.grad(out, inputs[:3], inputs[3])]
    for (name, value), wanted in zip(found.items(), expected, strict=True):
        assert value.dtype == case.dtype and value.shape == wanted.shape
        error = float((value.cpu().float() - wanted).norm())
        # The second term is for gradients that cancel to nothing, as those of q and k do where there is one key.
        bound = ERROR[case.dtype] * (float(wanted.norm()) + 0.1 * wanted.numel() ** 0.5)
        assert error <= bound, f"{name} of {case}: error {error:.3g}, expected at most {bound:.3g}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("causal", [False, True])
def test_one_sequence_of_each_length(length: int, p: float, causal: bool) -> None:
    assert_equals_the_reference(Case((length,), causal=causal, p=p, heads=1))


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_mixed_lengths_mixed_masks_masked_keys_and_empty_sequences(
    lengths: tuple[int, ...], dtype: torch.dtype, p: float
) -> None:
    assert_equals_the_reference(Case(lengths, causal=alternating(lengths), p=p, dtype=dtype, invalid="some"))


@pytest.mark.parametrize("d", TRITON_HEAD_SIZES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("lengths", [(5, 30, 17), (40, 66)], ids=["short", "long"])
def test_head_sizes_and_types(d: int, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    assert_equals_the_reference(Case(lengths, causal=True, p=0.5, heads=1, d=d, dtype=dtype))


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("count", [1, 4])
def test_queries_of_the_last_few_tokens(lengths: tuple[int, ...], count: int) -> None:
    assert_equals_the_reference(Case(lengths, last(count, lengths), alternating(lengths), 0.5, invalid="some"))


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_dropout_rates(p: float) -> None:
    assert_equals_the_reference(Case(SHORT, p=p))


@pytest.mark.parametrize("lengths", [(30, 9), (66, 9)], ids=["short", "long"])
def test_without_a_valid_key_output_and_gradients_are_zero(lengths: tuple[int, ...]) -> None:
    for name, value in Case(lengths, p=0.5, invalid="all", device=DEVICE).results("triton").items():
        assert torch.equal(value, torch.zeros_like(value)), name


def test_more_than_a_thousand_tokens() -> None:
    assert_equals_the_reference(Case((5, 1030), causal=True, p=0.5, heads=1, d=16))


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_no_tokens_give_nothing(lengths: tuple[int, ...]) -> None:
    for value in Case(lengths, p=0.5, device=DEVICE).results("triton").values():
        assert value.shape == (0, 2, 32)


@settings(deadline=None, max_examples=100 if HAS_CUDA else 12, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_lengths_masks_query_counts_and_layouts(data: st.DataObject) -> None:
    lengths = tuple(data.draw(st.lists(st.integers(0, 70), max_size=4), "lengths"))
    some = st.tuples(*(st.integers(min(1, length), length) for length in lengths))
    assert_equals_the_reference(
        Case(
            lengths,
            queries=data.draw(st.none() | some, "queries"),
            causal=data.draw(st.booleans() | st.tuples(*(st.booleans() for _ in lengths)), "causal"),
            p=data.draw(st.sampled_from([0.0, 0.5, 0.8]), "p"),
            heads=data.draw(st.sampled_from([1, 2]), "heads"),
            d=data.draw(st.sampled_from([16, 32]), "d"),
            layout=data.draw(st.sampled_from(["separate", "heads first", "features first"]), "layout"),
            invalid=data.draw(st.sampled_from(["none", "some", "all"]), "invalid"),
        )
    )


@pytest.mark.parametrize("lengths", [(30, 9), (66, 9)], ids=["short", "long"])
@pytest.mark.parametrize("layout", ["separate", "one qkv projection", "heads first", "features first"])
def test_a_call_repeats_to_the_bit_in_every_layout(lengths: tuple[int, ...], layout: str) -> None:
    case = Case(lengths, causal=True, p=0.5, dtype=torch.bfloat16, device=DEVICE)
    for (name, one), other in zip(
        case.results("triton").items(), replace(case, layout=layout).results("triton").values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_strided_inputs_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x, **kw: copied.append(x.shape) if x.dim() == 3 else contiguous(x, **kw)
    )
    Case((30, 9), p=0.5, layout="one qkv projection", device=DEVICE).results("triton")
    assert not copied


def test_only_the_output_and_the_log_sum_exp_are_kept_for_the_backward_pass() -> None:
    case = Case((66, 9), p=0.5, device=DEVICE)
    kept: dict[int, torch.Size] = {}
    q, k, v, _ = case.tensors()
    given = {x.data_ptr() for x in (q, k, v)}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.shape}) or x, lambda x: x):
        out = case.attend("triton", q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    made = [shape for at, shape in kept.items() if at not in given and len(shape) > 1]
    assert sorted(map(len, made)) == [2, 3] and torch.Size([2, 75]) in made and out.shape in made


def test_scores_far_apart_do_not_overflow() -> None:
    q, k, v, _ = Case((66, 9), device=DEVICE).tensors()
    case = Case((66, 9), causal=True, device=DEVICE)
    leaves = [(q * 1e3).requires_grad_(), (k * 1e3).requires_grad_(), v.requires_grad_()]
    out = case.attend("triton", *leaves)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), leaves)))
    torch.testing.assert_close(out, case.attend("reference", *leaves), rtol=1e-5, atol=1e-5)


# The operator


def test_the_operator_keeps_pytorchs_rules() -> None:
    from s3rec_dist.kernels.masked_attention.triton import _attend

    case = Case((9, 0, 20), causal=True, p=0.5, heads=1, d=16, invalid="some", device=DEVICE)
    q, k, v, _ = (x.nan_to_num().requires_grad_() for x in case.tensors())
    cu = cu_seqlens(case.lengths).to(DEVICE)
    causal = torch.tensor([True, False, False], device=DEVICE)
    torch.library.opcheck(_attend, (q, k, v, cu, None, causal, case.key_valid(), case.keys(), 20, False, 0.5, 0.25))
    torch.library.opcheck(_attend, (q, k, v, cu, None, None, None, None, 20, True, 0.0, 0.25))


def test_torch_compile_keeps_it_in_one_graph_for_all_counts_of_tokens() -> None:
    def attend(qkv: torch.Tensor, cu: torch.Tensor, causal: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        q, k, v = (qkv * 2).view(-1, 3, 2, 16).unbind(1)
        return masked_attention(
            q, k, v, cu, 24, causal=causal, dropout_p=0.5, dropout_keys=keys, backend="triton"
        ).sigmoid()

    torch._dynamo.reset()
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(attend, fullgraph=True, backend=backend, dynamic=True)
    for lengths in ((9, 0, 20), (24, 1), (3, 4, 5, 6)):
        torch.manual_seed(0)
        qkv = torch.randn(sum(lengths), 96, device=DEVICE, requires_grad=True)
        rest = [
            cu_seqlens(lengths),
            torch.tensor(alternating(lengths)),
            hash64(torch.arange(len(lengths)), 1),
        ]
        rest = [x.to(DEVICE) for x in rest]
        results = []
        for function in (attend, compiled):
            out = function(qkv, *rest)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        for eager, graph in zip(*results, strict=True):
            assert torch.equal(eager, graph)
    assert len(compilations) == 1


# Without a GPU: the kernels become machine code all the same


@pytest.mark.slow
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.extended), 90])
def test_the_kernels_compile(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    repository = Path(__file__).parents[2]
    paths = [str(repository), environment.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compile_triton.py"), str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(entry["bytes"] > 0 for entry in found)
    losses = {(entry["kernel"], entry["features"]) for entry in found if "features" in entry}
    assert losses == set(itertools.product(("loss_and_grad_hidden", "grad_table"), (64, 100, 512)))
    layers = {(entry["kernel"], entry["width"]) for entry in found if "width" in entry}
    kernels = {f"{name}{step}" for name in ("add_norm", "embed", "bias_gelu") for step in ("", "_backward")}
    assert layers == set(itertools.product((*kernels, "sum_partials", "sum_by_position"), (64, 100)))
    compiled = [entry for entry in found if "d" in entry]
    assert {entry["kernel"] for entry in compiled} == {"forward", "backward", "backward_dq", "backward_dkdv"}
    assert {entry["d"] for entry in compiled} == set(TRITON_HEAD_SIZES)
    for setting, count in (("dtype", 3), ("causal", 3), ("p", 2)):
        assert len({entry[setting] for entry in compiled}) == count


# On a GPU


@needs_cuda
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
def test_nothing_is_read_by_the_host(lengths: tuple[int, ...]) -> None:
    case = Case(lengths, p=0.5, dtype=torch.bfloat16, device="cuda")
    q, k, v, grad = case.tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu, keys = cu_seqlens(lengths).cuda(), case.keys()

    def step() -> None:
        out = masked_attention(
            *leaves, cu, max(lengths), causal=True, dropout_p=0.5, dropout_keys=keys, backend="triton"
        )
        torch.autograd.grad(out, leaves, grad)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
def test_a_cuda_graph_replays_it_on_other_lengths(lengths: tuple[int, ...]) -> None:
    case = Case(lengths, p=0.5, dtype=torch.bfloat16, device="cuda")
    q, k, v, _ = case.tensors()
    cu, keys = cu_seqlens(lengths).cuda(), case.keys()

    def attend() -> torch.Tensor:
        return masked_attention(
            q, k, v, cu, max(lengths), causal=True, dropout_p=0.5, dropout_keys=keys, backend="triton"
        )

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    cu.copy_(cu_seqlens(lengths[::-1]))
    graph.replay()
    assert torch.equal(out, attend())
    assert [len(part) for part in parts(out, lengths[::-1])] == list(lengths[::-1])
