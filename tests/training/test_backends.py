"""Every backend trains alike: the same loss curve from the same seed, dropout on."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import make_config, make_dataset

from s3rec_dist.bench.step import Steps
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.kernels.backends import forced_backend
from s3rec_dist.training.engine import World

STEPS = 200
TOLERANCE = 1e-5
"""Relative, of a step's loss, in fp32. Measured: at most 3e-7."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, users=20)
    return Dataset.open(str(folder / "dataset"))


def curve(dataset: Dataset, world: World, output: Path, backend: str) -> list[float]:
    """Losses of pretraining steps of a small model."""
    small = {"hidden_size": 16, "inner_size": 16, "heads": 1, "layers": 1, "max_length": 6}
    settings = {f"model__{key}": value for key, value in small.items()}
    config = make_config(Path(dataset.path), output, pretrain__batch_size=2, pretrain__learning_rate=3e-3, **settings)
    training = Steps(config, "pretrain", dataset, world)
    try:
        with forced_backend(backend):
            results = [training.step()[1] for _ in range(STEPS)]
    finally:
        training.close()
    return [sum(float(part.total.detach()) for part in result.losses) for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("triton", marks=pytest.mark.extended)])
def test_a_backend_s_loss_curve_is_the_reference_s(
    dataset: Dataset, world: World, tmp_path: Path, backend: str
) -> None:
    expected = curve(dataset, world, tmp_path, "reference")
    assert sum(expected[-20:]) < 0.9 * sum(expected[:20])
    assert curve(dataset, world, tmp_path, backend) == pytest.approx(expected, rel=TOLERANCE)
