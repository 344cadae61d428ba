"""A dataset of six items, models for it, and what a run's folder looks like."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from s3rec_dist.config import Config, ModelConfig, PretrainConfig, to_dict
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.model import S3Rec
from s3rec_dist.training.checkpoint import catalogue_of, describe

MODEL_FOLDER = {"README.md", "attributes.parquet", "config.json", "items.parquet", "model.safetensors"}
SMALL = ModelConfig(hidden_size=8, layers=3, heads=4, inner_size=12, max_length=6)


def prepared(folder: Path, sequences: str, attributes: dict[str, list[int]], **options: Any) -> Dataset:
    folder.mkdir(parents=True)
    (folder / "toy.txt").write_text(sequences)
    (folder / "toy_item2attributes.json").write_text(json.dumps(attributes))
    output = str(folder / "dataset")
    prepare(PrepareSettings(source="s3rec", input=str(folder / "toy.txt"), output=output, **options))
    return Dataset.open(output)


def six_items(folder: Path) -> Dataset:
    """Items 1..6, numbered as they are, attributes 1..4."""
    return prepared(folder, "a 1 2 3 4\nb 4 5 6\nc 2 6 1 3 5\n", {"1": [1, 2], "2": [2], "4": [3, 4], "6": [1]})


def six_other_items(folder: Path) -> Dataset:
    """As many items and attributes, numbered otherwise."""
    sequences = "a u v w x\nb x y z\nc v z u w y\n"
    return prepared(folder, sequences, {"u": [1, 2], "v": [2], "w": [3], "z": [4]})


def small_model(dataset: Dataset, **changes: Any) -> S3Rec:
    torch.manual_seed(0)
    model = S3Rec(
        dataclasses.replace(SMALL, **changes), dataset.n_items, dataset.n_attributes, dataset.item_attributes()
    )
    for parameter in model.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter)
    return model.eval()


def write_run(dataset: Dataset, folder: Path, model: S3Rec | None = None) -> Path:
    """A run's folder with one checkpoint, of :func:`small_model` unless there is another."""
    model = model or small_model(dataset)
    config = dataclasses.replace(
        Config(),
        model=model.config,
        output=str(folder / "run"),
        data=dataclasses.replace(Config().data, path=dataset.path),
        pretrain=PretrainConfig(pairwise="bpr"),
        finetune=dataclasses.replace(Config().finetune, pretrained=str(folder / "earlier")),
        evaluation=dataclasses.replace(Config().evaluation, protocol="sampled", negatives_file=str(folder / "n.txt")),
    )
    tag = folder / "run" / "finetune" / "checkpoints" / "step-00000007"
    tag.mkdir(parents=True)
    save_file(model.state_dict(), tag / "model.safetensors")
    state = {
        "stage": "finetune",
        "epoch": 3.5,
        "step": 7,
        "metrics": {"HR@10": 0.25, "MRR": 0.125},
        "config": to_dict(config),
        "dataset_fingerprint": dataset.fingerprint,
        "catalogue": catalogue_of(dataset),
        "n_items": dataset.n_items,
        "n_attributes": dataset.n_attributes,
    }
    (tag / "state.json").write_text(json.dumps(state))
    files = {name: describe(tag / name) for name in ("model.safetensors", "state.json")}
    (tag / "manifest.json").write_text(json.dumps({"format": "s3rec_dist checkpoint", "version": 1, "files": files}))
    return folder / "run" / "finetune"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_weights(a: S3Rec, b: S3Rec) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
