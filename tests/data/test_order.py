"""The order of an epoch: every sample once, the same batches at every world size, and from any step on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.data.order import EpochOrder, OrderError, Part, SampleSpec, check_world, choose_streams, epoch_order
from s3rec_dist.hashing import key_of

WORLDS = (1, 2, 3, 4, 6, 8)
KINDS = ("all_prefixes", "full_sequence", "one_random_prefix")
SPEC_OF = {
    "samples": st.sampled_from(KINDS),
    "max_items": st.integers(1, 7),
    "min_items": st.integers(1, 3),
    "holdout": st.integers(0, 3),
}


def batches(order: EpochOrder, rank: int = 0, world: int = 1, first: int = 0, most: int = 1 << 30) -> list[list[int]]:
    """The rank's positions in each batch from ``first`` on, asked for up to ``most`` batches at a time."""
    found: list[list[int]] = []
    step = first
    while step < order.steps:
        last = min(order.window_end(step), step + most)
        positions, offsets = order.batch_positions(step, last, rank, world)
        assert len(offsets) == last - step + 1 and offsets[0] == 0 and offsets[-1] == len(positions)
        found += [positions[a:b].tolist() for a, b in pairwise(offsets)]
        step = last
    return found


def global_batches(order: EpochOrder, world: int) -> list[list[int]]:
    """Each batch's positions over all ranks, sorted."""
    ranks = [batches(order, rank, world) for rank in range(world)]
    return [sorted(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]


def make(
    groups: list[int],
    *,
    seed: int = 0,
    epoch: int = 0,
    streams: int = 4,
    batch_size: int = 8,
    window: int = 16,
    parts: Sequence[Part] = (),
) -> EpochOrder:
    return epoch_order(
        np.array(groups, dtype=np.int64),
        seed=seed,
        epoch=epoch,
        streams=streams,
        batch_size=batch_size,
        window=window,
        parts=parts,
    )


@st.composite
def orders(draw: st.DrawFn, streams: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 24)) -> EpochOrder:
    """Uneven, tiny and empty row groups; fewer samples than streams or than a batch; windows below a batch's part."""
    count = draw(st.sampled_from(streams))
    return make(
        draw(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 150)), max_size=8)),
        seed=draw(st.integers(0, 2**40)),
        epoch=draw(st.integers(0, 1000)),
        streams=count,
        batch_size=count * draw(st.integers(1, 5)),
        window=draw(st.integers(1, 40)),
    )


@given(order=orders())
@settings(deadline=None, max_examples=200)
def test_every_sample_comes_exactly_once_an_epoch_at_every_world_size(order: EpochOrder) -> None:
    for world in (w for w in WORLDS if order.streams % w == 0):
        seen = [p for rank in range(world) for batch in batches(order, rank, world) for p in batch]
        assert sorted(seen) == list(range(order.samples))


@given(order=orders(streams=(8, 12, 24)))
@settings(deadline=None, max_examples=150)
def test_global_batches_are_the_same_at_every_world_size_that_divides_the_streams(order: EpochOrder) -> None:
    alone = global_batches(order, 1)
    for world in (w for w in WORLDS if order.streams % w == 0):
        assert global_batches(order, world) == alone


@given(order=orders(), data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_run_resumed_at_any_step_sees_the_rest_of_the_same_batches(order: EpochOrder, data: st.DataObject) -> None:
    world = data.draw(st.sampled_from([w for w in WORLDS if order.streams % w == 0]))
    rank = data.draw(st.integers(0, world - 1))
    first = data.draw(st.integers(0, order.steps))
    most = data.draw(st.integers(1, 5))
    assert batches(order, rank, world, first, most) == batches(order, rank, world)[first:]


@given(order=orders())
@settings(deadline=None, max_examples=150)
def test_every_batch_but_the_last_is_full_and_none_is_empty(order: EpochOrder) -> None:
    sizes = [len(batch) for batch in global_batches(order, 1)]
    assert len(sizes) == order.steps
    assert all(size == order.batch_size for size in sizes[:-1])
    assert all(0 < size <= order.batch_size for size in sizes)
    assert sizes == [order.batch_samples(step) for step in range(order.steps)]


@given(order=orders())
@settings(deadline=None, max_examples=100)
def test_a_batch_takes_the_same_count_from_every_stream_and_a_rank_serves_its_residue_class(order: EpochOrder) -> None:
    bounds = order.stream_bounds()
    assert bounds[0] == 0 and bounds[-1] == order.samples and np.ptp(np.diff(bounds)) <= 1
    for world in (w for w in WORLDS if order.streams % w == 0):
        for rank in range(world):
            for step, batch in enumerate(batches(order, rank, world)):
                streams = np.searchsorted(bounds, batch, side="right") - 1
                assert set(streams % world) <= {rank}
                if step < order.steps - 1:
                    taken = np.bincount(streams, minlength=order.streams)[rank::world]
                    assert set(taken) == {order.per_stream}


@given(order=orders())
@settings(deadline=None, max_examples=100)
def test_a_sample_stays_in_its_window(order: EpochOrder) -> None:
    """What a reader must hold at once is bounded: windows are read one after the other."""
    bounds = order.stream_bounds()
    in_window = max(order.window // order.per_stream, 1) * order.per_stream
    for step, batch in enumerate(batches(order)):
        streams = np.searchsorted(bounds, batch, side="right") - 1
        window = step * order.per_stream // in_window
        assert set((batch - bounds[streams]) // in_window) <= {window}


@given(order=orders())
@settings(deadline=None, max_examples=100)
def test_row_groups_are_laid_end_to_end_each_once(order: EpochOrder) -> None:
    assert sorted(order.groups.tolist()) == list(range(len(order.groups)))
    assert order.bounds[0] == 0 and len(order.bounds) == len(order.groups) + 1


def taken(order: EpochOrder) -> Counter[tuple[int, int]]:
    """How often an order has each (row group, sample of it)."""
    slots = zip(order.groups.tolist(), order.starts.tolist(), np.diff(order.bounds).tolist(), strict=True)
    return Counter((group, start + i) for group, start, count in slots for i in range(count))


MIXED = [7, 0, 13, 20, 1, 1, 30, 2, 8, 5, 5, 5, 5, 5, 5]  # row groups of four datasets: 20, 22, 40 and 30 samples
PARTS = [Part(3), Part(3, 2.0), Part(3, 0.25), Part(6, 0.3)]


def test_an_epoch_takes_a_part_as_often_as_its_weight_says() -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(40):
        order = make(MIXED, epoch=epoch, parts=PARTS)
        now = taken(order)
        assert order.samples == 20 + 2 * 22 + 10 + 9 and order.steps == make(MIXED, parts=PARTS).steps
        assert {key: n for key, n in now.items() if key[0] < 3} == {
            (g, i): 1 for g in range(3) for i in range(MIXED[g])
        }
        twice = {(g, i): 2 for g in range(3, 6) for i in range(MIXED[g])}
        assert {key: n for key, n in now.items() if 3 <= key[0] < 6} == twice
        seen += now
        for groups, share, total in ((range(6, 9), 10, 40), (range(9, 15), 9, 30)):
            assert sum(n for (g, _), n in now.items() if g in groups) == share
            low = (epoch + 1) * share // total
            assert {seen[g, i] for g in groups for i in range(MIXED[g])} <= {low, low + 1}


def test_a_quarter_is_read_from_about_a_quarter_of_the_row_groups() -> None:
    order = make([10] * 41, parts=[Part(1), Part(40, 0.25)])
    assert len({g for g in order.groups.tolist() if g}) in (10, 11)


def test_parts_take_turns_of_their_own() -> None:
    orders = [taken(make([1] * 80, epoch=e, parts=[Part(40, 0.5), Part(40, 0.5)])) for e in range(2)]
    halves = [[{g % 40 for g, _ in order if (g < 40) == is_first} for is_first in (True, False)] for order in orders]
    assert halves[0][0] | halves[1][0] == set(range(40)) == halves[0][1] | halves[1][1]
    assert halves[0][0] not in halves[0][1:] and halves[0][0] != halves[1][1]


def test_the_visits_that_an_epoch_pays_to_a_row_group_are_shuffled_apart() -> None:
    order = make([1] * 20, parts=[Part(20, 3.0)])
    assert Counter(order.groups.tolist()) == dict.fromkeys(range(20), 3)
    assert int((np.diff(order.groups) == 0).sum()) < 10 and len(set(order.groups[:20].tolist())) < 20


def test_a_dataset_alone_has_the_order_of_one_part_of_weight_one() -> None:
    alone, part = make(MIXED, epoch=3), make(MIXED, epoch=3, parts=[Part(len(MIXED))])
    assert batches(alone) == batches(part) and alone.groups.tolist() == part.groups.tolist()


@pytest.mark.parametrize(
    ("samples", "weight", "taken_an_epoch"), [(1, 0.01, 1), (2, 0.2, 1), (10, 0.25, 2), (0, 2.0, 0)]
)
def test_what_an_epoch_takes_is_a_whole_number_and_no_part_is_forgotten(
    samples: int, weight: float, taken_an_epoch: int
) -> None:
    for epoch in range(5):
        assert make([4, samples], epoch=epoch, parts=[Part(1), Part(1, weight)]).samples == 4 + taken_an_epoch


def test_row_groups_keep_their_own_sample_counts_in_the_shuffled_order() -> None:
    samples = [5, 0, 7, 1, 30, 2]
    order = make(samples)
    assert np.diff(order.bounds).tolist() == [samples[group] for group in order.groups]
    assert order.samples == sum(samples)


def test_an_epoch_without_samples_has_no_steps() -> None:
    for groups in ([], [0], [0, 0, 0]):
        order = make(groups)
        assert order.steps == 0 and order.samples == 0 and batches(order) == []


def test_a_rank_may_get_no_samples_and_still_has_its_steps() -> None:
    order = make([3], streams=8, batch_size=8)
    assert order.steps == 1
    parts = [batches(order, rank, 8) for rank in range(8)]
    assert all(len(part) == 1 for part in parts)
    assert sorted(len(part[0]) for part in parts) == [0, 0, 0, 0, 0, 1, 1, 1]
    assert sorted(chain.from_iterable(part[0] for part in parts)) == [0, 1, 2]


def test_a_rank_without_samples_in_the_short_last_batch_has_an_empty_batch() -> None:
    order = make([17], streams=4, batch_size=8)  # 4 or 5 samples a stream, 2 a batch: the third batch has one sample
    lasts = [batches(order, rank, 4)[-1] for rank in range(4)]
    assert order.steps == 3 and sorted(map(len, lasts)) == [0, 0, 0, 1]


def test_a_rank_touches_only_its_streams_row_groups() -> None:
    order = make([100] * 8, streams=8, batch_size=16)  # a stream is a row group
    touched = [{p // 100 for batch in batches(order, rank, 4) for p in batch} for rank in range(4)]
    assert touched == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]


def test_a_fixed_seed_and_epoch_give_one_order_and_others_give_others() -> None:
    groups = [40] * 10
    reference = make(groups, seed=7, epoch=3)
    again = make(groups, seed=7, epoch=3)
    assert batches(again) == batches(reference) and again.groups.tolist() == reference.groups.tolist()
    for other in (make(groups, seed=8, epoch=3), make(groups, seed=7, epoch=4), make(groups, seed=3, epoch=7)):
        assert batches(other) != batches(reference)
        assert other.groups.tolist() != reference.groups.tolist()
        assert other.prefix_key != reference.prefix_key


def test_keys_of_the_order_differ_from_those_of_reconstruction() -> None:
    """training/loop.py reconstructs with key_of(seed, 1 or 2, epoch)."""
    orders_keys = {key for e in range(300) for key in (make([4], epoch=e).window_key, make([4], epoch=e).prefix_key)}
    assert len(orders_keys) == 600
    assert orders_keys.isdisjoint(key_of(0, stage, e) for stage in (1, 2) for e in range(300))


def test_streams_and_windows_are_shuffled_apart() -> None:
    order = make([160], streams=4, batch_size=4, window=20)
    bounds = order.stream_bounds()
    by_stream = np.array(batches(order)) - bounds[:-1]  # [steps, streams]: places within the stream
    pieces = [tuple(by_stream[w * 20 : (w + 1) * 20, s] - 20 * w) for s in range(4) for w in range(2)]
    assert len(set(pieces)) == 8
    assert all(sorted(piece) == list(range(20)) and list(piece) != sorted(piece) for piece in pieces)


def test_every_permutation_of_a_window_is_equally_likely() -> None:
    """4,800 windows of four; Pearson's statistic over the 24 permutations lies within 5 sigma of its mean."""
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(100):
        order = make([192], epoch=epoch, streams=12, batch_size=12, window=4)
        places = np.array(batches(order)).reshape(4, 4, 12) - order.stream_bounds()[:-1]  # [windows, steps, streams]
        for w in range(4):
            for s in range(12):
                permutation = tuple((places[w, :, s] - 4 * w).tolist())
                counts[permutation] = counts.get(permutation, 0) + 1
    found = np.array([*counts.values(), *[0] * (24 - len(counts))])
    expected = found.sum() / 24
    chi = ((found - expected) ** 2 / expected).sum()
    assert found.sum() == 4800 and len(found) == 24
    assert abs(chi - 23) < 5 * (2 * 23) ** 0.5, chi


def test_every_order_of_row_groups_is_equally_likely() -> None:
    """2,400 epochs; Pearson's statistic over the 24 orders of four groups lies within 5 sigma of its mean."""
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        groups = tuple(make([1, 1, 1, 1], epoch=epoch, streams=1, batch_size=1).groups.tolist())
        counts[groups] = counts.get(groups, 0) + 1
    found = np.array(list(counts.values()))
    assert len(found) == 24
    chi = ((found - 100) ** 2 / 100).sum()
    assert abs(chi - 23) < 5 * (2 * 23) ** 0.5, chi


def test_samples_far_beyond_32_bits_keep_their_positions() -> None:
    order = make([3 << 40, 1 << 40], streams=64, batch_size=256, window=8192)
    assert order.samples == 1 << 42 and order.steps == 1 << 34
    first = order.steps - 2
    positions, offsets = order.batch_positions(first, order.steps, 63, 64)
    assert offsets.tolist() == [0, 4, 8]
    assert positions.min() >= order.stream_bounds()[63] and positions.max() < order.samples
    assert len(set(positions.tolist())) == 8


@given(batch=st.integers(1, 3000))
def test_streams_default_to_the_largest_divisor_of_the_batch_up_to_64(batch: int) -> None:
    assert choose_streams(batch) == max(s for s in range(1, 65) if batch % s == 0)


def test_given_streams_may_be_any_divisor() -> None:
    assert choose_streams(256, 128) == 128
    assert choose_streams(100, 5) == 5


def test_streams_that_do_not_divide_the_batch_are_refused_with_those_that_do() -> None:
    message = "streams=8 does not divide batch_size=100; use 1, 2, 4, 5, 10, 20, 25, 50, 100, or 0"
    with pytest.raises(OrderError, match=re.escape(message)):
        choose_streams(100, 8)
    with pytest.raises(OrderError, match=re.escape("streams=8 does not divide batch_size=4; use 1, 2, 4,")):
        choose_streams(4, 8)


def test_world_sizes_that_do_not_divide_the_streams_are_refused_with_those_that_do() -> None:
    for world in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48):
        check_world(48, world)
    message = "streams=48 cannot be divided over 5 ranks; use 1, 2, 3, 4, 6, 8, 12, 16, 24, 48 ranks"
    with pytest.raises(OrderError, match=re.escape(message)):
        check_world(48, 5)
    with pytest.raises(OrderError, match=r"or another batch size or data\.streams"):
        check_world(64, 128)


def plain_prefixes(length: int, spec: SampleSpec) -> list[int]:
    """Lengths of the prefixes that a row of ``length`` items may yield."""
    window = min(max(length - spec.holdout, 0), spec.max_items)
    return [n for n in range(1, window + 1) if n >= spec.min_items]


@given(lengths=st.lists(st.integers(0, 15), max_size=10), **SPEC_OF)
def test_a_row_yields_what_the_spec_says(
    lengths: list[int], samples: str, max_items: int, min_items: int, holdout: int
) -> None:
    spec = SampleSpec(samples, max_items, min_items, holdout)  # type: ignore[arg-type]
    rows = np.array(lengths, dtype=np.int64)
    prefixes = [plain_prefixes(length, spec) for length in lengths]
    counts = spec.counts(rows)
    for row, may_be in enumerate(prefixes):
        if samples == "all_prefixes":
            assert counts[row] == len(may_be)
        else:
            assert counts[row] == bool(may_be)
        which = np.arange(counts[row])
        repeated = np.full(len(which), row)
        found = spec.sample_lengths(spec.windows(rows)[repeated], which, repeated, key=5).tolist()
        if samples == "all_prefixes":
            assert found == may_be
        elif samples == "full_sequence":
            assert found == may_be[-1:]
        else:
            assert set(found) <= set(may_be)


def test_a_random_prefix_is_uniform_over_the_lengths_and_drawn_anew_each_epoch() -> None:
    """40,000 rows of ten items; each length's count within 5 sigma of 4,000 (sigma 60), and agreement between two
    epochs within 5 sigma of one in ten."""
    spec = SampleSpec("one_random_prefix", max_items=12, min_items=3, holdout=2)
    rows = np.arange(40_000)
    windows = np.full(len(rows), 12)
    drawn = [spec.sample_lengths(windows, np.zeros_like(rows), rows, make([1], epoch=e).prefix_key) for e in range(2)]
    counts = np.bincount(drawn[0], minlength=13)
    assert counts[:3].sum() == 0 and len(counts) == 13
    sigma = (len(rows) * 0.1 * 0.9) ** 0.5
    assert np.abs(counts[3:] - len(rows) / 10).max() < 5 * sigma
    assert abs(int((drawn[0] == drawn[1]).sum()) - len(rows) / 10) < 5 * sigma
