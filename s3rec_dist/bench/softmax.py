"""The exact softmax loss against N items: seconds with gradients, and the memory that it takes beside its inputs and
their gradients, each in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from s3rec_dist.bench.ranks import measured_by


def bench_softmax(
    items: Sequence[int], targets: int, features: int, *, repetitions: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """What was measured, by name with unit: a value for each repetition."""
    figures: dict[str, list[float]] = {}
    for count in items:
        name = f"{targets:,} targets x {count:,} items x {features}"
        progress(f"{name} ...")
        job = {"items": count, "targets": targets, "features": features, "repetitions": repetitions}
        found = measured_by("s3rec_dist.bench.softmax", job, 1, OMP_NUM_THREADS="1")
        figures[f"{name}: s"] = found["seconds"]
        figures[f"{name}: workspace MiB"] = [found["workspace"]]
        figures[f"{name}: relative error of a sample"] = [found["error"]]
    return figures


def _worker(job: str, result: str) -> None:
    from s3rec_dist.model.objectives import softmax_loss
    from s3rec_dist.training.tracking import peak_memory_mb

    spec = json.loads(Path(job).read_text())
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(spec["targets"], spec["features"], generator=generator)
    table = torch.randn(spec["items"], spec["features"], generator=generator).div_(spec["features"] ** 0.5)
    targets = torch.randint(spec["items"], (spec["targets"],), generator=generator)
    hidden.requires_grad_()
    table.requires_grad_()
    softmax_loss(hidden[:32], table[:1024], targets[:32] % 1024)  # loads what it needs
    before, seconds = peak_memory_mb(), []
    for _ in range(spec["repetitions"]):
        begin = time.perf_counter()
        softmax_loss(hidden, table, targets)
        seconds.append(time.perf_counter() - begin)
    gradients = (hidden.nbytes + table.nbytes) / 2**20
    workspace = peak_memory_mb() - before - gradients
    with torch.no_grad():  # last, because it takes more
        few = slice(0, 32)
        own = softmax_loss(hidden[few], table, targets[few])
        logits = hidden[few].double() @ table.double().T
        dense = torch.nn.functional.cross_entropy(logits, targets[few], reduction="sum")
    found = {"seconds": seconds, "error": float((own - dense).abs() / dense), "workspace": workspace}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    _worker(*sys.argv[1:])
