"""Baselines by their definitions, intervals that cover, and a comparison of four recommenders from end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import open_page
from handmade import random_groups, write
from shop import USERS, write_shop

from s3rec_dist.__main__ import main
from s3rec_dist.config import Config, EvaluationConfig
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.evaluation import Scorer, held_out, user_ranks
from s3rec_dist.reports import baselines
from s3rec_dist.reports.bootstrap import interval, resampled_means, user_metrics
from s3rec_dist.reports.compare import S3REC, SASREC, summary


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write(tmp_path_factory.mktemp("baselines") / "dataset", random_groups())


def scores_of(scorer: Scorer, dataset: Dataset) -> np.ndarray:
    """[U, N] of the test histories."""
    parts = []
    for batch in held_out(dataset, "test", 7):
        users, items = scorer(batch.histories)
        parts.append(users @ items.part(0, dataset.n_items).T)
    return torch.cat(parts).numpy()


def incidence(dataset: Dataset) -> np.ndarray:
    """[U, N]: how often a user's test history has an item."""
    rows = []
    for batch in held_out(dataset, "test", 7):
        h = batch.histories
        for a, b in zip(h.starts, h.ends, strict=True):
            rows.append(np.bincount(h.values[a:b], minlength=dataset.n_items + 1)[1:])
    return np.stack(rows).astype(float)


def test_popularity_counts_what_the_split_leaves(dataset: Dataset) -> None:
    expected = incidence(dataset).sum(0)
    found = scores_of(baselines.popularity(dataset, "test"), dataset)
    assert np.array_equal(found, np.tile(expected, (len(found), 1)))


@pytest.mark.parametrize("neighbours", [3, 100])
def test_item_neighbours_are_those_of_the_definition(
    dataset: Dataset, neighbours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_PAIRS_AT_ONCE", 500)
    taken = (incidence(dataset) > 0).astype(float)
    users = taken.sum(0)
    similar = (taken.T @ taken) / (np.sqrt(np.outer(users, users)) + 10)
    np.fill_diagonal(similar, 0)
    for row in similar:
        row[np.argsort(-row, kind="stable")[neighbours:]] = 0
    expected = taken @ similar
    found = scores_of(baselines.item_neighbours(dataset, "test", neighbours), dataset)
    assert np.abs(found - expected).max() < similar[similar > 0].min()  # no more than breaks ties
    if not expected.all():  # where nothing else tells, popularity does
        row = int(np.argmin(expected.all(1)))
        zero = np.flatnonzero(expected[row] == 0)
        assert np.array_equal(np.argsort(found[row, zero], kind="stable"), np.argsort(users[zero], kind="stable"))


@pytest.mark.parametrize("protocol", ["full", "sampled"])
def test_baselines_are_ranked_as_models_are(dataset: Dataset, protocol: str) -> None:
    config = EvaluationConfig(protocol=protocol, negatives=5, batch_users=11)  # type: ignore[arg-type]
    ranks, line = user_ranks(baselines.popularity(dataset, "test"), dataset, config, "test")
    assert len(ranks) == dataset.n_rows and "test item" in line
    if protocol == "full":
        counts, expected = incidence(dataset).sum(0), []
        seen = incidence(dataset) > 0
        targets = np.concatenate([batch.targets for batch in held_out(dataset, "test", 7)])
        for row, target in enumerate(targets):
            open_items = ~seen[row]
            open_items[target - 1] = False
            expected.append(int((counts[open_items] > counts[target - 1]).sum()))
        assert ranks.tolist() == expected


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draw, covered = np.random.default_rng(0), 0
    for trial in range(300):
        hits = draw.random(200) < 0.3
        low, high = interval(resampled_means(hits[:, None].astype(float), 300, seed=trial)[:, 0])
        covered += low <= 0.3 <= high
    assert 0.90 < covered / 300 < 0.98


def test_resampled_means_are_those_of_users_drawn_with_replacement() -> None:
    values = np.random.default_rng(1).random((50, 2))
    draws = np.random.default_rng(5)
    expected = np.stack([values[draws.integers(0, 50, 50)].mean(0) for _ in range(20)])
    assert np.allclose(resampled_means(values, 20, seed=5), expected, atol=1e-12)


def test_a_difference_that_every_user_shares_is_sure_and_none_is_not() -> None:
    ranks = np.random.default_rng(0).integers(1, 40, 400)
    config = Config(evaluation=EvaluationConfig(cutoffs=(10,)))
    better = summary({SASREC: ranks, S3REC: ranks - 1}, config, "shop", "", "")
    assert better.gains[SASREC]["MRR"].low > 0
    assert better.answer("MRR").startswith("Pretraining pays on shop: MRR +")
    same = summary({SASREC: ranks, S3REC: np.random.default_rng(1).permutation(ranks)}, config, "shop", "", "")
    assert same.answer("MRR").startswith("Whether pretraining pays is not sure on shop")
    worse = summary({SASREC: ranks, S3REC: ranks + 9}, config, "shop", "", "")
    assert worse.answer("NDCG@10").startswith("Pretraining costs on shop")
    assert better.metrics[S3REC]["HR@10"].mean == user_metrics(ranks - 1, [10])["HR@10"].mean()


@pytest.mark.parametrize(("module", "told"), [("plotly.graph_objects", "plotly"), ("scipy.sparse", "scipy")])
def test_a_missing_library_is_told_before_training(
    tmp_path: Path, module: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["compare", "--data", "nowhere", "--output", str(tmp_path / "cmp")]) == 2
    error = capsys.readouterr().err
    assert told in error and "pip install 's3rec-dist[report]'" in error and "nowhere" not in error


@pytest.mark.slow
def test_from_a_dataset_to_an_answer_and_again(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    launch: Callable[..., list[str]],
) -> None:
    pytest.importorskip("plotly")
    write_shop(tmp_path)
    monkeypatch.chdir(tmp_path)
    columns = ["--user-column", "user", "--item-column", "item", "--time-column", "ts"]
    source = ["--source", "table", "--input", "events/*.parquet", *columns]
    attributes = ["--attributes", "items.parquet", "--attribute-fields", "brand", "category"]
    assert main(["prepare", *source, *attributes, "--output", "data/mine"]) == 0
    small = ["model.hidden_size=16", "model.inner_size=16", "model.max_length=8", "pretrain.epochs=1"]
    command = ["compare", "--data", "data/mine", "--output", "cmp", *small, "finetune.epochs=2", "engine.threads=1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for name in ("popularity", "item neighbours", "SASRec", "S3-Rec"):
        assert f"\n{name} " in printed
    assert f"{USERS} users; ± half of the 95% interval" in printed and "loss ce" in printed
    found = json.loads((tmp_path / "cmp/compare.json").read_text())
    assert set(found["gains"]) == {"popularity", "item neighbours", "SASRec"}
    launch(2, ["-m", "s3rec_dist", *command, "output=two"])
    both = json.loads((tmp_path / "two/compare.json").read_text())
    for name, metrics in found["metrics"].items():
        assert both["metrics"][name]["MRR"]["mean"] == pytest.approx(metrics["MRR"]["mean"], abs=1e-3)
    assert main([*command, "evaluation.cutoffs=[5]"]) == 0  # nothing is trained again
    again = json.loads((tmp_path / "cmp/compare.json").read_text())
    assert again["metrics"]["S3-Rec"]["MRR"] == found["metrics"]["S3-Rec"]["MRR"]
    assert "finetune start" not in capsys.readouterr().out
    with open_page(f"file://{tmp_path}/cmp/compare.html", 390) as (page, wrong):
        assert "Does pretraining pay on events?" in page.inner_text("h1")
        assert "against the same model from scratch" in page.inner_text("body")
        assert page.locator(".js-plotly-plot").count() == 3
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not wrong
