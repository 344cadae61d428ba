"""The doctor names the host that is unlike the others, and the one that does not come, within a minute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ENVIRONMENT, REPOSITORY, SECRET, run_on
from hosts import Hosts
from runs import arguments, make_dataset

pytestmark = pytest.mark.slow


def test_a_host_with_another_dataset_and_output_is_named(
    make_hosts: Callable[[int], Hosts], dataset: Path, tmp_path: Path
) -> None:
    hosts = make_hosts(2)
    make_dataset(tmp_path / "other", seed=1)
    (tmp_path / "own").mkdir()
    (tmp_path / "runs").mkdir()
    for there, here in ((tmp_path / "other" / "dataset", dataset), (tmp_path / "own", tmp_path / "runs")):
        assert hosts.start("node1", ["mount", "--bind", str(there), str(here)]).wait(timeout=20) == 0
    environment = {**ENVIRONMENT, "HOSTFILE": str(tmp_path / "hosts" / "hostfile"), "NETWORK_INTERFACE": "eth0"}
    command = [str(REPOSITORY / "launch" / "deepspeed_hosts.sh"), "doctor"]
    ended = run_on(
        hosts,
        {"node0": [*command, *arguments(dataset, tmp_path / "runs" / "toy")]},
        folder=tmp_path,
        environment=environment,
        timeout=150,
    )
    assert ended.statuses != [0]
    assert f"node1 (rank 1): dataset: {dataset} is fingerprint " in ended.output
    assert f"node1 (rank 1): output: {tmp_path}/runs is another folder on rank 0's host" in ended.output
    assert "2 problems found" in ended.output and "all-reduce  right" in ended.output
    assert SECRET not in ended.output


@pytest.mark.extended
def test_a_host_that_is_cut_off_is_named(make_hosts: Callable[[int], Hosts], tmp_path: Path) -> None:
    """Its process runs, and reaches nobody. DeepSpeed's launcher knows what the host is called."""
    hosts = make_hosts(2)
    hosts.cut("node1")
    launcher = ["deepspeed", "--hostfile", str(tmp_path / "hosts" / "hostfile"), "--no_ssh", "--master_addr"]
    launcher += [hosts.addresses["node0"], "--node_rank"]
    doctor = ["--module", "s3rec_dist", "doctor", f"output={tmp_path / 'runs'}"]
    commands = {name: [*launcher, str(rank), *doctor] for rank, name in enumerate(hosts.inits)}
    ended = run_on(hosts, commands, folder=tmp_path, timeout=150)
    assert 0 not in ended.statuses
    assert "node1 (rank 1): process: did not arrive within 20 s" in ended.output
    assert "node0 (rank 0) did not arrive: nothing answered node1 (rank 1)" in ended.output
    assert "Exception raised" not in ended.output
