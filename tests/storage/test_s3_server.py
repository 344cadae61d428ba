"""The test server keeps S3's promises that the package leans on, through plain s3fs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest
from conftest import Bucket
from s3_server import serve_s3


@pytest.fixture
def s3(bucket: Bucket) -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("s3", use_listings_cache=False)


def listens(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    try:
        socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_what_is_put_is_got_whole_and_in_ranges(s3: fsspec.AbstractFileSystem, bucket: Bucket) -> None:
    content = os.urandom(100_000)
    s3.pipe(f"{bucket.name}/folder/name", content)
    assert (bucket.folder / "folder" / "name").read_bytes() == content
    assert s3.cat_file(f"{bucket.name}/folder/name") == content
    assert s3.cat_file(f"{bucket.name}/folder/name", start=1000, end=1010) == content[1000:1010]
    assert s3.info(f"{bucket.name}/folder/name")["size"] == len(content)


def test_large_objects_go_up_in_parts_and_appear_only_when_whole(s3: fsspec.AbstractFileSystem, bucket: Bucket) -> None:
    content = os.urandom(11 << 20)
    with s3.open(f"{bucket.name}/large", "wb", block_size=5 << 20) as file:
        file.write(content)
        assert file.mpu is not None and not s3.exists(f"{bucket.name}/large")
    assert s3.cat_file(f"{bucket.name}/large") == content


def test_listings_go_past_a_page_of_a_thousand(s3: fsspec.AbstractFileSystem, bucket: Bucket) -> None:
    names = [f"{bucket.name}/many/{i:04d}" for i in range(1200)]
    (bucket.folder / "many").mkdir()
    for name in names:
        (bucket.server.folder / name).touch()
    assert s3.find(f"{bucket.name}/many") == names
    assert s3.ls(bucket.name) == [f"{bucket.name}/many"]


def test_copied_moved_and_deleted_objects_are_where_they_should_be(
    s3: fsspec.AbstractFileSystem, bucket: Bucket
) -> None:
    s3.pipe({f"{bucket.name}/a/1": b"one", f"{bucket.name}/a/2": b"two"})
    s3.copy(f"{bucket.name}/a/1", f"{bucket.name}/b/1")
    s3.mv(f"{bucket.name}/a/2", f"{bucket.name}/b/2")
    assert s3.find(bucket.name) == [f"{bucket.name}/{name}" for name in ("a/1", "b/1", "b/2")]
    s3.rm(f"{bucket.name}/b", recursive=True)
    assert s3.find(bucket.name) == [f"{bucket.name}/a/1"]


def test_a_missing_object_is_not_found_and_a_wrong_secret_not_permitted(
    s3: fsspec.AbstractFileSystem, bucket: Bucket
) -> None:
    with pytest.raises(FileNotFoundError):
        s3.cat_file(f"{bucket.name}/none")
    s3.pipe(f"{bucket.name}/one", b"1")
    with pytest.raises(PermissionError):
        fsspec.filesystem("s3", key=bucket.server.key, secret="another").cat_file(f"{bucket.name}/one")


def test_a_presigned_url_opens_without_credentials(bucket: Bucket) -> None:
    s3 = fsspec.filesystem("s3", config_kwargs={"signature_version": "s3v4"})
    s3.pipe(f"{bucket.name}/one", b"1")
    with urllib.request.urlopen(s3.sign(f"{bucket.name}/one"), timeout=10) as answer:
        assert answer.read() == b"1"


def test_a_child_process_finds_the_server_by_its_environment(bucket: Bucket) -> None:
    program = f"import fsspec; print(fsspec.open('{bucket.url}/one').open().read())"
    (bucket.folder / "one").write_bytes(b"1")
    assert subprocess.check_output([sys.executable, "-c", program], timeout=60) == b"b'1'\n"


def test_the_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    program = (
        "import sys, pathlib, os, s3_server\n"
        "with s3_server.serve_s3(pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.endpoint, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "root")]
    started = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, timeout=60)
    endpoint = started.stdout.strip()
    assert endpoint
    deadline = time.monotonic() + 10
    while listens(endpoint) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not listens(endpoint)


def test_serving_ends_with_its_context(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with serve_s3(tmp_path / "root") as server:
        assert listens(server.endpoint)
    assert not listens(server.endpoint)
