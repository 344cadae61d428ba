"""Items that training has not seen: ranked by their attributes, with a dataset as it was or one that has grown."""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import curve, events, make_config, run, weights

from s3rec_dist import evaluation
from s3rec_dist.config import Config, ConfigError, to_dict
from s3rec_dist.data.append import append
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.evaluation import EvaluationError, evaluate
from s3rec_dist.export import export, load_export, load_model
from s3rec_dist.training.checkpoint import CheckpointError, load_weights

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
    own = load_weights(str(folder))[0]["item_embedding.weight"]
    assert len(own) == max(COLD) + 2
    assert [item for item, row in enumerate(own.tolist()) if item and not any(row)] == list(COLD)


def test_own_rows_of_items_without_training_events_stay_zero_in_pretraining(pretrained: Path) -> None:
    assert_cold_rows_are_zero(pretrained)


@pytest.mark.parametrize("loss", ["bce", "bpr", "ce", "sampled_ce"])
def test_own_rows_of_items_without_training_events_stay_zero_in_finetuning(
    data: Path, pretrained: Path, tmp_path: Path, loss: str
) -> None:
    changes = {"finetune__loss": loss, "finetune__pretrained": str(pretrained), "finetune__negatives": 20}
    assert_cold_rows_are_zero(run("finetune", config(data, tmp_path, **changes)))


@pytest.mark.parametrize(("table", "loss"), [("dense", "ce"), ("sharded", "sampled_ce")])
def test_an_item_that_pretraining_had_is_not_cold_where_finetuning_lacks_it(
    data: Path, pretrained: Path, tmp_path: Path, table: str, loss: str
) -> None:
    draw = random.Random(1)
    histories = [[draw.randint(1, WARM - 10) for _ in range(8)] for _ in range(40)]
    for item in range(WARM - 9, max(COLD) + 1):
        histories[item % 40][-1] = item
    attributes = {str(item): [1 + item % 7] for item in range(1, max(COLD) + 1)}
    other = prepared(tmp_path / "other", histories, attributes)
    changes = {"finetune__loss": loss, "finetune__pretrained": str(pretrained), "model__item_table": table}
    folder = run("finetune", config(other, tmp_path, **changes))
    assert_cold_rows_are_zero(folder)
    before, after = (load_weights(str(at))[0]["item_embedding.weight"] for at in (pretrained, folder))
    assert (before[1 : WARM + 1] != after[1 : WARM + 1]).any(1).all()


@pytest.mark.parametrize(("table", "loss"), [("dense", "ce"), ("sharded", "sampled_ce")])
def test_a_run_goes_on_bit_by_bit(data: Path, tmp_path: Path, table: str, loss: str) -> None:
    changes = {"finetune__loss": loss, "model__item_table": table}
    expected = load_weights(str(run("finetune", config(data, tmp_path / "whole", **changes))))[0]
    run("finetune", config(data, tmp_path / "parts", finetune__epochs=1, **changes))
    found = load_weights(str(run("finetune", config(data, tmp_path / "parts", **changes))))[0]
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


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


# A dataset that has grown

CATEGORIES, WARM_EACH, COLD_EACH = 10, 8, 2


class Shop:
    """Whoever takes an item of a category takes one of the next category next. Two items of each are new later, one of
    them with a second attribute that is new too."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.draw = folder, random.Random(0)
        categories = range(CATEGORIES)
        self.warm = [[f"w{c}-{i}" for i in range(WARM_EACH)] for c in categories]
        self.cold = [[f"n{c}-{i}" for i in range(COLD_EACH)] for c in categories]
        self.next = [self.draw.randrange(CATEGORIES) for _ in range(160)]
        events = [(user, item) for user in range(160) for item in self.walk(user, self.draw.randint(6, 10))]
        path = self.write("old", events, 0, {i: f"c{c}" for c in categories for i in self.warm[c]})
        prepare(PrepareSettings(source="recbole", input=path, output=self.data))

    @property
    def data(self) -> str:
        return str(self.folder / "dataset")

    def walk(self, user: int, steps: int) -> list[str]:
        found = []
        for _ in range(steps):
            found.append(self.draw.choice(self.warm[self.next[user]]))
            self.next[user] = (self.next[user] + 1) % CATEGORIES
        return found

    def grow(self) -> None:
        """Every other user takes a new item, the others a known one."""
        events = [
            (user, self.draw.choice(self.cold[self.next[user]]) if user % 2 else self.walk(user, 1)[0])
            for user in range(160)
        ]
        attributes = {item: f"c{c}" for c in range(CATEGORIES) for item in self.cold[c]}
        attributes["n0-0"] += " new"
        append({"input": self.write("new", events, 10_000, attributes), "output": self.data})

    def write(self, name: str, events: list[tuple[int, str]], start: int, attributes: dict[str, str]) -> str:
        header = "user_id:token\titem_id:token\ttimestamp:float\n"
        rows = "".join(f"u{user}\t{item}\t{start + time}\n" for time, (user, item) in enumerate(events))
        (self.folder / f"{name}.inter").write_text(header + rows)
        rows = "".join(f"{item}\t{values}\n" for item, values in attributes.items())
        (self.folder / f"{name}.item").write_text("item_id:token\tclass:token_seq\n" + rows)
        return str(self.folder / f"{name}.inter")


def shop_config(shop: Shop, output: Path, features: str, **changes: Any) -> Config:
    training = {"epochs": 20, "batch_size": 32, "learning_rate": 5e-3, "loss": "ce", "validate_every_epochs": 20}
    changes = {f"finetune__{name}": value for name, value in training.items()} | changes
    model = {"model__item_features": features, "model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
    return make_config(Path(shop.data), output, **{**model, **changes})


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Grown, with a run of each kind before: with attributes and without."""
    shop = Shop(tmp_path_factory.mktemp("shop"))
    for features in ("none", "add"):
        run("finetune", shop_config(shop, shop.folder / features, features))
    shop.grow()
    return shop


def evaluated(shop: Shop, *models: str) -> dict[str, Any]:
    """What ``s3rec evaluate --cold`` says of each row."""
    parser = argparse.ArgumentParser()
    evaluation.add_arguments(parser)
    output = shop.folder / "cold.json"
    given = ["--model", *models, "--dataset", shop.data, "--cold", "--cutoffs", "10", "--json", str(output)]
    evaluation.run(parser.parse_args([*given, "--device", "cpu"]))
    entries = json.loads(output.read_text())["results"]
    return {", ".join([e["label"], *([e["items"]] if "items" in e else [])]): e for e in entries}


def test_new_items_are_ranked_by_their_attributes(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(shop, *(f"{name}={shop.folder}/{name}/finetune" for name in ("add", "none")))
    lines = capsys.readouterr()
    hits = {name: entry["metrics"]["HR@10"] for name, entry in found.items()}
    assert hits["add, cold items"] > 0.6 > 0.3 > hits["none, cold items"]
    assert hits["add, warm items"] > 0.6
    for name in ("add", "none"):
        users = [found[f"{name}{kind}"]["users"] for kind in ("", ", warm items", ", cold items")]
        assert users == [160, 80, 80]
        mean = (hits[f"{name}, warm items"] + hits[f"{name}, cold items"]) / 2
        assert hits[name] == pytest.approx(mean)
    assert "add, cold items [2]" in lines.out and "80 users" in lines.out
    assert "has 20 items and 1 attributes more than the model was trained on" in lines.err


def test_an_export_for_the_grown_dataset_says_the_same(shop: Shop, tmp_path: Path) -> None:
    dataset, told = Dataset.open(shop.data), list[str]()
    export(str(shop.folder / "add" / "finetune"), dataset, str(tmp_path / "model"), tell=told.append)
    assert len(told) == 1 and load_export(str(tmp_path / "model")).n_items == 100
    found = evaluated(shop, f"run={shop.folder}/add/finetune", f"export={tmp_path}/model")
    for kind in ("", ", warm items", ", cold items"):
        assert found[f"run{kind}"]["metrics"] == found[f"export{kind}"]["metrics"]


@pytest.mark.parametrize("features", ["none", "add"])
def test_finetuning_goes_on_from_a_model_of_the_dataset_before(shop: Shop, tmp_path: Path, features: str) -> None:
    before = shop.folder / features / "finetune"
    changes = {"finetune__pretrained": str(before), "finetune__epochs": 0}
    folder = run("finetune", shop_config(shop, tmp_path, features, **changes))
    assert [(e["new_items"], e["new_attributes"]) for e in events(folder, "pretrained")] == [(20, 1)]
    old, new = load_weights(str(before))[0], weights(folder)
    items = new["item_embedding.weight"]
    assert torch.equal(items[:81], old["item_embedding.weight"][:81])
    assert torch.equal(items[101], old["item_embedding.weight"][81])
    assert bool(items[81:101].any()) == (features == "none")
    attributes = new["attribute_embedding.weight"]
    assert torch.equal(attributes[:-1], old["attribute_embedding.weight"]) and attributes[-1].any()
    for name in old.keys() - {"item_embedding.weight", "attribute_embedding.weight"}:
        assert torch.equal(new[name], old[name]), name


@pytest.mark.parametrize("features", ["none", "add"])
def test_a_sharded_table_goes_on_with_the_dataset_that_has_grown(shop: Shop, tmp_path: Path, features: str) -> None:
    sharded: dict[str, Any] = {"model__item_table": "sharded", "finetune__loss": "sampled_ce", "finetune__epochs": 0}
    old = load_weights(str(shop.folder / features / "finetune"))[0]["item_embedding.weight"]
    before = str(shop.folder / features / "finetune")
    for output, revision in ((tmp_path / "before", 1), (tmp_path / "after", 0)):
        changes = {"finetune__pretrained": before, "data__revision": revision}
        before = str(run("finetune", shop_config(shop, output, features, **sharded, **changes)))
    new = load_weights(before)[0]["item_embedding.weight"]
    assert torch.equal(new[1:81], old[1:81]) and torch.equal(new[101], old[81])
    assert bool(new[81:101].any()) == (features == "none")
    plain = load_model(str(tmp_path / "before" / "finetune"), Dataset.open(shop.data))
    torch.testing.assert_close(
        plain.item_embedding.weight[1:81],
        load_model(before, Dataset.open(shop.data)).item_embedding.weight[1:81],
    )


def test_what_came_new_is_trained_where_it_has_events(shop: Shop, tmp_path: Path) -> None:
    """Each new item is a test item alone so far; after two more events of their users they are warm."""
    grown = copy.copy(shop)
    grown.folder = tmp_path
    shutil.copytree(shop.data, grown.data)
    for start in (20_000, 30_000):
        taken = [(user, shop.warm[0][0]) for user in range(160)]
        append({"input": grown.write("more", taken, start, {shop.warm[0][0]: "c0"}), "output": grown.data})
    changes = {"finetune__pretrained": str(shop.folder / "add" / "finetune"), "finetune__epochs": 1}
    own = weights(run("finetune", shop_config(grown, tmp_path, "add", **changes)))["item_embedding.weight"]
    assert own[81:101].any(1).all()


def test_an_interrupted_run_stays_with_the_dataset_that_it_began_with(shop: Shop, tmp_path: Path) -> None:
    shutil.copytree(shop.folder / "add" / "finetune", tmp_path / "finetune")
    with pytest.raises(CheckpointError, match="was trained on another dataset"):
        run("finetune", shop_config(shop, tmp_path, "add"))
    changes = {"data__revision": 1, "finetune__epochs": 21}
    assert events(run("finetune", shop_config(shop, tmp_path, "add", **changes)), "resume")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"catalogue": "0" * 64}, "other items than"),
        ({"attribute_catalogue": "0" * 64}, "other attributes than"),
        ({"n_items": 101}, "other items than"),
        ({"n_attributes": 12}, "other attributes than"),
    ],
)
def test_a_dataset_that_does_not_begin_with_the_models_ids_is_refused(
    shop: Shop, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    export(str(shop.folder / "add" / "finetune"), Dataset.open(shop.data, revision=1), str(tmp_path / "model"))
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=words):
        load_model(str(tmp_path / "model"), Dataset.open(shop.data))


def test_warm_and_cold_need_the_data_that_was_trained_on(shop: Shop, data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    export(str(shop.folder / "add" / "finetune"), Dataset.open(shop.data), str(model))
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**tree, "trained_on": "0" * 64}))
    with pytest.raises(EvaluationError, match="none of its revisions is what the model was trained on"):
        evaluated(shop, str(model))
    del tree["trained_on"]
    (model / "config.json").write_text(json.dumps(tree))
    with pytest.raises(EvaluationError, match="does not say which data it was trained on"):
        evaluated(shop, str(model))
