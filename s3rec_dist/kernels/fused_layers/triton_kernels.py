"""The Triton kernels of fused_layers: a program owns some rows of a packed [T, E] tensor.

Rows with dropout are tiles [rows, words, 4]: the four features of a word share one hash, see ``hashing.keep_mask``.
The forward kernels have a program for each tile. The backward kernels have a few hundred programs at most, each with
every so manieth tile; what belongs to a parameter is summed within a program, and ``sum_partials`` adds up the
programs. Each number is written by one program, in one order: no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from s3rec_dist.kernels.triton_common import dot, hash64

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_TAU = tl.constexpr(2.5066282746310002)

TOKENS = ["tokens"]
"""Changes from batch to batch: no kernel is compiled anew for it."""


class Dropout(NamedTuple):
    """Which features are dropped, for a kernel."""

    keys: Any
    """int64 [T] or None."""
    first_word: Any
    threshold: Any
    """A feature is kept if its lane, a signed 16-bit integer, is not below."""
    scale: Any


class Tile(NamedTuple):
    """Rows of a [T, E] tensor, as [rows, words, 4]."""

    rows: Any
    is_row: Any
    features: Any
    """[words, 4]."""
    at: Any
    """Offsets into the tensor, int64."""
    inside: Any


@triton.jit(do_not_specialize=TOKENS)
def add_norm(
    x: tl.tensor,
    x_bias: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    dropout: Dropout,
    eps: tl.tensor,
    tokens: tl.tensor,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    tile = _tile(tl.program_id(0) * ROWS, tokens, E, ROWS, WORDS)
    dropped = _drop(_load(x, tile) + _parameter(x_bias, tile, E), tile, dropout, WORDS)
    normed, row_mean, row_rstd = _normalize(_load(residual, tile) + dropped, tile, eps, E)
    _store(out, tile, normed * _parameter(weight, tile, E) + _parameter(bias, tile, E))
    tl.store(mean + tile.rows, row_mean, mask=tile.is_row)
    tl.store(rstd + tile.rows, row_rstd, mask=tile.is_row)


@triton.jit(do_not_specialize=TOKENS)
def add_norm_backward(
    grad_out: tl.tensor,
    x: tl.tensor,
    x_bias: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    grad_x: tl.tensor,
    grad_residual: tl.tensor,
    partials: tl.tensor,
    dropout: Dropout,
    tokens: tl.tensor,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """``partials`` [programs, 3, E]: what a program's rows give to the gradients of weight, bias and x_bias."""
    for_weight = tl.zeros([ROWS, WORDS, 4], tl.float32)
    for_bias = tl.zeros([ROWS, WORDS, 4], tl.float32)
    for_x_bias = tl.zeros([ROWS, WORDS, 4], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        tile = _tile(start, tokens, E, ROWS, WORDS)
        dropped = _drop(_load(x, tile) + _parameter(x_bias, tile, E), tile, dropout, WORDS)
        grad = _load(grad_out, tile)
        grad_sum, normed = _normalize_backward(grad, _load(residual, tile) + dropped, weight, mean, rstd, tile, E)
        grad_dropped = _drop(grad_sum, tile, dropout, WORDS)
        _store(grad_residual, tile, grad_sum)
        _store(grad_x, tile, grad_dropped)
        for_weight += grad * normed
        for_bias += grad
        for_x_bias += grad_dropped
    tile = _tile(0, tokens, E, ROWS, WORDS)
    _store_partial(partials, 3, 0, for_weight, tile, E)
    _store_partial(partials, 3, 1, for_bias, tile, E)
    _store_partial(partials, 3, 2, for_x_bias, tile, E)


@triton.jit(do_not_specialize=TOKENS)
def embed(
    items: tl.tensor,
    positions: tl.tensor,
    item_table: tl.tensor,
    position_table: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    dropout: Dropout,
    eps: tl.tensor,
    tokens: tl.tensor,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    tile = _tile(tl.program_id(0) * ROWS, tokens, E, ROWS, WORDS)
    both = _look_up(item_table, items, tile, E) + _look_up(position_table, positions, tile, E)
    normed, row_mean, row_rstd = _normalize(both, tile, eps, E)
    normed = normed * _parameter(weight, tile, E) + _parameter(bias, tile, E)
    _store(out, tile, _drop(normed, tile, dropout, WORDS))
    tl.store(mean + tile.rows, row_mean, mask=tile.is_row)
    tl.store(rstd + tile.rows, row_rstd, mask=tile.is_row)


@triton.jit(do_not_specialize=TOKENS)
def embed_backward(
    grad_out: tl.tensor,
    items: tl.tensor,
    positions: tl.tensor,
    item_table: tl.tensor,
    position_table: tl.tensor,
    weight: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    grad_rows: tl.tensor,
    partials: tl.tensor,
    dropout: Dropout,
    tokens: tl.tensor,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """``grad_rows`` [T, E]: gradient of each token's two rows. ``partials`` [programs, 2, E]: of weight and bias."""
    for_weight = tl.zeros([ROWS, WORDS, 4], tl.float32)
    for_bias = tl.zeros([ROWS, WORDS, 4], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        tile = _tile(start, tokens, E, ROWS, WORDS)
        both = _look_up(item_table, items, tile, E) + _look_up(position_table, positions, tile, E)
        grad = _drop(_load(grad_out, tile), tile, dropout, WORDS)
        grad_both, normed = _normalize_backward(grad, both, weight, mean, rstd, tile, E)
        _store(grad_rows, tile, grad_both)
        for_weight += grad * normed
        for_bias += grad
    tile = _tile(0, tokens, E, ROWS, WORDS)
    _store_partial(partials, 2, 0, for_weight, tile, E)
    _store_partial(partials, 2, 1, for_bias, tile, E)


@triton.jit(do_not_specialize=TOKENS)
def sum_by_position(
    grad_rows: tl.tensor,
    positions: tl.tensor,
    partials: tl.tensor,
    tokens: tl.tensor,
    L: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    """``partials`` [programs, L, E]: sums of a program's rows by position, as products with matrices of ones."""
    places = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    features = tl.program_id(2) * FEATURES + tl.arange(0, FEATURES)
    is_feature = features < E
    total = tl.zeros([PLACES, FEATURES], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        place = tl.load(positions + rows, mask=rows < tokens, other=-1)
        here = (place >= tl.program_id(1) * PLACES) & (place < (tl.program_id(1) + 1) * PLACES)
        if tl.max(here.to(tl.int32), 0) > 0:
            at = rows.to(tl.int64)[:, None] * E + features[None, :]
            grad = tl.load(grad_rows + at, mask=here[:, None] & is_feature[None, :], other=0.0)
            total += dot((places[:, None] == place[None, :]).to(tl.float32).to(grad.dtype), grad)
    at = (tl.program_id(0) * L + places)[:, None] * E + features[None, :]
    tl.store(partials + at, total, mask=(places < L)[:, None] & is_feature[None, :])


@triton.jit(do_not_specialize=TOKENS)
def bias_gelu(
    x: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = (rows < tokens)[:, None] & (features < F)[None, :]
    at = rows.to(tl.int64)[:, None] * F + features[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + features, mask=features < F, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, (value * _normal(value)).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=TOKENS)
def bias_gelu_backward(
    grad_out: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    grad_x: tl.tensor,
    partials: tl.tensor,
    tokens: tl.tensor,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    """``partials`` [programs, F]: what a program's rows give to the gradient of the bias."""
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    is_feature = features < F
    added = tl.load(bias + features, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < tokens)[:, None] & is_feature[None, :]
        at = rows.to(tl.int64)[:, None] * F + features[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + added
        slope = _normal(value) + value * tl.exp(-0.5 * value * value) / SQRT_TAU
        grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        total += grad
    tl.store(partials + tl.program_id(0) * F + features, tl.sum(total, 0), mask=is_feature)


@triton.jit
def sum_partials(
    partials: tl.tensor,
    out: tl.tensor,
    programs: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    """``out`` [width]: sums over the rows of ``partials`` [programs, width]."""
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    is_feature = features < width
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * width + features[None, :]
        total += tl.load(partials + at, mask=(rows < programs)[:, None] & is_feature[None, :], other=0.0)
    tl.store(out + features, tl.sum(total, 0).to(out.dtype.element_ty), mask=is_feature)


@triton.jit
def _tile(start: tl.tensor, tokens: tl.tensor, E: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr) -> Tile:
    rows = start + tl.arange(0, ROWS)
    features = 4 * tl.arange(0, WORDS)[:, None] + tl.arange(0, 4)[None, :]
    is_row = rows < tokens
    inside = is_row[:, None, None] & (features < E)[None, :, :]
    return Tile(rows, is_row, features, rows.to(tl.int64)[:, None, None] * E + features[None, :, :], inside)


@triton.jit
def _load(x: tl.tensor, tile: Tile) -> tl.tensor:
    return tl.load(x + tile.at, mask=tile.inside, other=0.0).to(tl.float32)


@triton.jit
def _store(x: tl.tensor, tile: Tile, values: tl.tensor) -> None:
    tl.store(x + tile.at, values.to(x.dtype.element_ty), mask=tile.inside)


@triton.jit
def _parameter(parameter: tl.tensor, tile: Tile, E: tl.constexpr) -> tl.tensor:
    """A parameter [E] beside each row: [1, words, 4]."""
    return tl.load(parameter + tile.features, mask=tile.features < E, other=0.0).to(tl.float32)[None, :, :]


@triton.jit
def _look_up(table: tl.tensor, indices: tl.tensor, tile: Tile, E: tl.constexpr) -> tl.tensor:
    """The row of ``table`` [N, E] that each of the tile's rows names."""
    index = tl.load(indices + tile.rows, mask=tile.is_row, other=0).to(tl.int64)
    at = index[:, None, None] * E + tile.features[None, :, :]
    return tl.load(table + at, mask=tile.inside, other=0.0).to(tl.float32)


@triton.jit
def _drop(values: tl.tensor, tile: Tile, dropout: Dropout, WORDS: tl.constexpr) -> tl.tensor:
    if dropout.keys is None:
        return values
    else:
        key = tl.load(dropout.keys + tile.rows, mask=tile.is_row, other=0)
        word = dropout.first_word + tl.arange(0, WORDS)
        lanes = hash64(key[:, None], word.to(tl.int64)[None, :])
        shift = 48 - 16 * tl.arange(0, 4)
        kept = ((lanes[:, :, None] << shift.to(tl.int64)[None, None, :]) >> 48) >= dropout.threshold
        return tl.where(kept, values * dropout.scale, 0.0)


@triton.jit
def _normalize(values: tl.tensor, tile: Tile, eps: tl.tensor, E: tl.constexpr) -> tl.tensor:
    """The rows with mean 0 and variance 1, their means, and the inverses of their deviations."""
    mean = tl.sum(tl.sum(values, 2), 1) / E
    centred = tl.where(tile.inside, values - mean[:, None, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(tl.sum(centred * centred, 2), 1) / E + eps)
    return centred * rstd[:, None, None], mean, rstd


@triton.jit
def _normalize_backward(
    grad: tl.tensor,
    values: tl.tensor,
    weight: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    tile: Tile,
    E: tl.constexpr,
) -> tl.tensor:
    """The gradient of the rows that were normalised, and what they were then."""
    row_mean = tl.load(mean + tile.rows, mask=tile.is_row, other=0.0)[:, None, None]
    row_rstd = tl.load(rstd + tile.rows, mask=tile.is_row, other=0.0)[:, None, None]
    normed = tl.where(tile.inside, (values - row_mean) * row_rstd, 0.0)
    scaled = grad * _parameter(weight, tile, E)
    along = tl.sum(tl.sum(scaled * normed, 2), 1)[:, None, None] / E
    shared = tl.sum(tl.sum(scaled, 2), 1)[:, None, None] / E
    return (scaled - shared - normed * along) * row_rstd, normed


@triton.jit
def _store_partial(
    partials: tl.tensor, COUNT: tl.constexpr, WHICH: tl.constexpr, values: tl.tensor, tile: Tile, E: tl.constexpr
) -> None:
    at = (tl.program_id(0) * COUNT + WHICH) * E + tile.features
    tl.store(partials + at, tl.sum(values, 0), mask=tile.features < E)


@triton.jit
def _normal(x: tl.tensor) -> tl.tensor:
    """The probability that a standard normal number is below x."""
    return 0.5 * (1 + tl.erf(x * SQRT_HALF))
