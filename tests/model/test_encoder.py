"""The encoder: a block is PyTorch's own, positions align as set, and a sequence's states are its own business."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s3rec_dist.config import ModelConfig
from s3rec_dist.hashing import hash64
from s3rec_dist.kernels.backends import BACKENDS
from s3rec_dist.model import S3Rec
from s3rec_dist.model.dropout import DropoutKeys
from s3rec_dist.model.encoder import Block, Queries, position_ids

CONFIG = ModelConfig(hidden_size=32, inner_size=48, heads=2, layers=2, max_length=20, initializer_range=0.3)
"""Weights wide enough that attention is far from uniform."""

N_ITEMS = 50
LENGTHS = (5, 20, 1, 9, 9, 2)


def offsets_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def sequence_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))


def last_of_each(counts: tuple[int, ...], lengths: tuple[int, ...]) -> Queries:
    ends = itertools.accumulate(lengths)
    tokens = [i for end, count in zip(ends, counts, strict=True) for i in range(end - count, end)]
    return Queries(torch.tensor(tokens), offsets_of(counts))


def make_model(**settings: Any) -> S3Rec:
    torch.manual_seed(0)
    return S3Rec(replace(CONFIG, **settings), N_ITEMS, 3)


def items_of(lengths: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, N_ITEMS + 1, (sum(lengths),), generator=generator, dtype=torch.int32)


def encode(
    model: S3Rec,
    items: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    causal: bool = True,
    names: tuple[int, ...] | None = None,
    queries: Queries | None = None,
) -> torch.Tensor:
    """Hidden states; ``names`` of the sequences turn dropout on."""
    offsets, sequence = offsets_of(lengths), sequence_of(lengths)
    positions = position_ids(sequence, offsets, model.config)
    keys = None if names is None else DropoutKeys.of(hash64(torch.tensor(names), 5), sequence, positions)
    return model.encode(items, positions, offsets, max(lengths), causal=causal, keys=keys, queries=queries)


# A block against torch.nn.TransformerEncoderLayer


OUR_NAMES = {
    "self_attn.in_proj_weight": "qkv.weight",
    "self_attn.in_proj_bias": "qkv.bias",
    "self_attn.out_proj.weight": "attention_output.weight",
    "self_attn.out_proj.bias": "attention_output.bias",
    "linear1.weight": "inner.weight",
    "linear1.bias": "inner.bias",
    "linear2.weight": "inner_output.weight",
    "linear2.bias": "inner_output.bias",
    "norm1.weight": "attention_norm.weight",
    "norm1.bias": "attention_norm.bias",
    "norm2.weight": "output_norm.weight",
    "norm2.bias": "output_norm.bias",
}


def pytorch_layer(block: Block) -> nn.TransformerEncoderLayer:
    """PyTorch's layer with the block's weights: post-norm, erf GELU."""
    config = block.config
    layer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.heads,
        config.inner_size,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
        norm_first=False,
    )
    state = block.state_dict()
    assert sorted(OUR_NAMES.values()) == sorted(state)
    layer.load_state_dict({theirs: state[ours] for theirs, ours in OUR_NAMES.items()})
    return layer


@pytest.mark.parametrize("eps", [1e-12, 0.1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_equals_pytorchs_transformer_layer_in_output_and_gradients(
    backend: str, causal: bool, eps: float
) -> None:
    torch.manual_seed(0)
    block = Block(replace(CONFIG, attention=backend, layer_norm_eps=eps))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = pytorch_layer(block)
    x = torch.randn(sum(LENGTHS), 32, requires_grad=True)
    upstream = torch.randn_like(x)
    own = block(x, offsets_of(LENGTHS), max(LENGTHS), causal=causal, keys=None, site=1)
    own.backward(upstream)
    grad_x, x.grad = x.grad, None
    expected = torch.cat(
        [
            layer(
                part[None],
                src_mask=nn.Transformer.generate_square_subsequent_mask(len(part)) if causal else None,
                is_causal=causal,
            )[0]
            for part in x.split(LENGTHS)
        ]
    )
    expected.backward(upstream)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x, x.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in layer.named_parameters():
        ours = block.get_parameter(OUR_NAMES[name]).grad
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-4)


# Positions


def test_end_alignment_puts_the_newest_item_at_the_last_position_start_the_oldest_at_the_first() -> None:
    lengths = (3, 1, 4)
    ids = {
        alignment: position_ids(
            sequence_of(lengths), offsets_of(lengths), replace(CONFIG, position_alignment=alignment, max_length=4)
        ).tolist()
        for alignment in ("end", "start")
    }
    assert ids == {"end": [1, 2, 3, 3, 0, 1, 2, 3], "start": [0, 1, 2, 0, 0, 1, 2, 3]}


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=8).map(tuple))
def test_positions_are_the_columns_of_padded_rows(lengths: tuple[int, ...]) -> None:
    for alignment in ("end", "start"):
        config = replace(CONFIG, position_alignment=alignment)
        found = position_ids(sequence_of(lengths), offsets_of(lengths), config)
        rows = torch.zeros(len(lengths), 20, dtype=torch.bool)
        for row, length in zip(rows, lengths, strict=True):
            row[slice(20 - length, None) if alignment == "end" else slice(length)] = True
        assert torch.equal(found, rows.nonzero()[:, 1])


def test_the_same_item_has_another_state_at_another_position() -> None:
    model = make_model()
    states = encode(model, torch.tensor([7, 7, 7], dtype=torch.int32), (3,), causal=False)
    assert not torch.allclose(states[0], states[1], atol=1e-2)


# Queries


def test_the_last_token_of_each_sequence() -> None:
    queries = Queries.last(offsets_of((3, 1, 4)))
    assert queries.tokens.tolist() == [2, 3, 7] and queries.offsets.tolist() == [0, 1, 2, 3]
    assert queries.offsets.dtype == torch.int32 and queries.tokens.dtype == torch.int64
    nothing = Queries.last(offsets_of(()))
    assert nothing.tokens.tolist() == [] and nothing.offsets.tolist() == [0]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("names", [None, (4, 8, 15, 16, 23, 42)])
def test_states_of_some_tokens_equal_their_rows_of_all_states(
    layers: int, causal: bool, names: tuple[int, ...] | None
) -> None:
    """Outputs, and the gradients they send back; with dropout too."""
    model = make_model(layers=layers)
    items = items_of(LENGTHS)
    everything = encode(model, items, LENGTHS, causal=causal, names=names)
    for queries in (Queries.last(offsets_of(LENGTHS)), last_of_each((5, 1, 1, 9, 3, 2), LENGTHS)):
        some = encode(model, items, LENGTHS, causal=causal, names=names, queries=queries)
        torch.testing.assert_close(some, everything[queries.tokens], rtol=1e-5, atol=1e-5)
        upstream = torch.randn_like(some)
        parameters = dict(model.named_parameters())
        used = [p for name, p in parameters.items() if "head" not in name and "attribute" not in name]
        found = torch.autograd.grad(some, used, upstream)
        expected = torch.autograd.grad(everything[queries.tokens], used, upstream, retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Sequences are independent


@pytest.mark.parametrize("alignment", ["end", "start"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_states_do_not_depend_on_the_rest_of_the_batch(alignment: Any, causal: bool, dropout: bool) -> None:
    model = make_model(position_alignment=alignment)
    parts = items_of(LENGTHS).split(LENGTHS)

    def states(order: tuple[int, ...]) -> list[torch.Tensor]:
        lengths = tuple(LENGTHS[b] for b in order)
        hidden = encode(
            model, torch.cat([parts[b] for b in order]), lengths, causal=causal, names=order if dropout else None
        )
        return list(hidden.split(lengths))

    together = states(tuple(range(len(LENGTHS))))
    for order in [(5, 3, 0, 2, 4, 1), (2, 1), (0,), (3, 5, 4)]:
        for b, own in zip(order, states(order), strict=True):
            torch.testing.assert_close(own, together[b], rtol=1e-5, atol=1e-5)


def test_dropout_changes_the_states_and_its_keys_repeat_it() -> None:
    model, items = make_model(), items_of(LENGTHS)
    names = tuple(range(6))
    plain, dropped = encode(model, items, LENGTHS), encode(model, items, LENGTHS, names=names)
    assert torch.equal(dropped, encode(model, items, LENGTHS, names=names))
    assert not torch.allclose(dropped, plain, atol=0.1)
    assert not torch.allclose(dropped, encode(model, items, LENGTHS, names=tuple(range(1, 7))), atol=0.1)


@pytest.mark.parametrize("where", ["hidden_dropout", "attention_dropout"])
def test_each_kind_of_dropout_can_be_alone(where: str) -> None:
    off = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    names, items = tuple(range(6)), items_of(LENGTHS)
    plain = encode(make_model(**off), items, LENGTHS, names=names)
    assert torch.equal(plain, encode(make_model(**off), items, LENGTHS))
    assert not torch.allclose(encode(make_model(**off | {where: 0.5}), items, LENGTHS, names=names), plain, atol=0.1)


def test_each_place_that_drops_has_bits_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    masks: list[torch.Tensor] = []
    attention_keys: list[torch.Tensor] = []

    def attention(q: torch.Tensor, *_: object, dropout_keys: torch.Tensor, **__: object) -> torch.Tensor:
        attention_keys.append(dropout_keys)
        return q

    monkeypatch.setattr("s3rec_dist.model.encoder.masked_attention", attention)
    for parameter in model.parameters():  # each sublayer's output is 1 before dropout, each norm's is 0
        nn.init.zeros_(parameter)
    for block in model.blocks:
        nn.init.ones_(block.attention_output.bias)
        nn.init.ones_(block.inner_output.bias)
        for norm in (block.attention_norm, block.output_norm):
            norm.register_forward_pre_hook(lambda _, args: masks.append(args[0].detach()))
    encode(model, items_of(LENGTHS), LENGTHS, names=tuple(range(6)))
    assert len(masks) == 4
    for one, two in itertools.combinations(masks, 2):
        assert set(one.unique().tolist()) == {0.0, 2.0}
        assert abs(float((one == two).double().mean()) - 0.5) < 5 * 0.5 / one.numel() ** 0.5
    assert torch.cat(attention_keys).unique().numel() == 2 * len(LENGTHS)


@pytest.mark.parametrize("causal", [False, True])
def test_a_causal_state_depends_on_no_later_item_a_bidirectional_one_on_all(causal: bool) -> None:
    model = make_model()
    items = items_of((12,))
    before = encode(model, items, (12,), causal=causal)
    items[5] = items[5] % N_ITEMS + 1
    changed = (encode(model, items, (12,), causal=causal) - before).abs().amax(1) > 1e-4
    assert changed.tolist() == [not causal or i >= 5 for i in range(12)]


@pytest.mark.parametrize("alignment", ["end", "start"])
def test_more_items_than_positions_are_refused(alignment: Any) -> None:
    with pytest.raises(ValueError, match="a sequence is 21 long, the model has 20 positions; cut it"):
        encode(make_model(position_alignment=alignment), items_of((3, 21)), (3, 21))
