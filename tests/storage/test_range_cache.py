"""The cache of byte ranges: within its limit with many processes, usable after a kill anywhere, never wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Bucket
from fault_proxy import FaultProxy
from processes import start_process, wait_for

from s3rec_dist.config import StorageConfig
from s3rec_dist.storage import RangeCache, Storage

LIMIT = 100_000
PATHS = os.pathsep.join(map(str, (Path(__file__).parent, *Path(__file__).parents[1:3])))
"""What a program needs to import this module."""


def content(number: int, size: int = 9000) -> tuple[bytes, bytes]:
    """(SHA-256, bytes) of the range with this number."""
    data = number.to_bytes(8, "little") * (size // 8)
    return hashlib.sha256(data).digest(), data


def used(cache: RangeCache) -> int:
    """Bytes of all files of the cache but its counter."""
    return sum(path.stat().st_size for path in Path(cache.folder).rglob("*") if path.is_file() and path.name != "bytes")


def test_what_is_put_is_got_until_it_is_the_least_recently_used(tmp_path: Path) -> None:
    cache = RangeCache(str(tmp_path), LIMIT)
    for number in range(11):
        cache.put(*content(number))
    now = time.time_ns()
    for number in range(11):  # file times may be coarser than the loop above
        os.utime(cache._path(content(number)[0]), ns=(now, now - 10**9 * (100 - number)))
    assert cache.get(content(0)[0]) == content(0)[1]  # now used last
    cache.put(*content(11))
    left = [number for number in range(12) if cache.get(content(number)[0]) is not None]
    assert {0, 10, 11} <= set(left) and 1 not in left and used(cache) <= LIMIT


def test_what_is_larger_than_the_limit_is_not_kept_and_drops_nothing(tmp_path: Path) -> None:
    cache = RangeCache(str(tmp_path), LIMIT)
    cache.put(*content(1))
    cache.put(*content(2, LIMIT + 8))
    assert cache.get(content(1)[0]) is not None and cache.get(content(2, LIMIT + 8)[0]) is None


def test_files_of_others_in_its_folder_stay_and_do_not_count(tmp_path: Path) -> None:
    other = tmp_path / "ab" / ("ab" * 32)
    other.parent.mkdir()
    other.write_bytes(bytes(10 * LIMIT))
    os.utime(other, (0, 0))
    cache = RangeCache(str(tmp_path), LIMIT)
    for number in range(30):
        cache.put(*content(number))
    assert other.stat().st_size == 10 * LIMIT and LIMIT // 2 < used(cache) <= LIMIT


@pytest.mark.parametrize("spoil", ["flip", "cut", "empty"])
def test_a_damaged_file_is_noticed_and_fetched_again(
    spoil: str, bucket: Bucket, tmp_path: Path, inject: Callable[..., FaultProxy]
) -> None:
    digest, data = content(1)
    (bucket.folder / "file").write_bytes(data)
    proxy = inject()
    storage = Storage(StorageConfig(cache_dir=str(tmp_path)))

    def read() -> int:
        """Requests that a reading takes."""
        before = proxy.counts()["requests"]
        assert storage.read_checked(f"{bucket.url}/file", 0, len(data), digest) == data
        return proxy.counts()["requests"] - before

    assert [read(), read()] == [1, 0]
    (kept,) = [path for path in tmp_path.rglob(digest.hex())]
    kept.write_bytes({"flip": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-1], "empty": b""}[spoil])
    assert [read(), read()] == [1, 0]


@pytest.mark.parametrize("counter", [b"", b"garbage", b"\xff\xfe", b"-5", b"9" * 5000, None])
def test_a_lost_or_spoilt_counter_is_counted_anew(counter: bytes | None, tmp_path: Path) -> None:
    cache = RangeCache(str(tmp_path), LIMIT)
    for number in range(10):
        cache.put(*content(number))
    if counter is None:
        os.unlink(os.path.join(cache.folder, "bytes"))
    else:
        Path(cache.folder, "bytes").write_bytes(counter)
    for number in range(10, 20):
        cache.put(*content(number))
        assert used(cache) <= LIMIT and cache.get(content(number)[0]) == content(number)[1]


def test_a_cache_that_cannot_be_written_does_no_harm(bucket: Bucket, tmp_path: Path) -> None:
    digest, data = content(1)
    (bucket.folder / "file").write_bytes(data)
    storage = Storage(StorageConfig(cache_dir=str(tmp_path)))
    for path in tmp_path.rglob("*"):
        os.rmdir(path)
    for _ in range(2):
        assert storage.read_checked(f"{bucket.url}/file", 0, len(data), digest) == data


def test_the_limit_holds_at_every_moment_while_processes_share_a_cache(tmp_path: Path) -> None:
    program = (
        "import sys, random\n"
        "from test_range_cache import LIMIT, RangeCache, content\n"
        "draw, cache = random.Random(sys.argv[2]), RangeCache(sys.argv[1], LIMIT)\n"
        "for _ in range(400):\n"
        "    digest, data = content(draw.randrange(60), draw.choice([800, 8000, 30000]))\n"
        "    found = cache.get(digest)\n"
        "    assert found in (None, data)\n"
        "    cache.put(digest, data)\n"
    )
    cache, most = RangeCache(str(tmp_path), LIMIT), 0
    processes = [
        start_process([sys.executable, "-c", program, str(tmp_path), str(seed)], {"PYTHONPATH": PATHS})
        for seed in range(4)
    ]
    while any(process.poll() is None for process in processes):
        with cache._locked():
            most = max(most, used(cache))
    wait_for(processes, timeout=60)
    assert LIMIT // 2 < most <= LIMIT


KILLED = '''
import os, signal, sys
from pathlib import Path
from test_range_cache import LIMIT, RangeCache, content, hashlib, used
from s3rec_dist import storage

def put_and_die(cache, number, line):
    """Puts, and is killed before the given line that runs in storage.py; exits well where fewer run."""
    def trace(frame, event, argument):
        nonlocal line
        if frame.f_code.co_filename != storage.__file__:
            return None
        if event == "line":
            line -= 1
            if line < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    cache.put(*content(number))
    sys.settrace(None)
    os._exit(0)

for line in range(1000):
    cache = RangeCache(f"{sys.argv[1]}/{line}", LIMIT)
    for number in range(11):
        cache.put(*content(number))
    child = os.fork()
    if not child:
        put_and_die(cache, 11, line)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert used(cache) <= LIMIT, f"line {line}: {used(cache)} bytes"
    for path in Path(cache.folder).rglob("*"):
        if len(path.name) == 64:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name, f"line {line}"
    for number in range(20, 35):
        cache.put(*content(number))
        assert cache.get(content(number)[0]) == content(number)[1], f"line {line}"
        assert used(cache) <= LIMIT, f"line {line}: {used(cache)} bytes"
    assert not list(Path(cache.folder).rglob("*.partial")), f"line {line}: a draft stays"
    if not killed:
        print(line, "kills")
        break
'''


def test_a_kill_at_any_line_of_a_write_leaves_the_cache_usable_and_within_its_limit(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[0]) > 30
