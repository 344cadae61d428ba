"""Small runs of the real program: a dataset, settings, and what a run leaves behind.

python runs.py JOBS.json, one process a rank with RANK, WORLD_SIZE, ... in the environment, does one job after the
other; rank 0 prints what each rank raised.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from safetensors.torch import load_file

from s3rec_dist.config import Config, from_dict
from s3rec_dist.data.dataset import Manifest
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.training import checkpoint, loop
from s3rec_dist.training.engine import gather
from s3rec_dist.training.tracking import read_metrics

ITEMS, MAX_LENGTH = 60, 10
BATCH = {"pretrain": 32, "finetune": 8}

SETTINGS: dict[str, Any] = {
    "model": {"hidden_size": 16, "inner_size": 32, "max_length": MAX_LENGTH},
    "pretrain": {"epochs": 3, "batch_size": BATCH["pretrain"], "log_every_steps": 1, "learning_rate": 3e-3},
    "finetune": {
        "epochs": 6,
        "batch_size": BATCH["finetune"],
        "log_every_steps": 1,
        "learning_rate": 3e-3,
        "pretrained": "none",
    },
    "evaluation": {"cutoffs": [5, 10]},
    "engine": {"device": "cpu", "precision": "fp32", "threads": 1},
}


def make_dataset(
    folder: Path,
    *,
    seed: int = 0,
    users: int = 73,
    shortest: int = 4,
    items: int = ITEMS,
    ids: Literal["auto", "keep", "count"] = "auto",
) -> Manifest:
    """Users with 4 to 16 items, some without attributes. With the settings above, the last batch of an epoch holds
    one sample in both stages, so that on several processes all but one have none. Item ids are the raw ones, the same
    for any seed; with ``ids="count"`` they mean other items."""
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, 16) for _ in range(users)]
    while seed == 0 and sum(min(n - 2, MAX_LENGTH) for n in lengths) % BATCH["pretrain"] != 1:
        lengths[draw.randrange(users)] = draw.randint(shortest, 12)
    histories = [[draw.randint(1, items) for _ in range(n)] for n in lengths]
    histories[0][:3] = [items, items - 1, 1]
    attributes = {str(i): draw.sample(range(1, 8), draw.randint(0, 3)) for i in range(1, items + 1)}
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / "raw.txt"
    raw.write_text("".join(f"u{i} {' '.join(map(str, history))}\n" for i, history in enumerate(histories)))
    (folder / "raw_item2attributes.json").write_text(json.dumps(attributes))
    layout = {"rows_per_group": 8, "groups_per_shard": 4}
    return prepare(PrepareSettings(source="s3rec", input=str(raw), output=str(folder / "dataset"), ids=ids, **layout))


def make_config(dataset: Path, output: Path | str, **changes: Any) -> Config:
    """``SETTINGS`` for one dataset and output; ``changes`` are ``section__setting=value``."""
    tree = json.loads(json.dumps({**SETTINGS, "output": str(output), "data": {"path": str(dataset)}}))
    for key, value in changes.items():
        section, _, setting = key.partition("__")
        if setting:
            tree.setdefault(section, {})[setting] = value
        else:
            tree[section] = value
    return from_dict(tree, "test")


def arguments(dataset: Path, output: Path, **changes: Any) -> list[str]:
    """The same as ``key=value`` arguments of the command line."""
    flat = {"output": str(output), "data.path": str(dataset)}
    for section, values in SETTINGS.items():
        flat |= {f"{section}.{key}": json.dumps(value) for key, value in values.items()}
    flat |= {key.replace("__", "."): str(value) for key, value in changes.items()}
    return [f"{key}={value}" for key, value in flat.items()]


class Died(Exception):
    """What stops a run in the middle."""


@contextlib.contextmanager
def dying_before(step: int | None, by: str = "") -> Iterator[None]:
    """Runs in this block die when they come to ``step``, on all ranks: of an exception, or ``by`` a signal."""

    def rate(stage: Any, at: int, total: int) -> float:
        if at == step:
            if by:
                os.kill(os.getpid(), getattr(signal, by))
            raise Died(f"before step {at}")
        return original(stage, at, total)

    original = loop.learning_rate
    with mock.patch.object(loop, "learning_rate", rate):
        yield


@contextlib.contextmanager
def slowed(seconds: float) -> Iterator[None]:
    """Runs in this block take so much longer to make a batch."""

    def batch(*arguments: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments)

    original = loop.Task.batch
    with mock.patch.object(loop.Task, "batch", batch):
        yield


def run(name: str, config: Config, *, resume: bool = True, dies_before: int | None = None, by: str = "") -> Path:
    """One stage; returns its folder."""
    with dying_before(dies_before, by):
        return Path((loop.run_pretrain if name == "pretrain" else loop.run_finetune)(config, resume=resume))


def died_run(name: str, config: Config, step: int) -> Path:
    """A run that died before ``step``; returns its folder."""
    with contextlib.suppress(Died):
        run(name, config, dies_before=step)
        raise AssertionError("the run should have died")
    return Path(config.output) / name


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


def curve(folder: Path, name: str = "train/loss") -> dict[int, float]:
    """A metric by step."""
    return {entry["step"]: entry[name] for entry in metrics(folder) if name in entry}


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [entry for entry in metrics(folder) if entry.get("event") == name]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of a run's newest checkpoint."""
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    return load_file(found.folder / "model.safetensors")


@contextlib.contextmanager
def keeping_ledger(path: str) -> Iterator[None]:
    """Runs in this block write down what each step trains on: lines of [step, [sample key, ...]]."""
    make_batch, dropout_seed = loop.Task.batch, loop.Task.dropout_seed
    keys: list[int] = []

    def batch(task: loop.Task, *arguments: Any) -> Any:
        made = make_batch(task, *arguments)
        keys.extend(made.sample_keys.tolist())
        return made

    def seed(task: loop.Task, step: int) -> int:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([step, keys]) + "\n")
        keys.clear()
        return dropout_seed(task, step)

    with mock.patch.object(loop.Task, "batch", batch), mock.patch.object(loop.Task, "dropout_seed", seed):
        yield


def main() -> None:
    results, own = {}, int(os.environ["RANK"])
    for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
        error = ""
        try:
            dies_before = job.get("dies_before") if job.get("rank", own) == own else None
            slow = slowed(job["slow"]) if job.get("slow_rank") == own else contextlib.nullcontext()
            ledger = keeping_ledger(f"{job['ledger']}-{own}") if "ledger" in job else contextlib.nullcontext()
            with slow, ledger:
                run(job["stage"], from_dict(job["config"], "job"), dies_before=dies_before, by=job.get("by", ""))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        results[name] = gather(error)
    if own == 0:
        print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
