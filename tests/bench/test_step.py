"""``s3rec bench step``: rates that agree with one another, and a profile of what a step does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from s3rec_dist.__main__ import main
from s3rec_dist.bench import step as bench

CPU = torch.device("cpu")


@pytest.fixture
def prefixes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fewer users than Beauty's: 20 of three items, 30 of four, 10 of five."""
    counts = [60, 40, 10]
    monkeypatch.setattr(bench, "BEAUTY_PREFIXES", counts)
    return counts


def test_the_dataset_that_is_made_has_these_lengths_and_beauty_s_attributes(
    prefixes: list[int], tmp_path: Path
) -> None:
    dataset = bench.beauty_like(tmp_path)
    lengths = dataset.index.lengths.repeat(dataset.index.counts).tolist()
    assert sorted(lengths) == [3] * 20 + [4] * 30 + [5] * 10
    assert dataset.n_attributes > 300 and dataset.n_rows == prefixes[0]


def test_a_step_is_timed_and_profiled_for_each_batch_size_and_backend(
    prefixes: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "PROFILED_STEPS", 1)
    settings = ["model.hidden_size=16", "model.inner_size=16", "engine.threads=1", "engine.device=cpu"]
    sizes, backends = ["--batch-sizes", "2", "32"], ["--backends", "sdpa"]
    assert main(["bench", "step", *sizes, *backends, "--steps", "1", "--repetitions", "1", *settings]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    for size in (2, 32):
        name = f"batch_{size}_sdpa"
        assert result[f"{name}_samples_per_s"] == pytest.approx(size / result[f"{name}_ms"] * 1e3, rel=0.01)
        assert 1 <= result[f"{name}_real_tokens_per_s"] / result[f"{name}_samples_per_s"] <= 3
        assert result[f"{name}_operators"] > 100 and 0 <= result[f"{name}_idle_%"] < 100
        assert f"batch {size} sdpa:" in table
    assert sum(line.startswith("time by kernel ") for line in table) == 2


def test_a_profile_counts_calls_and_own_time_of_a_step() -> None:
    x = torch.randn(200, 200)

    def steps() -> None:
        for _ in range(4):
            x @ x @ x

    found = bench.profile_steps(steps, 4, CPU)
    calls = {name: count for name, count, _ in found.by_name}
    assert calls["aten::mm"] == 2 and found.by_name[0][0] == "aten::mm"
    assert 0 < sum(seconds for _, _, seconds in found.by_name) <= found.busy * 1.01 <= found.seconds * 1.01
