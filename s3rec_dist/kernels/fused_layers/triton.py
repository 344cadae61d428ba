"""The fused layers on Triton kernels (triton_kernels.py), as operators that torch.compile keeps in one graph.

Between forward and backward they keep their inputs, and of LayerNorm two numbers a row; sums, normalised rows and
dropout bits are made again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from s3rec_dist import hashing
from s3rec_dist.kernels.fused_layers import triton_kernels
from s3rec_dist.kernels.fused_layers.triton_kernels import Dropout

TILE = 2048
"""Numbers of a tile, of which there is at least a row: 16 to a thread."""
PROGRAMS = 512
"""Most programs of a backward kernel that sum what belongs to parameters: about four to each processor of an H100.
The same on every GPU, so that they all sum in the same order."""

_DROPOUT = "Tensor? keys, float eps, int site, float p"


@torch.library.custom_op(
    "s3rec_dist::dropout_add_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor x_bias, Tensor residual, Tensor weight, Tensor bias, "
    f"{_DROPOUT}) -> (Tensor, Tensor, Tensor)",
)
def dropout_add_norm(
    x: torch.Tensor,
    x_bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    keys: torch.Tensor | None,
    eps: float,
    site: int,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output [T, E], and of each row that was normalised the mean and the inverse of the deviation, fp32 [T]."""
    out, mean, rstd = _dropout_add_norm_fake(x)
    if len(x):
        given = [t.contiguous() for t in (x, x_bias, residual, weight, bias)]
        sizes, rest = _sizes(x.shape[1])
        grid = (triton.cdiv(len(x), sizes[1]),)
        triton_kernels.add_norm[grid](*given, out, mean, rstd, _dropout(keys, site, p), eps, len(x), *sizes, **rest)
    return out, mean, rstd


@dropout_add_norm.register_fake
def _dropout_add_norm_fake(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (_new(x, x.shape[0], dtype=torch.float32) for _ in range(2))
    return _new(x, *x.shape), mean, rstd


@torch.library.custom_op(
    "s3rec_dist::dropout_add_norm_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor x, Tensor x_bias, Tensor residual, Tensor weight, Tensor mean, Tensor rstd, "
    f"{_DROPOUT}) -> (Tensor, Tensor, Tensor)",
)
def _dropout_add_norm_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    x_bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    keys: torch.Tensor | None,
    eps: float,
    site: int,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x and residual, and those of weight, bias and x_bias, [3, E]."""
    grad_x, grad_residual, grads = _dropout_add_norm_backward_fake(grad_out, x, x_bias, residual, weight)
    if not len(x):
        return grad_x, grad_residual, grads.zero_()
    given = [t.contiguous() for t in (grad_out, x, x_bias, residual, weight, mean, rstd)]
    sizes, rest = _sizes(x.shape[1])
    programs = min(triton.cdiv(len(x), sizes[1]), PROGRAMS)
    partials = _new(x, programs, 3, x.shape[1], dtype=torch.float32)
    triton_kernels.add_norm_backward[(programs,)](
        *given, grad_x, grad_residual, partials, _dropout(keys, site, p), len(x), *sizes, **rest
    )
    _sum(partials, grads)
    return grad_x, grad_residual, grads


@_dropout_add_norm_backward.register_fake
def _dropout_add_norm_backward_fake(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, x, _, residual, weight = inputs[:5]
    return _new(x, *x.shape), _new(residual, *x.shape), _new(weight, 3, x.shape[1])


def _save_dropout_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, x_bias, residual, weight, _, keys, *ctx.settings = inputs
    ctx.save_for_backward(x, x_bias, residual, weight, *output[1:], keys)


def _differentiate_dropout_add_norm(ctx: Any, grad_out: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    grad_x, grad_residual, grads = _dropout_add_norm_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    weight, bias, x_bias = grads.unbind()
    return grad_x, x_bias, grad_residual, weight, bias, None, None, None, None


dropout_add_norm.register_autograd(_differentiate_dropout_add_norm, setup_context=_save_dropout_add_norm)


@torch.library.custom_op(
    "s3rec_dist::embed",
    mutates_args=(),
    schema="(Tensor items, Tensor positions, Tensor item_table, Tensor position_table, Tensor weight, Tensor bias, "
    f"{_DROPOUT}) -> (Tensor, Tensor, Tensor)",
)
def embed(
    items: torch.Tensor,
    positions: torch.Tensor,
    item_table: torch.Tensor,
    position_table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    keys: torch.Tensor | None,
    eps: float,
    site: int,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`dropout_add_norm`."""
    out, mean, rstd = _embed_fake(items, positions, item_table)
    if len(items):
        given = [t.contiguous() for t in (items, positions, item_table, position_table, weight, bias)]
        sizes, rest = _sizes(out.shape[1])
        grid = (triton.cdiv(len(items), sizes[1]),)
        triton_kernels.embed[grid](*given, out, mean, rstd, _dropout(keys, site, p), eps, len(items), *sizes, **rest)
    return out, mean, rstd


@embed.register_fake
def _embed_fake(
    items: torch.Tensor, positions: torch.Tensor, item_table: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (_new(item_table, items.shape[0], dtype=torch.float32) for _ in range(2))  # len is no SymInt
    return _new(item_table, items.shape[0], item_table.shape[1]), mean, rstd


@torch.library.custom_op(
    "s3rec_dist::embed_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor items, Tensor positions, Tensor item_table, Tensor position_table, Tensor weight, "
    f"Tensor mean, Tensor rstd, {_DROPOUT}) -> (Tensor, Tensor, Tensor)",
)
def _embed_backward(
    grad_out: torch.Tensor,
    items: torch.Tensor,
    positions: torch.Tensor,
    item_table: torch.Tensor,
    position_table: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    keys: torch.Tensor | None,
    eps: float,
    site: int,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of each token's row, [T, E], of the position table, and of weight and bias, [2, E]."""
    grad_rows, grad_positions, grads = _embed_backward_fake(
        grad_out, items, positions, item_table, position_table, weight
    )
    if not len(items):
        return grad_rows, grad_positions.zero_(), grads.zero_()
    given = [t.contiguous() for t in (grad_out, items, positions, item_table, position_table, weight, mean, rstd)]
    tokens, width = grad_rows.shape
    sizes, rest = _sizes(width)
    programs = min(triton.cdiv(tokens, sizes[1]), PROGRAMS)
    partials = _new(items, programs, 2, width, dtype=torch.float32)
    triton_kernels.embed_backward[(programs,)](
        *given, grad_rows, partials, _dropout(keys, site, p), tokens, *sizes, **rest
    )
    _sum(partials, grads)
    side, places = 64, len(position_table)
    across = (triton.cdiv(places, side), triton.cdiv(width, side))
    programs = min(triton.cdiv(tokens, side), max(PROGRAMS // (across[0] * across[1]), 1))
    partials = _new(items, programs, places, width, dtype=torch.float32)
    grid = (programs, *across)
    triton_kernels.sum_by_position[grid](grad_rows, given[2], partials, tokens, places, width, side, side, side)
    _sum(partials, grad_positions)
    return grad_rows, grad_positions, grads


@_embed_backward.register_fake
def _embed_backward_fake(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, items, _, item_table, position_table, weight = inputs[:6]
    width = item_table.shape[1]
    return (
        _new(item_table, items.shape[0], width),
        _new(position_table, *position_table.shape),
        _new(weight, 2, width),
    )


def _save_embed(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *given, _, keys, eps, site, p = inputs
    ctx.save_for_backward(*given, *output[1:], keys)
    ctx.settings = (eps, site, p)


def _differentiate_embed(ctx: Any, grad_out: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    items, _, item_table, *_ = ctx.saved_tensors
    grad_rows, grad_positions, grads = _embed_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    # PyTorch's own: it sorts the tokens by item, which repeats to the bit
    grad_items = torch.ops.aten.embedding_dense_backward(grad_rows, items, item_table.shape[0], -1, False)
    weight, bias = grads.unbind()
    return None, None, grad_items, grad_positions, weight, bias, None, None, None, None


embed.register_autograd(_differentiate_embed, setup_context=_save_embed)


@torch.library.custom_op("s3rec_dist::bias_gelu", mutates_args=())
def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU(x + bias)."""
    out = _bias_gelu_fake(x, bias)
    if len(x):
        tokens, width = x.shape
        rows, features = _rectangle(width)
        grid = (triton.cdiv(tokens, rows), triton.cdiv(width, features))
        triton_kernels.bias_gelu[grid](x.contiguous(), bias.contiguous(), out, tokens, width, rows, features)
    return out


@bias_gelu.register_fake
def _bias_gelu_fake(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _new(x, *x.shape)


@torch.library.custom_op("s3rec_dist::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(
    grad_out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and bias."""
    grad_x, grad_bias = _bias_gelu_backward_fake(grad_out, x, bias)
    if not len(x):
        return grad_x, grad_bias.zero_()
    given = [t.contiguous() for t in (grad_out, x, bias)]
    tokens, width = x.shape
    rows, features = _rectangle(width)
    across = triton.cdiv(width, features)
    programs = min(triton.cdiv(tokens, rows), max(PROGRAMS // across, 1))
    partials = _new(x, programs, width, dtype=torch.float32)
    triton_kernels.bias_gelu_backward[(programs, across)](*given, grad_x, partials, tokens, width, rows, features)
    _sum(partials, grad_bias)
    return grad_x, grad_bias


@_bias_gelu_backward.register_fake
def _bias_gelu_backward_fake(
    grad_out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _new(x, *x.shape), _new(bias, *bias.shape)


def _save_bias_gelu(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_bias_gelu(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _bias_gelu_backward(grad_out, *ctx.saved_tensors)


bias_gelu.register_autograd(_differentiate_bias_gelu, setup_context=_save_bias_gelu)


def _new(like: torch.Tensor, *shape: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _sizes(width: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """E, rows and words of a tile, and how it is launched."""
    words = triton.next_power_of_2(triton.cdiv(width, 4))
    rows = max(TILE // (4 * words), 1)
    return (width, rows, words), {"num_warps": min(max(rows * words // 128, 1), 16)}


def _rectangle(width: int) -> tuple[int, int]:
    """Rows and features of a tile."""
    features = min(triton.next_power_of_2(width), 128)
    return TILE // features, features


def _dropout(keys: torch.Tensor | None, site: int, p: float) -> Dropout:
    if keys is None:
        return Dropout(None, None, None, None)
    first_word = site * hashing.SITE_STRIDE
    return Dropout(keys.contiguous(), first_word, hashing.keep_threshold(p), hashing.keep_scale(p))


def _sum(partials: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` = the sum of ``partials`` over the programs."""
    width = out.numel()
    features = 32
    grid = (triton.cdiv(width, features),)
    triton_kernels.sum_partials[grid](partials, out, len(partials), width, TILE // features, features)
