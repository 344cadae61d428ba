"""``s3rec bench kernels``, the attribute loss: what is wrong is not timed, and what is timed is what was asked for."""

from __future__ import annotations

import itertools

import pytest
import torch

from s3rec_dist.bench import losses as bench
from s3rec_dist.kernels.attribute_loss import attribute_loss

CPU = torch.device("cpu")
SHAPE = bench.LossShape(rows=40, attributes=23, features=8, items=30)
NAME = "attribute loss M40 A23 E8"


def test_the_lists_of_a_shape_ascend_within_the_table() -> None:
    _, (_, offsets, values) = SHAPE.inputs(CPU, torch.float32)
    for begin, end in itertools.pairwise(offsets):
        own = values[begin:end].tolist()
        assert own == sorted(set(own)) and len(own) == 5 and own[0] >= 0 and own[-1] < 23


def test_all_ways_agree_and_times_come_with_rates() -> None:
    figures = bench.bench_losses(CPU, repetitions=2, measured=[SHAPE])
    passes = [f"{NAME} {way} {step}" for way in ("reference", "dense BCE") for step in ("forward", "forward+backward")]
    assert set(figures) == {f"{name} {unit}" for name in passes for unit in ("us", "TFLOP/s")}
    for products, step in ((1, "forward"), (3, "forward+backward")):
        times, rates = (figures[f"{NAME} reference {step} {unit}"] for unit in ("us", "TFLOP/s"))
        for us, rate in zip(times, rates, strict=True):
            assert us * rate * 1e6 == pytest.approx(products * 2 * 40 * 23 * 8)


def test_a_rival_that_is_wrong_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench.rivals

    def with_careless(device: torch.device, lists: list[torch.Tensor]) -> dict[str, bench.Loss]:
        items, offsets, values = lists
        found = right(device, lists)
        careless = lambda h, t: attribute_loss(h, t, items.flip(0), offsets, values)  # noqa: E731
        return {"reference": found["reference"], "careless": careless}

    monkeypatch.setattr(bench, "rivals", with_careless)
    assert not any("careless" in name for name in bench.bench_losses(CPU, repetitions=1, measured=[SHAPE]))
    assert f"{NAME}: careless is left out: its loss is off by" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_all_rivals_are_measured() -> None:
    figures = bench.bench_losses(torch.device("cuda", 0), repetitions=1, measured=[SHAPE])
    for way in ("reference", "triton", "dense BCE", "dense BCE compiled"):
        assert figures[f"{NAME} {way} forward+backward us"][0] > 0
