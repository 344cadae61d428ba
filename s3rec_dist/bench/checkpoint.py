"""What a checkpoint costs training: ``s3rec bench checkpoint --dataset data/beauty``.

Windows of as many steps follow each other without a save, with one that training waits for at its start, and with one
in the background. Lost is what a window takes longer than those without: the whole save, or the copy of the state and
what the writing thread takes from training.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from s3rec_dist.bench.step import Steps
from s3rec_dist.training.checkpoint import Saver, run_layout

INTERVAL_S = 60.0
"""Between checkpoints, for the share that is lost."""


def bench_checkpoint(training: Steps, *, steps: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of a window of ``steps``, and what is lost, a value for each repetition after a first that warms up."""
    engine = training.engine
    ways: dict[str, list[float]] = {"without": [], "waited for": [], "in the background": []}
    with tempfile.TemporaryDirectory(prefix="s3rec-bench-") as folder:
        savers = {name: Saver(engine, Path(folder), background=name == "in the background") for name in ways}
        number = 0
        for _ in range(repetitions + 1):
            for name, seconds in ways.items():
                began = time.perf_counter()
                if name != "without":
                    savers[name].begin({"step": (number := number + 1), **run_layout(engine)}, keep=1)
                training.run(steps)
                if engine.world.device.type == "cuda":
                    torch.cuda.synchronize(engine.world.device)
                savers[name].wait()
                seconds.append(time.perf_counter() - began)
                if isinstance(error := savers[name].outcome(), BaseException):
                    raise error
        (tag,) = Path(folder).glob("step-*")
        size = sum(path.stat().st_size for path in tag.rglob("*") if path.is_file())
        for saver in savers.values():
            saver.close()
    undisturbed = statistics.median(ways.pop("without")[1:])
    lost = {name: [value - undisturbed for value in seconds[1:]] for name, seconds in ways.items()}
    return {
        "MiB of a checkpoint": [size / 2**20],
        "s of a window": [undisturbed],
        **{f"s lost, {name}": values for name, values in lost.items()},
        **{f"% lost at one a minute, {name}": [100 * v / INTERVAL_S for v in values] for name, values in lost.items()},
    }
