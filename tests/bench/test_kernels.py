"""``s3rec bench kernels``: what is wrong is not timed, and what is timed is what was asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from s3rec_dist.bench import kernels as bench

CPU = torch.device("cpu")
SHAPE = bench.Shape(name="odd", lengths=(3, 50, 1, 7), heads=2, head_size=16)
CAUSAL = bench.Shape(name="odd", lengths=(3, 50, 1, 7), heads=2, head_size=16, causal=True)


def wrong(build: Callable[[bench.Inputs], bench.Rival], shape: bench.Shape) -> str | None:
    inputs = bench.Inputs(shape, CPU, torch.float32)
    return bench._wrong(inputs, lambda: build(inputs))


@pytest.mark.parametrize("shape", [SHAPE, CAUSAL], ids=str)
def test_padded_attention_is_a_rival_of_the_same_results(shape: bench.Shape) -> None:
    assert wrong(bench.padded_sdpa, shape) is None


def test_jagged_attention_is_a_rival_of_the_same_results() -> None:
    assert wrong(bench.jagged_sdpa, SHAPE) is None


@pytest.mark.parametrize("options", [{"mixed": True}, {"dropout_p": 0.5}], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, CAUSAL], ids=str)
def test_variants_of_a_backend_are_held_against_the_same_variant(shape: bench.Shape, options: dict[str, float]) -> None:
    assert wrong(lambda inputs: bench.ours(inputs, "sdpa", **options), shape) is None


def test_times_come_with_bandwidth_and_rate_for_each_repetition() -> None:
    figures = bench.bench_kernels(CPU, repetitions=2, measured=[SHAPE])
    names = ("sdpa", "sdpa dropout", "padded sdpa", "jagged sdpa", "reference")
    passes = [f"odd H2 D16 {name} {step}" for name in names for step in ("forward", "forward+backward")]
    assert set(figures) == {f"{name} {unit}" for name in passes for unit in ("us", "GB/s", "TFLOP/s")}
    assert all(len(values) == 2 and min(values) > 0 for values in figures.values())
    forward = "odd H2 D16 sdpa forward"
    for us, gb in zip(figures[f"{forward} us"], figures[f"{forward} GB/s"], strict=True):
        assert us * gb * 1e3 == pytest.approx(61 * 2 * 16 * 4 * 4)  # tokens, heads, head size, tensors, bytes


def test_a_rival_that_is_wrong_or_fails_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgets_the_mask(inputs: bench.Inputs) -> bench.Rival:
        return bench.ours(bench.Inputs(SHAPE, CPU, torch.float32), "sdpa")

    def cannot(inputs: bench.Inputs) -> bench.Rival:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(bench, "rivals", lambda _: {"careless": forgets_the_mask, "lacking": cannot})
    assert bench.bench_kernels(CPU, repetitions=1, measured=[CAUSAL]) == {}
    first, second = capsys.readouterr().out.splitlines()
    assert "odd H2 D16 causal: careless is left out: its output is off by" in first
    assert second == "odd H2 D16 causal: lacking is left out: NotImplementedError: no such kernel"


def test_a_backend_of_ours_that_is_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    other = bench.Inputs(SHAPE, CPU, torch.float32)
    monkeypatch.setattr(bench, "rivals", lambda _: {"sdpa": lambda _: bench.ours(other, "sdpa")})
    with pytest.raises(RuntimeError, match="odd H2 D16 causal: sdpa fails: its output is off by"):
        bench.bench_kernels(CPU, repetitions=1, measured=[CAUSAL])


def test_the_shapes_of_a_gpu_are_those_of_real_work() -> None:
    shapes = bench.shapes(torch.device("cuda"))
    assert len(shapes) == 4 * 6 + 1 and len(set(map(str, shapes))) == len(shapes)
    beauty = next(shape for shape in shapes if shape.name == "Beauty")
    assert len(beauty.lengths) == 4096 and 6.5 < sum(beauty.lengths) / 4096 < 7.8 and max(beauty.lengths) == 50
    counts = bench.BEAUTY_PREFIXES
    assert round(sum(n * count for n, count in enumerate(counts, 1)) / sum(counts), 2) == 7.15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_all_rivals_are_measured() -> None:
    device = torch.device("cuda", 0)
    shape = bench.Shape(name="50", lengths=(50,) * 64, heads=2, head_size=64)
    figures = bench.bench_kernels(device, repetitions=1, measured=[shape])
    assert figures["copy GB/s"][0] > 0 and figures["matmul TFLOP/s"][0] > 0
    for name in ("triton", "triton dropout", "triton mixed masks", "sdpa", "padded sdpa", "flex_attention"):
        assert figures[f"50 H2 D64 {name} forward+backward us"][0] > 0
