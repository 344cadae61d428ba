"""Whether the processes of a run agree on what could spoil it: versions, settings, datasets, devices, the time.

    agree(config, [dataset], world.device)      # at the start of training, on every rank

raises :class:`PreflightError` on all of them, which names the ones that differ. ``s3rec doctor`` makes the same
comparison, and more (see doctor.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import s3rec_dist
from s3rec_dist.config import Config, flat, to_dict
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.storage import hide
from s3rec_dist.training.engine import gather
from s3rec_dist.training.rendezvous import names

Facts = dict[str, dict[str, str]]
"""By kind (version, setting, dataset, device), what a process found, by name."""

CLOCK_TOLERANCE_S = 5.0
"""Clocks further apart spoil logs, and S3 refuses requests whose time is wrong."""

PACKAGES = ("torch", "deepspeed", "triton", "numpy", "pyarrow")
_OWN = ("engine.threads", "storage.cache_dir", "storage.cache_mb", "storage.scratch_dir")
"""Settings that may differ from host to host."""
_REMEDIES = {
    "version": "install the same on all hosts, as with pip install -c constraints.txt",
    "setting": "start all processes with the same config file and the same key=value",
    "dataset": "let all hosts read one copy, or copy it anew",
    "device": "use hosts of one kind, or hide the others from the launcher",
}

clock: Callable[[], float] = time.time


class PreflightError(ValueError):
    """Processes that cannot train together; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Problem:
    """Something wrong on some ranks: what was found, what was expected, what to do."""

    ranks: tuple[int, ...]
    what: str
    text: str

    def line(self, hosts: Sequence[str]) -> str:
        """For people to read, without secrets."""
        return hide(f"{names(hosts, self.ranks)}: {self.what}: {self.text}")


def agree(config: Config, datasets: Sequence[Dataset], device: torch.device) -> None:
    """Raises :class:`PreflightError`, on every rank, where processes differ. All ranks must call it."""
    found = gather((socket.gethostname(), facts_of(config, datasets, device)))
    if len(found) == 1:
        return
    hosts = [host for host, _ in found]
    problems = compare([facts for _, facts in found], hosts) + clock_problems(gather)
    if problems:
        told = "\n  ".join(problem.line(hosts) for problem in problems)
        raise PreflightError(f"the processes do not agree; 's3rec doctor' checks all hosts:\n  {told}")


def facts_of(config: Config, datasets: Sequence[Dataset], device: torch.device) -> Facts:
    """What this process has to have in common with the others."""
    settings = {key: str(value) for key, value in flat(to_dict(config)).items() if key not in _OWN}
    if path := config.engine.deepspeed_config:
        with contextlib.suppress(OSError):
            settings[f"the content of {path}"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    return {
        "version": versions(PACKAGES, device),
        "setting": settings,
        "dataset": {each.path: f"fingerprint {each.fingerprint[:12]}" for each in datasets},
        "device": {"device": describe_device(device)},
    }


def versions(packages: Sequence[str], device: torch.device) -> dict[str, str]:
    """Of Python, of this program, and of those of the packages that are installed."""
    found = {"python": platform.python_version(), "s3rec_dist": s3rec_dist.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def describe_device(device: torch.device) -> str:
    """What should be the same everywhere: the GPU and its memory, or that it is a CPU."""
    if device.type == "cpu":
        return "CPU"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def settings_hash(facts: Facts) -> str:
    """One name for exactly these settings."""
    return hashlib.sha256(json.dumps(facts["setting"], sort_keys=True).encode()).hexdigest()[:12]


def compare(found: Sequence[Facts | None], hosts: Sequence[str]) -> list[Problem]:
    """Where ranks differ from most of them; None stands for a rank that is not there."""
    there = {rank: facts for rank, facts in enumerate(found) if facts is not None}
    problems = []
    for kind, remedy in _REMEDIES.items():
        for name in dict.fromkeys(name for facts in there.values() for name in facts[kind]):
            values = {rank: facts[kind].get(name, "missing") for rank, facts in there.items()}
            (usual, _), *others = Counter(values.values()).most_common()
            for value, _ in others:
                ranks = tuple(rank for rank, own in values.items() if own == value)
                first = next(rank for rank, own in values.items() if own == usual)
                text = f"{name} is {value}, expected {usual} as on {names(hosts, [first])}; {remedy}"
                problems.append(Problem(ranks, kind, text))
    return problems


def clock_problems(gather: Callable[[Any], list[Any]]) -> list[Problem]:
    """Clocks that are certainly off from rank 0's. ``gather`` gives each rank's value to every rank, None of those that
    are not there. All ranks must call it, at about the same time."""
    before = gather(clock())
    after = gather(clock())  # both within a message's way and back
    problems = []
    for rank, (sent, received) in enumerate(zip(before, after, strict=True)):
        if sent is None or received is None:
            continue
        least, most = sent - after[0], received - before[0]
        if least > CLOCK_TOLERANCE_S or most < -CLOCK_TOLERANCE_S:
            off = (least + most) / 2
            text = (
                f"{abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} rank 0's, expected at most "
                f"{CLOCK_TOLERANCE_S:.0f} s; synchronise the hosts' clocks, as with chrony or systemd-timesyncd"
            )
            problems.append(Problem((rank,), "clock", text))
    return problems
