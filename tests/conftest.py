"""Where the tests find real data. Each folder comes from an environment variable; without it, tests that need it skip.

S3REC_ML100K (set by launch/test.sh): MovieLens-100K as RecBole's atomic files.
S3REC_DATA: Beauty and LastFM as the S3-Rec authors published them, and their pretrained checkpoints.
S3REC_GOLDEN: recorded inputs and outputs of their model.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")

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
