"""The definition: one sequence and one formula at a time, in fp32, differentiated by autograd."""

from __future__ import annotations

import torch

from s3rec_dist.hashing import keep_mask, keep_scale
from s3rec_dist.kernels.masked_attention.dropout import row_keys


def reference_attention(
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
    bounds = cu_seqlens.tolist()
    bounds_q = bounds if cu_seqlens_q is None else cu_seqlens_q.tolist()
    is_causal = causal.tolist() if isinstance(causal, torch.Tensor) else [causal] * (len(bounds) - 1)
    valid = torch.ones(len(k), dtype=torch.bool, device=k.device) if key_valid is None else key_valid
    k, v = (x.masked_fill(~valid[:, None, None], 0) for x in (k, v))
    outputs = [(q[:0] + k[:0] + v[:0]).float()]  # in the graph even where there is no sequence
    for b in range(len(bounds) - 1):
        query = q[bounds_q[b] : bounds_q[b + 1]].float().transpose(0, 1)  # [H, Lq, D]
        key = k[bounds[b] : bounds[b + 1]].float().transpose(0, 1)  # [H, Lk, D]
        value = v[bounds[b] : bounds[b + 1]].float().transpose(0, 1)
        at_query = torch.arange(key.shape[1] - query.shape[1], key.shape[1], device=q.device)  # positions of queries
        at_key = torch.arange(key.shape[1], device=q.device)
        scores = query @ key.transpose(1, 2) * scale  # [H, Lq, Lk]
        forbidden = ~valid[bounds[b] : bounds[b + 1]].expand(len(at_query), -1)
        if is_causal[b]:
            forbidden = forbidden | (at_key > at_query[:, None])
        # A row without any key is NaN after the softmax; the second fill makes it zeros, of no gradient.
        probabilities = scores.masked_fill(forbidden, -torch.inf).softmax(-1).masked_fill(forbidden, 0)
        if dropout_keys is not None:
            rows = row_keys(dropout_keys[b], at_query, q.shape[1])
            keep = keep_mask(rows, key.shape[1], 0, dropout_p)
            probabilities = torch.where(keep, probabilities * keep_scale(dropout_p), 0)
        outputs.append((probabilities @ value).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)
