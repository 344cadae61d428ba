"""``engine.compile``: the same training, compiled once for batches of any size."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import curve, make_config, run
from torch._dynamo.utils import counters

from s3rec_dist.config import ConfigError, EngineConfig


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("stage", "zero", "losses"),
    [
        pytest.param("pretrain", 0, {}, marks=pytest.mark.extended),
        pytest.param("pretrain", 0, {"pretrain__attribute_negatives": 3}, marks=pytest.mark.extended),
        pytest.param("finetune", 2, {}, marks=pytest.mark.extended),
        ("finetune", 2, {"finetune__loss": "sampled_ce", "finetune__negative_sampling": "in_batch"}),
    ],
)
def test_a_compiled_run_has_the_curve_of_one_that_is_not(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, zero: int, losses: dict[str, Any]
) -> None:
    # traced, but left to PyTorch's own kernels, which takes no C++ compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    changes = {f"{stage}__epochs": 2, "engine__zero_stage": zero, **losses}
    expected = curve(run(stage, make_config(dataset, tmp_path / "plain", **changes)))
    assert not counters["stats"]["unique_graphs"]
    found = curve(run(stage, make_config(dataset, tmp_path / "compiled", engine__compile=True, **changes)))
    assert found == pytest.approx(expected, rel=1e-6)
    # Each epoch has 17 batches or more, of 17 sizes; one of a single sample is another kind to the compiler.
    assert 0 < counters["stats"]["unique_graphs"] < 40


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.skipif(shutil.which("g++") is None, reason="a C++ compiler is not installed")
def test_what_the_compiler_fuses_trains_alike(dataset: Path, tmp_path: Path) -> None:
    changes = {"finetune__epochs": 1, "model__layers": 1}
    expected = curve(run("finetune", make_config(dataset, tmp_path / "plain", **changes)))
    found = curve(run("finetune", make_config(dataset, tmp_path / "compiled", engine__compile=True, **changes)))
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.compile does not work with engine.zero_stage=3.*zero_stage=2"):
        EngineConfig(compile=True, zero_stage=3)
