"""Processes that measure together, started by a benchmark that is none of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def measured_by(
    module: str, job: Mapping[str, Any], ranks: int, *, prefix: Sequence[str] = (), **environment: str
) -> dict[str, Any]:
    """What rank 0 of ``ranks`` processes under torchrun, each ``python -m module JOB RESULT``, writes to RESULT, a JSON
    file as ``job`` is. Raises RuntimeError with what they printed where that fails. ``prefix`` starts the command."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "job.json", Path(folder) / "result.json"
        given.write_text(json.dumps(job))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = [*prefix, *torchrun, "-m", module, str(given), str(result)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{ranks} ranks failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found
