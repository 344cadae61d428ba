"""What a run survives: ``s3rec bench faults --kills 100 --kills-in-saves 30 --terms 30 --corruptions 300``.

Pretraining on two processes is killed with SIGKILL at random moments (both processes, or one, whereupon the other has
to end by itself: no launcher helps), told to leave with SIGTERM, and each time started again by the same command. Then
two processes look for the newest whole one among checkpoints that have been damaged in random ways. The processes are
forked off one that has imported everything, which spares most of a start. What must hold, or it ends in an error that
lists what did not:

- a run always goes on from a whole checkpoint, never from an older one than there was before;
- its losses at every step, its last weights and the rows of its tables are those of a run that was never disturbed, to
  the last bit;
- SIGTERM to one process or both leaves a whole checkpoint of the last step within 25 s, with status 75;
- no process, listening port or /dev/shm entry stays behind;
- damage is never loaded, both processes agree within 60 s on the newest whole checkpoint, and saving keeps that one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from s3rec_dist.__main__ import main
from s3rec_dist.config import Config, from_dict, to_dict, to_yaml
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.data.synth import SynthSettings, write
from s3rec_dist.storage import Storage
from s3rec_dist.training import checkpoint
from s3rec_dist.training.checkpoint import CheckpointError, Saver, tag_of
from s3rec_dist.training.engine import Engine, gather, on_rank_zero, start
from s3rec_dist.training.loop import Task
from s3rec_dist.training.preemption import STATUS
from s3rec_dist.training.tracking import read_metrics

PROCESSES = 2
KEEP = 3
"""Checkpoints that are kept."""
LONGEST_LIFE_S = 3.0
"""Between a run's start, or its first step, and what ends it."""
START_S, END_S, TERM_S, FALL_BACK_S = 180.0, 60.0, 25.0, 60.0
"""Most that starting, ending after a kill, leaving after SIGTERM, and falling back may take."""


class FaultsError(ValueError):
    """Promises that were not kept; the message lists them."""


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """How much of each fault."""

    kills: int
    kills_in_saves: int
    """Of them, at least, while a checkpoint is written."""
    terms: int
    corruptions: int


def bench_faults(config: Config, campaign: Campaign) -> dict[str, list[float]]:
    """Runs a campaign on ``config.data.path``, or where that is empty on a synthetic dataset. Raises
    :class:`FaultsError` where something did not hold."""
    figures: dict[str, list[float]] = {}
    violations: list[str] = []
    with tempfile.TemporaryDirectory(prefix="s3rec-faults-") as place:
        if not config.data.path:
            config = replace(config, data=replace(config.data, path=_make_dataset(place)))
        stage = replace(
            config.pretrain,
            log_every_steps=1,
            checkpoint_every_steps=config.pretrain.checkpoint_every_steps or 10,
            keep_checkpoints=KEEP,
        )
        config = replace(config, pretrain=stage, output=os.path.join(place, "disturbed"))
        run = _Disturbed(config, random.Random(config.seed), figures, violations)
        run.disturb(campaign)
        run.compare(os.path.join(place, "undisturbed"))
        if campaign.corruptions:
            _corrupt(run, campaign, figures, violations)
    if violations:
        raise FaultsError("\n  ".join([f"{len(violations)} times a promise was not kept:", *violations]))
    return figures


def _make_dataset(place: str) -> str:
    log, dataset = os.path.join(place, "log"), os.path.join(place, "dataset")
    write(SynthSettings(events=6_000, items=2_000, users=300, output=log))
    prepare(
        PrepareSettings(
            source="table",
            input=os.path.join(log, "events"),
            attributes=os.path.join(log, "items.parquet"),
            attribute_fields=("category", "tags"),
            output=dataset,
        )
    )
    return dataset


class _Job:
    """Two processes that together do ``call(*arguments)``, each in a session of its own, so that none can hide."""

    def __init__(self, device: str, port: int, log: Path, call: Callable[..., Any], *arguments: Any) -> None:
        self.port = port
        self._shared: set[str] = set()
        context = multiprocessing.get_context("forkserver")
        # On a GPU, deepspeed's import may touch the device, which a process that is forked then cannot use.
        more = ["deepspeed", "deepspeed.module_inject", "torch._inductor.compile_fx", "pandas"] * (device == "cpu")
        context.set_forkserver_preload(["s3rec_dist.training.loop", *more])
        common = port, str(log), call, *arguments
        self._ranks = [context.Process(target=_work, args=(rank, *common)) for rank in range(PROCESSES)]
        for process in self._ranks:
            process.start()
        self._sessions = {str(process.pid) for process in self._ranks}

    @property
    def statuses(self) -> list[int | None]:
        return [process.exitcode for process in self._ranks]

    def signal(self, rank: int | None, number: signal.Signals) -> None:
        """Sends a signal to one rank's process, or with None to both."""
        for process in self._ranks if rank is None else [self._ranks[rank]]:
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                self._shared |= {line.split(maxsplit=5)[5] for line in maps.splitlines() if " /dev/shm/" in line}
        for process in self._ranks if rank is None else [self._ranks[rank]]:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def is_over(self) -> bool:
        return not any(process.is_alive() for process in self._ranks)

    def wait(self, seconds: float) -> float | None:
        """The seconds until its processes are gone; None where they had to be killed after ``seconds``."""
        began = time.monotonic()
        if not _until(self.is_over, seconds, every=0.02):
            self.signal(None, signal.SIGUSR2)  # tells in its output where it hangs
            time.sleep(1)
            self.signal(None, signal.SIGKILL)
            _until(self.is_over, seconds, every=0.02)
            return None
        return time.monotonic() - began

    def left_behind(self) -> list[str]:
        """What is there of it after its end."""
        left = [name for name in self._shared if os.path.exists(name)]
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if session in self._sessions and state != "Z":
                    left.append(f"process {entry.name}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                left.append(f"port {self.port}")
        return left


def _work(rank: int, port: int, log: str, call: Callable[..., Any], *arguments: Any) -> None:
    os.setsid()
    faulthandler.register(signal.SIGUSR2)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    size = str(PROCESSES)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.exit(call(*arguments))


class _Disturbed:
    """A run that is ended again and again."""

    def __init__(
        self, config: Config, draw: random.Random, figures: dict[str, list[float]], violations: list[str]
    ) -> None:
        self.config, self.draw, self.figures, self.violations = config, draw, figures, violations
        self.folder = Path(config.output) / "pretrain"
        self.checkpoints = self.folder / checkpoint.FOLDER
        self.port = _free_port(draw)
        self.log = Path(config.output).with_suffix(".log")
        self._settings = Path(config.output).with_suffix(".yaml")
        self._read, self._began = 0, 0.0
        self._newest: checkpoint.Checkpoint | None = None

    def disturb(self, campaign: Campaign) -> None:
        """Ends the run as often as the campaign says."""
        kills, in_saves, terms = 0, 0, 0
        while kills < campaign.kills or in_saves < campaign.kills_in_saves or terms < campaign.terms:
            left = campaign.kills - kills, campaign.terms - terms
            if left[1] > 0 and self.draw.random() < left[1] / max(sum(left), 1):
                what = self.term()
                terms += 1
            else:
                needs_save = campaign.kills_in_saves - in_saves >= left[0] or self.draw.random() < 0.4
                what, in_save = self.kill(needs_save)
                kills, in_saves = kills + 1, in_saves + in_save
            step = self._newest.state["step"] if self._newest else 0
            _say(f"{kills} kills, {in_saves} in saves, {terms} SIGTERMs: {what}; newest checkpoint of step {step}")
        self.figures["SIGKILLs"] = [kills]
        self.figures["SIGKILLs during a save"] = [in_saves]
        self.figures["SIGTERMs"] = [terms]

    def kill(self, in_save: bool) -> tuple[str, bool]:
        """One SIGKILL; what was killed when, and whether that has broken off a save."""
        job = self.start(epochs=1_000_000)
        moment = "in training"
        if not in_save and self.draw.random() < 0.15:
            moment = "at the start"
            time.sleep(self.draw.uniform(0, LONGEST_LIFE_S))
        elif self.await_step(job):
            if not in_save:
                time.sleep(self.draw.uniform(0, LONGEST_LIFE_S))
            elif _until(lambda: bool(self.drafts()) or job.is_over(), START_S, every=0.001):
                time.sleep(self.draw.uniform(0, 0.03))
        # Before the processes have met, only a launcher can tell one of the other's end.
        rank = None if moment == "at the start" else self.draw.choice([None, 0, 1])
        drafts = self.drafts()
        job.signal(rank, signal.SIGKILL)
        seconds = job.wait(END_S)
        broken_off = [tag for tag in drafts if not (self.checkpoints / tag / checkpoint.MANIFEST).exists()]
        what = f"{'both' if rank is None else f'rank {rank}'} killed {'in a save' if broken_off else moment}"
        if rank is not None and seconds is not None:
            self.figures.setdefault("s from the end of one process to the other's", []).append(seconds)
        self.check(job, what, seconds)
        return what, bool(broken_off)

    def term(self) -> str:
        """One SIGTERM."""
        job = self.start(epochs=1_000_000)
        self.await_step(job)
        time.sleep(self.draw.uniform(0, LONGEST_LIFE_S))
        rank = self.draw.choice([None, 0, 1])
        job.signal(rank, signal.SIGTERM)
        seconds = job.wait(TERM_S)
        what = f"SIGTERM to {'both' if rank is None else f'rank {rank}'}"
        if seconds is not None:
            self.figures.setdefault("s from SIGTERM to the end", []).append(seconds)
        self.check(job, what, seconds)
        left = [entry["step"] for entry in self.new_entries() if entry.get("event") == "preempted"]
        newest = self._newest.state["step"] if self._newest else 0
        if left != [newest] or job.statuses != [STATUS] * PROCESSES:
            self.violations.append(
                f"{what}: left after {left} with {job.statuses}, newest checkpoint of step {newest}; {self.tail()}"
            )
        return what

    def start(self, epochs: int) -> _Job:
        """Starts the run, which goes on from its newest checkpoint."""
        settings = replace(self.config, pretrain=replace(self.config.pretrain, epochs=epochs))
        self._settings.write_text(to_yaml(settings))
        self.new_entries()
        self._began = time.time()
        command = ["pretrain", "--config", str(self._settings)]
        return _Job(self.config.engine.device, self.port, self.log, main, command)

    def await_step(self, job: _Job) -> bool:
        """Waits for a step of the run, and checks where it has gone on from; False where it ended before."""
        entries: list[dict[str, Any]] = []

        def has_step() -> bool:
            entries.extend(self.new_entries())
            return any("train/loss" in entry for entry in entries) or job.is_over()

        _until(has_step, START_S, every=0.01)
        if not any("train/loss" in entry for entry in entries):
            self.violations.append(f"did not start: {self.tail()}")
            return False
        self.figures.setdefault("s from the start to the first step", []).append(time.time() - self._began)
        resumed = [entry["step"] for entry in entries if entry.get("event") == "resume"]
        expected = [] if self._newest is None else [self._newest.state["step"]]
        if resumed != expected:
            self.violations.append(f"went on from {resumed}, expected {expected}")
        return True

    def check(self, job: _Job, what: str, seconds: float | None) -> None:
        """What must hold after every end."""
        if seconds is None:
            self.violations.append(f"{what}: processes did not end; {self.tail()}")
        if left := job.left_behind():
            self.violations.append(f"{what}: left behind {', '.join(left)}")
        before = self._newest.state["step"] if self._newest else 0
        try:
            self._newest = checkpoint.newest(self.checkpoints)
        except CheckpointError as error:
            self.violations.append(f"{what}: {error}")
            return
        if (self._newest.state["step"] if self._newest else 0) < before:
            self.violations.append(f"{what}: the newest checkpoint, of step {before}, is gone")
        if self._newest and self._newest.damaged:
            self.violations.append(f"{what}: {self._newest.damaged}")

    def compare(self, undisturbed: str) -> None:
        """Lets the run come to the end of an epoch, and compares it with one of as many epochs that nothing has
        disturbed."""
        epochs = int(self._newest.state["epoch"]) + 1 if self._newest else 1
        job = self.start(epochs)
        self.check(job, "the last run", job.wait(3600))
        ours, ended = self.folder, self._newest
        self.config = replace(self.config, output=undisturbed)
        self.folder = Path(undisturbed) / "pretrain"
        self.checkpoints = self.folder / checkpoint.FOLDER
        self._read, self._newest = 0, None
        job = self.start(epochs)
        self.check(job, "the undisturbed run", job.wait(3600))
        found, expected = (_curve(folder) for folder in (ours, self.folder))
        differ = [step for step in found.keys() | expected if found.get(step) != expected.get(step)]
        if differ or not found:
            self.violations.append(f"losses of {len(differ)} of {len(expected)} steps differ; {self.tail()}")
        last, expected_last = (_tensors_of(each.folder) if each else {} for each in (ended, self._newest))
        if (different := _differing(last, expected_last)) or not last:
            self.violations.append(f"the last weights differ: {', '.join(different) or 'there are none'}")
        self.figures["steps with equal losses"] = [len(found) - len(differ)]

    def drafts(self) -> list[str]:
        """Tags that are being written, those aside that were when an earlier process ended."""
        prefix, found = checkpoint.WRITING, []
        for path in self.checkpoints.glob(f"{prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ctime > self._began:
                    found.append(path.name.removeprefix(prefix))
        return found

    def new_entries(self) -> list[dict[str, Any]]:
        """What has come to metrics.jsonl since this was last asked."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as file:
                file.seek(0, os.SEEK_END)
                self._read = min(self._read, file.tell())
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return []
        lines = data[: data.rfind(b"\n") + 1]
        self._read += len(lines)
        entries = []
        for line in lines.splitlines():
            with contextlib.suppress(ValueError):  # cut by a kill
                entries.append(json.loads(line))
        return entries

    def tail(self) -> str:
        """The end of what the processes have printed."""
        return self.log.read_text(errors="replace")[-3000:]


def _tensors_of(tag: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, and its tables' rows with their optimizer's state, by file and name."""
    files = {str(path.relative_to(tag)): load_file(path) for path in tag.rglob("*.safetensors")}
    return {f"{file} {name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}


def _differing(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not there twice, or differ in a bit."""
    names = found.keys() | expected.keys()
    return sorted(
        name
        for name in names
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    )


def _curve(folder: Path) -> dict[int, float]:
    entries = read_metrics(folder / "metrics.jsonl")
    return {entry["step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}


def _until(condition: Callable[[], bool], seconds: float, *, every: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(every)
    return met


def _free_port(draw: random.Random) -> int:
    """One that no program gets by chance, for all starts: each has to leave it free for the next."""
    while True:
        port = draw.randint(20_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# Corrupted checkpoints


Damage = Callable[[Path, list[Path], random.Random], set[str]]
"""Does damage to the tags of a folder, the newest first; returns the names of those that are not whole any more."""


def _cut(folder: Path, tags: list[Path], draw: random.Random) -> set[str]:
    path = draw.choice(_files(tags[0]))
    with open(path, "r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size))
    return {tags[0].name}


def _flip(folder: Path, tags: list[Path], draw: random.Random) -> set[str]:
    path = draw.choice(_files(tags[0]))
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return {tags[0].name}


def _lose(folder: Path, tags: list[Path], draw: random.Random) -> set[str]:
    draw.choice(_files(tags[0])).unlink()
    return {tags[0].name}


def _lose_rank(folder: Path, tags: list[Path], draw: random.Random) -> set[str]:
    parts = [tags[0] / part for part in (checkpoint.SHARDS, checkpoint.TABLES)]
    draw.choice([path for part in parts if part.is_dir() for path in sorted(part.iterdir())]).unlink()
    return {tags[0].name}


def _half_write(folder: Path, tags: list[Path], draw: random.Random) -> set[str]:
    """As a program leaves it that renames before it has written all."""
    files = [path for path in _files(tags[0]) if path.name != checkpoint.MANIFEST]
    for path in [tags[0] / checkpoint.MANIFEST, *draw.sample(files, draw.randrange(len(files)))]:
        path.unlink()
    return {tags[0].name}


def _take_manifest_of_another(folder: Path, tags: list[Path], draw: random.Random) -> set[str]:
    shutil.copyfile(tags[1] / checkpoint.MANIFEST, tags[0] / checkpoint.MANIFEST)
    return {tags[0].name}


def _take_files_of_another(folder: Path, tags: list[Path], draw: random.Random) -> set[str]:
    path = draw.choice([path for path in _files(tags[0]) if path.name != checkpoint.MANIFEST])
    shutil.copyfile(tags[1] / path.relative_to(tags[0]), path)
    return {tags[0].name}


def _spoil_latest(folder: Path, tags: list[Path], draw: random.Random) -> set[str]:
    """Nothing depends on it, so all tags stay whole."""
    draw.choice(
        [
            lambda path: path.write_text(""),
            lambda path: path.write_text("step-99999999\n"),
            lambda path: path.write_bytes(b"\xff\x00"),
            lambda path: path.unlink(),
        ]
    )(folder / "latest")
    return set()


def _twice(folder: Path, tags: list[Path], draw: random.Random) -> set[str]:
    return draw.choice(DAMAGES[:5])(folder, tags, draw) | draw.choice(DAMAGES[:5])(folder, tags[1:], draw)


def _all(folder: Path, tags: list[Path], draw: random.Random) -> set[str]:
    return set().union(*(draw.choice(DAMAGES[:5])(folder, [tag], draw) for tag in tags))


DAMAGES: list[Damage] = [
    _cut,
    _flip,
    _lose,
    _lose_rank,
    _half_write,
    _take_manifest_of_another,
    _take_files_of_another,
    _spoil_latest,
    _twice,
    _all,
]


def _files(tag: Path) -> list[Path]:
    return sorted(path for path in tag.rglob("*") if path.is_file() and path.stat().st_size)


def _corrupt(run: _Disturbed, campaign: Campaign, figures: dict[str, list[float]], violations: list[str]) -> None:
    """Has two processes try damaged copies of the run's checkpoints."""
    result, case = run.log.with_suffix(".json"), run.log.with_suffix(".cases")
    arguments = {
        "config": to_dict(run.config),
        "checkpoints": str(run.checkpoints),
        "case": str(case),
        "cases": campaign.corruptions,
        "result": str(result),
    }
    job = _Job(run.config.engine.device, run.port, run.log, _try_damages, arguments)
    job.wait(60 + FALL_BACK_S * campaign.corruptions)
    if not result.exists():
        violations.append(f"corrupted checkpoints: no result; {run.tail()}")
        return
    found = json.loads(result.read_text())
    figures["corrupted checkpoints"] = [campaign.corruptions]
    figures["s to agree on a whole one"] = found["seconds"]
    violations += found["violations"]


def _try_damages(arguments: dict[str, Any]) -> None:
    """One of the processes: damage after damage to a copy of the checkpoints."""
    config = from_dict(arguments["config"], "bench faults")
    draw = random.Random(config.seed)
    world = start(config.engine)
    task = Task(config, "pretrain", Dataset.open(config.data.path, Storage(config.storage)), world.device)
    engine = Engine(task.model(), task.losses, task.stage, config.engine, world, task.tables)
    original, case = Path(arguments["checkpoints"]), Path(arguments["case"])
    names = sorted((path.name for path in original.glob("step-*")), reverse=True)
    seconds, violations = [], []
    for number in range(arguments["cases"]):
        damage = DAMAGES[number % len(DAMAGES)]

        def prepare_case(damage: Damage = damage) -> set[str]:
            shutil.rmtree(case, ignore_errors=True)
            shutil.copytree(original, case)
            return damage(case, [case / name for name in names], draw)

        damaged = on_rank_zero(prepare_case)
        whole = [name for name in names if name not in damaged]
        began = time.monotonic()
        told = functools.partial("{0} of {1}: {2}".format, damage.__name__.strip("_"), sorted(damaged))
        try:
            found = checkpoint.newest(case)
            assert found is not None
            tag = found.folder.name
        except CheckpointError:
            tag = ""
        tags = gather(tag)
        seconds.append(time.monotonic() - began)
        if seconds[-1] > FALL_BACK_S or tags != [whole[0] if whole else ""] * world.size:
            violations.append(told(f"{tags} after {seconds[-1]:.1f} s, expected {whole[:1]}"))
        elif tag and found is not None:
            checkpoint.load(engine, found)
            loaded = {checkpoint.WEIGHTS: engine.fp32_weights()} if world.rank == 0 else {}
            loaded |= {f"{checkpoint.TABLES}/{name}": rows for name, rows in engine.table_shards(copied=False).items()}
            differ = gather([file for file, own in loaded.items() if _differing(own, load_file(original / tag / file))])
            if any(differ):
                violations.append(told(f"other weights were loaded, by rank: {differ}"))
            step = found.state["step"] + 1
            saved = Saver(engine, case).save({**found.state, "step": step}, keep=2)
            newest = checkpoint.newest(case)
            if newest is None or newest.folder.name != saved or saved != tag_of(step):
                violations.append(told("what was saved then is not the newest"))
            try:
                checkpoint.verify(str(case / tag))
            except CheckpointError as error:
                violations.append(told(f"the last good one is gone: {error}"))
    engine.close()
    if world.rank == 0:
        Path(arguments["result"]).write_text(json.dumps({"seconds": seconds, "violations": violations}))
