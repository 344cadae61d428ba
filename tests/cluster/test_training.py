"""Training over several hosts: the same losses as one process, and what becomes of it when a host fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import BIN, ENVIRONMENT, REPOSITORY, run_on
from hosts import Hosts
from runs import arguments, events, metrics

pytestmark = pytest.mark.slow

MakeHosts = Callable[[int], Hosts]
Farthest = Callable[[Path], float]


def once_logged(folder: Path, entries: int, act: Callable[[], None]) -> Callable[[], bool]:
    """Acts when a run's metrics.jsonl has so many entries; tells when it has."""

    def look() -> bool:
        if not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < entries:
            return False
        act()
        return True

    return look


def test_four_hosts_of_a_hostfile_train_as_one_process_does(
    make_hosts: MakeHosts, dataset: Path, farthest: Farthest, tmp_path: Path
) -> None:
    """DeepSpeed's own command: pdsh takes PYTHON* to the hosts, the file DS_ENV_FILE names what else they need."""
    variables = tmp_path / "variables"
    variables.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")
    launcher = [f"{BIN}/deepspeed", "--hostfile", str(tmp_path / "hosts" / "hostfile"), "--launcher", "pdsh"]
    settings = arguments(dataset, tmp_path / "run", pretrain__epochs=1, engine__zero_stage=2)
    ended = run_on(
        make_hosts(4),
        {"node0": [*launcher, "--module", "s3rec_dist", "pretrain", *settings]},
        folder=tmp_path,
        environment={**ENVIRONMENT, "DS_ENV_FILE": str(variables)},
    )
    assert ended.statuses == [0], ended.output
    assert {rank: environment["HOST"] for rank, environment in ended.ranks.items()} == {
        rank: f"node{rank}" for rank in range(4)
    }
    assert farthest(tmp_path / "run" / "pretrain") < 1e-6


@pytest.mark.parametrize(
    ("remote", "fault"),
    [
        pytest.param("ssh", Hosts.kill_ranks, id="killed", marks=pytest.mark.extended),
        pytest.param("pdsh", Hosts.cut, id="cut"),
    ],
)
def test_a_host_that_is_lost_ends_the_others(
    make_hosts: MakeHosts, dataset: Path, tmp_path: Path, remote: str, fault: Callable[[Hosts, str], None]
) -> None:
    hosts = make_hosts(2)
    environment = {**ENVIRONMENT, "HOSTFILE": str(tmp_path / "hosts" / "hostfile"), "REMOTE": remote}
    settings = arguments(dataset, tmp_path / "run", pretrain__epochs=1000)
    ended = run_on(
        hosts,
        {"node0": [str(REPOSITORY / "launch" / "deepspeed_hosts.sh"), "pretrain", *settings]},
        folder=tmp_path,
        environment=environment,
        meanwhile=once_logged(tmp_path / "run" / "pretrain", 10, lambda: fault(hosts, "node1")),
        timeout=120,
    )
    assert ended.statuses != [0]
    assert ended.seconds < 60, ended.output


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.extended)])
def test_a_host_off_the_network_ends_the_others_under_commands_that_are_not_ours(
    make_hosts: MakeHosts, dataset: Path, tmp_path: Path, launcher: str
) -> None:
    hosts = make_hosts(2)
    variables = tmp_path / "variables"
    variables.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")
    environment = {**ENVIRONMENT, "DS_ENV_FILE": str(variables), "GLOO_SOCKET_IFNAME": "eth0"}
    environment["PDSH_SSH_ARGS_APPEND"] = "-o ServerAliveInterval=5"  # or pdsh waits for the host that is gone
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29400", "--max-restarts", "0"]
    command = {
        "deepspeed": [f"{BIN}/deepspeed", "--hostfile", str(tmp_path / "hosts" / "hostfile"), "--module"],
        "torchrun": [f"{BIN}/torchrun", *meeting, "-m"],
    }[launcher]
    settings = arguments(dataset, tmp_path / "run", pretrain__epochs=1000, engine__hang_seconds=10)
    command += ["s3rec_dist", "pretrain", *settings]
    if launcher == "torchrun":  # off the network it waits for minutes for the others' rendezvous, without its rank
        hosts.start("node1", command, environment, tmp_path)
    folder = tmp_path / "run" / "pretrain"
    ended = run_on(
        hosts,
        {"node0": command},
        folder=tmp_path,
        environment=environment,
        meanwhile=once_logged(folder, 10, lambda: hosts.cut("node1")),
        timeout=200,
    )
    assert ended.statuses != [0]
    assert ended.seconds < 60, ended.output
    told = r"error \(rank 0 on node0\): no progress in step \d+ .*: no sign of life from rank 1 on node1"
    assert re.search(told, ended.output), ended.output
    assert any("rank 1 on node1" in hang["reason"] for hang in events(folder, "hang"))


def test_torchrun_brings_back_a_run_after_a_host_has_failed(
    make_hosts: MakeHosts, dataset: Path, farthest: Farthest, tmp_path: Path
) -> None:
    hosts = make_hosts(2)
    environment = {**ENVIRONMENT, "NODES": "2", "PROCESSES": "1", "RENDEZVOUS": "node0:29400"}
    settings = arguments(dataset, tmp_path / "run", pretrain__epochs=3, pretrain__checkpoint_every_steps=5)
    command = [str(REPOSITORY / "launch" / "torchrun.sh"), "pretrain", *settings]
    folder = tmp_path / "run" / "pretrain"
    ended = run_on(
        hosts,
        dict.fromkeys(hosts.inits, command),
        folder=tmp_path,
        environment={**environment, "NETWORK_INTERFACE": "eth0"},
        meanwhile=once_logged(folder, 20, lambda: hosts.kill_ranks("node1")),
        timeout=120,
    )
    assert ended.statuses == [0, 0], ended.output
    first, second = events(folder, "start")
    assert first["processes"] == second["processes"] == 2
    assert first["step"] == 0 and second["step"] >= 10  # that of step 15 may still be written at step 20
    assert farthest(folder) < 1e-6
