"""A small model over a sharded table, and a worker that trains it on several processes.

python steps.py, one process a rank with RANK, WORLD_SIZE, ... in the environment; rank 0 prints JSON.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from toy import BATCH, LEARNING_RATE, ROWS, ToyLosses, batch_of

from s3rec_dist.config import EngineConfig, PretrainConfig
from s3rec_dist.tables import ShardedTable, TableSpec
from s3rec_dist.training.engine import Engine, World, gather, start

FEATURES = 8
BREAKS = ("loss", "rows", "dense")
"""What is not a finite number: the loss, or of a finite loss the gradient of rows alone, or of the others alone."""


class Model(nn.Module):
    """A layer over rows of a table."""

    def __init__(self, table: ShardedTable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = table
        self.layer = nn.Linear(FEATURES, FEATURES)
        self.outside = nn.Linear(FEATURES, 4)

    def losses(self, batch: tuple[str, torch.Tensor], dropout_seed: int | None) -> ToyLosses:
        """Those of the rows that a batch names, broken as it says."""
        how, ids = batch
        distinct, place = ids.unique(return_inverse=True)
        rows = self.table.fetch(distinct)
        hidden = self.layer(rows[place].to(self.layer.weight.dtype)).tanh()
        scores = nn.functional.linear(hidden, self.outside.weight, self.outside.bias).float()
        total = (scores - 1).square().sum()
        if how == "loss":
            total = total * 1e38 * 1e38
        if how in ("rows", "dense"):
            part = rows if how == "rows" else self.layer.weight
            total = total + (part.float().sum() * 0).sqrt()  # 0 times infinity
        return ToyLosses(total, {"square": total.detach()}, {"square": len(ids)})


def make_engine(
    world: World,
    *,
    zero: int = 0,
    precision: Any = "fp32",
    accumulation: int = 1,
    capacity: int = 0,
    optimizer: str = "lazy_adam",
    clipping: float = 0.0,
) -> Engine:
    spec = TableSpec(rows=ROWS, features=FEATURES, optimizer=optimizer, capacity=capacity, initial_std=0.5)
    table = ShardedTable.among_ranks(spec, device="cpu")
    stage = PretrainConfig(
        batch_size=BATCH,
        gradient_accumulation=accumulation,
        learning_rate=LEARNING_RATE,
        gradient_clipping=clipping,
    )
    config = EngineConfig(device="cpu", threads=1, zero_stage=zero, precision=precision)
    return Engine(Model(table), Model.losses, stage, config, world, {"items": table})


def parts_of(step: int, world: World, how: str = "", accumulation: int = 1) -> list[tuple[str, torch.Tensor]]:
    """This rank's micro-batches, the first of which breaks."""
    first, *others = batch_of(step)[world.rank :: world.size].chunk(accumulation)
    return [(how, first), *(("", part) for part in others)]


def held(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of all that a step changes, DeepSpeed's optimizer aside, on this rank."""
    table = engine.tables["items"]
    found = {name: values.clone() for name, values in table.tensors().items() if name != "used_at"}
    whole = torch.cat([rows for _, rows in table.whole()])
    return {**engine.fp32_weights(everywhere=True), **found, "whole": whole, "steps": torch.tensor([table.steps])}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def skips(world: World) -> dict[str, Any]:
    """What differs, by rank, where steps break on the last rank: after such a step, and in the end."""
    wanted: list[dict[str, Any]] = [{"zero": zero} for zero in range(4)]
    wanted += [{**each, "precision": "bf16", "accumulation": 2} for each in wanted] + [{"capacity": 40}]
    return {str(settings): gather(_skipped(world, settings)) for settings in wanted}


def _skipped(world: World, settings: dict[str, Any]) -> list[str]:
    found, ends = [], []
    accumulation = settings.get("accumulation", 1)
    for breaks in ({}, dict(zip((1, 4, 5), BREAKS, strict=True))):
        engine = make_engine(world, **settings)
        curve = []
        for step in range(7):
            if how := breaks.get(step):
                before = held(engine)
                broken = parts_of(step, world, how if world.rank == world.size - 1 else "", accumulation)
                if not engine.step(broken, count=BATCH, learning_rate=LEARNING_RATE).skipped:
                    found.append(f"{how} was not skipped")
                if "capacity" not in settings:  # else other rows have made room for this step's
                    after = {name: values[: len(before[name])] for name, values in held(engine).items()}
                    found += [f"{name} after {how}" for name in differing(after, before)]
            result = engine.step(parts_of(step, world, "", accumulation), count=BATCH, learning_rate=LEARNING_RATE)
            if result.skipped:
                found.append(f"step {step} was skipped")
            curve.append(sum(part.total.item() for part in result.losses))
        ends.append({**held(engine), "curve": torch.tensor(curve)})
        engine.close()
    return found + [f"{name} in the end" for name in differing(*ends)]


def clips(world: World) -> dict[str, Any]:
    """Norms of a step's gradients by the limit: none, twice that of the table's, and half of it."""
    none = _clipped(world, 0.0)
    return {"none": none, "twice": _clipped(world, 2 * none["rows"]), "half": _clipped(world, none["rows"] / 2)}


def _clipped(world: World, limit: float) -> dict[str, Any]:
    """The norm of what the table's rows were changed by, and that of the whole gradient before clipping."""
    engine = make_engine(world, optimizer="sgd", clipping=limit)
    before = held(engine)["whole"]
    result = engine.step(parts_of(0, world), count=BATCH, learning_rate=LEARNING_RATE, with_norm=True)
    gradient = (before - held(engine)["whole"]) / LEARNING_RATE
    engine.close()
    return {"rows": math.sqrt(sum(gather(float(gradient.square().sum())))), "all": result.gradient_norm}


def main() -> None:
    world = start(EngineConfig(device="cpu", threads=1))
    found = {"skips": skips(world), "clips": clips(world)}
    if world.rank == 0:
        print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
