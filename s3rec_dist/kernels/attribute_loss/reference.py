"""The loss in plain PyTorch, in tiles: the definition, and the path on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LOGITS_PER_CHUNK = 1 << 22
"""Logits that exist at a time."""

LEAST_ROWS = 512
"""Rows that are worth a product with all attributes; where these do not fit a chunk, attributes too are taken by
tiles."""


def reference_loss(
    hidden: torch.Tensor,
    table: torch.Tensor,
    items: torch.Tensor,
    offsets: torch.Tensor,
    values: torch.Tensor,
    learns_hidden: bool,
    learns_table: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The loss of :func:`~s3rec_dist.kernels.attribute_loss.attribute_loss`, and those gradients that are asked for.

    Reads how many positives there are, which stalls a GPU.
    """
    rows, attributes = attribute_pairs(items, offsets, values)
    height, width = _tile(len(hidden), len(table))
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if learns_hidden else None
    grad_table = torch.zeros_like(table, dtype=torch.float32) if learns_table else None
    # rows ascend, so that a chunk's positives are consecutive
    cuts = torch.searchsorted(rows, torch.arange(0, len(hidden) + height, height, device=rows.device))
    bounds = [0, len(rows)] if len(hidden) <= height else cuts.tolist()
    # fp64, since a sum that grows tile by tile loses what small tiles add
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for i, top in enumerate(range(0, len(hidden), height)):
        part = hidden[top : top + height]
        row, attribute = rows[bounds[i] : bounds[i + 1]] - top, attributes[bounds[i] : bounds[i + 1]]
        grad_part: torch.Tensor | None = None
        for left in range(0, len(table), width):
            tile = table[left : left + width]
            logits = (part @ tile.T).float()
            pairs = row * len(tile) + attribute - left
            if width < len(table):
                pairs = pairs[(attribute >= left) & (attribute < left + len(tile))]
            flat = logits.view(-1)
            flat[pairs] *= -1
            loss += F.softplus(logits).sum()
            if grad_hidden is None and grad_table is None:
                continue
            logits.sigmoid_()
            flat[pairs] *= -1
            grad = logits.to(hidden.dtype)
            if grad_hidden is not None:
                product = (grad @ tile).float()
                grad_part = product if grad_part is None else grad_part.add_(product)
            if grad_table is not None:
                grad_table[left : left + width] += grad.T @ part
        if grad_hidden is not None and grad_part is not None:
            grad_hidden[top : top + height] = grad_part
    return loss.float(), grad_hidden, None if grad_table is None else grad_table.to(table.dtype)


def _tile(rows: int, attributes: int) -> tuple[int, int]:
    """(rows, attributes) of which logits exist at a time: all attributes where they leave room for enough rows."""
    width = min(attributes, max(LOGITS_PER_CHUNK // max(min(rows, LEAST_ROWS), 1), 1))
    return max(LOGITS_PER_CHUNK // max(width, 1), 1), max(width, 1)


def attribute_pairs(
    items: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, attribute) index pairs of the attributes that ``items`` [M] have, int64 [P] each, rows ascending."""
    begins, ends = offsets[items], offsets[items + 1]
    counts = ends - begins
    rows = torch.repeat_interleave(counts)
    place = torch.arange(len(rows), device=items.device)
    into = place + (begins - (counts.cumsum(0) - counts))[rows]
    return rows, values[into].long()
