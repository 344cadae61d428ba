"""Where a run's numbers go: metrics.jsonl, the terminal and W&B, behind one small interface.

    tracker = open_tracker(config, "pretrain", folder, world)
    tracker.log({"train/loss": 1.2}, step=50)
    tracker.event("checkpoint", tag="step-00000050")

``metrics.jsonl`` is the record: one JSON object a line, flushed as it is written, and appended to when a
run resumes (a step that was trained twice has two lines; the later one counts). W&B and the terminal show
the same numbers and can never stop a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from s3rec_dist.config import Config, to_dict
from s3rec_dist.storage import hide

METRICS_FILE, _WANDB_ID_FILE = "metrics.jsonl", "wandb_id"
KEPT_FILES = (METRICS_FILE, _WANDB_ID_FILE)
"""What a run that goes on needs of the one before."""


class Tracker:
    """Takes a run's numbers; this one drops them."""

    def begin(self, *, step: int, total_steps: int) -> None:
        """Training goes on from ``step`` of ``total_steps``."""

    def progress(self, step: int) -> None:
        """``step`` steps are done; cheap enough for every step."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers after ``step`` steps, under names such as train/loss and validation/NDCG@10."""

    def event(self, name: str, **facts: Any) -> None:
        """Something that happened once: start, resume, checkpoint, best, stop, ..."""

    def finish(self, status: str = "finished") -> None:
        """The run is over: ``finished``, ``failed`` or ``preempted``."""


class Trackers(Tracker):
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def begin(self, *, step: int, total_steps: int) -> None:
        for tracker in self._trackers:
            tracker.begin(step=step, total_steps=total_steps)

    def progress(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.progress(step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def event(self, name: str, **facts: Any) -> None:
        for tracker in self._trackers:
            tracker.event(name, **facts)

    def finish(self, status: str = "finished") -> None:
        for tracker in self._trackers:
            tracker.finish(status)


class JsonlTracker(Tracker):
    """Appends to a file: ``{"time", "step", <metrics>}`` and ``{"time", "event", <facts>}``.

    What a full disk does not take is kept and written later; ``alarm``, an event of other trackers, tells of it once.
    """

    def __init__(self, path: Path, alarm: Callable[..., None] = lambda name, **facts: None) -> None:
        _drop_torn_line(path)
        self._path, self._alarm = path, alarm
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by finish)
        self._waiting = b""
        self._is_failing = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._write({"step": step, **metrics})

    def event(self, name: str, **facts: Any) -> None:
        self._write({"event": name, **facts})

    def finish(self, status: str = "finished") -> None:
        if not self._file.closed:
            self.event("end", status=status)
            self._file.close()
            if self._waiting:
                warnings.warn(f"{self._path} lacks its last {self._waiting.count(10)} lines")

    def _write(self, entry: dict[str, Any]) -> None:
        self._waiting += json.dumps({"time": round(time.time(), 3), **entry}).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                self._is_failing = True
                self._alarm("metrics_failed", file=str(self._path), reason=error.strerror)


def _drop_torn_line(path: Path) -> None:
    """Cuts a last line that a crash left without its end."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


class TerminalTracker(Tracker):
    """A live progress bar with the newest numbers below it where the output is a terminal, else a line for each log."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console(stderr=True, highlight=False)
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        self._started, self._first_step, self._total = time.monotonic(), 0, 0

    def begin(self, *, step: int, total_steps: int) -> None:
        self._started, self._first_step, self._total = time.monotonic(), step, total_steps
        if self._console.is_terminal:
            self._bar = _Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(self._title, total=total_steps, completed=step)
            self._bar.start()

    def progress(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        numbers = _in_words(metrics)
        is_training = "train/loss" in metrics
        if self._bar is not None and is_training:
            self._bar.numbers = numbers
        else:
            what = f"{self._time_left(step)} left" if is_training else next(iter(metrics), "").split("/")[0]
            self._print(f"{self._title} {step}/{self._total}, {what}: {numbers}")

    def event(self, name: str, **facts: Any) -> None:
        if name in ("best", "done"):
            self.finish()
        if name not in ("checkpoint", "end"):
            self._print(f"{self._title} {name.replace('_', ' ')}: {_facts_in_words(facts)}")

    def finish(self, status: str = "finished") -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        return clock((time.monotonic() - self._started) / max(done, 1) * max(self._total - step, 0))


class _Bar(Progress):
    """With a line of numbers below."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.numbers:
            yield Text(self.numbers)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


_HIDDEN_SECTIONS = ("time", "rank")
_HIDDEN = {
    "tokens_per_second",
    "step_ms",
    "data_wait",
    "tflops_per_device",
    "mfu",
    "memory_mb",
    "device_memory_mb",
    "sent_mb",
    "straggler_rank",
    "straggler_ratio",
    "skipped_steps",
}
_SHORT = {"learning_rate": "rate", "gradient_norm": "norm"}


def _in_words(metrics: Mapping[str, float]) -> str:
    """The numbers worth a look while waiting, on one line."""
    words = []
    for name, value in metrics.items():
        section, _, short = name.rpartition("/")
        if name == "train/samples_per_second":
            words.append(f"{value:,.0f} samples/s")
        elif short not in _HIDDEN and not section.startswith(_HIDDEN_SECTIONS):
            words.append(f"{_SHORT.get(short, short)} {_number(value) if section == 'train' else f'{value:.4f}'}")
    return "  ".join(words)


def _facts_in_words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in facts.items())


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


FAULTS = {"skipped_step", "rewind", "diverged", "hang", "checkpoint_failed", "metrics_failed"}
"""Events that W&B sends alerts of."""

WANDB_INIT_S, WANDB_FINISH_S = 30.0, 15.0
"""How long W&B's server is waited for at the start of a run and at its end. In between nothing waits for it."""


class WandbTracker(Tracker):
    """Weights & Biases, online or offline: one run for all ranks, whose numbers rank 0 logs, and the same one again
    after a resume. Where the server cannot be reached at the start, the run is recorded offline. Whatever else W&B
    raises is told once; the run goes on without it."""

    def __init__(self, config: Config, stage: str, folder: Path) -> None:
        self._run: Any = None
        self._on = True
        self._guard(lambda: self._start(config, stage, folder))

    def _start(self, config: Config, stage: str, folder: Path) -> None:
        import wandb

        name = config.tracking.name or Path(config.output).name
        id_file = folder / _WANDB_ID_FILE
        if not id_file.exists():
            swept = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
            id_file.write_text(swept or secrets.token_hex(4), encoding="utf-8")
        options: dict[str, Any] = dict(
            project=config.tracking.project,
            entity=config.tracking.entity or None,
            name=f"{name}/{stage}",
            group=name,
            job_type=stage,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=to_dict(config),
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=WANDB_INIT_S,
                finish_timeout=WANDB_FINISH_S,
                finish_timeout_raises=True,
            ),
        )
        try:
            self._run = wandb.init(mode=config.tracking.wandb, **options)
        except wandb.errors.CommError as error:
            warnings.warn(f"W&B is not reached, the run is recorded for 'wandb sync' in {folder}: {hide(str(error))}")
            wandb.teardown()  # the service holds on to the run's id, and outlives this where a parent process began it
            os.environ.pop("WANDB_SERVICE", None)
            self._run = wandb.init(mode="offline", **options)
        # Our own step counts: W&B's would refuse the steps that a resumed run trains again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._guard(lambda: self._run.log({"step": step, **metrics}))

    def event(self, name: str, **facts: Any) -> None:
        if name in FAULTS:
            self._guard(lambda: self._run.alert(name.replace("_", " "), _facts_in_words(facts), level="WARN"))
        if name in FAULTS or name in ("start", "best", "preempted"):
            self._guard(lambda: self._run.summary.update({f"{name}/{key}": value for key, value in facts.items()}))
        if name == "preempted":
            self._guard(lambda: self._run.mark_preempting())

    def finish(self, status: str = "finished") -> None:
        self._guard(lambda: self._run.finish(exit_code=0 if status == "finished" else 1))
        self._on = False

    def _guard(self, call: Callable[[], Any]) -> None:
        if not self._on:
            return
        try:
            call()
        except Exception as error:
            self._on = False
            warnings.warn(f"W&B is off for the rest of this run, metrics.jsonl has everything: {hide(str(error))}")


def open_tracker(config: Config, stage: str, folder: Path, rank: int = 0) -> Tracker:
    """What ``config.tracking`` asks for, on rank 0; elsewhere a tracker that does nothing."""
    if rank != 0:
        return Tracker()
    shown: list[Tracker] = [TerminalTracker(stage)]
    if config.tracking.wandb != "disabled":
        shown.append(WandbTracker(config, stage, folder))
    return Trackers([JsonlTracker(folder / METRICS_FILE, Trackers(shown).event), *shown])


def peak_memory_mb() -> float:
    """This process's largest resident memory so far, in MiB."""
    with contextlib.suppress(OSError):  # Linux; what getrusage says there may be from before this program was executed
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def times_started(path: Path) -> int:
    """How often the run of a metrics.jsonl, which need not exist, has been started."""
    if not path.exists():
        return 0
    with open(path, encoding="utf-8") as file:
        return sum('"event": "start"' in line for line in file)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """:func:`parse_metrics` of a local file."""
    return parse_metrics(Path(path).read_text(encoding="utf-8"))


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, oldest first; of a step that was logged twice with the same names, the later. A
    last line that is being written does not count."""
    entries: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines(keepends=True)):
        if not line.endswith("\n"):
            break
        entry = json.loads(line)
        key = number if "event" in entry else (entry["step"], *sorted(entry))
        entries.pop(key, None)
        entries[key] = entry
    return list(entries.values())
