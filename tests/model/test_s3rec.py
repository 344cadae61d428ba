"""S3Rec: packed and padded input agree, losses are their definitions, and a batch is the sum of its samples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.config import FinetuneConfig, ModelConfig, PretrainConfig
from s3rec_dist.data.dataset import ItemAttributes
from s3rec_dist.data.reconstruct import FinetuneBatch, PretrainBatch, finetune_batch, pretrain_batch
from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.model import S3Rec
from s3rec_dist.model.encoder import position_ids
from s3rec_dist.model.s3rec import Losses

N_ITEMS, N_ATTRIBUTES, LENGTH = 40, 9, 12
CONFIG = ModelConfig(hidden_size=16, inner_size=32, heads=2, layers=2, max_length=LENGTH, initializer_range=0.2)
TASKS = ("aap", "mip", "map", "sp")
MASK = N_ITEMS + 1

FinetuneLoss = Literal["bce", "bpr", "ce"]
Positions = Literal["all", "last"]
Alignment = Literal["end", "start"]


def attributes() -> ItemAttributes:
    """Each item has up to 4 attributes; item 1 has none."""
    has = np.random.default_rng(0).random((N_ITEMS + 2, N_ATTRIBUTES)) < 0.2
    has[[0, 1, MASK]] = False
    return ItemAttributes(
        np.concatenate([[0], np.cumsum(has.sum(1))]).astype(np.int64), (has.nonzero()[1] + 1).astype(np.int32)
    )


def make_model(pretrain: PretrainConfig | None = None, finetune: FinetuneConfig | None = None, **other: Any) -> S3Rec:
    torch.manual_seed(0)
    return S3Rec(replace(CONFIG, **other), N_ITEMS, N_ATTRIBUTES, attributes(), pretrain, finetune)


def packed(sequences: list[list[int]]) -> PackedSequences:
    lengths = [len(s) for s in sequences]
    return PackedSequences(
        torch.tensor(list(itertools.chain(*sequences)), dtype=torch.int32),
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        (torch.arange(len(sequences)) << 24) + torch.tensor(lengths, dtype=torch.int64),
        max(lengths, default=0),
    )


def histories(count: int = 9, shortest: int = 1, longest: int = LENGTH, seed: int = 0) -> list[list[int]]:
    """Of all lengths, the shortest and the longest among them."""
    rng = np.random.default_rng(seed)
    lengths = [shortest, longest, *rng.integers(shortest, longest + 1, max(count - 2, 0))][:count]
    return [rng.integers(1, N_ITEMS + 1, n).tolist() for n in lengths]


def pretraining(sequences: PackedSequences) -> PretrainBatch:
    pool = torch.arange(1, N_ITEMS + 1, dtype=torch.int32)
    return pretrain_batch(sequences, n_items=N_ITEMS, segment_pool=pool, mask_ratio=0.3, key=11)


def finetuning(sequences: PackedSequences) -> FinetuneBatch:
    return finetune_batch(sequences, n_items=N_ITEMS, key=11)


def padded(sequences: list[list[int]], side: str, length: int = LENGTH) -> torch.Tensor:
    rows = torch.zeros(len(sequences), length, dtype=torch.int64)
    for row, items in zip(rows, sequences, strict=True):
        row[slice(length - len(items), None) if side == "left" else slice(len(items))] = torch.tensor(items)
    return rows


def padded_batch(batch: PretrainBatch) -> dict[str, torch.Tensor]:
    """The seven tensors of the reference, left-padded."""
    lengths = batch.offsets[: len(batch) + 1].diff().tolist()

    def rows(values: torch.Tensor) -> torch.Tensor:
        return padded([part.tolist() for part in values.split(lengths)], "left")

    negatives = batch.original.clone()
    negatives[batch.masked] = batch.negatives
    masked, context, positive, negative = (rows(part) for part in batch.items.view(4, -1))
    original = rows(batch.original)
    has = attributes()
    features = torch.zeros(*original.shape, N_ATTRIBUTES + 1, dtype=torch.int64)
    for place in original.nonzero().tolist():
        item = int(original[tuple(place)])
        features[tuple(place)][torch.tensor(has.values[has.offsets[item] : has.offsets[item + 1]]).long()] = 1
    return {
        "features": features,
        "masked_item_sequence": masked,
        "pos_items": original,
        "neg_items": rows(negatives),
        "masked_segment_sequence": context,
        "pos_segment": positive,
        "neg_segment": negative,
    }


def interaction(sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    """RecBole's batch: right-padded histories, a next item and a negative each."""
    return {
        "item_id_list": padded(sequences, "right"),
        "item_length": torch.tensor([len(s) for s in sequences]),
        "item_id": torch.arange(1, len(sequences) + 1),
        "neg_item_id": torch.arange(1, len(sequences) + 1) + 20,
    }


@dataclass
class Gradients:
    values: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: S3Rec, loss: torch.Tensor) -> Gradients:
        """By parameter, of those that the loss reaches."""
        model.zero_grad()
        loss.backward()
        return cls({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    def assert_close(self, expected: Gradients) -> None:
        assert self.values.keys() == expected.values.keys()
        for name, value in self.values.items():
            scale = float(expected.values[name].abs().max())
            torch.testing.assert_close(
                value, expected.values[name], rtol=1e-4, atol=1e-5 * scale + 1e-6, msg=lambda t, n=name: f"{n}: {t}"
            )


def assert_same_losses(found: Losses, expected: Losses) -> None:
    assert found.counts == expected.counts
    torch.testing.assert_close(found.terms, expected.terms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=1e-5)


# The parameters


def test_weights_start_normal_biases_at_zero_and_norms_at_one() -> None:
    model = S3Rec(replace(CONFIG, initializer_range=0.02), 5000, 300)
    for name, parameter in model.state_dict().items():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float("weight" in name))), name
        elif "bias" in name:
            assert not parameter.any(), name
        else:
            assert abs(float(parameter.std()) / 0.02 - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
            assert abs(float(parameter.mean())) < 5 * 0.02 / parameter.numel() ** 0.5, name
    assert model.item_embedding.weight.shape == (5002, 16)
    assert model.attribute_embedding.weight.shape == (301, 16)


def test_the_state_dict_holds_parameters_only() -> None:
    model = make_model()
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


# Packed and padded


@pytest.mark.parametrize(("alignment", "side"), [("end", "left"), ("start", "right")])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_padded_states_equal_packed_ones(alignment: Alignment, side: str, bidirectional: bool) -> None:
    model, sequences = make_model(position_alignment=alignment).eval(), histories()
    batch = packed(sequences)
    sequence = torch.arange(len(sequences)).repeat_interleave(batch.offsets.diff())
    positions = position_ids(sequence, batch.offsets, model.config)
    expected = model.encode(batch.items, positions, batch.offsets, batch.max_length, causal=not bidirectional)
    rows = padded(sequences, side)
    hidden = model(rows, bidirectional)
    assert hidden.shape == (len(sequences), LENGTH, 16)
    torch.testing.assert_close(hidden[rows != 0], expected, rtol=1e-5, atol=1e-5)
    assert not hidden[rows == 0].any()


def test_an_items_position_in_padded_input_is_its_column() -> None:
    model = make_model().eval()
    left, right = (model(padded([[3, 4, 5]], side)) for side in ("left", "right"))
    assert not torch.allclose(left[0, -3:], right[0, :3], atol=1e-2)
    with torch.no_grad():
        model.position_embedding.weight.zero_()
    left, right = (model(padded([[3, 4, 5]], side)) for side in ("left", "right"))
    torch.testing.assert_close(left[0, -3:], right[0, :3])


@pytest.mark.parametrize("training", [False, True])
def test_rows_of_padding_alone_give_zeros_and_leave_the_others_as_they_are(training: bool) -> None:
    model, sequences = make_model().train(training), histories()
    rows = padded(sequences, "left")
    torch.manual_seed(1)
    expected = model(rows)
    torch.manual_seed(1)
    spread = model(torch.stack([rows, torch.zeros_like(rows)], 1).flatten(0, 1))
    torch.testing.assert_close(spread[::2], expected)
    assert not spread[1::2].any()
    assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 16)


def test_dropout_is_on_in_training_mode_alone_and_follows_torchs_generator() -> None:
    model, rows = make_model(), padded(histories(), "left")

    def states(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(rows).detach()

    assert torch.equal(states(1), states(1))
    assert not torch.allclose(states(1), states(2), atol=0.1)
    model.eval()
    assert torch.equal(states(1), states(2))


def test_more_columns_than_positions_are_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="a sequence is 13 long, the model has 12 positions; cut it"):
        model(torch.ones(2, 13, dtype=torch.int64))
    assert model(torch.ones(2, 12, dtype=torch.int64)).shape == (2, 12, 16)


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_the_attention_mask_opens_items_and_under_causality_only_earlier_ones(rows: list[list[int]]) -> None:
    model = make_model()
    for bidirectional in (True, False):
        mask = model.get_attention_mask(torch.tensor(rows), bidirectional)
        assert mask.shape == (len(rows), 1, 5, 5) and mask.dtype == torch.float32
        for b, i, j in itertools.product(range(len(rows)), range(5), range(5)):
            is_open = rows[b][j] != 0 and (bidirectional or j <= i)
            assert float(mask[b, 0, i, j]) == (0.0 if is_open else -10000.0)


# Pretraining


@torch.no_grad()
def naive_pretrain_losses(model: S3Rec, batch: PretrainBatch, pairwise: str) -> dict[str, float]:
    """The reference implementation's sums, a sample and a position at a time, from padded hidden states."""
    rows = padded_batch(batch)
    items, table = model.item_embedding.weight, model.attribute_embedding.weight

    def pair(positive: torch.Tensor, negative: torch.Tensor) -> float:
        if pairwise == "original":
            positive, negative = positive.sigmoid(), negative.sigmoid()
        return float(-(positive - negative).sigmoid().log())

    sums = dict.fromkeys(TASKS, 0.0)
    hidden = model(rows["masked_item_sequence"])
    for place in rows["pos_items"].nonzero().tolist():
        b, i = place
        is_masked = int(rows["masked_item_sequence"][b, i]) == MASK
        state = hidden[b, i]
        head = model.map_head if is_masked else model.aap_head
        targets = rows["features"][b, i].float()
        sums["map" if is_masked else "aap"] += float(
            F.binary_cross_entropy_with_logits(table @ head(state), targets, reduction="sum")
        )
        if is_masked:
            scores = [model.mip_head(state) @ items[rows[name][b, i]] for name in ("pos_items", "neg_items")]
            sums["mip"] += pair(*scores)
    context, positive, negative = (
        model(rows[name])[:, -1] for name in ("masked_segment_sequence", "pos_segment", "neg_segment")
    )
    for b in range(len(batch)):
        sums["sp"] += pair(model.sp_head(context[b]) @ positive[b], model.sp_head(context[b]) @ negative[b])
    return sums


@pytest.mark.parametrize("pairwise", ["original", "bpr"])
def test_pretraining_losses_are_the_references_sums_term_by_term(pairwise: Any) -> None:
    model = make_model(PretrainConfig(pairwise=pairwise)).eval()
    batch = pretraining(packed(histories()))
    expected = naive_pretrain_losses(model, batch, pairwise)
    found = model.pretrain_losses(batch)
    assert {task: float(loss) for task, loss in found.terms.items()} == pytest.approx(expected, rel=1e-5)
    assert found.counts == {
        "aap": len(batch.unmasked) * (N_ATTRIBUTES + 1),
        "mip": len(batch.masked),
        "map": len(batch.masked) * (N_ATTRIBUTES + 1),
        "sp": len(batch),
    }


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    weights = {"aap_weight": 0.3, "mip_weight": 1.7, "map_weight": 0.0, "sp_weight": 5.0}
    losses = make_model(PretrainConfig(**weights)).pretrain_losses(pretraining(packed(histories())))
    expected = sum(weights[f"{task}_weight"] * float(loss) for task, loss in losses.terms.items())
    assert losses.total.item() == pytest.approx(expected, rel=1e-6)
    assert not any(loss.requires_grad for loss in losses.terms.values())


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_packed_pretraining_equals_padded_pretraining_in_losses_and_gradients(backend: Any) -> None:
    model = make_model(attention=backend).eval()
    batch = pretraining(packed(histories()))
    by_pack, by_padding = model.pretrain_losses(batch), model.padded_pretrain_losses(**padded_batch(batch))
    assert_same_losses(by_pack, by_padding)
    Gradients.of(model, by_pack.total).assert_close(Gradients.of(model, by_padding.total))


def test_items_without_attributes_are_negatives_of_every_attribute() -> None:
    """As is each item of a model without an attribute table."""
    torch.manual_seed(0)
    model = S3Rec(CONFIG, N_ITEMS, N_ATTRIBUTES).eval()
    batch = pretraining(packed(histories()))
    losses = model.pretrain_losses(batch)
    rows = padded_batch(batch)
    rows["features"] = torch.zeros_like(rows["features"])
    assert_same_losses(losses, model.padded_pretrain_losses(**rows))


def test_attribute_losses_against_every_attribute_drawn_once_are_those_against_all() -> None:
    model, batch = make_model().eval(), pretraining(packed(histories()))
    exact = model.pretrain_losses(batch)
    sampled = model.pretrain_losses(batch, attribute_negatives=torch.arange(N_ATTRIBUTES + 1).flip(0))
    assert_same_losses(sampled, exact)
    Gradients.of(model, sampled.total).assert_close(Gradients.of(model, exact.total))
    fewer = model.pretrain_losses(batch, attribute_negatives=torch.tensor([1, 1]))
    assert fewer.counts == exact.counts and fewer.terms["mip"] == exact.terms["mip"]
    assert fewer.terms["aap"] != exact.terms["aap"] and fewer.terms["map"] != exact.terms["map"]


def test_reconstruction_of_padded_input_gives_left_padded_samples_of_it() -> None:
    model, sequences = make_model(), histories(40, shortest=2)
    lengths = torch.tensor([len(s) for s in sequences])
    torch.manual_seed(0)
    features, masked, pos_items, neg_items, context, positive, negative = model.reconstruct_pretrain_data(
        padded(sequences, "right"), lengths
    )
    original = padded(sequences, "left")
    inside, is_masked = original != 0, masked == MASK
    assert torch.equal(pos_items, original)
    assert torch.equal(masked, torch.where(is_masked, MASK, original)) and is_masked[:, -1].all()
    assert torch.equal(neg_items == original, ~is_masked)
    for row, negatives in zip(sequences, neg_items, strict=True):
        drawn = set(negatives[-len(row) :][torch.tensor(row) != negatives[-len(row) :]].tolist())
        assert not drawn & set(row) and drawn <= set(range(1, N_ITEMS + 1))
    segment = positive != MASK
    assert torch.equal(positive, torch.where(segment, original, MASK))
    assert torch.equal(context, torch.where(segment & inside, MASK, original))
    assert torch.equal((negative == MASK) | ~inside, (positive == MASK) | ~inside)
    expected = padded_batch(pretraining(packed(sequences)))["features"]
    assert torch.equal(features, expected)
    other = model.reconstruct_pretrain_data(padded(sequences, "right"), lengths)
    assert not torch.equal(other[1], masked)


def test_pretrain_on_reconstructed_data_reaches_every_parameter() -> None:
    model, sequences = make_model(), histories(30)
    data = model.reconstruct_pretrain_data(padded(sequences, "right"), torch.tensor([len(s) for s in sequences]))
    loss = model.pretrain(*data)
    gradients = Gradients.of(model, loss).values
    assert loss.dim() == 0 and loss.isfinite()
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() and g.any() for g in gradients.values())
    model.eval()
    assert torch.equal(model.pretrain(*data), model.padded_pretrain_losses(*data).total)


# Fine-tuning


@torch.no_grad()
def naive_finetune_loss(model: S3Rec, batch: FinetuneBatch, loss: FinetuneLoss, positions: Positions) -> float:
    """A position at a time, from padded hidden states."""
    items = model.item_embedding.weight
    side = "left" if model.config.position_alignment == "end" else "right"
    total = 0.0
    for begin, end in itertools.pairwise(batch.offsets.tolist()):
        row = batch.items[begin:end].tolist()
        rows = padded([row], side)
        states = model(rows, bidirectional=False)[rows != 0]
        for i in range(len(row)) if positions == "all" else [len(row) - 1]:
            positive = states[i] @ items[batch.targets[begin + i]]
            negative = states[i] @ items[batch.negatives[begin + i]]
            if loss == "bce":
                total -= float(positive.sigmoid().log() + (1 - negative.sigmoid()).log())
            elif loss == "bpr":
                total -= float((positive - negative).sigmoid().log())
            else:
                scores = items[1:MASK] @ states[i]
                total -= float(scores.log_softmax(0)[batch.targets[begin + i] - 1])
    return total


@pytest.mark.parametrize("alignment", ["end", "start"])
@pytest.mark.parametrize("loss", ["bce", "bpr", "ce"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_finetuning_losses_are_their_definitions(
    alignment: Alignment, loss: FinetuneLoss, positions: Positions
) -> None:
    settings = FinetuneConfig(loss=loss, positions=positions)
    model = make_model(finetune=settings, position_alignment=alignment).eval()
    batch = finetuning(packed(histories(shortest=2, longest=LENGTH + 1)))
    found = model.finetune_losses(batch)
    assert found.total.item() == pytest.approx(naive_finetune_loss(model, batch, loss, positions), rel=1e-5)
    assert found.terms.keys() == {loss} and float(found.terms[loss]) == found.total.item()
    assert found.counts == {loss: len(batch.items) if positions == "all" else len(batch)}


def test_softmax_leaves_the_padding_and_the_mask_row_out() -> None:
    model = make_model(finetune=FinetuneConfig(loss="ce")).eval()
    batch = finetuning(packed(histories(shortest=2)))
    loss = model.finetune_losses(batch).total
    gradient = Gradients.of(model, loss).values["item_embedding.weight"]
    assert [i for i, row in enumerate(gradient) if not row.any()] == [0, MASK]
    with torch.no_grad():
        model.item_embedding.weight[[0, MASK]] = 100.0
    assert torch.equal(model.finetune_losses(batch).total, loss)


# RecBole's methods


@pytest.mark.parametrize("loss", ["bce", "bpr", "ce"])
def test_calculate_loss_finetunes_on_the_mean_over_last_positions(loss: FinetuneLoss) -> None:
    sequences = histories()
    batch = interaction(sequences)
    model = make_model(finetune=FinetuneConfig(loss=loss)).eval()
    model.train_stage = "finetune"
    hidden = torch.stack([model(padded([s], "left"), bidirectional=False)[0, -1] for s in sequences])
    items = model.item_embedding.weight
    positive = (hidden * items[batch["item_id"]]).sum(1)
    negative = (hidden * items[batch["neg_item_id"]]).sum(1)
    expected = {
        "bce": -(positive.sigmoid().log() + (1 - negative.sigmoid()).log()).mean(),
        "bpr": -(positive - negative).sigmoid().log().mean(),
        "ce": F.cross_entropy(hidden @ items[1:MASK].T, batch["item_id"] - 1),
    }[loss]
    torch.testing.assert_close(model.calculate_loss(batch), expected, rtol=1e-5, atol=1e-5)


def test_calculate_loss_needs_negatives_unless_it_is_softmax() -> None:
    batch = interaction(histories())
    del batch["neg_item_id"]
    for loss in ("bce", "bpr", "ce"):
        model = make_model(finetune=FinetuneConfig(loss=loss))
        model.train_stage = "finetune"
        if loss == "ce":
            assert model.calculate_loss(batch).isfinite()
        else:
            with pytest.raises(ValueError, match=f"loss='{loss}' needs a negative item .*'neg_item_id'"):
                model.calculate_loss(batch)


def test_calculate_loss_pretrains_by_default_and_needs_no_next_item() -> None:
    model, sequences = make_model().eval(), histories()
    batch = {name: interaction(sequences)[name] for name in ("item_id_list", "item_length")}
    torch.manual_seed(3)
    loss = model.calculate_loss(batch)
    torch.manual_seed(3)
    data = model.reconstruct_pretrain_data(batch["item_id_list"], batch["item_length"])
    assert model.train_stage == "pretrain" and torch.equal(loss, model.pretrain(*data))


def test_predict_is_the_items_column_of_full_sort_predict() -> None:
    model, batch = make_model().eval(), interaction(histories())
    scores = model.full_sort_predict(batch)
    assert scores.shape == (9, N_ITEMS + 1)
    torch.testing.assert_close(model.predict(batch), scores[torch.arange(9), batch["item_id"]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alignment", ["end", "start"])
def test_encode_last_is_the_causal_state_of_the_newest_item(alignment: Alignment) -> None:
    model, sequences = make_model(position_alignment=alignment).eval(), histories()
    batch = packed(sequences)
    rows = padded(sequences, "left" if alignment == "end" else "right")
    states = model(rows, bidirectional=False)
    newest = [-1 if alignment == "end" else len(s) - 1 for s in sequences]
    expected = torch.stack([state[i] for state, i in zip(states, newest, strict=True)])
    found = model.encode_last(batch.items, batch.offsets, batch.max_length)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    scores = model.full_sort_predict(interaction(sequences))
    torch.testing.assert_close(found @ model.item_embedding.weight[:MASK].T, scores)


def test_encode_last_never_drops_even_in_training_mode() -> None:
    model, batch = make_model().train(), packed(histories())
    first, second = (model.encode_last(batch.items, batch.offsets, batch.max_length) for _ in range(2))
    assert torch.equal(first, second)


# A batch is the sum of its samples


OBJECTIVES = ("pretrain", "bce", "bpr", "ce")


def model_of(objective: Any, positions: Positions = "all", **other: Any) -> S3Rec:
    """A model whose ``train_stage`` and loss are the objective's."""
    loss = "bce" if objective == "pretrain" else objective
    model = make_model(finetune=FinetuneConfig(loss=loss, positions=positions), **other)
    model.train_stage = "pretrain" if objective == "pretrain" else "finetune"
    return model


def losses_of(model: S3Rec, sequences: PackedSequences, seed: int | None) -> Losses:
    if model.train_stage == "pretrain":
        return model.pretrain_losses(pretraining(sequences), seed)
    return model.finetune_losses(finetuning(sequences), seed)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("alignment", ["end", "start"])
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_losses_and_gradients_of_a_batch_are_the_sums_of_its_parts(
    objective: str, alignment: Alignment, parts: int
) -> None:
    """With dropout on: so a step does the same on any number of ranks. Of 12 parts some have no sample."""
    model = model_of(objective, position_alignment=alignment)
    batch = packed(histories(shortest=2))
    whole = losses_of(model, batch, 5)
    pieces = [losses_of(model, part, 5) for part in batch.split(parts)]
    summed = Losses(
        torch.stack([piece.total for piece in pieces]).sum(),
        {task: torch.stack([piece.terms[task] for piece in pieces]).sum() for task in whole.terms},
        {task: sum(piece.counts[task] for piece in pieces) for task in whole.counts},
    )
    assert_same_losses(summed, whole)
    Gradients.of(model, summed.total).assert_close(Gradients.of(model, whole.total))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_do_not_depend_on_the_order_of_the_samples(objective: str) -> None:
    model, sequences = model_of(objective), histories(shortest=2)
    batch = packed(sequences)
    order = [4, 8, 0, 3, 1, 7, 2, 6, 5]
    shuffled = replace(packed([sequences[b] for b in order]), sample_ids=batch.sample_ids[order])
    assert_same_losses(losses_of(model, shuffled, 5), losses_of(model, batch, 5))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_dropout_seed_turns_dropout_on_repeats_and_differs_from_others(objective: str) -> None:
    model, batch = model_of(objective), packed(histories(shortest=2))

    def total(seed: int | None) -> float:
        return losses_of(model, batch, seed).total.item()

    assert total(1) == total(1) and total(None) == total(None)
    assert len({total(None), total(1), total(2)}) == 3
    off = model_of(objective, hidden_dropout=0.0, attention_dropout=0.0)
    assert losses_of(off, batch, 1).total.item() == total(None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_activation_checkpointing_changes_no_bit_of_losses_and_gradients(objective: str) -> None:
    """With dropout on, which computing again must repeat."""
    batch, found = packed(histories(shortest=2)), []
    for activation_checkpointing in (False, True):
        model = model_of(objective, activation_checkpointing=activation_checkpointing)
        loss = losses_of(model, batch, 5).total
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    assert len(found[0]) > 20
    for plain, again in zip(*found, strict=True):
        assert plain is again is None or torch.equal(plain, again)


def test_a_samples_four_sequences_drop_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of one item is four times the same token but for the mask: each has bits of its own."""
    model = make_model()
    seen: list[torch.Tensor] = []
    encode = model.encode

    def watched(*arguments: Any, keys: Any, **options: Any) -> torch.Tensor:
        seen.extend((keys.tokens, keys.sequences))
        return encode(*arguments, keys=keys, **options)

    monkeypatch.setattr(model, "encode", watched)
    model.pretrain_losses(pretraining(packed(histories())), 1)
    for keys in seen:
        assert keys.unique().numel() == keys.numel()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("seed", [None, 5])
def test_a_batch_without_samples_has_loss_zero_and_zero_gradients_where_others_have_some(
    objective: str, positions: Positions, seed: int | None
) -> None:
    model = model_of(objective, positions)
    reached = Gradients.of(model, losses_of(model, packed(histories(shortest=2)), seed).total).values
    empty = losses_of(model, packed([]), seed)
    gradients = Gradients.of(model, empty.total).values
    assert empty.total.item() == 0 and not any(empty.terms.values()) and not any(empty.counts.values())
    assert gradients.keys() == reached.keys() and not any(g.any() for g in gradients.values())
    if objective == "pretrain":
        assert gradients.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bf16_losses_are_fp32_sums_near_those_of_the_fp32_model(objective: str) -> None:
    """At the paper's initial scale, where scores are small: 1% of the sums."""
    model, half = (model_of(objective, initializer_range=0.02) for _ in range(2))
    half.to(torch.bfloat16)
    batch = packed(histories(shortest=2))
    expected, found = losses_of(model, batch, 5), losses_of(half, batch, 5)
    assert found.total.dtype == torch.float32
    for task, value in found.terms.items():
        assert float(value) == pytest.approx(float(expected.terms[task]), rel=1e-2), task
    assert all(g.isfinite().all() for g in Gradients.of(half, found.total).values.values())


# Items by their attributes

COLD = [3, 7, 21]


def feature_model(finetune: FinetuneConfig | None = None, **other: Any) -> S3Rec:
    """With own rows as after training, those of :data:`COLD` items at zero."""
    model = make_model(finetune=finetune, item_features="add", **other)
    with torch.no_grad():
        model.item_embedding.weight.normal_(std=0.2)
        model.item_embedding.weight[COLD] = 0
        model.feature_head.weight.normal_(std=0.3)
    model.is_cold = torch.zeros(N_ITEMS + 2, dtype=torch.bool)
    model.is_cold[COLD] = True
    return model


def naive_vectors(model: S3Rec) -> torch.Tensor:
    """[N + 2, E], an item at a time."""
    has, rows = attributes(), []
    for item in range(N_ITEMS + 2):
        own = torch.from_numpy(has.values[has.offsets[item] : has.offsets[item + 1]]).long()
        row = model.item_embedding.weight[item]
        if len(own):
            row = row + model.feature_head(model.attribute_embedding.weight[own].mean(0))
        rows.append(row)
    return torch.stack(rows)


def all_losses(model: S3Rec, seed: int | None = None) -> dict[str, torch.Tensor]:
    """By stage; ``seed`` turns dropout on."""
    return {
        "pretrain": model.pretrain_losses(pretraining(packed(histories())), seed).total,
        "finetune": model.finetune_losses(finetuning(packed(histories(shortest=2))), seed).total,
    }


def test_own_rows_start_at_zero_and_the_map_as_the_identity() -> None:
    model = make_model(item_features="add")
    own = model.item_embedding.weight
    assert not own[1:MASK].any() and own[0].any() and own[MASK].any()
    assert torch.equal(model.feature_head.weight, torch.eye(16))


def test_vectors_are_their_definition_wherever_they_are_taken_from() -> None:
    model = feature_model()
    expected = naive_vectors(model)
    torch.testing.assert_close(model.catalogue_vectors, expected)
    items = torch.tensor([[5, 0], [MASK, 3]])
    torch.testing.assert_close(model.item_vectors(items, torch.tensor([9])).of(items), expected[items])


@pytest.mark.parametrize("loss", ["bce", "bpr", "ce"])
def test_a_folded_model_is_a_plain_one_with_the_same_losses_and_scores(loss: Any) -> None:
    model = feature_model(FinetuneConfig(loss=loss)).eval()
    plain = model.folded()
    assert plain.config.item_features == "none" and not plain.training and not hasattr(plain, "feature_head")
    torch.testing.assert_close(plain.item_embedding.weight, naive_vectors(model))
    for name, found in all_losses(plain).items():
        torch.testing.assert_close(found, all_losses(model)[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        plain.full_sort_predict(interaction(histories())), model.full_sort_predict(interaction(histories()))
    )
    assert plain.folded() is plain


@pytest.mark.parametrize("loss", ["bce", "bpr", "ce"])
def test_padded_input_gives_the_losses_and_gradients_of_packed_input(loss: Any) -> None:
    model = feature_model(FinetuneConfig(loss=loss, positions="last")).eval()
    batch = pretraining(packed(histories()))
    ours, theirs = model.pretrain_losses(batch), model.padded_pretrain_losses(**padded_batch(batch))
    assert_same_losses(theirs, ours)
    Gradients.of(model, theirs.total).assert_close(Gradients.of(model, ours.total))

    model.train_stage = "finetune"
    tuning = finetuning(packed(histories(shortest=2)))
    last = tuning.offsets[1:].long() - 1
    rows = [part.tolist() for part in tuning.items.split(tuning.offsets.diff().tolist())]
    padded_loss = model.calculate_loss(
        {
            "item_id_list": padded(rows, "right"),
            "item_length": tuning.offsets.diff().long(),
            "item_id": tuning.targets[last].long(),
            "neg_item_id": tuning.negatives[last].long(),
        }
    )
    packed_loss = model.finetune_losses(tuning).total / len(tuning)
    torch.testing.assert_close(padded_loss, packed_loss, rtol=1e-5, atol=1e-5)
    Gradients.of(model, padded_loss).assert_close(Gradients.of(model, packed_loss))


def test_scores_by_attributes_are_the_same_one_by_one_and_all_at_once() -> None:
    model, batch = feature_model().eval(), interaction(histories())
    scores = model.full_sort_predict(batch)
    torch.testing.assert_close(model.predict(batch), scores.gather(1, batch["item_id"][:, None]).squeeze(1))


@pytest.mark.parametrize("loss", ["bce", "bpr", "ce"])
def test_no_loss_reaches_the_own_row_of_a_cold_item(loss: Any) -> None:
    model = feature_model(FinetuneConfig(loss=loss))
    for value in all_losses(model, seed=3).values():
        gradients = Gradients.of(model, value).values
        assert not gradients["item_embedding.weight"][COLD].any() and gradients["item_embedding.weight"][1:MASK].any()
        assert gradients["feature_head.weight"].any()


def test_id_dropout_is_a_function_of_item_and_step_seed_alone() -> None:
    model = feature_model(item_id_dropout=0.5)
    without = naive_vectors(model) - model.item_embedding.weight
    vectors = model.item_vectors(dropout_seed=9).weight
    own = vectors - without
    dropped = own.abs().amax(1) < 1e-6
    assert 10 < int(dropped.sum()) < N_ITEMS - 10
    torch.testing.assert_close(own[~dropped], model.item_embedding.weight[~dropped], rtol=1e-4, atol=1e-5)
    some = torch.tensor([MASK, 4, 4, 30, 8])
    assert torch.equal(model.item_vectors(some, dropout_seed=9).of(some), vectors[some])
    assert not torch.equal(model.item_vectors(dropout_seed=10).weight, vectors)


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_with_id_dropout_a_batch_is_the_sum_of_its_samples(loss: Any) -> None:
    """And so the same on any number of processes."""
    model = feature_model(FinetuneConfig(loss=loss), item_id_dropout=0.5)
    sequences = packed(histories(shortest=2))
    whole, *halves = [
        model.finetune_losses(finetuning(part), dropout_seed=9).total for part in (sequences, *sequences.split(2))
    ]
    parts = sum(halves, torch.zeros(()))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)
    Gradients.of(model, parts).assert_close(Gradients.of(model, whole))


def test_items_without_attributes_are_their_own_rows() -> None:
    model = feature_model()
    assert torch.equal(model.catalogue_vectors[[0, 1, MASK]], model.item_embedding.weight[[0, 1, MASK]])
