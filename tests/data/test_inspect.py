"""What is told about a dataset is true, needs no shard, and every damaged file is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s3rec_dist.__main__ import main
from s3rec_dist.config import Config
from s3rec_dist.data.dataset import Dataset, ItemAttributes, new_manifest
from s3rec_dist.data.formats import SHARD_SCHEMA, content_of, write_shards
from s3rec_dist.data.inspect import attribute_facts, format_facts, inspect, length_facts, popularity_facts
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.storage import Storage, StorageError
from s3rec_dist.training.loop import Task

HISTORIES = {
    "ann": [1, 2, 3, 2],
    "bob": [4, 1, 5],
    "cyd": [5, 4, 3, 2, 1],
    "dan": [2, 2, 2],
    "eve": [3, 1, 4, 5, 2, 1, 3],
}
ATTRIBUTES = {"1": [2, 1], "2": [3], "4": [1], "5": []}
FORMATS = ("parquet", "webdataset")


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., Dataset]:
    """``toy("webdataset")``: five users, two a row group, two row groups a shard."""

    def make(format: str = "parquet") -> Dataset:
        text = "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in HISTORIES.items())
        (tmp_path / "toy.txt").write_text(text)
        (tmp_path / "toy_item2attributes.json").write_text(json.dumps(ATTRIBUTES))
        output = str(tmp_path / format)
        sizes = {"rows_per_group": 2, "groups_per_shard": 2}
        prepare(PrepareSettings(source="s3rec", input=str(tmp_path / "toy.txt"), output=output, format=format, **sizes))
        return Dataset.open(output)

    return make


def with_another_file(dataset: Dataset) -> Dataset:
    """The dataset with one more file beside the catalogue, and that in its manifest."""
    data = b"something else" * 9
    (Path(dataset.path) / "more.bin").write_bytes(data)
    files = {**dataset.manifest.files, "more.bin": hashlib.sha256(data).hexdigest()}
    manifest = dataclasses.replace(dataset.manifest, files=files)
    (Path(dataset.path) / "manifest.json").write_text(manifest.to_json())
    return Dataset.open(dataset.path)


def without_ann(dataset: Dataset) -> Dataset:
    """A second revision, in which another history replaces ann's."""
    ann = pa.RecordBatch.from_pydict({"user": ["ann"], "items": [HISTORIES["ann"]]}, SHARD_SCHEMA)
    new = pa.RecordBatch.from_pydict({"user": ["ann"], "items": [[1, 2, 3, 4, 5, 4]]}, SHARD_SCHEMA)
    new_manifest(
        dataset.path,
        name="toy",
        format=dataset.manifest.format,
        shards=write_shards([new], os.path.join(dataset.path, "v2", "shards"), 2, dataset.manifest.format),
        items=dataset.items_table(),
        attributes=dataset.attributes_table(),
        preparation=dataset.manifest.preparation,
        created_with="a test",
        before=dataset,
        dead={0: np.array([0])},
        dead_content=content_of(ann.column(0), np.array(HISTORIES["ann"], np.int32), np.array([0, 4])),
    )
    return Dataset.open(dataset.path)


lengths_lists = st.lists(st.integers(1, 400), min_size=1, max_size=60)


@given(lengths_lists)
def test_lengths_are_summed_up_from_their_counts(drawn: list[int]) -> None:
    lengths, counts = np.unique(drawn, return_counts=True)
    twice = np.concatenate([lengths, lengths])  # as two row groups have them
    facts = length_facts(twice.astype(np.int32), np.concatenate([counts, counts]).astype(np.int32))
    assert facts["mean"] == pytest.approx(np.mean(drawn))
    assert (facts["median"], facts["min"], facts["max"]) == (np.median(drawn), min(drawn), max(drawn))
    buckets = facts["histogram"]
    for bucket in buckets:
        assert bucket["users"] == 2 * sum(bucket["from"] <= n <= bucket["to"] for n in drawn)
        assert bucket["to"] + 1 <= max(1.5 * bucket["from"], bucket["from"] + 1)
    assert buckets[0]["from"] <= min(drawn) <= buckets[0]["to"] and buckets[-1]["to"] >= max(drawn)
    assert sum(bucket["users"] for bucket in buckets) == 2 * len(drawn)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any))
def test_popularity_is_that_of_the_items_somebody_took(drawn: list[int]) -> None:
    facts = popularity_facts(np.array(drawn, dtype=np.int64))
    taken = sorted((n for n in drawn if n), reverse=True)
    assert facts["never_taken"] == drawn.count(0)
    assert facts["top_item"] == taken[0] / sum(taken)
    assert facts["top_10_percent"] == sum(taken[: -(-len(taken) // 10)]) / sum(taken)
    differences = np.abs(np.subtract.outer(taken, taken)).mean()
    assert facts["gini"] == pytest.approx(differences / (2 * np.mean(taken)), abs=1e-12)


def test_attributes_are_told_by_field_and_together() -> None:
    lists = ItemAttributes(np.array([0, 0, 3, 3, 4, 6, 6]), np.array([1, 2, 3, 1, 1, 3], dtype=np.int32))  # items 1..4
    facts = attribute_facts(lists, pa.chunked_array([["tag", "tag"], ["brand", "brand"]]))
    assert facts == {
        "tag": {"items": 0.75, "values": 2, "mean": 1.0},
        "brand": {"items": 0.5, "values": 1, "mean": 0.5},
        "all": {"items": 0.75, "values": 3, "mean": 1.5},
    }
    nothing = ItemAttributes(np.zeros(7, np.int64), np.empty(0, np.int32))
    assert attribute_facts(nothing, pa.chunked_array([], pa.string())) == {}


def test_the_published_datasets_have_their_known_counts(published_data: Path, tmp_path: Path) -> None:
    samples = {}
    for name, users, items in (("Beauty", 22_363, 12_101), ("LastFM", 1_090, 3_646)):
        output = str(tmp_path / name)
        prepare(PrepareSettings(source="s3rec", input=str(published_data / f"{name}.txt"), output=output))
        facts = inspect(Dataset.open(output), verify=True)
        assert (facts["users"], facts["items"], facts["checks"]["problems"]) == (users, items, [])
        assert facts["lengths"]["mean"] == pytest.approx(facts["interactions"] / users)
        samples[name] = facts["samples"]["pretrain"]
    assert samples == {"Beauty": 150_258, "LastFM": 25_726}


def test_samples_are_those_that_training_takes(ml100k: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "ml")
    prepare(PrepareSettings(source="recbole", input=str(ml100k), output=output))
    dataset = Dataset.open(output)
    samples = inspect(dataset)["samples"]
    for stage in ("pretrain", "finetune"):
        spec = Task(Config(), stage, dataset, torch.device("cpu")).spec
        assert samples[stage] == spec.counts(dataset.index.lengths.astype(np.int64)) @ dataset.index.counts


@pytest.mark.parametrize("format", FORMATS)
def test_no_shard_is_read_unless_to_verify_it(format: str, toy: Callable[..., Dataset]) -> None:
    class NoShards(Storage):
        def read_range(self, url: str, offset: int, size: int) -> bytes:
            if "/shards/" not in url:
                return super().read_range(url, offset, size)
            raise StorageError(f"{url}: read")

        def sha256(self, url: str) -> str:
            raise StorageError(f"{url}: read")

    dataset = toy(format)
    facts = inspect(Dataset.open(dataset.path, NoShards()))
    assert facts["lengths"]["mean"] == 22 / 5 and facts["checks"] == {
        **facts["checks"],
        "verified": False,
        "problems": [],
    }
    with pytest.raises(StorageError, match=r"shards/.*: read"):
        inspect(Dataset.open(dataset.path, NoShards()), verify=True)


@pytest.mark.parametrize("format", FORMATS)
def test_a_byte_that_changes_anywhere_is_found(format: str, toy: Callable[..., Dataset]) -> None:
    dataset = with_another_file(toy(format))
    assert inspect(dataset, verify=True)["checks"]["problems"] == []
    for name in [*dataset.manifest.files, *(shard.path for shard in dataset.manifest.shards)]:
        path = Path(dataset.path) / name
        whole = path.read_bytes()
        for place in np.linspace(0, len(whole) - 1, 12).astype(int):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            problems = inspect(Dataset.open(dataset.path), verify=True)["checks"]["problems"]
            assert {problem["file"] for problem in problems} == {name}
            assert any("SHA-256" in problem["problem"] for problem in problems)
        path.write_bytes(whole)


def test_all_that_is_wrong_is_listed_and_the_status_is_1(
    toy: Callable[..., Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = toy()
    assert main(["inspect", dataset.path, "--verify"]) == 0
    assert "checks: all hashes and all 3 row groups are right (" in capsys.readouterr().out
    folder = Path(dataset.path)
    shard = folder / "shards" / "00000.parquet"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    (folder / "shards" / "00001.parquet").unlink()
    (folder / "items.parquet").write_bytes(b"nothing")
    assert main(["inspect", dataset.path, "--json", str(tmp_path / "facts.json")]) == 1
    out = capsys.readouterr().out
    assert out.endswith(
        "checks: FAILED for 3 files; restore them or prepare the dataset again\n"
        "  items.parquet\n    its SHA-256 is not the manifest's\n"
        f"  shards/00000.parquet\n    has {size - 1:,} bytes, the manifest says {size:,}\n"
        "  shards/00001.parquet\n    no such file, but the manifest lists it\n"
    )
    assert "interactions of a user: 3 to 7" in out and "popularity" not in out
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert [p["file"] for p in facts["checks"]["problems"]] == [
        "items.parquet",
        *(s.path for s in dataset.manifest.shards),
    ]


def test_without_its_index_the_rest_is_still_told_and_checked(toy: Callable[..., Dataset]) -> None:
    dataset = toy()
    (Path(dataset.path) / "index.parquet").unlink()
    (Path(dataset.path) / "shards" / "00001.parquet").write_bytes(b"short")
    facts = inspect(Dataset.open(dataset.path), verify=True)
    assert [p["file"] for p in facts["checks"]["problems"]] == ["index.parquet", "shards/00001.parquet"]
    assert "lengths" not in facts and facts["popularity"]["never_taken"] == 0
    assert "checks: FAILED for 2 files" in format_facts(facts)


def test_a_content_that_is_not_that_of_the_rows_is_found(toy: Callable[..., Dataset]) -> None:
    dataset = toy()
    manifest = dataclasses.replace(dataset.manifest, rows_content=(1, 2))
    (Path(dataset.path) / "manifest.json").write_text(manifest.to_json())
    assert inspect(Dataset.open(dataset.path))["checks"]["problems"] == []
    (problem,) = inspect(Dataset.open(dataset.path), verify=True)["checks"]["problems"]
    assert problem["file"] == "manifest.json" and "content" in problem["problem"]


@pytest.mark.parametrize("format", FORMATS)
def test_only_living_rows_count_and_earlier_revisions_can_be_shown(
    format: str, toy: Callable[..., Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = without_ann(toy(format))
    facts = inspect(dataset, verify=True)
    assert (facts["revision"], facts["users"], facts["interactions"]) == (2, 5, 24)
    assert facts["row_groups"]["rows"]["total"] == 6 and facts["row_groups"]["dead_rows"] == 1
    assert facts["lengths"]["mean"] == 24 / 5 and facts["checks"]["problems"] == []
    assert "1 of these rows have been replaced since" in format_facts(facts)
    assert main(["inspect", dataset.path, "--revision", "1", "--verify"]) == 0
    assert "revision 1" in capsys.readouterr().out
    (Path(dataset.path) / "v2" / "items.parquet").write_bytes(b"nothing")
    problems = inspect(Dataset.open(dataset.path))["checks"]["problems"]
    assert [problem["file"] for problem in problems] == ["v2/items.parquet"]


def test_a_dataset_on_other_storage_is_inspected_alike(toy: Callable[..., Dataset]) -> None:
    local = toy()
    filesystem = fsspec.filesystem("memory")
    filesystem.put(local.path, "/inspected", recursive=True)
    try:
        there = inspect(Dataset.open("memory://inspected"), verify=True)
        here = inspect(local, verify=True)
        assert there["path"] == "memory://inspected" and there["checks"]["problems"] == []
        for facts in (here, there):
            del facts["path"], facts["checks"]["seconds"]
        assert here == there
    finally:
        filesystem.rm("/inspected", recursive=True)


PRINTED = """\
toy: parquet, revision 1, made with s3rec_dist 0.0
  users                5
  items                5
  interactions        22
  attributes           3
  density       88.0000%

interactions of a user: 3 to 7, mean 4.40, median 4
  3    2  40.0%  ################################
  4-5  2  40.0%  ################################
  6-7  1  20.0%  ################

popularity of items, as a share of interactions
  most popular item  31.82%
  top 1%             31.82%
  top 10%            31.82%
  Gini coefficient    0.182
  never taken             0

attributes   items with any  values  mean per item
  attribute           60.0%       3           0.80

samples of an epoch, model.max_length=50
  pretrain  12
  finetune   3

files         count   total  smallest  median  largest
  shards          2  2.2 GB    1.0 MB  1.1 GB   2.2 GB
  row groups      3   600 B     100 B   200 B    300 B
  their rows              5         1       2        2

preparation from toy.txt
  rows read      23
  users read  1,234
  bad rows        1
  toy.txt:3: empty user id

fingerprint  abc
content      def

checks: all shards have the right size; --verify reads them too"""


def test_what_a_person_reads(toy: Callable[..., Dataset]) -> None:
    facts = inspect(toy())
    spread = {"min": 1_000_000, "median": 1_100_500_000, "max": 2_200_000_000, "total": 2_201_000_000}
    facts |= {
        "created_with": "s3rec_dist 0.0",
        "fingerprint": "abc",
        "content": "def",
        "shards": {"count": 2, **spread},
    }
    facts["row_groups"] |= {"total": 600, "min": 100, "median": 200, "max": 300}
    counted = {"bad_rows": 1, "short_users": 0, "rows_read": 23, "users_read": 1234, "last_time": 99}
    examples = ["toy.txt:3: empty user id"]
    facts["preparation"] = {"settings": {"input": "toy.txt"}, **counted, "bad_row_examples": examples}
    assert format_facts(facts) == PRINTED


def test_nothing_heavy_is_loaded(toy: Callable[..., Dataset]) -> None:
    script = (
        "import sys; from s3rec_dist.__main__ import main\n"
        f"main(['inspect', {toy('webdataset').path!r}, '--verify'])\n"
        "heavy = {'torch', 'deepspeed', 'duckdb', 'webdataset', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
