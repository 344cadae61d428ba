"""The proxy injects what it is told to, as often as told, and lets all else through untouched."""

from __future__ import annotations

import http.client
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import fsspec
import pytest
from conftest import Bucket
from fault_proxy import FAULTS, FaultProxy, Faults

CONTENT = os.urandom(300_000)


def get(proxy: FaultProxy, path: str, timeout: float = 10) -> tuple[int, bytes]:
    """One request, signed for the server behind the proxy, without retries."""
    connection = http.client.HTTPConnection(str(urlsplit(proxy.endpoint).netloc), timeout=timeout)
    try:
        connection.request("GET", path, headers={"Host": urlsplit(proxy.upstream).netloc})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture
def open_path(bucket: Bucket) -> str:
    """The path of CONTENT with a signature in its query, so that a bare GET may read it."""
    s3 = fsspec.filesystem("s3", config_kwargs={"signature_version": "s3v4"})
    s3.pipe(f"{bucket.name}/object", CONTENT)
    return s3.sign(f"{bucket.name}/object").removeprefix(bucket.server.endpoint)


def test_without_faults_everything_goes_through(bucket: Bucket, inject: Callable[..., FaultProxy]) -> None:
    proxy = inject()
    s3 = fsspec.filesystem("s3", use_listings_cache=False)
    large = os.urandom(11 << 20)
    s3.pipe(f"{bucket.name}/small", CONTENT)
    with s3.open(f"{bucket.name}/large", "wb", block_size=5 << 20) as file:
        file.write(large)
    assert s3.cat_file(f"{bucket.name}/small") == CONTENT and s3.cat_file(f"{bucket.name}/large") == large
    assert s3.cat_file(f"{bucket.name}/large", start=5, end=50) == large[5:50]
    (bucket.folder / "many").mkdir()
    for i in range(1200):
        (bucket.folder / "many" / f"{i:04d}").touch()
    assert len(s3.find(f"{bucket.name}/many")) == 1200
    s3.rm_file(f"{bucket.name}/small")
    assert s3.find(f"{bucket.name}/small") == []
    counts = proxy.counts()
    assert counts["requests"] >= 10 and not any(counts[name] for name in FAULTS)
    assert ("DELETE", 204) in [(method, status) for method, _, status in proxy.requests()]


def test_errors_carry_s3_codes(inject: Callable[..., FaultProxy], open_path: str) -> None:
    proxy = inject(errors=1)
    answers = [get(proxy, open_path) for _ in range(20)]
    assert {status for status, _ in answers} == {500, 503}
    assert all((b"SlowDown" if status == 503 else b"InternalError") in body for status, body in answers)
    assert proxy.counts()["errors"] == 20


def test_truncated_bodies_end_half_way(inject: Callable[..., FaultProxy], open_path: str) -> None:
    proxy = inject(truncated=1)
    with pytest.raises(http.client.IncompleteRead) as caught:
        get(proxy, open_path)
    assert caught.value.partial == CONTENT[: len(CONTENT) // 2]
    assert proxy.counts()["truncated"] == 1


def test_corrupted_bodies_differ_in_one_bit(inject: Callable[..., FaultProxy], open_path: str) -> None:
    proxy = inject(corrupted=1)
    status, body = get(proxy, open_path)
    difference = int.from_bytes(body, "little") ^ int.from_bytes(CONTENT, "little")
    assert status == 200 and len(body) == len(CONTENT) and difference.bit_count() == 1
    assert proxy.counts()["corrupted"] == 1


def test_stalled_requests_get_nothing(inject: Callable[..., FaultProxy], open_path: str) -> None:
    proxy = inject(stalls=1)
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        get(proxy, open_path, timeout=0.5)
    assert time.monotonic() - begin < 2
    assert proxy.counts()["stalls"] == 1


def test_halted_bodies_fall_silent_and_close_when_the_time_is_over(
    inject: Callable[..., FaultProxy], open_path: str
) -> None:
    proxy = inject(halts=1, stall_seconds=1)
    with pytest.raises(TimeoutError):
        get(proxy, open_path, timeout=0.5)
    with pytest.raises(http.client.IncompleteRead):
        get(proxy, open_path, timeout=5)
    assert proxy.counts()["halts"] == 2


def test_shares_hold_and_follow_from_the_seed(inject: Callable[..., FaultProxy], open_path: str) -> None:
    def outcomes(seed: int) -> list[str]:
        found = []
        proxy = inject(errors=0.2, truncated=0.1, corrupted=0.1, seed=seed)
        for _ in range(300):
            try:
                status, body = get(proxy, open_path)
                found.append("good" if body == CONTENT else "corrupted" if status == 200 else "errors")
            except http.client.IncompleteRead:
                found.append("truncated")
        counts = proxy.counts()
        assert counts["requests"] == 300
        assert {name: found.count(name) for name in FAULTS} == {name: counts[name] for name in FAULTS}
        assert 35 < counts["errors"] < 85 and 12 < counts["truncated"] < 50 and 12 < counts["corrupted"] < 50
        return found

    first = outcomes(1)
    assert outcomes(1) == first
    assert outcomes(2) != first


def test_the_limit_ends_the_faults(inject: Callable[..., FaultProxy], open_path: str) -> None:
    proxy = inject(errors=1, limit=2)
    assert [get(proxy, open_path)[0] >= 500 for _ in range(5)] == [True, True, False, False, False]
    assert proxy.counts()["errors"] == 2


def test_only_chosen_methods_and_paths_meet_faults(bucket: Bucket, inject: Callable[..., FaultProxy]) -> None:
    proxy = inject(errors=1, methods=("PUT",), path="/bad")
    s3 = fsspec.filesystem("s3", config_kwargs={"retries": {"max_attempts": 0}})
    s3.pipe(f"{bucket.name}/good", CONTENT)
    (bucket.folder / "bad").write_bytes(b"1")
    assert s3.cat_file(f"{bucket.name}/bad") == b"1"
    with pytest.raises(OSError):
        s3.pipe(f"{bucket.name}/bad", b"2")
    assert (bucket.folder / "bad").read_bytes() == b"1"
    assert {(method, status) for method, path, status in proxy.requests() if status >= 500} <= {
        ("PUT", 500),
        ("PUT", 503),
    }


def test_latency_is_added_to_each_request_and_not_to_their_sum(
    inject: Callable[..., FaultProxy], open_path: str
) -> None:
    proxy = inject(latency=0.2)
    begin = time.monotonic()
    get(proxy, open_path)
    assert time.monotonic() - begin >= 0.2
    begin = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        assert all(body == CONTENT for _, body in pool.map(lambda _: get(proxy, open_path), range(32)))
    assert 0.2 <= time.monotonic() - begin < 32 * 0.2 / 2
    assert proxy.counts()["most_at_once"] >= 8


def test_shares_above_one_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to more than 1"):
        Faults(errors=0.6, stalls=0.6)


def test_the_proxy_ends_with_its_context(bucket: Bucket) -> None:
    with FaultProxy(bucket.server.endpoint, Faults()) as proxy:
        address = urlsplit(proxy.endpoint)
        proxy.counts()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=5)
