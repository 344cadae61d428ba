"""The layers around attention: PyTorch's modules and hashed dropout, or on a GPU, each of them in one pass.

``backend`` is the setting ``model.attention``; see :mod:`s3rec_dist.kernels.backends` for what it chooses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from s3rec_dist.kernels import fused_layers
from s3rec_dist.kernels.backends import use_triton
from s3rec_dist.model.dropout import DropoutKeys, dropout, dropout_add


def embed(
    items: torch.Tensor,
    positions: torch.Tensor,
    item_vectors: torch.Tensor,
    position_embedding: nn.Embedding,
    norm: nn.LayerNorm,
    *,
    keys: DropoutKeys | None,
    site: int,
    p: float,
    backend: str,
) -> torch.Tensor:
    """``dropout(norm(item_vectors[items] + position_embedding(positions)))``, [T, E]; ``item_vectors`` [U, E]."""
    if use_triton(items.device, norm.weight.dtype, backend):
        tables = (item_vectors, position_embedding.weight)
        hashed = keys.tokens if keys else None
        return fused_layers.embed(items, positions, *tables, norm.weight, norm.bias, norm.eps, hashed, site, p)
    return dropout(norm(F.embedding(items, item_vectors) + position_embedding(positions)), keys, site, p)


def linear_gelu(linear: nn.Linear, x: torch.Tensor, backend: str) -> torch.Tensor:
    """``gelu(linear(x))``, [T, F]."""
    if use_triton(x.device, x.dtype, backend):
        return fused_layers.bias_gelu(F.linear(x, linear.weight), linear.bias)
    return F.gelu(linear(x))


def linear_add_norm(
    linear: nn.Linear,
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: nn.LayerNorm,
    *,
    keys: DropoutKeys | None,
    site: int,
    p: float,
    backend: str,
) -> torch.Tensor:
    """``norm(residual + dropout(linear(x)))``, [T, E]."""
    if use_triton(x.device, x.dtype, backend):
        product, hashed = F.linear(x, linear.weight), keys.tokens if keys else None
        return fused_layers.dropout_add_norm(
            product, linear.bias, residual, norm.weight, norm.bias, norm.eps, hashed, site, p
        )
    normed: torch.Tensor = norm(dropout_add(linear(x), residual, keys, site, p))
    return normed
