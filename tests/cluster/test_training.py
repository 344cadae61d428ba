"""Training over several hosts: the same losses as one process, and what becomes of it when a host fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import BIN, ENVIRONMENT, run_on
from hosts import Hosts
from runs import arguments, curve

pytestmark = pytest.mark.slow

MakeHosts = Callable[[int], Hosts]


def farthest(folder: Path, alone: Path) -> float:
    """The largest relative difference of two runs' losses, which must have the same steps."""
    found, expected = curve(folder), curve(alone)
    assert found.keys() == expected.keys() and len(found) == 17
    return max(abs(found[step] / expected[step] - 1) for step in expected)


def test_four_hosts_of_a_hostfile_train_as_one_process_does(
    make_hosts: MakeHosts, dataset: Path, alone: Path, tmp_path: Path
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
    assert ended.ranks == {rank: f"node{rank}" for rank in range(4)}
    assert farthest(tmp_path / "run" / "pretrain", alone) < 1e-6
