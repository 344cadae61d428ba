"""What attributes do for items that training has not seen: ``s3rec bench cold --dataset data/lastfm finetune.loss=ce``.

A tenth of the items, by a hash of the raw id, is held out. The events of the others are prepared as a dataset, on which
two models are fine-tuned, with ``model.item_features=none`` and ``add``; then events of held-out items are appended,
and both models rank every user's last item, apart for warm and cold ones, as ``s3rec evaluate --cold`` does. So that
both kinds have users, every other user's history, by a hash as well, ends with the latest held-out item in it. A cold
item is one that is appended, or that no training sample held.

Models are trained from scratch where ``finetune.pretrained`` is not set. Without attributes a cold item has the small
random row of a new embedding, which is below chance: the softmax has taught the other items to score higher.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s3rec_dist.bench.step import BenchError
from s3rec_dist.config import Config
from s3rec_dist.data.append import append
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.evaluation import evaluate_apart, warm_and_cold
from s3rec_dist.export import open_model
from s3rec_dist.training.engine import World
from s3rec_dist.training.loop import run_finetune

HELD_OUT = 10
"""One item of so many is held out."""
MIN_BEFORE = 3
"""Events of other items that a held-out item must follow to be a user's last one."""
CUTOFF = 10
FEATURES: tuple[Literal["none", "add"], ...] = ("none", "add")

Event = tuple[str, int, int]
"""User, item id, time."""

_EVENTS = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])


def bench_cold(
    config: Config, dataset: Dataset, world: World, *, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """HR@10 of warm and cold items by candidates and ``model.item_features``, beside chance, in a list of one each."""
    if world.size > 1:
        raise BenchError(f"bench cold runs in one process, not in {world.size}")
    if not dataset.n_attributes:
        raise BenchError(f"{dataset.path}: its items have no attributes, which bench cold is about")
    with tempfile.TemporaryDirectory(prefix="s3rec-cold-") as place:
        old, new, path = (os.path.join(place, name) for name in ("old", "new", "dataset"))
        write_logs(dataset, old, new)
        prepare(
            PrepareSettings(
                source="table",
                input=f"{old}/events.parquet",
                attributes=f"{old}/items.parquet",
                attribute_fields=("attributes",),
                output=path,
                name=dataset.manifest.name,
            )
        )
        config = replace(config, data=replace(config.data, path=path, revision=0))
        for features in FEATURES:
            progress(f"fine-tuning with item_features={features} ...")
            model = replace(config.model, item_features=features)
            run_finetune(replace(config, model=model, output=os.path.join(place, features)))
        append({"input": f"{new}/events.parquet", "attributes": f"{new}/items.parquet", "output": path})
        return _ranked(config, Dataset.open(path), world, place)


def write_logs(dataset: Dataset, old: str, new: str) -> None:
    """Two new folders of events.parquet and items.parquet: ``old`` without the held-out items, ``new`` with those that
    are the last of a history. Places in a history are its times; new events come later than all of them."""
    raw = dataset.item_raw_ids()
    is_held = np.array([bool(item) and _bucket(f"item {item}", HELD_OUT) == 0 for item in raw])
    longest = int(dataset.index.lengths.max())
    count = 0
    with _log(dataset, old) as write_old, _log(dataset, new) as write_new:
        for group in range(len(dataset.index)):
            rows = dataset.read_row_group(group)
            before: list[Event] = []
            after: list[Event] = []
            for row, user in enumerate(rows.users.to_pylist()):
                items = rows.values[rows.offsets[row] : rows.offsets[row + 1]]
                held = is_held[items]
                at = np.flatnonzero(held & (np.cumsum(~held) >= MIN_BEFORE))
                if len(at) and _bucket(f"user {user}", 2) == 0:
                    items, held = items[: at[-1] + 1], held[: at[-1] + 1]
                before += [(user, int(items[time]), time) for time in np.flatnonzero(~held).tolist()]
                if len(at) and held[-1]:
                    after.append((user, int(items[-1]), longest + count + len(after)))
            count += len(after)
            write_old(before)
            write_new(after)
    if not count:
        raise BenchError(f"{dataset.path}: too small for bench cold, nobody's history can end with a held-out item")


def _bucket(text: str, buckets: int) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % buckets


@contextlib.contextmanager
def _log(dataset: Dataset, folder: str) -> Iterator[Callable[[list[Event]], None]]:
    """What writes to events.parquet; the attributes of the items follow at the end."""
    os.mkdir(folder)
    raw = dataset.item_raw_ids()
    is_taken = np.zeros(len(raw), dtype=bool)
    with pq.ParquetWriter(f"{folder}/events.parquet", _EVENTS) as file:

        def write(events: list[Event]) -> None:
            users, items, times = map(list, zip(*events, strict=True)) if events else ([], [], [])
            is_taken[items] = True
            file.write_table(pa.table([users, raw[items], times], schema=_EVENTS))

        yield write
    items = np.flatnonzero(is_taken)
    own = dataset.item_attributes()
    values = [own.values[own.offsets[item] : own.offsets[item + 1]].astype(str) for item in items]
    table = {"item_id": pa.array(raw[items], pa.string()), "attributes": pa.array(values, pa.list_(pa.string()))}
    pq.write_table(pa.table(table), f"{folder}/items.parquet")


def _ranked(config: Config, dataset: Dataset, world: World, place: str) -> dict[str, list[float]]:
    """The figures of the trained models."""
    negatives = config.evaluation.negatives
    common = replace(config.evaluation, protocol="full", negatives_file="", cutoffs=(CUTOFF,))
    protocols = {
        "all items": (common, dataset.n_items),
        f"{negatives} sampled": (replace(common, protocol="sampled"), negatives + 1),
    }
    figures: dict[str, list[float]] = {
        "items": [dataset.n_items],
        "items appended": [dataset.n_items - Dataset.open(dataset.path, revision=1).n_items],
    }
    hits: dict[str, list[float]] = {}
    for candidates, (evaluation, count) in protocols.items():
        hits[f"HR@{CUTOFF} by chance, {candidates}"] = [min(1.0, CUTOFF / count)]
        for features in FEATURES:
            model, metadata = open_model(os.path.join(place, features, "finetune"), dataset)
            kinds = warm_and_cold(metadata, dataset)
            found = evaluate_apart(model.to(world.device).eval(), dataset, evaluation, "test", world.device, kinds)
            for kind in kinds:
                figures[f"users of {kind}"] = [found[kind].users]
                name = f"HR@{CUTOFF} of {kind}, {candidates}, item_features={features}"
                hits[name] = [found[kind].metrics[f"HR@{CUTOFF}"]]
    return figures | hits
