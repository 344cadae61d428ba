"""Attention on Triton kernels (triton_kernels.py), as an operator that torch.compile keeps in one graph.

Between forward and backward it keeps the output and a log-sum-exp a row; probabilities and dropout bits are made again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from s3rec_dist import hashing
from s3rec_dist.kernels.masked_attention import triton_kernels
from s3rec_dist.kernels.masked_attention.triton_kernels import Batch, Packed

FUSED_LENGTH = 64
"""Longest sequences whose dq, dk and dv come from one program."""
FUSED_TILE_BYTES = 8192
FUSED_ROW_BYTES = 256
"""Most bytes of a tile's queries, and of a row of its probabilities, for which that program's registers do."""
BITS = 64
"""Most key positions whose dropout bits fit a word."""


def triton_attention(
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
    each, all_causal = (causal, False) if isinstance(causal, torch.Tensor) else (None, causal)
    out: torch.Tensor = _attend(
        q, k, v, cu_seqlens, cu_seqlens_q, each, key_valid, dropout_keys, max_seqlen, all_causal, dropout_p, scale
    )[0]
    return out


_ARGUMENTS = (
    "Tensor cu_seqlens, Tensor? cu_seqlens_q, Tensor? causal_each, Tensor? key_valid, Tensor? dropout_keys, "
    "SymInt max_seqlen, bool causal, float dropout_p, float scale"
)


@torch.library.custom_op(
    "s3rec_dist::masked_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [Q, H, D], and the base-2 log-sum-exp of each row's scaled scores, fp32 [H, Q]."""
    out, lse = _attend_fake(q)
    if not q.numel():
        return out, lse
    tile, (queries, heads, d) = _tile(q), q.shape
    tensors = [_packed(x) for x in (q, k, v, out)]
    grid = (triton.cdiv(queries, tile), heads)
    counts = (queries, len(arguments[0]) - 1)
    triton_kernels.forward[grid](*tensors, lse, _batch(*arguments), *counts, d, tile, tile, num_stages=2)
    return out, lse


@_attend.register_fake
def _attend_fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op(
    "s3rec_dist::masked_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad_out: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = _attend_backward_fake(grad_out, out, lse, q, k, v)
    if not k.numel():
        return dq, dk, dv
    queries, heads, d = q.shape
    batch, counts, max_seqlen = _batch(*arguments), (queries, len(arguments[0]) - 1), arguments[5]
    given = (*(_packed(x) for x in (q, k, v, grad_out)), lse)
    whole = max(32, triton.next_power_of_2(2 * max_seqlen))
    size = q.element_size()
    fits = whole * d * size <= FUSED_TILE_BYTES and whole * size <= FUSED_ROW_BYTES
    if max_seqlen <= FUSED_LENGTH and fits:
        stretch = whole - max_seqlen + 1  # sequences that start in it end within the tile
        grid = (triton.cdiv(len(k), stretch), heads)
        grads = (_packed(dq), _packed(dk), _packed(dv))
        warps = 8 if whole > 64 else 4
        triton_kernels.backward[grid](*given, *grads, batch, stretch, *counts, d, whole, num_warps=warps)
        return dq, dk, dv
    tile = _tile(q)
    delta = torch.empty_like(lse)
    rest = (batch, *counts, d, tile, tile)
    grid = (triton.cdiv(queries, tile), heads)
    triton_kernels.backward_dq[grid](*given, delta, _packed(out), _packed(dq), *rest, num_stages=2)
    grid = (triton.cdiv(len(k), tile), heads)
    triton_kernels.backward_dkdv[grid](*given, delta, _packed(dk), _packed(dv), *rest, num_stages=2)
    return dq, dk, dv


@_attend_backward.register_fake
def _attend_backward_fake(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[3:6])
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.settings = inputs[8:]


def _differentiate(ctx: Any, grad_out: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return *_attend_backward(grad_out, *ctx.saved_tensors, *ctx.settings), *[None] * 9


_attend.register_autograd(_differentiate, setup_context=_save)


def _tile(q: torch.Tensor) -> int:
    """Rows and columns of a tile: what fits in 99 KiB of shared memory, which every GPU since Ampere has."""
    return 32 if q.dtype == torch.float32 and q.shape[2] >= 64 else 64


def _packed(x: torch.Tensor) -> Packed:
    if x.stride(2) != 1:
        x = x.contiguous()
    return Packed(x, x.stride(0), x.stride(1))


def _batch(
    cu_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    causal_each: torch.Tensor | None,
    key_valid: torch.Tensor | None,
    dropout_keys: torch.Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    scale: float,
) -> Batch:
    """What all kernels are told."""
    return Batch(
        cu_q=(cu_seqlens if cu_seqlens_q is None else cu_seqlens_q).contiguous(),
        cu_k=cu_seqlens.contiguous(),
        causal_each=None if causal_each is None else causal_each.contiguous().view(torch.uint8),
        key_valid=None if key_valid is None else key_valid.contiguous().view(torch.uint8),
        dropout_keys=None if dropout_keys is None else dropout_keys.contiguous(),
        scale=scale,
        keep_scale=hashing.keep_scale(dropout_p),
        threshold=hashing.keep_threshold(dropout_p),
        CAUSAL=tl.constexpr(causal),
        BITS=tl.constexpr(min(max(16, triton.next_power_of_2(max_seqlen)), BITS)),
        SHORT=tl.constexpr(max_seqlen <= BITS),
    )
