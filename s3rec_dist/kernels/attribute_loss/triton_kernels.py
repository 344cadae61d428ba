"""The Triton kernels of attribute_loss: a program owns a tile of rows, or of attributes, and goes along the other side.

Both make the logits anew, tile by tile, and what they need of them: ``loss_and_grad_hidden`` the loss and sums over
attributes, ``grad_table`` sums over rows. Which logits of a tile are positives is a word of bits a row, made from the
part of its item's list that lies within the tile. Each number is written by one program, in one order: no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from s3rec_dist.kernels.triton_common import dot

LOG2E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr("tf32x3")
"""Of fp32: products of three halves on tensor cores, within 4e-7; plain fp32 ones spill hundreds of registers here."""
GATHERED = tl.constexpr(8)
"""Attributes of a row that are looked at together."""

COUNTS = ["rows", "attributes", "span", "tiles"]
"""Arguments that change from batch to batch, for which no kernel is compiled anew."""


class Matrix(NamedTuple):
    """Rows of features for a kernel."""

    data: Any
    stride: Any


class Lists(NamedTuple):
    """Pointers to the rows' items and the catalogue's attributes."""

    items: Any
    offsets: Any
    entries: Any


@triton.jit(do_not_specialize=COUNTS)
def loss_and_grad_hidden(
    hidden: Matrix,
    table: Matrix,
    lists: Lists,
    losses: tl.tensor,
    grads: tl.tensor,
    rows: tl.tensor,
    attributes: tl.tensor,
    span: tl.tensor,
    tiles: tl.tensor,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The loss [parts, tiles], and, where ``grads`` [parts, M, E] is given, the gradient of hidden, of a tile of rows
    against a ``span`` of attributes."""
    tile, part = tl.program_id(0), tl.program_id(1)
    row = tile * TILE + tl.arange(0, TILE)
    is_row = row < rows
    states = _load(hidden, row, is_row, E, WIDTH)
    start = part * span
    cursor, end = _list_from(row, is_row, start, lists)
    total = tl.zeros([TILE], tl.float32)
    grad = tl.zeros([TILE, WIDTH], tl.float32)
    for first in range(start, tl.minimum(start + span, attributes), TILE):
        column = first + tl.arange(0, TILE)
        is_column = column < attributes
        vectors = _load(table, column, is_column, E, WIDTH)
        word, cursor = _word(cursor, end, first, lists, TILE)
        is_positive = ((word[:, None] >> tl.arange(0, TILE)[None, :].to(tl.int64)) & 1) != 0
        loss, weight = _loss_and_weight(dot(states, tl.trans(vectors), PRECISION), is_positive)
        total += tl.sum(tl.where(is_column[None, :], loss, 0.0), 1)
        if grads is not None:
            grad += dot(weight.to(vectors.dtype), vectors, PRECISION)
    tl.store(losses + part * tiles + tile, tl.sum(tl.where(is_row, total, 0.0)))
    if grads is not None:
        _store(grads + part.to(tl.int64) * rows * E, row, is_row, grad, E, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def grad_table(
    hidden: Matrix,
    table: Matrix,
    lists: Lists,
    grads: tl.tensor,
    rows: tl.tensor,
    attributes: tl.tensor,
    span: tl.tensor,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The gradient of the table, ``grads`` [parts, A, E], of a tile of attributes against a ``span`` of rows."""
    part = tl.program_id(1)
    first = tl.program_id(0) * TILE
    column = first + tl.arange(0, TILE)
    is_column = column < attributes
    vectors = _load(table, column, is_column, E, WIDTH)
    grad = tl.zeros([TILE, WIDTH], tl.float32)
    start = part * span
    for begin in range(start, tl.minimum(start + span, rows), TILE):
        row = begin + tl.arange(0, TILE)
        is_row = row < rows
        states = _load(hidden, row, is_row, E, WIDTH)
        cursor, end = _list_from(row, is_row, first, lists)
        word, _ = _word(cursor, end, first, lists, TILE)
        # attributes down, rows across: the weights are the product's left side as they are
        is_positive = ((word[None, :] >> tl.arange(0, TILE)[:, None].to(tl.int64)) & 1) != 0
        _, weight = _loss_and_weight(dot(vectors, tl.trans(states), PRECISION), is_positive)
        grad += dot(weight.to(states.dtype), states, PRECISION)
    _store(grads + part.to(tl.int64) * attributes * E, column, is_column, grad, E, WIDTH)


@triton.jit
def _loss_and_weight(logits: tl.tensor, is_positive: tl.tensor) -> tl.tensor:
    """softplus of each logit, of a positive negated, and its derivative."""
    x = tl.where(is_positive, -logits, logits)
    decay = tl.exp2(tl.abs(x) * -LOG2E)  # exp(-|x|)
    loss = tl.maximum(x, 0.0) + _log1p(decay)
    weight = tl.where(x >= 0, 1.0, decay) / (1.0 + decay)
    return loss, tl.where(is_positive, -weight, weight)


@triton.jit
def _log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) for x from 0 to 1, within 2.1e-7 of itself however small: ``tl.log`` has no such form."""
    y = x * 0.0052326880395412445 - 0.029505213722586632
    y = y * x + 0.07822591066360474
    y = y * x - 0.13663242757320404
    y = y * x + 0.19106005132198334
    y = y * x - 0.2484298199415207
    y = y * x + 0.3331909775733948
    y = y * x - 0.4999949336051941
    y = y * x + 0.9999999403953552
    return y * x


@triton.jit
def _list_from(row: tl.tensor, is_row: tl.tensor, first: tl.tensor, lists: Lists) -> tl.tensor:
    """Of each row's list in ``values``: the place of its first attribute that is not below ``first``, and its end."""
    item = tl.load(lists.items + row, mask=is_row, other=0).to(tl.int64)
    low = tl.load(lists.offsets + item, mask=is_row, other=0)
    end = tl.load(lists.offsets + item + 1, mask=is_row, other=0)
    high = end
    longest = tl.max(end - low)
    while longest > 0:
        middle = (low + high) >> 1
        is_below = tl.load(lists.entries + middle, mask=low < high, other=first) < first
        high = tl.where(is_below, high, middle)
        low = tl.where(is_below, middle + 1, low)
        longest >>= 1
    return low, end


@triton.jit
def _word(cursor: tl.tensor, end: tl.tensor, first: tl.tensor, lists: Lists, TILE: tl.constexpr) -> tl.tensor:
    """A word for each row, int64: bit c is set if ``first + c`` is in its list. Also moves the cursor behind them."""
    word = cursor * 0
    found = tl.max(word) + GATHERED
    while found == GATHERED:
        at = cursor[:, None] + tl.arange(0, GATHERED)[None, :]
        bit = tl.load(lists.entries + at, mask=at < end[:, None], other=first + TILE).to(tl.int64) - first
        is_inside = bit < TILE
        word += tl.sum(tl.where(is_inside, (bit * 0 + 1) << (bit & 63), 0), 1)  # none twice
        count = tl.sum(is_inside.to(tl.int64), 1)
        cursor += count
        found = tl.max(count)
    return word, cursor


@triton.jit
def _load(x: Matrix, rows: tl.tensor, wanted: tl.tensor, E: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    feature = tl.arange(0, WIDTH)[None, :]
    at = x.data + rows.to(tl.int64)[:, None] * x.stride + feature
    return tl.load(at, mask=wanted[:, None] & (feature < E), other=0.0)


@triton.jit
def _store(
    data: tl.tensor, rows: tl.tensor, wanted: tl.tensor, values: tl.tensor, E: tl.constexpr, WIDTH: tl.constexpr
) -> None:
    feature = tl.arange(0, WIDTH)[None, :]
    at = data + rows.to(tl.int64)[:, None] * E + feature
    tl.store(at, values.to(data.dtype.element_ty), mask=wanted[:, None] & (feature < E))
