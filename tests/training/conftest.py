"""A world of one in this process, and several processes for a test."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for toy.py and processes.py

from processes import start_process, wait_for

from s3rec_dist.config import EngineConfig
from s3rec_dist.training.engine import World, start

Launch = Callable[..., list[str]]


@pytest.fixture(scope="session")
def world() -> World:
    """This process, alone."""
    return start(EngineConfig(device="cpu", threads=1))


@pytest.fixture(scope="session")
def launch() -> Launch:
    """``launch(2, ["script.py", ...])`` runs two ranks and returns what each printed. A rank that fails, or a time
    limit, ends all of them."""

    def run(
        ranks: int,
        command: Sequence[str],
        *,
        timeout: float = 150,
        environment: dict[str, str] | None = None,
        expect: int = 0,
    ) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            processes.append(start_process([sys.executable, *command], own | (environment or {})))
        return wait_for(processes, timeout, expect)

    return run


@pytest.fixture(scope="session")
def toy_result(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``toy_result(2, "curves")``: what toy.py finds in a mode."""

    def run(ranks: int, mode: str, folder: Path | None = None) -> Any:
        place = folder or tmp_path_factory.mktemp(mode)
        output = launch(ranks, [str(Path(__file__).with_name("toy.py")), mode, str(place)])[0]
        return json.loads(
            next(line for line in output.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT ")
        )

    return run
