"""Confidence intervals of ranking metrics: users drawn with replacement, percentiles of the means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def user_metrics(ranks: np.ndarray, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """HR@k and NDCG@k for each cut-off, and MRR, of each user [U], from ranks counted from 0."""
    gain, found = 1 / np.log2(ranks + 2), {}
    for k in cutoffs:
        found[f"HR@{k}"] = (ranks < k).astype(float)
        found[f"NDCG@{k}"] = gain * (ranks < k)
    return found | {"MRR": 1 / (ranks + 1)}


def resampled_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means [R, C] of the columns of ``values`` [U, C] over R draws of U users with replacement. The same draws for
    all columns: differences of columns are paired."""
    draw = np.random.default_rng(seed)
    users = len(values)
    means = np.empty((resamples, values.shape[1]))
    for i in range(resamples):
        times = np.bincount(draw.integers(0, users, users), minlength=users)
        means[i] = times @ values / users
    return means


def interval(means: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of resampled means [R]."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
