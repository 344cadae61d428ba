"""What a checkpoint costs training: ``s3rec bench checkpoint --dataset data/beauty``.

Windows of as many steps follow each other without a save, with one that training waits for at its start, and with one
in the background. Training is held while the state is copied, or until all is written; the CPU time that a window takes
more than those without tells what writing takes from training where no core is idle.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from s3rec_dist.bench.step import Steps
from s3rec_dist.training.checkpoint import Saver, run_layout


def bench_checkpoint(training: Steps, *, steps: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds that training is held by a save, and CPU seconds that the process spends on it, a value for each
    repetition after a first that warms up."""
    engine = training.engine
    ways = ("without", "waited for", "in the background")
    held: dict[str, list[float]] = {way: [] for way in ways}
    spent: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="s3rec-bench-") as folder:
        savers = {way: Saver(engine, Path(folder), background=way == "in the background") for way in ways}
        number = 0
        for _ in range(repetitions + 1):
            for way, saver in savers.items():
                began, cpu = time.perf_counter(), time.process_time()
                if way != "without":
                    saver.begin({"step": (number := number + 1), **run_layout(engine)}, keep=1)
                held[way].append(time.perf_counter() - began)
                training.run(steps)
                saver.wait()
                spent[way].append(time.process_time() - cpu)
                if isinstance(error := saver.outcome(), BaseException):
                    raise error
        (tag,) = Path(folder).glob("step-*")
        size = sum(path.stat().st_size for path in tag.rglob("*") if path.is_file())
        for saver in savers.values():
            saver.close()
    undisturbed = statistics.median(spent["without"][1:])
    figures = {"MiB of a checkpoint": [size / 2**20], "CPU s of a window without": spent["without"][1:]}
    for way in ways[1:]:
        figures[f"s held, {way}"] = held[way][1:]
        figures[f"CPU s of a save, {way}"] = [seconds - undisturbed for seconds in spent[way][1:]]
    return figures
