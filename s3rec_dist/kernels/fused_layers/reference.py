"""The definitions, in plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from s3rec_dist.hashing import keep_mask, keep_scale


def reference_dropout_add_norm(
    x: torch.Tensor,
    x_bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    keys: torch.Tensor | None = None,
    site: int = 0,
    p: float = 0.0,
) -> torch.Tensor:
    """See :func:`s3rec_dist.kernels.fused_layers.dropout_add_norm`."""
    return F.layer_norm(residual + _dropout(x + x_bias, keys, site, p), weight.shape, weight, bias, eps)


def reference_embed(
    items: torch.Tensor,
    positions: torch.Tensor,
    item_table: torch.Tensor,
    position_table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    keys: torch.Tensor | None = None,
    site: int = 0,
    p: float = 0.0,
) -> torch.Tensor:
    """See :func:`s3rec_dist.kernels.fused_layers.embed`."""
    both = F.embedding(items, item_table) + F.embedding(positions, position_table)
    return _dropout(F.layer_norm(both, weight.shape, weight, bias, eps), keys, site, p)


def reference_bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """See :func:`s3rec_dist.kernels.fused_layers.bias_gelu`."""
    return F.gelu(x + bias)


def _dropout(x: torch.Tensor, keys: torch.Tensor | None, site: int, p: float) -> torch.Tensor:
    if keys is None or p == 0:
        return x
    return x * keep_mask(keys, x.shape[1], site, p, x.dtype) * keep_scale(p)
