"""Self-attention over packed sequences, each attending to itself alone, with dropout that is a hash.

One contract, several backends (see README.md beside this file): ``reference`` is the plain definition in fp32,
``sdpa`` the fast path on a CPU and the fallback on a GPU, ``triton`` the kernels for a GPU.
"""

from __future__ import annotations

import torch

from s3rec_dist.kernels.backends import choose_backend
from s3rec_dist.kernels.masked_attention.reference import reference_attention
from s3rec_dist.kernels.masked_attention.sdpa import sdpa_attention


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    causal: bool | torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    key_valid: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_keys: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(q k^T * scale) v within each sequence; returns [Q, H, D] in the type of ``q``.

    ``k`` and ``v`` are [T, H, D], any stride but a contiguous D; sequence b is rows ``cu_seqlens[b]`` to
    ``cu_seqlens[b + 1] - 1`` (int32 [B + 1]), 0 to ``max_seqlen`` of them. ``q`` is [T, H, D] likewise, or, with
    ``cu_seqlens_q``, [Q, H, D]: the queries of only the last few tokens of each sequence, at least one unless it is
    empty. ``causal`` lets a token attend to itself and to what precedes it, else to the whole sequence; bool [B] says
    so for each sequence. Keys where ``key_valid`` (bool [T]) is False are not looked at, whatever they hold, and get
    no gradient; a query that is left without a key gives zeros.

    ``dropout_p`` drops attention probabilities; ``dropout_keys`` (int64 [B]) decides which: the bit of (sequence b,
    head h, query position i, key position j) is lane j of the row hashed from (key b, h, i), see
    :func:`~s3rec_dist.hashing.keep_mask`. It is the same in every backend, forward and backward.

    Raises ValueError for tensors that do not fit this description, and for a backend that cannot take them; what
    ``cu_seqlens`` hold is looked at only on a CPU and outside of ``torch.compile``, since reading them would stall a
    GPU and break a graph.
    """
    if q.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"expected q [Q, H, D], k and v [T, H, D]; got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if cu_seqlens_q is None and len(q) != len(k):
        raise ValueError(f"q has {len(q)} rows, k has {len(k)}; give cu_seqlens_q where only some tokens have queries")
    if cu_seqlens_q is not None and cu_seqlens_q.shape != cu_seqlens.shape:
        raise ValueError(f"cu_seqlens_q is {list(cu_seqlens_q.shape)}, cu_seqlens is {list(cu_seqlens.shape)}")
    if isinstance(causal, torch.Tensor):
        _check_flags("causal", causal, len(cu_seqlens) - 1, "sequence")
    if key_valid is not None:
        _check_flags("key_valid", key_valid, len(k), "key")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_lengths("cu_seqlens", cu_seqlens, len(k), max_seqlen)
        if cu_seqlens_q is not None:
            _check_lengths("cu_seqlens_q", cu_seqlens_q, len(q), max_seqlen)
            _check_queries(cu_seqlens_q.diff(), cu_seqlens.diff())
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p}: expected a probability from 0 to below 1")
    if dropout_p and (dropout_keys is None or len(dropout_keys) != len(cu_seqlens) - 1):
        raise ValueError("dropout_p needs dropout_keys, int64 [B], one for each sequence")
    if scale is None:
        scale = q.shape[2] ** -0.5
    name = choose_backend(backend, q.device, q.dtype, q.shape[2])
    if name == "triton":
        from s3rec_dist.kernels.masked_attention.triton import triton_attention as attention
    else:
        attention = {"reference": reference_attention, "sdpa": sdpa_attention}[name]
    keys = dropout_keys if dropout_p else None
    return attention(q, k, v, cu_seqlens, cu_seqlens_q, max_seqlen, causal, key_valid, dropout_p, keys, scale)


def _check_flags(name: str, flags: torch.Tensor, count: int, what: str) -> None:
    if flags.dtype != torch.bool or flags.shape != (count,):
        raise ValueError(f"{name} is {flags.dtype} {list(flags.shape)}; expected bool [{count}], one for each {what}")


def _check_lengths(name: str, cu_seqlens: torch.Tensor, rows: int, longest: int) -> None:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != rows:
        raise ValueError(f"{name} goes from {first} to {last}, for {rows} rows: expected from 0 to {rows}")
    if len(cu_seqlens) > 1:
        low, high = map(int, cu_seqlens.diff().aminmax())
        if low < 0 or high > longest:
            raise ValueError(f"{name} has sequences of lengths {low} to {high}; expected from 0 to {longest}")


def _check_queries(queries: torch.Tensor, tokens: torch.Tensor) -> None:
    if (queries > tokens).any():
        raise ValueError("cu_seqlens_q has sequences with more queries than tokens")
    if ((queries == 0) & (tokens > 0)).any():
        raise ValueError("cu_seqlens_q has sequences with tokens and no query; expected at least one")
