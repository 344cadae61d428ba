"""What a step costs as the catalogue grows: fine-tuning steps of the real engine over a table of N items.

Every rank draws its own sequences, of items that are uniform over the catalogue: the worst case, in which no two of a
batch are the same. All rows are there from the beginning, with their optimizer's state. Rank 0 reports, for each
repetition of a number of steps, the seconds of a step, those of a rank's CPU in it, and the bytes that a rank sent for
rows; and once the distinct rows of a rank's batch, and the memory of the table.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s3rec_dist.bench.ranks import measured_by
from s3rec_dist.config import Config, from_dict, to_dict

if TYPE_CHECKING:
    from s3rec_dist.training.engine import World

MOST_DENSE = 1_000_000
"""Items up to which the dense table is measured beside the sharded one."""


def bench_catalogue(
    config: Config,
    items: Sequence[int],
    ranks: int,
    *,
    steps: int,
    repetitions: int,
    progress: Callable[[str], None],
) -> dict[str, list[float]]:
    """What was measured, by name with unit: a value for each repetition."""
    figures: dict[str, list[float]] = {}
    for count in items:
        for table in ("sharded", "dense") if count <= MOST_DENSE else ("sharded",):
            name = f"{count:,} items x {config.model.hidden_size}, {table}"
            progress(f"{name} ...")
            own = to_dict(replace(config, model=replace(config.model, item_table=table)))
            job = {"config": own, "items": count, "steps": steps, "repetitions": repetitions}
            found = measured_by("s3rec_dist.bench.catalogue", job, ranks)
            figures[f"{name}: step ms"] = [1e3 * seconds for seconds in found["seconds"]]
            figures[f"{name}: CPU ms"] = [1e3 * seconds for seconds in found["cpu"]]
            if table == "sharded":
                figures[f"{name}: rows of a batch"] = [found["rows"]]
                figures[f"{name}: bytes sent a row"] = [sent / found["rows"] for sent in found["sent"]]
                figures[f"{name}: table MiB a rank"] = [found["table"] / 2**20]
            figures[f"{name}: process MiB"] = [found["memory"]]
    return figures


def _worker(job: str, result: str) -> None:
    """One rank."""
    from s3rec_dist.model.s3rec import S3Rec
    from s3rec_dist.tables import ShardedTable
    from s3rec_dist.training.engine import Engine, gather, start
    from s3rec_dist.training.loop import item_table
    from s3rec_dist.training.tracking import peak_memory_mb

    spec = json.loads(Path(job).read_text())
    config: Config = from_dict(spec["config"], job)
    world = start(config.engine)
    stage, n_items = config.finetune, spec["items"]
    model = S3Rec(config.model, n_items, 1, finetune=stage)
    tables: dict[str, ShardedTable] = {}
    if config.model.item_table == "sharded":
        tables["items"] = table = item_table(config, stage, n_items, world.device)
        model.item_rows = table
        for ids, rows in table.whole():
            table.put(ids, {"rows": rows})
    engine = Engine(model, S3Rec.finetune_losses, stage, config.engine, world, tables)
    seconds, cpu, sent, at = [], [], [], 0
    for _ in range(spec["repetitions"] + 1):
        seeds = [(at + i) * world.size + world.rank for i in range(spec["steps"])]
        batches = [_batch(config, n_items, world, seed) for seed in seeds]
        gather(None)
        before, begin, used = engine.table_bytes_sent, time.perf_counter(), time.process_time()
        for batch in batches:
            engine.step([batch], count=len(batch.items) * world.size, learning_rate=1e-3, dropout_seed=at)
            at += 1
        used = (time.process_time() - used) / len(batches)
        cpu.append(statistics.fmean(gather(used)))
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append((time.perf_counter() - begin) / len(batches))
        sent.append(statistics.fmean(gather((engine.table_bytes_sent - before) / len(batches))))
    distinct = len(torch.cat((batches[0].items, batches[0].targets, batches[0].negatives)).unique())
    held = sum(values.nbytes for table in tables.values() for values in table.memory())
    memory = max(gather(peak_memory_mb()))
    engine.close()
    if world.rank == 0:
        found: dict[str, Any] = {"seconds": seconds[1:], "cpu": cpu[1:], "sent": sent[1:]}  # the first one warmed up
        found |= {"rows": distinct, "table": held, "memory": memory}
        Path(result).write_text(json.dumps(found))


def _batch(config: Config, n_items: int, world: World, seed: int) -> Any:
    """This rank's part of a batch, of sequences of full length."""
    from s3rec_dist.data.reconstruct import finetune_batch
    from s3rec_dist.data.stream import PackedSequences

    count, length = config.finetune.batch_size // world.size, config.model.max_length + 1
    items = torch.randint(1, n_items + 1, (count * length,), generator=torch.Generator().manual_seed(seed)).int()
    offsets = torch.arange(count + 1, dtype=torch.int32) * length
    packed = PackedSequences(items, offsets, torch.arange(count) + seed * count, length)
    return finetune_batch(packed.to(world.device), n_items=n_items, key=seed)


if __name__ == "__main__":
    _worker(*sys.argv[1:])
