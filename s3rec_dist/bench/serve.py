"""What ``s3rec serve`` adds to a model: ``s3rec bench serve --dataset data/beauty``.

The real service, a process of its own, is asked over loopback by 1, 8 and 64 clients at a time, each sending its next
request when it has its answer; beside it the bare model answers batches of as many. Histories are the dataset's,
weights random. The clients' own work is on the same cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import torch

from s3rec_dist.bench.step import BenchError
from s3rec_dist.config import Config
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.export import write_model
from s3rec_dist.recommend import dataset_histories
from s3rec_dist.serving.recommender import Recommender, Request
from s3rec_dist.storage import Storage
from s3rec_dist.training.loop import Task

CLIENTS = (1, 8, 64)
K = 10
HISTORIES = 2000
START_S = 60.0


def bench_serve(config: Config, dataset: Dataset, *, requests: int, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of a request (median, 95th and 99th percentile) and requests/s, by clients; and the bare model's."""
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="s3rec-serve-") as place:
        folder = os.path.join(place, "model")
        write_model(
            Task(config, "finetune", dataset, torch.device("cpu")).model(),
            folder,
            {"stage": "finetune"},
            config,
            dataset,
        )
        recommender = Recommender.load(folder, Storage())
        histories = _histories(dataset)
        bodies = [_body([recommender.raw[item - 1] for item in history]) for history in histories]
        server, port = _start(folder, config.engine.threads)
        try:
            for clients in CLIENTS:
                asyncio.run(_load(port, bodies, clients, requests))  # warms up
                for _ in range(repetitions):
                    seconds, took = asyncio.run(_load(port, bodies, clients, requests))
                    for name, share in (("median", 50), ("p95", 95), ("p99", 99)):
                        title = f"{clients} clients: ms {name}"
                        figures.setdefault(title, []).append(float(np.percentile(took, share)) * 1000)
                    figures.setdefault(f"{clients} clients: requests/s", []).append(len(took) / seconds)
        finally:
            server.terminate()
            try:
                status = server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                status = server.wait()
        if status:
            raise BenchError(f"the service ended with status {status}")
    for batch in CLIENTS:
        for _ in range(repetitions):
            figures.setdefault(f"bare model, batches of {batch}: requests/s", []).append(
                _bare(recommender, histories, batch, requests)
            )
    return figures


def _histories(dataset: Dataset) -> list[list[int]]:
    found: list[list[int]] = []
    for part in dataset_histories(dataset):
        for begin, end in zip(part.starts, part.ends, strict=True):
            found.append(part.values[begin:end].tolist())
            if len(found) == HISTORIES:
                return found
    return found


def _bare(recommender: Recommender, histories: Sequence[Sequence[int]], batch: int, requests: int) -> float:
    asked = [Request(histories[i % len(histories)], K) for i in range(max(requests, batch))]
    began = time.perf_counter()
    for at in range(0, len(asked), batch):
        recommender.recommend(asked[at : at + batch])
    return len(asked) / (time.perf_counter() - began)


def _body(items: Sequence[str]) -> bytes:
    body = json.dumps({"items": items, "k": K}).encode()
    head = (
        f"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    return f"{head}\r\n\r\n".encode() + body


def _start(folder: str, threads: int) -> tuple[subprocess.Popen[str], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "s3rec_dist", "serve", folder, "--port", str(port), "--threads", str(threads)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, port
        time.sleep(0.05)
    server.kill()
    server.wait()
    raise BenchError(f"the service did not listen within {START_S:.0f} s")


async def _load(port: int, bodies: Sequence[bytes], clients: int, requests: int) -> tuple[float, list[float]]:
    """(seconds in all, those of each request)."""
    took: list[float] = []
    numbers = iter(range(requests))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for number in numbers:
                began = time.perf_counter()
                writer.write(bodies[number % len(bodies)])
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                if not head.startswith(b"HTTP/1.1 200"):
                    raise BenchError(f"the service answered {head.splitlines()[0].decode()}")
                took.append(time.perf_counter() - began)
        finally:
            writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, took
