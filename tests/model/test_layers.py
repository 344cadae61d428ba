"""The layers around attention: a training step on the fused kernels is one on PyTorch's modules, to rounding."""

from __future__ import annotations

import itertools

import pytest
import torch

from s3rec_dist.config import ModelConfig
from s3rec_dist.data.reconstruct import pretrain_batch
from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.kernels import fused_layers
from s3rec_dist.kernels.backends import forced_backend
from s3rec_dist.model import S3Rec

pytest.importorskip("triton", reason="needs the package triton")

CONFIG = ModelConfig(hidden_size=32, inner_size=44, heads=2, layers=2, max_length=12, initializer_range=0.2)
LENGTHS = (5, 12, 1, 7)
N_ITEMS = 20


def step(backend: str, device: str) -> dict[str, torch.Tensor]:
    """The loss and its gradients."""
    torch.manual_seed(0)
    model = S3Rec(CONFIG, N_ITEMS, 3).to(device)
    items = torch.randint(1, N_ITEMS + 1, (sum(LENGTHS),), dtype=torch.int32)
    offsets = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    keys = torch.arange(len(LENGTHS)) << 24
    packed = PackedSequences(items, offsets, keys, max(LENGTHS)).to(torch.device(device))
    batch = pretrain_batch(packed, n_items=N_ITEMS, segment_pool=items.to(device), mask_ratio=0.3, key=11)
    with forced_backend(backend):
        loss = model.pretrain_losses(batch, dropout_seed=5).total
        loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().cpu()} | gradients


def test_a_training_step_of_two_layers_has_the_loss_and_gradients_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    for name in ("embed", "bias_gelu", "dropout_add_norm"):
        original = getattr(fused_layers, name)
        monkeypatch.setattr(
            fused_layers, name, lambda *args, name=name, call=original: calls.append(name) or call(*args)
        )
    expected = step("reference", "cpu")
    assert not calls
    found = step("triton", "cuda" if torch.cuda.is_available() else "cpu")
    assert calls == ["embed", *["dropout_add_norm", "bias_gelu", "dropout_add_norm"] * 2]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = float((value - expected[name]).norm())
        assert error <= 1e-5 * float(expected[name].norm()), f"{name}: {error:.3g}"
