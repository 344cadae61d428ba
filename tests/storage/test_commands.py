"""Convert and inspect on a real object store, through a network that fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Bucket

from s3rec_dist.__main__ import main
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare


@pytest.fixture
def local(tmp_path: Path) -> Dataset:
    """Forty users, seven a row group, two row groups a shard."""
    (tmp_path / "toy.txt").write_text(
        "".join(f"u{u} {' '.join(str(1 + u * n % 60) for n in range(1, 9))}\n" for u in range(40))
    )
    sizes = {"rows_per_group": 7, "groups_per_shard": 2}
    settings = PrepareSettings(
        source="s3rec", input=str(tmp_path / "toy.txt"), output=str(tmp_path / "local"), attributes="none", **sizes
    )
    prepare(settings)
    return Dataset.open(settings.output)


def facts_of(url: str, tmp_path: Path, status: int = 0) -> dict[str, Any]:
    """What ``s3rec inspect --verify`` tells."""
    assert main(["inspect", url, "--verify", "--json", str(tmp_path / "facts.json")]) == status
    return json.loads((tmp_path / "facts.json").read_text())


def test_a_dataset_goes_to_the_store_and_back_through_errors(
    local: Dataset, bucket: Bucket, inject: Callable[..., Any], tmp_path: Path
) -> None:
    inject(errors=0.2, truncated=0.1)
    url = f"{bucket.url}/data"
    assert main(["convert", local.path, "--output", url, "--rows-per-group", "3"]) == 0
    there, here = facts_of(url, tmp_path), facts_of(local.path, tmp_path)
    same = ("users", "items", "interactions", "lengths", "popularity", "samples", "content")
    assert {name: there[name] for name in same} == {name: here[name] for name in same}
    assert (
        main(["convert", url, "--output", url, "--format", "webdataset", "--rows-per-group", "20", "--overwrite"]) == 0
    )
    assert [shard.path.rpartition("/")[2] for shard in Dataset.open(url).manifest.shards] == ["00000.tar"]
    back = str(tmp_path / "back")
    arguments = ["--format", "parquet", "--rows-per-group", "7", "--groups-per-shard", "2"]
    assert main(["convert", url, "--output", back, *arguments]) == 0
    assert Dataset.open(back).fingerprint == local.fingerprint


def test_damaged_and_lost_objects_are_listed(local: Dataset, bucket: Bucket, tmp_path: Path) -> None:
    url = f"{bucket.url}/data"
    assert main(["convert", local.path, "--output", url]) == 0
    shards = [shard.path for shard in Dataset.open(url).manifest.shards]
    whole = (bucket.folder / "data" / shards[1]).read_bytes()
    (bucket.folder / "data" / shards[1]).write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    (bucket.folder / "data" / shards[2]).unlink()
    problems = facts_of(url, tmp_path, status=1)["checks"]["problems"]
    assert {problem["file"] for problem in problems} == {shards[1], shards[2]}
    assert any("row group 0" in problem["problem"] for problem in problems if problem["file"] == shards[1])
    assert all("no such file" in problem["problem"] for problem in problems if problem["file"] == shards[2])
