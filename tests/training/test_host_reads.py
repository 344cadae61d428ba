"""A step leaves a GPU to itself: the host reads nothing of what it computes, and so never waits for it.

Tensors of the device ``meta`` have sizes and no data, so that reading any raises; what is on the way to a GPU takes the
same path on them. DeepSpeed, which does not run on them, is watched on the CPU instead.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from runs import make_config, make_dataset
from torch.utils._python_dispatch import TorchDispatchMode
from toy import BATCH, LEARNING_RATE, batch_of, make_engine

from s3rec_dist.bench.step import Steps, without_host_waits
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.kernels import backends
from s3rec_dist.training.engine import World, start
from s3rec_dist.training.loop import Task

META = torch.device("meta")

LOSSES: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "finetune": {},
    "finetune bpr": {"finetune__loss": "bpr"},
    "finetune sampled_ce in_batch": {"finetune__loss": "sampled_ce", "finetune__negative_sampling": "in_batch"},
    "finetune ce, last positions": {"finetune__loss": "ce", "finetune__positions": "last"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder)
    return Dataset.open(str(folder / "dataset"))


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("name", LOSSES)
def test_batch_losses_and_gradients_are_made_without_a_host_read(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, backend: str
) -> None:
    if backend == "triton":
        monkeypatch.setattr(backends, "_triton_obstacle", lambda *_: None)
    stage = cast(Any, name.split()[0])
    config = make_config(Path(dataset.path), tmp_path, model__hidden_size=32, **LOSSES[name])
    task = Task(config, stage, dataset, META)
    model = task.model().to(META)
    stream = task.stream(World(0, 0, 1, META))
    packed = next(stream.iterate(0))
    stream.close()
    with backends.forced_backend(backend):
        for batch in task.batches(packed, 0, cast(Any, SimpleNamespace(world=World(0, 0, 1, META)))):
            losses = task.losses(model, batch, task.dropout_seed(3))
            (losses.total / task.count(packed)).backward()
    assert {parameter.grad.device for parameter in model.parameters() if parameter.grad is not None} == {META}
    assert all(term.device == META for term in losses.terms.values())


class HostReads(TorchDispatchMode):
    """Counts operators whose result depends on what tensors hold, or that give it to the host."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += name in self.READS or by_mask
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("clipping", [0.0, 0.05])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_the_engine_reads_nothing_at_stage_0_and_at_others_only_whether_it_is_finite(
    world: World, precision: str, stage: int, clipping: float
) -> None:
    engine = make_engine(world, stage=stage, precision=precision, gradient_clipping=clipping)
    for step in (0, 1):  # stage 3 learns the order of modules from these
        engine.step([batch_of(step)], count=BATCH, learning_rate=LEARNING_RATE)
    with HostReads() as reads:
        result = engine.step([batch_of(2)], count=BATCH, learning_rate=LEARNING_RATE)
    adam = getattr(engine._deepspeed.optimizer, "optimizer", engine._deepspeed.optimizer)
    assert [group["fused"] for group in adam.param_groups] == [True] * len(adam.param_groups)
    engine.close()
    assert result.gradient_norm is None
    assert reads.count <= (0 if stage == 0 else 3)


def test_host_reads_are_counted() -> None:
    x = torch.ones(3)
    with HostReads() as reads:
        x.sum().item()
        (x > 0).nonzero()
        x[x > 0]
    assert reads.count == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", LOSSES)
def test_on_a_gpu_nothing_waits_for_a_step(dataset: Dataset, tmp_path: Path, name: str, precision: str) -> None:
    options = {"engine__device": "cuda", "engine__precision": precision, "model__hidden_size": 32, **LOSSES[name]}
    config = make_config(Path(dataset.path), tmp_path, **options)
    training = Steps(config, cast(Any, name.split()[0]), dataset, start(config.engine))
    training.run(2)
    with without_host_waits(training):
        training.run(3)
    training.close()
