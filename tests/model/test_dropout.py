"""Hashed dropout: a value's fate depends on its sequence, position, site and feature alone, and drops at its rate."""

from __future__ import annotations

import pytest
import torch

from s3rec_dist.hashing import hash64
from s3rec_dist.model.dropout import DropoutKeys, dropout, dropout_add

TOKENS, FEATURES = 2000, 64


def keys_of(lengths: list[int], seed: int = 7) -> DropoutKeys:
    """Keys of sequences of these lengths, numbered from 0."""
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return DropoutKeys.of(hash64(torch.arange(len(lengths)), seed), sequence, positions)


def kept(keys: DropoutKeys, site: int = 1, p: float = 0.5, features: int = FEATURES) -> torch.Tensor:
    return dropout(torch.ones(len(keys.tokens), features), keys, site, p) != 0


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_values_drop_at_the_rate_and_the_rest_is_scaled_so_that_the_mean_stays(p: float) -> None:
    out = dropout(torch.ones(TOKENS, FEATURES), keys_of([50] * 40), 1, p)
    values = out[out != 0]
    assert torch.allclose(values, torch.tensor(1 / (1 - p)), rtol=1e-3)
    deviation = (p * (1 - p)) ** 0.5
    assert abs((out != 0).double().mean() - (1 - p)) < 5 * deviation / out.numel() ** 0.5
    assert abs(out.double().mean() - 1) < 5 * deviation / (1 - p) / out.numel() ** 0.5
    for axis in (0, 1):  # nor is any token or feature favoured
        rates = (out != 0).double().mean(axis)
        assert (rates - (1 - p)).abs().max() < 5.5 * deviation / out.shape[axis] ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_and_the_type_follow_the_values(dtype: torch.dtype) -> None:
    x = torch.randn(30, FEATURES).to(dtype).requires_grad_()
    residual = torch.randn(30, FEATURES).to(dtype).requires_grad_()
    keys = keys_of([30])
    mask, scale = kept(keys, p=0.25), 4 / 3
    for out in (dropout(x, keys, 1, 0.25), dropout_add(x, residual, keys, 1, 0.25)):
        x.grad = residual.grad = None
        upstream = torch.randn(30, FEATURES).to(dtype)
        out.backward(upstream)
        added = residual if residual.grad is not None else torch.zeros(())
        assert out.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            out.float(), mask * x.float() * scale + added.float(), rtol=tolerance, atol=4 * tolerance
        )
        torch.testing.assert_close(x.grad.float(), mask * upstream.float() * scale, rtol=tolerance, atol=1e-4)
    assert residual.grad is not None and torch.equal(residual.grad, upstream)


def test_dropout_add_drops_what_dropout_drops() -> None:
    x, residual, keys = torch.randn(30, FEATURES), torch.randn(30, FEATURES), keys_of([30])
    assert torch.allclose(dropout_add(x, residual, keys, 2, 0.5), residual + dropout(x, keys, 2, 0.5), atol=1e-6)


def test_without_keys_or_probability_values_pass_unchanged() -> None:
    x, residual = torch.randn(5, 8), torch.randn(5, 8)
    assert torch.equal(dropout(x, None, 1, 0.5), x) and torch.equal(dropout(x, keys_of([5]), 1, 0.0), x)
    assert torch.equal(dropout_add(x, residual, None, 1, 0.5), residual + x)
    assert torch.equal(dropout_add(x, residual, keys_of([5]), 1, 0.0), residual + x)


def test_a_sequences_mask_is_the_same_in_any_batch() -> None:
    whole = keys_of([5, 9, 1, 7])
    masks = kept(whole).split([5, 9, 1, 7])
    for order in ([2, 0, 3, 1], [1], [3, 2]):
        lengths = torch.tensor([5, 9, 1, 7])[order]
        sequence = torch.arange(len(order)).repeat_interleave(lengths)
        positions = torch.cat([torch.arange(int(n)) for n in lengths])
        keys = DropoutKeys.of(whole.sequences[order], sequence, positions)
        assert torch.equal(kept(keys), torch.cat([masks[b] for b in order]))


def test_the_keys_of_some_tokens_give_their_rows_of_the_mask() -> None:
    keys = keys_of([5, 9])
    assert torch.equal(kept(keys.take(torch.tensor([1, 4, 13]))), kept(keys)[[1, 4, 13]])
    assert torch.equal(keys.take(torch.tensor([1])).sequences, keys.sequences)


def test_a_narrower_mask_is_the_beginning_of_a_wider_one() -> None:
    keys = keys_of([40])
    for features in (1, 3, 4, 6, 63):
        assert torch.equal(kept(keys, features=features), kept(keys)[:, :features])


def test_masks_of_other_sites_seeds_sequences_positions_and_features_are_unrelated() -> None:
    keys = keys_of([50] * 40)
    base = kept(keys)
    others = {
        "next site": kept(keys, site=2),
        "site of the next layer": kept(keys, site=4),
        "other seed": kept(keys_of([50] * 40, seed=8)),
        "next sequence": base.roll(-50, 0),
        "next position": base.roll(-1, 0),
        "next feature": base.roll(-1, 1),
        "next word": base.roll(-4, 1),
    }
    for name, other in others.items():
        agreement = float((base == other).double().mean())
        assert abs(agreement - 0.5) < 5 * 0.5 / base.numel() ** 0.5, f"{name}: {agreement}"
