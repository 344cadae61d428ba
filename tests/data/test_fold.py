"""Folding sorted events into sequences: the same wherever batches end, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.data.fold import Fold, split_names

Rows = list[tuple[str, list[int]]]


def cut_at(batch: pa.RecordBatch, at: list[int]) -> Iterator[pa.RecordBatch]:
    bounds = sorted({0, batch.num_rows, *(c for c in at if c < batch.num_rows)})
    return (batch.slice(a, b - a) for a, b in pairwise(bounds))


def read(groups: list[pa.RecordBatch]) -> Rows:
    return [(row["user"], row["items"]) for group in groups for row in group.to_pylist()]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), max_size=30),
    rows=st.integers(1, 5),
    max_history=st.integers(1, 13),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    name_cuts=st.lists(st.integers(0, 30), max_size=4),
    is_named=st.booleans(),
)
def test_the_latest_of_every_history_whatever_the_batches(
    lengths: list[int], rows: int, max_history: int, cuts: list[int], name_cuts: list[int], is_named: bool
) -> None:
    u = np.repeat(np.arange(len(lengths)) * 7, lengths)
    items = np.arange(1, len(u) + 1, dtype=np.int32)
    names = [f"u{i}" for i in range(len(lengths))]
    fold = Fold(rows, max_history, len(items))
    if is_named:
        own = pa.array(np.repeat(np.array(names, dtype=object), lengths), pa.string())
        events, arrays = split_names(cut_at(pa.record_batch({"u": u, "item": items, "raw": own}), cuts))
    else:
        events = cut_at(pa.record_batch({"u": u, "item": items}), cuts)
        arrays = (b.column(0) for b in cut_at(pa.record_batch({"raw": pa.array(names, pa.string())}), name_cuts))
    groups = list(fold.groups(events, arrays))
    assert [len(group) for group in groups[:-1]] == [rows] * (len(groups) - 1)
    assert all(len(group) for group in groups)
    ends = np.cumsum(lengths, dtype=int)
    whole = [list(range(end - n + 1, end + 1)) for n, end in zip(lengths, ends, strict=True)]
    assert read(groups) == [(name, history[-max_history:]) for name, history in zip(names, whole, strict=True)]
    assert fold.cut.users == sum(len(history) > max_history for history in whole)
    lost = [item for history in whole for item in history[:-max_history]]
    assert np.flatnonzero(fold.cut.items).tolist() == lost and fold.cut.items.sum() == len(lost)


def test_one_endless_history_is_held_only_as_far_as_it_is_kept() -> None:
    size, batches = 1 << 16, 200
    held = 0

    def events() -> Iterator[pa.RecordBatch]:
        nonlocal held
        for number in range(batches):
            yield pa.record_batch({"u": np.zeros(size, np.int64), "item": np.full(size, number + 1, np.int32)})
            held = max(held, pa.total_allocated_bytes() + sum(array.nbytes for array in fold._last))

    fold = Fold(4, 10_000, batches)
    (group,) = fold.groups(events(), iter([pa.array(["endless"])]))
    assert read([group]) == [("endless", [batches] * 10_000)]
    assert fold.cut.users == 1 and fold.cut.items.sum() == size * batches - 10_000
    assert held < 4 * size * 12  # a few batches, of 200


def test_row_groups_of_many_batches_are_copied_once() -> None:
    """Every user comes in a batch of its own; a concatenation per batch would take minutes."""
    users, rows = 60_000, 50_000
    batches = (pa.record_batch({"u": np.array([i]), "item": np.array([1], np.int32)}) for i in range(users))
    names = pa.array([f"u{i}" for i in range(users)])
    groups = list(Fold(rows, 10, 1).groups(batches, iter([names])))
    assert [len(group) for group in groups] == [rows, users - rows]
