"""The kernels' tests share attention_case.py, and memory that holds NaN."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for attention_case.py


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its relatives give NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
