"""Checkpoints as transactions: a tag is whole, or it is not there.

    RUN/checkpoints/
      step-00001200/
        deepspeed/            each rank's shard, as DeepSpeed writes it: what a run resumes from
        model.safetensors     the whole fp32 weights, at any ZeRO stage: what everything else reads
        state.json            stage, epoch, step, best validation, settings, dataset, world size
        manifest.json         size and SHA-256 of every file above
      latest, best            the tag's name

A tag is written as ``.writing-TAG``, synced to disk, hashed, and renamed when every rank is done; then
``latest`` and ``best`` move, each by a rename. Loading trusts only what matches the manifest: a damaged tag
is passed over, with a word about it, for the newest whole one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.formats import sha256_of, sync_file
from s3rec_dist.training.engine import Engine, gather, on_rank_zero, together

FOLDER = "checkpoints"
SHARDS, WEIGHTS, STATE, MANIFEST = "deepspeed", "model.safetensors", "state.json", "manifest.json"
_FORMAT = "s3rec_dist checkpoint"
_WRITING, _OLD = ".writing-", ".old-"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another shape, or cannot be written."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path
    state: dict[str, Any]
    """Its state.json."""
    damaged: tuple[str, ...] = ()
    """Newer tags that were passed over, each with the reason."""


def tag_of(step: int) -> str:
    """The tag of a step; tags sort by step."""
    return f"step-{step:08d}"


def save(engine: Engine, folder: Path, state: Mapping[str, Any], *, keep: int, best: str | None = None) -> Path:
    """Writes the tag of ``state["step"]`` into ``folder``, then removes all but the ``keep`` newest and ``best``.

    All ranks call it, with the same arguments. Raises :class:`CheckpointError` on every rank where a write
    fails on one, or a weight is not a finite number; earlier checkpoints and ``latest`` are untouched then.
    """
    tag = tag_of(state["step"])
    draft = folder / f"{_WRITING}{tag}"
    weights = engine.fp32_weights()
    with together():
        _check_finite(weights, tag)
    try:
        on_rank_zero(lambda: _make_room(folder, draft))
        hashes: dict[str, dict[str, Any]] = {}
        with together():
            for path in engine.save_shards(draft / SHARDS):
                hashes[str(path.relative_to(draft))] = describe(path)
        with together():
            if engine.world.rank == 0:
                save_file(weights, draft / WEIGHTS, metadata={"format": "pt"})
                sync_file(str(draft / WEIGHTS))
                _write(draft / STATE, json.dumps(dict(state), indent=1))
                hashes |= {name: describe(draft / name) for name in (WEIGHTS, STATE)}
        files = {name: entry for part in gather(hashes) for name, entry in part.items()}
        on_rank_zero(lambda: _publish(folder, draft, tag, files, keep, best))
    except Exception as error:
        if engine.world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: could not write checkpoint {tag}: {error}. Earlier checkpoints are whole; "
            "make room or repair the disk, and run the command again to go on from the newest"
        ) from error
    return folder / tag


def _check_finite(weights: Mapping[str, torch.Tensor], tag: str) -> None:
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{tag} is not written: {name} holds values that are not finite numbers, so training has diverged; "
                "lower the learning rate, set gradient_clipping, or use engine.precision=fp32, and start over with "
                "--no_resume. Earlier checkpoints are whole"
            )


def _make_room(folder: Path, draft: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob(f"{_WRITING}*"), *folder.glob(f"{_OLD}*")]:
        shutil.rmtree(leftover)
    (draft / SHARDS).mkdir(parents=True)


def _publish(folder: Path, draft: Path, tag: str, files: Mapping[str, Any], keep: int, best: str | None) -> None:
    manifest = {"format": _FORMAT, "version": 1, "files": dict(sorted(files.items()))}
    _write(draft / MANIFEST, json.dumps(manifest, indent=1))
    sync_file(str(draft / SHARDS))
    sync_file(str(draft))
    target = folder / tag
    if target.exists():  # an earlier run's, passed over as damaged
        target.rename(folder / f"{_OLD}{tag}")
    draft.rename(target)
    sync_file(str(folder))
    _point(folder / "latest", tag)
    if best is not None:
        _point(folder / "best", best)
    # Tags after this one come from steps that are being trained again.
    others = [t for t in _tags(folder) if t > tag] + [t for t in _tags(folder) if t <= tag][keep:]
    for other in others:
        if other != best:
            old = folder / f"{_OLD}{other}"
            (folder / other).rename(old)
            shutil.rmtree(old)


def _tags(folder: Path) -> list[str]:
    """Tags, newest first."""
    return sorted((path.name for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as manifests list them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(str(path))}


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _point(path: Path, tag: str) -> None:
    """Moves ``latest`` or ``best`` to another tag, atomically."""
    draft = path.with_name(f".{path.name}")
    try:
        _write(draft, tag)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_file(str(path.parent))


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, the same on all ranks; None where there has never been one.

    Raises :class:`CheckpointError` where there are checkpoints but none is whole: starting over would hide it.
    """
    return on_rank_zero(lambda: _newest(folder))


def _newest(folder: Path) -> Checkpoint | None:
    damaged: list[str] = []
    for tag in _tags(folder):
        try:
            state = verify(folder / tag)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return Checkpoint(folder / tag, state, tuple(damaged))
    if damaged:
        raise CheckpointError(
            f"{folder}: no checkpoint is whole; restore one, or start over with --no_resume:\n  " + "\n  ".join(damaged)
        )
    return None


def verify(folder: Path, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Compares a checkpoint's files (those in ``names``, or all) with its manifest and returns its state.

    Raises :class:`CheckpointError` naming the file that is missing or differs.
    """
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != _FORMAT or manifest.get("version") != 1 or STATE not in manifest.get("files", {}):
        raise CheckpointError(f"{folder / MANIFEST}: not the manifest of a checkpoint that this version writes")
    for name, expected in manifest["files"].items():
        if not names or name in names:
            _verify_file(folder / name, expected)
    return _read_json(folder / STATE)


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    if path.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, its manifest says {expected['bytes']}")
    if (found := sha256_of(str(path))) != expected["sha256"]:
        raise CheckpointError(f"{path}: SHA-256 is {found}, its manifest says {expected['sha256']}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return tree


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Restores weights and optimizer. All ranks call it. Raises :class:`CheckpointError` where world size, ZeRO
    stage or precision differ from the run that saved it."""
    state, here = checkpoint.state, run_layout(engine)
    resizable = state["zero_stage"] == 0  # every rank has everything
    for key, remedy in (
        ("zero_stage", "engine.zero_stage={}"),
        ("precision", "engine.precision={}"),
        ("world_size", "{} processes"),
    ):
        if state[key] != here[key] and not (key == "world_size" and resizable):
            raise CheckpointError(
                f"{checkpoint.folder}: was saved with {key} {state[key]}, this run has {here[key]}; "
                f"resume with {remedy.format(state[key])}, or start over with --no_resume"
            )
    with together():
        engine.load_shards(checkpoint.folder / SHARDS)


def run_layout(engine: Engine) -> dict[str, Any]:
    """What of the engine a state.json records, and a resumed run must share."""
    return {"world_size": engine.world.size, "zero_stage": engine.zero_stage, "precision": engine.precision}


def load_weights(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Whole fp32 weights and their metadata (state.json or config.json, and ``path``), verified, without DeepSpeed.

    ``path`` is a run's folder (its best checkpoint, or the newest where none is marked), a checkpoint's, or an
    exported model's. Raises :class:`CheckpointError`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected a run, a checkpoint or an exported model")
    if (folder / FOLDER).is_dir():
        folder = _chosen_of_run(folder / FOLDER)
    if (folder / MANIFEST).is_file() and (folder / STATE).is_file():
        metadata = verify(folder, (WEIGHTS, STATE))
    elif (folder / "config.json").is_file():
        metadata = _read_json(folder / "config.json")
        if WEIGHTS in metadata.get("files", {}):
            _verify_file(folder / WEIGHTS, metadata["files"][WEIGHTS])
    else:
        stages = [stage for stage in ("finetune", "pretrain") if (folder / stage / FOLDER).is_dir()]
        hint = f"did you mean {folder / stages[0]}?" if stages else "expected a run, a checkpoint or an exported model"
        raise CheckpointError(f"{path}: holds no model; {hint}")
    try:
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise CheckpointError(f"{folder / WEIGHTS}: is missing") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be read ({error})") from error
    return weights, {**metadata, "path": str(folder)}


def _chosen_of_run(folder: Path) -> Path:
    pointer = folder / "best"
    if pointer.is_file():
        return folder / pointer.read_text(encoding="utf-8").strip()
    found = _newest(folder)
    if found is None:
        raise CheckpointError(f"{folder}: holds no checkpoint yet; train first")
    return found.folder


def catalogue_of(dataset: Dataset) -> str:
    """A name for what each item id means."""
    return dataset.manifest.catalogue


def check_catalogue(metadata: Mapping[str, Any], dataset: Dataset) -> None:
    """Raises :class:`CheckpointError` where the item ids of a model, described by the ``metadata`` of
    :func:`load_weights`, mean other items than those of ``dataset``."""
    own = catalogue_of(dataset)
    if metadata.get("catalogue", own) != own:
        raise CheckpointError(
            f"{metadata['path']}: was trained on a dataset with other items than {dataset.path}, so that its item "
            "ids mean other items; take the dataset it was trained on, or a model trained on this one"
        )


_SHAPE_HINTS = {
    "item_embedding.weight": ("the dataset's items plus two", "model.hidden_size"),
    "attribute_embedding.weight": ("the dataset's attributes plus one", "model.hidden_size"),
    "position_embedding.weight": ("model.max_length", "model.hidden_size"),
}


def fit_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads ``weights`` into ``model``. Raises :class:`CheckpointError` naming the first tensor that is missing,
    unknown or of another shape, and the setting behind it."""
    own = model.state_dict()
    for name in own:
        if name not in weights:
            raise CheckpointError(f"{source}: has no tensor {name}, which this model needs; is model.layers the same?")
    for name in weights:
        if name not in own:
            raise CheckpointError(f"{source}: has a tensor {name}, unknown to this model; is model.layers the same?")
    for name, tensor in own.items():
        expected, found = tuple(tensor.shape), tuple(weights[name].shape)
        if expected != found:
            hints = _SHAPE_HINTS.get(name, ("model.hidden_size or model.inner_size",) * 2)
            axis = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
            raise CheckpointError(
                f"{source}: {name} has shape {list(found)}, this model's is {list(expected)}; it follows from "
                f"{hints[min(axis, 1)]}"
            )
    model.load_state_dict(dict(weights))
