"""Attention on PyTorch's batched products: sequences of near-equal length are padded to one width and go together.

On a CPU the lengths are at hand, so sequences are sorted into buckets whose padding stays small. On a GPU, where
reading them would stall the stream, there is one bucket as wide as the longest sequence.

Rows are moved between the packed layout and the buckets by one gather each way: a bucket's padding repeats a row
that exists, and its probabilities are zero, so nothing is read that was not written.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from s3rec_dist.hashing import keep_mask, keep_scale
from s3rec_dist.kernels.masked_attention.dropout import row_keys

PADDING_PER_BUCKET = 1 << 15
"""Scores of padding that cost a CPU about as much as the calls of one more bucket."""
SCORES_PER_ROW = 8
"""What a padded row of keys costs besides its scores, in scores."""


@torch.compiler.disable  # its buckets are the host's
def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen: int,
    causal: bool | torch.Tensor,
    key_valid: torch.Tensor | None,
    dropout_p: float,
    dropout_keys: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """See :func:`s3rec_dist.kernels.masked_attention.masked_attention`."""
    plan = _plan(cu_seqlens, cu_seqlens_q, max_seqlen, q.shape[1], len(q), len(k))
    mask = _Mask(causal, None)
    if key_valid is not None:
        k, v = (x.masked_fill(~key_valid[:, None, None], 0) for x in (k, v))
        mask = _Mask(causal, key_valid[plan.keys.rows])
    if dropout_keys is None and not torch.is_grad_enabled():
        return _inference(q, k, v, plan, mask, scale)
    attended: torch.Tensor = _Attention.apply(q, k, v, plan, mask, dropout_p, dropout_keys, scale)
    return attended


@dataclass(frozen=True)
class _Side:
    """How packed rows, of queries or of keys, lie in all buckets one after the other: [n, H, L] rows each."""

    rows: torch.Tensor
    """Packed row of each padded one, int64 [R]."""
    heads: torch.Tensor
    """Its head, int64 [R]."""
    back: torch.Tensor
    """Padded place of each packed row and head, int64 [T * H]."""

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, D] -> [R, D]."""
        d = x.shape[2]
        if x.stride(2) != 1 or x.stride(1) != d or x.stride(0) % d:
            x = x.contiguous()
        stride = x.stride(0) // d  # rows of D from one token to the next
        flat = x.as_strided(((len(x) - 1) * stride + x.shape[1] if len(x) else 0, d), (d, 1))
        return flat.index_select(0, self.rows * stride + self.heads)

    def pack(self, padded: torch.Tensor, heads: int) -> torch.Tensor:
        """[R, D] -> [T, H, D]."""
        return padded.index_select(0, self.back).view(-1, heads, padded.shape[1])


@dataclass(frozen=True)
class _Mask:
    """What is forbidden besides other sequences' keys."""

    causal: bool | torch.Tensor
    """Or bool [B]."""
    valid: torch.Tensor | None
    """bool [R]: padded keys that may be looked at; None where it is all of them."""


@dataclass(frozen=True)
class _Bucket:
    """n sequences, padded to Lq queries and Lk keys."""

    sequences: torch.Tensor
    """int64 [n]."""
    queries: slice
    """Its n * H * Lq padded queries."""
    keys: slice
    """Its n * H * Lk padded keys."""
    query_shape: tuple[int, int, int]
    """(n, H, Lq)."""
    key_shape: tuple[int, int, int]
    """(n, H, Lk)."""
    query_lengths: torch.Tensor
    """int64 [n]."""
    key_lengths: torch.Tensor
    """int64 [n]."""
    is_ragged: bool
    """Whether there is padding."""

    def positions(self) -> torch.Tensor:
        """The queries' positions in their sequences, int64 [n, Lq]; those of padding mean nothing."""
        column = torch.arange(self.query_shape[2], device=self.sequences.device)
        return column + (self.key_lengths - self.query_lengths)[:, None]

    def allowed(self, mask: _Mask) -> torch.Tensor | None:
        """bool, broadcasts over [n, H, Lq, Lk]: keys that a query may look at; None where it is all of them."""
        column = torch.arange(self.key_shape[2], device=self.sequences.device)
        allowed = None
        if isinstance(mask.causal, torch.Tensor):
            each = mask.causal[self.sequences][:, None]
            stop = torch.where(each, self.positions() + 1, self.key_lengths[:, None])
            allowed = column < stop[:, None, :, None]
        elif mask.causal and self.query_shape[2] > 1:
            allowed = column <= self.positions()[:, None, :, None]
        elif self.is_ragged:
            allowed = column < self.key_lengths[:, None, None, None]
        if mask.valid is None:
            return allowed
        valid = mask.valid[self.keys].view(*self.key_shape).unsqueeze(2)
        return valid if allowed is None else allowed & valid

    def padding(self) -> torch.Tensor | None:
        """bool, broadcasts over [n, H, Lq, Lk]: queries that are padding."""
        if not self.is_ragged or self.query_shape[2] == 1:
            return None
        column = torch.arange(self.query_shape[2], device=self.sequences.device)
        return (column >= self.query_lengths[:, None])[:, None, :, None]


@dataclass(frozen=True)
class _Plan:
    buckets: list[_Bucket]
    queries: _Side
    keys: _Side


def _plan(cu: torch.Tensor, cu_q: torch.Tensor | None, max_seqlen: int, heads: int, count_q: int, count: int) -> _Plan:
    starts, lengths = cu[:-1].long(), cu.diff().long()
    starts_q, lengths_q = (starts, lengths) if cu_q is None else (cu_q[:-1].long(), cu_q.diff().long())
    groups = _group(lengths, lengths_q, max_seqlen, heads) if count else []
    keys, key_slices = _side(starts, lengths, [(group[0], group[2]) for group in groups], heads, count)
    queries, query_slices = keys, key_slices
    if cu_q is not None:
        queries, query_slices = _side(starts_q, lengths_q, [(group[0], group[1]) for group in groups], heads, count_q)
    buckets = [
        _Bucket(
            own,
            rows_q,
            rows_k,
            (len(own), heads, wide_q),
            (len(own), heads, wide_k),
            lengths_q[own],
            lengths[own],
            ragged,
        )
        for (own, wide_q, wide_k, ragged), rows_q, rows_k in zip(groups, query_slices, key_slices, strict=True)
    ]
    return _Plan(buckets, queries, keys)


def _group(
    lengths: torch.Tensor, lengths_q: torch.Tensor, max_seqlen: int, heads: int
) -> list[tuple[torch.Tensor, int, int, bool]]:
    """(sequences, most queries, most keys, whether there is padding) of each bucket."""
    if lengths.device.type != "cpu":
        everything = torch.arange(len(lengths), device=lengths.device)
        return [(everything, max_seqlen, max_seqlen, True)]
    kind = lengths + ((lengths_q > 1) << 32)
    order = torch.argsort(kind, stable=True)
    order = order[lengths[order] > 0]
    by_length = lengths[order]
    groups = []
    for first, last in itertools.pairwise(_cuts(kind[order], heads)):
        own, own_q = by_length[first:last], lengths_q[order[first:last]]
        most_q, most_k = int(own_q.max()), int(own[-1])
        groups.append((order[first:last], most_q, most_k, int(own[0]) < most_k or int(own_q.min()) < most_q))
    return groups


def _cuts(kinds: torch.Tensor, heads: int) -> list[int]:
    """Where buckets of n sorted sequences begin, and n; ``kinds`` [n] are lengths, plus 2^32 with many queries.

    From its longest sequence down, a bucket takes in shorter ones until their padding costs more than another bucket.
    """
    distinct, counts = kinds.unique_consecutive(return_counts=True)
    cuts: list[int] = []
    at, of_many, width, padding = len(kinds), -1, 0, 0
    for kind, count in zip(reversed(distinct.tolist()), reversed(counts.tolist()), strict=True):
        many, length = divmod(kind, 1 << 32)
        padding += count * heads * (width - length) * ((width if many else 1) + SCORES_PER_ROW)
        if many != of_many or padding > PADDING_PER_BUCKET:
            cuts.append(at)
            of_many, width, padding = many, length, 0
        at -= count
    return [0, *reversed(cuts)]


def _side(
    starts: torch.Tensor, lengths: torch.Tensor, groups: list[tuple[torch.Tensor, int]], heads: int, count: int
) -> tuple[_Side, list[slice]]:
    """``count`` rows in buckets of (sequences, width), and where each bucket's lie."""
    head = torch.arange(heads, device=starts.device)[:, None]
    first = torch.zeros_like(starts)  # padded place of each sequence's first row and head
    width_of = torch.zeros_like(starts)
    rows, slices = [], []
    at = 0
    for own, width in groups:
        column = torch.arange(width, device=starts.device)
        token = starts[own][:, None] + torch.minimum(column, (lengths[own] - 1)[:, None])  # padding repeats the last
        token = token.clamp_(min=0)  # an empty sequence's, on a GPU, is the row before it
        rows.append(token[:, None, :].expand(-1, heads, -1).reshape(-1))
        first[own] = at + torch.arange(len(own), device=starts.device) * (heads * width)
        width_of[own] = width
        slices.append(slice(at, at := at + len(own) * heads * width))
    all_rows = torch.cat([starts[:0], *rows])
    all_heads = torch.cat([starts[:0], *(head.expand(len(own), heads, width).reshape(-1) for own, width in groups)])
    sequence = torch.repeat_interleave(lengths, output_size=count)
    token = torch.arange(len(sequence), device=starts.device)
    place = (first - starts)[sequence] + token
    back = place[:, None] + width_of[sequence][:, None] * head.T
    return _Side(all_rows, all_heads, back.flatten()), slices


class _Attention(torch.autograd.Function):
    """Keeps the padded q, k and v, the probabilities and the dropout bits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: _Plan,
        mask: _Mask,
        dropout_p: float,
        dropout_keys: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        heads, d = q.shape[1:]
        flat_q, flat_k, flat_v = plan.queries.pad(q), plan.keys.pad(k), plan.keys.pad(v)
        out = torch.empty_like(flat_q)
        kept = []
        for bucket in plan.buckets:
            query = flat_q[bucket.queries].view(-1, bucket.query_shape[2], d)  # [n * H, Lq, D]
            key = flat_k[bucket.keys].view(-1, bucket.key_shape[2], d)
            value = flat_v[bucket.keys].view(-1, bucket.key_shape[2], d)
            scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale).view(*bucket.query_shape, -1)
            if (allowed := bucket.allowed(mask)) is not None:
                scores.masked_fill_(~allowed, -torch.inf)
            probabilities = scores.float().softmax(-1).to(q.dtype)
            if allowed is not None and mask.valid is not None:  # a row without any key is NaN
                probabilities.masked_fill_(~allowed.any(-1, keepdim=True), 0)
            if (padding := bucket.padding()) is not None:
                probabilities.masked_fill_(padding, 0)
            keep, used = None, probabilities
            if dropout_keys is not None:
                rows = row_keys(dropout_keys[bucket.sequences], bucket.positions(), heads)
                keep = keep_mask(rows, bucket.key_shape[2], 0, dropout_p, q.dtype)
                used = probabilities * keep
            used = used.view(len(query), *used.shape[2:])
            torch.bmm(used, value, out=out[bucket.queries].view_as(query))
            kept += [probabilities.view_as(used), keep]
        ctx.plan, ctx.scale, ctx.keep_scale = plan, scale, keep_scale(dropout_p)
        ctx.save_for_backward(flat_q, flat_k, flat_v, *kept)
        return plan.queries.pack(out, heads).mul_(ctx.keep_scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat_q, flat_k, flat_v, *kept = ctx.saved_tensors
        plan, heads, d = ctx.plan, grads[0].shape[1], grads[0].shape[2]
        grad_out = plan.queries.pad(grads[0]).mul_(ctx.keep_scale)
        grad_q, grad_k, grad_v = torch.empty_like(flat_q), torch.empty_like(flat_k), torch.empty_like(flat_v)
        for i, bucket in enumerate(plan.buckets):
            probabilities, keep = kept[2 * i : 2 * i + 2]
            query = flat_q[bucket.queries].view(-1, bucket.query_shape[2], d)
            key = flat_k[bucket.keys].view(-1, bucket.key_shape[2], d)
            value = flat_v[bucket.keys].view_as(key)
            own = grad_out[bucket.queries].view_as(query)
            used = probabilities
            grad = torch.bmm(own, value.transpose(1, 2))  # of the probabilities
            if keep is not None:
                used = probabilities * keep.view_as(probabilities)
                grad.mul_(keep.view_as(grad))
            torch.bmm(used.transpose(1, 2), own, out=grad_v[bucket.keys].view_as(value))
            grad.sub_((grad * probabilities).sum(-1, keepdim=True)).mul_(probabilities).mul_(ctx.scale)  # of the scores
            torch.bmm(grad, key, out=grad_q[bucket.queries].view_as(query))
            torch.bmm(grad.transpose(1, 2), query, out=grad_k[bucket.keys].view_as(key))
        packed = (side.pack(g, heads) for side, g in ((plan.queries, grad_q), (plan.keys, grad_k), (plan.keys, grad_v)))
        return *packed, None, None, None, None, None


def _inference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: _Plan, mask: _Mask, scale: float
) -> torch.Tensor:
    """Without gradients and dropout: PyTorch's fused kernel, which keeps no probabilities."""
    d = q.shape[2]
    flat_q, flat_k, flat_v = plan.queries.pad(q), plan.keys.pad(k), plan.keys.pad(v)
    out = torch.empty_like(flat_q)
    for bucket in plan.buckets:
        query = flat_q[bucket.queries].view(*bucket.query_shape, d)
        key, value = (flat[bucket.keys].view(*bucket.key_shape, d) for flat in (flat_k, flat_v))
        allowed = bucket.allowed(mask)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale)
        if allowed is not None and mask.valid is not None:  # what a row without any key gives is not promised
            attended.masked_fill_(~allowed.any(-1, keepdim=True), 0)
        out[bucket.queries] = attended.reshape(-1, d)
    return plan.queries.pack(out, q.shape[1])
