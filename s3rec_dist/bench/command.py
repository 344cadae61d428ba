"""``s3rec bench NAME``: how fast one part of the system is on this machine, and what its time goes to.

    s3rec bench reconstruct --dataset data/beauty     # samples/s built, on one core
    s3rec bench pretrain --dataset data/beauty        # samples/s of the whole training step
    s3rec bench evaluate --dataset data/beauty        # users/s of full ranking
    s3rec bench stream --dataset data/beauty          # sequences/s read, verified, decoded and packed, on one core
    s3rec bench resume                                # seconds to the middle of an epoch of a billion samples
    s3rec bench kernels                               # attention, layers, losses beside their rivals
    s3rec bench step --batch-sizes 256 16384          # the step as a whole: time, tokens/s, kernels, idle share
    s3rec bench scaling                               # 1, 2, 4 ranks measured here; 8 to 1,024 GPUs modelled
    s3rec bench prepare --events 5000000 50000000     # seconds, events/s and memory, by size of a synthetic log
    s3rec bench serve --dataset data/beauty           # the HTTP service under load, beside the bare model
    s3rec bench checkpoint --dataset data/beauty      # what a save costs training, waited for and in the background
    s3rec bench catalogue                             # a step over 100 k, 1 M, 10 M items, on two ranks
    s3rec bench cold --dataset data/lastfm finetune.loss=ce   # HR@10 on items never trained on, by attributes
    s3rec bench softmax --targets 2048                # the exact softmax over 12,101, 131,072 and 1 M items: s, memory
    s3rec bench faults                                # a run that is killed 100 times, and 300 damaged checkpoints

Weights are random, the work is real: the dataset is streamed, samples are reconstructed, the engine steps. Each
figure is the median of several repetitions, with the slowest and the fastest beside it; ``faults`` and ``cold``, which
tell what a run does and not how fast, do it once. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s3rec_dist.bench.step import BenchError, Steps, beauty_like, bench_step, endless, profile_steps
from s3rec_dist.config import Config, load_config
from s3rec_dist.data.dataset import ATTRIBUTES_SCHEMA, ITEMS_SCHEMA, Dataset, new_manifest
from s3rec_dist.data.formats import WrittenGroup, WrittenShard
from s3rec_dist.data.order import SampleSpec
from s3rec_dist.data.stream import Stream
from s3rec_dist.evaluation import evaluate
from s3rec_dist.kernels.backends import BACKENDS
from s3rec_dist.storage import Storage
from s3rec_dist.training.engine import World, start
from s3rec_dist.training.loop import StageName, Task
from s3rec_dist.training.tracking import peak_memory_mb

Figures = dict[str, list[float]]
"""What was measured, by name with unit: a value for each repetition."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec bench``."""
    parser.add_argument("name", choices=list(BENCHMARKS), help="what to measure")
    parser.add_argument(
        "--dataset",
        metavar="DIR",
        help="dataset that 's3rec prepare' wrote; resume, prepare, kernels, step, faults, scaling, catalogue and "
        "softmax need none",
    )
    parser.add_argument("--config", metavar="FILE", help="settings of model and stage (default: the paper's)")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="batches, or requests, in a repetition (default: 100; 2000 for stream and serve, 10 for catalogue)",
    )
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    parser.add_argument(
        "--rivals", action="store_true", help="stream: also MosaicML Streaming and LitData, which must be installed"
    )
    parser.add_argument(
        "--events",
        type=int,
        nargs="+",
        default=[5_000_000],
        metavar="N",
        help="prepare: sizes of the synthetic logs (default: 5000000)",
    )
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="step: samples of a batch (default: 256, and on a GPU 4096, 16384 and 65536; to reach on an H100: 3 ms a "
        "step at 256, 10 million real tokens/s at the best size)",
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=[*BACKENDS, "triton"],
        metavar="NAME",
        help="step: backends, of model.attention's values (default: the one that is set)",
    )
    for fault, count, what in (
        ("kills", 100, "SIGKILLs"),
        ("kills-in-saves", 30, "SIGKILLs, of them, while a checkpoint is written, at least"),
        ("terms", 30, "SIGTERMs"),
        ("corruptions", 300, "damaged checkpoints"),
    ):
        parser.add_argument(f"--{fault}", type=int, default=count, metavar="N", help=f"faults: {what} ({count})")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        metavar="N",
        help="scaling: processes (default: 1 2 4); catalogue: the number of them (default: 2)",
    )
    parser.add_argument(
        "--items",
        type=int,
        nargs="+",
        metavar="N",
        help="catalogue, softmax: numbers of items (default: 100000 1000000 10000000; 12101 131072 1000000)",
    )
    parser.add_argument(
        "--targets", type=int, default=2048, metavar="N", help="softmax: places that are predicted (default: 2048)"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="scaling: also write scaling.md, .json, and .png where matplotlib is installed"
    )
    parser.add_argument("--profile", action="store_true", help="also show which operations the time goes to")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, as in engine.threads=1 pretrain.batch_size=1024"
    )


def run(args: argparse.Namespace) -> None:
    """Measures, and prints a table and a JSON line."""
    if args.steps is None:
        args.steps = {"stream": 2000, "serve": 2000, "catalogue": 10}.get(args.name, 100)
    args.ranks = args.ranks or ([2] if args.name == "catalogue" else [1, 2, 4])
    if min(args.ranks) < 1:
        raise BenchError(f"--ranks {min(args.ranks)}: expected 1 or more processes")
    if min(args.steps, args.repetitions) < 1:
        raise BenchError(f"--steps {args.steps} --repetitions {args.repetitions}: expected 1 or more of each")
    if args.dataset is None and args.name not in WITHOUT_DATASET:
        raise BenchError(f"bench {args.name} measures on a dataset; name one with --dataset")
    given = ["finetune.pretrained=none"] * (args.name == "cold") + args.overrides
    config = load_config(args.config, [f"data.path={args.dataset or ''}", *given])
    if args.name == "reconstruct" and not config.engine.threads:
        config = replace(config, engine=replace(config.engine, threads=1))
    world = start(config.engine)
    dataset = Dataset.open(config.data.path, Storage(config.storage)) if config.data.path else None
    name = dataset.manifest.name if dataset else "synthetic data"
    figures = BENCHMARKS[args.name](config, dataset, world, args)
    machine = {
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    memory = round(peak_memory_mb())
    columns = 3 if any(len(values) > 1 for values in figures.values()) else 1
    rows = [["", *("median", "slowest", "fastest")[:columns]]]
    for title, values in figures.items():
        slowest, fastest = (min(values), max(values))[:: 1 if title.endswith("/s") else -1]
        rows.append([title, *map(_shown, (statistics.median(values), slowest, fastest)[:columns])])
    width = max(len(row[0]) for row in rows)
    print(f"{args.name} on {name}: {', '.join(f'{k} {v}' for k, v in machine.items())}")
    for title, *shown in rows:
        print("  ".join([title.ljust(width), *(value.rjust(10) for value in shown)]))
    print(f"peak memory of the process: {memory:,} MiB")
    medians = {
        title.replace("/s", "_per_s").replace(" ", "_"): round(statistics.median(values), 6)
        for title, values in figures.items()
    }
    print(json.dumps({"bench": args.name, "dataset": name, **machine, **medians, "memory_mb": memory}))


def _reconstruct(config: Config, dataset: Dataset, world: World, args: argparse.Namespace) -> Figures:
    """Samples built from batches that are there already, and from the dataset: read, packed and built."""
    task = Task(config, "pretrain", dataset, world.device)
    stream = task.stream(world)
    try:
        batches = endless(stream)
        ready = list(islice(batches, args.steps))
        size = sum(len(packed) for packed in ready)

        def reconstruct() -> None:
            for epoch, packed in enumerate(ready):
                task.batch(packed, epoch)

        def stream_and_reconstruct() -> None:
            for packed in islice(batches, args.steps):
                task.batch(packed, 0)

        measured = {"samples/s": reconstruct, "samples/s streamed": stream_and_reconstruct}
        return {name: _repeat(call, size, world, args) for name, call in measured.items()}
    finally:
        stream.close()


def _train(stage: StageName) -> Callable[..., Figures]:
    def measure(config: Config, dataset: Dataset, world: World, args: argparse.Namespace) -> Figures:
        """Whole steps: batch, reconstruction, forward, backward, optimizer."""
        training = Steps(config, stage, dataset, world)
        try:
            samples = items = 0

            def steps() -> None:
                nonlocal samples, items
                samples, items = training.run(args.steps)

            figures: Figures = {"samples/s": [], "items/s": [], "steps/s": [], "CPU ms a step": []}
            for _ in range(args.repetitions + 1):
                before = time.process_time()
                seconds = _seconds(steps, world)
                figures["CPU ms a step"].append((time.process_time() - before) * 1000 / args.steps)
                for name, count in (("samples/s", samples), ("items/s", items), ("steps/s", args.steps)):
                    figures[name].append(count / seconds)
            if args.profile:
                print(profile_steps(steps, args.steps, world.device))
            return {name: values[1:] for name, values in figures.items()}  # the first one warmed up
        finally:
            training.close()

    return measure


def _evaluate(config: Config, dataset: Dataset, world: World, args: argparse.Namespace) -> Figures:
    """Ranking of all users' test items, by evaluation.protocol."""
    model = Task(config, "finetune", dataset, world.device).model().to(world.device).eval()

    def rank() -> None:
        evaluate(model, dataset, config.evaluation, "test", world.device)

    return {"users/s": _repeat(rank, dataset.n_rows, world, args)}


def _stream(config: Config, dataset: Dataset, world: World, args: argparse.Namespace) -> Figures:
    """Whole sequences, and prefixes, packed into batches on one core: row groups are read, verified and decoded anew in
    each epoch."""
    length = config.model.max_length
    specs = {"sequences/s": SampleSpec("full_sequence", length), "prefixes/s": SampleSpec("all_prefixes", length)}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        figures = {title: _streamed(config, spec, world, args) for title, spec in specs.items()}
        if args.rivals:
            from s3rec_dist.bench.rivals import rivals

            more = rivals(
                dataset,
                specs["sequences/s"],
                batch_size=config.pretrain.batch_size,
                repetitions=args.repetitions,
                progress=lambda line: print(line, file=sys.stderr, flush=True),
            )
            figures |= {f"{rival}: sequences/s": values for rival, values in more.items()}
        return figures
    finally:
        os.sched_setaffinity(0, cores)


def _streamed(config: Config, spec: SampleSpec, world: World, args: argparse.Namespace) -> list[float]:
    """Batches of epochs, for each of which the dataset is opened anew."""
    data = config.data
    streamed = 0

    def epochs() -> None:
        nonlocal streamed
        streamed = 0
        while streamed < args.steps * config.pretrain.batch_size:
            stream = Stream(
                Dataset.open(data.path, Storage(config.storage), revision=data.revision),
                spec,
                batch_size=config.pretrain.batch_size,
                streams=data.streams,
                seed=config.seed,
                prefetch_threads=1,
                prefetch_bytes=data.prefetch_mb << 20,
                cache_bytes=data.cache_mb << 20,
            )
            try:
                streamed += sum(map(len, stream.iterate(0)))
            finally:
                stream.close()

    rates = []
    for _ in range(args.repetitions + 1):
        seconds = _seconds(epochs, world)
        rates.append(streamed / seconds)
    return rates[1:]


EPOCH_SAMPLES, EPOCH_GROUPS = 1_000_000_000, 24_414
"""The epoch that ``resume`` resumes: a hundred million users, 4,096 a row group."""


def _resume(config: Config, dataset: None, world: World, args: argparse.Namespace) -> Figures:
    """Opens a dataset of a billion samples, of which only manifest and index exist, and finds the batch in the middle
    of an epoch."""
    lengths = np.arange(3, 53, dtype=np.int32)
    rows = EPOCH_SAMPLES // EPOCH_GROUPS
    counts = np.full(len(lengths), rows // int((lengths - 2).sum()), dtype=np.int32)
    counts[0] += rows - int((lengths - 2) @ counts)
    group = WrittenGroup(4, 1, bytes(32), int(counts.sum()), lengths, counts)
    shards = [
        WrittenShard(f"{first:05d}.parquet", len(own) * group.rows, 5, "0" * 64, "0" * 64, (0, 0), tuple(own))
        for first, own in ((first, [group] * min(64, EPOCH_GROUPS - first)) for first in range(0, EPOCH_GROUPS, 64))
    ]
    spec = SampleSpec("all_prefixes", max(lengths.tolist()))
    with tempfile.TemporaryDirectory() as folder:
        new_manifest(
            folder,
            name="resume",
            format="parquet",
            shards=shards,
            items=ITEMS_SCHEMA.empty_table(),
            attributes=ATTRIBUTES_SCHEMA.empty_table(),
            preparation={},
            created_with="s3rec bench",
        )

        def resume() -> None:
            stream = Stream(Dataset.open(folder), spec, batch_size=config.pretrain.batch_size, seed=config.seed)
            try:
                order = stream.order(1)
                middle = order.steps // 2
                positions, _ = order.batch_positions(middle, middle + 1, 0, 1)
                np.searchsorted(order.bounds, positions)
            finally:
                stream.close()

        return {"seconds": [_seconds(resume, world) for _ in range(args.repetitions + 1)][1:]}


def _prepare(config: Config, dataset: None, world: World, args: argparse.Namespace) -> Figures:
    """Synthetic logs, each prepared by a process of its own."""
    from s3rec_dist.bench.prepare import bench_prepare

    return bench_prepare(args.events, repetitions=args.repetitions)


def _kernels(config: Config, dataset: None, world: World, args: argparse.Namespace) -> Figures:
    """Attention, the layers around it and the attribute loss against their rivals, correctness first."""
    from s3rec_dist.bench.kernels import bench_kernels
    from s3rec_dist.bench.layers import bench_layers
    from s3rec_dist.bench.losses import bench_losses

    parts = (bench_kernels, bench_layers, bench_losses)
    return {name: values for part in parts for name, values in part(world.device, repetitions=args.repetitions).items()}


def _step(config: Config, dataset: Dataset | None, world: World, args: argparse.Namespace) -> Figures:
    """Whole pretraining steps by batch size and backend, and what their time goes to."""
    sizes = args.batch_sizes or ([256] if world.device.type == "cpu" else [256, 4096, 16384, 65536])
    with tempfile.TemporaryDirectory(prefix="s3rec-bench-") as folder:
        return bench_step(
            config,
            dataset or beauty_like(Path(folder)),
            world,
            steps=args.steps,
            repetitions=args.repetitions,
            batch_sizes=sizes,
            backends=args.backends or [config.model.attention],
        )


def _checkpoint(config: Config, dataset: Dataset, world: World, args: argparse.Namespace) -> Figures:
    """Pretraining steps with and without a checkpoint being written."""
    from s3rec_dist.bench.checkpoint import bench_checkpoint

    training = Steps(config, "pretrain", dataset, world)
    try:
        return bench_checkpoint(training, steps=args.steps, repetitions=args.repetitions)
    finally:
        training.close()


def _faults(config: Config, dataset: Dataset | None, world: World, args: argparse.Namespace) -> Figures:
    """A run of two processes, disturbed in every way."""
    from s3rec_dist.bench.faults import Campaign, bench_faults

    campaign = Campaign(
        kills=args.kills, kills_in_saves=args.kills_in_saves, terms=args.terms, corruptions=args.corruptions
    )
    return bench_faults(config, campaign)


def _scaling(config: Config, dataset: Dataset | None, world: World, args: argparse.Namespace) -> Figures:
    """Ranks that torchrun starts here, and a model of many GPUs."""
    from s3rec_dist.bench.scaling import bench_scaling

    with tempfile.TemporaryDirectory(prefix="s3rec-bench-") as folder:
        place = (dataset or beauty_like(Path(folder))).path
        config = replace(config, data=replace(config.data, path=place), engine=replace(config.engine, threads=1))
        return bench_scaling(
            config,
            args.ranks,
            steps=args.steps,
            repetitions=args.repetitions,
            output=args.output,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _catalogue(config: Config, dataset: Dataset | None, world: World, args: argparse.Namespace) -> Figures:
    """Steps over item tables of several sizes."""
    from s3rec_dist.bench.catalogue import bench_catalogue

    return bench_catalogue(
        config,
        args.items or [100_000, 1_000_000, 10_000_000],
        args.ranks[0],
        steps=args.steps,
        repetitions=args.repetitions,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )


def _cold(config: Config, dataset: Dataset, world: World, args: argparse.Namespace) -> Figures:
    """Warm and cold items ranked by models without and with attributes."""
    from s3rec_dist.bench.cold import bench_cold

    return bench_cold(config, dataset, world, progress=lambda line: print(line, file=sys.stderr, flush=True))


def _softmax(config: Config, dataset: Dataset | None, world: World, args: argparse.Namespace) -> Figures:
    """The exact softmax loss over catalogues of several sizes, on one core."""
    from s3rec_dist.bench.softmax import bench_softmax

    return bench_softmax(
        args.items or [12_101, 131_072, 1_000_000],
        args.targets,
        config.model.hidden_size,
        repetitions=args.repetitions,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )


WITHOUT_DATASET = ("resume", "prepare", "kernels", "step", "faults", "scaling", "catalogue", "softmax")


def _serve(config: Config, dataset: Dataset, world: World, args: argparse.Namespace) -> Figures:
    """The HTTP service under load, beside the bare model."""
    from s3rec_dist.bench.serve import bench_serve

    return bench_serve(config, dataset, requests=args.steps, repetitions=args.repetitions)


BENCHMARKS: dict[str, Callable[..., Figures]] = {
    "reconstruct": _reconstruct,
    "pretrain": _train("pretrain"),
    "finetune": _train("finetune"),
    "evaluate": _evaluate,
    "stream": _stream,
    "resume": _resume,
    "prepare": _prepare,
    "kernels": _kernels,
    "step": _step,
    "checkpoint": _checkpoint,
    "faults": _faults,
    "scaling": _scaling,
    "catalogue": _catalogue,
    "softmax": _softmax,
    "cold": _cold,
    "serve": _serve,
}


def _repeat(call: Callable[[], Any], count: int, world: World, args: argparse.Namespace) -> list[float]:
    """``count`` per second, for each repetition after a warm-up."""
    return [count / _seconds(call, world) for _ in range(args.repetitions + 1)][1:]


def _seconds(call: Callable[[], Any], world: World) -> float:
    begin = time.perf_counter()
    call()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - begin
