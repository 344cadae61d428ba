"""Reconstruction: bit for bit a plain definition, uniform where it draws, and the same whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.data import reconstruct as module
from s3rec_dist.data.reconstruct import FinetuneBatch, PretrainBatch, finetune_batch, pretrain_batch, pretrain_sizes
from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.hashing import GOLDEN, key_of

SIGNED_64 = st.integers(-(2**63), 2**63 - 1)


def pack(samples: Sequence[Sequence[int]], ids: Sequence[int] | None = None) -> PackedSequences:
    lengths = [len(sample) for sample in samples]
    return PackedSequences(
        torch.tensor([item for sample in samples for item in sample], dtype=torch.int32),
        torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        torch.tensor(range(len(samples)) if ids is None else ids, dtype=torch.int64),
        max(lengths, default=0),
    )


def alike(sample: Sequence[int], count: int) -> PackedSequences:
    """``count`` samples of the same items, whose ids are those of consecutive rows."""
    return PackedSequences(
        torch.tensor(sample, dtype=torch.int32).repeat(count),
        torch.arange(count + 1, dtype=torch.int32) * len(sample),
        torch.arange(count) << 24 | len(sample),
        len(sample),
    )


def pretrain(
    packed: PackedSequences, n_items: int = 100, pool: Sequence[int] = range(1, 51), ratio: float = 0.2, key: int = 1
) -> PretrainBatch:
    segment_pool = torch.tensor(pool, dtype=torch.int32, device=packed.items.device)
    return pretrain_batch(packed, n_items=n_items, segment_pool=segment_pool, mask_ratio=ratio, key=key)


def assert_same(one: PretrainBatch | FinetuneBatch, other: PretrainBatch | FinetuneBatch) -> None:
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b.cpu()) if isinstance(a, torch.Tensor) else a == b, field.name


@dataclass
class Reconstructed:
    """One pretraining sample as lists."""

    original: list[int]
    masked_items: list[int]
    masked_segment: list[int]
    positive: list[int]
    negative: list[int]
    masked: list[int]
    """Masked places."""
    negatives: list[int]
    """One for each of ``masked``."""
    key: int


def unpack(batch: PretrainBatch) -> list[Reconstructed]:
    """Each sample of a batch, through nothing but the fields' definitions."""
    count, offsets, items = len(batch), batch.offsets.tolist(), batch.items.tolist()
    assert len(offsets) == 4 * count + 1 and len(items) == 4 * len(batch.original)
    sequences = [items[a:b] for a, b in pairwise(offsets)]
    masked, negatives = batch.masked.tolist(), batch.negatives.tolist()
    assert masked == sorted(set(masked)) and batch.unmasked.tolist() == sorted(batch.unmasked.tolist())
    assert sorted(masked + batch.unmasked.tolist()) == list(range(len(batch.original)))
    samples = []
    for b in range(count):
        begin, end = offsets[b], offsets[b + 1]
        own = [m for m, place in enumerate(masked) if begin <= place < end]
        masked_items, context, positive, negative = (sequences[role * count + b] for role in range(4))
        samples.append(
            Reconstructed(
                original=batch.original.tolist()[begin:end],
                masked_items=masked_items,
                masked_segment=context,
                positive=positive,
                negative=negative,
                masked=[masked[m] - begin for m in own],
                negatives=[negatives[m] for m in own],
                key=int(batch.sample_keys[b]),
            )
        )
    return samples


# The plain definition, one sample at a time, in Python's unbounded integers.


def word(x: int) -> int:
    """hashing.mix."""
    x = x * 0xD6E8FEB86659FD93 % 2**64
    x ^= x >> 32
    x = x * 0xA0761D6478BD642F % 2**64
    x ^= x >> 32
    return x - 2**64 if x >> 63 else x


def hashed(key: int, counter: int) -> int:
    return word((key + counter * GOLDEN) % 2**64)


def plain_negative(bits: int, sample: Sequence[int], n_items: int) -> int:
    item = bits % n_items + 1
    if item not in sample:
        return item
    left = n_items - len(set(sample))
    item = hashed(bits, 1) % left + 1
    for own in sorted(set(sample)):
        item += own <= item
    return item


def plain_pretrain(
    sample: list[int], sample_id: int, n_items: int, pool: Sequence[int], ratio: float, key: int
) -> Reconstructed:
    n, mask = len(sample), n_items + 1
    own = hashed(sample_id, key)
    words = [hashed(own, place) for place in range(n)]
    masked = [i for i in range(n) if i == n - 1 or words[i] >> 1 < round(ratio * 2**63) - 2**62]
    length_bits, start_bits, pool_bits = (word((own - i * (GOLDEN >> 8)) % 2**64) for i in (1, 2, 3))
    length = length_bits % (n // 2) + 1 if n > 1 else 0
    start = start_bits % (n - length + 1)
    pool_start = pool_bits % (len(pool) - length + 1)
    inside = range(start, start + length)
    outside = [mask] * n if n > 1 else sample
    return Reconstructed(
        sample,
        [mask if i in masked else sample[i] for i in range(n)],
        [mask if i in inside else sample[i] for i in range(n)],
        [sample[i] if i in inside else outside[i] for i in range(n)],
        [pool[pool_start + i - start] if i in inside else outside[i] for i in range(n)],
        masked,
        [plain_negative(words[i], sample, n_items) for i in masked],
        own,
    )


@st.composite
def batches(draw: st.DrawFn, shortest: int = 1) -> tuple[list[list[int]], list[int], int, list[int]]:
    """(samples, sample ids, n_items, segment pool): repeats, and catalogues that a sample all but exhausts."""
    n_items = draw(st.sampled_from([2, 3, 9, 10, 256, 300, 4096, 2**31 - 2]))
    item = st.one_of(st.integers(1, min(n_items, 9)), st.integers(1, n_items))
    samples = draw(st.lists(st.lists(item, min_size=shortest, max_size=9), max_size=6))
    samples = [s if len(set(s)) < n_items else [1] * len(s) for s in samples]
    ids = draw(st.lists(st.integers(0, 2**63 - 1), min_size=len(samples), max_size=len(samples), unique=True))
    pool = draw(st.lists(st.integers(1, n_items), min_size=4, max_size=12))
    return samples, ids, n_items, pool


@given(batch=batches(), ratio=st.sampled_from([0.0, 0.2, 0.5, 1.0]), key=SIGNED_64)
@settings(deadline=None, max_examples=250)
def test_a_pretraining_batch_equals_the_plain_definition_bit_for_bit(
    batch: tuple[list[list[int]], list[int], int, list[int]], ratio: float, key: int
) -> None:
    samples, ids, n_items, pool = batch
    found = unpack(pretrain(pack(samples, ids), n_items, pool, ratio, key))
    assert found == [plain_pretrain(s, i, n_items, pool, ratio, key) for s, i in zip(samples, ids, strict=True)]


@given(batch=batches(shortest=2), ratio=st.sampled_from([0.0, 0.2, 1.0]), key=SIGNED_64)
@settings(deadline=None, max_examples=100)
def test_the_way_of_a_gpu_with_sizes_known_beforehand_gives_the_same_bits(
    batch: tuple[list[list[int]], list[int], int, list[int]], ratio: float, key: int
) -> None:
    samples, ids, n_items, pool = batch
    packed, segment_pool = pack(samples, ids), torch.tensor(pool, dtype=torch.int32)
    here = [pretrain(packed, n_items, pool, ratio, key), finetune_batch(packed, n_items=n_items, key=key)]
    sizes = pretrain_sizes(packed, mask_ratio=ratio, key=key)
    with mock.patch.object(module, "_redraw_few", module._redraw):
        there = [
            pretrain_batch(packed, n_items=n_items, segment_pool=segment_pool, mask_ratio=ratio, key=key, sizes=sizes),
            finetune_batch(packed, n_items=n_items, key=key),
        ]
    for one, other in zip(here, there, strict=True):
        assert_same(one, other)


@given(batch=batches(shortest=2), key=SIGNED_64)
@settings(deadline=None, max_examples=250)
def test_a_finetuning_batch_equals_the_plain_definition_bit_for_bit(
    batch: tuple[list[list[int]], list[int], int, list[int]], key: int
) -> None:
    samples, ids, n_items, _ = batch
    found = finetune_batch(pack(samples, ids), n_items=n_items, key=key)
    assert len(found) == len(samples)
    assert found.items.tolist() == [item for s in samples for item in s[:-1]]
    assert found.targets.tolist() == [item for s in samples for item in s[1:]]
    assert found.offsets.tolist() == np.cumsum([0, *(len(s) - 1 for s in samples)]).tolist()
    assert found.max_length == max((len(s) - 1 for s in samples), default=0)
    assert found.sample_keys.tolist() == [hashed(i, key) for i in ids]
    assert found.negatives.tolist() == [
        plain_negative(hashed(hashed(i, key), place), s, n_items)
        for s, i in zip(samples, ids, strict=True)
        for place in range(len(s) - 1)
    ]


@given(batch=batches(), key=SIGNED_64)
@settings(deadline=None, max_examples=150)
def test_segment_sequences_hold_the_same_segment_of_at_most_half_of_the_sample(
    batch: tuple[list[list[int]], list[int], int, list[int]], key: int
) -> None:
    samples, ids, n_items, pool = batch
    mask = n_items + 1
    slices = {tuple(pool[a:b]) for a in range(len(pool)) for b in range(a + 1, len(pool) + 1)}
    for s in unpack(pretrain(pack(samples, ids), n_items, pool, key=key)):
        n = len(s.original)
        if n == 1:
            assert s.masked_segment == s.positive == s.negative == s.original
            continue
        inside = [place for place in range(n) if s.masked_segment[place] == mask]
        outside = [place for place in range(n) if place not in inside]
        assert inside == list(range(inside[0], inside[-1] + 1)) and 1 <= len(inside) <= n // 2
        assert [s.masked_segment[i] for i in outside] == [s.original[i] for i in outside]
        assert [s.positive[i] for i in inside] == [s.original[i] for i in inside]
        assert tuple(s.negative[i] for i in inside) in slices
        assert {s.positive[i] for i in outside} == {s.negative[i] for i in outside} == {mask}


@given(batch=batches(), ratio=st.floats(0, 1), key=SIGNED_64)
@settings(deadline=None, max_examples=150)
def test_negatives_are_items_outside_the_sample_and_the_last_item_is_always_masked(
    batch: tuple[list[list[int]], list[int], int, list[int]], ratio: float, key: int
) -> None:
    samples, ids, n_items, pool = batch
    for s in unpack(pretrain(pack(samples, ids), n_items, pool, ratio, key)):
        assert s.masked[-1] == len(s.original) - 1
        assert [i for i, item in enumerate(s.masked_items) if item == n_items + 1] == s.masked
        assert len(s.negatives) == len(s.masked)
        assert all(1 <= item <= n_items and item not in s.original for item in s.negatives)


def test_mask_ratio_zero_masks_the_last_item_alone_and_one_masks_all() -> None:
    packed = alike([5, 6, 7, 8], 2000)
    none, all_ = pretrain(packed, ratio=0.0), pretrain(packed, ratio=1.0)
    assert none.masked.tolist() == list(range(3, 8000, 4)) and len(none.unmasked) == 6000
    assert all_.masked.tolist() == list(range(8000)) and len(all_.unmasked) == 0
    assert len(none.negatives) == 2000 and len(all_.negatives) == 8000


def test_types_and_bounds_are_what_the_encoder_expects() -> None:
    packed = pack([[1, 2, 3], [4], [5, 6]])
    for batch in (pretrain(packed), finetune_batch(pack([[1, 2, 3], [4, 5]]), n_items=9, key=0)):
        tensors = {
            f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in ("max_length", "step_targets")
        }
        kinds = {name: tensor.dtype for name, tensor in tensors.items()}
        wide = {"masked", "unmasked", "sample_keys"}
        assert kinds == {name: torch.int64 if name in wide else torch.int32 for name in kinds}
    assert pretrain(packed).max_length == 3
    assert finetune_batch(packed, n_items=9, key=0).max_length == 2


def test_the_packed_batch_is_left_as_it_was() -> None:
    packed = pack([[1, 2, 3, 4], [5, 6]])
    before = [tensor.clone() for tensor in (packed.items, packed.offsets, packed.sample_ids)]
    pool = torch.arange(1, 9, dtype=torch.int32)
    batch = pretrain_batch(packed, n_items=9, segment_pool=pool, mask_ratio=1.0, key=3)
    finetune_batch(packed, n_items=9, key=3)
    batch.items.fill_(-1)  # nor do the sequences share memory with it
    for then, now in zip(before, (packed.items, packed.offsets, packed.sample_ids), strict=True):
        assert torch.equal(then, now)
    assert pool.tolist() == list(range(1, 9))


# Distributions: fixed keys, bounds of 5 standard deviations (a chance of 6e-7 each, had the key not been fixed).


def z_of_chi_square(counts: np.ndarray, expected: np.ndarray | float | None = None) -> float:
    """Standard score of Pearson's statistic against ``expected`` counts, by default equal ones."""
    expected = counts.sum() / counts.size if expected is None else expected
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (counts.size - 1)) / (2 * (counts.size - 1)) ** 0.5


def masks(batch: PretrainBatch) -> np.ndarray:
    """Bool [B, n] of a batch of equally long samples."""
    mask = np.zeros(len(batch.original), dtype=bool)
    mask[batch.masked.numpy()] = True
    return mask.reshape(len(batch), -1)


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.5, 0.97])
def test_each_item_but_the_last_is_masked_with_the_ratio_independently(ratio: float) -> None:
    mask = masks(pretrain(alike(range(1, 8), 40_000), ratio=ratio))
    assert mask[:, -1].all()
    sigma = (ratio * (1 - ratio) / len(mask)) ** 0.5
    assert np.abs(mask[:, :-1].mean(0) - ratio).max() < 5 * sigma
    assert abs(mask[:, :-1].mean() - ratio) < 5 * sigma / 6**0.5
    correlation = np.corrcoef(mask[:, :-1].T) - np.eye(6)
    assert np.abs(correlation).max() < 5 / len(mask) ** 0.5
    per_sample = np.bincount(mask[:, :-1].sum(1), minlength=7)
    binomial = np.array([1, 6, 15, 20, 15, 6, 1]) * ratio ** np.arange(7) * (1 - ratio) ** (6 - np.arange(7))
    usual = binomial * len(mask) > 5
    assert abs(z_of_chi_square(per_sample[usual], binomial[usual] * len(mask))) < 5


@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_negatives_are_uniform_over_the_items_outside_the_sample(ratio: float) -> None:
    """Every masked place apart: the last, always masked, and those that the draw itself masked."""
    sample = [300, 7, 7, 263, 19, 1, 520]  # 7, 263 and 519 share a bucket of the residue table
    batch = pretrain(alike(sample, 60_000), n_items=520, ratio=ratio)
    place = batch.masked.numpy() % len(sample)
    for at in range(len(sample)):
        counts = np.bincount(batch.negatives.numpy()[place == at], minlength=521)
        assert len(counts) == 521 and counts[[0, *sample]].sum() == 0
        assert abs(z_of_chi_square(np.delete(counts, [0, *sample]))) < 5


@pytest.mark.parametrize("n_items", [1 << 20, 1 << 24, 1 << 30, 3 << 28, 2**31 - 2])
def test_negatives_of_masked_items_are_uniform_over_vast_catalogues(n_items: int) -> None:
    """A draw that decides both the mask and the negative must not let the one show in the other."""
    batch = pretrain(alike(range(1, 12), 20_000), n_items=n_items)
    drawn = batch.negatives.numpy()[batch.masked.numpy() % 11 != 10].astype(np.int64) - 1
    assert abs(z_of_chi_square(np.bincount(drawn * 64 // n_items, minlength=64))) < 5
    assert abs(z_of_chi_square(np.bincount(drawn % 64, minlength=64), len(drawn) / 64)) < 5


def test_negatives_of_a_sample_are_drawn_independently() -> None:
    batch = pretrain(alike([1, 2, 3], 60_000), n_items=13, ratio=1.0)
    drawn = batch.negatives.numpy().reshape(-1, 3) - 4  # 0..9
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(z_of_chi_square(np.bincount(drawn[:, a] * 10 + drawn[:, b], minlength=100))) < 5


def test_negatives_in_fine_tuning_are_uniform_over_the_items_outside_the_sample() -> None:
    sample = [5, 1, 12, 5]
    batch = finetune_batch(alike(sample, 40_000), n_items=40, key=9)
    for at in range(3):
        counts = np.bincount(batch.negatives.numpy().reshape(-1, 3)[:, at], minlength=41)
        assert len(counts) == 41 and counts[[0, *sample]].sum() == 0
        assert abs(z_of_chi_square(np.delete(counts, [0, *sample]))) < 5


@dataclass
class Segments:
    """Segments of equally long samples whose pool is 1, 2, 3, ...; each [B]."""

    length: np.ndarray
    start: np.ndarray
    pool_start: np.ndarray


def segments(n: int, count: int, pool: int) -> Segments:
    mask = 10_001
    batch = pretrain(alike([9000 + i for i in range(n)], count), mask - 1, range(1, pool + 1))
    _, context, _, negative = batch.items.numpy().reshape(4, count, n)
    start = (context == mask).argmax(1)
    return Segments((context == mask).sum(1), start, negative[np.arange(count), start] - 1)


@pytest.mark.parametrize("n", [2, 3, 7, 10, 50])
def test_segment_lengths_and_starts_are_uniform(n: int) -> None:
    """Length uniform in 1..n//2; given the length, start uniform over all the places where it fits."""
    found = segments(n, 100_000, pool=60)
    cells = [(length, start) for length in range(1, n // 2 + 1) for start in range(n - length + 1)]
    counts = np.zeros((n // 2 + 1, n), dtype=np.int64)
    np.add.at(counts, (found.length, found.start), 1)
    per_cell = np.array([counts[cell] for cell in cells])
    assert per_cell.sum() == 100_000
    expected = np.array([100_000 / (n // 2) / (n - length + 1) for length, _ in cells])
    assert abs(z_of_chi_square(per_cell, expected)) < 5
    if n > 3:
        assert abs(z_of_chi_square(np.bincount(found.length)[1:])) < 5


@pytest.mark.parametrize("pool", [3, 11, 700])
def test_negative_segments_start_anywhere_in_the_pool_whatever_the_segment(pool: int) -> None:
    found = segments(7, 100_000, pool)
    for length in (1, 2, 3):
        own = found.length == length
        starts = np.bincount(found.pool_start[own], minlength=pool - length + 1)
        assert len(starts) == pool - length + 1
        if len(starts) > 1:
            assert abs(z_of_chi_square(starts)) < 5
        if len(starts) in range(2, 20):
            joint = found.pool_start[own] * (8 - length) + found.start[own]
            assert abs(z_of_chi_square(np.bincount(joint, minlength=len(starts) * (8 - length)))) < 5


def test_masks_and_segments_are_independent() -> None:
    batch = pretrain(alike(range(1, 8), 100_000), ratio=0.5)
    context = batch.items.numpy().reshape(4, -1, 7)[1]
    cell = (context == 101).sum(1) * 7 + (context == 101).argmax(1)
    mask = masks(batch)
    for place in range(6):
        for value in np.unique(cell):
            own = mask[cell == value, place]
            assert abs(own.mean() - 0.5) < 5 * 0.5 / len(own) ** 0.5


RELATIVES: dict[str, Callable[[torch.Tensor, int], tuple[torch.Tensor, int]]] = {
    "the next row": lambda ids, key: (ids + (1 << 24), key),
    "the next prefix of a row": lambda ids, key: (ids + 1, key),
    "the next epoch": lambda ids, key: (ids, key_of(3, 1, 8)),
    "another seed": lambda ids, key: (ids, key_of(4, 1, 7)),
    "the next key": lambda ids, key: (ids, key + 1),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_related_samples_share_no_draws(name: str) -> None:
    """Masks agree half of the time, negatives one time in n, segments as often as chance has it; 5 sigma."""
    packed, key = alike([1, 2, 3, 4], 40_000), key_of(3, 1, 7)
    ids, other_key = RELATIVES[name](packed.sample_ids, key)
    one, two = (
        pretrain(p, 24, range(1, 25), 0.5, k) for p, k in ((packed, key), (replace(packed, sample_ids=ids), other_key))
    )
    a, b = masks(one)[:, :3], masks(two)[:, :3]
    assert np.abs((a == b).mean(0) - 0.5).max() < 5 * 0.5 / len(a) ** 0.5
    last_one, last_two = (batch.negatives[batch.masked % 4 == 3] for batch in (one, two))
    rate = (last_one == last_two).float().mean()
    assert abs(rate - 0.05) < 5 * (0.05 * 0.95 / len(a)) ** 0.5
    context_one, context_two = (batch.items.view(4, -1, 4)[1] for batch in (one, two))
    same = (context_one == context_two).all(1).float().mean()
    chance = 0.25 / 4 + 0.25 / 3  # same length, then one start of four or of three
    assert abs(same - chance) < 5 * (chance * (1 - chance) / len(a)) ** 0.5


# Nothing but the sample, the key and the pool matters.


def random_batch(count: int = 300, n_items: int = 60, longest: int = 20, seed: int = 0) -> PackedSequences:
    generator = np.random.default_rng(seed)
    samples = [generator.integers(1, n_items + 1, generator.integers(2, longest + 1)).tolist() for _ in range(count)]
    return pack(samples, generator.integers(0, 2**40, count).tolist())


def select(packed: PackedSequences, chosen: Sequence[int]) -> PackedSequences:
    offsets, items = packed.offsets.tolist(), packed.items.tolist()
    return pack([items[offsets[b] : offsets[b + 1]] for b in chosen], packed.sample_ids[list(chosen)].tolist())


def finetuned(batch: FinetuneBatch) -> list[tuple[list[int], list[int], list[int], int]]:
    bounds = batch.offsets.tolist()
    return [
        (batch.items[a:b].tolist(), batch.targets[a:b].tolist(), batch.negatives[a:b].tolist(), key)
        for (a, b), key in zip(pairwise(bounds), batch.sample_keys.tolist(), strict=True)
    ]


def test_a_sample_is_reconstructed_alike_alone_in_any_batch_and_in_any_split() -> None:
    packed = random_batch()
    whole, tuned = unpack(pretrain(packed)), finetuned(finetune_batch(packed, n_items=100, key=2))
    for parts in (1, 2, 7, 400):
        pieces = packed.split(parts)
        assert [s for piece in pieces for s in unpack(pretrain(piece))] == whole
        assert [s for piece in pieces for s in finetuned(finetune_batch(piece, n_items=100, key=2))] == tuned
    shuffled = np.random.default_rng(1).permutation(300).tolist()
    assert unpack(pretrain(select(packed, shuffled))) == [whole[b] for b in shuffled]
    for b in range(0, 300, 30):
        assert unpack(pretrain(select(packed, [b]))) == [whole[b]]


def test_epochs_differ() -> None:
    packed = random_batch()
    first, second = (pretrain(packed, key=key_of(1, 1, epoch)) for epoch in (0, 1))
    changed = [a != b for a, b in zip(unpack(first), unpack(second), strict=True)]
    assert all(changed)
    assert torch.equal(first.items, pretrain(packed, key=key_of(1, 1, 0)).items)


def test_a_batch_without_samples_is_reconstructed() -> None:
    for packed in (pack([]), pack([[1, 2]]).split(2)[0]):
        batch = pretrain(packed)
        assert len(batch) == 0 and batch.offsets.tolist() == [0] and unpack(batch) == []
        assert all(len(t) == 0 for t in (batch.items, batch.original, batch.masked, batch.unmasked, batch.negatives))
        tuned = finetune_batch(packed, n_items=9, key=0)
        assert len(tuned) == 0 and tuned.offsets.tolist() == [0]
        assert len(tuned.items) == len(tuned.targets) == len(tuned.negatives) == 0


def test_the_only_item_left_is_the_negative() -> None:
    samples = [[item for item in range(1, 52) if item != left] for left in range(1, 52)]
    for s, left in zip(unpack(pretrain(pack(samples), n_items=51, ratio=1.0)), range(1, 52), strict=True):
        assert s.negatives == [left] * 50
    tuned = finetune_batch(pack(samples), n_items=51, key=0)
    assert tuned.negatives.view(51, 49).tolist() == [[left] * 49 for left in range(1, 52)]


def test_a_sample_longer_than_the_catalogue_has_negatives_as_long_as_it_repeats() -> None:
    (sample,) = unpack(pretrain(pack([[1, 2, 1, 2, 1, 2]]), n_items=3, ratio=1.0))
    assert sample.negatives == [3] * 6


@pytest.mark.parametrize("samples", [[[1, 2, 3]], [[4, 1], [1, 2, 3, 4, 1], [1, 3, 4]]])
def test_a_sample_that_holds_the_whole_catalogue_is_refused(samples: list[list[int]]) -> None:
    n_items = len({item for sample in samples for item in sample})
    for reconstruct in (pretrain, finetune_batch):
        with pytest.raises(ValueError, match=f"a sample holds all {n_items} items, so it has no negative"):
            reconstruct(pack(samples), n_items=n_items, key=0)


def test_a_pool_shorter_than_a_segment_is_refused_and_one_as_long_will_do() -> None:
    with pytest.raises(ValueError, match="segment_pool holds 2 items; segments have up to 3"):
        pretrain(pack([[1], [1, 2, 3, 4, 5, 6]]), pool=[7, 8])
    batch = pretrain(alike([1, 2, 3, 4, 5, 6], 100), pool=[7, 8, 9])
    context, negative = batch.items.numpy().reshape(4, 100, 6)[[1, 3]]
    whole = negative[(context == 101).sum(1) == 3]
    assert len(whole) and {tuple(row[row != 101]) for row in whole} == {(7, 8, 9)}
    lone = pretrain(replace(pack([[5]]), max_length=50), pool=[])  # a loose bound asks for no more pool than segments
    assert lone.items.tolist() == [101, 5, 5, 5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_reconstructs_the_same_bits_as_the_cpu() -> None:
    packed = random_batch(1000, n_items=30)
    moved = packed.to(torch.device("cuda"))
    pairs: list[tuple[PretrainBatch | FinetuneBatch, PretrainBatch | FinetuneBatch]] = [
        (pretrain(packed, n_items=30), pretrain(moved, n_items=30)),
        (finetune_batch(packed, n_items=30, key=5), finetune_batch(moved, n_items=30, key=5)),
    ]
    for here, there in pairs:
        assert there.items.is_cuda
        assert_same(here, there)
