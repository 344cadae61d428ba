"""Checkpoints are transactions: what is loaded is exactly what was saved, or the newest that is whole, or an error."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start_process
from safetensors.torch import load_file, save_file
from toy import Toy, make_engine, state_of, train

from s3rec_dist.training import checkpoint
from s3rec_dist.training.checkpoint import CheckpointError, Saver
from s3rec_dist.training.engine import Engine, World


def save(engine: Engine, folder: Path, step: int, **options: Any) -> Path:
    return folder / Saver(engine, folder).save(state_of(engine, step), **{"keep": 9, **options})


def load_newest(engine: Engine, folder: Path) -> checkpoint.Checkpoint:
    found = checkpoint.newest(folder)
    assert found is not None
    checkpoint.load(engine, found)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def saved(world: World, tmp_path: Path) -> Iterator[tuple[Engine, Path]]:
    """An engine with the checkpoints of steps 2 and 4."""
    engine = make_engine(world)
    for step in (2, 4):
        train(engine, range(step - 2, step))
        save(engine, tmp_path, step)
    yield engine, tmp_path
    engine.close()


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_goes_on_bit_by_bit(
    world: World, tmp_path: Path, stage: int, precision: str, accumulation: int
) -> None:
    options: dict[str, Any] = {"stage": stage, "precision": precision, "accumulation": accumulation}
    engine = make_engine(world, **options)
    train(engine, range(5), accumulation=accumulation)
    save(engine, tmp_path, 5)
    going_on = train(engine, range(5, 10), accumulation=accumulation)
    final = engine.fp32_weights()
    engine.close()

    again = make_engine(world, **options)
    assert load_newest(again, tmp_path).state["step"] == 5
    assert train(again, range(5, 10), accumulation=accumulation) == going_on
    assert all(torch.equal(value, final[name]) for name, value in again.fp32_weights().items())
    again.close()


@pytest.mark.parametrize("stage", range(4))
def test_the_weights_stand_there_whole_at_every_stage(world: World, tmp_path: Path, stage: int) -> None:
    engine = make_engine(world, stage=stage)
    train(engine, range(3))
    tag = save(engine, tmp_path, 3)
    weights = engine.fp32_weights()
    engine.close()
    stored = load_file(tag / "model.safetensors")
    assert stored.keys() == Toy().state_dict().keys()
    assert all(torch.equal(value, weights[name]) and value.dtype == torch.float32 for name, value in stored.items())


def test_the_manifest_names_every_file_with_its_hash(saved: tuple[Engine, Path]) -> None:
    _, folder = saved
    tag = folder / "step-00000004"
    manifest = json.loads((tag / "manifest.json").read_text())
    assert set(manifest["files"]) == set(contents(tag)) - {"manifest.json"}
    assert {"model.safetensors", "state.json", "deepspeed/mp_rank_00_model_states.pt"} <= set(manifest["files"])
    assert (folder / "latest").read_text() == "step-00000004\n"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.json", "manifest.json", "deepspeed/mp_rank_00_model_states.pt"]
)
@pytest.mark.parametrize("damage", ["one bit", "cut short", "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_newest_whole_one(
    saved: tuple[Engine, Path], name: str, damage: str
) -> None:
    _, folder = saved
    path = folder / "step-00000004" / name
    if damage == "one bit":
        flip(path)
    elif damage == "cut short":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    found = checkpoint.newest(folder)
    assert found is not None and found.folder.name == "step-00000002"
    assert len(found.damaged) == 1 and "step-00000004" in found.damaged[0]


@pytest.mark.parametrize("key", ["bytes", "sha256"])
def test_a_manifest_that_does_not_say_what_a_file_should_be_is_damaged(saved: tuple[Engine, Path], key: str) -> None:
    _, folder = saved
    path = folder / "step-00000004" / "manifest.json"
    text = path.read_text()
    for place in re.finditer(f'"{key}"', text):
        path.write_text(f'{text[: place.start()]}"?{text[place.start() + 2 :]}')
        found = checkpoint.newest(folder)
        assert found is not None and found.folder.name == "step-00000002"
        assert "manifest.json: does not say size and SHA-256 of" in found.damaged[0]


def test_where_no_checkpoint_is_whole_it_does_not_start_over(saved: tuple[Engine, Path]) -> None:
    _, folder = saved
    for tag in folder.glob("step-*"):
        (tag / "state.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"(?s)no checkpoint is whole.*--no_resume.*step-00000004.*step-00000002"
    ) as e:
        checkpoint.newest(folder)
    assert "state.json" in str(e.value)


def test_where_there_has_never_been_one_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nothing") is None
    (tmp_path / ".writing-step-00000009").mkdir()
    assert checkpoint.newest(tmp_path) is None


def test_the_newest_and_the_best_are_kept(world: World, tmp_path: Path) -> None:
    engine = make_engine(world)
    for step in range(1, 7):
        save(engine, tmp_path, step, keep=2, best=checkpoint.tag_of(min(step, 2)))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-0000000{s}" for s in (2, 5, 6)]
    assert (tmp_path / "best").read_text().strip() == "step-00000002"
    engine.close()


def test_steps_that_are_trained_again_replace_what_was_there(saved: tuple[Engine, Path]) -> None:
    engine, folder = saved
    (folder / "step-00000004" / "state.json").unlink()
    save(engine, folder, 3)
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000002", "step-00000003"]
    save(engine, folder, 3)
    found = checkpoint.newest(folder)
    assert found is not None and found.state["step"] == 3 and not found.damaged


def test_only_whole_checkpoints_count_among_those_that_are_kept(world: World, tmp_path: Path) -> None:
    engine = make_engine(world)
    for step in (1, 2, 3, 4):
        save(engine, tmp_path, step)
    flip(tmp_path / "step-00000003" / "model.safetensors")  # before this process
    saver = Saver(engine, tmp_path)
    assert saver.save(state_of(engine, 5), keep=3) == "step-00000005"
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-0000000{step}" for step in (2, 3, 4, 5)]
    os.truncate(tmp_path / "step-00000005" / "state.json", 9)  # after it had written it
    saver.save(state_of(engine, 6), keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-0000000{step}" for step in (4, 5, 6)]
    saver.save(state_of(engine, 7), keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-0000000{step}" for step in (6, 7)]
    engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_in_the_background_the_state_of_that_moment_is_written_while_training_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    may_write, write = threading.Event(), checkpoint._write_tensors

    def write_later(*arguments: Any) -> None:
        assert may_write.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "_write_tensors", write_later)
    engine = make_engine(world, stage=stage, precision=precision)
    saver = Saver(engine, tmp_path, background=True)
    curve = train(engine, range(3))
    saver.begin(state_of(engine, 3), keep=2)
    curve += train(engine, range(3, 6))
    assert saver.outcome() is None and not list(tmp_path.glob("step-*"))
    may_write.set()
    saver.begin(state_of(engine, 6), keep=2)  # the first one is written before it is
    assert (tmp_path / "step-00000003").exists()
    curve += train(engine, range(6, 9))
    saver.wait()
    assert saver.outcome() == "step-00000006" and saver.outcome() is None
    saver.close()
    engine.close()
    for step in (6, 3):
        again = make_engine(world, stage=stage, precision=precision)
        assert load_newest(again, tmp_path).state["step"] == step
        assert train(again, range(step, 9)) == curve[step:]
        again.close()
        shutil.rmtree(tmp_path / checkpoint.tag_of(step))


def test_what_fails_in_the_background_is_told_when_it_is_asked_for(
    saved: tuple[Engine, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folder = saved
    before = contents(folder)
    saver = Saver(engine, folder, background=True)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_tensors", fail)
        saver.begin(state_of(engine, 6), keep=9)
        saver.wait()
    error = saver.outcome()
    assert isinstance(error, CheckpointError) and "could not write checkpoint step-00000006" in str(error)
    assert saver.outcome() is None and contents(folder) == before
    saver.begin(state_of(engine, 6), keep=9)
    saver.close()
    assert saver.outcome() == "step-00000006"


@pytest.mark.parametrize("point", ["save_file", "describe", "sync_file", "Saver._publish", "Path.rename"])
def test_a_failing_save_leaves_earlier_checkpoints_and_nothing_else(
    saved: tuple[Engine, Path], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    engine, folder = saved
    before = contents(folder)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        owner, _, name = point.rpartition(".")
        patch.setattr({"": checkpoint, "Saver": Saver, "Path": Path}[owner], name, fail)
        with pytest.raises(CheckpointError, match=r"could not write checkpoint step-00000006.*No space left"):
            save(engine, folder, 6)
    assert contents(folder) == before
    assert not list(folder.glob(".*"))
    save(engine, folder, 6)
    assert load_newest(make_engine(engine.world), folder).state["step"] == 6


def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays_whole(world: World, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        engine = make_engine(world)
        save(engine, small, 1)
        before = contents(small)
        steps = iter(range(2, 100))
        with pytest.raises(CheckpointError, match="could not write checkpoint"):
            while True:
                save(engine, small, next(steps))
        found = checkpoint.newest(small)
        assert found is not None and not found.damaged
        assert before.items() - {("latest", before["latest"])} <= contents(small).items()
        assert not list(small.glob(".*"))
        engine.close()
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom toy import make_engine, state_of\nfrom s3rec_dist.training import checkpoint\n"
        "from s3rec_dist.training.engine import start\nfrom s3rec_dist.config import EngineConfig\n"
        "engine = make_engine(start(EngineConfig(device='cpu', threads=1)))\nfolder = pathlib.Path(sys.argv[1])\n"
        "for step in range(1, 100000):\n    checkpoint.Saver(engine, folder).save(state_of(engine, step), keep=2)\n"
    )
    path = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[2])))
    for delay in (0.3, 0.317, 0.34):
        folder = tmp_path / str(delay)
        process = start_process([sys.executable, "-c", code, str(folder)], {"PYTHONPATH": path})
        try:
            deadline = time.monotonic() + 60
            while not (folder / "latest").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = checkpoint.newest(folder)
        assert found is not None and not found.damaged


@pytest.mark.slow
def test_several_ranks_save_resume_and_fail_together(toy_result: Callable[..., Any], tmp_path: Path) -> None:
    found = toy_result(2, "saves", tmp_path)
    for stage in range(4):
        result = found[str(stage)]
        assert result["same"], f"stage {stage} did not go on bit by bit"
        assert result["written"] == ["step-00000004"] * 2
        if stage == 0:  # rank 1 writes nothing there
            assert result["errors"] == ["step-00000008"] * 2 and result["tag"] == "step-00000008"
        else:
            assert all("No space left on device" in error for error in result["errors"]), result["errors"]
            assert result["tag"] == "step-00000004"
            shards = [f for f in result["files"] if "optim_states" in f]
            assert len(shards) == 2 and not any(".writing" in f for f in result["files"])


def test_another_precision_is_refused_with_the_remedy(world: World, tmp_path: Path) -> None:
    engine = make_engine(world, stage=1)
    Saver(engine, tmp_path).save({**state_of(engine, 1), "precision": "bf16"}, keep=1)
    with pytest.raises(CheckpointError) as error:
        load_newest(engine, tmp_path)
    words = ["precision bf16, this run has fp32", "engine.precision=bf16", "--no_resume"]
    assert all(word in str(error.value) for word in words), error.value
    engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("before", range(4))
def test_every_other_zero_stage_goes_on_bit_by_bit(world: World, tmp_path: Path, before: int, precision: str) -> None:
    engine = make_engine(world, stage=before, precision=precision)
    train(engine, range(5))
    weights = engine.fp32_weights()
    save(engine, tmp_path, 5)
    going_on = train(engine, range(5, 12))
    engine.close()
    for after in {0, 1, 2, 3} - {before}:
        other = make_engine(world, stage=after, precision=precision)
        load_newest(other, tmp_path)
        assert all(torch.equal(value, weights[name]) for name, value in other.fp32_weights().items())
        assert train(other, range(5, 12)) == going_on
        other.close()


@pytest.mark.parametrize("stages", [(0, 3), (1, 0), (3, 1)])
def test_another_zero_stage_goes_on_from_before_the_first_step(
    world: World, tmp_path: Path, stages: tuple[int, int]
) -> None:
    engine = make_engine(world, stage=stages[0])
    save(engine, tmp_path, 0)
    curve = train(engine, range(4))
    engine.close()
    other = make_engine(world, stage=stages[1])
    load_newest(other, tmp_path)
    assert train(other, range(4)) == curve
    other.close()


def test_without_zero_the_world_size_may_change(world: World, tmp_path: Path) -> None:
    engine = make_engine(world)
    Saver(engine, tmp_path).save({**state_of(engine, 1), "world_size": 4}, keep=1)
    load_newest(engine, tmp_path)
    engine.close()


def test_weights_load_from_a_run_a_checkpoint_and_an_export(saved: tuple[Engine, Path], tmp_path: Path) -> None:
    engine, folder = saved
    run = tmp_path / "run" / "finetune"
    shutil.copytree(folder, run / "checkpoints", ignore=shutil.ignore_patterns("run"))
    weights, metadata = checkpoint.load_weights(str(run))
    assert metadata["step"] == 4 and metadata["path"] == str(run / "checkpoints" / "step-00000004")
    assert all(torch.equal(value, weights[name]) for name, value in engine.fp32_weights().items())

    (run / "checkpoints" / "best").write_text("step-00000002\n")
    assert checkpoint.load_weights(str(run))[1]["step"] == 2
    assert checkpoint.load_weights(str(run / "checkpoints" / "step-00000004"))[1]["step"] == 4

    export = tmp_path / "export"
    export.mkdir()
    save_file(weights, export / "model.safetensors")
    (export / "config.json").write_text('{"n_items": 3}')
    assert checkpoint.load_weights(str(export))[1]["n_items"] == 3

    with pytest.raises(CheckpointError, match=r"holds no model; did you mean .*run/finetune\?"):
        checkpoint.load_weights(str(tmp_path / "run"))


def test_weights_that_are_not_there_or_damaged_are_errors(saved: tuple[Engine, Path], tmp_path: Path) -> None:
    _, folder = saved
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.load_weights(str(tmp_path / "nothing"))
    run = tmp_path / "run"
    shutil.copytree(folder, run / "checkpoints", ignore=shutil.ignore_patterns("run"))
    (run / "checkpoints" / "best").write_text("step-00000004\n")
    path = run / "checkpoints" / "step-00000004" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: SHA-256 is"):
        checkpoint.load_weights(str(run))
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        checkpoint.load_weights(str(empty))
    (empty / "config.json").write_text("{}")
    (empty / "checkpoints").rmdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is missing"):
        checkpoint.load_weights(str(empty))
    (empty / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_weights(str(empty))


def test_weights_of_another_shape_name_the_tensor_both_shapes_and_the_setting() -> None:
    class Model(torch.nn.Module):
        def __init__(self, length: int, layers: int) -> None:
            super().__init__()
            self.position_embedding = torch.nn.Embedding(length, 4)
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(layers))

    def message(length: int, layers: int) -> str:
        with pytest.raises(CheckpointError) as error:
            checkpoint.fit_weights(Model(50, 2), Model(length, layers).state_dict(), "runs/a")
        return str(error.value)

    assert "position_embedding.weight has shape [20, 4], this model's is [50, 4]" in message(20, 2)
    assert "model.max_length" in message(20, 2)
    assert "has no tensor blocks.1.weight" in message(50, 1) and "model.layers" in message(50, 1)
    assert "has a tensor blocks.2.weight" in message(50, 3)
    target, source = Model(50, 2), Model(50, 2)
    checkpoint.fit_weights(target, source.state_dict(), "runs/a")
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), source.parameters(), strict=True))
