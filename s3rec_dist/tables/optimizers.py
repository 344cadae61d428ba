"""Optimizers of single rows: those that a step has no gradient for keep what they have, state included.

Each is a pure function of the touched rows ``rows`` fp32 [R, E], their gradients [R, E] and their state, which it
changes in place; it returns what is to be taken off the rows. Where every row is touched they are PyTorch's SGD,
Adagrad and Adam; row-wise Adagrad, of FBGEMM, has one number a row, the sum of its gradients' mean squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

ADAGRAD_EPS = 1e-10


@dataclass(frozen=True)
class Settings:
    """What all optimizers are called with."""

    learning_rate: float
    step: int
    """This update's number, from 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    """Adam's."""


State = Mapping[str, torch.Tensor]
"""fp32 [R, E] or [R, 1] each."""


class Update(Protocol):
    """See the module's docstring."""

    def __call__(self, grads: torch.Tensor, state: State, settings: Settings) -> torch.Tensor: ...


@dataclass(frozen=True)
class RowOptimizer:
    """An optimizer and its state."""

    update: Update
    state: Mapping[str, bool]
    """The tensors that it keeps, by name: as wide as a row, or one number a row."""


def _sgd(grads: torch.Tensor, state: State, settings: Settings) -> torch.Tensor:
    return grads * settings.learning_rate


def _adagrad(grads: torch.Tensor, state: State, settings: Settings) -> torch.Tensor:
    state["sum"].addcmul_(grads, grads)
    return (grads / state["sum"].sqrt().add_(ADAGRAD_EPS)).mul_(settings.learning_rate)


def _rowwise_adagrad(grads: torch.Tensor, state: State, settings: Settings) -> torch.Tensor:
    state["sum"].add_(grads.square().mean(1, keepdim=True))
    return grads * (settings.learning_rate / state["sum"].sqrt().add_(ADAGRAD_EPS))


def _lazy_adam(grads: torch.Tensor, state: State, settings: Settings) -> torch.Tensor:
    first, second = settings.betas
    state["exp_avg"].lerp_(grads, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(grads, grads, value=1 - second)
    size = settings.learning_rate / (1 - first**settings.step)
    scale = 1 / math.sqrt(1 - second**settings.step)
    return state["exp_avg"] / state["exp_avg_sq"].sqrt().mul_(scale).add_(settings.eps) * size


OPTIMIZERS = {
    "sgd": RowOptimizer(_sgd, {}),
    "adagrad": RowOptimizer(_adagrad, {"sum": True}),
    "rowwise_adagrad": RowOptimizer(_rowwise_adagrad, {"sum": False}),
    "lazy_adam": RowOptimizer(_lazy_adam, {"exp_avg": True, "exp_avg_sq": True}),
}
