"""Started as users start it: deepspeed, torchrun, and what becomes of the other processes when one fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import free_port, start_process
from runs import arguments, curve, events, make_config, metrics, run

from s3rec_dist.training import checkpoint

pytestmark = pytest.mark.slow

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
FAILING = str(Path(__file__).with_name("failing.py"))


def launch(command: list[str], port: int, timeout: float = 120) -> tuple[int, str]:
    """Exit status and output of a launcher; fails where it leaves a process or shared memory behind."""
    process = start_process(command, {"OMP_NUM_THREADS": "1"})
    try:
        output = process.communicate(timeout=timeout)[0]
        deadline = time.monotonic() + 20
        while is_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_alive(process.pid), f"processes are left\n{output}"
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done in {timeout} s")
    finally:
        if is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not [name for name in os.listdir("/dev/shm") if str(port) in name]
    return process.returncode, output


def is_alive(group: int) -> bool:
    """Whether a process group has a process that runs."""
    found = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True).stdout
    return any(not line.strip().startswith("Z") for line in found.splitlines())


def deepspeed(port: int, *command: str) -> list[str]:
    return [DEEPSPEED, "--num_gpus", "2", "--master_port", str(port), *command]


def torchrun(port: int, *command: str) -> list[str]:
    own = ["--nproc-per-node", "2", "--master-port", str(port), "--max-restarts", "0"]
    return [sys.executable, "-m", "torch.distributed.run", *own, *command]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_processes_of_a_launcher_train_as_one_does(dataset: Path, tmp_path: Path, launcher: str) -> None:
    alone = run("pretrain", make_config(dataset, tmp_path / "alone", pretrain__epochs=1))
    config = tmp_path / "config.yaml"
    config.write_text("pretrain:\n  epochs: 1\nseed: 42\n")
    settings = arguments(dataset, tmp_path / "pair", pretrain__epochs=1, engine__zero_stage=2)
    port = free_port()
    command = ["pretrain", "--config", str(config), *settings]
    module = ["--module", "s3rec_dist"] if launcher == "deepspeed" else ["-m", "s3rec_dist"]
    status, output = launch((deepspeed if launcher == "deepspeed" else torchrun)(port, *module, *command), port)
    assert status == 0, output
    folder = tmp_path / "pair" / "pretrain"
    (start,) = events(folder, "start")
    assert start["processes"] == 2
    found, expected = curve(folder), curve(alone)
    assert found.keys() == expected.keys() and len(found) == 17
    assert all(abs(found[step] / expected[step] - 1) < 1e-5 for step in expected)
    assert "Traceback" not in output
    assert len(re.findall("pretrain done:", output)) == 1, "every process reports"


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_mistake_is_told_by_every_process_and_ends_them_all(dataset: Path, tmp_path: Path, launcher: str) -> None:
    settings = arguments(dataset, tmp_path, finetune__pretrained="auto")
    port = free_port()
    module = ["--module", "s3rec_dist"] if launcher == "deepspeed" else ["-m", "s3rec_dist"]
    command = (deepspeed if launcher == "deepspeed" else torchrun)(port, *module, "finetune", *settings)
    status, output = launch(command, port)
    assert status != 0
    assert re.search(r"s3rec: error \(rank [01]\): finetune\.pretrained=auto: .*no such folder", output), output
    assert not (tmp_path / "finetune").exists()


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launcher_that_is_told_to_end_leaves_a_whole_checkpoint(dataset: Path, tmp_path: Path, launcher: str) -> None:
    """torchrun passes the signal on. Of deepspeed's three generations all have it, and its ``launch`` passes it on too,
    so that a process has it twice."""
    settings = arguments(dataset, tmp_path, pretrain__epochs=1000, engine__zero_stage=1)
    module = ["--module", "s3rec_dist"] if launcher == "deepspeed" else ["-m", "s3rec_dist"]
    command = (deepspeed if launcher == "deepspeed" else torchrun)(free_port(), *module, "pretrain", *settings)
    process = start_process(command, {"OMP_NUM_THREADS": "1"})
    folder = tmp_path / "pretrain"
    try:
        deadline = time.monotonic() + 60
        while not ((folder / "metrics.jsonl").exists() and len(curve(folder)) > 20) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM) if launcher == "deepspeed" else process.terminate()
        deadline = time.monotonic() + 25
        while is_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_alive(process.pid), "processes are left after 25 s"
    finally:
        if is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
    (event,) = events(folder, "preempted")
    assert event["signal"] == "SIGTERM" and metrics(folder)[-1]["status"] == "preempted", output
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None and not found.damaged and found.state["step"] == event["step"] == max(curve(folder)), (
        output
    )


@pytest.mark.parametrize(
    ("rank", "how", "told", "zero"),
    [
        (1, "read", "shard 7: damaged", 0),
        (1, "read", "shard 7: damaged", 3),
        (0, "save", "no room left", 1),
        (1, "killed", "", 2),
        (1, "killed while it saves", "", 1),
    ],
)
def test_a_process_that_fails_ends_the_other(
    dataset: Path, tmp_path: Path, rank: int, how: str, told: str, zero: int
) -> None:
    """Without a launcher, which would end them: nobody waits in a collective for one that is gone."""
    settings = arguments(dataset, tmp_path, engine__zero_stage=zero, pretrain__epochs=1)
    port = free_port()
    processes = []
    for own in range(2):
        environment = {"RANK": str(own), "LOCAL_RANK": str(own), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, FAILING, str(rank), how, *settings]
        processes.append(start_process(command, environment))
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("a process waits for the one that failed")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert told in outputs[rank]
    assert processes[rank].returncode == (-9 if how.startswith("killed") else 2), outputs[rank]
    other = "no room left" if how == "save" else "another process has stopped; what it printed says why"
    assert processes[1 - rank].returncode == 2 and other in outputs[1 - rank], outputs[1 - rank]
    assert all("Traceback" not in output for output in outputs)
