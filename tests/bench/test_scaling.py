"""``s3rec bench scaling``: what is measured holds together, and the model says what arithmetic says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s3rec_dist.__main__ import main
from s3rec_dist.bench.scaling import (
    BASE_LATENCY,
    FABRICS,
    GPUS,
    Fabric,
    Gpu,
    all_reduce,
    fit_all_reduce,
    model,
    predicted,
    sent_bytes,
    step_parts,
)
from s3rec_dist.training.phases import wire_bytes

INFINIBAND, ETHERNET = FABRICS


def test_two_ranks_send_what_is_computed_and_counted(
    ml100k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(tmp_path / "data")
    assert main(["prepare", "--source", "recbole", "--input", str(ml100k), "--output", data]) == 0
    settings = ["model.max_length=8", "pretrain.batch_size=64", "engine.device=cpu"]
    arguments = ["bench", "scaling", "--dataset", data, "--steps", "3", "--repetitions", "1", "--ranks", "2"]
    assert main([*arguments, "--output", str(tmp_path / "report"), *settings]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["2_ranks_step_ms"] > 0
    report = json.loads((tmp_path / "report" / "scaling.json").read_text())
    two = report["measured"]["2"]
    expected, _ = sent_bytes(two["parameters"], 0, 2)
    assert two["sent"] == [pytest.approx(expected, rel=0.01)]
    assert two["loopback"] == [pytest.approx(expected, rel=0.1)] or not two["loopback"]
    text = (tmp_path / "report" / "scaling.md").read_text()
    assert text.index("Measured here") < text.index("Modelled, not measured")
    assert len([line for line in text.splitlines() if " 10 M items " in line]) == 4


def test_an_all_reduce_takes_the_faster_of_ring_and_tree_and_the_slower_of_the_links() -> None:
    latency, transfer = all_reduce(1e9, 8, INFINIBAND)
    assert latency == pytest.approx(BASE_LATENCY + 2 * 7 * 3.4e-6)
    assert transfer == pytest.approx(2 * 7 / 8 * 1e9 / (0.8 * 450e9))
    latency, transfer = all_reduce(1e9, 1024, ETHERNET)
    assert latency == pytest.approx(BASE_LATENCY + 2 * (7 * 4e-6 + 7 * 14e-6))
    assert transfer == pytest.approx(2 * 1023 / 1024 * 1e9 / (0.8 * 12.5e9))
    assert all_reduce(1e9, 1, ETHERNET) == (0, 0)


def test_a_step_is_the_sum_of_what_it_does() -> None:
    gpu, fabric = Gpu(tokens_per_second=1e6, floor=0.01, memory=48e9), Fabric("", network=1e9, share=1.0)
    parts = step_parts(1e9, 5e5, 16, gpu, fabric)
    assert parts["computing"] == 0.5 and parts["updating the weights"] == 1.0 and parts["launches"] == 0.01
    assert parts["bandwidth of the all-reduce"] == pytest.approx(7.5)


def test_larger_tables_and_slower_networks_scale_less_and_weak_scaling_further_than_strong() -> None:
    curves = {(c.catalogue, c.fabric, c.kind): c for c in model()}
    for (catalogue, fabric, kind), curve in curves.items():
        shares = [curve.efficiency[n] for n in GPUS]
        assert all(0 < share <= 1 for share in shares)
        assert shares[-1] <= curves["12,101 items", fabric, kind].efficiency[1024]
        assert shares[-1] <= curves[catalogue, INFINIBAND.name, kind].efficiency[1024]
        assert shares[-1] >= curves[catalogue, fabric, "strong"].efficiency[1024]
    assert curves["10 M items", ETHERNET.name, "weak"].end.endswith("bandwidth of the all-reduce")


def test_latency_and_bandwidth_are_found_again_from_all_reduces() -> None:
    timed = [(size, 5e-5 + wire_bytes("all_reduce", size, 4) / 2e9) for size in (4, 65_536, 1 << 20, 1 << 24)]
    assert fit_all_reduce(timed, 4) == (pytest.approx(5e-5), pytest.approx(2e9))


def test_a_step_of_more_ranks_is_predicted_from_one_rank_s_and_the_all_reduces() -> None:
    one = {"phases": [{"forward": 0.5, "backward": 0.7}], "cores": 2}
    timed = [(size, 0.001 + wire_bytes("all_reduce", size, 4) / 1e9) for size in (4, 1 << 20, 1 << 24)]
    four = {"all_reduce": timed, "parameters": 250_000_000, "cores": 2}
    assert predicted({1: one, 4: four}, 4) == pytest.approx(0.6 + 0.001 + 1.5)
    assert predicted({4: four}, 4) is None


@pytest.mark.parametrize(("zero", "least", "most"), [(0, 2, 2), (1, 3, 3), (2, 3, 3), (3, 2, 3)])
def test_bytes_by_zero_stage(zero: int, least: int, most: int) -> None:
    one = wire_bytes("all_gather", 4e6, 4)
    assert sent_bytes(1e6, zero, 4) == (least * one, most * one)


def test_no_ranks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling", "--ranks", "2", "0"]) == 2
    assert "--ranks 0: expected 1 or more" in capsys.readouterr().err
