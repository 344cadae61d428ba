"""``s3rec bench``: a table for people, then one JSON object; every benchmark runs on a small dataset."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from s3rec_dist.__main__ import main

FIGURES = {
    "reconstruct": ["samples_per_s", "samples_per_s_streamed"],
    "pretrain": ["samples_per_s", "items_per_s", "steps_per_s"],
    "finetune": ["samples_per_s", "items_per_s", "steps_per_s"],
    "evaluate": ["users_per_s"],
    "checkpoint": ["MiB_of_a_checkpoint", "s_held,_waited_for", "s_held,_in_the_background"],
    "stream": ["sequences_per_s", "prefixes_per_s"],
}


@pytest.fixture(scope="module")
def dataset(ml100k: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("bench") / "ml-100k")
    assert main(["prepare", "--source", "recbole", "--input", str(ml100k), "--output", folder]) == 0
    return folder


@pytest.mark.parametrize("name", list(FIGURES))
def test_a_benchmark_prints_a_table_and_then_one_json_object(
    name: str, dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["model.max_length=8", "pretrain.batch_size=64", "finetune.batch_size=64", "engine.threads=1"]
    arguments = ["bench", name, "--dataset", dataset, "--steps", "2", "--repetitions", "2", *settings]
    assert main(arguments) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["bench"] == name and result["dataset"] == "ml-100k" and result["memory_mb"] > 0
    for figure in FIGURES[name]:
        assert result[figure] > 0
    assert any(line.split() == ["median", "slowest", "fastest"] for line in table)


def test_resuming_a_billion_samples_needs_no_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    affinity = os.sched_getaffinity(0)
    assert main(["bench", "resume", "--repetitions", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["seconds"] > 0 and result["memory_mb"] > 0
    assert os.sched_getaffinity(0) == affinity


def test_preparing_is_measured_by_size_in_processes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prepare", "--events", "2000", "4000", "--repetitions", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for size in ("2,000", "4,000"):
        assert result[f"{size}_events:_events_per_s"] > 0 and result[f"{size}_events:_peak_MiB"] > 30


def test_steps_are_measured_by_the_size_of_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model.hidden_size=8", "model.inner_size=8", "model.max_length=6", "finetune.batch_size=8"]
    arguments = ["bench", "catalogue", "--items", "2000", "--steps", "2", "--repetitions", "1", *settings]
    assert main([*arguments, "engine.device=cpu"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    name = "2,000_items_x_8,_sharded"
    assert result[f"{name}:_step_ms"] > 0 and result["2,000_items_x_8,_dense:_CPU_ms"] > 0
    # of the rows that a rank asks for about half are the other's: an id of 8 bytes, a row and its gradient of 32
    assert 20 < result[f"{name}:_bytes_sent_a_row"] < 60
    # a row and two of Adam's state, an id and a place, of half of the items
    assert result[f"{name}:_table_MiB_a_rank"] * 2**20 == pytest.approx(2001 / 2 * (3 * 32 + 8 + 4), rel=0.01)


def test_the_exact_softmax_takes_little_beside_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--items", "70000", "--targets", "600", "--repetitions", "1", "model.hidden_size=16"]
    assert main(["bench", "softmax", *arguments, "engine.device=cpu"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    name = "600_targets_x_70,000_items_x_16"
    assert result[f"{name}:_s"] > 0 and result[f"{name}:_relative_error_of_a_sample"] < 1e-5
    assert result[f"{name}:_workspace_MiB"] < 100  # all logits at once would be 160


def test_a_benchmark_on_a_dataset_asks_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "stream"]) == 2
    assert "name one with --dataset" in capsys.readouterr().err


def test_the_profile_names_operations_and_their_shares(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model.max_length=8", "pretrain.batch_size=64", "engine.threads=1"]
    arguments = ["bench", "pretrain", "--dataset", dataset, "--steps", "1", "--repetitions", "1", "--profile"]
    assert main([*arguments, *settings]) == 0
    assert "aten::mm" in capsys.readouterr().out


def test_a_batch_larger_than_an_epoch_is_refused(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "finetune", "--dataset", dataset, "finetune.batch_size=4096", "data.streams=1"]
    assert main([*arguments, "pretrain.batch_size=4096", "engine.threads=1"]) == 2
    assert "an epoch has 943 samples" in capsys.readouterr().err


def test_repetitions_below_one_are_refused(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "reconstruct", "--dataset", dataset, "--repetitions", "0"]) == 2
    assert "expected 1 or more" in capsys.readouterr().err
