"""Commands on hosts, run to their end within a time limit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hosts import PATH, Hosts

REPOSITORY = Path(__file__).parents[2]
BIN = str(Path(sys.executable).parent)
HOSTILE = """run $(touch pwned) `touch pwned` ; touch pwned & "quoted" 'too' \\"""
"""What no shell must read."""
SECRET = "seeded-secret"
ENVIRONMENT = {
    "PATH": f"{BIN}:{PATH}",
    "PYTHONPATH": str(REPOSITORY),
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "WANDB_NOTES": HOSTILE,
    "WANDB_API_KEY": SECRET,
}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What became of commands."""

    statuses: list[int]
    output: str
    ranks: dict[int, dict[str, str]]
    """Each rank's environment, and its host as ``HOST``."""
    seconds: float
    """From ``meanwhile`` returning True, or from the start, to the end of the last command and rank."""


def run_on(
    hosts: Hosts,
    commands: Mapping[str, Sequence[str]],
    *,
    folder: Path,
    environment: Mapping[str, str] | Callable[[str], Mapping[str, str]] = ENVIRONMENT,
    meanwhile: Callable[[], bool] | None = None,
    timeout: float = 90,
) -> Ended:
    """Runs a command on each host named, in ``folder``; ``meanwhile`` is called now and then until it returns True."""
    began = time.monotonic()
    deadline = began + timeout
    processes = [
        hosts.start(name, command, environment(name) if callable(environment) else environment, folder)
        for name, command in commands.items()
    ]
    ranks: dict[int, dict[str, str]] = {}
    with ThreadPoolExecutor(len(processes)) as pool:
        reading = [pool.submit(process.stdout.read) for process in processes if process.stdout is not None]
        try:
            while (now := hosts.ranks()) or any(process.poll() is None for process in processes):
                ranks |= now
                if meanwhile is not None and meanwhile():
                    meanwhile, began = None, time.monotonic()
                if time.monotonic() > deadline:
                    pytest.fail(f"not done in {timeout} s")
                time.sleep(0.1)
        finally:
            seconds = time.monotonic() - began
            hosts.end_all()
        output = "".join(future.result(timeout=20) for future in reading)
    return Ended(statuses=[p.returncode for p in processes], output=output, ranks=ranks, seconds=seconds)
