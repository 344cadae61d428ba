"""The loss in plain PyTorch, in chunks of rows: the definition, and the path on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LOGITS_PER_CHUNK = 1 << 22
"""Logits that exist at a time."""


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
    size = len(table)
    chunk = max(LOGITS_PER_CHUNK // size, 1)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if learns_hidden else None
    grad_table = torch.zeros_like(table, dtype=torch.float32) if learns_table else None
    # rows ascend, so that a chunk's positives are consecutive
    cuts = torch.searchsorted(rows, torch.arange(0, len(hidden) + chunk, chunk, device=rows.device))
    bounds = [0, len(rows)] if len(hidden) <= chunk else cuts.tolist()
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for i, start in enumerate(range(0, len(hidden), chunk)):
        part = hidden[start : start + chunk]
        logits = (part @ table.T).float()
        pairs = (rows[bounds[i] : bounds[i + 1]] - start) * size + attributes[bounds[i] : bounds[i + 1]]
        flat = logits.view(-1)
        flat[pairs] *= -1
        loss += F.softplus(logits).sum()
        if grad_hidden is None and grad_table is None:
            continue
        logits.sigmoid_()
        flat[pairs] *= -1
        grad = logits.to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(grad, table, out=grad_hidden[start : start + chunk])
        if grad_table is not None:
            grad_table += grad.T @ part
    return loss, grad_hidden, None if grad_table is None else grad_table.to(table.dtype)


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
