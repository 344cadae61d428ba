"""``s3rec doctor``: whether training can work here, on one host or on all that a launcher starts.

    s3rec doctor --config configs/beauty.yaml data.path=s3://bucket/beauty
    deepspeed --hostfile launch/hostfile --module s3rec_dist doctor --config configs/beauty.yaml

Each process looks at itself: packages, device, memory, dataset, output, W&B. Then they compare what must be the same
on all of them (see preflight.py), look for each other's files in the output folder, and sum numbers together. Nothing
here waits for more than its share of a minute; a process that does not come is named. Rank 0 prints a line for each
check and each problem, host and rank first; the status is 1 where there is a problem.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import netrc
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from s3rec_dist.config import Config, ConfigError, load_config
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.kernels.backends import explain_backend
from s3rec_dist.storage import Storage, StorageError, hide
from s3rec_dist.training.engine import choose_device, heeding_peers, start
from s3rec_dist.training.preflight import (
    PACKAGES,
    Facts,
    Problem,
    clock_problems,
    compare,
    facts_of,
    settings_hash,
    versions,
)
from s3rec_dist.training.rendezvous import Meeting, RendezvousError, is_launched

T = TypeVar("T")

WAIT_S = 20.0
"""Seconds that processes have to arrive."""
LOOK_S = 12.0
"""Seconds that a process has to look at its storage and its device."""
SUM_S = 15.0
"""Seconds that the collective has, the group's connections included."""

SHOWN_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "GLOO_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
    "WANDB_MODE",
)
"""All of the environment that is ever printed."""

_BYTES_PER_PARAMETER = 20
"""fp32 without ZeRO: weight, gradient, its copy on the way to the others, Adam's two moments."""
_DRIVERS = ("wandb", "fsspec", "s3fs", "gcsfs", "huggingface_hub")


@dataclass(frozen=True)
class Check:
    """What one process found; ``problem`` says what was expected and what to do, or is empty."""

    what: str
    found: str
    problem: str = ""


def examine(config: Config, device: torch.device, local_size: int = 1) -> tuple[list[Check], Facts]:
    """What this process finds by itself, and what it has to have in common with others. Takes a bounded time."""
    storage_config = replace(config.storage, retries=min(config.storage.retries, 1), timeout_s=5.0)
    storage = Storage(storage_config)
    sought: dict[str, Callable[[], Any]] = {
        "dataset": partial(_datasets, config, storage),
        "output": partial(_output, config.output, storage),
        "device": partial(_device, device),
    }
    results = {what: _started(look) for what, look in sought.items()}
    deadline = time.monotonic() + LOOK_S
    checks = [_versions(device), _attention(config, device), _network(), _wandb(config)]
    datasets: list[Dataset] = []
    for what, result in results.items():
        value = result(deadline)
        if isinstance(value, TimeoutError):
            checks.append(Check(what, "", f"no answer within {LOOK_S:.0f} s; is it mounted, and reachable?"))
        elif isinstance(value, Exception):
            checks.append(Check(what, "", _reason(value)))
        elif what == "dataset":
            datasets, check = value
            checks.append(check)
        else:
            checks.append(value)
    facts = facts_of(config, datasets, device)
    settings = Check("settings", f"hash {settings_hash(facts)}")
    return [*checks, _memory(config, datasets, device, local_size), settings], facts


def _started(call: Callable[[], T]) -> Callable[[float], T | Exception]:
    """``call()`` in a thread that nobody has to wait for; the function returned waits until a deadline for its result,
    or what it raised, or a TimeoutError."""
    results: list[T | Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result(deadline: float) -> T | Exception:
        thread.join(max(deadline - time.monotonic(), 0))
        return results[0] if results else TimeoutError()

    return result


def _versions(device: torch.device) -> Check:
    """Packages, and those that are older than ours needs."""
    found = versions((*PACKAGES, *_DRIVERS), device)
    wrong = []
    with contextlib.suppress(ImportError):
        from packaging.requirements import Requirement

        for text in importlib.metadata.requires("s3rec-dist") or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                try:
                    version = importlib.metadata.version(needed.name)
                except importlib.metadata.PackageNotFoundError:
                    version = "missing"
                if version == "missing" or not needed.specifier.contains(version, prereleases=True):
                    wrong.append(f"{needed.name} is {version}, expected {needed.specifier}")
    problem = f"{'; '.join(wrong)}; pip install -c constraints.txt -e ." if wrong else ""
    return Check("versions", ", ".join(f"{name} {version}" for name, version in found.items()), problem)


def _attention(config: Config, device: torch.device) -> Check:
    dtype = torch.bfloat16 if device.type == "cuda" and config.engine.precision in ("auto", "bf16") else torch.float32
    try:
        name, why = explain_backend(
            config.model.attention, device, dtype, config.model.hidden_size // config.model.heads
        )
    except ValueError as error:
        return Check("attention", config.model.attention, f"model.attention: {error}")
    return Check("attention", f"{name}, {why}")


def _network() -> Check:
    """The environment that distributed training reads, and whether the interfaces that it names are there."""
    shown = ", ".join(f"{name}={os.environ[name]}" for name in SHOWN_VARIABLES if name in os.environ)
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        if wanted.startswith("^") or not wanted:
            continue
        names = wanted.removeprefix("=").split(",")
        exact = wanted.startswith("=") or variable.startswith("GLOO")
        if not any(i == name or (not exact and i.startswith(name)) for name in names for i in interfaces):
            text = f"{variable}={wanted}: no such network interface, expected one of {', '.join(interfaces)}"
            return Check("environment", shown, f"{text}; set it as on this host, or unset it")
    return Check("environment", shown or "nothing set")


def _wandb(config: Config) -> Check:
    """The mode, and for rank 0, which alone talks to W&B, whether there is a key. Nothing is sent."""
    mode = config.tracking.wandb
    environment = os.environ.get("WANDB_MODE", "")
    if mode != "online" or environment in ("offline", "disabled") or os.environ.get("RANK", "0") != "0":
        return Check("W&B", mode + (f", WANDB_MODE={environment}" if environment and mode != "disabled" else ""))
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    found = bool(os.environ.get("WANDB_API_KEY"))
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        found = found or netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    problem = f"no key for {host}; set WANDB_API_KEY, run 'wandb login', or set tracking.wandb=offline"
    return Check("W&B", "online, a key is there" if found else "online", "" if found else problem)


def _device(device: torch.device) -> Check:
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        missed = shutil.which("nvidia-smi") is not None and os.environ.get("DS_ACCELERATOR") != "cpu"
        problem = (
            "this host has nvidia-smi, but torch finds no GPU: install a torch with CUDA and a driver that fits it, or "
            "set engine.device=cpu"
        )
        return Check("device", f"CPU, {cores} core{'s' * (cores > 1)}", problem if missed else "")
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    wrong = "" if bool((product == 64).all()) else "a product of ones came out wrong; take this GPU out of use"
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(device)
    return Check("device", f"{count} x {name}, {_gib(free)} of {_gib(total)} free", wrong)


def _datasets(config: Config, storage: Storage) -> tuple[list[Dataset], Check]:
    """Opens what would be trained on, and reads a piece of each."""
    data = config.data
    if not data.path:
        return [], Check("dataset", "data.path is empty: none is checked")
    places = [(data.path, data.revision), *((entry.path, entry.revision) for entry in data.mix)]
    datasets = [Dataset.open(path, storage, revision=revision) for path, revision in places]
    for dataset in datasets:
        if len(dataset.index):
            dataset.read_row_group(0)
    said = [f"{d.path}: {d.n_rows:,} users, {d.n_items:,} items" for d in datasets]
    return datasets, Check("dataset", f"{'; '.join(said)}; fingerprint {datasets[0].fingerprint[:12]}")


def _output(url: str, storage: Storage) -> Check:
    """Writes a small file where the run will write, reads it back and removes it."""
    folder = _existing(url, storage)
    draft, content = f"{folder}/.s3rec-doctor-{secrets.token_hex(8)}", secrets.token_bytes(64)
    try:
        storage.write(draft, content)
        if storage.read(draft) != content:
            return Check("output", url, f"{folder}: other bytes come back than were written; do not store a run there")
    finally:
        with contextlib.suppress(OSError, StorageError):
            storage.remove(draft)
    free = f", {_gib(shutil.disk_usage(folder).free)} free" if storage.local(url) is not None else ""
    return Check("output", f"{url}: written, read, removed{free}")


def _existing(url: str, storage: Storage) -> str:
    """The folder ``url``, or locally what there is of its parents."""
    folder = storage.local(url)
    if folder is None:
        return url.rstrip("/")
    folder = os.path.abspath(folder)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return folder


def _memory(config: Config, datasets: Sequence[Dataset], device: torch.device, local_size: int) -> Check:
    """Free memory, held against what weights, gradients and Adam's state of this host's processes take."""
    model, rows = config.model, 0
    for dataset in datasets[:1]:  # of sharded tables, as much as training touches
        rows += dataset.n_items + 2 if model.item_table == "dense" else 0
        rows += dataset.n_attributes + 1 if model.attribute_table == "dense" else 0
    block = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.inner_size
    parameters = rows * model.hidden_size + model.layers * block
    needed = parameters * _BYTES_PER_PARAMETER
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    what = f"{_gib(free)} free"
    if not datasets or config.engine.zero_stage or device.type == "cuda":
        return Check("memory", what)
    wanted = needed * local_size
    problem = f"weights and Adam of this host's processes need {_gib(wanted)}; start fewer, or set engine.zero_stage=1"
    return Check("memory", f"{what}, {_gib(wanted)} for weights and Adam", problem if wanted > free else "")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 29 else f"{size / 2**20:.0f} MiB"


def _reason(error: Exception) -> str:
    """The message of an exception that says what to do; of others their kind as well."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; expected a place that this user may read and write"
    own = isinstance(error, ValueError) and type(error).__module__.startswith("s3rec_dist.")
    return str(error) if own else f"{type(error).__name__}: {error}"


def consult(config: Config, device: torch.device, meeting: Meeting) -> tuple[list[Check], list[Problem], bool]:
    """Rank 0's checks, all problems of all ranks, and whether a thread is left that waits for other ranks for ever."""
    present = meeting.arrive(True, WAIT_S)
    missing = tuple(rank for rank, here in enumerate(present) if not here)
    text = f"did not arrive within {WAIT_S:.0f} s; is its host up, and was training started there?"
    problems = [Problem((rank,), "process", text) for rank in missing]
    checks, facts = examine(config, device, meeting.local_size)
    own = [[check.what, check.found, check.problem] for check in checks]
    found = meeting.gather("facts", [own, facts], LOOK_S + 5)
    everyone = [[Check(*fields) for fields in entry[0]] if entry else [] for entry in found]
    late = tuple(rank for rank, entry in enumerate(found) if not entry and rank not in missing)
    if late:
        problems.append(Problem(late, "process", f"arrived, and was not heard of for {LOOK_S + 5:.0f} s after that"))
    problems += own_problems(everyone)
    problems += compare([entry and entry[1] for entry in found], meeting.hosts)
    topics = iter(("clock", "clock again"))
    problems += clock_problems(lambda value: meeting.gather(next(topics), value, 5))
    if not any(problem.what == "output" for problem in problems):  # the same on all ranks
        problems += _unshared(config, meeting)
    if missing or late:
        return [*checks, Check("all-reduce", "not tried without them")], problems, False
    summed = _started(partial(_sum, config, meeting))(time.monotonic() + SUM_S)
    hangs = isinstance(summed, TimeoutError)
    failure = "" if isinstance(summed, str) else f"not done in {SUM_S:.0f} s" if hangs else _reason(summed)
    failures = meeting.gather("sum", failure, 5)
    for failure in dict.fromkeys(filter(None, failures)):
        ranks = tuple(rank for rank, own in enumerate(failures) if own == failure)
        variable = "GLOO_SOCKET_IFNAME" if device.type == "cpu" else "NCCL_SOCKET_IFNAME"
        text = (
            f"{failure}; expected a checked sum over all processes. Set {variable} to the network that connects the "
            "hosts, and let them reach each other on all ports"
        )
        problems.append(Problem(ranks, "all-reduce", text))
    return [*checks, Check("all-reduce", summed if isinstance(summed, str) else "failed")], problems, hangs


def own_problems(everyone: Sequence[Sequence[Check]]) -> list[Problem]:
    """What ranks have found wrong with themselves; those that found the same share a problem."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, checks in enumerate(everyone):
        for check in checks:
            if check.problem:
                ranks.setdefault((check.what, check.problem), []).append(rank)
    return [Problem(tuple(those), what, text) for (what, text), those in ranks.items()]


def _unshared(config: Config, meeting: Meeting) -> list[Problem]:
    """Ranks that do not see rank 0's files in an output folder that is no URL."""
    storage, mark = Storage(replace(config.storage, cache_dir="")), ""
    folder = _existing(config.output, storage) if storage.local(config.output) is not None else ""
    if meeting.rank == 0 and folder and meeting.size > 1:
        draft = f"{folder}/.s3rec-doctor-{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):  # told by another check
            storage.write(draft, b"")
            mark = draft
    try:
        mark = meeting.gather("mark", mark, 5)[0]
        seen = meeting.gather("seen", not mark or os.path.exists(mark), 5)
    finally:
        if meeting.rank == 0 and mark:
            storage.remove(mark)
    blind = tuple(rank for rank, sees in enumerate(seen) if sees is False)
    text = f"{folder} is another folder on rank 0's host; put output on a disk that all hosts see, or behind a URL"
    return [Problem(blind, "output", text)] if blind else []


def _sum(config: Config, meeting: Meeting) -> str:
    """Forms the group as training does, and sums known numbers over it; returns how fast. Raises ArithmeticError where
    the sum is wrong."""
    world = start(config.engine, meeting)
    size = 4 << 20 if world.device.type == "cpu" else 64 << 20
    numbers = torch.arange(size, device=world.device, dtype=torch.float32) % 1024
    expected = numbers * world.size + world.size * (world.size - 1) // 2
    seconds = {}
    for count in (1, size):
        best = float("inf")
        for _ in range(3):
            summed = numbers[:count] + world.rank
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(summed)
            if not torch.equal(summed, expected[:count]):  # which waits for a GPU
                raise ArithmeticError(f"a sum of {count:,} numbers came out wrong")
            best = min(best, time.perf_counter() - began)
        seconds[count] = best
    rate = 4 * size * 2 * (world.size - 1) / world.size / seconds[size]
    return f"right; {seconds[1] * 1e3:.1f} ms for one number, {rate / 1e9:.2f} GB/s for {4 * size >> 20} MiB"


def report(checks: Sequence[Check], problems: Sequence[Problem], hosts: Sequence[str]) -> str:
    """The doctor's words: rank 0's checks, then a line for each problem."""
    where = f"{hosts[0]}, alone" if len(hosts) == 1 else f"{len(hosts)} processes; found by rank 0 on {hosts[0]}:"
    lines = [f"s3rec doctor on {where}", *(f"  {check.what:<12}{check.found or 'failed'}" for check in checks)]
    lines += ["", *(f"PROBLEM  {problem.line(hosts)}" for problem in problems)]
    total = len(problems)
    lines.append(f"{total} problem{'s' * (total > 1)} found" if total else "no problem found")
    return hide("\n".join(lines))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec doctor``."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (default: every setting's default)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in data.path=data/beauty")


def run(args: argparse.Namespace) -> int:
    """``s3rec doctor``: the checks on stdout; status 1 where something is wrong."""
    config = load_config(args.config, args.overrides)
    try:
        device = choose_device(config.engine)
    except ConfigError as error:
        print(f"s3rec doctor: {socket.gethostname()}: device: {error}")
        return 1
    if not is_launched():
        checks, _ = examine(config, device)
        problems = own_problems([checks])
        print(report(checks, problems, [socket.gethostname()]))
        return 1 if problems else 0
    try:
        meeting = Meeting(WAIT_S)
    except RendezvousError as error:
        print(f"s3rec doctor: {error}", flush=True)
        return 1
    with heeding_peers():
        checks, problems, hangs = consult(config, device, meeting)
        if meeting.rank == 0:
            print(report(checks, problems, meeting.hosts), flush=True)
        status = meeting.gather("verdict", int(bool(problems)), 5)[0]
        meeting.leave()
    if hangs:
        sys.stdout.flush()
        os._exit(status)  # the collective would keep this process from ending
    return int(status)
