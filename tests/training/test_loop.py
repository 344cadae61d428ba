"""The real model through the real loop: what a run leaves behind, how it goes on, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    BATCH,
    MAX_LENGTH,
    SETTINGS,
    curve,
    died_run,
    events,
    make_config,
    make_dataset,
    metrics,
    run,
    weights,
)
from wandb_offline import read_offline_run

from s3rec_dist.config import Config, ConfigError, load_config, to_dict
from s3rec_dist.data.dataset import Dataset, DatasetError
from s3rec_dist.data.order import OrderError
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.evaluation import EvaluationResult, evaluate
from s3rec_dist.training import checkpoint, loop
from s3rec_dist.training.checkpoint import CheckpointError
from s3rec_dist.training.engine import World
from s3rec_dist.training.loop import Task, TrainingError

STAGES = ("pretrain", "finetune")
RUNS = str(Path(__file__).with_name("runs.py"))
STEPS_PER_EPOCH = {"pretrain": 17, "finetune": 10}


@pytest.fixture(scope="session")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each stage, from scratch and never stopped."""
    output = tmp_path_factory.mktemp("whole")
    return {stage: run(stage, make_config(dataset, output)) for stage in STAGES}


def state_of(folder: Path) -> dict[str, Any]:
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    return found.state


def tags(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def pointer(folder: Path, name: str) -> str:
    return (folder / "checkpoints" / name).read_text().strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def scripted(values: Iterable[float]) -> Callable[..., EvaluationResult]:
    """An evaluation that finds these MRRs, one after the other."""
    found = iter(values)
    return lambda *arguments: EvaluationResult({"MRR": next(found), "HR@5": 0.5}, 1, "scripted")


# What a run leaves behind


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_falls_and_every_number_is_in_metrics_jsonl(whole: dict[str, Path], stage: str) -> None:
    folder = whole[stage]
    steps = STEPS_PER_EPOCH[stage] * SETTINGS[stage]["epochs"]
    tasks = ["aap", "mip", "map", "sp"] if stage == "pretrain" else ["bce"]
    rows = [entry for entry in metrics(folder) if "train/loss" in entry]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert all(math.isfinite(row[f"train/{task}"]) for task in tasks)
        assert row["train/learning_rate"] == SETTINGS[stage]["learning_rate"] and row["train/gradient_norm"] > 0
        assert 0 <= row["train/data_wait"] <= 1 and row["train/memory_mb"] > 50
        assert row["train/tokens_per_second"] > row["train/samples_per_second"] > 0
        assert row["train/epoch"] == row["step"] / STEPS_PER_EPOCH[stage]
    half = len(rows) // 2
    for task in tasks:
        values = [row[f"train/{task}"] for row in rows]
        assert sum(values[half:]) < sum(values[: len(rows) - half])
    (start,) = events(folder, "start")
    assert (start["steps"], start["processes"], start["precision"]) == (steps, 1, "fp32")
    assert metrics(folder)[-1]["event"] == "end" and metrics(folder)[-1]["status"] == "finished"


def test_a_task_s_number_is_the_mean_over_its_terms_and_the_loss_the_weighted_sum_over_samples(
    dataset: Path, tmp_path: Path
) -> None:
    config = make_config(dataset, tmp_path, pretrain__epochs=1, model__hidden_dropout=0.0, model__attention_dropout=0.0)
    folder = run("pretrain", config)
    world = World(0, 0, 1, torch.device("cpu"))
    task = Task(config, "pretrain", Dataset.open(str(dataset)), world.device)
    stream = task.stream(world)
    packed = next(stream.iterate(0))
    stream.close()
    losses = task.model().pretrain_losses(task.batch(packed, 0))
    row = metrics(folder)[1]
    assert row["step"] == 1
    assert row["train/loss"] == pytest.approx(losses.total.item() / BATCH["pretrain"], rel=1e-6)
    for name, term in losses.terms.items():
        assert row[f"train/{name}"] == pytest.approx(term.item() / losses.counts[name], rel=1e-6)
    parts = {"aap": 0.2, "mip": 1.0, "map": 1.0, "sp": 0.5}
    total = sum(weight * row[f"train/{name}"] * losses.counts[name] for name, weight in parts.items())
    assert row["train/loss"] == pytest.approx(total / BATCH["pretrain"], rel=1e-6)


def test_numbers_logged_every_few_steps_cover_all_steps_since_the_last(
    dataset: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = run("finetune", make_config(dataset, tmp_path, finetune__log_every_steps=7, finetune__epochs=2))
    alone = curve(whole["finetune"])
    task = Task(make_config(dataset, tmp_path), "finetune", Dataset.open(str(dataset)), torch.device("cpu"))
    stream = task.stream(World(0, 0, 1, torch.device("cpu")))
    positions = [task.count(packed) for epoch in range(2) for packed in stream.iterate(epoch)]
    stream.close()
    found = curve(folder)
    assert list(found) == [7, 14, 20]
    for last, first in ((7, 0), (14, 7), (20, 14)):
        mean = sum(alone[i + 1] * positions[i] for i in range(first, last)) / sum(positions[first:last])
        assert found[last] == pytest.approx(mean, rel=1e-5)


def test_the_settings_are_stored_and_read_back_equal(dataset: Path, whole: dict[str, Path]) -> None:
    for stage, folder in whole.items():
        stored = load_config(folder / "config.yaml")
        assert stored == make_config(dataset, folder.parent)
        assert state_of(folder)["config"]["model"]["hidden_size"] == stored.model.hidden_size
        assert state_of(folder)["stage"] == stage


def test_an_offline_wandb_run_holds_the_numbers_of_metrics_jsonl(dataset: Path, tmp_path: Path) -> None:
    folder = run("finetune", make_config(dataset, tmp_path, finetune__epochs=2, tracking__wandb="offline"))
    recorded = read_offline_run(folder)
    rows = [entry for entry in metrics(folder) if "event" not in entry]
    assert len(rows) == 22
    for row, shown in zip(rows, recorded["history"], strict=True):
        assert {k: v for k, v in row.items() if k != "time"} == {k: v for k, v in shown.items() if k[0] != "_"}
    best = events(folder, "best")[-1]
    assert recorded["summary"]["best/value"] == best["value"] and recorded["exit"] == 0


# The same training on any number of processes


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_world_size_trains_on_the_same_samples_at_every_step(
    dataset: Path, tmp_path: Path, stage: Any, ranks: int
) -> None:
    def samples(rank: int, size: int) -> list[list[tuple[int, ...]]]:
        world = World(rank, 0, size, torch.device("cpu"))
        task = Task(make_config(dataset, tmp_path), stage, Dataset.open(str(dataset)), world.device)
        stream = task.stream(world)
        found = []
        for packed in stream.iterate(1):
            batch: Any = task.batch(packed, 1)
            own = torch.cat([batch.items, batch.negatives]).tolist()
            assert len(batch) == len(packed) and (len(own) > 0) == (len(packed) > 0)
            found.append([(key, *batch_of(packed, i)) for i, key in enumerate(batch.sample_keys.tolist())])
        stream.close()
        return found

    def batch_of(packed: Any, i: int) -> list[int]:
        return packed.items[packed.offsets[i] : packed.offsets[i + 1]].tolist()

    alone = samples(0, 1)
    shared = [samples(rank, ranks) for rank in range(ranks)]
    assert len(alone) == STEPS_PER_EPOCH[stage]
    for step, expected in enumerate(alone):
        assert sorted(sample for own in shared for sample in own[step]) == sorted(expected)
    assert len(alone[-1]) == 1, "the dataset should leave one sample to the last batch"
    assert sum(bool(own[-1]) for own in shared) == 1


def two_process_runs(dataset: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Every run of two processes, by name: one launch does them all."""
    jobs: dict[str, dict[str, Any]] = {}

    def add(name: str, stage: str, dies_before: int | None = None, folder: str = "", **changes: Any) -> None:
        jobs[name] = job(stage, make_config(dataset, output / (folder or name), **changes), dies_before=dies_before)

    for stage in STAGES:
        part = STEPS_PER_EPOCH[stage]
        middle = 2 * part + part // 2
        for zero in range(4):
            options = {"engine__zero_stage": zero}
            add(f"{stage} {zero}", stage, **options)
            stopped = {f"{stage}__checkpoint_every_steps": 12, **options}
            add(f"{stage} {zero} stopped", stage, middle, f"{stage} {zero} resumed", **stopped)
            add(f"{stage} {zero} resumed", stage, None, **stopped)
            short = {f"{stage}__epochs": 1, **options}
            parts = {f"{stage}__gradient_accumulation": 3, f"{stage}__gradient_clipping": 0.4}
            add(f"{stage} {zero} in parts", stage, **parts, **short)
            add(f"{stage} {zero} bf16", stage, engine__precision="bf16", **short)
    add("half", "pretrain", 20, pretrain__checkpoint_every_steps=3)
    add("other half", "pretrain")  # test_another_world_size... has begun it
    add("streams", "pretrain", data__streams=1)
    add("not pretrained", "finetune", finetune__pretrained="auto")
    add("changed", "pretrain", data__path=str(output / "changed dataset"))
    add("unread", "finetune", data__path=str(output / "missing shard"))
    return jobs


@pytest.fixture(scope="session")
def pair(
    dataset: Path, launch: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[str]]]:
    """Where each run of two processes is, and what each process raised."""
    output = tmp_path_factory.mktemp("pair")
    jobs = two_process_runs(dataset, output)
    died_run("pretrain", make_config(dataset, output / "other half", pretrain__checkpoint_every_steps=3), 20)
    for name in ("changed dataset", "missing shard"):
        shutil.copytree(dataset, output / name)
    damage(output / "changed dataset" / "shards" / "00001.parquet")
    (output / "missing shard" / "shards" / "00001.parquet").unlink()
    (output / "jobs.json").write_text(json.dumps(jobs))
    printed = launch(2, [RUNS, str(output / "jobs.json")], timeout=280)[0]
    line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
    return output, json.loads(line.removeprefix("RESULT "))


def job(stage: str, config: Config, **how: Any) -> dict[str, Any]:
    """A run for runs.py."""
    return {"stage": stage, "config": to_dict(config), **how}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def assert_close(found: dict[int, float], expected: dict[int, float], relative: float) -> None:
    assert found.keys() == expected.keys()
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert worst <= relative, f"relative deviation {worst:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_does_at_every_zero_stage(
    pair: tuple[Path, dict[str, list[str]]], whole: dict[str, Path], stage: str, zero: int
) -> None:
    output, errors = pair
    assert errors[f"{stage} {zero}"] == ["", ""]
    folder = output / f"{stage} {zero}" / stage
    assert len(curve(folder)) > 50
    assert_close(curve(folder), curve(whole[stage]), 1e-5)
    assert_close(curve(folder, "train/gradient_norm"), curve(whole[stage], "train/gradient_norm"), 1e-5)
    if stage == "finetune":
        assert_close(curve(folder, "validation/MRR"), curve(whole[stage], "validation/MRR"), 1e-5)
    expected = weights(whole[stage])
    for name, value in weights(folder).items():
        torch.testing.assert_close(meaningful(name, value), meaningful(name, expected[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", range(4))
def test_activation_checkpointing_trains_the_same_at_every_zero_stage(
    dataset: Path, whole: dict[str, Path], tmp_path: Path, zero: int
) -> None:
    changes = {"finetune__epochs": 1, "model__activation_checkpointing": True, "engine__zero_stage": zero}
    found = curve(run("finetune", make_config(dataset, tmp_path, **changes)))
    assert len(found) == STEPS_PER_EPOCH["finetune"]
    assert_close(found, {step: loss for step, loss in curve(whole["finetune"]).items() if step in found}, 1e-6)


def meaningful(name: str, value: torch.Tensor) -> torch.Tensor:
    """All but the keys' bias: it cancels in the softmax, so that its gradient is rounding alone."""
    return value.view(3, -1)[[0, 2]] if name.endswith("qkv.bias") else value


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_and_clipping_do_not_depend_on_the_processes(
    pair: tuple[Path, dict[str, list[str]]], dataset: Path, tmp_path: Path, stage: str, zero: int
) -> None:
    output, errors = pair
    assert errors[f"{stage} {zero} in parts"] == ["", ""]
    clipped = {f"{stage}__epochs": 1, f"{stage}__gradient_clipping": 0.4}
    alone = run(stage, make_config(dataset, tmp_path, **clipped))
    norms = curve(alone, "train/gradient_norm")
    assert any(norm > 0.4 for norm in norms.values()), "nothing to clip"
    folder = output / f"{stage} {zero} in parts" / stage
    assert_close(curve(folder), curve(alone), 1e-5)
    assert_close(curve(folder, "train/gradient_norm"), norms, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_close_to_fp32_at_every_zero_stage(
    pair: tuple[Path, dict[str, list[str]]], whole: dict[str, Path], stage: str, zero: int
) -> None:
    output, errors = pair
    assert errors[f"{stage} {zero} bf16"] == ["", ""]
    folder = output / f"{stage} {zero} bf16" / stage
    part = {step: loss for step, loss in curve(whole[stage]).items() if step <= STEPS_PER_EPOCH[stage]}
    assert_close(curve(folder), part, 2e-3)
    assert all(value.dtype == torch.float32 for value in weights(folder).values())


@pytest.mark.slow
def test_four_processes_train_as_one_does(
    dataset: Path, whole: dict[str, Path], launch: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = make_config(dataset, tmp_path, engine__zero_stage=2, pretrain__epochs=1)
    (tmp_path / "jobs.json").write_text(json.dumps({"one": job("pretrain", config)}))
    launch(4, [RUNS, str(tmp_path / "jobs.json")])
    found = curve(tmp_path / "pretrain")
    assert_close(found, {step: curve(whole["pretrain"])[step] for step in range(1, 18)}, 1e-5)


# Going on


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("within_epoch", [0, 9])
def test_a_run_that_died_goes_on_bit_by_bit(
    dataset: Path, whole: dict[str, Path], tmp_path: Path, stage: str, zero: int, within_epoch: int
) -> None:
    config = make_config(dataset, tmp_path, engine__zero_stage=zero, **{f"{stage}__checkpoint_every_steps": 4})
    died = 2 * STEPS_PER_EPOCH[stage] + within_epoch
    folder = died_run(stage, config, died)
    last = died - (died % 4 if within_epoch else 0)
    assert state_of(folder)["step"] == last and metrics(folder)[-1]["status"] == "failed"
    run(stage, config)
    assert [event["step"] for event in events(folder, "resume")] == [last]
    for name in ("train/loss", "train/gradient_norm") if zero == 0 else ("train/loss",):
        assert curve(folder, name) == curve(whole[stage], name)
    assert curve(folder, "validation/MRR") == curve(whole[stage], "validation/MRR")
    assert_same_weights(folder, whole[stage])
    for key in ("best", "since_best", "step", "epoch", "metrics"):
        assert state_of(folder)[key] == state_of(whole[stage])[key]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_process_goes_on_bit_by_bit(
    dataset: Path, whole: dict[str, Path], launch: Callable[..., list[str]], tmp_path: Path, stage: str
) -> None:
    config = make_config(dataset, tmp_path, **{f"{stage}__checkpoint_every_steps": 3})
    (tmp_path / "jobs.json").write_text(json.dumps({"killed": job(stage, config, dies_before=25, by="SIGKILL")}))
    launch(1, [RUNS, str(tmp_path / "jobs.json")], expect=-9)
    assert state_of(tmp_path / stage)["step"] in (21, 24)  # the last save may not have come to its end
    assert "end" not in {e.get("event") for e in metrics(tmp_path / stage)}
    folder = run(stage, config)
    assert curve(folder) == curve(whole[stage])
    assert_same_weights(folder, whole[stage])


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_that_died_go_on_bit_by_bit(
    pair: tuple[Path, dict[str, list[str]]], stage: str, zero: int
) -> None:
    output, errors = pair
    assert all(error.startswith("Died") for error in errors[f"{stage} {zero} stopped"])
    assert errors[f"{stage} {zero} resumed"] == ["", ""]
    resumed, expected = output / f"{stage} {zero} resumed" / stage, output / f"{stage} {zero}" / stage
    assert len(events(resumed, "resume")) == 1
    assert curve(resumed) == curve(expected)
    assert_same_weights(resumed, expected)


@pytest.mark.slow
def test_without_zero_a_run_goes_on_with_more_or_fewer_processes(
    pair: tuple[Path, dict[str, list[str]]], dataset: Path, whole: dict[str, Path]
) -> None:
    output, errors = pair
    assert errors["other half"] == ["", ""]
    run("pretrain", make_config(dataset, output / "half"))
    for name, processes in (("half", [2, 1]), ("other half", [1, 2])):
        folder = output / name / "pretrain"
        assert [event["processes"] for event in events(folder, "start")] == processes
        assert [event["step"] for event in events(folder, "resume")] == [18]
        assert_close(curve(folder), curve(whole["pretrain"]), 1e-5)


WORLDS, DEATHS = (1, 2, 4, 2), (8, 14, 26, None)
"""The processes of each part of a run, and the step before which it dies, always in mid-epoch."""
CHAINS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    **{f"zero {zero}": ("pretrain", "fp32", (zero,) * 4) for zero in (1, 2, 3)},
    "stages": ("pretrain", "fp32", (0, 1, 3, 0)),
    "stages, fine-tuning": ("finetune", "fp32", (3, 0, 2, 1)),
    "stages, bf16": ("pretrain", "bf16", (0, 1, 3, 0)),
    "zero 2, bf16": ("finetune", "bf16", (2,) * 4),
}
"""Stage, precision, and the ZeRO stage of each part."""


@pytest.fixture(scope="session")
def chains(dataset: Path, launch: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that go from 1 to 2, 4 and 2 processes."""
    output = tmp_path_factory.mktemp("chains")
    for part, (ranks, dies_before) in enumerate(zip(WORLDS, DEATHS, strict=True)):
        jobs = {}
        for name, (stage, precision, zeros) in CHAINS.items():
            changes = {f"{stage}__epochs": 2 if stage == "pretrain" else 3, f"{stage}__checkpoint_every_steps": 3}
            changes |= {"engine__zero_stage": zeros[part], "engine__precision": precision}
            config, ledger = make_config(dataset, output / name, **changes), str(output / f"{name} {part}")
            jobs[name] = job(stage, config, dies_before=dies_before, ledger=ledger)
        (output / "jobs.json").write_text(json.dumps(jobs))
        printed = launch(ranks, [RUNS, str(output / "jobs.json")])[0]
        line = next(line for line in printed.splitlines() if line.startswith("RESULT "))
        expected = f"Died: before step {dies_before}" if dies_before else ""
        assert json.loads(line.removeprefix("RESULT ")) == {name: [expected] * ranks for name in CHAINS}
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_a_run_goes_on_with_any_number_of_processes_and_any_zero_stage(
    chains: Path, dataset: Path, whole: dict[str, Path], tmp_path: Path, name: str
) -> None:
    stage, precision, zeros = CHAINS[name]
    folder = chains / name / stage
    assert [event["step"] for event in events(folder, "resume")] == [6, 12, 24]
    saved_by = [f"{ranks} processes with engine.zero_stage={zero}" for ranks, zero in zip(WORLDS, zeros, strict=True)]
    uncut = [a == b == 0 for a, b in itertools.pairwise(zeros)]
    told = [event.get("saved_by") for event in events(folder, "resume")]
    assert told == [None if same else text for text, same in zip(saved_by, uncut, strict=False)]
    assert [(e["processes"], e["zero_stage"]) for e in events(folder, "start")] == list(zip(WORLDS, zeros, strict=True))
    undisturbed = whole[stage]
    if precision == "bf16":
        undisturbed = run(stage, make_config(dataset, tmp_path, engine__precision="bf16", engine__zero_stage=zeros[0]))
    expected = {step: loss for step, loss in curve(undisturbed).items() if step in curve(folder)}
    assert len(expected) == (34 if stage == "pretrain" else 30)
    assert_close(curve(folder), expected, 1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHAINS if name.startswith("zero")])
def test_a_run_on_changing_processes_trains_on_every_sample_once_an_epoch(
    chains: Path, dataset: Path, tmp_path: Path, name: str
) -> None:
    found: dict[int, list[int]] = {}
    for part, ranks in enumerate(WORLDS):
        steps: dict[int, list[int]] = {}
        for rank in range(ranks):
            for line in (chains / f"{name} {part}-{rank}").read_text().splitlines():
                step, keys = json.loads(line)
                steps.setdefault(step, []).extend(keys)
        found |= steps  # those that a part before had done without saving are done again
    stage = CHAINS[name][0]
    device = torch.device("cpu")
    task = Task(make_config(dataset, tmp_path), stage, Dataset.open(str(dataset)), device)  # type: ignore[arg-type]
    stream = task.stream(World(0, 0, 1, device))
    expected = []
    for epoch in range(2 if stage == "pretrain" else 3):
        batches = [task.batch(packed, epoch).sample_keys.tolist() for packed in stream.iterate(epoch)]
        keys = [key for batch in batches for key in batch]
        assert len(set(keys)) == len(keys) == stream.samples_per_epoch
        expected += batches
    stream.close()
    assert {step: sorted(keys) for step, keys in found.items()} == dict(enumerate(map(sorted, expected)))


def test_a_finished_run_that_is_started_again_changes_nothing(
    dataset: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    for stage in STAGES:
        folder = tmp_path / stage
        shutil.copytree(whole[stage], folder)
        before = contents(folder / "checkpoints")
        run(stage, make_config(dataset, tmp_path))
        assert contents(folder / "checkpoints") == before
        assert curve(folder) == curve(whole[stage])


def test_more_epochs_go_on_from_a_finished_run(dataset: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    run("pretrain", make_config(dataset, tmp_path, pretrain__epochs=2))
    folder = run("pretrain", make_config(dataset, tmp_path))
    assert curve(folder) == curve(whole["pretrain"])
    assert_same_weights(folder, whole["pretrain"])


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    dataset: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(dataset, tmp_path, pretrain__checkpoint_every_steps=5)
    folder = died_run("pretrain", config, 26)
    damage(folder / "checkpoints" / "step-00000025" / "model.safetensors")
    run("pretrain", config)
    (event,) = events(folder, "damaged_checkpoint")
    assert "step-00000025/model.safetensors" in event["reason"] and event["used"] == "step-00000020"
    assert curve(folder) == curve(whole["pretrain"])


@pytest.mark.parametrize("steps", [0, 5])
def test_checkpoints_are_written_every_few_steps_and_epochs(dataset: Path, tmp_path: Path, steps: int) -> None:
    settings = {"checkpoint_every_epochs": 2, "checkpoint_every_steps": steps, "epochs": 3, "keep_checkpoints": 99}
    folder = run("pretrain", make_config(dataset, tmp_path, **{f"pretrain__{k}": v for k, v in settings.items()}))
    due = {34, 51} | set(range(5, 51, 5) if steps else ())
    assert tags(folder) == [f"step-{step:08d}" for step in sorted(due)]
    assert pointer(folder, "latest") == "step-00000051"


def test_checkpoints_every_few_steps_include_an_epoch_s_last(dataset: Path, tmp_path: Path) -> None:
    settings = {"checkpoint_every_epochs": 99, "checkpoint_every_steps": 17, "epochs": 3, "keep_checkpoints": 99}
    folder = run("pretrain", make_config(dataset, tmp_path, **{f"pretrain__{k}": v for k, v in settings.items()}))
    assert tags(folder) == [f"step-{step:08d}" for step in (17, 34, 51)]


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        ("pretrain", {"pretrain__learning_rate": 0.1}, "pretrain.learning_rate was 0.003, is 0.1"),
        ("pretrain", {"pretrain__mask_ratio": 0.5}, "pretrain.mask_ratio was 0.2, is 0.5"),
        ("pretrain", {"seed": 7}, "seed was 42, is 7"),
        ("pretrain", {"data__shuffle_window": 9}, "data.shuffle_window was 8192, is 9"),
        ("pretrain", {"model__hidden_size": 32}, "model.hidden_size was 16, is 32"),
        ("finetune", {"finetune__loss": "ce"}, "finetune.loss was 'bce', is 'ce'"),
        ("finetune", {"finetune__pretrained": "auto"}, "finetune.pretrained was 'none', is 'auto'"),
        ("finetune", {"evaluation__protocol": "sampled"}, "evaluation.protocol was 'full', is 'sampled'"),
        ("pretrain", {"engine__precision": "bf16"}, "precision fp32, this run has bf16"),
    ],
)
def test_other_settings_do_not_go_on_from_a_run(
    dataset: Path, whole: dict[str, Path], tmp_path: Path, stage: str, change: dict[str, Any], words: str
) -> None:
    shutil.copytree(whole[stage], tmp_path / stage)
    before = contents(tmp_path / stage / "checkpoints")
    with pytest.raises(CheckpointError) as error:
        run(stage, make_config(dataset, tmp_path, **change))
    assert words in str(error.value) and "--no_resume" in str(error.value)
    assert contents(tmp_path / stage / "checkpoints") == before


def test_a_schedule_that_falls_over_the_epochs_fixes_their_number(dataset: Path, tmp_path: Path) -> None:
    falling = {"pretrain__schedule": "linear", "pretrain__warmup_steps": 4}
    folder = run("pretrain", make_config(dataset, tmp_path, pretrain__epochs=1, **falling))
    rates = curve(folder, "train/learning_rate")
    assert rates[1] == pytest.approx(0.003 / 4) and rates[4] == rates[5] == 0.003 and rates[17] < 0.0005
    with pytest.raises(CheckpointError, match=r"pretrain\.epochs was 1, is 2"):
        run("pretrain", make_config(dataset, tmp_path, pretrain__epochs=2, **falling))


def test_settings_that_change_no_step_may_change(dataset: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    died_run("finetune", make_config(dataset, tmp_path, finetune__checkpoint_every_steps=2), 25)
    changes = {"finetune__patience": 99, "finetune__keep_checkpoints": 5, "evaluation__batch_users": 7}
    changes |= {"data__prefetch_threads": 1, "data__cache_mb": 0}
    folder = run("finetune", make_config(dataset, tmp_path, **changes))
    assert curve(folder) == curve(whole["finetune"])
    assert load_config(folder / "config.yaml").finetune.patience == 99


def test_no_resume_moves_the_old_run_aside(dataset: Path, tmp_path: Path) -> None:
    one = {"pretrain__epochs": 1}
    folder = run("pretrain", make_config(dataset, tmp_path, **one))
    first = contents(folder)
    run("pretrain", make_config(dataset, tmp_path, seed=1, **one), resume=False)
    run("pretrain", make_config(dataset, tmp_path, seed=2, **one), resume=False)
    assert contents(tmp_path / "pretrain.1") == first
    assert [state_of(tmp_path / f"pretrain{suffix}")["config"]["seed"] for suffix in ("", ".1", ".2")] == [2, 42, 1]
    assert not events(folder, "resume")


def test_no_resume_leaves_the_old_run_where_the_new_one_cannot_start(
    dataset: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(whole["finetune"], tmp_path / "finetune")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        run("finetune", make_config(dataset, tmp_path, finetune__pretrained="auto"), resume=False)
    assert contents(tmp_path) == before


# Early stopping


@pytest.mark.parametrize(
    ("patience", "values", "epochs", "best"),
    [
        (2, [0.1, 0.3, 0.2, 0.25, 0.4, 0.5], 4, 2),
        (3, [0.1, 0.3, 0.2, 0.25, 0.4, 0.5], 6, 6),
        (1, [0.1, 0.1, 0.2, 0.3, 0.4, 0.5], 2, 1),
        (0, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1], 6, 1),
    ],
)
def test_training_stops_after_as_many_validations_without_improvement_as_patience_says(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patience: int,
    values: list[float],
    epochs: int,
    best: int,
) -> None:
    monkeypatch.setattr(loop, "evaluate", scripted(values))
    config = make_config(dataset, tmp_path, finetune__patience=patience, finetune__keep_checkpoints=1)
    folder = run("finetune", config)
    state = state_of(folder)
    assert state["epoch"] == epochs
    assert (state["best"]["epoch"], state["best"]["value"]) == (best, values[best - 1])
    assert pointer(folder, "best") == f"step-{10 * best:08d}" and pointer(folder, "latest") == f"step-{10 * epochs:08d}"
    assert tags(folder) == sorted({f"step-{10 * best:08d}", f"step-{10 * epochs:08d}"})
    assert len(events(folder, "early_stop")) == (epochs < 6)
    run("finetune", config)  # there is nothing left to do, and nothing left to validate
    assert state_of(folder) == state


def test_patience_is_remembered_over_a_restart(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "evaluate", scripted([0.1, 0.5, 0.4, 0.3, 0.2, 0.9]))
    config = make_config(dataset, tmp_path, finetune__patience=3, finetune__checkpoint_every_steps=2)
    folder = died_run("finetune", config, 43)
    assert state_of(folder)["since_best"] == 2
    run("finetune", config)
    assert state_of(folder)["epoch"] == 5 and state_of(folder)["best"]["epoch"] == 2
    assert [event["epoch"] for event in events(folder, "early_stop")] == [5]
    assert [event["epoch"] for event in events(folder, "best")] == [2]
    assert checkpoint.load_weights(str(folder))[1]["step"] == 20


def test_validation_comes_every_few_epochs_and_after_the_last(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "evaluate", scripted([0.1, 0.2]))
    folder = run("finetune", make_config(dataset, tmp_path, finetune__validate_every_epochs=2, finetune__epochs=3))
    assert list(curve(folder, "validation/MRR")) == [20, 30]


def test_the_best_checkpoint_is_the_one_that_validated_best(
    dataset: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = whole["finetune"]
    found = curve(folder, "validation/MRR")
    best = max(found, key=lambda step: found[step])
    assert best < 60, "training should have gone on after its best epoch"
    stored, metadata = checkpoint.load_weights(str(folder))
    assert metadata["step"] == best
    config = make_config(dataset, folder.parent)
    opened = Dataset.open(str(dataset))
    model = Task(config, "finetune", opened, torch.device("cpu")).model()
    checkpoint.fit_weights(model, stored, "best")
    result = evaluate(model.eval(), opened, config.evaluation, "validation", "cpu")
    assert result.metrics["MRR"] == pytest.approx(found[best], rel=1e-6)
    assert metadata["metrics"] == metadata["best"]["metrics"]


# From pretraining to fine-tuning


@pytest.mark.parametrize("form", ["auto", "run", "checkpoint"])
def test_fine_tuning_starts_from_the_pretrained_weights(
    dataset: Path, whole: dict[str, Path], tmp_path: Path, form: str
) -> None:
    pretrained = shutil.copytree(whole["pretrain"], tmp_path / "pretrain")
    named = {"auto": "auto", "run": str(pretrained), "checkpoint": str(pretrained / "checkpoints" / "step-00000051")}
    config = make_config(dataset, tmp_path, finetune__pretrained=named[form], finetune__epochs=0)
    folder = run("finetune", config)
    assert_same_weights(folder, pretrained)
    (event,) = events(folder, "pretrained")
    assert event["weights"] == str(pretrained / "checkpoints" / "step-00000051")
    trained = run("finetune", make_config(dataset, tmp_path, finetune__pretrained=named[form], finetune__epochs=1))
    assert curve(trained)[1] != curve(whole["finetune"])[1]


def test_from_scratch_is_what_none_says(dataset: Path, whole: dict[str, Path]) -> None:
    (event,) = events(whole["finetune"], "pretrained")
    assert event["weights"] == "none, trained from scratch"


@pytest.mark.parametrize(
    ("pretrained", "words"),
    [
        ("auto", ["finetune.pretrained=auto", "pretrain: no such folder", "finetune.pretrained=none"]),
        ("{output}/nothing", ["nothing: no such folder", "finetune.pretrained=none"]),
        ("{output}/empty", ["holds no model", "finetune.pretrained=none"]),
        ("{output}/parent", ["did you mean {output}/parent/pretrain?"]),
    ],
)
def test_a_pretrained_checkpoint_that_is_missing_is_an_error(
    dataset: Path, tmp_path: Path, pretrained: str, words: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "parent" / "pretrain" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError) as error:
        run("finetune", make_config(dataset, tmp_path, finetune__pretrained=pretrained.format(output=tmp_path)))
    assert all(word.format(output=tmp_path) in str(error.value) for word in words), error.value
    assert not (tmp_path / "finetune").exists()


def test_pretraining_that_has_not_come_to_a_checkpoint_is_an_error(dataset: Path, tmp_path: Path) -> None:
    died_run("pretrain", make_config(dataset, tmp_path), 5)
    with pytest.raises(CheckpointError, match=r"finetune\.pretrained=auto"):
        run("finetune", make_config(dataset, tmp_path, finetune__pretrained="auto"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__hidden_size": 32}, ["item_embedding.weight", "[62, 16]", "[62, 32]", "model.hidden_size"]),
        ({"model__max_length": 8}, ["position_embedding.weight", "model.max_length"]),
        ({"model__inner_size": 48}, ["inner", "model.inner_size"]),
        ({"model__layers": 1}, ["unknown to this model", "model.layers"]),
        ({"model__layers": 3}, ["has no tensor", "model.layers"]),
    ],
)
def test_weights_of_another_shape_are_refused_with_the_tensor_and_the_setting(
    dataset: Path, whole: dict[str, Path], tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    pretrained = str(whole["pretrain"])
    with pytest.raises(CheckpointError) as error:
        run("finetune", make_config(dataset, tmp_path, finetune__pretrained=pretrained, **change))
    assert all(word in str(error.value) for word in words), error.value


def test_weights_for_other_items_are_refused(whole: dict[str, Path], tmp_path: Path) -> None:
    make_dataset(tmp_path / "other", ids="count")
    config = make_config(tmp_path / "other" / "dataset", tmp_path, finetune__pretrained=str(whole["pretrain"]))
    with pytest.raises(CheckpointError, match="other items"):
        run("finetune", config)
    make_dataset(tmp_path / "smaller", seed=5, items=59)
    config = make_config(tmp_path / "smaller" / "dataset", tmp_path, finetune__pretrained=str(whole["pretrain"]))
    with pytest.raises(CheckpointError, match="other items"):
        run("finetune", config)


def test_weights_pretrained_on_older_data_with_the_same_items_are_taken_for_newer(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    make_dataset(tmp_path / "newer", seed=5)
    changes = {"finetune__pretrained": str(whole["pretrain"]), "finetune__epochs": 0}
    folder = run("finetune", make_config(tmp_path / "newer" / "dataset", tmp_path, **changes))
    assert_same_weights(folder, whole["pretrain"])


def test_a_run_does_not_go_on_with_another_dataset(whole: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(whole["pretrain"], tmp_path / "pretrain")
    make_dataset(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match=r"was trained on another dataset than .*--no_resume"):
        run("pretrain", make_config(tmp_path / "other" / "dataset", tmp_path))


# What is refused before training


def test_a_dataset_that_is_not_named_or_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is empty; name the dataset"):
        run("pretrain", make_config(Path(), tmp_path, data__path=""))
    with pytest.raises(DatasetError, match=r"nowhere/manifest\.json: no such file"):
        run("pretrain", make_config(tmp_path / "nowhere", tmp_path))


def test_a_dataset_that_has_changed_since_its_manifest_is_refused(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "dataset")
    damage(tmp_path / "dataset" / "shards" / "00001.parquet")
    with pytest.raises(DatasetError, match=r"00001\.parquet: .* another SHA-256"):
        run("pretrain", make_config(tmp_path / "dataset", tmp_path))
    assert not (tmp_path / "pretrain").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("changed", "another SHA-256 than the manifest says"),
        ("unread", "00001.parquet: no such file"),
        ("streams", "streams=1 cannot be divided over 2 ranks"),
        ("not pretrained", "finetune.pretrained=auto"),
    ],
)
def test_what_is_wrong_is_raised_on_every_process(
    pair: tuple[Path, dict[str, list[str]]], name: str, words: str
) -> None:
    errors = pair[1][name]
    assert len(errors) == 2 and all(words in error for error in errors), errors


def test_streams_that_the_processes_do_not_divide_are_refused(dataset: Path, tmp_path: Path) -> None:
    task = Task(make_config(dataset, tmp_path), "pretrain", Dataset.open(str(dataset)), torch.device("cpu"))
    with pytest.raises(OrderError, match="streams=32 cannot be divided over 3 ranks"):
        task.stream(World(0, 0, 3, torch.device("cpu")))


def test_sequences_too_short_for_a_target_are_refused(tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_text("".join(f"u{i} {i + 1} {i + 2} {i + 3}\n" for i in range(20)))
    short = {"input": str(tmp_path / "raw.txt"), "output": str(tmp_path / "dataset")}
    prepare(PrepareSettings(source="s3rec", attributes="none", **short))
    with pytest.raises(TrainingError, match=r"no sequence is long enough to train on.*needs 4 items"):
        run("finetune", make_config(tmp_path / "dataset", tmp_path))
    run("pretrain", make_config(tmp_path / "dataset", tmp_path, pretrain__epochs=1))


def test_a_sequence_that_could_hold_all_items_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, seed=3, items=MAX_LENGTH + 1)
    with pytest.raises(ConfigError, match=r"model\.max_length=10 with 11 items.*at most 9"):
        run("pretrain", make_config(tmp_path / "dataset", tmp_path))
    run("pretrain", make_config(tmp_path / "dataset", tmp_path, model__max_length=9, pretrain__epochs=1))


# Failures


def test_a_shard_that_cannot_be_read_stops_training_with_its_name(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "dataset")
    damage(tmp_path / "dataset" / "shards" / "00001.parquet")
    with pytest.raises(DatasetError, match=r"00001\.parquet"):
        run("finetune", make_config(tmp_path / "dataset", tmp_path))
    assert metrics(tmp_path / "finetune")[-1]["status"] == "failed"


# Odd sizes


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_may_be_empty(dataset: Path, tmp_path: Path, stage: str, zero: int, precision: str) -> None:
    """The last batch holds one sample, so that three of four micro-batches are empty."""
    options = {"engine__zero_stage": zero, "engine__precision": precision, f"{stage}__epochs": 1}
    whole = curve(run(stage, make_config(dataset, tmp_path / "whole", **options)))
    parts = curve(
        run(stage, make_config(dataset, tmp_path / "parts", **options, **{f"{stage}__gradient_accumulation": 4}))
    )
    assert_close(parts, whole, 1e-5 if precision == "fp32" else 5e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_no_epochs_leave_a_checkpoint_of_the_initial_weights(dataset: Path, tmp_path: Path, stage: str) -> None:
    config = make_config(dataset, tmp_path, **{f"{stage}__epochs": 0})
    folder = run(stage, config)
    assert tags(folder) == ["step-00000000"]
    model = Task(config, "pretrain", Dataset.open(str(dataset)), torch.device("cpu")).model()
    assert all(torch.equal(value, weights(folder)[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("samples", ["all_prefixes", "full_sequence", "one_random_prefix"])
@pytest.mark.parametrize(("loss", "positions"), [("bce", "last"), ("bpr", "all"), ("ce", "all"), ("ce", "last")])
def test_every_way_to_fine_tune_learns(dataset: Path, tmp_path: Path, samples: str, loss: str, positions: str) -> None:
    options = {"samples": samples, "loss": loss, "positions": positions, "epochs": 10, "learning_rate": 0.01}
    changes = {f"finetune__{key}": value for key, value in options.items()}
    changes |= {"model__hidden_dropout": 0.0, "model__attention_dropout": 0.0, "finetune__validate_every_epochs": 99}
    folder = run("finetune", make_config(dataset, tmp_path, finetune__batch_size=16, **changes))
    losses = list(curve(folder).values())
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < 0.95 * sum(losses[:quarter])


@pytest.mark.slow
def test_pretraining_on_beauty_stays_under_a_gigabyte_and_a_half(
    published_data: Path, launch: Callable[..., list[str]], tmp_path: Path
) -> None:
    prepare(PrepareSettings(source="s3rec", input=str(published_data / "Beauty.txt"), output=str(tmp_path / "dataset")))
    overrides = [f"data.path={tmp_path / 'dataset'}", f"output={tmp_path}", "pretrain.log_every_steps=20"]
    config = load_config(None, [*overrides, "engine.threads=1"])
    (tmp_path / "jobs.json").write_text(json.dumps({"beauty": job("pretrain", config, dies_before=80)}))
    launch(1, [RUNS, str(tmp_path / "jobs.json")])
    peaks = curve(tmp_path / "pretrain", "train/memory_mb")
    assert list(peaks) == [20, 40, 60, 80]
    assert max(peaks.values()) < 1000, peaks
    assert peaks[80] - peaks[20] < 100, "memory grows"


@pytest.mark.parametrize(
    ("sampling", "positions"), [("uniform", "all"), ("popularity", "all"), ("in_batch", "all"), ("in_batch", "last")]
)
def test_two_processes_share_the_negatives_that_one_draws(
    dataset: Path, tmp_path: Path, launch: Callable[..., list[str]], sampling: str, positions: str
) -> None:
    settings = {"finetune__loss": "sampled_ce", "finetune__negatives": 16, "finetune__negative_sampling": sampling}
    settings["finetune__positions"] = positions
    one = run("finetune", make_config(dataset, tmp_path / "one", finetune__epochs=2, **settings))
    two = make_config(dataset, tmp_path / "two", finetune__epochs=2, finetune__gradient_accumulation=2, **settings)
    (tmp_path / "jobs.json").write_text(json.dumps({"two": job("finetune", two)}))
    launch(2, [RUNS, str(tmp_path / "jobs.json")])
    assert curve(tmp_path / "two" / "finetune") == pytest.approx(curve(one), rel=1e-5)


def test_two_processes_share_the_attributes_that_one_draws(
    dataset: Path, tmp_path: Path, launch: Callable[..., list[str]]
) -> None:
    settings = {"pretrain__attribute_negatives": 3, "pretrain__epochs": 1}
    one = curve(run("pretrain", make_config(dataset, tmp_path / "one", **settings)))
    two = make_config(dataset, tmp_path / "two", pretrain__gradient_accumulation=2, **settings)
    (tmp_path / "jobs.json").write_text(json.dumps({"two": job("pretrain", two)}))
    launch(2, [RUNS, str(tmp_path / "jobs.json")])
    assert curve(tmp_path / "two" / "pretrain") == pytest.approx(one, rel=1e-5)
    whole = curve(run("pretrain", make_config(dataset, tmp_path / "whole", pretrain__epochs=1)))
    assert whole != one and sum(one.values()) == pytest.approx(sum(whole.values()), rel=0.1)
