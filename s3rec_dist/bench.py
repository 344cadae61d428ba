"""``s3rec bench NAME``: how fast one part of the system is on this machine, and what its time goes to.

    s3rec bench reconstruct --dataset data/beauty     # samples/s built, on one core
    s3rec bench pretrain --dataset data/beauty        # samples/s of the whole training step
    s3rec bench evaluate --dataset data/beauty        # users/s of full ranking

Weights are random, the work is real: the dataset is streamed, samples are reconstructed, the engine steps. Each
figure is the median of several repetitions, with the slowest and the fastest beside it. The last line printed is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from s3rec_dist.config import Config, load_config
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.stream import PackedSequences, Stream
from s3rec_dist.evaluation import evaluate
from s3rec_dist.training.engine import Engine, World, start
from s3rec_dist.training.loop import StageName, Task
from s3rec_dist.training.tracking import peak_memory_mb

Rates = dict[str, list[float]]
"""What was measured per second, by name: a value for each repetition."""


class BenchError(ValueError):
    """A benchmark that cannot be run; the message says what to change."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec bench``."""
    parser.add_argument("name", choices=list(BENCHMARKS), help="what to measure")
    parser.add_argument("--dataset", required=True, metavar="DIR", help="dataset that 's3rec prepare' wrote")
    parser.add_argument("--config", metavar="FILE", help="settings of model and stage (default: the paper's)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="batches in a repetition (default: 100)")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    parser.add_argument("--profile", action="store_true", help="also show which operations the time goes to")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, as in engine.threads=1 pretrain.batch_size=1024"
    )


def run(args: argparse.Namespace) -> None:
    """Measures, and prints a table and a JSON line."""
    if min(args.steps, args.repetitions) < 1:
        raise BenchError(f"--steps {args.steps} --repetitions {args.repetitions}: expected 1 or more of each")
    config = load_config(args.config, [f"data.path={args.dataset}", *args.overrides])
    if args.name == "reconstruct" and not config.engine.threads:
        config = replace(config, engine=replace(config.engine, threads=1))
    world = start(config.engine)
    dataset = Dataset.open(config.data.path)
    rates = BENCHMARKS[args.name](config, dataset, world, args)
    machine = {
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    memory = round(peak_memory_mb())
    rows = [["", "median", "slowest", "fastest"]]
    rows += [[name, *(f"{f(v):,.0f}" for f in (statistics.median, min, max))] for name, v in rates.items()]
    width = max(len(row[0]) for row in rows)
    print(f"{args.name} on {dataset.manifest.name}: {', '.join(f'{k} {v}' for k, v in machine.items())}")
    for name, *values in rows:
        print("  ".join([name.ljust(width), *(value.rjust(10) for value in values)]))
    print(f"peak memory of the process: {memory:,} MiB")
    medians = {
        name.replace("/s", "_per_s").replace(" ", "_"): round(statistics.median(values), 1)
        for name, values in rates.items()
    }
    print(json.dumps({"bench": args.name, "dataset": dataset.manifest.name, **machine, **medians, "memory_mb": memory}))


def _reconstruct(config: Config, dataset: Dataset, world: World, args: argparse.Namespace) -> Rates:
    """Samples built from batches that are there already, and from the dataset: read, packed and built."""
    task = Task(config, "pretrain", dataset, world.device)
    stream = task.stream(world)
    try:
        batches = _endless(stream)
        ready = [next(batches).to(world.device) for _ in range(args.steps)]
        size = sum(len(packed) for packed in ready)

        def reconstruct() -> None:
            for epoch, packed in enumerate(ready):
                task.batch(packed, epoch)

        def stream_and_reconstruct() -> None:
            for packed in islice(batches, args.steps):
                task.batch(packed.to(world.device), 0)

        measured = {"samples/s": reconstruct, "samples/s streamed": stream_and_reconstruct}
        return {name: _repeat(call, size, world, args) for name, call in measured.items()}
    finally:
        stream.close()


def _train(stage: StageName) -> Callable[..., Rates]:
    def measure(config: Config, dataset: Dataset, world: World, args: argparse.Namespace) -> Rates:
        """Whole steps: batch, reconstruction, forward, backward, optimizer."""
        task = Task(config, stage, dataset, world.device)
        stream = task.stream(world)
        engine = Engine(task.model(), task.losses, task.stage, config.engine, world)
        try:
            batches = _endless(stream)
            samples = tokens = 0

            def steps() -> None:
                nonlocal samples, tokens
                samples = tokens = 0
                for step, packed in enumerate(islice(batches, args.steps)):
                    packed = packed.to(world.device)
                    parts = packed.split(task.stage.gradient_accumulation)
                    engine.step(
                        [task.batch(part, 0) for part in parts],
                        count=max(task.count(packed), 1),
                        learning_rate=task.stage.learning_rate,
                        dropout_seed=task.dropout_seed(step),
                    )
                    samples += len(packed)
                    tokens += len(packed.items)

            rates: Rates = {"samples/s": [], "items/s": [], "steps/s": []}
            for _ in range(args.repetitions + 1):
                seconds = _seconds(steps, world)
                for name, count in (("samples/s", samples), ("items/s", tokens), ("steps/s", args.steps)):
                    rates[name].append(count / seconds)
            if args.profile:
                _profile(steps, args.steps)
            return {name: values[1:] for name, values in rates.items()}  # the first one warmed up
        finally:
            engine.close()
            stream.close()

    return measure


def _evaluate(config: Config, dataset: Dataset, world: World, args: argparse.Namespace) -> Rates:
    """Ranking of all users' test items, by evaluation.protocol."""
    model = Task(config, "finetune", dataset, world.device).model().to(world.device).eval()

    def rank() -> None:
        evaluate(model, dataset, config.evaluation, "test", world.device)

    return {"users/s": _repeat(rank, dataset.n_rows, world, args)}


BENCHMARKS: dict[str, Callable[..., Rates]] = {
    "reconstruct": _reconstruct,
    "pretrain": _train("pretrain"),
    "finetune": _train("finetune"),
    "evaluate": _evaluate,
}


def _endless(stream: Stream) -> Iterator[PackedSequences]:
    """Full batches, epoch after epoch."""
    epoch = 0
    while True:
        found = False
        for packed in stream.iterate(epoch):
            if len(packed) * stream.world_size == stream.batch_size:
                found = True
                yield packed
        if not found:
            raise BenchError(
                f"{stream.dataset.path}: an epoch has {stream.samples_per_epoch} samples, less than one batch of "
                f"{stream.batch_size}; lower the batch size"
            )
        epoch += 1


def _repeat(call: Callable[[], Any], count: int, world: World, args: argparse.Namespace) -> list[float]:
    """``count`` per second, for each repetition after a warm-up."""
    return [count / _seconds(call, world) for _ in range(args.repetitions + 1)][1:]


def _seconds(call: Callable[[], Any], world: World) -> float:
    begin = time.perf_counter()
    call()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - begin


def _profile(steps: Callable[[], None], count: int) -> None:
    """Prints the operations that take the most time of their own, per step."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        steps()
    averages = profiler.key_averages()
    total = sum(a.self_cpu_time_total for a in averages)
    print(f"{'operation':<40}{'ms a step':>10}{'share':>8}{'calls':>8}")
    for a in sorted(averages, key=lambda a: -a.self_cpu_time_total)[:16]:
        ms = a.self_cpu_time_total / 1000 / count
        print(f"{a.key[:38]:<40}{ms:>10.2f}{a.self_cpu_time_total / total:>8.1%}{a.count / count:>8.0f}")
