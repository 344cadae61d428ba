"""A small model with the shape of the real one's interface, and a worker that trains it on several processes.

python toy.py MODE FOLDER, one process a rank with RANK, WORLD_SIZE, ... in the environment; rank 0 prints JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s3rec_dist.config import EngineConfig, PretrainConfig
from s3rec_dist.training import checkpoint
from s3rec_dist.training.engine import Engine, World, gather, on_rank_zero, start, together

ROWS, BATCH = 50, 12
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class ToyLosses:
    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    counts: dict[str, int]


class Toy(nn.Module):
    """An embedding, a layer used as a module, one used through its weight as fused projections are, one unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(ROWS, 8)
        self.layer = nn.Linear(8, 8)
        self.outside = nn.Linear(8, 4)
        self.unused = nn.Linear(3, 3)

    def losses(self, batch: torch.Tensor, dropout_seed: int | None) -> ToyLosses:
        hidden = self.layer(self.embedding(batch)).tanh()
        scores = nn.functional.linear(hidden, self.outside.weight, self.outside.bias).float()
        total = (scores - 1).square().sum()
        return ToyLosses(total, {"square": total.detach()}, {"square": len(batch)})


def breaking_losses(model: Toy, batch: tuple[str, torch.Tensor], dropout_seed: int | None) -> ToyLosses:
    """Those of a batch whose loss, or the gradient of whose finite loss, is beyond the finite numbers."""
    how, rows = batch
    found = model.losses(rows, dropout_seed)
    if how == "loss":
        return ToyLosses(found.total * 1e38 * 1e38, {"square": found.terms["square"] * 1e38 * 1e38}, found.counts)
    if how == "gradient":
        return ToyLosses(found.total + (found.total * 0).sqrt(), found.terms, found.counts)  # 0 times infinity
    return found


def batch_of(step: int) -> torch.Tensor:
    """The global batch of a step; row numbers repeat."""
    return torch.randint(0, ROWS, (BATCH,), generator=torch.Generator().manual_seed(step))


def make_engine(
    world: World,
    *,
    stage: int = 0,
    precision: Any = "fp32",
    offload: Any = "none",
    accumulation: int = 1,
    losses: Any = Toy.losses,
    **settings: Any,
) -> Engine:
    train = PretrainConfig(
        batch_size=BATCH, gradient_accumulation=accumulation, learning_rate=LEARNING_RATE, **settings
    )
    config = EngineConfig(device="cpu", threads=1, zero_stage=stage, precision=precision, offload=offload)
    return Engine(Toy(), losses, train, config, world)


def train(engine: Engine, steps: range, *, accumulation: int = 1, with_norm: bool = False) -> list[list[float]]:
    """[loss, gradient norm] of each step; rank 0 takes the whole of each third batch, else each rank its share."""
    rank, size = engine.world.rank, engine.world.size
    curve = []
    for step in steps:
        batch = batch_of(step)
        own = batch[rank::size] if step % 3 else batch[: BATCH if rank == 0 else 0]
        cuts = [len(own) * i // accumulation for i in range(accumulation + 1)]
        parts = [own[a:b] for a, b in itertools.pairwise(cuts)]
        result = engine.step(parts, count=BATCH, learning_rate=LEARNING_RATE, with_norm=with_norm)
        total = sum(gather(float(sum(part.total.detach() for part in result.losses))))
        curve.append([total / BATCH, result.gradient_norm or 0.0])
    return curve


def curves(world: World) -> dict[str, Any]:
    """Loss curves for every ZeRO stage, plain, clipped and accumulated."""
    found = {}
    for stage in range(4):
        for name, settings in {
            "plain": {},
            "clipped": {"gradient_clipping": 0.05},
            "accumulated": {"accumulation": 3},
        }.items():
            engine = make_engine(world, stage=stage, **settings)
            accumulation = settings.get("accumulation", 1)
            found[f"{name} {stage}"] = train(engine, range(12), accumulation=accumulation, with_norm=True)
            engine.close()
    return found


def skips(world: World) -> dict[str, Any]:
    """Whether steps that break on the last rank are skipped on all, and leave losses and weights as they would be."""
    return {
        f"{precision}, stage {stage}": gather(_skipped(world, stage, precision, accumulation))
        for stage in range(4)
        for precision, accumulation in (("fp32", 1), ("bf16", 2))
    }


def _skipped(world: World, stage: int, precision: str, accumulation: int) -> list[bool]:
    weights, curves, skipped = [], [], []
    for breaks in ({}, {1: "loss", 4: "gradient"}):
        engine = make_engine(world, stage=stage, precision=precision, accumulation=accumulation, losses=breaking_losses)
        curve = []
        for step in range(6):
            own = batch_of(step)[world.rank :: world.size]
            parts = own.chunk(accumulation)
            if step in breaks:
                how = breaks[step] if world.rank == world.size - 1 else ""
                broken = [(how, parts[0]), *(("", part) for part in parts[1:])]
                result = engine.step(broken, count=BATCH, learning_rate=LEARNING_RATE)
                skipped.append(bool(result.skipped))
            result = engine.step([("", part) for part in parts], count=BATCH, learning_rate=LEARNING_RATE)
            skipped.append(not result.skipped)
            curve.append(sum(part.total.item() for part in result.losses))
        weights.append(engine.fp32_weights(everywhere=True))
        curves.append(curve)
        engine.close()
    same = all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    return [all(skipped), curves[0] == curves[1], same]


def failures(world: World) -> dict[str, Any]:
    """What each rank sees where one rank fails."""

    def attempt(call: Any) -> list[str]:
        try:
            call()
        except Exception as error:
            return gather(f"{type(error).__name__}: {error}")
        return gather("nothing")

    def fail_on(rank: int) -> None:
        with together():
            if world.rank == rank:
                raise ValueError(f"rank {rank} has no luck")

    def fail_on_zero() -> None:
        raise ValueError("rank 0 has no luck")

    return {
        "together": attempt(lambda: fail_on(1)),
        "on_rank_zero": attempt(lambda: on_rank_zero(fail_on_zero)),
        "result": gather(on_rank_zero(lambda: world.rank)),
    }


def saves(world: World, folder: Path) -> dict[str, Any]:
    """Checkpoints on several ranks: one that is resumed from, and one that rank 1 cannot write."""
    found: dict[str, Any] = {}
    for stage in range(4):
        place = folder / str(stage)
        engine = make_engine(world, stage=stage)
        saver = checkpoint.Saver(engine, place, background=True)
        train(engine, range(4))
        saver.begin(state_of(engine, 4), keep=2)
        going_on = train(engine, range(4, 8))
        saver.wait()
        written = saver.outcome()
        (blocked := _Full(world.rank == 1 and stage > 0)).install()
        saver.begin(state_of(engine, 8), keep=2)
        saver.close()
        blocked.remove()
        errors = gather(str(saver.outcome()))
        engine.close()
        again = make_engine(world, stage=stage)
        newest = checkpoint.newest(place)
        assert newest is not None
        checkpoint.load(again, newest)
        found[str(stage)] = {
            "written": gather(written),
            "errors": errors,
            "tag": newest.folder.name,
            "same": train(again, range(newest.state["step"], 8)) == going_on[newest.state["step"] - 4 :],
            "files": sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()),
        }
        again.close()
    return found


class _Full:
    """torch.save that finds the disk full."""

    def __init__(self, on: bool) -> None:
        self._on, self._save = on, torch.save

    def install(self) -> None:
        def fail(*arguments: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        if self._on:
            torch.save = fail

    def remove(self) -> None:
        torch.save = self._save


def state_of(engine: Engine, step: int) -> dict[str, Any]:
    return {"step": step, "stage": "pretrain", **checkpoint.run_layout(engine)}


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    world = start(EngineConfig(device="cpu", threads=1))
    found = {"curves": curves, "failures": failures, "skips": skips, "saves": lambda w: saves(w, folder)}[mode](world)
    if world.rank == 0:
        print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
