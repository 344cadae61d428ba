"""A proxy that spoils some of the HTTP traffic through it, for tests of whoever reads or writes through it.

    with FaultProxy("http://127.0.0.1:9000", Faults(errors=0.1, truncated=0.05, latency=0.02)) as proxy:
        ...  # talk to proxy.endpoint
        assert proxy.counts()["truncated"] > 0

It runs as a process of its own, so that it costs the test's interpreter nothing, and ends with it. The Host header
goes through unchanged, so signatures stay valid: a server checks them against the header, not against its address.
Which fault the n-th request meets follows from the seed alone. Requests wait for the latency side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import urllib.request
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

BLOCK = 1 << 18
BODY_FAULTS = ("halts", "truncated", "corrupted")
FAULTS = ("errors", "stalls", *BODY_FAULTS)
REPORT = b"/-/report"
STATUSES = ((500, "Internal Server Error", "InternalError"), (503, "Service Unavailable", "SlowDown"))


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, as shares of the requests; a request meets at most one fault. Raises ValueError above 1."""

    errors: float = 0.0
    """Answers of status 500 or 503, with S3's XML, in place of the server's."""
    stalls: float = 0.0
    """Requests taken and never answered: silence for stall_seconds, then the connection closes."""
    halts: float = 0.0
    """Object bodies that fall silent half-way, for stall_seconds, and close."""
    truncated: float = 0.0
    """Object bodies that close half-way, after a Content-Length that promised all."""
    corrupted: float = 0.0
    """Object bodies with one bit flipped."""
    latency: float = 0.0
    """Seconds added to every request."""
    stall_seconds: float = 30.0
    limit: int | None = None
    """At most this many faults; all is well afterwards."""
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    """Which requests may meet one."""
    path: str = ""
    """Only requests whose path holds this text may."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not sum(getattr(self, name) for name in FAULTS) <= 1:
            raise ValueError(f"{self}: the shares of {', '.join(FAULTS)} add up to more than 1")


class FaultProxy:
    """A running proxy; ends with the context."""

    def __init__(self, upstream: str, faults: Faults) -> None:
        self.upstream = upstream
        settings = json.dumps({"upstream": upstream, **asdict(faults)})
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__, settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def counts(self) -> dict[str, int]:
        """How often each fault was injected; all ``requests``; body ``bytes`` sent; ``most_at_once`` requests."""
        return self._report()["counts"]

    def requests(self) -> list[tuple[str, str, int]]:
        """(method, path with query, status the client got, 0 for none) of the last 10,000, in order of their end."""
        return [tuple(request) for request in self._report()["requests"]]

    def _report(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.endpoint + REPORT.decode(), timeout=10) as answer:
            return json.load(answer)

    def close(self) -> None:
        self._process.communicate(timeout=10)

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Head:
    """The start of a request or an answer."""

    first: list[bytes]
    """Its first line's three parts."""
    fields: dict[bytes, bytes]
    """By lower-case name."""
    raw: bytes

    @property
    def length(self) -> int | None:
        """Content-Length, None where the body is chunked or absent."""
        return int(self.fields[b"content-length"]) if b"content-length" in self.fields else None

    @property
    def chunked(self) -> bool:
        return self.fields.get(b"transfer-encoding", b"").lower() == b"chunked"


class Proxy:
    """The proxy's own process."""

    def __init__(self, upstream: str, faults: Faults) -> None:
        address = urlsplit(upstream)
        self.host, self.port = address.hostname, address.port
        self.faults = faults
        self.draws = random.Random(faults.seed)  # one a request
        self.random = random.Random(faults.seed)  # which status, which bit
        self.counts = Counter({name: 0 for name in ("requests", "bytes", "most_at_once", *FAULTS)})
        self.log: deque[tuple[str, str, int]] = deque(maxlen=10_000)
        self.active = 0

    async def serve(self) -> None:
        """Answers until standard input closes."""
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0, limit=BLOCK, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's requests, one after the other, over one connection to the server."""
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while (head := await read_head(reader)) is not None:
                if head.first[1] == REPORT:
                    report = json.dumps({"counts": self.counts, "requests": list(self.log)}).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(report), report))
                    await writer.drain()
                    continue
                self.active += 1
                self.counts["requests"] += 1
                self.counts["most_at_once"] = max(self.counts["most_at_once"], self.active)
                status = 0
                try:
                    fault = self.draw(head)
                    if head.fields.get(b"expect"):
                        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    if self.faults.latency:
                        await asyncio.sleep(self.faults.latency)
                    if fault == "stalls":
                        self.counts[fault] += 1
                        return await self.silence(reader)
                    if fault == "errors":
                        self.counts[fault] += 1
                        status = await self.error(head, reader, writer)
                        continue
                    if server is None or server[0].at_eof():
                        server = await asyncio.open_connection(self.host, self.port, limit=BLOCK)
                    server[1].write(without(head.raw, b"expect"))
                    async for block in body(head, reader):
                        server[1].write(block)
                        await server[1].drain()
                    answer = await read_head(server[0])
                    if answer is None:
                        return
                    status = int(answer.first[1])
                    if not await self.answer(head, answer, fault, server[0], reader, writer):
                        return
                finally:
                    self.active -= 1
                    self.log.append((head.first[0].decode(), head.first[1].decode(), status))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the proxy ends
        finally:
            for open_writer in (writer, *(server[1:] if server else ())):
                open_writer.close()

    def draw(self, head: Head) -> str | None:
        """The fault of this request."""
        method, target = head.first[0].decode(), head.first[1].decode()
        drawn, faults = self.draws.random(), self.faults
        if method not in faults.methods or faults.path not in target.partition("?")[0]:
            return None
        if faults.limit is not None and sum(self.counts[name] for name in FAULTS) >= faults.limit:
            return None
        for name in FAULTS:
            drawn -= getattr(faults, name)
            if drawn < 0:
                return name
        return None

    async def silence(self, reader: asyncio.StreamReader) -> None:
        """Nothing, until the client gives up or the time is over."""

        async def until_closed() -> None:
            while await reader.read(BLOCK):
                pass

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(until_closed(), self.faults.stall_seconds)

    async def error(self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        async for _ in body(head, reader):
            pass
        status, reason, code = STATUSES[self.random.randrange(2)]
        xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        writer.write(f"HTTP/1.1 {status} {reason}\r\nContent-Length: {len(xml)}\r\n\r\n".encode())
        if head.first[0] != b"HEAD":
            writer.write(xml)
        await writer.drain()
        return status

    async def answer(
        self,
        head: Head,
        answer: Head,
        fault: str | None,
        server: asyncio.StreamReader,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Sends the server's answer on; False where the connection must close."""
        writer.write(answer.raw)
        if head.first[0] == b"HEAD" or answer.first[1] in (b"204", b"304"):
            await writer.drain()
            return True
        length = answer.length or 0
        is_object = (
            head.first[0] == b"GET" and answer.first[1] in (b"200", b"206") and b"list-type" not in head.first[1]
        )
        if fault not in BODY_FAULTS or not is_object or length < 2:
            fault = None
        else:
            self.counts[fault] += 1
        flip = self.random.randrange(length) if fault == "corrupted" else -1
        end = length // 2 if fault in ("halts", "truncated") else None
        sent = 0
        async for block in body(answer, server):
            if end is not None:
                block = block[: end - sent]
            if sent <= flip < sent + len(block):
                spoiled = bytearray(block)
                spoiled[flip - sent] ^= 1 << self.random.randrange(8)
                block = bytes(spoiled)
            writer.write(block)
            await writer.drain()
            sent += len(block)
            self.counts["bytes"] += len(block)
            if sent == end:
                if fault == "halts":
                    await self.silence(reader)
                return False
        return answer.fields.get(b"connection", b"").lower() != b"close"


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next head, None at the end of the connection."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first, *lines = raw[:-4].split(b"\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    return Head(first.split(b" ", 2), fields, raw)


async def body(head: Head, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body as it comes, in blocks; chunked ones with their framing."""
    if head.chunked:
        while True:
            size = await reader.readuntil(b"\r\n")
            count = int(size.partition(b";")[0], 16)
            yield size + await reader.readexactly(count + 2)
            if not count:
                return
    left = head.length or 0
    while left:
        block = await reader.read(min(left, BLOCK))
        if not block:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(block)
        yield block


def without(raw: bytes, name: bytes) -> bytes:
    """A head without the lines of one field."""
    return b"\r\n".join(line for line in raw.split(b"\r\n") if not line.lower().startswith(name + b":"))


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    asyncio.run(Proxy(settings.pop("upstream"), Faults(**settings)).serve())
