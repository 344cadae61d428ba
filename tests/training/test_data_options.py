"""Training on either format, on several datasets at once, and around damaged shards: the same on any processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import curve, died_run, events, make_config, make_dataset, metrics, run

from s3rec_dist.config import ConfigError, to_dict
from s3rec_dist.data.dataset import Dataset, DatasetError
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.training.loop import TrainingError

RUNS = str(Path(__file__).with_name("runs.py"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other users' histories of the same items."""
    folder = tmp_path_factory.mktemp("other")
    make_dataset(folder, seed=3, users=31)
    return folder / "dataset"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with one byte of its second shard's second row group changed."""
    folder = tmp_path_factory.mktemp("damaged")
    make_dataset(folder)
    flip(folder / "dataset", 5)
    return folder / "dataset"


def flip(folder: Path, group: int) -> None:
    dataset = Dataset.open(str(folder))
    path = folder / dataset.manifest.shards[dataset.index.shard[group]].path
    data = bytearray(path.read_bytes())
    data[dataset.index.offset[group] + dataset.index.size[group] // 2] ^= 4
    path.write_bytes(data)


def on_two_processes(launch: Callable[..., list[str]], tmp_path: Path, config: Any) -> list[str]:
    """What each rank raised, or ''."""
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps({"run": {"stage": "pretrain", "config": to_dict(config)}}))
    output = launch(2, [RUNS, str(jobs)])[0]
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT "))[7:])["run"]


def test_both_formats_train_alike_to_the_last_bit(dataset: Path, tmp_path: Path) -> None:
    raw = dataset.parent / "raw.txt"
    prepare(
        PrepareSettings(
            source="s3rec",
            input=str(raw),
            output=str(tmp_path / "tars"),
            format="webdataset",
            rows_per_group=8,
            groups_per_shard=4,
        )
    )
    curves = [
        curve(run("pretrain", make_config(folder, tmp_path / name, pretrain__epochs=1)))
        for name, folder in (("parquet", dataset), ("webdataset", tmp_path / "tars"))
    ]
    assert curves[0] == curves[1] and len(curves[0]) > 10


def test_mixed_datasets_train_alike_on_two_processes_and_after_a_stop(
    dataset: Path, other: Path, tmp_path: Path, launch: Callable[..., list[str]]
) -> None:
    mix = [{"path": str(other), "weight": 0.4}]
    more = {"data__mix": mix, "pretrain__epochs": 2, "pretrain__checkpoint_every_steps": 7}
    alone = curve(run("pretrain", make_config(dataset, tmp_path / "alone", **more)))
    single = curve(run("pretrain", make_config(dataset, tmp_path / "single", pretrain__epochs=2)))
    assert len(alone) > len(single)

    config = make_config(dataset, tmp_path / "stopped", **more)
    died_run("pretrain", config, 10)
    assert curve(run("pretrain", config)) == alone

    config = make_config(dataset, tmp_path / "two", **more)
    assert on_two_processes(launch, tmp_path, config) == ["", ""]
    assert curve(tmp_path / "two" / "pretrain") == pytest.approx(alone, rel=1e-6)

    config = make_config(dataset, tmp_path / "alone", **{**more, "data__mix": [{**mix[0], "weight": 0.5}]})
    with pytest.raises(ValueError, match=r"was trained on another dataset than .* with this data\.mix"):
        run("pretrain", config)


def test_datasets_of_other_items_are_not_mixed(dataset: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "larger", items=61)
    mix = [{"path": str(tmp_path / "larger" / "dataset")}]
    with pytest.raises(ConfigError, match="has other items than"):
        run("pretrain", make_config(dataset, tmp_path, data__mix=mix))


def test_a_damaged_shard_is_left_out_on_all_processes_alike_and_told(
    dataset: Path, damaged: Path, tmp_path: Path, launch: Callable[..., list[str]]
) -> None:
    with pytest.raises(DatasetError, match=r"shards/00001\.parquet: row group 1"):
        run("pretrain", make_config(damaged, tmp_path / "stop", pretrain__epochs=1))

    skip = {"data__on_bad_shard": "skip", "pretrain__epochs": 1}
    folder = run("pretrain", make_config(damaged, tmp_path / "alone", **skip))
    (event,) = events(folder, "left_out")
    assert event["shard"].endswith("shards/00001.parquet")
    assert event["reason"].startswith("row group 1: ") and "SHA-256" in event["reason"]
    alone = curve(folder)
    whole = curve(run("pretrain", make_config(dataset, tmp_path / "whole", pretrain__epochs=1)))
    assert alone.keys() == whole.keys() and alone != whole

    config = make_config(damaged, tmp_path / "two", **skip)
    assert on_two_processes(launch, tmp_path, config) == ["", ""]
    assert curve(tmp_path / "two" / "pretrain") == pytest.approx(alone, rel=1e-6)
    assert len(events(tmp_path / "two" / "pretrain", "left_out")) == 1


def test_damage_cannot_be_both_looked_for_before_training_and_left_out(dataset: Path, tmp_path: Path) -> None:
    both = {"data__on_bad_shard": "skip", "data__verify": "hash"}
    with pytest.raises(ConfigError, match="choose one of them"):
        run("pretrain", make_config(dataset, tmp_path, **both))


def test_more_damaged_shards_than_may_be_left_out_stop_the_run(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    for group in (0, 5, 9):
        flip(tmp_path / "dataset", group)
    skip = {"data__on_bad_shard": "skip", "data__max_bad_shards": 2}
    with pytest.raises((DatasetError, TrainingError), match=r"damaged"):
        run("pretrain", make_config(tmp_path / "dataset", tmp_path / "few", **skip))
    skip["data__max_bad_shards"] = 3
    folder = run("finetune", make_config(tmp_path / "dataset", tmp_path / "enough", finetune__epochs=2, **skip))
    assert metrics(folder)[-1]["status"] == "finished" and len(events(folder, "left_out")) == 3
