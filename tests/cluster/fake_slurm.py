#!/usr/bin/env python3
"""srun and scontrol for hosts that ssh reaches: as srun, one task a node; as scontrol, the names in a node list."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path


def hostnames(nodes: str) -> list[str]:
    """node[0-1] -> node0, node1"""
    found = re.fullmatch(r"(\w+)\[(\d+)-(\d+)\]", nodes)
    assert found, nodes
    return [f"{found[1]}{i}" for i in range(int(found[2]), int(found[3]) + 1)]


def srun(arguments: list[str]) -> int:
    """Runs the command behind the options on each node, with this environment; the first that fails ends all."""
    options = [argument for argument in arguments if re.match("--(nodes|ntasks|kill-on|cpu-bind)", argument)]
    command = arguments[len(options) :]
    tasks = []
    for number, node in enumerate(hostnames(os.environ["SLURM_JOB_NODELIST"])):
        variables = [f"{k}={v}" for k, v in {**os.environ, "SLURM_NODEID": str(number)}.items()]
        words = shlex.join(["env", "--chdir", os.getcwd(), *variables, *command])
        tasks.append(subprocess.Popen(["ssh", "-n", node, words]))
    while any(task.poll() is None for task in tasks) and not any(task.returncode for task in tasks):
        time.sleep(0.2)
    for task in tasks:
        task.terminate()
    return max(abs(task.wait()) for task in tasks)


if __name__ == "__main__":
    if Path(sys.argv[0]).name == "scontrol":
        assert sys.argv[1:3] == ["show", "hostnames"], sys.argv
        print("\n".join(hostnames(sys.argv[3])))
    else:
        sys.exit(srun(sys.argv[1:]))
