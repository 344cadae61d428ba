"""Streaming from a real S3 server through a proxy that spoils traffic: nothing lost, nothing twice, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import Bucket
from fault_proxy import FaultProxy

from s3rec_dist.config import StorageConfig
from s3rec_dist.data.dataset import ATTRIBUTES_SCHEMA, Dataset, DatasetError, new_manifest
from s3rec_dist.data.formats import SHARD_SCHEMA, Format, write_shards
from s3rec_dist.data.order import SampleSpec
from s3rec_dist.data.stream import Stream
from s3rec_dist.storage import Storage, StorageError

ITEMS, USERS = 500, 1200
Batches = list[tuple[list[int], list[int], list[int]]]


@pytest.fixture(scope="module", params=["parquet", "webdataset"])
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 users in 60 row groups of 12 shards."""
    folder = tmp_path_factory.mktemp("local")
    make(folder, request.param)
    return folder


def make(folder: Path, format: Format) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 30, (USERS,), generator=draw).tolist()
    rows = [torch.randint(1, ITEMS + 1, (n,), generator=draw).tolist() for n in lengths]
    groups = [
        pa.record_batch([[f"u{i}" for i in range(a, a + 20)], rows[a : a + 20]], schema=SHARD_SCHEMA)
        for a in range(0, USERS, 20)
    ]
    catalogue = {"id": range(1, ITEMS + 1), "raw": [f"i{i}" for i in range(ITEMS)], "count": [1] * ITEMS}
    new_manifest(
        str(folder),
        name="toy",
        format=format,
        shards=write_shards(groups, str(folder / "shards"), 5, format),
        items=pa.table({**catalogue, "attributes": [[]] * ITEMS}),
        attributes=ATTRIBUTES_SCHEMA.empty_table(),
        preparation={},
        created_with="test",
    )


def batches(url: str, storage: Storage | None = None, cache_bytes: int = 0) -> Batches:
    """Two epochs' batches, row groups read anew each time they are needed."""
    stream = Stream(
        Dataset.open(url, storage),
        SampleSpec("all_prefixes", 20),
        batch_size=64,
        seed=5,
        shuffle_window=64,
        cache_bytes=cache_bytes,
    )
    try:
        return [
            (packed.items.tolist(), packed.offsets.tolist(), packed.sample_ids.tolist())
            for epoch in range(2)
            for packed in stream.iterate(epoch)
        ]
    finally:
        stream.close()


def upload(local: Path, bucket: Bucket) -> str:
    url = f"{bucket.url}/data/toy"
    Storage().publish(str(local), url)
    return url


def test_a_stream_through_errors_stalls_and_spoilt_bodies_is_the_local_one(
    local: Path, bucket: Bucket, inject: Callable[..., FaultProxy]
) -> None:
    url = upload(local, bucket)
    proxy = inject(errors=0.05, stalls=0.01, halts=0.01, truncated=0.05, corrupted=0.05, seed=3)
    began = time.monotonic()
    storage = Storage(StorageConfig(timeout_s=2, retries=12))
    assert batches(url, storage, cache_bytes=1 << 15) == batches(str(local))
    assert time.monotonic() - began < 60
    counts = proxy.counts()
    assert min(counts[fault] for fault in ("errors", "truncated", "corrupted")) > 0


def test_row_groups_are_read_side_by_side(local: Path, bucket: Bucket, inject: Callable[..., FaultProxy]) -> None:
    url = upload(local, bucket)
    proxy = inject(latency=0.05)
    began = time.monotonic()
    stream = Stream(Dataset.open(url), SampleSpec("all_prefixes", 20), batch_size=64, seed=5)
    next(stream.iterate(0))
    seconds = time.monotonic() - began
    stream.close()
    counts = proxy.counts()
    assert counts["requests"] > 60 and counts["most_at_once"] >= 16
    assert seconds < 60 * 0.05


def test_a_cache_saves_requests_and_survives_its_files_being_spoilt(
    local: Path, bucket: Bucket, inject: Callable[..., FaultProxy], tmp_path: Path
) -> None:
    url = upload(local, bucket)
    proxy = inject()
    storage = Storage(StorageConfig(cache_dir=str(tmp_path / "cache")))
    expected = batches(url, storage)
    before = proxy.counts()["requests"]
    assert batches(url, storage) == expected
    assert proxy.counts()["requests"] - before < 10  # manifest and index
    kept = [path for path in (tmp_path / "cache").rglob("*") if len(path.name) == 64]
    assert len(kept) >= 60
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert batches(url, storage) == expected


def test_a_store_that_stays_away_is_an_error_in_bounded_time(
    local: Path, bucket: Bucket, inject: Callable[..., FaultProxy]
) -> None:
    url = upload(local, bucket)
    storage = Storage(StorageConfig(timeout_s=1, retries=1))
    dataset = Dataset.open(url, storage)
    assert len(dataset.index) == 60
    inject(stalls=1.0)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://bucket-.*/shards/00000.*failed 2 times"):
        dataset.read_row_group(0)
    assert time.monotonic() - began < 20


def test_an_object_that_is_gone_or_short_names_the_shard(local: Path, bucket: Bucket) -> None:
    url = upload(local, bucket)
    first, second = sorted((bucket.folder / "data" / "toy" / "shards").iterdir())[:2]
    dataset = Dataset.open(url, Storage(StorageConfig(retries=1)))
    second.write_bytes(second.read_bytes()[:100])
    first.unlink()
    with pytest.raises(DatasetError, match=f"{first.name}: no such file"):
        dataset.read_row_group(0)
    with pytest.raises(DatasetError, match=f"{second.name}: row group 4: has 100 bytes"):
        dataset.read_row_group(9)
    with pytest.raises(DatasetError, match=f"{first.name}|{second.name}"):
        dataset.verify(hashes=False)
