"""PackedSequences -> the samples of S3-Rec's four pretraining tasks, or of next-item fine-tuning.

Everything here is vectorised torch on the tensors' own device and stateless: a sample's masks, negatives
and segments are hashes of (key, sample id, position), where the key folds seed and epoch. So a sample is
reconstructed alike in any batch, on any rank and on any device.

For a sample of n items, as in the reference implementation: every item but the last is masked with
``mask_ratio``, the last always; each masked position gets one negative, uniform over the items that are
not in the sample; a segment of uniform length in 1..n//2 and uniform start is cut out, and its negative
is a uniform contiguous slice of ``segment_pool`` (all users' sequences laid end to end). A sample of one
item has no segment: its three segment sequences are the sample itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.hashing import GOLDEN, hash64, mix, uniform_below


@dataclass(frozen=True)
class PretrainBatch:
    """B samples of T items, reconstructed. The encoder's input holds four sequences for each sample."""

    items: torch.Tensor
    """int32 [4T]: the masked-item sequences of all samples, then the masked-segment, positive-segment and
    negative-segment ones."""
    offsets: torch.Tensor
    """int32 [4B + 1], of ``items``."""
    max_length: int
    """No sequence is longer."""
    original: torch.Tensor
    """int32 [T]: the items before masking."""
    masked: torch.Tensor
    """int64 [M]: places in 0..T-1 that are masked, ascending."""
    unmasked: torch.Tensor
    """int64 [T - M]: the other places, ascending."""
    negatives: torch.Tensor
    """int32 [M]: a negative for each masked place."""
    sample_keys: torch.Tensor
    """int64 [B]: hash keys of the samples, for dropout."""

    def __len__(self) -> int:
        return len(self.sample_keys)


@dataclass(frozen=True)
class FinetuneBatch:
    """B input sequences of T items with the next item at each place."""

    items: torch.Tensor
    """int32 [T]: inputs."""
    offsets: torch.Tensor
    """int32 [B + 1], of ``items``."""
    max_length: int
    """No input is longer."""
    targets: torch.Tensor
    """int32 [T]: the item that follows each place."""
    negatives: torch.Tensor
    """int32 [T]: an item that is not in the sample, for each place."""
    sample_keys: torch.Tensor
    """int64 [B]: hash keys of the samples, for dropout."""

    def __len__(self) -> int:
        return len(self.sample_keys)


def pretrain_batch(
    packed: PackedSequences, *, n_items: int, segment_pool: torch.Tensor, mask_ratio: float, key: int
) -> PretrainBatch:
    """Reconstructs the pretraining samples of ``packed``; see the module's docstring.

    ``segment_pool`` is int32 [P] item ids on the device of ``packed``, at least half as long as any sample;
    ``key`` comes from ``hashing.key_of(seed, epoch)``. Raises ValueError for a shorter pool, or where a sample
    holds every item of the catalogue and so has no negative.
    """
    mask_id = n_items + 1
    items, offsets = packed.items, packed.offsets.long()
    layout = _Layout(offsets, len(items))
    keys = hash64(packed.sample_ids, key)
    token_bits, length_bits, start_bits, pool_bits = layout.draws(keys, 3)

    # The word's size decides the mask and its remainder the negative: independent for any n_items.
    is_masked = token_bits >> 1 < round(mask_ratio * 2**63) - 2**62
    is_masked.index_fill_(0, offsets[1:] - 1, True)
    masked = is_masked.nonzero().squeeze(1)
    unmasked = is_masked.logical_not().nonzero().squeeze(1)
    negatives = _negatives(token_bits.index_select(0, masked), masked, items, layout, n_items, packed.max_length)

    half = layout.lengths >> 1
    if 2 * len(segment_pool) < packed.max_length and bool((half > len(segment_pool)).any()):
        raise ValueError(f"segment_pool holds {len(segment_pool)} items; segments have up to {int(half.max())}")
    length = torch.minimum(uniform_below(length_bits, half.clamp(min=1)) + 1, half)  # 0 for a sample of one item
    begin = layout.begins + uniform_below(start_bits, layout.lengths - length + 1)
    pool_begin = uniform_below(pool_bits, len(segment_pool) + 1 - length)
    sample = torch.repeat_interleave(length)  # [S], of the S items that lie in segments
    segment = (begin + length - length.cumsum(0)).index_select(0, sample)
    segment += torch.arange(len(sample), device=items.device)  # [S], their places in 0..T-1
    pool_index = segment + (pool_begin - begin).index_select(0, sample)

    tokens = len(items)
    outside = items.index_select(0, layout.begins).masked_fill_(half > 0, mask_id).index_select(0, layout.sequence)
    sequences = torch.cat((items, items, outside, outside))
    sequences.index_fill_(0, torch.cat((masked, segment + tokens)), mask_id)
    sequences.index_copy_(
        0,
        torch.cat((segment + 2 * tokens, segment + 3 * tokens)),
        torch.cat((items.index_select(0, segment), segment_pool.index_select(0, pool_index))),
    )
    ends = packed.offsets[1:]
    return PretrainBatch(
        items=sequences,
        offsets=torch.cat((packed.offsets, ends + tokens, ends + 2 * tokens, ends + 3 * tokens)),
        max_length=packed.max_length,
        original=items,
        masked=masked,
        unmasked=unmasked,
        negatives=negatives,
        sample_keys=keys,
    )


def finetune_batch(packed: PackedSequences, *, n_items: int, key: int) -> FinetuneBatch:
    """Inputs, targets and negatives of sequences with at least two items each; the last item is only a target."""
    items, offsets = packed.items, packed.offsets.long()
    layout = _Layout(offsets, len(items))
    keys = hash64(packed.sample_ids, key)
    is_input = torch.ones(len(items), dtype=torch.bool, device=items.device)
    is_input.index_fill_(0, offsets[1:] - 1, False)
    inputs = is_input.nonzero().squeeze(1)
    (bits,) = layout.draws(keys)
    return FinetuneBatch(
        items=items.index_select(0, inputs),
        offsets=(offsets - torch.arange(len(offsets), device=items.device)).int(),
        max_length=max(packed.max_length - 1, 0),
        targets=items.index_select(0, inputs + 1),
        negatives=_negatives(bits.index_select(0, inputs), inputs, items, layout, n_items, packed.max_length),
        sample_keys=keys,
    )


class _Layout:
    """Where each of T packed items stands."""

    def __init__(self, offsets: torch.Tensor, total: int) -> None:
        self.begins = offsets[:-1]  # [B]
        self.lengths = offsets[1:] - self.begins  # [B]
        self.sequence = torch.repeat_interleave(self.lengths, output_size=total)  # [T]

    def draws(self, keys: torch.Tensor, per_sample: int = 0) -> tuple[torch.Tensor, ...]:
        """Hashes of (a token's sample key, its place in the sample), int64 [T], and after them ``per_sample``
        further hashes of each sample key, int64 [B]."""
        shifted = keys.sub(self.begins, alpha=GOLDEN)
        tokens = shifted.index_select(0, self.sequence)  # [T]
        tokens.add_(torch.arange(len(tokens), device=tokens.device), alpha=GOLDEN)
        if not per_sample:
            return (mix(tokens),)
        further = [keys - (i + 1) * (GOLDEN >> 8) for i in range(per_sample)]
        bits = mix(torch.cat((tokens, *further)))
        return bits.split([len(tokens)] + [len(keys)] * per_sample)


_BUCKETS = 256


def _negatives(
    bits: torch.Tensor, places: torch.Tensor, items: torch.Tensor, layout: _Layout, n_items: int, max_length: int
) -> torch.Tensor:
    """For each of the M ``places`` (tokens), an item uniform over those not in its sample, int32 [M].

    A draw that is in the sample is drawn again. Which samples have an item of the draw's residue is looked
    up in a table first, so that few draws are held against every item of their sample.
    """
    if max_length >= n_items:
        _check_catalogue(items, layout, n_items)
    drawn = uniform_below(bits, n_items).int() + 1
    if not len(items):
        return drawn
    row = layout.sequence * _BUCKETS
    seen = torch.zeros(len(layout.lengths) * _BUCKETS, dtype=torch.bool, device=items.device)
    seen.index_fill_(0, row + (items & (_BUCKETS - 1)), True)
    bucket = row.index_select(0, places) + (drawn & (_BUCKETS - 1))
    suspect = seen.index_select(0, bucket).nonzero().squeeze(1)
    sequence = layout.sequence.index_select(0, places.index_select(0, suspect))
    begins, last = layout.begins.index_select(0, sequence), layout.lengths.index_select(0, sequence) - 1
    column = torch.arange(max_length, device=items.device)
    own = items.take(begins[:, None] + torch.minimum(column, last[:, None]))  # [suspects, max_length]
    for attempt in itertools.count(1):
        clash = (own == drawn.index_select(0, suspect)[:, None]).any(1).nonzero().squeeze(1)
        if not len(clash):
            break
        suspect, own = suspect.index_select(0, clash), own.index_select(0, clash)
        again = uniform_below(hash64(bits.index_select(0, suspect), attempt), n_items).int() + 1
        drawn.index_copy_(0, suspect, again)
    return drawn


def _check_catalogue(items: torch.Tensor, layout: _Layout, n_items: int) -> None:
    """Raises ValueError if a sample holds all of the catalogue's items."""
    distinct = (layout.sequence * (n_items + 1) + items).unique() // (n_items + 1)
    if bool((distinct.bincount(minlength=1) >= n_items).any()):
        raise ValueError(f"a sample holds all {n_items} items, so it has no negative; use shorter sequences")
