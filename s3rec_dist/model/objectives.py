"""The losses of pretraining and fine-tuning, as pure functions in fp32. All return sums over their terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

LOGITS_PER_CHUNK = 1 << 22
"""Logits of a softmax loss that exist at a time."""

LEAST_ROWS = 64
"""Rows of a softmax loss that are worth a product with all classes; where not even these fit a chunk, classes too are
taken by tiles, and all logits computed twice."""


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

    In tiles of ``LOGITS_PER_CHUNK`` logits: besides the gradients, and in 16 bits that of the table in fp32, nothing
    grows with M or N. Cut Cross-Entropy and Liger, which do as much, are Triton kernels without a form for the CPU.
    """
    loss: torch.Tensor = _SoftmaxLoss.apply(hidden, table, targets)
    return loss


class _SoftmaxLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass. Where a tile of rows takes several of classes, a first pass over them
    finds the log-sum-exp, and a second one computes the logits anew."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        height, width = _tile(len(hidden), len(table), hidden.device)
        tiles = [slice(start, start + width) for start in range(0, len(table), width)]
        needs_grad = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_table = torch.zeros_like(table, dtype=torch.float32) if needs_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), height):
            rows = slice(start, start + height)
            part, target = hidden[rows], targets[rows, None]
            # fp64, since a sum that grows tile by tile loses what small tiles add
            total = torch.full(target.shape, -torch.inf, dtype=torch.float64, device=hidden.device)
            score = torch.zeros(target.shape, dtype=torch.float32, device=hidden.device)
            for tile in tiles:
                logits = (part @ table[tile].T).float()
                total = torch.logaddexp(total, logits.logsumexp(1, keepdim=True).double())
                place, is_inside = _place_in(tile, target, logits.shape[1])
                score = torch.where(is_inside, logits.gather(1, place), score)
            log_sum = total.float()
            loss += (log_sum - score).sum()
            if grad_hidden is None or grad_table is None:
                continue
            grad_part = torch.zeros_like(part, dtype=torch.float32)
            for tile in tiles:
                if len(tiles) > 1:
                    logits = (part @ table[tile].T).float()
                logits.sub_(log_sum).exp_()
                place, is_inside = _place_in(tile, target, logits.shape[1])
                logits.scatter_add_(1, place, -is_inside.float())
                grad = logits.to(hidden.dtype)
                grad_part += grad @ table[tile]
                grad_table[tile] += grad.T @ part
            grad_hidden[rows] = grad_part
        if grad_hidden is not None and grad_table is not None:
            ctx.save_for_backward(grad_hidden, grad_table.to(table.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_hidden, grad_table = ctx.saved_tensors
        return (grad_hidden * grads[0]).to(grad_hidden.dtype), (grad_table * grads[0]).to(grad_table.dtype), None


def _tile(rows: int, classes: int, device: torch.device) -> tuple[int, int]:
    """(rows, classes) of which logits exist at a time: all classes where they leave room for enough rows, else a
    square, on a CPU one that its cache holds."""
    if classes <= LOGITS_PER_CHUNK // max(min(rows, LEAST_ROWS), 1):
        return LOGITS_PER_CHUNK // max(classes, 1), max(classes, 1)
    side = max(math.isqrt(LOGITS_PER_CHUNK) // (4 if device.type == "cpu" else 1), 1)
    return side, side


def _place_in(tile: slice, targets: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in a tile of ``size`` classes the targets are, and whether they are; one that is not has any place."""
    place = targets - tile.start
    return place.clamp(0, size - 1), (place >= 0) & (place < size)


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


def sampled_attribute_loss(
    hidden: torch.Tensor,
    table: torch.Tensor,
    pair_rows: torch.Tensor,
    pair_attributes: torch.Tensor,
    negatives: torch.Tensor,
    weight: float,
) -> torch.Tensor:
    """An estimate without bias of :func:`~s3rec_dist.kernels.attribute_loss.attribute_loss` from S attributes that were
    drawn with replacement, summed.

    ``hidden`` [M, E]; ``table`` [U, E] holds the attributes that are spoken of, each once, and need hold no others.
    Positives are pairs, none twice, of rows of hidden, ``pair_rows`` int64 [P], ascending, and of table,
    ``pair_attributes`` int64 [P]; their terms are exact. The sum over a row's other attributes is estimated by those of
    ``negatives``, int64 [S] rows of table, that are not its positives, each ``weight`` times: 1 / (S q), where q is the
    probability that a draw is this attribute.

    Nothing of size [M, S] or [P, E] is kept. Reads on the host which rows a chunk's positives are of, where there is
    more than one chunk.
    """
    loss: torch.Tensor = _SampledAttributeLoss.apply(hidden, table, pair_rows, pair_attributes, negatives, weight)
    return loss


class _SampledAttributeLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, in chunks, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        table: torch.Tensor,
        pair_rows: torch.Tensor,
        pair_attributes: torch.Tensor,
        negatives: torch.Tensor,
        weight: float,
    ) -> torch.Tensor:
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_table = torch.zeros_like(table, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)

        chunk = max(LOGITS_PER_CHUNK // max(hidden.shape[1], 1), 1)
        for start in range(0, len(pair_rows), chunk):
            rows, attributes = pair_rows[start : start + chunk], pair_attributes[start : start + chunk]
            states, vectors = hidden[rows].float(), table[attributes].float()
            logits = (states * vectors).sum(1, keepdim=True)
            loss += F.softplus(-logits).sum()
            pull = -(-logits).sigmoid_()
            _add_rows(grad_hidden, rows, pull * vectors)
            _add_rows(grad_table, attributes, pull * states)

        # one drawn several times counts so often at its first place, and not at the others
        negatives = negatives.sort().values
        first = torch.searchsorted(negatives, negatives)
        times = torch.zeros(len(negatives), dtype=torch.float32, device=hidden.device)
        times.index_add_(0, first, torch.ones_like(times))
        vectors = table[negatives]
        grad_vectors = torch.zeros_like(vectors, dtype=torch.float32)
        place = torch.searchsorted(negatives, pair_attributes).clamp_(max=len(negatives) - 1)
        hit = torch.where(negatives[place] == pair_attributes, -torch.inf, 0.0)
        chunk = max(LOGITS_PER_CHUNK // len(negatives), 1)
        cuts = torch.searchsorted(pair_rows, torch.arange(0, len(hidden) + chunk, chunk, device=hidden.device))
        bounds = [0, len(pair_rows)] if len(hidden) <= chunk else cuts.tolist()
        for i, start in enumerate(range(0, len(hidden), chunk)):
            part, pairs = hidden[start : start + chunk], slice(bounds[i], bounds[i + 1])
            logits = (part @ vectors.T).float()
            logits.view(-1).index_add_(0, (pair_rows[pairs] - start) * len(negatives) + place[pairs], hit[pairs])
            loss += weight * (F.softplus(logits) @ times).sum()
            grad = logits.sigmoid_().mul_(times).to(hidden.dtype)
            grad_hidden[start : start + chunk] += weight * (grad @ vectors)
            grad_vectors += grad.T @ part
        grad_table.index_add_(0, negatives, grad_vectors, alpha=weight)
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_table.to(table.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*((grad * grads[0]).to(grad.dtype) for grad in ctx.saved_tensors), None, None, None, None)


def _add_rows(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Adds ``values`` [P, E] to ``rows`` [P] of ``target``, which may repeat, in the same order each time."""
    if target.is_cuda:
        target.index_put_((rows,), values, accumulate=True)  # sorts, where index_add_ uses atomics
    else:
        target.index_add_(0, rows, values)
