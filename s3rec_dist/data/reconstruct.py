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

from dataclasses import dataclass

import torch

from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.hashing import GOLDEN, hash64, mix, uniform_below

_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class PretrainBatch:
    """B samples of T items, reconstructed. The encoder's input holds four sequences for each sample."""

    items: torch.Tensor
    """int32 [4T]: the masked-item sequences of all samples, then the masked-segment, positive-segment and
    negative-segment ones."""
    offsets: torch.Tensor
    """int32 [4B + 1], of ``items``."""
    max_length: int
    """Longest sequence."""
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
    """Longest input."""
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

    ``segment_pool`` is int32 [P] item ids on the device of ``packed``, at least half of ``max_length``
    long; ``key`` comes from ``hashing.key_of(seed, epoch)``.
    """
    mask_id = n_items + 1
    items, offsets = packed.items, packed.offsets.long()
    layout = _Layout(offsets, len(items))
    keys = hash64(packed.sample_ids, key)
    token_bits, length_bits, start_bits, pool_bits = layout.draws(keys, 3)

    is_masked = (token_bits & _LOW_32) < round(mask_ratio * 2**32)
    is_masked.index_fill_(0, offsets[1:] - 1, True)
    masked = is_masked.nonzero().squeeze(1)
    unmasked = is_masked.logical_not().nonzero().squeeze(1)
    negatives = _negatives(token_bits.index_select(0, masked), masked, items, layout, n_items, packed.max_length)

    half = layout.lengths >> 1
    length = torch.minimum(uniform_below(length_bits, half.clamp(min=1)) + 1, half)  # 0 for a sample of one item
    begin = offsets[:-1] + uniform_below(start_bits, layout.lengths - length + 1)
    pool_begin = uniform_below(pool_bits, len(segment_pool) + 1 - length)
    index, sequence = layout.index, layout.sequence
    in_segment = (index >= begin.index_select(0, sequence)) & (index < (begin + length).index_select(0, sequence))
    pool_index = index + (pool_begin - begin).index_select(0, sequence)
    pool_index.clamp_(0, len(segment_pool) - 1)  # places outside their segment point anywhere
    outside = items.index_select(0, offsets[:-1]).masked_fill_(half > 0, mask_id).index_select(0, sequence)

    sequences = torch.cat(
        (
            items.masked_fill(is_masked, mask_id),
            items.masked_fill(in_segment, mask_id),
            torch.where(in_segment, items, outside),
            torch.where(in_segment, segment_pool.index_select(0, pool_index), outside),
        )
    )
    shifts = torch.arange(4, device=items.device)[:, None] * len(items)
    ends = (offsets[1:] + shifts).flatten()
    return PretrainBatch(
        items=sequences,
        offsets=torch.cat((offsets[:1], ends)).int(),
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
        self.offsets = offsets
        self.lengths = offsets.diff()  # [B]
        self.sequence = torch.repeat_interleave(self.lengths, output_size=total)  # [T]
        self.index = torch.arange(total, device=offsets.device)  # [T]

    def draws(self, keys: torch.Tensor, per_sample: int = 0) -> tuple[torch.Tensor, ...]:
        """Hashes of (a token's sample key, its place in the sample), int64 [T], and after them ``per_sample``
        further hashes of each sample key, int64 [B]."""
        shifted = keys - self.offsets[:-1] * GOLDEN
        tokens = shifted.index_select(0, self.sequence) + self.index * GOLDEN
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
    drawn = uniform_below(bits, n_items).int() + 1
    if not len(items):
        return drawn
    seen = torch.zeros(len(layout.lengths) * _BUCKETS, dtype=torch.bool, device=items.device)
    seen.index_fill_(0, layout.sequence * _BUCKETS + (items & (_BUCKETS - 1)), True)
    sequence = layout.sequence.index_select(0, places)
    suspect = seen.index_select(0, sequence * _BUCKETS + (drawn & (_BUCKETS - 1))).nonzero().squeeze(1)
    column = torch.arange(max_length, device=items.device)
    attempt = 0
    while len(suspect):
        rows = sequence.index_select(0, suspect)
        begins, lengths = layout.offsets.index_select(0, rows), layout.lengths.index_select(0, rows)
        own = items[begins[:, None] + torch.minimum(column, lengths[:, None] - 1)]  # [M, max_length]
        clash = (own == drawn.index_select(0, suspect)[:, None]).any(1)
        suspect = suspect[clash]
        attempt += 1
        drawn[suspect] = uniform_below(hash64(bits.index_select(0, suspect), attempt), n_items).int() + 1
    return drawn
