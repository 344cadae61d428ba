"""Adam's state out of the shards of any world size and ZeRO stage, by the parameters' own names.

With ``model.safetensors`` it is all that a run needs to go on in another layout. DeepSpeed's universal format holds the
same tensors, but knows no stage 0, neither to convert from nor to load into; it has other files for stage 3 than for 1
and 2; and its converter writes four files a parameter from processes of its own. Here the shards are mapped into
memory, on every rank, and nothing is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamState:
    """What Adam knows of each parameter."""

    pieces: dict[str, dict[str, list[torch.Tensor]]]
    """Each moment of a parameter, flat, in one or more parts; parameters that never had a gradient may be missing."""
    step: torch.Tensor | None
    """Steps taken; None before the first."""
    loss_scaler: Any
    """DeepSpeed's, from ZeRO's shards: what fp16 scales the loss by."""

    def moments(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """A parameter's moments in its shape, copied to its device; empty where there are none."""
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 leaves an empty tensor in its place
        found = self.pieces.get(name, {})
        return {key: torch.cat(parts).view(shape).to(parameter.device) for key, parts in found.items()}


def read_adam_state(folder: Path, zero_stage: int, names: Sequence[str]) -> AdamState:
    """The state in a checkpoint's shards, saved at ``zero_stage``; ``names`` are the model's parameters in order."""
    if zero_stage == 0:
        parts = _whole(folder, names)
        scaler = None
    else:
        shards = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder, "optim_states")]
        parts = _of_flat_partitions(shards) if zero_stage < 3 else _of_split_parameters(folder, shards)
        scaler = shards[0]["loss_scaler"]
    pieces: dict[str, dict[str, list[torch.Tensor]]] = {}
    step = None
    for name, state, start, count in parts:
        step = state["step"]
        for key in MOMENTS:
            part = state[key].flatten().narrow(0, start, count)
            pieces.setdefault(name.removeprefix("model."), {}).setdefault(key, []).append(part)
    return AdamState(pieces, step, scaler)


_Parts = Iterator[tuple[str, dict[str, Any], int, int]]
"""(parameter, a state that holds part of its moments, where they start in it, their elements), in order."""


def _whole(folder: Path, names: Sequence[str]) -> _Parts:
    """Stage 0: one file holds every moment whole, by the parameter's number."""
    optimizer = _load(folder / "mp_rank_00_model_states.pt")["optimizer"]
    states = optimizer.get("optimizer_state_dict", optimizer)["state"]  # under DeepSpeed's own in bf16
    for number, state in states.items():
        yield names[number], state, 0, state[MOMENTS[0]].numel()


def _of_flat_partitions(shards: Sequence[dict[str, Any]]) -> _Parts:
    """Stages 1 and 2: all parameters end to end, cut into one part a rank; a shard says what of them is in it."""
    for shard in shards:
        for group, state in shard["base_optimizer_state"]["state"].items():
            for name, address in shard["param_slice_mappings"][group].items():
                yield name, state, address.start, address.numel


def _of_split_parameters(folder: Path, shards: Sequence[dict[str, Any]]) -> _Parts:
    """Stage 3: each parameter cut into one part a rank, the last ones padded; a rank's parts lie end to end."""
    shapes = _load(_by_rank(folder, "model_states")[0])["param_shapes"]
    for rank, shard in enumerate(shards):
        for group, state in shard["optimizer_state_dict"]["state"].items():
            start = 0
            for name, shape in shapes[group].items():
                share = math.ceil(shape.numel() / len(shards))
                yield name, state, start, max(min(share, shape.numel() - rank * share), 0)
                start += share


def _by_rank(folder: Path, kind: str) -> list[Path]:
    found = {
        int(m[1]): path for path in folder.iterdir() if (m := re.search(rf"zero_pp_rank_(\d+)_.*{kind}", path.name))
    }
    return [found[rank] for rank in range(len(found))]


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)  # the manifest has vouched for it
