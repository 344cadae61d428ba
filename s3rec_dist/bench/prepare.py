"""How ``s3rec prepare`` scales: synthetic logs of several sizes, each prepared by a process of its own.

figures = bench_prepare([5_000_000, 50_000_000], repetitions=1)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.data.synth import SynthSettings, write


def bench_prepare(
    events: Sequence[int], *, repetitions: int = 1, work_dir: str | None = None
) -> dict[str, list[float]]:
    """Seconds, CPU seconds, events/s and the process's peak of resident memory, a value for each repetition.

    Each log (8 bytes an event) and dataset lie in a temporary folder, in ``work_dir`` where it is given. Raises
    RuntimeError where a preparation fails.
    """
    figures: dict[str, list[float]] = {}
    for count in events:
        with tempfile.TemporaryDirectory(prefix="s3rec-bench-", dir=work_dir) as folder:
            log = os.path.join(folder, "log")
            write(SynthSettings(events=count, output=log))
            for _ in range(repetitions):
                for name, value in _measured(log, os.path.join(folder, "dataset")).items():
                    figures.setdefault(f"{count:,} events: {name}", []).append(value)
    return figures


def _measured(log: str, output: str) -> dict[str, float]:
    """Figures of one preparation, told by its own process: a parent's say nothing of a child's peak."""
    command = [sys.executable, "-m", "s3rec_dist.bench.prepare", log, output]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}")
    return json.loads(done.stdout)


def _main(log: str, output: str) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    manifest = prepare(
        PrepareSettings(
            source="table",
            input=os.path.join(log, "events"),
            attributes=os.path.join(log, "items.parquet"),
            attribute_fields=("category", "tags"),
            output=output,
            overwrite=True,
        )
    )
    seconds = time.perf_counter() - start
    with open("/proc/self/status", encoding="ascii") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "CPU seconds": time.process_time() - cpu,
                "events/s": manifest.preparation["rows_read"] / seconds,
                "peak MiB": peak / 1024,
            }
        )
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
