"""The engine trains as plain torch does, on any number of processes, at any ZeRO stage and accumulation."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import start_process, wait_for
from toy import BATCH, LEARNING_RATE, Toy, batch_of, make_engine, state_of, train

from s3rec_dist.config import ConfigError, EngineConfig, FinetuneConfig, PretrainConfig
from s3rec_dist.training import checkpoint
from s3rec_dist.training.engine import World, deepspeed_config, learning_rate

ALONE = World(0, 0, 1, torch.device("cpu"))


def plain_torch(steps: int, clipping: float = 0.0) -> list[list[float]]:
    """[loss, gradient norm] of Adam on the mean loss of the global batch."""
    model = Toy()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    curve = []
    for step in range(steps):
        loss = model.losses(batch_of(step), None).total / BATCH
        optimizer.zero_grad()
        loss.backward()
        used = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(used, clipping or math.inf)
        optimizer.step()
        curve.append([loss.item(), norm.item()])
    return curve


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("accumulation", [1, 3])
def test_alone_it_trains_as_torch_does(world: World, stage: int, accumulation: int) -> None:
    engine = make_engine(world, stage=stage, accumulation=accumulation)
    curve = train(engine, range(8), accumulation=accumulation, with_norm=True)
    torch.testing.assert_close(curve, plain_torch(8), rtol=1e-5, atol=0)
    engine.close()


@pytest.mark.parametrize("stage", range(4))
def test_gradients_are_clipped_by_their_global_norm(world: World, stage: int) -> None:
    engine = make_engine(world, stage=stage, gradient_clipping=0.05)
    curve = train(engine, range(8), with_norm=True)
    torch.testing.assert_close(curve, plain_torch(8, clipping=0.05), rtol=1e-4, atol=0)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_zero_stages_and_accumulation_do_not_change_the_curve(
    toy_result: Callable[..., Any], ranks: int
) -> None:
    curves = toy_result(ranks, "curves")
    assert len(curves) == 12
    for name, curve in curves.items():
        expected = plain_torch(12, clipping=0.05 if name.startswith("clipped") else 0.0)
        torch.testing.assert_close(curve, expected, rtol=1e-5, atol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_a_failure_on_one_rank_is_raised_on_all(toy_result: Callable[..., Any]) -> None:
    found = toy_result(2, "failures")
    assert found["together"] == ["ValueError: rank 1 has no luck"] * 2
    assert found["on_rank_zero"] == ["ValueError: rank 0 has no luck"] * 2
    assert found["result"] == [0, 0]


def test_bf16_is_close_to_fp32_and_the_same_at_every_stage(world: World) -> None:
    curves = []
    for stage in range(4):
        engine = make_engine(world, stage=stage, precision="bf16")
        curves.append(train(engine, range(8), with_norm=True))
        weights = engine.fp32_weights()
        assert all(w.dtype == torch.float32 for w in weights.values())
        assert not torch.equal(weights["layer.weight"], weights["layer.weight"].bfloat16().float()), "not the masters"
        engine.close()
    for curve in curves:
        torch.testing.assert_close(curve, curves[1], rtol=1e-3, atol=0)
        torch.testing.assert_close(curve, plain_torch(8), rtol=3e-2, atol=0)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_weights_come_out_of_every_stage(world: World, stage: int, precision: str) -> None:
    engine = make_engine(world, stage=stage, precision=precision)
    train(engine, range(5))
    weights = engine.fp32_weights()
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in Toy().state_dict().items()}
    whole = engine.whole_model(Toy)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, weights[name])
    before = whole.losses(batch_of(99), None).total.item()
    after_more = train(engine, range(5, 7))
    assert engine.whole_model(Toy).losses(batch_of(99), None).total.item() != before
    assert all(math.isfinite(loss) for loss, _ in after_more)
    engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
)
def test_offload_changes_neither_the_curve_nor_a_checkpoint(
    world: World, tmp_path: Path, stage: int, offload: Any, precision: Any
) -> None:
    """A run may also go on without it, in another stage."""
    usual = make_engine(world, stage=stage, precision=precision)
    expected = train(usual, range(8))
    usual.close()
    engine = make_engine(world, stage=stage, precision=precision, offload=offload)
    assert engine._deepspeed.zero_offload_optimizer().device == "cpu"
    assert (engine._deepspeed.zero_offload_param() is not None) == (offload == "parameters")
    curve = train(engine, range(5))
    checkpoint.Saver(engine, tmp_path).save(state_of(engine, 5), keep=1)
    engine.close()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    for changes in ({"stage": stage, "offload": offload}, {"stage": 2}):
        again = make_engine(world, precision=precision, **changes)
        checkpoint.load(again, found)
        assert curve + train(again, range(5, 8)) == expected
        again.close()


def test_the_number_of_micro_batches_is_checked(world: World) -> None:
    engine = make_engine(world, accumulation=2)
    with pytest.raises(ValueError, match="expected 2 micro-batches, got 1"):
        engine.step([batch_of(0)], count=BATCH, learning_rate=0.1)
    engine.close()


@pytest.mark.slow
def test_without_a_launcher_it_is_a_world_of_one_and_says_nothing() -> None:
    code = (
        "from s3rec_dist.config import EngineConfig\nfrom s3rec_dist.training.engine import start\n"
        "from toy import make_engine, train\n"
        "world = start(EngineConfig(device='cpu'))\nassert (world.rank, world.size) == (0, 1)\n"
        "engine = make_engine(world, stage=3)\ntrain(engine, range(2))\nengine.close()"
    )
    bare = {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[2])))}
    assert wait_for([start_process([sys.executable, "-c", code], bare)], 60) == [""]


@given(
    step=st.integers(0, 200),
    total=st.integers(1, 200),
    warmup=st.integers(0, 50),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_the_learning_rate_lies_between_zero_and_its_peak(step: int, total: int, warmup: int, schedule: Any) -> None:
    stage = PretrainConfig(learning_rate=0.5, warmup_steps=warmup, schedule=schedule)
    assert 0 <= learning_rate(stage, step, total) <= 0.5


def test_learning_rate_schedules() -> None:
    def rates(schedule: Any, warmup: int = 0) -> list[float]:
        stage = PretrainConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)
        return [round(learning_rate(stage, step, 8), 4) for step in range(8)]

    assert rates("constant") == [1.0] * 8
    assert rates("constant", warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates("linear", warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates("linear") == [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates("cosine", warmup=4)[4:] == [1.0, 0.8536, 0.5, 0.1464]


def json_file(folder: Path, tree: Any) -> str:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(tree))
    return str(path)


def test_settings_of_ones_own_are_merged_in(tmp_path: Path) -> None:
    theirs = {
        "train_batch_size": "auto",
        "gradient_clipping": 1,
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000, "allgather_bucket_size": "auto"},
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": "auto"}},
        "wall_clock_breakdown": False,
    }
    stage = FinetuneConfig(batch_size=30, gradient_accumulation=3, gradient_clipping=1.0)
    config = EngineConfig(zero_stage=2, deepspeed_config=json_file(tmp_path, theirs))
    merged, precision = deepspeed_config(stage, config, ALONE)
    assert precision == "fp32"
    assert merged["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert merged["train_micro_batch_size_per_gpu"] == 10 and merged["gradient_accumulation_steps"] == 3
    assert merged["gradient_clipping"] == 1.0 and "optimizer" not in merged and "wall_clock_breakdown" in merged


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"train_batch_size": 128}, ["train_batch_size=128", "pretrain.batch_size, which is 256"]),
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu=8", "256"]),
        ({"gradient_accumulation_steps": 4}, ["=4", "pretrain.gradient_accumulation, which is 1"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0", "pretrain.gradient_clipping, which is 0.0"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage=3", "engine.zero_stage, which is 0"]),
        ({"optimizer": {"type": "AdamW"}}, ["optimizer.type='AdamW'", "'Adam'"]),
        ({"optimizer": {"params": {"lr": 0.1}}}, ["optimizer.params.lr=0.1", "pretrain.learning_rate, which is 0.001"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["pretrain.schedule=constant", "pretrain.warmup_steps"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast", "engine.precision"]),
        ({"zero_optimization": {"round_robin_gradients": True}}, ["round_robin_gradients=True", "which is False here"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ["offload_optimizer to nvme", "use cpu"]),
        ({"fp16": {"enabled": True}}, ["fp16 does not run on CPU"]),
    ],
)
def test_a_contradiction_names_the_file_both_values_and_the_setting(
    tmp_path: Path, theirs: dict[str, Any], words: list[str]
) -> None:
    config = EngineConfig(deepspeed_config=json_file(tmp_path, theirs))
    with pytest.raises(ConfigError) as error:
        deepspeed_config(PretrainConfig(), config, ALONE)
    assert all(word in str(error.value) for word in words), error.value


def test_a_precision_that_is_set_contradicts_another(tmp_path: Path) -> None:
    path = json_file(tmp_path, {"bf16": {"enabled": True}})
    assert deepspeed_config(PretrainConfig(), EngineConfig(deepspeed_config=path), ALONE)[1] == "bf16"
    with pytest.raises(ConfigError, match=r"bf16\.enabled=True contradicts engine\.precision=bf16, which is False"):
        deepspeed_config(PretrainConfig(), EngineConfig(precision="fp32", deepspeed_config=path), ALONE)


def test_the_shipped_deepspeed_files_are_accepted(repository: Path) -> None:
    for path in (repository / "configs" / "deepspeed").glob("*.json"):
        stage = json.loads(path.read_text())["zero_optimization"]["stage"]
        deepspeed_config(PretrainConfig(), EngineConfig(zero_stage=stage, deepspeed_config=str(path)), ALONE)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not valid JSON"), ("[1]", "expected a JSON object"), (None, "cannot read")]
)
def test_a_deepspeed_file_that_is_none_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "deepspeed.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        deepspeed_config(PretrainConfig(), EngineConfig(deepspeed_config=str(path)), ALONE)


def test_what_deepspeed_refuses_is_a_config_error(world: World, tmp_path: Path) -> None:
    path = json_file(tmp_path, {"zero_optimization": {"reduce_bucket_size": -1}})
    from s3rec_dist.training.engine import Engine

    with pytest.raises(ConfigError, match="DeepSpeed does not accept it"):
        Engine(Toy(), Toy.losses, PretrainConfig(), EngineConfig(device="cpu", deepspeed_config=path), world)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from s3rec_dist.training.engine import start

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU"):
        start(EngineConfig(device="cuda"))
