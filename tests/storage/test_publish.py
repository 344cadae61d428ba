"""Folders that are published or moved: whole under their name, or not there, wherever the process dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Bucket
from fault_proxy import FaultProxy
from processes import start_process

from s3rec_dist.config import StorageConfig
from s3rec_dist.storage import Storage, StorageError

FILES = {f"shards/{i:02d}": os.urandom(20_000) for i in range(12)} | {"index": b"i" * 500, "manifest.json": b"{}"}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name, data in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(tmp_path / "folder")


def objects(folder: Path) -> dict[str, bytes]:
    """What lies in a bucket's folder, without the server's own drafts."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".rclone_temp_")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_manifest_goes_up_last(folder: str, bucket: Bucket, inject: Callable[..., FaultProxy]) -> None:
    proxy = inject(errors=0.2, latency=0.02, seed=3)
    Storage(StorageConfig(retries=8, timeout_s=5)).publish(folder, f"{bucket.url}/data")
    assert objects(bucket.folder / "data") == FILES
    puts = [path.partition("/data/")[2].partition("?")[0] for method, path, status in proxy.requests() if status == 200]
    puts = [name for name in puts if name in FILES]
    assert "manifest.json" in puts and set(puts[: puts.index("manifest.json")]) == set(FILES) - {"manifest.json"}
    counts = proxy.counts()
    assert counts["errors"] > 0 and counts["most_at_once"] > 1


def test_without_one_of_its_files_no_manifest_goes_up(
    folder: str, bucket: Bucket, inject: Callable[..., FaultProxy]
) -> None:
    inject(errors=1, path="shards/07")
    with pytest.raises(StorageError, match=f"{bucket.url}/data/shards/07: failed 2 times"):
        Storage(StorageConfig(retries=1, timeout_s=5)).publish(folder, f"{bucket.url}/data")
    assert "manifest.json" not in objects(bucket.folder / "data")


PROGRAM = """
import sys
from s3rec_dist.storage import Storage
storage = Storage()
print("ready", flush=True)
getattr(storage, sys.argv[1])(*sys.argv[2:])
"""


def kill(seconds: float, *arguments: str) -> bool:
    """Runs a method of Storage in a process and kills it so many seconds after its start; False where it was done."""
    process = start_process([sys.executable, "-c", PROGRAM, *arguments], {})
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    done = process.poll() is not None
    if not done:
        process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    return not done


def test_a_killed_publish_leaves_no_manifest_and_what_else_is_there_alone(
    folder: str, bucket: Bucket, inject: Callable[..., FaultProxy]
) -> None:
    Storage().publish(folder, f"{bucket.url}/other")
    inject(latency=0.1)
    killed = [kill(seconds, "publish", folder, f"{bucket.url}/data{seconds}") for seconds in (0.3, 0.6, 0.8, 1.2)]
    assert any(killed)
    for place in bucket.folder.glob("data*"):
        found = objects(place)
        assert found == FILES if "manifest.json" in found else found.items() <= FILES.items()
    assert objects(bucket.folder / "other") == FILES


def test_a_moved_folder_is_whole_in_one_place_at_least_wherever_the_process_dies(
    folder: str, bucket: Bucket, inject: Callable[..., FaultProxy]
) -> None:
    storage = Storage()
    inject(latency=0.05)
    killed = []
    for seconds in (0.3, 0.6, 0.9, 1.2, 5):
        storage.publish(folder, f"{bucket.url}/from{seconds}")
        killed.append(kill(seconds, "move", f"{bucket.url}/from{seconds}", f"{bucket.url}/to{seconds}"))
        before, after = objects(bucket.folder / f"from{seconds}"), objects(bucket.folder / f"to{seconds}")
        assert FILES in (before, after)
        assert after == FILES if "manifest.json" in after else before == FILES
    assert killed[0] and not killed[-1] and (before, after) == ({}, FILES)


def test_a_folder_moves_through_errors(folder: str, bucket: Bucket, inject: Callable[..., FaultProxy]) -> None:
    storage = Storage(StorageConfig(retries=8, timeout_s=5))
    storage.publish(folder, f"{bucket.url}/from")
    proxy = inject(errors=0.2)
    storage.move(f"{bucket.url}/from", f"{bucket.url}/to")
    assert (objects(bucket.folder / "from"), objects(bucket.folder / "to")) == ({}, FILES)
    assert proxy.counts()["errors"] > 0
