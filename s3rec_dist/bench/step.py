"""The training step as a whole: what it takes, and what the device does meanwhile: ``s3rec bench step``.

Pretraining steps of the real program on real batches: streamed, reconstructed, through the engine. For each backend and
batch size the time of a step, samples and real tokens a second (items of samples: no padding, and each once, though
four sequences of a sample go through the encoder), and from a profile kernels a step (on a CPU: operators), the time
that each takes, and the share of a step in which the device does nothing. On a GPU, at ZeRO stage 0, a step in which
the host waits for the device is an error.

Without a dataset it makes one with Beauty's numbers of users, items, attributes and lengths, and random items. To reach
on an H100, with the paper's model: 3 ms a step at Beauty's batch of 256, and 10 million real tokens a second at a batch
size that allows it.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from s3rec_dist.bench.kernels import BEAUTY_PREFIXES
from s3rec_dist.config import Config
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.data.stream import PackedSequences, Stream
from s3rec_dist.training.engine import Engine, StepResult, World
from s3rec_dist.training.loop import StageName, Task
from s3rec_dist.training.phases import IDLE

PROFILED_STEPS = 10


class BenchError(ValueError):
    """A benchmark that cannot be run; the message says what to change."""


class Steps:
    """A stage's training steps on full batches, epoch after epoch."""

    def __init__(self, config: Config, stage: StageName, dataset: Dataset, world: World) -> None:
        self.task = Task(config, stage, dataset, world.device)
        self.stream = self.task.stream(world)
        self.engine = Engine(
            self.task.model(), self.task.losses, self.task.stage, config.engine, world, self.task.tables
        )
        self._batches = endless(self.stream)
        self._step = 0

    def step(self) -> tuple[PackedSequences, StepResult]:
        """One step, which on a GPU may not be done yet, and the batch it was on."""
        task, clock = self.task, self.engine.clock
        clock.enter("data")
        packed = next(self._batches)
        clock.enter("reconstruct")
        result = self.engine.step(
            task.batches(packed, 0, self.engine),
            count=max(task.count(packed), 1),
            learning_rate=task.stage.learning_rate,
            item_learning_rate=task.stage.item_learning_rate or None,
            dropout_seed=task.dropout_seed(self._step),
        )
        self._step += 1
        return packed, result

    def run(self, count: int) -> tuple[int, int]:
        """``count`` steps; this process's samples and items in them."""
        batches = [self.step()[0] for _ in range(count)]
        self.engine.clock.enter(IDLE)
        return sum(map(len, batches)), sum(len(packed.items) for packed in batches)

    def close(self) -> None:
        """Lets go of threads and buffers."""
        self.engine.close()
        self.stream.close()


def endless(stream: Stream) -> Iterator[PackedSequences]:
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


def bench_step(
    config: Config,
    dataset: Dataset,
    world: World,
    *,
    steps: int,
    repetitions: int,
    batch_sizes: Sequence[int],
    backends: Sequence[str],
) -> dict[str, list[float]]:
    """What was measured, by name with unit: a value for each repetition of ``steps`` steps; of a profile, one. Prints
    what the time of a step goes to. Raises RuntimeError on a GPU where a step waits for it."""
    figures: dict[str, list[float]] = {}
    for backend in backends:
        for batch_size in batch_sizes:
            own = replace(
                config,
                model=replace(config.model, attention=cast(Any, backend)),
                pretrain=replace(config.pretrain, batch_size=batch_size),
            )
            training = Steps(own, "pretrain", dataset, world)
            try:
                found = _measure(training, steps, repetitions)
            finally:
                training.close()
            figures |= {f"batch {batch_size} {backend} {unit}": values for unit, values in found.items()}
    return figures


def _measure(training: Steps, steps: int, repetitions: int) -> dict[str, list[float]]:
    device, config = training.task.device, training.task.config
    figures = defaultdict(list)
    training.run(min(steps, 10))  # warms up: kernels are compiled, memory is taken
    for _ in range(repetitions):
        _wait(device)
        begin = time.perf_counter()
        with without_host_waits(training):
            samples, items = training.run(steps)
        _wait(device)
        seconds = time.perf_counter() - begin
        figures["ms"].append(seconds / steps * 1e3)
        figures["samples/s"].append(samples / seconds)
        figures["real tokens/s"].append(items / seconds)
    found = profile_steps(lambda: training.run(PROFILED_STEPS), PROFILED_STEPS, device)
    print(f"batch {config.pretrain.batch_size} {config.model.attention}:\n{found}")
    on_cpu = device.type == "cpu"
    figures["operators" if on_cpu else "kernels"] = [found.kernels]
    # The profiler slows the host down: on a CPU the operators too, on a GPU only what launches them.
    seconds = found.seconds if on_cpu else statistics.median(figures["ms"]) / 1e3
    figures["idle %"] = [100 * (1 - found.busy / seconds)]
    return dict(figures)


@contextlib.contextmanager
def without_host_waits(training: Steps) -> Iterator[None]:
    """A block in which it is an error that the host waits for a GPU, except under ZeRO, which checks its gradients."""
    if training.task.device.type != "cuda" or training.engine.zero_stage:
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Where the time of a step goes; all numbers are of one step."""

    kernels: float
    """Kernels, copies and fills of a GPU; operators on a CPU."""
    seconds: float
    busy: float
    """Seconds in which a kernel runs."""
    by_name: list[tuple[str, float, float]]
    """(kernel, calls, seconds of its own), the longest first."""

    def __str__(self) -> str:
        total = sum(seconds for _, _, seconds in self.by_name)
        lines = [f"{'time by kernel':<72}{'ms a step':>10}{'share':>8}{'calls':>8}"]
        for name, calls, seconds in self.by_name[:15]:
            lines.append(f"{name[:70]:<72}{seconds * 1e3:>10.3f}{seconds / total:>8.1%}{calls:>8.0f}")
        return "\n".join(lines)


def profile_steps(call: Callable[[], object], steps: int, device: torch.device) -> StepProfile:
    """What ``call`` does, which makes ``steps`` steps."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        begin = time.perf_counter()
        call()
        _wait(device)
        seconds = time.perf_counter() - begin
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind and not event.is_user_annotation]
    own: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    busy = end = 0.0
    for event in sorted(events, key=lambda event: event.time_range.start):
        own[event.name][0] += 1
        own[event.name][1] += (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e6
        busy += max(event.time_range.end - max(event.time_range.start, end), 0) / 1e6
        end = max(end, event.time_range.end)
    by_name = [(name, calls / steps, seconds / steps) for name, (calls, seconds) in own.items()]
    return StepProfile(
        kernels=len(events) / steps,
        seconds=seconds / steps,
        busy=busy / steps,
        by_name=sorted(by_name, key=lambda entry: -entry[2]),
    )


def beauty_like(folder: Path) -> Dataset:
    """A dataset with Beauty's numbers of users, items, attributes and lengths, and random items."""
    draw = random.Random(1)
    users = []
    for length, (count, longer) in enumerate(zip(BEAUTY_PREFIXES, [*BEAUTY_PREFIXES[1:], 0], strict=True), start=1):
        users += [[draw.randint(1, 12_101) for _ in range(length + 2)] for _ in range(count - longer)]
    draw.shuffle(users)
    lines = [f"u{number} {' '.join(map(str, items))}\n" for number, items in enumerate(users)]
    (folder / "beauty-like.txt").write_text("".join(lines), encoding="utf-8")
    attributes = {str(item): draw.sample(range(1, 638), 5) for item in range(1, 12_102)}
    (folder / "beauty-like_item2attributes.json").write_text(json.dumps(attributes), encoding="utf-8")
    output = str(folder / "dataset")
    prepare(PrepareSettings(source="s3rec", input=str(folder / "beauty-like.txt"), output=output))
    return Dataset.open(output)
