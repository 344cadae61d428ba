"""A run's folder as data: its settings, and what it logged, from ``config.yaml`` and ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from s3rec_dist.config import Config, flat, from_dict, to_dict
from s3rec_dist.storage import Storage
from s3rec_dist.training.tracking import FAULTS, parse_metrics

STAGES = ("pretrain", "finetune")
SETTINGS, METRICS = "config.yaml", "metrics.jsonl"


class ReportError(ValueError):
    """Runs or results that cannot be reported on; the message names the folder or file."""


@dataclass(frozen=True)
class Run:
    """One stage of one run."""

    label: str
    place: int
    """Of the path it was found under, counted from 0: all stages of a run have one colour."""
    stage: str
    folder: str
    config: Config
    entries: Sequence[Mapping[str, Any]]
    """What was logged, oldest first."""

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric."""
        rows = [entry for entry in self.entries if name in entry and "step" in entry]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def names(self, prefix: str) -> list[str]:
        """Metrics below ``prefix``, as in ``validation/``, in the order of their first appearance."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry if name.startswith(prefix)))

    def events(self, *names: str) -> list[Mapping[str, Any]]:
        """Events of these names, oldest first."""
        return [entry for entry in self.entries if entry.get("event") in names]

    @property
    def faults(self) -> list[Mapping[str, Any]]:
        """What went wrong, and what came of it."""
        return self.events(*FAULTS, "straggler", "preempted", "resume")

    @property
    def status(self) -> str:
        """``finished``, ``failed``, ``preempted`` or, where nothing was said at an end, ``running or killed``."""
        ends = [entry for entry in self.entries if entry.get("event") in ("start", "end")]
        return str(ends[-1].get("status", "ended")) if ends and ends[-1]["event"] == "end" else "running or killed"

    def best(self) -> Mapping[str, float]:
        """The validation metrics of the epoch that was kept, or of the last one validated."""
        rows = [entry for entry in self.entries if any(name.startswith("validation/") for name in entry)]
        if not rows:
            return {}
        key = f"validation/{self.config.finetune.metric}"
        row = max(rows, key=lambda entry: entry.get(key, float("-inf")))
        return {name.removeprefix("validation/"): row[name] for name in row if name.startswith("validation/")}


def read_runs(paths: Sequence[str], storage: Storage) -> list[Run]:
    """The stages found in each path or URL: a run's output folder, or one stage's. Raises :class:`ReportError`."""
    runs = []
    labels = _labels(paths)
    for path in paths:
        found = [
            (stage, folder)
            for stage, folder in [(_stage_of(path), path.rstrip("/"))]
            + [(s, f"{path.rstrip('/')}/{s}") for s in STAGES]
            if storage.exists(f"{folder}/{METRICS}")
        ]
        if not found:
            raise ReportError(
                f"{path}: holds no {METRICS}; expected a folder that pretrain or finetune writes, or the output folder "
                "above it"
            )
        place = list(labels).index(path)
        runs += [_read(labels[path], place, stage, folder, storage) for stage, folder in found]
    return runs


def _read(label: str, place: int, stage: str, folder: str, storage: Storage) -> Run:
    try:
        tree = yaml.safe_load(storage.read(f"{folder}/{SETTINGS}"))
        config = from_dict(tree, f"{folder}/{SETTINGS}")
    except FileNotFoundError as error:
        raise ReportError(f"{folder}/{SETTINGS}: no such file; expected the settings beside {METRICS}") from error
    except yaml.YAMLError as error:
        raise ReportError(f"{folder}/{SETTINGS}: not valid YAML: {error}") from error
    try:
        entries = parse_metrics(storage.read(f"{folder}/{METRICS}").decode())
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ReportError(f"{folder}/{METRICS}: not what a run logs ({error}); restore the file") from error
    return Run(label, place, stage, folder, config, entries)


def _stage_of(path: str) -> str:
    name = os.path.basename(path.rstrip("/"))
    return name if name in STAGES else "run"


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """Short names that tell the paths apart: as many of their last parts as it takes."""
    parts = {path: path.rstrip("/").split("/") for path in dict.fromkeys(paths)}
    for depth in range(1, 1 + max(map(len, parts.values()))):
        labels = {path: "/".join(words[-depth:]) for path, words in parts.items()}
        if len(set(labels.values())) == len(labels):
            break
    return labels


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs of a stage, each with every run's value."""
    flats = [flat(to_dict(run.config)) for run in runs]
    return {key: [own[key] for own in flats] for key in flats[0] if any(own[key] != flats[0][key] for own in flats[1:])}
