"""The arithmetic that training needs, as pure functions: two operations for each multiply and add of a matrix product,
forward, and twice that backward. Element-wise work is not counted, nor is what padding would add."""

from __future__ import annotations

from s3rec_dist.config import ModelConfig


def _block(config: ModelConfig, tokens: float, queries: float, pairs: float) -> float:
    """One block, forward: ``tokens`` go in, ``queries`` of them come out, and ``pairs`` (query, key) attend."""
    e = config.hidden_size
    keys_and_values = 2 * tokens * 2 * e * e
    query_and_output = 2 * queries * 2 * e * e
    feed_forward = 2 * queries * 2 * e * config.inner_size
    return keys_and_values + query_and_output + feed_forward + 4 * pairs * e


def pretrain_flops(
    config: ModelConfig, attributes: int, *, samples: float, tokens: float, squares: float, masked: float
) -> float:
    """Of a pretraining batch: ``samples`` sequences with ``tokens`` items in all, of which ``masked`` are masked;
    ``squares`` is the sum of the squared lengths. Each item is held against ``attributes`` rows of the attribute table:
    all, or those drawn."""
    e = config.hidden_size
    blocks = (config.layers - 1) * _block(config, 4 * tokens, 4 * tokens, 4 * squares)
    blocks += _block(config, 4 * tokens, tokens + 3 * samples, squares + 3 * tokens)
    heads = 2 * (tokens + masked + samples) * e * e
    return 3 * (blocks + heads + 2 * tokens * attributes * e)


def finetune_flops(
    config: ModelConfig, classes: int, *, samples: float, tokens: float, squares: float, last_only: bool
) -> float:
    """Of a fine-tuning batch, inputs as for :func:`pretrain_flops`, which predicts the next item at each place, or only
    after the last. ``classes`` is what it is chosen from: all items under the loss ``ce``, the drawn ones under
    ``sampled_ce``, 0 under the others."""
    pairs = (squares + tokens) / 2
    queries, attended = (samples, tokens) if last_only else (tokens, pairs)
    blocks = (config.layers - 1) * _block(config, tokens, tokens, pairs)
    blocks += _block(config, tokens, queries, attended)
    return 3 * (blocks + 2 * queries * classes * config.hidden_size)
