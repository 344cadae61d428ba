"""Items that training has not seen: ranked by their attributes, with a dataset as it was or one that has grown."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import curve, make_config, run, weights

from s3rec_dist.config import Config, ConfigError, to_dict
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.evaluation import evaluate
from s3rec_dist.export import export, load_export, load_model

RUNS = str(Path(__file__).with_name("runs.py"))
WARM, COLD = 40, (41, 42, 43)
FEATURES: dict[str, Any] = {"model__item_features": "add", "model__item_id_dropout": 0.3}


def prepared(folder: Path, histories: list[list[int]], attributes: dict[str, list[int]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "raw.txt").write_text("".join(f"u{i} {' '.join(map(str, row))}\n" for i, row in enumerate(histories)))
    if attributes is not None:
        (folder / "raw_item2attributes.json").write_text(json.dumps(attributes))
    source: dict[str, Any] = {"input": str(folder / "raw.txt"), "rows_per_group": 16, "ids": "keep"}
    source["attributes"] = "" if attributes else "none"
    prepare(PrepareSettings(source="s3rec", output=str(folder / "dataset"), **source))
    return folder / "dataset"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items 41 to 43 are only ever validation or test items."""
    draw = random.Random(0)
    histories = [[draw.randint(1, WARM) for _ in range(draw.randint(4, 12))] for _ in range(60)]
    histories[0][:2] = [WARM, 1]
    for item, row in zip([*COLD, 41], histories, strict=False):
        row[-1 - item % 2] = item
    attributes = {str(item): draw.sample(range(1, 8), draw.randint(1, 3)) for item in range(1, max(COLD) + 1)}
    return prepared(tmp_path_factory.mktemp("cold"), histories, attributes)


def config(data: Path, output: Path, **changes: Any) -> Config:
    short = {"pretrain__epochs": 2, "finetune__epochs": 2, "evaluation__cutoffs": [5, 10]}
    return make_config(data, output, **{**FEATURES, **short, **changes})


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("pretrain", config(data, tmp_path_factory.mktemp("pretrained")))


def assert_cold_rows_are_zero(folder: Path) -> None:
    own = weights(folder)["item_embedding.weight"]
    assert len(own) == max(COLD) + 2
    assert [item for item, row in enumerate(own.tolist()) if not any(row)] == list(COLD)


def test_own_rows_of_items_without_training_events_stay_zero_in_pretraining(pretrained: Path) -> None:
    assert_cold_rows_are_zero(pretrained)


@pytest.mark.parametrize("loss", ["bce", "bpr", "ce", "sampled_ce"])
def test_own_rows_of_items_without_training_events_stay_zero_in_finetuning(
    data: Path, pretrained: Path, tmp_path: Path, loss: str
) -> None:
    changes = {"finetune__loss": loss, "finetune__pretrained": str(pretrained), "finetune__negatives": 20}
    assert_cold_rows_are_zero(run("finetune", config(data, tmp_path, **changes)))


def test_an_item_that_pretraining_had_is_not_cold_where_finetuning_lacks_it(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    draw = random.Random(1)
    histories = [[draw.randint(1, WARM - 10) for _ in range(8)] for _ in range(40)]
    for item in range(WARM - 9, max(COLD) + 1):
        histories[item % 40][-1] = item
    attributes = {str(item): [1 + item % 7] for item in range(1, max(COLD) + 1)}
    other = prepared(tmp_path / "other", histories, attributes)
    folder = run("finetune", config(other, tmp_path, finetune__loss="ce", finetune__pretrained=str(pretrained)))
    assert_cold_rows_are_zero(folder)
    before, after = (weights(at)["item_embedding.weight"] for at in (pretrained, folder))
    assert (before[1 : WARM + 1] != after[1 : WARM + 1]).any(1).all()


def test_a_run_goes_on_bit_by_bit(data: Path, tmp_path: Path) -> None:
    expected = run("finetune", config(data, tmp_path / "whole", finetune__loss="ce"))
    run("finetune", config(data, tmp_path / "parts", finetune__loss="ce", finetune__epochs=1))
    found = run("finetune", config(data, tmp_path / "parts", finetune__loss="ce"))
    for name, tensor in weights(expected).items():
        assert torch.equal(weights(found)[name], tensor), name


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_two_processes_train_as_one(data: Path, tmp_path: Path, launch: Callable[..., list[str]], loss: str) -> None:

    job = config(data, tmp_path / "two", finetune__loss=loss)
    (tmp_path / "jobs.json").write_text(json.dumps({"job": {"stage": "finetune", "config": to_dict(job)}}))
    launch(2, [RUNS, str(tmp_path / "jobs.json")])
    expected = run("finetune", config(data, tmp_path / "one", finetune__loss=loss))
    found = tmp_path / "two" / "finetune"
    assert curve(found) == pytest.approx(curve(expected), rel=1e-4)
    assert_cold_rows_are_zero(found)


def test_validation_and_evaluations_of_the_run_and_of_its_export_agree(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path, finetune__loss="ce", finetune__epochs=1)
    folder, dataset = run("finetune", settings), Dataset.open(str(data))
    export(str(folder), dataset, str(tmp_path / "model"))
    of_run, of_export = load_model(str(folder), dataset), load_model(str(tmp_path / "model"), dataset)
    assert of_run.config.item_features == "none"
    validated = curve(folder, "validation/MRR")
    for model in (of_run, of_export, load_export(str(tmp_path / "model"))):
        found = evaluate(model.eval(), dataset, settings.evaluation, "validation", "cpu")
        assert found.metrics["MRR"] == pytest.approx(validated[max(validated)], rel=1e-9)


def test_an_export_can_be_finetuned_further(data: Path, pretrained: Path, tmp_path: Path) -> None:
    export(str(pretrained), Dataset.open(str(data)), str(tmp_path / "model"))
    changes = {"finetune__epochs": 0, "finetune__pretrained": str(tmp_path / "model")}
    folder = run("finetune", config(data, tmp_path, **changes))
    for name, tensor in weights(pretrained).items():
        assert torch.equal(weights(folder)[name], tensor), name


def test_features_of_a_dataset_without_attributes_are_an_error(tmp_path: Path) -> None:
    histories = np.random.default_rng(0).integers(1, 30, (20, 6)).tolist()
    data = prepared(tmp_path, histories)
    with pytest.raises(ConfigError, match=r"model\.item_features=add.*dataset has no attributes"):
        run("finetune", config(data, tmp_path))
