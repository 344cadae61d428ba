"""Storage keeps its rules on a real S3 server whose traffic is spoilt: it recovers, or ends soon with a clear error."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from conftest import Bucket
from fault_proxy import FAULTS, FaultProxy

from s3rec_dist.config import StorageConfig
from s3rec_dist.storage import DamagedFile, Storage, StorageError, hide

CONTENT = os.urandom(50_000)
PATIENT = StorageConfig(retries=6, timeout_s=2)
HASTY = StorageConfig(retries=2, timeout_s=2)
HASTY_S = 3 * 2 + 1.5 * (0.1 + 0.2) + 3
"""What HASTY may take at most for one request: its time-outs, its waits, and three seconds for a busy machine."""


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass
class Place:
    """A remote folder with ``file`` in it, and a local one with ``source/name``."""

    url: str
    remote: Path
    local: Path

    @property
    def file(self) -> str:
        return f"{self.url}/file"

    @property
    def source(self) -> Path:
        return self.local / "source"


Operation = Callable[[Storage, Place], object]


def read_opened(storage: Storage, place: Place) -> bytes:
    with storage.open(place.file) as file:
        return file.read()


def uploaded(storage: Storage, place: Place) -> bytes:
    storage.upload(str(place.source / "name"), f"{place.url}/new")
    return (place.remote / "new").read_bytes()


def published(storage: Storage, place: Place) -> bytes:
    storage.publish(str(place.source), place.url, "name")
    return (place.remote / "name").read_bytes()


def written(storage: Storage, place: Place) -> bytes:
    storage.write(f"{place.url}/new", CONTENT)
    return (place.remote / "new").read_bytes()


def downloaded(storage: Storage, place: Place) -> bytes:
    storage.download(place.file, str(place.local / "down"))
    return (place.local / "down").read_bytes()


def removed(storage: Storage, place: Place) -> bool:
    storage.remove(place.url)
    return (place.remote / "file").exists()


OPERATIONS: dict[str, tuple[Operation, object]] = {
    "read": (lambda storage, place: storage.read(place.file), CONTENT),
    "read_range": (lambda storage, place: storage.read_range(place.file, 10, 20), CONTENT[10:30]),
    "read_checked": (
        lambda storage, place: storage.read_checked(place.file, 10, 2000, sha256(CONTENT[10:2010])),
        CONTENT[10:2010],
    ),
    "sha256": (lambda storage, place: storage.sha256(place.file), sha256(CONTENT).hex()),
    "open": (read_opened, CONTENT),
    "download": (downloaded, CONTENT),
    "size": (lambda storage, place: storage.size(place.file), len(CONTENT)),
    "exists": (lambda storage, place: storage.exists(place.file), True),
    "exists, of a folder": (lambda storage, place: storage.exists(place.url), True),
    "exists, of a bucket": (lambda storage, place: storage.exists(place.url.rsplit("/", 1)[0]), True),
    "is_folder": (lambda storage, place: storage.is_folder(place.url), True),
    "names": (lambda storage, place: storage.names(place.url), ["file"]),
    "glob": (lambda storage, place: [name.rsplit("/", 1)[1] for name in storage.glob(f"{place.url}/f*")], ["file"]),
    "write": (written, CONTENT),
    "upload": (uploaded, CONTENT),
    "publish": (published, CONTENT),
    "remove": (removed, False),
}
READS = ["read", "read_range", "read_checked", "sha256", "open", "download"]


@pytest.fixture
def places(bucket: Bucket, tmp_path: Path) -> dict[str, Place]:
    """A place for each operation."""
    found = {}
    for number, name in enumerate(OPERATIONS):
        place = Place(f"{bucket.url}/{number}", bucket.folder / str(number), tmp_path / str(number))
        place.remote.mkdir()
        place.source.mkdir(parents=True)
        (place.remote / "file").write_bytes(CONTENT)
        (place.source / "name").write_bytes(CONTENT)
        found[name] = place
    return found


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_operation_does_its_work_and_outlives_errors_that_pass(
    name: str, places: dict[str, Place], inject: Callable[..., FaultProxy]
) -> None:
    proxy = inject(errors=1, limit=2)
    operation, expected = OPERATIONS[name]
    assert operation(Storage(PATIENT), places[name]) == expected
    assert proxy.counts()["errors"] == 2


@pytest.mark.parametrize("name", READS)
def test_reading_outlives_a_body_that_ends_early(
    name: str, places: dict[str, Place], inject: Callable[..., FaultProxy]
) -> None:
    proxy = inject(truncated=1, limit=2)
    operation, expected = OPERATIONS[name]
    assert operation(Storage(PATIENT), places[name]) == expected
    assert proxy.counts()["truncated"] == 2


def test_storms_of_faults_are_outlived(bucket: Bucket, inject: Callable[..., FaultProxy]) -> None:
    content = os.urandom(1 << 20)
    (bucket.folder / "large").write_bytes(content)
    proxy = inject(errors=0.1, stalls=0.02, halts=0.02, truncated=0.05, corrupted=0.1, latency=0.01)
    storage = Storage(PATIENT)

    def read(number: int) -> bool:
        part = content[number * 1000 : number * 1000 + 5000]
        return storage.read_checked(f"{bucket.url}/large", number * 1000, 5000, sha256(part)) == part

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(400)))
    assert all(proxy.counts()[name] > 0 for name in FAULTS)


@pytest.mark.parametrize("fault", ["errors", "stalls"])
def test_every_operation_ends_soon_with_an_error_that_names_the_url_where_faults_do_not_pass(
    fault: str, bucket: Bucket, places: dict[str, Place], inject: Callable[..., FaultProxy]
) -> None:
    proxy = inject(**{fault: 1})
    storage = Storage(HASTY)

    def attempt(name: str) -> tuple[float, StorageError | object]:
        begin = time.monotonic()
        try:
            ended: StorageError | object = OPERATIONS[name][0](storage, places[name])
        except StorageError as error:
            ended = error
        return time.monotonic() - begin, ended

    with ThreadPoolExecutor(len(OPERATIONS)) as pool:
        ended = dict(zip(OPERATIONS, pool.map(attempt, OPERATIONS), strict=True))
    for name, (seconds, error) in ended.items():
        requests = 2 if name in ("read_range", "read_checked") else 1  # these also ask for the size
        assert isinstance(error, StorageError), f"{name}: {error!r}"
        assert seconds < HASTY_S * requests, name
        assert bucket.url in str(error) and "failed 3 times" in str(error), name
        assert bucket.server.secret not in str(error) and bucket.server.key not in str(error)
    assert proxy.counts()["requests"] <= 3 * (len(OPERATIONS) + 2)
    assert proxy.counts()[fault] == proxy.counts()["requests"]


def test_bytes_that_stay_wrong_are_a_damaged_file(bucket: Bucket, inject: Callable[..., FaultProxy]) -> None:
    (bucket.folder / "file").write_bytes(CONTENT)
    proxy = inject(corrupted=1)
    with pytest.raises(DamagedFile, match=f"{bucket.url}/file: bytes 0 to 50,000 have another SHA-256"):
        Storage(HASTY).read_checked(f"{bucket.url}/file", 0, len(CONTENT), sha256(CONTENT))
    assert 2 <= proxy.counts()["requests"] <= 8


def test_a_file_shorter_than_it_should_be_is_a_damaged_file(bucket: Bucket) -> None:
    (bucket.folder / "file").write_bytes(CONTENT)
    with pytest.raises(DamagedFile, match=f"{bucket.url}/file: has 50,000 bytes, expected 50,001 or more"):
        Storage(HASTY).read_range(f"{bucket.url}/file", 49_000, 1001)


@pytest.mark.parametrize("name", [*READS, "size"])
def test_a_missing_file_is_not_tried_again(name: str, bucket: Bucket, inject: Callable[..., FaultProxy]) -> None:
    proxy = inject()
    place = Place(f"{bucket.url}/none", bucket.folder / "none", bucket.folder)
    with pytest.raises(FileNotFoundError, match=f"{place.file}"):
        OPERATIONS[name][0](Storage(HASTY), place)
    assert proxy.counts()["requests"] <= 2  # s3fs also looks for a folder of that name


def test_absence_is_no_error_where_it_is_an_answer(bucket: Bucket) -> None:
    storage, url = Storage(HASTY), f"{bucket.url}/none"
    storage.remove(url)
    assert (storage.exists(url), storage.is_folder(url), storage.names(url), storage.glob(f"{url}/*")) == (
        False,
        False,
        [],
        [],
    )
    assert not storage.exists("s3://no-such-bucket")


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_refusal_is_not_tried_again_and_tells_no_secret(
    name: str,
    bucket: Bucket,
    places: dict[str, Place],
    inject: Callable[..., FaultProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "quite/another+secret")
    proxy = inject()
    with pytest.raises(PermissionError, match=bucket.url) as caught:
        OPERATIONS[name][0](Storage(HASTY), places[name])
    assert proxy.counts()["requests"] <= 2
    assert "another+secret" not in str(caught.value) and bucket.server.key not in str(caught.value)


def test_missing_credentials_are_told_at_once(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    begin = time.monotonic()
    with pytest.raises(StorageError, match=f"{bucket.url}/file: no credentials.*environment"):
        Storage(StorageConfig(retries=8)).read(f"{bucket.url}/file")
    assert time.monotonic() - begin < 5


def test_what_other_processes_write_and_remove_is_seen_at_once(bucket: Bucket) -> None:
    storage = Storage(HASTY)
    (bucket.folder / "folder").mkdir()
    file = bucket.folder / "folder" / "file"
    file.write_bytes(b"short")
    url = f"{bucket.url}/folder"
    assert storage.names(url) == ["file"] and storage.read(f"{url}/file") == b"short"
    file.write_bytes(CONTENT)
    (bucket.folder / "folder" / "more").write_bytes(b"more")
    assert storage.read(f"{url}/file") == CONTENT and storage.read(f"{url}/more") == b"more"
    assert storage.glob(f"{url}/*") == [f"{url}/file", f"{url}/more"]
    file.unlink()
    assert not storage.exists(f"{url}/file") and storage.names(url) == ["more"]


def test_opened_files_seek_and_unpack(bucket: Bucket, inject: Callable[..., FaultProxy]) -> None:
    text = b"".join(b"%d\n" % i for i in range(100_000))
    (bucket.folder / "plain").write_bytes(text)
    (bucket.folder / "packed.gz").write_bytes(gzip.compress(text))
    proxy = inject(errors=0.3, truncated=0.3, seed=1)
    storage = Storage(PATIENT)
    with storage.open(f"{bucket.url}/packed.gz", compression="infer") as file:
        assert file.read() == text
    with storage.open(f"{bucket.url}/plain") as file:
        assert file.seek(-7, io.SEEK_END) == len(text) - 7 and file.read() == text[-7:]
        assert file.seek(12) == 12 and file.readline() == text[12:].split(b"\n")[0] + b"\n"
        begin = file.tell()
        assert file.read() == text[begin:]
    assert proxy.counts()["errors"] + proxy.counts()["truncated"] > 0


REFUSED = {
    "simplecache::s3://bucket/file": "chained URLs are refused",
    "zip://inner::file:///tmp/a.zip": "chained URLs are refused",
    "https://host/file": "protocol 'https' is not allowed",
    "ftp://host/file": "protocol 'ftp' is not allowed",
    "S3://bucket/file": "protocol 'S3' is not allowed",
    "pipe:cat /etc/passwd": "is not a storage",
    "data:text/plain,hello": "is not a storage",
}


@pytest.mark.parametrize("url", list(REFUSED))
def test_chained_urls_and_unknown_protocols_are_refused(url: str, tmp_path: Path) -> None:
    storage = Storage()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "name").touch()
    place = Place(url, tmp_path, tmp_path)
    for name, (operation, _) in OPERATIONS.items():
        with pytest.raises(StorageError, match=REFUSED[url]):
            operation(storage, place)
            pytest.fail(name)


@pytest.mark.parametrize("hidden", ["memory://file", "data:text/plain,hello"])
def test_a_path_is_never_taken_for_a_url_of_another_protocol(hidden: str) -> None:
    fsspec.filesystem("memory").pipe_file("/file", CONTENT)
    storage = Storage(StorageConfig(protocols=("file",)))
    with pytest.raises(FileNotFoundError), storage.open(f"file://{hidden}") as file:
        file.read()


def test_chained_urls_and_other_protocols_open_where_allowed(bucket: Bucket) -> None:
    (bucket.folder / "file").write_bytes(CONTENT)
    chained = Storage(StorageConfig(chained_urls=True, retries=0))
    assert chained.read(f"simplecache::{bucket.url}/file") == CONTENT
    fsspec.filesystem("memory").pipe_file("/s3rec/file", CONTENT)
    assert Storage(StorageConfig(protocols=("memory",))).read("memory://s3rec/file") == CONTENT
    fsspec.filesystem("memory").rm("/s3rec", recursive=True)
    with pytest.raises(StorageError, match="protocol 's3' is not allowed; those are memory"):
        Storage(StorageConfig(protocols=("memory",))).read(f"{bucket.url}/file")


WITH_SECRETS = [
    "s3://AKIA0123:wJalrXUtnFEMI@bucket/file",
    "s3://AKIA0123:wJalr/XUtnFEMI+x@bucket/file",
    "s3://wJalrXUtnFEMI@bucket/file",
    "s3://bucket/file?X-Amz-Credential=AKIA0123&X-Amz-Signature=wJalrXUtnFEMI",
    "s3://bucket/file?versionId=1&AWSAccessKeyId=AKIA0123&Signature=wJalrXUtnFEMI",
    "https://storage.example/file?X-Goog-Signature=wJalrXUtnFEMI",
    "https://account.example/file?sv=2024&sig=wJalrXUtnFEMI",
    "https://host/file?api_key=wJalrXUtnFEMI",
    "simplecache::s3://AKIA0123:wJalr/XUtnFEMI@bucket/file",
]


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_urls_with_credentials_are_refused_and_the_refusal_hides_them(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    storage = Storage(StorageConfig(protocols=("s3", "https"), chained_urls=True, retries=0))
    with pytest.raises(StorageError, match="carries credentials") as caught:
        storage.read(url)
    for text in (str(caught.value), caplog.text):
        assert not any(secret in text for secret in ("XUtnFEMI", "wJalr", "AKIA0123"))


def test_hide_leaves_what_is_no_secret() -> None:
    for text in ("s3://bucket/a@b", "hdfs://host:9000/a@b: gone", "12:30 mail a@b", "s3://bucket/x, expected y"):
        assert hide(text) == text


def test_secrets_of_the_environment_are_hidden_in_what_storage_says(
    bucket: Bucket, inject: Callable[..., FaultProxy], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    proxy = inject(errors=1)
    endpoint = proxy.endpoint.replace("http://", f"http://{bucket.server.key}:some-password@")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.rsplit(":", 1)[0] + ":1")
    monkeypatch.setenv("SOME_TOKEN", "token-in-the-key")
    with pytest.raises(StorageError, match=f"{bucket.url}/") as caught:
        Storage(HASTY).read(f"{bucket.url}/token-in-the-key")
    for text in (str(caught.value), caplog.text):
        assert "some-password" not in text and bucket.server.secret not in text and bucket.server.key not in text
