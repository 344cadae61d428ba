"""The losses of pretraining and fine-tuning, as pure functions in fp32. All return sums over their terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

LOGITS_PER_CHUNK = 1 << 22
"""Logits of a softmax loss that exist at a time."""


def pairwise_loss(positive: torch.Tensor, negative: torch.Tensor, kind: str) -> torch.Tensor:
    """Sum over score pairs [M]: ``original`` is -log sigmoid(sigmoid(s+) - sigmoid(s-)), as the reference has it
    (each term lies within .313 and 1.313); ``bpr`` is -log sigmoid(s+ - s-)."""
    positive, negative = positive.float(), negative.float()
    if kind == "original":
        positive, negative = positive.sigmoid(), negative.sigmoid()
    return F.softplus(negative - positive).sum()


def binary_loss(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Sum of the binary cross-entropies of positive and negative logits [M]."""
    return (F.softplus(-positive.float()) + F.softplus(negative.float())).sum()


def softmax_loss(hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of ``hidden`` [M, E] against every row of ``table`` [N, E], summed; ``targets`` int64 [M].

    In chunks: nothing of size [M, N] is kept.
    """
    loss: torch.Tensor = _SoftmaxLoss.apply(hidden, table, targets)
    return loss


class _SoftmaxLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        chunk = max(LOGITS_PER_CHUNK // len(table), 1)
        needs_grad = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_table = torch.zeros_like(table, dtype=torch.float32) if needs_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = (part @ table.T).float()
            log_sum = logits.logsumexp(1, keepdim=True)
            loss += (log_sum - logits.gather(1, target)).sum()
            if grad_hidden is not None and grad_table is not None:
                logits.sub_(log_sum).exp_()
                logits.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                grad = logits.to(hidden.dtype)
                torch.mm(grad, table, out=grad_hidden[start : start + chunk])
                grad_table += grad.T @ part
        if grad_hidden is not None and grad_table is not None:
            ctx.save_for_backward(grad_hidden, grad_table.to(table.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_hidden, grad_table = ctx.saved_tensors
        return (grad_hidden * grads[0]).to(grad_hidden.dtype), (grad_table * grads[0]).to(grad_table.dtype), None


def sampled_softmax_loss(
    hidden: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    is_hit: Callable[[slice], torch.Tensor],
    log_expected: torch.Tensor,
) -> torch.Tensor:
    """An estimate of :func:`softmax_loss` from S items that were drawn with replacement, summed.

    ``hidden`` [M, E] with the targets' rows ``positives`` [M, E] and the drawn items' rows ``negatives`` [S, E];
    ``log_expected`` [S] is how often each was to be drawn, log(S q). ``is_hit`` gives for a slice of the M, bool
    [m, S], where a drawn item is the target. The target's own term is exact, because it is always there; the sum over
    the other items is estimated without bias, by drawn items that are not the target, each divided by S q. The loss,
    its logarithm, approaches the exact one as S grows.
    """
    loss: torch.Tensor = _SampledSoftmaxLoss.apply(hidden, positives, negatives, is_hit, log_expected)
    return loss


class _SampledSoftmaxLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, in chunks, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        positives: torch.Tensor,
        negatives: torch.Tensor,
        is_hit: Callable[[slice], torch.Tensor],
        log_expected: torch.Tensor,
    ) -> torch.Tensor:
        chunk = max(LOGITS_PER_CHUNK // len(negatives), 1)
        grad_hidden, grad_positives = torch.empty_like(hidden), torch.empty_like(positives)
        grad_negatives = torch.zeros_like(negatives, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part, own = hidden[rows], positives[rows]
            logits = (part @ negatives.T).float().sub_(log_expected)
            logits.masked_fill_(is_hit(rows), -torch.inf)
            score = (part.float() * own.float()).sum(1, keepdim=True)
            log_sum = torch.logaddexp(logits.logsumexp(1, keepdim=True), score)
            loss += (log_sum - score).sum()
            weights = logits.sub_(log_sum).exp_().to(hidden.dtype)
            pull = ((score - log_sum).exp_() - 1).to(hidden.dtype)
            grad_hidden[rows] = weights @ negatives + pull * own
            grad_positives[rows] = pull * part
            grad_negatives += weights.T @ part
        ctx.save_for_backward(grad_hidden, grad_positives, grad_negatives.to(negatives.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*((grad * grads[0]).to(grad.dtype) for grad in ctx.saved_tensors), None, None)
