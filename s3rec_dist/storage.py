"""Every read and write of datasets, runs and exports: local folders and any fsspec URL, under one set of rules.

    storage = Storage()                                   # or Storage(config.storage)
    manifest = storage.read("s3://bucket/data/manifest.json")
    group = storage.read_range(url, offset, size)

Requests to remote storage are retried a bounded number of times, with back-off and jitter; what fails in the end
names the URL. Unknown protocols, chained URLs (``::``) and URLs that carry credentials are refused, so that no
setting, manifest, log or error can give a secret away: credentials come from the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from s3rec_dist.config import StorageConfig, load_config

T = TypeVar("T")
Result = TypeVar("Result")

TRANSFERS = 8
"""Files on their way to remote storage or from it at a time."""

_ALIASES = {"local": "file", "gcs": "gs", "s3a": "s3", "s3n": "s3"}
_S3 = ("s3://", "s3a://")
_EXTRAS = {"s3": "s3", "gs": "gs", "hf": "hf"}
"""Protocols whose package an extra of ours installs."""
_CONNECTIONS = 64
"""To S3 at a time; with botocore's own 10 most readers would wait for each other."""
_PERMANENT = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""Errors that trying again does not mend."""
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0
_BLOCK = 16 << 20
_READINGS = 4
"""Times that bytes with a wrong hash are read, before the file and not the network is to blame."""
_SECRET_NAMES = re.compile("SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|_KEY$|ACCESS_KEY", re.IGNORECASE)
_USER = re.compile(r"://([^/@\s]*|[^/:@\s]*:(?!\d+(/|$))[^@\s]*)@")
"""User information in a URL, also with a secret that has slashes."""
_SIGNED = re.compile(
    r"[?&](x-amz-|x-goog-|sig|token|access_?key|awsaccesskeyid|googleaccessid|credential|api_?key|secret|passw)",
    re.IGNORECASE,
)


class StorageError(ValueError):
    """Storage that may not be used or does not answer; the message names the URL."""


class DamagedFile(StorageError):
    """A file that is shorter than it should be, or whose bytes are not those that were written."""


class Storage:
    """Access to storage under the settings of ``config``. Safe between threads."""

    def __init__(self, config: StorageConfig | None = None) -> None:
        self.config = config or StorageConfig()
        self._cache = RangeCache(self.config.cache_dir, self.config.cache_mb << 20) if self.config.cache_dir else None

    def local(self, url: str) -> str | None:
        """The local path behind ``url``, or None where it lies elsewhere. Raises :class:`StorageError` where ``url``
        may not be used."""
        protocol, path = self._checked(url)
        return path if protocol == "file" else None

    def read(self, url: str) -> bytes:
        """A whole small file. Raises FileNotFoundError, or :class:`StorageError`."""
        if (path := self.local(url)) is not None:
            with open(path, "rb") as file:
                return file.read()
        return b"".join(self._blocks(url))

    def _blocks(self, url: str) -> Iterator[bytes]:
        size = self.size(url)
        for offset in range(0, size, _BLOCK):
            yield self.read_range(url, offset, min(_BLOCK, size - offset))

    def read_range(self, url: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``. Raises FileNotFoundError, :class:`DamagedFile` where there are fewer, or
        :class:`StorageError`."""
        if (path := self.local(url)) is not None:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            if len(data) != size:
                raise DamagedFile(f"{url}: ends after {offset + len(data):,} bytes, expected {offset + size:,}")
            return data
        if size > _BLOCK:  # a request has only so much time
            parts = range(offset, offset + size, _BLOCK)
            return b"".join(self.read_range(url, part, min(_BLOCK, offset + size - part)) for part in parts)
        filesystem, path = self._remote(url)

        def fetch() -> bytes:
            data = self._call(filesystem, "cat_file", path, start=offset, end=offset + size)
            if len(data) != size:
                raise _ShortRead(f"{len(data):,} bytes came, expected {size:,}")
            return data

        try:
            return self._retry(url, fetch)
        except StorageError:
            if (whole := self.size(url)) < offset + size:
                raise DamagedFile(f"{url}: has {whole:,} bytes, expected {offset + size:,} or more") from None
            raise

    def read_checked(self, url: str, offset: int, size: int, sha256: bytes) -> bytes:
        """As :meth:`read_range`, from the local cache where it is there, and only if its SHA-256 is ``sha256``.

        Raises :class:`DamagedFile` where it is not.
        """
        is_remote = self.local(url) is None
        if is_remote and self._cache is not None:
            data = self._cache.get(sha256)
            if data is not None:
                return data
        for _ in range(_READINGS if is_remote else 1):  # bytes that the network spoilt are right another time
            data = self.read_range(url, offset, size)
            if hashlib.sha256(data).digest() == sha256:
                if is_remote and self._cache is not None:
                    self._cache.put(sha256, data)
                return data
        raise DamagedFile(
            f"{url}: bytes {offset:,} to {offset + size:,} have another SHA-256 than the manifest says; the file has "
            "changed since it was written"
        )

    def sha256(self, url: str) -> str:
        """SHA-256 of a file, read in blocks."""
        digest = hashlib.sha256()
        for block in self._blocks(url):
            digest.update(block)
        return digest.hexdigest()

    def size(self, url: str) -> int:
        """Bytes of a file."""
        if (path := self.local(url)) is not None:
            return os.stat(path).st_size
        filesystem, path = self._remote(url)
        return int(self._retry(url, lambda: self._call(filesystem, "info", path))["size"])

    def exists(self, url: str) -> bool:
        """Whether there is a file or a folder."""
        if (path := self.local(url)) is not None:
            return os.path.exists(path)
        filesystem, path = self._remote(url)
        try:
            self._retry(url, lambda: self._call(filesystem, "info", path))  # exists() takes some failures for absence
        except FileNotFoundError:
            return False
        return True

    def is_folder(self, url: str) -> bool:
        """Whether there is a folder, or on an object store anything below."""
        if (path := self.local(url)) is not None:
            return os.path.isdir(path)
        filesystem, path = self._remote(url)
        return bool(self._retry(url, lambda: self._call(filesystem, "isdir", path)))

    def names(self, url: str) -> list[str]:
        """Names in a folder, sorted; none where it does not exist."""
        if (path := self.local(url)) is not None:
            return sorted(os.listdir(path)) if os.path.isdir(path) else []
        filesystem, path = self._remote(url)
        try:
            found = self._retry(url, lambda: filesystem.ls(path, detail=False))
        except FileNotFoundError:
            return []
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in found if name.rstrip("/") != path.rstrip("/")})

    def glob(self, pattern: str) -> list[str]:
        """URLs or paths that match a pattern, sorted."""
        if (path := self.local(pattern)) is not None:
            import glob

            return sorted(glob.glob(path))
        filesystem, path = self._remote(pattern)
        found = self._retry(pattern, lambda: filesystem.glob(path))
        return sorted(filesystem.unstrip_protocol(name) for name in found)

    @contextlib.contextmanager
    def open(self, url: str, compression: str | None = None) -> Iterator[Any]:
        """A binary file to read from start to end; ``compression`` as in fsspec."""
        path = self.local(url)
        kind = fsspec.core.get_compression(url, compression)
        with open(path, "rb") if path is not None else io.BufferedReader(_RemoteFile(self, url), _BLOCK) as file:
            yield fsspec.compression.compr[kind](file, mode="rb") if kind else file

    def write(self, url: str, data: bytes) -> None:
        """Writes a small file, whole or not at all; locally it is on disk when this returns."""
        if (path := self.local(url)) is not None:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            draft = f"{path}.{os.getpid()}.draft"
            try:
                with open(draft, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(draft, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
            return
        filesystem, path = self._remote(url)
        self._retry(url, lambda: self._call(filesystem, "pipe_file", path, data))

    def upload(self, path: str, url: str) -> None:
        """Copies a local file to ``url`` and compares the size of what arrived."""
        if (target := self.local(url)) is not None:
            os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
            shutil.copyfile(path, target)
            return
        filesystem, target = self._remote(url)
        size = os.stat(path).st_size

        def put() -> None:
            filesystem.put_file(path, target)
            if (arrived := self._call(filesystem, "info", target)["size"]) != size:
                raise _ShortRead(f"{arrived:,} bytes arrived, {size:,} were sent")

        self._retry(url, put)

    def download(self, url: str, path: str, *, size: int | None = None, sha256: str = "") -> None:
        """Copies a file to a local path, whole or not at all. Raises :class:`DamagedFile` where it has other than
        ``size`` bytes or another SHA-256 than ``sha256``, as far as these are given."""
        is_remote = self.local(url) is None
        draft = f"{path}.partial"
        try:
            for _ in range(_READINGS if is_remote else 1):  # bytes that the network spoilt are right another time
                digest, written = hashlib.sha256(), 0
                with open(draft, "wb") as file:
                    for block in self._blocks(url):
                        written += file.write(block)
                        digest.update(block)
                if sha256 in ("", digest.hexdigest()):
                    break
            _compare(url, written, digest.hexdigest(), size, sha256)
            os.replace(draft, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)

    @contextlib.contextmanager
    def at_hand(self, url: str, *, size: int | None = None, sha256: str = "") -> Iterator[str]:
        """A local path to read a file from, checked as in :meth:`download`: its own, or a copy's that is gone when the
        block ends."""
        if (path := self.local(url)) is not None:
            found = os.stat(path).st_size
            _compare(url, found, self.sha256(url) if sha256 and size in (None, found) else "", size, sha256)
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="s3rec-", dir=self.config.scratch_dir or None) as folder:
            path = os.path.join(folder, url.rsplit("/", 1)[-1])
            self.download(url, path, size=size, sha256=sha256)
            yield path

    def scratch(self, url: str) -> str:
        """Where files wait on their way to ``url`` or from it: a local path of this user and host, the same for all of
        its processes. Whoever comes first makes the folder."""
        name = hashlib.sha256(f"{socket.gethostname()} {url}".encode()).hexdigest()[:16]
        return os.path.join(self.config.scratch_dir or tempfile.gettempdir(), f"s3rec-{os.getuid()}-{name}")

    def publish(self, folder: str, url: str, last: str = "manifest.json") -> None:
        """Copies a local folder to ``url``, the file ``last`` after all others: until it is there, nobody sees them."""
        names = files_below(folder)
        in_parallel(lambda name: self.upload(os.path.join(folder, name), f"{url}/{name}"), set(names) - {last})
        if last in names:
            self.upload(os.path.join(folder, last), f"{url}/{last}")

    def move(self, url: str, target: str, last: str = "manifest.json") -> None:
        """Copies a folder of remote storage, compares the sizes and removes it; whoever dies meanwhile leaves it whole
        in one of the two places at least. Files named ``last`` come after all others there, and go first here."""
        filesystem, source = self._remote(url)
        _, destination = self._remote(target)
        source = source.rstrip("/")

        def sizes(path: str) -> dict[str, int]:
            filesystem.invalidate_cache()
            found = self._retry(url, lambda: filesystem.find(path, detail=True))
            return {name[len(path) :].lstrip("/"): entry["size"] for name, entry in found.items()}

        def copy(name: str) -> None:
            there = f"{destination}/{name}"

            def attempt() -> None:
                filesystem.makedirs(there.rpartition("/")[0], exist_ok=True)
                filesystem.cp_file(f"{source}/{name}", there)

            self._retry(url, attempt)

        before = sizes(source)
        ends = {name for name in before if name.rpartition("/")[2] == last}
        in_parallel(copy, before.keys() - ends)
        in_parallel(copy, ends)
        if sizes(destination) != before:
            raise StorageError(f"{url}: not all of it arrived at {target}; it is still where it was")
        in_parallel(lambda name: self.remove(f"{url}/{name}"), ends)
        self.remove(url)

    def remove(self, url: str) -> None:
        """Removes a file or a folder with all that is in it; nothing where it does not exist."""
        if (path := self.local(url)) is not None:
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            return
        filesystem, path = self._remote(url)
        with contextlib.suppress(FileNotFoundError):
            self._retry(url, lambda: filesystem.rm(path, recursive=True))

    def _checked(self, url: str) -> tuple[str, str]:
        """(protocol, local path or the whole URL); raises :class:`StorageError` where the rules forbid it."""
        if "::" in url and not self.config.chained_urls:
            raise StorageError(f"{hide(url)}: chained URLs are refused; allow them with storage.chained_urls=true")
        if url.startswith(("pipe:", "data:")):
            raise StorageError(
                f"{url.split(':')[0]}: is not a storage; expected a path or a URL such as s3://bucket/data"
            )
        protocol, separator, rest = url.partition("://")
        if not separator:
            return "file", url
        protocol = _ALIASES.get(protocol, protocol)
        if "::" not in url and protocol not in self.config.protocols:
            raise StorageError(
                f"{hide(url)}: protocol {protocol!r} is not allowed; those are {', '.join(self.config.protocols)}, "
                "name others in storage.protocols"
            )
        if _USER.search(url) or _SIGNED.search(rest):
            raise StorageError(
                f"{hide(url)}: the URL carries credentials; take them out and give them through the environment"
            )
        return protocol, rest if protocol == "file" else url

    def _remote(self, url: str) -> tuple[Any, str]:
        options: dict[str, Any] = {} if "::" in url else {"use_listings_cache": False}  # other processes write too
        if url.startswith(_S3):
            own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            timeouts = {"connect_timeout": self.config.timeout_s, "read_timeout": self.config.timeout_s}
            limits = {"retries": {"total_max_attempts": 1}, "max_pool_connections": _CONNECTIONS}
            options["config_kwargs"] = {**own, **timeouts, **limits}
        try:
            filesystem, path = fsspec.core.url_to_fs(url, **options)
            if hasattr(filesystem, "retries"):
                filesystem.retries = 1  # s3fs and gcsfs count all attempts in it; it is us who try again
        except ImportError as error:
            protocol = self._checked(url)[0]
            extra = f"pip install 's3rec-dist[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else "install its package"
            raise StorageError(f"{url}: needs a package that is not installed ({error}); {extra}") from error
        except ValueError as error:
            raise StorageError(f"{hide(url)}: {hide(str(error))}") from None
        return filesystem, path

    def _call(self, filesystem: Any, method: str, *args: Any, **options: Any) -> Any:
        """A method of a file system, bounded in time where it is asynchronous inside."""
        if filesystem.async_impl:
            call = getattr(filesystem, f"_{method}")
            return fsspec.asyn.sync(filesystem.loop, call, *args, timeout=self.config.timeout_s, **options)
        return getattr(filesystem, method)(*args, **options)

    def _retry(self, url: str, call: Callable[[], Result]) -> Result:
        """``call()``, again after a wait while it fails in ways that may pass."""
        wait = _FIRST_WAIT
        for attempt in range(self.config.retries + 1):
            try:
                return call()
            except _PERMANENT as error:
                raise type(error)(error.errno, hide(error.strerror or str(error)), url) from None
            except Exception as error:  # what may be raised differs from storage to storage
                if type(error).__name__ in _NO_CREDENTIALS:
                    raise StorageError(
                        f"{url}: no credentials ({error}); give them through the environment, as in AWS_ACCESS_KEY_ID "
                        "and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for public data"
                    ) from None
                reason = hide(f"{type(error).__name__}: {error}".rstrip(": "))
            if attempt < self.config.retries:
                time.sleep(wait * random.uniform(0.5, 1.5))
                wait = min(2 * wait, _LONGEST_WAIT)
        raise StorageError(f"{url}: failed {self.config.retries + 1} times, the last time with {reason}")


class _ShortRead(OSError):
    """Fewer bytes than asked for."""


def in_parallel(call: Callable[[T], Result], items: Iterable[T]) -> list[Result]:
    """``call(item)`` for each of the items, several at a time; the first failure keeps the rest from starting."""
    with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="s3rec-transfer") as pool:
        try:
            return list(pool.map(call, items))
        finally:
            pool.shutdown(cancel_futures=True)


def files_below(folder: str) -> list[str]:
    """Relative paths of the files in a local folder and its subfolders, sorted; links are left out."""
    found = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(path, folder) for path in found if not os.path.islink(path))


def _compare(url: str, found: int, digest: str, size: int | None, sha256: str) -> None:
    if size not in (None, found):
        raise DamagedFile(f"{url}: has {found:,} bytes, its manifest says {size:,}")
    if sha256 not in ("", digest):
        raise DamagedFile(f"{url}: SHA-256 is {digest}, its manifest says {sha256}")


class _RemoteFile(io.RawIOBase):
    """A remote file as a stream, of ranges that are tried again each."""

    def __init__(self, storage: Storage, url: str) -> None:
        self._storage, self._url, self._size, self._at = storage, url, storage.size(url), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(min(len(buffer), self._size - self._at), 0)
        if size:
            buffer[:size] = self._storage.read_range(self._url, self._at, size)
            self._at += size
        return size


class RangeCache:
    """Byte ranges in a local folder, by SHA-256, least recently used ones dropped beyond ``limit`` bytes.

    Processes of a host may share it. A range is written beside its place and renamed, so a crash leaves no half of
    one under its name; what was damaged is noticed by its hash and fetched again. Sizes are counted in a file that
    is changed under a lock. All of it lies in a folder of its own in ``folder``, whose other contents stay.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = os.path.join(folder, "s3rec-ranges"), limit
        os.makedirs(self.folder, exist_ok=True)

    def get(self, sha256: bytes) -> bytes | None:
        """The bytes with this hash, or None."""
        path = self._path(sha256)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return None
        whole = hashlib.sha256(data).digest() == sha256
        with contextlib.suppress(OSError):
            if whole:
                os.utime(path)  # now the most recently used
            else:
                os.unlink(path)
        return data if whole else None

    def put(self, sha256: bytes, data: bytes) -> None:
        """Keeps ``data``, making room for it first; does nothing where it is larger than the limit or the disk full."""
        path = self._path(sha256)
        if len(data) > self.limit or os.path.exists(path):
            return
        with contextlib.suppress(OSError), self._locked() as counter:  # a cache that cannot be written is no error
            count = counter.read(20)  # nothing where there is none yet, or a process died while it wrote
            used = int(count) if count.isdigit() else self.limit
            if used + len(data) > self.limit:
                used = self._make_room(self.limit - len(data))
            counter.seek(0)
            counter.truncate()
            # Before the file: a crash between counts too much, never too little.
            counter.write(b"%d" % (used + len(data)))
            counter.flush()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            draft = f"{path}.{os.getpid()}.partial"
            with open(draft, "wb") as file:
                file.write(data)
            os.replace(draft, path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Any]:
        import fcntl

        with open(os.path.join(self.folder, "bytes"), "a+b") as counter:
            fcntl.flock(counter, fcntl.LOCK_EX)
            counter.seek(0)
            yield counter

    def _make_room(self, wanted: int) -> int:
        """Drops what was used least recently until at most 9/10 of ``wanted`` bytes are left; returns what is left."""
        found = []
        for entry in (e for folder in os.scandir(self.folder) if folder.is_dir() for e in os.scandir(folder)):
            if entry.name.endswith(".partial"):  # left by a crash: writing happens under the lock that we hold
                os.unlink(entry)
            else:
                status = entry.stat()
                found.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used <= wanted * 9 // 10:
                break
            os.unlink(path)
            used -= size
        return used

    def _path(self, sha256: bytes) -> str:
        name = sha256.hex()
        return os.path.join(self.folder, name[:2], name)


def hide(text: str) -> str:
    """``text`` without what may be a secret: user information and signatures in URLs, values of secret variables."""
    text = _USER.sub("://***@", text)
    text = re.sub(r"([?&][^=&\s]+)=[^&\s]+", r"\1=***", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAMES.search(name):
            text = text.replace(value, "***")
    return text


def add_storage_argument(parser: argparse.ArgumentParser) -> None:
    """``--storage key=value ...``: the settings of :class:`~s3rec_dist.config.StorageConfig`."""
    parser.add_argument(
        "--storage",
        nargs="+",
        action="extend",
        type=_setting,
        default=[],
        metavar="key=value",
        help="storage settings, as in cache_dir=/tmp/cache retries=12; 's3rec pretrain --print-config' lists them",
    )


def _setting(text: str) -> str:
    if not re.match("[a-z_]+=", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected key=value; give other arguments before --storage")
    return text


def storage_of(args: argparse.Namespace) -> Storage:
    """The storage that ``--storage`` asks for."""
    return Storage(load_config(None, [f"storage.{setting}" for setting in args.storage]).storage)
