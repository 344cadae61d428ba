"""How training scales: ranks started here are measured, and a model of 8 to 1,024 GPUs is built on what they do.

Measured, by number of ranks of one thread each that share a global batch: a step's time by phase, and the bytes that a
rank sends. Those are
computed from the ZeRO stage, counted at DeepSpeed's collectives, and, where this program may make a network namespace,
read from its loopback device, over which nothing else goes. An all-reduce of several sizes gives latency and bandwidth;
with the time of one rank these predict the others' steps, and the error is shown.

Modelled, never measured: a GPU's speed and the links are the inputs named below. A step of ``tokens`` on each of n
GPUs, for a model of P parameters in fp32 under ZeRO stage 0, takes

    floor + tokens / rate             launching kernels; computing
    P * UPDATE_BYTES / memory         the table's dense gradient, flattened and back, and Adam
    all-reduce of 4 P bytes           2 (n - 1) / n * 4 P / bandwidth, and the hops' latency by ring or tree, the faster

one after the other: DeepSpeed's stage 0 reduces after the backward pass.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from s3rec_dist.bench.ranks import measured_by
from s3rec_dist.config import Config, from_dict, to_dict
from s3rec_dist.training.phases import PHASES, wire_bytes

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)

GRADIENT_BYTES = 4
UPDATE_BYTES = 48
"""Bytes of a GPU's memory that a step moves for each parameter: zeroing the gradient 4, into the flat buffer and back
16, Adam's reads and writes 28."""

TOKENS_PER_SAMPLE = 7.15
"""Beauty's prefixes."""

WEAK_SAMPLES, STRONG_SAMPLES = 4096, 65_536
"""A GPU's batch when each has as much to do however many there are; and the global batch that they share."""

ENCODER_PARAMETERS = 165_000
"""Of the paper's model without its item table: two layers, heads, positions, attributes."""

CATALOGUES = {"12,101 items": 12_101, "1 M items": 1_000_000, "10 M items": 10_000_000}
HIDDEN_SIZE = 64

ENOUGH = 0.5
"""The efficiency below which scaling is said to have stopped."""


@dataclass(frozen=True)
class Gpu:
    """An H100 SXM."""

    tokens_per_second: float = 10e6
    """What this project aims at for large batches. Not measured."""
    floor: float = 2e-3
    """Seconds of a step with little to compute: launches. Not measured."""
    memory: float = 3.35e12
    """Bytes a second, from the data sheet."""


@dataclass(frozen=True)
class Fabric:
    """Hosts of eight GPUs. Bandwidths are published ones, one way, of which collectives get ``share``."""

    name: str
    network: float
    """Bytes a second of a host's network cards together."""
    nvlink: float = 450e9
    """Bytes a second of a GPU's NVLink 4."""
    share: float = 0.8
    per_host: int = 8


FABRICS = (
    Fabric("8 x InfiniBand NDR 400 Gb/s a host", 8 * 50e9),
    Fabric("Ethernet 100 Gb/s a host", 12.5e9),
)

BASE_LATENCY = 8.4e-6
RING_HOP, TREE_HOP = (3.4e-6, 14e-6), (4e-6, 14e-6)
"""Seconds, over NVLink and over the network: what NCCL's own choice of algorithm assumes (its file tuning.cc)."""


def all_reduce(size: float, ranks: int, fabric: Fabric) -> tuple[float, float]:
    """Seconds of an all-reduce of ``size`` bytes: the hops' latency, and the transfer."""
    if ranks == 1:
        return 0.0, 0.0
    hosts = math.ceil(ranks / fabric.per_host)
    links = hosts if hosts > 1 else 0
    ring = 2 * ((ranks - 1 - links) * RING_HOP[0] + links * RING_HOP[1])
    tree = 2 * ((min(ranks, fabric.per_host) - 1) * TREE_HOP[0] + math.log2(hosts) * TREE_HOP[1])
    bandwidth = fabric.share * (fabric.nvlink if hosts == 1 else min(fabric.nvlink, fabric.network))
    return BASE_LATENCY + min(ring, tree), wire_bytes("all_reduce", size, ranks) / bandwidth


def step_parts(parameters: float, tokens: float, ranks: int, gpu: Gpu, fabric: Fabric) -> dict[str, float]:
    """Seconds of a step by what they go to; ``tokens`` are each GPU's."""
    latency, transfer = all_reduce(GRADIENT_BYTES * parameters, ranks, fabric)
    return {
        "launches": gpu.floor,
        "computing": tokens / gpu.tokens_per_second,
        "updating the weights": parameters * UPDATE_BYTES / gpu.memory,
        "latency of the all-reduce": latency,
        "bandwidth of the all-reduce": transfer,
    }


@dataclass(frozen=True)
class Curve:
    """One model on one fabric, over numbers of GPUs."""

    catalogue: str
    fabric: str
    kind: str
    """weak: each GPU has its own batch; strong: all share one."""
    parts: dict[int, dict[str, float]]
    """Seconds by number of GPUs and part."""
    efficiency: dict[int, float]
    """Throughput over that of as many single GPUs."""

    @property
    def end(self) -> str:
        """Where scaling stops, and why."""
        stopped = next((n for n, share in self.efficiency.items() if share < ENOUGH), None)
        if stopped is None:
            return f"goes on to {max(self.parts):,} GPUs"
        parts = {name: seconds for name, seconds in self.parts[stopped].items() if name != "computing"}
        return f"below {ENOUGH:.0%} from {stopped:,} GPUs: {max(parts, key=parts.__getitem__)}"


def model(gpu: Gpu | None = None, fabrics: Sequence[Fabric] = FABRICS) -> list[Curve]:
    """Every catalogue on every fabric, weak and strong."""
    gpu = gpu or Gpu()
    curves = []
    for fabric in fabrics:
        for kind, samples in (("weak", WEAK_SAMPLES), ("strong", STRONG_SAMPLES)):
            for catalogue, items in CATALOGUES.items():
                parameters = ENCODER_PARAMETERS + (items + 2) * HIDDEN_SIZE
                tokens = {n: samples * TOKENS_PER_SAMPLE / (n if kind == "strong" else 1) for n in (1, *GPUS)}
                parts = {n: step_parts(parameters, tokens[n], n, gpu, fabric) for n in (1, *GPUS)}
                rates = {n: n * tokens[n] / sum(parts[n].values()) for n in parts}
                efficiency = {n: rates[n] / (n * rates[1]) for n in GPUS}
                curves.append(Curve(catalogue, fabric.name, kind, {n: parts[n] for n in GPUS}, efficiency))
    return curves


def sent_bytes(parameters: float, zero_stage: int, ranks: int) -> tuple[float, float]:
    """Bytes that a rank sends in a step in fp32, at least and at most: an all-reduce of the gradients, with a gather
    of the weights in stages 1 and 2; in stage 3 a reduce-scatter and one gather of the weights, or two where the
    backward pass gathers large ones again."""
    reduced, gathered = (wire_bytes(k, GRADIENT_BYTES * parameters, ranks) for k in ("all_reduce", "all_gather"))
    if zero_stage == 3:
        return 2 * gathered, 3 * gathered
    sent = reduced + (gathered if zero_stage else 0)
    return sent, sent


def fit_all_reduce(timed: Sequence[tuple[int, float]], ranks: int) -> tuple[float, float]:
    """(latency in s, bandwidth in bytes/s) from (bytes, seconds) of all-reduces, relative least squares."""
    rows = torch.tensor([[1 / s, wire_bytes("all_reduce", size, ranks) / s] for size, s in timed], dtype=torch.float64)
    fitted = torch.linalg.lstsq(rows, torch.ones(len(timed), 1, dtype=torch.float64)).solution
    latency, per_byte = fitted.squeeze(1).clamp(min=1e-12).tolist()
    return latency, 1 / per_byte


# What is measured here


def measure(config: Config, ranks: int, *, steps: int, repetitions: int) -> dict[str, Any]:
    """Trains with ``ranks`` processes under torchrun; returns what they measured, see :func:`_worker`. Raises
    RuntimeError with what they printed where that fails."""
    alone = _own_network()
    job = {"config": to_dict(config), "steps": steps, "repetitions": repetitions}
    environment = {"GLOO_SOCKET_IFNAME": "lo"} if alone else {}
    found = measured_by("s3rec_dist.bench.scaling", job, ranks, prefix=alone, **environment)
    if not alone:
        found["loopback"] = []
    return found


def _own_network() -> list[str]:
    """What a command is started with to have a loopback device to itself, where that is allowed."""
    prefix = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not (shutil.which("unshare") and shutil.which("ip")) or torch.cuda.is_available():
        return []
    return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []


def _loopback_bytes() -> int:
    """What has gone over this network namespace's loopback device so far."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def _worker(job: str, result: str) -> None:
    """One rank. Rank 0 writes for each repetition: seconds by phase of a step, the mean over ranks; tokens and bytes
    sent a step; and of all-reduces of several sizes the median seconds."""
    from s3rec_dist.bench.step import Steps
    from s3rec_dist.data.dataset import Dataset
    from s3rec_dist.storage import Storage
    from s3rec_dist.training.engine import gather, start

    spec = json.loads(Path(job).read_text())
    config, steps = from_dict(spec["config"], job), spec["steps"]
    world = start(config.engine)
    training = Steps(config, "pretrain", Dataset.open(config.data.path, Storage(config.storage)), world)
    clock, collectives = training.engine.clock, training.engine.collectives
    rows = []
    for _ in range(spec["repetitions"] + 1):
        gather(None)
        before = _loopback_bytes()
        collectives.sent.clear()
        _, items = training.run(steps)
        ranks = gather(({phase: seconds / steps for phase, seconds in clock.read().items()}, items / steps))
        sent = sum(wire_bytes(kind, size, world.size) for kind, size in collectives.sent.items()) / steps
        loopback = (_loopback_bytes() - before) / steps / world.size
        phases = {phase: statistics.fmean(seconds[phase] for seconds, _ in ranks) for phase in PHASES}
        rows.append((phases, sum(count for _, count in ranks), sent, loopback))
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in training.engine.model.parameters())  # whole ones
    timed = [(size * 4, _seconds_of_all_reduce(size, world.device)) for size in (1, 1 << 14, 1 << 18, parameters)]
    training.close()
    if world.rank == 0:
        phases_of, tokens_of, sent_of, loopback_of = zip(*rows[1:], strict=True)  # the first one warmed up
        found: dict[str, Any] = {"phases": phases_of, "tokens": tokens_of, "sent": sent_of, "loopback": loopback_of}
        cores = len(os.sched_getaffinity(0)) if world.device.type == "cpu" else world.size
        found |= {"parameters": parameters, "all_reduce": timed, "cores": cores}
        Path(result).write_text(json.dumps(found))


def _seconds_of_all_reduce(elements: int, device: torch.device, repetitions: int = 9) -> float:
    tensor, seconds = torch.zeros(elements, device=device), []
    for _ in range(repetitions):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def bench_scaling(
    config: Config,
    ranks: Sequence[int],
    *,
    steps: int,
    repetitions: int,
    output: str | None,
    progress: Callable[[str], None],
) -> dict[str, list[float]]:
    """What was measured, by name with unit: a value for each repetition. Prints the model's tables, and with ``output``
    writes both there."""
    measured = {}
    for count in ranks:
        progress(f"{count} rank{'s' * (count > 1)} ...")
        measured[count] = measure(config, count, steps=steps, repetitions=repetitions)
    curves = model()
    lines = [*_measured_lines(measured, config), "", *_modelled_lines(curves)]
    print("\n".join(lines))
    if output:
        _write(Path(output), lines, measured, curves)
    figures = {}
    for count, found in measured.items():
        name = f"{count} rank{'s' * (count > 1)}"
        step = [sum(phases.values()) for phases in found["phases"]]
        figures[f"{name} step ms"] = [1e3 * seconds for seconds in step]
        figures[f"{name} tokens/s"] = [t / s for t, s in zip(found["tokens"], step, strict=True)]
    return figures


def _measured_lines(measured: dict[int, dict[str, Any]], config: Config) -> list[str]:
    cores = next(iter(measured.values()))["cores"]
    zero = config.engine.zero_stage
    lines = [
        f"Measured here: {cores} cores for all ranks, one thread each, global batch {config.pretrain.batch_size}, ZeRO "
        f"stage {zero}, medians",
        "",
        "| ranks | step ms | predicted | " + " | ".join(PHASES) + " | sent, computed MB | counted | on loopback |",
        "|---" * (6 + len(PHASES)) + "|",
    ]
    for count, found in measured.items():
        phases = {phase: statistics.median(row[phase] for row in found["phases"]) * 1e3 for phase in PHASES}
        step = statistics.median(sum(row.values()) for row in found["phases"]) * 1e3
        expected = predicted(measured, count)
        least, most = (sent / 2**20 for sent in sent_bytes(found["parameters"], zero, count))
        computed = f"{least:.2f}" if least == most else f"{least:.2f} to {most:.2f}"
        loopback = f"{statistics.median(found['loopback']) / 2**20:.2f}" if found["loopback"] else "not measured"
        cells = [str(count), f"{step:.1f}", "" if expected is None else f"{1e3 * expected:.1f}"]
        cells += [f"{phases[phase]:.1f}" for phase in PHASES]
        cells += [computed, f"{statistics.median(found['sent']) / 2**20:.2f}", loopback]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def predicted(measured: dict[int, dict[str, Any]], ranks: int) -> float | None:
    """Seconds of a step of ``ranks``, from one rank's step, shared by as many as there are cores for, and the
    all-reduces that were timed; None where one rank was not measured."""
    if 1 not in measured or ranks == 1:
        return None
    one = statistics.median(sum(row.values()) for row in measured[1]["phases"])
    found = measured[ranks]
    latency, bandwidth = fit_all_reduce(found["all_reduce"], ranks)
    transfer = wire_bytes("all_reduce", GRADIENT_BYTES * found["parameters"], ranks) / bandwidth
    return one / min(ranks, found["cores"]) + latency + transfer


def _modelled_lines(curves: Sequence[Curve]) -> list[str]:
    gpu, lines = Gpu(), []
    lines += [
        f"Modelled, not measured: H100s of {gpu.tokens_per_second / 1e6:g} M tokens/s (this project's aim) and "
        f"{1e3 * gpu.floor:g} ms a step of launches (assumed), fp32, ZeRO stage 0, hidden size {HIDDEN_SIZE}; share of "
        "as many single GPUs' throughput",
        f"weak: {WEAK_SAMPLES:,} samples a GPU; strong: {STRONG_SAMPLES:,} samples for all",
        "",
        "| fabric | | catalogue | " + " | ".join(f"{n:,}" for n in GPUS) + " | |",
        "|---" * (4 + len(GPUS)) + "|",
    ]
    for curve in curves:
        shares = " | ".join(f"{curve.efficiency[n]:.0%}" for n in GPUS)
        lines.append(f"| {curve.fabric} | {curve.kind} | {curve.catalogue} | {shares} | {curve.end} |")
    return lines


def _write(folder: Path, lines: Sequence[str], measured: dict[int, dict[str, Any]], curves: Sequence[Curve]) -> None:
    """scaling.md, scaling.json, and scaling.png where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    inputs = {"gpu": asdict(Gpu()), "fabrics": [asdict(fabric) for fabric in FABRICS]}
    modelled = {"inputs": inputs, "curves": [asdict(curve) | {"end": curve.end} for curve in curves]}
    (folder / "scaling.json").write_text(json.dumps({"measured": measured, "modelled": modelled}, indent=1))
    if importlib.util.find_spec("matplotlib") is None:
        return
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(11, 5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("weak", "strong"), strict=True):
        for curve in curves:
            if curve.kind == kind:
                axes.plot(list(GPUS), list(curve.efficiency.values()), label=f"{curve.catalogue}, {curve.fabric}")
        axes.set(xscale="log", xlabel="GPUs", title=f"{kind} scaling, modelled")
    axes.legend(fontsize="small")
    figure.savefig(folder / "scaling.png")


if __name__ == "__main__":
    _worker(*sys.argv[1:])
