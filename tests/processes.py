"""Processes for a test, bounded in time: none outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch


def free_port() -> int:
    """A port of this machine that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_process(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        list(command),
        env={**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(processes: Sequence[subprocess.Popen[str]], timeout: float, expect: int = 0) -> list[str]:
    """Their output, once all have ended with status ``expect``."""
    deadline = time.monotonic() + timeout
    outputs: list[str] = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0])
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done in {timeout} s")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    statuses = [process.returncode for process in processes]
    assert statuses == [expect] * len(processes), f"exit statuses {statuses}\n" + "\n".join(outputs)
    return outputs


def leave_behind(shared: str, port: int) -> None:
    """A child, shared memory, and a port that is listened at while it lives."""
    subprocess.Popen(["sleep", "100"])
    if os.environ["RANK"] == "0":
        memory = torch.from_file(shared, shared=True, size=4096, dtype=torch.uint8)
        with socket.create_server(("127.0.0.1", port)):
            time.sleep(100)
        memory.fill_(0)
    time.sleep(100)
