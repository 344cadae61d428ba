"""A world of one in this process, a small dataset, and what toy.py finds in several processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for runs.py and toy.py

from runs import make_dataset

from s3rec_dist.config import EngineConfig
from s3rec_dist.training.engine import World, start


@pytest.fixture(scope="session")
def world() -> World:
    """This process, alone."""
    return start(EngineConfig(device="cpu", threads=1))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make_dataset`` makes; no test changes it."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder)
    return folder / "dataset"


@pytest.fixture(scope="session")
def toy_result(launch: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``toy_result(2, "curves")``: what toy.py finds in a mode."""

    def run(ranks: int, mode: str, folder: Path | None = None) -> Any:
        place = folder or tmp_path_factory.mktemp(mode)
        output = launch(ranks, [str(Path(__file__).with_name("toy.py")), mode, str(place)])[0]
        return json.loads(
            next(line for line in output.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT ")
        )

    return run
