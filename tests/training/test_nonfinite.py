"""Losses, gradients and weights that are not finite numbers: skipped on all ranks, counted, rewound, never saved."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from runs import curve, events, make_config, metrics, run, weights
from toy import BATCH, LEARNING_RATE, batch_of, breaking_losses, make_engine
from toy import skips as all_skips

from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.training import checkpoint, loop
from s3rec_dist.training import engine as engine_module
from s3rec_dist.training.engine import World
from s3rec_dist.training.loop import TrainingError
from s3rec_dist.training.nonfinite import Diverged, Launched, Skips


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("pretrain", make_config(dataset, tmp_path_factory.mktemp("undisturbed")))


def test_a_skipped_step_changes_nothing(world: World) -> None:
    assert set(map(str, all_skips(world).values())) == {"[[True, True, True]]"}


@pytest.mark.slow
def test_a_step_that_breaks_on_one_rank_is_skipped_on_all(toy_result: Callable[..., Any]) -> None:
    for name, ranks in toy_result(2, "skips").items():
        assert ranks == [[True, True, True]] * 2, name


def test_fp16_lowers_its_loss_scale_first_and_keeps_skipping_at_the_lowest(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, which can do the arithmetic, slowly."""
    monkeypatch.setattr(engine_module, "_resolve_precision", lambda *arguments: "fp16")
    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
    engine = make_engine(world, stage=1, losses=breaking_losses)
    skips = Skips(engine, limit=3)
    before = engine.fp32_weights()
    for step in range(30):
        result = engine.step([("loss", batch_of(step))], count=BATCH, learning_rate=LEARNING_RATE)
        launched = Launched(step, result, BATCH)
        assert launched.was_skipped()
        facts = skips.add(launched)
        if skips.in_a_row == 3:
            break
    assert step == 18 and not engine.loss_scale_may_fall  # 2 ** 16 has fallen to 1, without DeepSpeed's exception
    with pytest.raises(Diverged, match=r"the last 3 steps were skipped.*loss, square on rank 0"):
        skips.check(facts)
    assert all(torch.equal(value, before[name]) for name, value in engine.fp32_weights().items())
    result = engine.step([("", batch_of(0))], count=BATCH, learning_rate=LEARNING_RATE)
    assert not Launched(0, result, BATCH).was_skipped()
    assert not torch.equal(engine.fp32_weights()["layer.weight"], before["layer.weight"])
    engine.close()


@contextlib.contextmanager
def struck_at(*steps: int) -> Iterator[None]:
    """Within this block a weight becomes infinite before these steps, each time once."""
    left, model = list(steps), []
    rate, make = loop.learning_rate, loop.Task.model

    def made(self: loop.Task) -> S3Rec:
        model[:] = [make(self)]
        return model[0]

    def strike(stage: Any, step: int, total: int) -> float:
        if step in left:
            left.remove(step)
            with torch.no_grad():
                model[0].position_embedding.weight[-1, 0] = math.inf
        return rate(stage, step, total)

    with mock.patch.object(loop.Task, "model", made), mock.patch.object(loop, "learning_rate", strike):
        yield


@pytest.mark.parametrize("zero", [0, 1])
def test_a_run_goes_back_to_its_checkpoint_and_is_the_same_in_the_end(
    dataset: Path, undisturbed: Path, tmp_path: Path, zero: int
) -> None:
    config = make_config(dataset, tmp_path, pretrain__max_skipped_steps=3, engine__zero_stage=zero)
    with struck_at(20, 50):  # the second one is the last step, whose weights are about to be saved
        folder = run("pretrain", config)
    found = events(folder, "skipped_step")
    assert [event["step"] for event in found] == [21, 22, 23, 51]
    assert [event["in_a_row"] for event in found] == [1, 2, 3, 1]
    assert all("loss" in event["not_finite"] and "on rank 0" in event["not_finite"] for event in found)
    first, second = events(folder, "rewind")
    assert (first["to"], first["checkpoint"], second["to"]) == (17, "step-00000017", 34)
    assert "3 steps were skipped" in first["reason"] and "position_embedding.weight" in second["reason"]
    assert list(curve(folder, "train/skipped_steps").values())[-1] == 4
    assert curve(folder) == curve(undisturbed)
    assert all(torch.equal(value, weights(undisturbed)[name]) for name, value in weights(folder).items())


def test_what_diverges_again_from_the_same_checkpoint_stops_with_the_reason(dataset: Path, tmp_path: Path) -> None:
    """The losses' weights are beyond what a float holds from the second epoch on, as if the data were to blame."""
    epoch, batch = [0], loop.Task.batch

    def noted(self: loop.Task, packed: Any, now: int) -> Any:
        epoch[0] = now
        return batch(self, packed, now)

    def losses(self: loop.Task, model: S3Rec, *arguments: Any) -> Any:
        found = model.pretrain_losses(*arguments)
        huge = 1e38 if epoch[0] else 1.0
        return type(found)(found.total * huge * huge, found.terms, found.counts)

    config = make_config(dataset, tmp_path, pretrain__max_skipped_steps=2)
    with mock.patch.object(loop.Task, "batch", noted), mock.patch.object(loop.Task, "losses", losses):
        with pytest.raises(TrainingError) as error:
            run("pretrain", config)
    told = "the last 2 steps were skipped; in step 19 this was not a finite number: loss on rank 0"
    assert told in str(error.value) and "step-00000017 has led here twice" in str(error.value)
    assert "Lower the learning rate" in str(error.value)
    folder = tmp_path / "pretrain"
    assert len(events(folder, "rewind")) == len(events(folder, "diverged")) == 1
    assert metrics(folder)[-1]["status"] == "failed"
    assert set(curve(folder)) == set(range(1, 18)) and all(math.isfinite(loss) for loss in curve(folder).values())
    assert checkpoint.newest(folder / "checkpoints").state["step"] == 17

    with mock.patch.object(loop.Task, "losses", losses), pytest.raises(TrainingError, match="no checkpoint to go back"):
        run("pretrain", make_config(dataset, tmp_path / "at once", pretrain__max_skipped_steps=1))
