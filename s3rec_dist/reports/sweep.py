"""``s3rec sweep FILE``: many settings, one after another, and which did best.

    s3rec sweep configs/sweeps/random.yaml

FILE is YAML:

    config: configs/quickstart.yaml            # settings of all trials (default: every setting's default)
    settings: {data.path: data/mine}           # more of them
    output: runs/sweep
    stages: [pretrain, finetune]               # the default
    metric: NDCG@10                            # of the validation; the larger the better (default: finetune.metric)
    launcher: deepspeed --num_gpus 8 --module s3rec_dist    # (default: one process)
    random:                                    # or `list: [{finetune.learning_rate: 0.01}, ...]`
      count: 20
      seed: 7
      settings:
        finetune.learning_rate: {log_uniform: [0.0001, 0.01]}
        model.hidden_dropout: {uniform: [0.1, 0.5]}
        model.layers: {choice: [1, 2, 3]}

Each trial is a process of the ordinary command, in OUTPUT/000 and so on. What is finished is passed over, what was cut
goes on, a trial that fails is told and the others go on. Trials whose settings differ in fine-tuning alone share one
pretraining, below OUTPUT/pretrained. The best come first in the table and in OUTPUT/sweep.json; OUTPUT/report.html
shows the runs beside each other.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from s3rec_dist.config import Config, ConfigError, flat, load_config, to_dict
from s3rec_dist.reports.command import write_report
from s3rec_dist.reports.page import plotly
from s3rec_dist.reports.runs import STAGES, ReportError, Run, read_runs
from s3rec_dist.storage import Storage, add_storage_argument, storage_of
from s3rec_dist.training.preemption import STATUS as PREEMPTED

_LEAVE_S = 120.0
"""How long a run that was told to leave is waited for: it writes a checkpoint."""


class SweepError(ValueError):
    """A sweep that cannot be run; the message names the file and the key."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says."""

    config: str | None
    settings: Mapping[str, Any]
    output: str
    stages: Sequence[str]
    metric: str
    launcher: Sequence[str]
    trials: Sequence[Mapping[str, Any]]
    """The settings of each trial."""

    def overrides(self, trial: Mapping[str, Any]) -> list[str]:
        """A trial's settings as arguments of a command."""
        return [f"{key}={_argument(value)}" for key, value in {**self.settings, **trial}.items()]


def read_sweep(path: str) -> Sweep:
    """The sweep of a YAML file. Raises :class:`SweepError`, and ConfigError for settings that a trial may not have."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise SweepError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SweepError(f"{path}: expected 'key: value' lines, got {type(tree).__name__}")
    known = ("config", "settings", "output", "stages", "metric", "launcher", "list", "random")
    if unknown := [key for key in tree if key not in known]:
        raise SweepError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    if ("list" in tree) == ("random" in tree):
        raise SweepError(f"{path}: expected either list or random, which say what the trials are")
    for key in ("config", "metric", "launcher"):
        if not isinstance(tree.get(key, ""), str):
            raise SweepError(f"{path}: {key}: expected text, got {tree[key]!r}")
    if not isinstance(tree.get("output"), str):
        raise SweepError(f"{path}: output: expected a folder or URL for the runs")
    stages = tree.get("stages", list(STAGES))
    if not isinstance(stages, list) or not stages or not set(stages) <= set(STAGES):
        raise SweepError(f"{path}: stages: expected some of {', '.join(STAGES)}, got {stages!r}")
    trials = _listed(path, tree["list"]) if "list" in tree else _drawn(path, tree["random"])
    settings = tree.get("settings", {})
    if not isinstance(settings, dict):
        raise SweepError(f"{path}: settings: expected 'key: value' lines, got {settings!r}")
    sweep = Sweep(
        config=tree.get("config"),
        settings=settings,
        output=tree["output"].rstrip("/"),
        stages=[stage for stage in STAGES if stage in stages],
        metric=tree.get("metric", ""),
        launcher=shlex.split(tree.get("launcher", "")) or [sys.executable, "-m", "s3rec_dist"],
        trials=trials,
    )
    for number, trial in enumerate(trials):
        try:
            load_config(sweep.config, sweep.overrides(trial))
        except ConfigError as error:
            raise SweepError(f"{path}: trial {number}: {error}") from error
        if sweep.metric:
            try:
                load_config(sweep.config, [*sweep.overrides(trial), f"finetune.metric={sweep.metric}"])
            except ConfigError as error:
                raise SweepError(f"{path}: metric {sweep.metric}: trial {number} does not have it: {error}") from error
    return sweep


def _listed(path: str, given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given or not all(isinstance(trial, dict) for trial in given):
        raise SweepError(f"{path}: list: expected a list of settings, as in - {{finetune.learning_rate: 0.01}}")
    return given


def _drawn(path: str, given: Any) -> list[dict[str, Any]]:
    """Trials of a random sample: a function of (seed, trial, setting), so a larger count adds trials to the same."""
    settings = given.get("settings") if isinstance(given, dict) else None
    count, seed = (given.get("count"), given.get("seed", 0)) if isinstance(given, dict) else (None, 0)
    if not isinstance(settings, dict) or not settings or not isinstance(count, int) or count < 1:
        raise SweepError(f"{path}: random: expected count, at least 1, and settings to draw")
    if not isinstance(seed, int) or not set(given) <= {"settings", "count", "seed"}:
        raise SweepError(f"{path}: random: expected settings, count and seed, an integer, alone; got {given!r}")
    return [
        {key: _draw(f"{path}: random: {key}", rule, f"{seed}/{number}/{key}") for key, rule in settings.items()}
        for number in range(count)
    ]


def _draw(where: str, rule: Any, key: str) -> Any:
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    match rule:
        case {"choice": [*options]} if options and len(rule) == 1:
            return options[int(share * len(options))]
        case {"uniform": [int() | float() as low, int() | float() as high]} if low < high and len(rule) == 1:
            return low + share * (high - low)
        case {"log_uniform": [int() | float() as low, int() | float() as high]} if 0 < low < high and len(rule) == 1:
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    raise SweepError(f"{where}: expected choice: [...], uniform: [low, high] or log_uniform: [low, high], got {rule!r}")


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Job:
    """One command of a sweep."""

    trial: int
    stage: str
    folder: str
    """Where the stage writes: OUTPUT/STAGE of its output."""
    config: Config
    command: Sequence[str]


def jobs_of(sweep: Sweep) -> Iterator[Job]:
    """The commands in their order. A pretraining that an earlier trial has already is not among them."""
    known: set[str] = set()
    for number, trial in enumerate(sweep.trials):
        own = f"{sweep.output}/{number:03d}"
        overrides = sweep.overrides(trial)
        pretrained: list[str] = []
        if "pretrain" in sweep.stages:
            config = load_config(sweep.config, overrides)
            shared = f"{sweep.output}/pretrained/{_pretraining(config)}"
            if shared not in known:
                known.add(shared)
                yield _job(sweep, number, "pretrain", overrides, shared)
            pretrained = [f"finetune.pretrained={shared}/pretrain"]
        if "finetune" in sweep.stages:
            yield _job(sweep, number, "finetune", [*overrides, *pretrained], own)


def _job(sweep: Sweep, trial: int, stage: str, overrides: Sequence[str], output: str) -> Job:
    arguments = [*overrides, f"output={output}"]
    given = ["--config", sweep.config] if sweep.config else []
    config = load_config(sweep.config, arguments)
    return Job(trial, stage, f"{output}/{stage}", config, [*sweep.launcher, stage, *given, *arguments])


def _pretraining(config: Config) -> str:
    """A name for all settings that pretraining may depend on."""
    tree = {
        key: value for key, value in flat(to_dict(config)).items() if not key.startswith(("finetune.", "evaluation."))
    }
    return hashlib.sha256(json.dumps({**tree, "output": ""}, sort_keys=True).encode()).hexdigest()[:8]


def run_sweep(sweep: Sweep, storage: Storage) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs what is not finished; (results, best first, and failures). Leaves with status 75 where a run was told to."""
    failures: dict[int, str] = {}
    broken: dict[str, int] = {}  # trial by folder of a pretraining that failed
    for job in jobs_of(sweep):
        if job.trial in failures:
            continue
        settings = " ".join(f"{key}={_argument(value)}" for key, value in sweep.trials[job.trial].items())
        print(f"== trial {job.trial} of {len(sweep.trials)}, {job.stage}: {settings}", flush=True)
        if job.config.finetune.pretrained in broken:
            first = broken[job.config.finetune.pretrained]
            failures[job.trial] = f"trial {job.trial}: its pretraining, which is trial {first}'s too, failed"
            print(f"s3rec: {failures[job.trial]}", file=sys.stderr, flush=True)
            continue
        if _is_finished(job, storage):
            print(f"{job.folder}: finished")
            continue
        status = _call(job.command)
        if status == PREEMPTED:
            raise SystemExit(PREEMPTED)
        if status:
            if job.stage == "pretrain":
                broken[job.folder] = job.trial
            failures[job.trial] = (
                f"trial {job.trial}: {job.stage} ended with status {status}: {shlex.join(job.command)}"
            )
            print(f"s3rec: {failures[job.trial]}", file=sys.stderr, flush=True)
    results = []
    for job in jobs_of(sweep):
        if job.stage == sweep.stages[-1] and job.trial not in failures and _is_finished(job, storage):
            (run,) = read_runs([job.folder], storage)
            metrics = dict(run.best()) or {"loss": run.curve("train/loss")[1][-1]}
            results.append(
                {"trial": job.trial, "folder": job.folder, "metrics": metrics, "settings": sweep.trials[job.trial]}
            )
    return sorted(results, key=lambda result: -_value(sweep, result)), list(failures.values())


def _value(sweep: Sweep, result: Mapping[str, Any]) -> float:
    """What trials are ranked by: the metric, or of pretraining alone minus the loss."""
    metrics = result["metrics"]
    if sweep.stages[-1] == "pretrain":
        return -float(metrics["loss"])
    return float(metrics[_metric(sweep)])


def _metric(sweep: Sweep) -> str:
    return sweep.metric or load_config(sweep.config, sweep.overrides(sweep.trials[0])).finetune.metric


def _is_finished(job: Job, storage: Storage) -> bool:
    """Whether this very run is there, to its end."""
    with contextlib.suppress(ReportError):
        (run,) = read_runs([job.folder], storage)
        return run.status == "finished" and _same_settings(run, job)
    return False


def _same_settings(run: Run, job: Job) -> bool:
    return to_dict(run.config) == to_dict(job.config)


def _call(command: Sequence[str]) -> int:
    """A process's exit status, or that of a run that was told to leave where this process is told so.

    The signal goes to all processes that the command started, and all are waited for: deepspeed's launcher passes none
    on, and is gone before its processes are."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    told: list[int] = []

    def passed_on(number: int, frame: Any) -> None:
        told.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup, jobs of a script
    before = {number: signal.signal(number, passed_on) for number in heard}
    try:
        status = process.wait()
        deadline = time.monotonic() + _LEAVE_S
        while told and _has_processes(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in told:
        raise KeyboardInterrupt
    return PREEMPTED if told else status


def _has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def as_text(sweep: Sweep, results: Sequence[Mapping[str, Any]]) -> str:
    """A table, the best first."""
    if not results:
        return "no trial is finished"
    metrics, settings = list(results[0]["metrics"]), list(dict.fromkeys(key for r in results for key in r["settings"]))
    rows = [["trial", *metrics, *settings]]
    for result in results:
        shown = [_short(result["settings"].get(key, "")) for key in settings]
        rows.append([f"{result['trial']:03d}", *(f"{result['metrics'][name]:.4f}" for name in metrics), *shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _argument(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec sweep``."""
    parser.add_argument("file", metavar="FILE", help="YAML file that says what the trials are")
    add_storage_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``s3rec sweep``: status 1 where a trial failed."""
    plotly()  # a missing library is told before the trials, not after
    sweep, storage = read_sweep(args.file), storage_of(args)
    results, failures = run_sweep(sweep, storage)
    print(as_text(sweep, results))
    if results:
        runs = read_runs([result["folder"].rsplit("/", 1)[0] for result in results], storage)
        write_report(runs, [], f"{sweep.output}/report.html", storage)
        content = {"results": results, "failures": failures}
        storage.write(f"{sweep.output}/sweep.json", (json.dumps(content, indent=1) + "\n").encode())
        print(f"{sweep.output}: sweep.json, report.html", file=sys.stderr)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0
