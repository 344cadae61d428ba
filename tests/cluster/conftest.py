"""Hosts for a test, and commands on them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # for runs.py
sys.path.insert(0, str(Path(__file__).parent))  # for hosts.py

from hosts import Hosts, cluster, why_not
from runs import curve, make_config, make_dataset, run


@pytest.fixture(scope="session")
def hosts_permitted() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def make_hosts(hosts_permitted: None, tmp_path: Path) -> Iterator[Callable[[int], Hosts]]:
    """``make_hosts(2)``: hosts that are gone after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda count: stack.enter_context(cluster(count, tmp_path / "hosts"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder)
    return folder / "dataset"


@pytest.fixture(scope="session")
def farthest(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], float]:
    """The largest relative difference of a run's losses, over one to three whole epochs, from those of one process."""
    alone = curve(run("pretrain", make_config(dataset, tmp_path_factory.mktemp("alone"))))

    def compare(folder: Path) -> float:
        found = curve(folder)
        assert list(found) == list(alone)[: len(found)] and len(found) in (17, 34, 51)
        return max(abs(loss / alone[step] - 1) for step, loss in found.items())

    return compare
