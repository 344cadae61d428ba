"""The Triton kernels of masked_attention: a program owns a tile of consecutive packed tokens of one head.

Sequences are short, so a tile holds many. Row i may look at keys ``first[i]`` to ``limit[i] - 1``, which says in two
numbers which sequence it is in, how long that is and whether it is causal; a tile's keys run from the first of its
rows' to the last. Rows find their sequence by a binary search in cu_seqlens, so nothing is prepared and nothing is
read by the host.

``forward`` takes a tile of queries and runs an online softmax over its keys. The backward pass computes the
probabilities again from the log-sum-exp: ``backward`` takes the whole sequences that start in a stretch of tokens, few
enough to fit a tile, and gives their dq, dk and dv; for longer sequences there are ``backward_dq``, by tiles of
queries, and ``backward_dkdv``, by tiles of keys. Each number is written by one program, in one order: no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from s3rec_dist.kernels.triton_common import dot, hash64

LOG2E = tl.constexpr(1.4426950408889634)
NO_KEY = tl.constexpr(float("-inf"))
HEAD_STRIDE = tl.constexpr(1 << 32)

COUNTS = ["queries", "sequences", "stretch"]
"""Arguments that change from batch to batch, for which no kernel is compiled anew."""


class Packed(NamedTuple):
    """A [T, H, D] tensor for a kernel."""

    data: Any
    token_stride: Any
    head_stride: Any


class Batch(NamedTuple):
    """Where sequences are and which of their probabilities count, for a kernel: pointers, numbers, constants."""

    cu_q: Any
    cu_k: Any
    causal_each: Any
    """uint8 [B] or None."""
    key_valid: Any
    """uint8 [T] or None."""
    dropout_keys: Any
    """int64 [B] or None."""
    scale: Any
    keep_scale: Any
    threshold: Any
    """A probability is kept if its lane, a signed 16-bit integer, is not below."""
    CAUSAL: Any
    BITS: Any
    """Key positions whose dropout bits are made together, one word a row: a power of two from 16 to 64."""
    SHORT: Any
    """Whether no sequence has more than ``BITS`` positions."""


@triton.jit(do_not_specialize=COUNTS)
def forward(
    q: Packed,
    k: Packed,
    v: Packed,
    out: Packed,
    lse: tl.tensor,
    batch: Batch,
    queries: tl.tensor,
    sequences: tl.tensor,
    D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    rows = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    is_query = rows < queries
    first, limit, row_hash = _queries(rows, queries, head, batch, sequences)
    query = _load(q, rows, is_query, head, D)
    top = tl.full([TILE_Q], NO_KEY, tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    mixed = tl.zeros([TILE_Q, D], tl.float32)
    stop = tl.max(limit)
    for start in range(tl.min(first), stop, TILE_K):
        columns = start + tl.arange(0, TILE_K)
        is_key = _keys(columns, stop, batch)
        key = _load(k, columns, is_key, head, D)
        value = _load(v, columns, is_key, head, D)
        scores = dot(query, tl.trans(key)) * (batch.scale * LOG2E)
        scores = tl.where(_allowed(first, limit, columns, is_key), scores, NO_KEY)
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == NO_KEY, 0.0, higher)
        shrink = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if batch.dropout_keys is not None:
            weights = tl.where(_kept(row_hash, first, columns, start, batch), weights, 0.0)
        mixed = mixed * shrink[:, None] + dot(weights.to(value.dtype), value)
        top = higher
    total = tl.where(total > 0, total, 1.0)  # a row without any key gives zeros
    mixed *= (batch.keep_scale / total)[:, None]
    _store(out, rows, is_query, head, mixed, D)
    at = lse + head.to(tl.int64) * queries + rows
    tl.store(at, top + tl.log2(total), mask=is_query)


@triton.jit(do_not_specialize=COUNTS)
def backward(
    q: Packed,
    k: Packed,
    v: Packed,
    grad_out: Packed,
    lse: tl.tensor,
    dq: Packed,
    dk: Packed,
    dv: Packed,
    batch: Batch,
    stretch: tl.tensor,
    queries: tl.tensor,
    sequences: tl.tensor,
    D: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """All gradients of the sequences that start in this program's stretch of tokens."""
    head = tl.program_id(1)
    begin = tl.program_id(0) * stretch
    sequence = tl.where(begin > 0, _sequence_of(begin - 1, batch.cu_k, sequences) + 1, 0)
    sequence_stop = _sequence_of(begin + stretch - 1, batch.cu_k, sequences) + 1
    if sequence == sequence_stop:
        return
    rows = tl.load(batch.cu_q + sequence) + tl.arange(0, TILE)
    columns = tl.load(batch.cu_k + sequence) + tl.arange(0, TILE)
    row_stop = tl.load(batch.cu_q + sequence_stop)
    column_stop = tl.load(batch.cu_k + sequence_stop)
    first, limit, row_hash = _queries(rows, row_stop, head, batch, sequences)
    is_query, is_key = rows < row_stop, _keys(columns, column_stop, batch)
    query = _load(q, rows, is_query, head, D)
    grad = _load(grad_out, rows, is_query, head, D)
    row_lse = tl.load(lse + head.to(tl.int64) * queries + rows, mask=is_query, other=0.0)
    key = _load(k, columns, is_key, head, D)
    value = _load(v, columns, is_key, head, D)
    weights, grad_weights, used = _weights(
        query, key, value, grad, row_lse, first, limit, columns, is_key, row_hash, tl.min(columns), batch
    )
    delta = tl.sum(weights * grad_weights, 1)
    grad_scores = (weights * (grad_weights - delta[:, None]) * batch.scale).to(query.dtype)
    _store(dq, rows, is_query, head, dot(grad_scores, key), D)
    _store(dk, columns, columns < column_stop, head, dot(tl.trans(grad_scores), query), D)
    _store(dv, columns, columns < column_stop, head, dot(tl.trans(used.to(grad.dtype)), grad), D)


@triton.jit(do_not_specialize=COUNTS)
def backward_dq(
    q: Packed,
    k: Packed,
    v: Packed,
    grad_out: Packed,
    lse: tl.tensor,
    delta: tl.tensor,
    out: Packed,
    dq: Packed,
    batch: Batch,
    queries: tl.tensor,
    sequences: tl.tensor,
    D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
) -> None:
    """dq of a tile of queries; also writes delta, the products of output and its gradient, fp32 [H, Q]."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    is_query = rows < queries
    first, limit, row_hash = _queries(rows, queries, head, batch, sequences)
    query = _load(q, rows, is_query, head, D)
    grad = _load(grad_out, rows, is_query, head, D)
    at = head.to(tl.int64) * queries + rows
    row_lse = tl.load(lse + at, mask=is_query, other=0.0)
    row_delta = tl.sum(grad.to(tl.float32) * _load(out, rows, is_query, head, D).to(tl.float32), 1)
    tl.store(delta + at, row_delta, mask=is_query)
    grad_query = tl.zeros([TILE_Q, D], tl.float32)
    stop = tl.max(limit)
    for start in range(tl.min(first), stop, TILE_K):
        columns = start + tl.arange(0, TILE_K)
        is_key = _keys(columns, stop, batch)
        key = _load(k, columns, is_key, head, D)
        value = _load(v, columns, is_key, head, D)
        weights, grad_weights, _ = _weights(
            query, key, value, grad, row_lse, first, limit, columns, is_key, row_hash, start, batch
        )
        grad_scores = weights * (grad_weights - row_delta[:, None]) * batch.scale
        grad_query += dot(grad_scores.to(key.dtype), key)
    _store(dq, rows, is_query, head, grad_query, D)


@triton.jit(do_not_specialize=COUNTS)
def backward_dkdv(
    q: Packed,
    k: Packed,
    v: Packed,
    grad_out: Packed,
    lse: tl.tensor,
    delta: tl.tensor,
    dk: Packed,
    dv: Packed,
    batch: Batch,
    queries: tl.tensor,
    sequences: tl.tensor,
    D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
) -> None:
    """dk and dv of a tile of keys."""
    head = tl.program_id(1)
    keys = tl.load(batch.cu_k + sequences)
    start = tl.program_id(0) * TILE_K
    columns = start + tl.arange(0, TILE_K)
    is_key = _keys(columns, keys, batch)
    key = _load(k, columns, is_key, head, D)
    value = _load(v, columns, is_key, head, D)
    grad_key = tl.zeros([TILE_K, D], tl.float32)
    grad_value = tl.zeros([TILE_K, D], tl.float32)
    sequence = _sequence_of(start, batch.cu_k, sequences)
    last_sequence = _sequence_of(tl.minimum(start + TILE_K, keys) - 1, batch.cu_k, sequences)
    row_stop = tl.load(batch.cu_q + last_sequence + 1)
    row_start = tl.load(batch.cu_q + sequence)
    if batch.CAUSAL:  # the first key is seen from its own place on
        row_start = tl.maximum(
            row_start, tl.load(batch.cu_q + sequence + 1) - tl.load(batch.cu_k + sequence + 1) + start
        )
    for row in range(row_start, row_stop, TILE_Q):
        rows = row + tl.arange(0, TILE_Q)
        is_query = rows < row_stop
        first, limit, row_hash = _queries(rows, row_stop, head, batch, sequences)
        query = _load(q, rows, is_query, head, D)
        grad = _load(grad_out, rows, is_query, head, D)
        at = head.to(tl.int64) * queries + rows
        row_lse = tl.load(lse + at, mask=is_query, other=0.0)
        row_delta = tl.load(delta + at, mask=is_query, other=0.0)
        weights, grad_weights, used = _weights(
            query, key, value, grad, row_lse, first, limit, columns, is_key, row_hash, start, batch
        )
        grad_scores = weights * (grad_weights - row_delta[:, None]) * batch.scale
        grad_key += dot(tl.trans(grad_scores.to(query.dtype)), query)
        grad_value += dot(tl.trans(used.to(grad.dtype)), grad)
    _store(dk, columns, columns < keys, head, grad_key, D)
    _store(dv, columns, columns < keys, head, grad_value, D)


@triton.jit
def _weights(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    first: tl.tensor,
    limit: tl.tensor,
    columns: tl.tensor,
    is_key: tl.tensor,
    row_hash: tl.tensor,
    start: tl.tensor,
    batch: Batch,
) -> tl.tensor:
    """Of a tile: the probabilities, their gradients, and the probabilities after dropout."""
    scores = dot(query, tl.trans(key)) * (batch.scale * LOG2E)
    weights = tl.where(_allowed(first, limit, columns, is_key), tl.exp2(scores - lse[:, None]), 0.0)
    grad_weights = dot(grad, tl.trans(value))
    used = weights
    if batch.dropout_keys is not None:
        kept = _kept(row_hash, first, columns, start, batch)
        used = tl.where(kept, weights * batch.keep_scale, 0.0)
        grad_weights = tl.where(kept, grad_weights * batch.keep_scale, 0.0)
    return weights, grad_weights, used


@triton.jit
def _queries(rows: tl.tensor, stop: tl.tensor, head: tl.tensor, batch: Batch, sequences: tl.tensor) -> tl.tensor:
    """For packed queries: their first key, the end of their keys, and the hash of their dropout bits.

    From ``stop`` on there is no query: a row there has no key, and its sequence is the last one's.
    """
    sequence = _sequence_of(tl.minimum(rows, stop - 1), batch.cu_q, sequences)
    first = tl.load(batch.cu_k + sequence)
    limit = tl.load(batch.cu_k + sequence + 1)
    after = limit - tl.load(batch.cu_q + sequence + 1) + rows + 1  # the key after the row's own
    row_hash = rows.to(tl.int64)
    if batch.dropout_keys is not None:
        counter = (after - 1 - first).to(tl.int64) + head.to(tl.int64) * HEAD_STRIDE
        row_hash = hash64(tl.load(batch.dropout_keys + sequence), counter)
    if batch.causal_each is not None:
        limit = tl.where(tl.load(batch.causal_each + sequence) != 0, after, limit)
    elif batch.CAUSAL:
        limit = after
    return first, tl.where(rows < stop, limit, 0), row_hash


@triton.jit
def _keys(columns: tl.tensor, stop: tl.tensor, batch: Batch) -> tl.tensor:
    """Which columns are keys that may be looked at."""
    is_key = columns < stop
    if batch.key_valid is not None:
        is_key = tl.load(batch.key_valid + columns, mask=is_key, other=0) != 0
    return is_key


@triton.jit
def _allowed(first: tl.tensor, limit: tl.tensor, columns: tl.tensor, is_key: tl.tensor) -> tl.tensor:
    place = columns[None, :]
    return (place >= first[:, None]) & (place < limit[:, None]) & is_key[None, :]


@triton.jit
def _kept(row_hash: tl.tensor, first: tl.tensor, columns: tl.tensor, start: tl.tensor, batch: Batch) -> tl.tensor:
    """Dropout's decision on each probability of a tile, whose columns begin with ``start`` and are at most 64.

    Sequences begin anywhere in a tile, so its columns meet two aligned words of bits of a row, or, of a short
    sequence, the only one.
    """
    place = columns[None, :] - first[:, None]  # key positions
    if batch.SHORT:
        word = _bits(row_hash, first * 0, batch)[:, None]
    else:
        base = (start - first) & -batch.BITS
        word = tl.where(
            place < (base + batch.BITS)[:, None],
            _bits(row_hash, base, batch)[:, None],
            _bits(row_hash, base + batch.BITS, batch)[:, None],
        )
    return ((word >> (place & (batch.BITS - 1)).to(tl.int64)) & 1) != 0


@triton.jit
def _bits(row_hash: tl.tensor, base: tl.tensor, batch: Batch) -> tl.tensor:
    """A word for each row, int64: bit c is set if key position ``base + c`` is kept, see ``hashing.keep_mask``."""
    group = tl.arange(0, batch.BITS // 4)[None, :]
    lanes = hash64(row_hash[:, None], ((base >> 2)[:, None] + group).to(tl.int64))  # four to a number
    bits = lanes * 0
    for lane in tl.static_range(4):
        kept = ((lanes << (48 - 16 * lane)) >> 48) >= batch.threshold
        bits |= kept.to(tl.int64) << (4 * group + lane).to(tl.int64)
    return tl.sum(bits, 1)


@triton.jit
def _sequence_of(row: tl.tensor, cu_seqlens: tl.tensor, sequences: tl.tensor) -> tl.tensor:
    """The last sequence that begins at or before each packed row."""
    low = row * 0
    span = sequences
    while span > 1:
        half = span >> 1
        low = tl.where(tl.load(cu_seqlens + low + half) <= row, low + half, low)
        span -= half
    return low


@triton.jit
def _load(x: Packed, rows: tl.tensor, wanted: tl.tensor, head: tl.tensor, D: tl.constexpr) -> tl.tensor:
    at = rows.to(tl.int64)[:, None] * x.token_stride + head * x.head_stride + tl.arange(0, D)[None, :]
    return tl.load(x.data + at, mask=wanted[:, None], other=0.0)


@triton.jit
def _store(x: Packed, rows: tl.tensor, wanted: tl.tensor, head: tl.tensor, values: tl.tensor, D: tl.constexpr) -> None:
    at = rows.to(tl.int64)[:, None] * x.token_stride + head * x.head_stride + tl.arange(0, D)[None, :]
    tl.store(x.data + at, values.to(x.data.dtype.element_ty), mask=wanted[:, None])
