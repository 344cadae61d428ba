"""The arithmetic that is claimed is what torch counts, where nothing is padded and nothing is causal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from s3rec_dist.config import FinetuneConfig, ModelConfig
from s3rec_dist.data.reconstruct import finetune_batch, pretrain_batch
from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.model.flops import finetune_flops, pretrain_flops
from s3rec_dist.model.s3rec import Losses, S3Rec

ITEMS, ATTRIBUTES = 40, 7
LENGTHS = [1, 5, 2, 9]
CONFIG = ModelConfig(hidden_size=16, inner_size=24, heads=2, layers=3, max_length=10, attention="reference")


def packed(lengths: list[int]) -> PackedSequences:
    draw = np.random.default_rng(3)
    items = np.concatenate([draw.permutation(ITEMS)[:n] + 1 for n in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return PackedSequences(
        torch.tensor(items, dtype=torch.int32),
        torch.tensor(offsets, dtype=torch.int32),
        torch.arange(len(lengths)),
        max(lengths),
    )


def in_attribute_loss(hidden: list[int], table: list[int], *_: Any, **__: Any) -> int:
    """Its logits, and the gradient of either side: torch does not look into an operator of ours."""
    return 3 * 2 * hidden[0] * table[0] * hidden[1]


def counted(losses: Any, *arguments: Any) -> tuple[float, Losses]:
    """The matrix products of a forward and backward pass, as torch counts them."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.s3rec_dist.attribute_loss: in_attribute_loss}
    ) as counter:
        found = losses(*arguments)
        found.total.backward()
    return counter.get_total_flops(), found


@pytest.mark.parametrize("layers", [1, 3])
def test_pretraining_takes_the_matrix_products_that_torch_counts(layers: int) -> None:
    config = replace(CONFIG, layers=layers)
    model = S3Rec(config, ITEMS, ATTRIBUTES)
    pool = torch.arange(1, ITEMS + 1, dtype=torch.int32)
    batch = pretrain_batch(packed(LENGTHS), n_items=ITEMS, segment_pool=pool, mask_ratio=0.4, key=1)
    flops, losses = counted(model.pretrain_losses, batch)
    size = {"samples": len(LENGTHS), "tokens": sum(LENGTHS), "squares": sum(n * n for n in LENGTHS)}
    assert pretrain_flops(config, ATTRIBUTES + 1, **size, masked=losses.counts["mip"]) == flops
    flops, _ = counted(model.pretrain_losses, batch, None, torch.tensor([2, 5, 5]))
    assert pretrain_flops(config, 3, **size, masked=losses.counts["mip"]) == flops


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_fine_tuning_takes_them_but_for_the_half_of_attention_that_is_masked(loss: Any, positions: Any) -> None:
    settings = FinetuneConfig(loss=loss, positions=positions)
    model = S3Rec(CONFIG, ITEMS, ATTRIBUTES, finetune=settings)
    lengths = [n + 1 for n in LENGTHS]  # the last item of each is only a target
    flops, _ = counted(model.finetune_losses, finetune_batch(packed(lengths), n_items=ITEMS, key=1))
    size = {"samples": len(LENGTHS), "tokens": sum(LENGTHS), "squares": sum(n * n for n in LENGTHS)}
    classes = ITEMS if loss == "ce" else 0
    causal_blocks = CONFIG.layers if positions == "all" else CONFIG.layers - 1
    masked = sum(n * (n - 1) / 2 for n in LENGTHS)
    expected = finetune_flops(CONFIG, classes, **size, last_only=positions == "last")
    assert expected + causal_blocks * 3 * 4 * masked * CONFIG.hidden_size == flops
