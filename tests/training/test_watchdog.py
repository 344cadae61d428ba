"""Processes that wait for one another in vain end with the reason; those that wait for work that is done do not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import free_port, start_process
from runs import arguments, curve, events, metrics

from s3rec_dist.training.watchdog import STATUS, Sign, in_vain

FAILING = str(Path(__file__).with_name("failing.py"))


def step(seconds: float, longest: float = 0.1) -> Sign:
    return Sign("a", "step 9", seconds, in_step=True, longest_step=longest, done=False, beat=1)


def work(seconds: float, done: bool = False) -> Sign:
    return Sign("b", "reading data", seconds, in_step=False, longest_step=0.1, done=done, beat=1)


@pytest.mark.parametrize(
    ("signs", "silent", "found"),
    [
        ([step(29), step(29)], [0, 29], None),
        ([step(31), step(31)], [0, 31], "no sign of life from rank 1 on a for 31 s (last at: step 9)"),
        ([step(31), work(1)], [0, 31], "no sign of life from rank 1 on b for 31 s (last at: reading data)"),
        ([step(2), step(2)], [0, 31], None),  # it still moves itself
        ([step(31), step(31)], [0, 0], "all processes are alive, and none of them moves: rank 0 on a in step 9"),
        ([step(31), step(31, longest=4)], [0, 0], None),  # steps that take long may take longer
        ([step(41), step(41, longest=4)], [0, 0], "none of them moves"),
        ([step(900), work(900)], [0, 0], None),  # it is waited for
        ([step(1900), work(1900)], [0, 0], "engine.stall_seconds=1800 are over for rank 1 on b, reading data"),
        ([work(900), work(900)], [0, 0], None),
        ([work(40), work(40, done=True)], [0, 40], None),
        ([work(40), step(40)], [31, 31], "the process of rank 0 on b has not answered for 31 s"),
    ],
)
def test_when_waiting_is_in_vain(signs: list[Sign], silent: list[float], found: str | None) -> None:
    told = in_vain(0, dict(enumerate(signs)), dict(enumerate(silent)), 30, 1800)
    assert told is None if found is None else told is not None and found in told[0], told


@contextmanager
def pair(dataset: Path, output: Path, rank: int, how: str, **settings: object) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that train, without a launcher, of which ``rank`` fails."""
    port, processes = free_port(), []
    for own in range(2):
        environment = {"RANK": str(own), "LOCAL_RANK": str(own), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        settings = {"pretrain__epochs": 1, "engine__hang_seconds": 5, **settings}
        command = [sys.executable, FAILING, str(rank), how, *arguments(dataset, output, **settings)]
        processes.append(start_process(command, environment))
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.extended)])
def test_a_process_that_is_stopped_ends_the_other(dataset: Path, tmp_path: Path, rank: int) -> None:
    with pair(dataset, tmp_path, rank, "stopped") as processes:
        output = processes[1 - rank].communicate(timeout=120)[0]
        assert processes[1 - rank].returncode == STATUS == 69, output
        assert processes[rank].poll() is None
    assert re.search(rf"s3rec: error \(rank {1 - rank} on \S+\): no progress in step 7 for \d+ s, in \S+ ", output), (
        output
    )
    reason = "no sign of life from rank 1 on" if rank else "the process of rank 0 on"
    assert reason in output
    (event,) = events(tmp_path / "pretrain", "hang")
    assert event["status"] == 69 and event["at"] == "step 7" and event["reason"].startswith(reason)
    assert metrics(tmp_path / "pretrain")[-1]["status"] == "failed"


@pytest.mark.slow
def test_a_step_that_never_ends_ends_all(dataset: Path, tmp_path: Path) -> None:
    with pair(dataset, tmp_path, 1, "hung", engine__zero_stage=2) as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert STATUS in [process.returncode for process in processes], outputs
    assert "all processes are alive, and none of them moves" in "".join(outputs)
    assert "failing.py" in "".join(outputs) or "step 7" in outputs[0]
    assert all("Traceback" not in output for output in outputs)


@pytest.mark.slow
def test_work_that_takes_longer_is_waited_for(dataset: Path, tmp_path: Path) -> None:
    with pair(dataset, tmp_path, 1, "slow data", engine__hang_seconds=2) as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(curve(tmp_path / "pretrain")) == 17


@pytest.mark.slow
@pytest.mark.extended
def test_processes_that_were_all_stopped_for_a_while_go_on(dataset: Path, tmp_path: Path) -> None:
    """As by a suspended laptop, or a scheduler that lets another job go first."""
    with pair(dataset, tmp_path, 1, "", engine__hang_seconds=3, pretrain__epochs=10) as processes:
        deadline = time.monotonic() + 120
        while not (tmp_path / "pretrain" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.killpg(process.pid, number)
            time.sleep(5 * (number == signal.SIGSTOP))
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
