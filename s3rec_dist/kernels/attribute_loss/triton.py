"""Launches the kernels of triton_kernels.py, cut so that they fill a GPU whatever the shape, and sums their parts."""

from __future__ import annotations

import torch
import triton

from s3rec_dist.kernels.attribute_loss import triton_kernels
from s3rec_dist.kernels.attribute_loss.triton_kernels import Lists, Matrix

PROGRAMS = 256
"""Where a kernel has fewer tiles than this, several programs share a tile's work; a constant, so that every GPU sums in
the same order."""
TILE = {2: 64, 4: 32}
"""Most rows of a tile, by the bytes of an element; 64 have their bits in a word."""
TILE_BYTES = 16 << 10
"""Most bytes of a tile of rows, unless that has but 16: of what registers and 99 KiB of shared memory hold."""


def triton_loss(
    hidden: torch.Tensor,
    table: torch.Tensor,
    items: torch.Tensor,
    offsets: torch.Tensor,
    values: torch.Tensor,
    learns_hidden: bool,
    learns_table: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """See :func:`s3rec_dist.kernels.attribute_loss.reference.reference_loss`."""
    rows, attributes, features = len(hidden), len(table), hidden.shape[1]
    width = max(16, triton.next_power_of_2(features))
    size = hidden.element_size()
    tile = max(16, min(TILE[size], TILE_BYTES // (width * size)))
    lists = Lists(items.contiguous(), offsets.contiguous(), values.contiguous())
    matrices = (_matrix(hidden), _matrix(table), lists)
    constants = {"E": features, "WIDTH": width, "TILE": tile, "num_warps": 8 if width > 128 else 4, "num_stages": 2}

    tiles = triton.cdiv(rows, tile)
    parts, span = _split(tiles, attributes, tile)
    losses = torch.empty((parts, tiles), dtype=torch.float32, device=hidden.device)
    grads = _partial(hidden, parts) if learns_hidden else None
    if tiles:
        triton_kernels.loss_and_grad_hidden[(tiles, parts)](
            *matrices, losses, grads, rows, attributes, span, tiles, **constants
        )
    grad_hidden = None if grads is None else _summed(grads, hidden.dtype)
    if not learns_table:
        return losses.sum(), grad_hidden, None

    tiles = triton.cdiv(attributes, tile)
    parts, span = _split(tiles, rows, tile)
    grads = _partial(table, parts)
    triton_kernels.grad_table[(tiles, parts)](*matrices, grads, rows, attributes, span, **constants)
    return losses.sum(), grad_hidden, _summed(grads, table.dtype)


def _split(tiles: int, length: int, tile: int) -> tuple[int, int]:
    """Into how many parts the way of each tile along the other side is cut, and a part's length, whole tiles of it."""
    steps = triton.cdiv(length, tile)
    share = max(triton.cdiv(steps * tiles, PROGRAMS), 1)  # steps of a program
    return max(triton.cdiv(steps, share), 1), share * tile


def _partial(x: torch.Tensor, parts: int) -> torch.Tensor:
    """Room for the parts of the gradient of ``x``; fp32, unless there is but one."""
    dtype = torch.float32 if parts > 1 else x.dtype
    return torch.empty((parts, *x.shape), dtype=dtype, device=x.device)


def _summed(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def _matrix(x: torch.Tensor) -> Matrix:
    if x.stride(1) != 1:
        x = x.contiguous()
    return Matrix(x, x.stride(0))
