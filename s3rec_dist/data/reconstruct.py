"""PackedSequences -> the samples of S3-Rec's four pretraining tasks, or of next-item fine-tuning.

Everything here is vectorised torch on the tensors' own device and stateless: a sample's masks, negatives
and segments are hashes of (key, sample id, position), where the key folds seed and epoch. So a sample is
reconstructed alike in any batch, on any rank and on any device. A GPU is not waited for: what sizes depend on the
draws, :func:`pretrain_sizes` counts on the host before the batch leaves it.

For a sample of n items, as in the reference implementation: every item but the last is masked with
``mask_ratio``, the last always; each masked position gets one negative, uniform over the items that are
not in the sample; a segment of uniform length in 1..n//2 and uniform start is cut out, and its negative
is a uniform contiguous slice of ``segment_pool`` (all users' sequences laid end to end). A sample of one
item has no segment: its three segment sequences are the sample itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

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
    step_targets: torch.Tensor | None = None
    """int32 [P]: the targets of the step's global batch in any order, and zeros; where negatives are drawn of them."""

    def __len__(self) -> int:
        return len(self.sample_keys)


@dataclass(frozen=True)
class SharedNegatives:
    """S items that all positions of a step share, drawn with replacement."""

    items: torch.Tensor
    """int64 [S]."""
    log_expected: torch.Tensor
    """fp32 [S]: the logarithm of how often such an item was to be drawn, S times its probability."""


@dataclass(frozen=True)
class Popularity:
    """How often each item is drawn."""

    shares: torch.Tensor
    """fp64 [N], which add up to 1."""
    ends: torch.Tensor
    """fp64 [N], their cumulative sum."""

    @classmethod
    def of(cls, shares: torch.Tensor) -> Popularity:
        return cls(shares, shares.cumsum(0))


@dataclass(frozen=True)
class PretrainSizes:
    """The sizes in a :class:`PretrainBatch` that depend on its draws."""

    masked: int
    """Masked places."""
    inside: int
    """Places in segments."""


def pretrain_sizes(packed: PackedSequences, *, mask_ratio: float, key: int) -> PretrainSizes:
    """The sizes that :func:`pretrain_batch` comes to."""
    layout = _Layout(packed.offsets.long(), len(packed.items))
    token_bits, length_bits = layout.draws(hash64(packed.sample_ids, key), 1)
    length = _segment_lengths(length_bits, layout.lengths >> 1)
    return PretrainSizes(int(_is_masked(token_bits, layout, mask_ratio).sum()), int(length.sum()))


def pretrain_batch(
    packed: PackedSequences,
    *,
    n_items: int,
    segment_pool: torch.Tensor,
    mask_ratio: float,
    key: int,
    sizes: PretrainSizes | None = None,
) -> PretrainBatch:
    """Reconstructs the pretraining samples of ``packed``; see the module's docstring.

    ``segment_pool`` is int32 [P] item ids on the device of ``packed``, at least half as long as any sample;
    ``key`` comes from ``hashing.key_of(seed, epoch)``; ``sizes`` from :func:`pretrain_sizes`, else they are read from
    the device. Raises ValueError for a shorter pool, or where a sample holds every item of the catalogue and so has no
    negative.
    """
    mask_id = n_items + 1
    items, offsets = packed.items, packed.offsets.long()
    layout = _Layout(offsets, len(items))
    keys = hash64(packed.sample_ids, key)
    token_bits, length_bits, start_bits, pool_bits = layout.draws(keys, 3)

    is_masked = _is_masked(token_bits, layout, mask_ratio)
    masked = _places(is_masked, sizes.masked if sizes else None)
    unmasked = _places(is_masked.logical_not(), len(items) - sizes.masked if sizes else None)
    negatives = _negatives(token_bits.index_select(0, masked), masked, items, layout, n_items, packed.max_length)

    half = layout.lengths >> 1
    if 2 * len(segment_pool) < packed.max_length and bool((half > len(segment_pool)).any()):
        raise ValueError(f"segment_pool holds {len(segment_pool)} items; segments have up to {int(half.max())}")
    length = _segment_lengths(length_bits, half)
    begin = layout.begins + uniform_below(start_bits, layout.lengths - length + 1)
    pool_begin = uniform_below(pool_bits, len(segment_pool) + 1 - length)
    # [S], of the S items that lie in segments
    sample = torch.repeat_interleave(length, output_size=sizes.inside if sizes else None)
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
    inputs = torch.repeat_interleave(layout.lengths - 1, output_size=len(items) - len(packed))  # [T - B]: sequences,
    inputs += torch.arange(len(inputs), device=items.device)  # and then places in 0..T-1
    (bits,) = layout.draws(keys)
    return FinetuneBatch(
        items=items.index_select(0, inputs),
        offsets=(offsets - torch.arange(len(offsets), device=items.device)).int(),
        max_length=max(packed.max_length - 1, 0),
        targets=items.index_select(0, inputs + 1),
        negatives=_negatives(bits.index_select(0, inputs), inputs, items, layout, n_items, packed.max_length),
        sample_keys=keys,
    )


def shared_negatives(count: int, n_items: int, key: int, popularity: Popularity | None, device: Any) -> SharedNegatives:
    """``count`` items, a function of ``key``: all 1..``n_items`` alike, or by their ``popularity``."""
    bits = _words(count, key, device)
    if popularity is None:
        items = uniform_below(bits, n_items) + 1
        return SharedNegatives(items, torch.full((count,), math.log(count / n_items), device=device))
    place = ((bits >> 11) & (2**53 - 1)).double() / 2**53
    items = torch.searchsorted(popularity.ends, place, right=True).clamp(max=n_items - 1)
    return SharedNegatives(items + 1, (popularity.shares[items] * count).log().float())


def attribute_negatives(count: int, n_attributes: int, key: int, device: Any) -> torch.Tensor:
    """``count`` of the attribute table's rows 0..``n_attributes``, all alike, int64; a function of ``key``."""
    return uniform_below(_words(count, key, device), n_attributes + 1)


def in_batch_negatives(count: int, targets: torch.Tensor, key: int, shares: torch.Tensor) -> SharedNegatives:
    """``count`` of a global batch's ``targets`` [P], zeros aside; a function of ``key`` and of the targets in ascending
    order, so that it does not matter which rank has which.

    ``shares``, fp64 [N], are the items' shares of all interactions: about the probability that a target of a batch is
    this item, were its sequences chosen at random. A batch without targets yields item 1.
    """
    bits = _words(count, key, targets.device)
    ordered = targets.long().sort().values
    none = (ordered == 0).sum()
    at = none + uniform_below(bits, (len(ordered) - none).clamp(min=1))
    items = F.pad(ordered, (0, 1)).index_select(0, at).clamp(min=1)
    return SharedNegatives(items, (shares[items - 1] * count).log().float())


def _words(count: int, key: int, device: Any) -> torch.Tensor:
    """Hashes of (``key``, 0), (``key``, 1), ..., int64 [``count``]."""
    return hash64(torch.full((count,), key, dtype=torch.int64, device=device), torch.arange(count, device=device))


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


def _is_masked(bits: torch.Tensor, layout: _Layout, mask_ratio: float) -> torch.Tensor:
    """bool [T]. A word's size decides the mask and its remainder the negative: independent for any n_items."""
    is_masked = bits >> 1 < round(mask_ratio * 2**63) - 2**62
    return is_masked.index_fill_(0, layout.begins + layout.lengths - 1, True)


def _segment_lengths(bits: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """int64 [B], uniform in 1..half; 0 for a sample of one item."""
    return torch.minimum(uniform_below(bits, half.clamp(min=1)) + 1, half)


def _places(chosen: torch.Tensor, count: int | None) -> torch.Tensor:
    """Where ``chosen`` is True, ascending; that is so ``count`` times."""
    found = chosen.nonzero() if count is None else torch.nonzero_static(chosen, size=count)
    return found.squeeze(1)


def _negatives(
    bits: torch.Tensor, places: torch.Tensor, items: torch.Tensor, layout: _Layout, n_items: int, max_length: int
) -> torch.Tensor:
    """For each of the M ``places`` (tokens), an item uniform over those not in its sample, int32 [M].

    It is drawn from all items, and if it is in the sample, once more, from the others by their number.
    """
    if max_length >= n_items:
        _check_catalogue(items, layout, n_items)
    drawn = uniform_below(bits, n_items).int() + 1
    if len(items):
        redraw = _redraw_few if items.device.type == "cpu" else _redraw
        redraw(drawn, bits, places, items, layout, n_items, max_length)
    return drawn


_BUCKETS = 256


def _redraw_few(
    drawn: torch.Tensor,
    bits: torch.Tensor,
    places: torch.Tensor,
    items: torch.Tensor,
    layout: _Layout,
    n_items: int,
    max_length: int,
) -> None:
    """:func:`_redraw` where reading is free: only samples of a draw that clashes are looked at.

    Which samples have an item of the draw's residue is looked up in a table first, so that few draws are held against
    every item of their sample.
    """
    row = layout.sequence * _BUCKETS
    seen = torch.zeros(len(layout.lengths) * _BUCKETS, dtype=torch.bool, device=items.device)
    seen.index_fill_(0, row + (items & (_BUCKETS - 1)), True)
    bucket = row.index_select(0, places) + (drawn & (_BUCKETS - 1))
    suspect = seen.index_select(0, bucket).nonzero().squeeze(1)
    sequence = layout.sequence.index_select(0, places.index_select(0, suspect))
    begins, last = layout.begins.index_select(0, sequence), layout.lengths.index_select(0, sequence) - 1
    column = torch.arange(max_length, device=items.device)
    own = items.take(begins[:, None] + torch.minimum(column, last[:, None]))  # [suspects, max_length]
    clash = (own == drawn.index_select(0, suspect)[:, None]).any(1).nonzero().squeeze(1)
    if not len(clash):
        return
    suspect, own = suspect.index_select(0, clash), own.index_select(0, clash).sort(1).values
    is_new = F.pad(own.diff(dim=1) != 0, (1, 0), value=True)
    distinct = is_new.cumsum(1)
    number = _number(bits.index_select(0, suspect), n_items - distinct[:, -1])
    below = ((own - distinct < number[:, None]) & is_new).sum(1)
    drawn.index_copy_(0, suspect, (number + below).int())


def _redraw(
    drawn: torch.Tensor,
    bits: torch.Tensor,
    places: torch.Tensor,
    items: torch.Tensor,
    layout: _Layout,
    n_items: int,
    max_length: int,
) -> None:
    """Replaces, in place, those of ``drawn`` [M] that are in their sample.

    The n-th item outside of a sample, from 1, is n + j for the j different items of the sample below it: those whose
    id, less the count of the sample's items up to it, is less than n. In order of id these differences never fall.
    """
    span = n_items + 2  # samples' items lie apart in one ascending table
    ordered = (layout.sequence * span + items).sort().values
    is_new = F.pad(ordered.diff() != 0, (1, 0), value=True)
    distinct = F.pad(is_new.cumsum(0), (1, 0))  # [T + 1]: different ones before each place
    before = distinct.index_select(0, layout.begins)  # [B]
    count = distinct.index_select(0, layout.begins + layout.lengths) - before  # [B]
    sequence = layout.sequence.index_select(0, places)
    start = sequence * span
    at = torch.searchsorted(ordered, start + drawn).clamp_(max=len(ordered) - 1)
    clashes = ordered.index_select(0, at) == start + drawn
    number = _number(bits, n_items - count.index_select(0, sequence))
    differences = ordered - distinct[1:] + before.index_select(0, layout.sequence)
    below = distinct.index_select(0, torch.searchsorted(differences, start + number))
    other = number + below - before.index_select(0, sequence)
    drawn.copy_(torch.where(clashes, other, drawn))


def _number(bits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Which of the ``others`` items outside of a sample is drawn next, from 1."""
    return uniform_below(hash64(bits, 1), others) + 1


def _check_catalogue(items: torch.Tensor, layout: _Layout, n_items: int) -> None:
    """Raises ValueError if a sample holds all of the catalogue's items."""
    distinct = (layout.sequence * (n_items + 1) + items).unique() // (n_items + 1)
    if bool((distinct.bincount(minlength=1) >= n_items).any()):
        raise ValueError(f"a sample holds all {n_items} items, so it has no negative; use shorter sequences")
