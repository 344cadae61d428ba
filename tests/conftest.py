"""Where the tests find real data. Each folder comes from an environment variable; without it, tests that need it skip.

S3REC_ML100K (set by launch/test.sh): MovieLens-100K as RecBole's atomic files.
S3REC_DATA: Beauty and LastFM as the S3-Rec authors published them, and their pretrained checkpoints.
S3REC_GOLDEN: recorded inputs and outputs of their model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for processes.py

from processes import free_port, start_process, wait_for

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by torch._dynamo say

REPOSITORY = Path(__file__).parents[1]


def _folder(variable: str) -> Path:
    value = os.environ.get(variable, "")
    if not value:
        pytest.skip(f"{variable} is not set")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{variable}={value} is not a folder")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def ml100k() -> Path:
    """MovieLens-100K: ml-100k.inter, ml-100k.item, ml-100k.user."""
    return _folder("S3REC_ML100K")


@pytest.fixture(scope="session")
def published_data() -> Path:
    """Beauty.txt, LastFM.txt, their attributes, LastFM's negatives, and checkpoints after 150 epochs."""
    return _folder("S3REC_DATA")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Beauty.npz and LastFM.npz."""
    return _folder("S3REC_GOLDEN")


@pytest.fixture(scope="session")
def launch() -> Callable[..., list[str]]:
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
        port, processes = free_port(), []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            processes.append(start_process([sys.executable, *command], own | (environment or {})))
        return wait_for(processes, timeout, expect)

    return run
