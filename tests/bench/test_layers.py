"""``s3rec bench kernels``, the fused layers: what is wrong is not timed, and what is timed is what was asked for."""

from __future__ import annotations

import pytest
import torch

from s3rec_dist.bench import layers as bench
from s3rec_dist.kernels.backends import forced_backend

CPU = torch.device("cpu")
SHAPES = [bench.LayerShape(layer=layer, tokens=20, features=8) for layer in bench.PASSES]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_times_come_with_bandwidth_for_each_repetition(shape: bench.LayerShape) -> None:
    figures = bench.bench_layers(CPU, repetitions=2, measured=[shape])
    passes = zip(("forward", "forward+backward"), bench.PASSES[shape.layer], strict=True)
    for title, count in passes:
        times, rates = (figures.pop(f"{shape} plain {title} {unit}") for unit in ("us", "GB/s"))
        for us, gb in zip(times, rates, strict=True):
            assert us * gb * 1e3 == pytest.approx(count * 20 * 8 * 4)
    assert not figures


def test_the_triton_kernels_are_held_against_the_definition_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    shape = bench.LayerShape(layer="bias_gelu", tokens=5, features=8)
    with forced_backend("triton"):
        assert f"{shape} triton forward+backward us" in bench.bench_layers(CPU, repetitions=1, measured=[shape])
        monkeypatch.setattr(bench.fused_layers, "bias_gelu", lambda x, bias: torch.relu(x + bias))
        with pytest.raises(RuntimeError, match="bias_gelu T5 E8: triton fails: its output is off by"):
            bench.bench_layers(CPU, repetitions=1, measured=[shape])


def test_a_rival_that_is_wrong_or_fails_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench.rivals

    def with_careless(*arguments: object) -> dict[str, bench.Layer]:
        found = right(*arguments)  # type: ignore[arg-type]
        return {**found, "careless": lambda x, bias: x * bias, "lacking": lambda *_: [][0]}

    monkeypatch.setattr(bench, "rivals", with_careless)
    figures = bench.bench_layers(CPU, repetitions=1, measured=[SHAPES[2]])
    assert all(" plain " in name for name in figures) and figures
    told = capsys.readouterr().out
    assert "careless is left out: its output is off by" in told and "lacking is left out: IndexError" in told


def test_the_shapes_of_a_gpu_are_those_of_real_work() -> None:
    found = bench.shapes(torch.device("cuda"))
    assert len(set(map(str, found))) == 4 * 3 and max(shape.tokens for shape in found) == 500_000
    assert {shape.features for shape in found if shape.layer == "bias_gelu"} == {256, 512}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_all_rivals_are_measured() -> None:
    for shape in SHAPES:
        figures = bench.bench_layers(torch.device("cuda", 0), repetitions=1, measured=[shape])
        for name in ("plain", "triton", "plain compiled"):
            assert figures[f"{shape} {name} forward+backward us"][0] > 0
