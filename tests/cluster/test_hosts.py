"""The hosts that the other tests use are apart from each other and from this machine, and leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hosts import Hosts

MAKES_TWO = """
import sys, time
from pathlib import Path
from hosts import cluster
with cluster(2, Path(sys.argv[1])) as hosts:
    hosts.start("node1", ["sleep", "600"])
    print(*hosts.inits.values(), flush=True)
    time.sleep(60)
"""


def said(hosts: Hosts, command: list[str]) -> str:
    return hosts.start("node0", command).communicate(timeout=20)[0]


def test_hosts_reach_each_other_by_name_and_share_nothing_but_files(
    make_hosts: Callable[[int], Hosts], tmp_path: Path
) -> None:
    hosts = make_hosts(2)
    (tmp_path / "file").write_text("shared")
    names = set(os.listdir("/dev/shm"))
    look = f"hostname; hostname -I; ls /dev/shm; touch /dev/shm/mine; pgrep -c sleep; cat {tmp_path}/file"
    hosts.start("node0", ["sleep", "600"])
    lines = said(hosts, ["ssh", "node1", look]).split()
    assert lines == ["node1", hosts.addresses["node1"], "0", "shared"]
    assert said(hosts, ["ls", "/dev/shm"]) == ""
    assert "mine" not in set(os.listdir("/dev/shm")) - names
    answered = said(hosts, ["pdsh", "-R", "ssh", "-w", "node0,node1", "hostname"]).splitlines()
    assert sorted(answered) == ["node0: node0", "node1: node1"]


def test_a_host_that_is_cut_answers_nobody(make_hosts: Callable[[int], Hosts]) -> None:
    hosts = make_hosts(2)
    hosts.cut("node1")
    assert "timed out" in said(hosts, ["ssh", "-o", "LogLevel=INFO", "-o", "ConnectTimeout=1", "node1", "hostname"])


def test_hosts_end_with_the_process_that_made_them(hosts_permitted: None, tmp_path: Path) -> None:
    words = [sys.executable, "-c", MAKES_TWO, str(tmp_path / "hosts")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as maker:
        assert maker.stdout is not None
        inits = [int(word) for word in maker.stdout.readline().split()]
        try:
            assert len(inits) == 2 and all(Path(f"/proc/{init}").exists() for init in inits)
        finally:
            maker.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{init}").exists() for init in inits):
        assert time.monotonic() < deadline, "a host is left"
        time.sleep(0.05)
