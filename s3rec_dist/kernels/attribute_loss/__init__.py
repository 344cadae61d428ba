"""Multi-label binary cross-entropy of hidden states against an attribute table, whose logits are never kept.

One contract and two backends (see README.md beside this file): ``reference`` in plain PyTorch, which is the path on a
CPU, and ``triton`` for a GPU. It is an operator, which torch.compile keeps in one graph whichever computes it.
"""

from __future__ import annotations

from typing import Any

import torch

from s3rec_dist.kernels.attribute_loss.reference import attribute_pairs, reference_loss
from s3rec_dist.kernels.backends import use_triton

__all__ = ["TRITON_MOST_FEATURES", "attribute_loss", "attribute_pairs"]

TRITON_MOST_FEATURES = 512
"""Widest rows of which a tile fits a GPU's shared memory."""


def attribute_loss(
    hidden: torch.Tensor,
    table: torch.Tensor,
    items: torch.Tensor,
    offsets: torch.Tensor,
    values: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """``sum softplus(x)`` over the logits x of every row of ``hidden`` [M, E] with every row of ``table`` [A, E], those
    of positives negated; fp32, a scalar.

    Row i's positives are the attributes of ``items[i]`` (integers [M]): ``values[offsets[items[i]]]`` to
    ``values[offsets[items[i] + 1] - 1]``, ascending, none twice. ``offsets`` (int64) and ``values`` (integers) are a
    catalogue's, or, with ``items`` 0 to M - 1, the rows' own. Gradients of fp16 and bf16 are rounded once for the loss
    and once more for its factor.

    ``triton`` repeats to the bit, reads nothing on the host, nor checks that items and attributes are in range, and
    takes up to ``TRITON_MOST_FEATURES`` features. Raises ValueError for tensors that do not fit this description, and
    for a backend that cannot take them.
    """
    if hidden.dim() != 2 or table.dim() != 2 or hidden.shape[1] != table.shape[1] or hidden.dtype != table.dtype:
        raise ValueError(
            f"expected hidden [M, E] and table [A, E] of one type; got {list(hidden.shape)} {hidden.dtype} and "
            f"{list(table.shape)} {table.dtype}"
        )
    if items.shape != hidden.shape[:1]:
        raise ValueError(f"items is {list(items.shape)}; expected [{len(hidden)}], one for each row of hidden")
    learns = torch.is_grad_enabled()
    loss: torch.Tensor = _loss(
        hidden,
        table,
        items,
        offsets,
        values,
        learns and hidden.requires_grad,
        learns and table.requires_grad,
        backend,
    )[0]
    return loss


@torch.library.custom_op(
    "s3rec_dist::attribute_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor table, Tensor items, Tensor offsets, Tensor values, bool learns_hidden, "
    "bool learns_table, str backend) -> (Tensor, Tensor, Tensor)",
)
def _loss(
    hidden: torch.Tensor,
    table: torch.Tensor,
    items: torch.Tensor,
    offsets: torch.Tensor,
    values: torch.Tensor,
    learns_hidden: bool,
    learns_table: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and its gradients while the logits are there; one that is not asked for is empty."""
    compute: Any = reference_loss
    features, too_wide = hidden.shape[1], None
    if features > TRITON_MOST_FEATURES:
        too_wide = f"takes up to {TRITON_MOST_FEATURES} features, not {features}"
    if use_triton(hidden.device, hidden.dtype, backend, own_obstacle=too_wide):
        from s3rec_dist.kernels.attribute_loss.triton import triton_loss as compute
    loss, grad_hidden, grad_table = compute(hidden, table, items, offsets, values, learns_hidden, learns_table)
    return (
        loss,
        hidden.new_empty(0) if grad_hidden is None else grad_hidden,
        table.new_empty(0) if grad_table is None else grad_table,
    )


@_loss.register_fake
def _loss_fake(
    hidden: torch.Tensor,
    table: torch.Tensor,
    _1: Any,
    _2: Any,
    _3: Any,
    learns_hidden: bool,
    learns_table: bool,
    _4: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def like(x: torch.Tensor, wanted: bool) -> torch.Tensor:
        return x.new_empty(x.shape) if wanted else x.new_empty(0)

    return hidden.new_empty((), dtype=torch.float32), like(hidden, learns_hidden), like(table, learns_table)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _differentiate(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    """What the forward pass made, times the loss's own gradient."""
    grads = [
        (kept * grad).to(kept.dtype) if needed and grad is not None else None
        for kept, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    ]
    return *grads, *[None] * 6


_loss.register_autograd(_differentiate, setup_context=_save)
