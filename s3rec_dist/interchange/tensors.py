"""State dicts of others: their names and cuts of our tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from s3rec_dist.export import ExportError

Names = Mapping[str, tuple[str, ...]]
"""Their tensor behind each of ours, or their tensors, stacked by rows."""


def cut(weights: Mapping[str, torch.Tensor], names: Names) -> dict[str, torch.Tensor]:
    """Our weights as they name and cut them, fp32."""
    return {
        part: piece.float().clone()
        for name, parts in names.items()
        for part, piece in zip(parts, weights[name].chunk(len(parts)), strict=True)
    }


def fuse(
    tensors: Mapping[str, torch.Tensor], names: Names, shapes: Mapping[str, Sequence[int]], path: str, expected: str
) -> dict[str, torch.Tensor]:
    """Their tensors under our names and of our ``shapes``, fp32. Raises :class:`ExportError` naming a tensor that is
    missing, unknown or of another shape."""
    known = {part for parts in names.values() for part in parts}
    if missing := known - tensors.keys():
        raise ExportError(f"{path}: has no tensor {min(missing)}; {expected}")
    if unknown := tensors.keys() - known:
        raise ExportError(f"{path}: has a tensor {min(unknown)}, which an S3-Rec model does not; {expected}")
    for name, parts in names.items():
        rows, *rest = shapes[name]
        wanted = [rows // len(parts), *rest]
        for part in parts:
            if list(tensors[part].shape) != wanted:
                raise ExportError(
                    f"{path}: {part} has shape {list(tensors[part].shape)}, expected {wanted}; {expected}"
                )
    return {name: torch.cat([tensors[part].float() for part in parts]) for name, parts in names.items()}


def plain_state_dict(tree: Any, path: str, expected: str) -> dict[str, torch.Tensor]:
    """``tree`` where it is a state dict of dense floats. Raises :class:`ExportError`."""
    if not isinstance(tree, Mapping):
        raise ExportError(f"{path}: holds a {type(tree).__name__}, not a state dict; {expected}")
    for name, value in tree.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            kind = value.type() if isinstance(value, torch.Tensor) else type(value).__name__
            raise ExportError(f"{path}: {name!r} holds a {kind}, not a dense tensor of floats; {expected}")
    return dict(tree)
