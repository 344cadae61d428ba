"""What stands around attention in an encoder, each in one pass on a GPU: Triton kernels, and their definitions.

``dropout_add_norm`` ends a sublayer, ``bias_gelu`` is inside the feed-forward one, ``embed`` comes before the first
block. reference.py has the same three in plain PyTorch. See README.md beside this file.
"""

from __future__ import annotations

import torch

from s3rec_dist.kernels.backends import use_triton


def dropout_add_norm(
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
    """LayerNorm(residual + dropout(x + x_bias)), [T, E] in the type of ``x``.

    ``x`` and ``residual`` are [T, E] of one type, ``x_bias``, ``weight`` and ``bias`` [E] of one type. ``keys`` (int64
    [T]) turn dropout with probability ``p`` on: the bits are those of ``hashing.keep_mask(keys, E, site, p)``.

    All three operators compute in fp32, return gradients that repeat to the bit, keep nothing of size T x E for the
    backward pass but their inputs, and raise ValueError for tensors that they do not take, or that Triton does not.
    """
    size = _size("x", x)
    _check("residual", residual, size, x.dtype)
    for name, parameter in (("x_bias", x_bias), ("weight", weight), ("bias", bias)):
        _check(name, parameter, size[1:], weight.dtype)
    keys = _keys(keys, len(x), p)
    use_triton(x.device, x.dtype, "triton")
    from s3rec_dist.kernels.fused_layers import triton

    return triton.dropout_add_norm(x, x_bias, residual, weight, bias, keys, eps, site, p)[0]


def embed(
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
    """dropout(LayerNorm(item_table[items] + position_table[positions])), [T, E] in the type of the tables.

    ``items`` and ``positions`` are int32 or int64 [T], the tables [N, E] and [L, E] of one type; the rest is as in
    :func:`dropout_add_norm`. Ids outside of their table are an error on a CPU, and not looked for on a GPU.
    """
    size = _size("item_table", item_table)
    _check("position_table", position_table, (len(position_table), size[1]), item_table.dtype)
    for name, ids, table in (("items", items, item_table), ("positions", positions, position_table)):
        if ids.dtype not in (torch.int32, torch.int64) or ids.shape != (len(items),):
            raise ValueError(f"{name} is {ids.dtype} {list(ids.shape)}; expected int32 or int64 [{len(items)}]")
        if ids.device.type == "cpu" and len(ids) and not torch.compiler.is_compiling():
            low, high = map(int, ids.aminmax())
            if low < 0 or high >= len(table):
                raise ValueError(f"{name} are from {low} to {high}; expected from 0 to {len(table) - 1}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        _check(name, parameter, size[1:], weight.dtype)
    keys = _keys(keys, len(items), p)
    use_triton(item_table.device, item_table.dtype, "triton")
    from s3rec_dist.kernels.fused_layers import triton

    return triton.embed(items, positions, item_table, position_table, weight, bias, keys, eps, site, p)[0]


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU(x + bias), by the error function; ``x`` is [T, F], ``bias`` [F]. As :func:`dropout_add_norm` otherwise."""
    _check("bias", bias, _size("x", x)[1:], bias.dtype)
    use_triton(x.device, x.dtype, "triton")
    from s3rec_dist.kernels.fused_layers import triton

    return triton.bias_gelu(x, bias)


def _size(name: str, x: torch.Tensor) -> torch.Size:
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"{name} is {list(x.shape)}; expected rows of at least one feature")
    return x.shape


def _check(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; expected {dtype} {list(shape)}")


def _keys(keys: torch.Tensor | None, tokens: int, p: float) -> torch.Tensor | None:
    """The keys, checked, or None where nothing is dropped."""
    if not 0 <= p < 1:
        raise ValueError(f"p={p}: expected a probability from 0 to below 1")
    if keys is not None:
        _check("keys", keys, (tokens,), torch.int64)
    return keys if p else None
