"""A table of rows on its own: optimizers, first values, capacity, rounding, other world sizes."""

from __future__ import annotations

import pytest
import torch

from s3rec_dist.tables import ShardedTable, TableSpec
from s3rec_dist.tables.optimizers import Settings
from s3rec_dist.tables.sharded import TableError

FEATURES = 6


def table_of(rows: int = 40, **changes: object) -> ShardedTable:
    return ShardedTable(TableSpec(**{"rows": rows, "features": FEATURES, "seed": 3, **changes}))  # type: ignore[arg-type]


def all_rows(table: ShardedTable) -> torch.Tensor:
    """[rows, E] of a table that one rank owns."""
    return torch.cat([rows for _, rows in table.whole()])


def train(table: ShardedTable, steps: list[torch.Tensor], rate: float = 0.1, decay: float = 0.0) -> None:
    """Steps towards ones, on the ids that each touches."""
    for number, ids in enumerate(steps, 1):
        rows = table.fetch(ids)
        ((rows - 1) ** 2).sum().backward()
        table.update(table.collect(), Settings(rate, number), weight_decay=decay)


SOME = [torch.tensor([3, 17, 4]), torch.tensor([4, 39]), torch.tensor([17, 3, 0, 1]), torch.tensor([4])]
ALL = [torch.arange(40)] * 5

ORACLES = {
    "sgd": lambda p, decay: torch.optim.SGD([p], lr=0.1, weight_decay=decay),
    "adagrad": lambda p, decay: torch.optim.Adagrad([p], lr=0.1, weight_decay=decay),
    "lazy_adam": lambda p, decay: torch.optim.Adam([p], lr=0.1, weight_decay=decay),
}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ORACLES)
def test_where_all_rows_are_touched_optimizers_are_pytorchs(optimizer: str, decay: float) -> None:
    table = table_of(optimizer=optimizer)
    expected = torch.nn.Parameter(all_rows(table))
    oracle = ORACLES[optimizer](expected, decay)
    train(table, ALL, decay=decay)
    for _ in ALL:
        oracle.zero_grad()
        ((expected - 1) ** 2).sum().backward()
        oracle.step()
    torch.testing.assert_close(all_rows(table), expected.detach(), rtol=1e-6, atol=1e-6)


def test_rowwise_adagrad_has_one_number_a_row_the_sum_of_mean_squares() -> None:
    table = table_of(optimizer="rowwise_adagrad")
    expected, sums = all_rows(table), torch.zeros(40, 1)
    train(table, SOME)
    for ids in SOME:
        grads = 2 * (expected[ids] - 1)
        sums[ids] += grads.square().mean(1, keepdim=True)
        expected[ids] -= 0.1 * grads / (sums[ids].sqrt() + 1e-10)
    torch.testing.assert_close(all_rows(table), expected)
    assert table.tensors()["sum"].shape == (6, 1)


@pytest.mark.parametrize("optimizer", [*ORACLES, "rowwise_adagrad"])
def test_rows_that_a_step_does_not_touch_keep_their_bits(optimizer: str) -> None:
    table = table_of(optimizer=optimizer)
    first = all_rows(table)
    train(table, SOME)
    touched = torch.cat(SOME).unique()
    untouched = torch.ones(40, dtype=torch.bool).index_fill(0, touched, False)
    assert torch.equal(all_rows(table)[untouched], first[untouched])
    assert (all_rows(table) != first)[touched].any(1).all()
    assert table.used == len(touched)  # memory follows the rows touched


def test_several_lookups_of_a_step_add_their_gradients_up() -> None:
    one, two = table_of(optimizer="sgd"), table_of(optimizer="sgd")
    (one.fetch(torch.tensor([5, 7])) * torch.tensor([[3.0], [2.0]])).sum().backward()
    for ids, weight in (([5], 1.0), ([7, 5], 2.0)):
        (two.fetch(torch.tensor(ids)) * weight).sum().backward()
    unused = two.fetch(torch.tensor([9]))  # without a gradient
    for table in (one, two):
        table.update(table.collect(), Settings(0.1, 1))
    assert torch.equal(all_rows(one), all_rows(two)) and torch.equal(all_rows(two)[9:10], unused.detach())


def test_first_values_are_normal_and_depend_on_seed_and_id_alone() -> None:
    rows = all_rows(table_of(50_000))
    assert rows.mean().abs() < 2e-4 and rows.std() == pytest.approx(0.02, rel=0.01)
    assert (rows / 0.02).pow(4).mean() == pytest.approx(3, rel=0.03)  # a normal's kurtosis
    assert rows.flatten().unique().numel() > 0.9 * rows.numel()
    spec = TableSpec(rows=50_000, features=FEATURES, seed=3)
    for rank in range(3):
        for ids, own in ShardedTable(spec, rank=rank, world_size=3).whole():
            assert torch.equal(own, rows[ids])
    assert not torch.equal(all_rows(table_of(50_000, seed=4)), rows)
    assert not all_rows(table_of(initial_std=0.0)).any()


def test_looking_without_gradients_allots_nothing() -> None:
    table = table_of()
    with torch.no_grad():
        rows = table.fetch(torch.tensor([4, 9]))
    assert table.used == 0 and torch.equal(rows, all_rows(table)[[4, 9]])
    assert not table.collect().slots.numel()


def test_rows_used_least_recently_make_room_and_are_as_new_when_they_come_back() -> None:
    table = table_of(optimizer="adagrad", capacity=4)
    first = all_rows(table)
    train(table, [torch.tensor([1, 2, 3]), torch.tensor([2, 3]), torch.tensor([4, 5])])
    assert table.evicted == 1 and set(table.tensors()["ids"].tolist()) == {2, 3, 4, 5}
    assert torch.equal(all_rows(table)[1], first[1]) and not torch.equal(all_rows(table)[2], first[2])
    train(table, [torch.tensor([1])])  # 2 and 3 are the oldest; the lower slot goes
    assert set(table.tensors()["ids"].tolist()) == {1, 3, 4, 5}
    new = table_of(optimizer="adagrad")
    train(new, [torch.tensor([1])])
    assert torch.equal(all_rows(table)[1], all_rows(new)[1])  # its sums began anew
    with pytest.raises(TableError, match=r"more rows than the 4 .* raise model.item_capacity"):
        table.fetch(torch.arange(10, 16))


def test_rows_that_a_step_holds_make_no_room_for_its_later_lookups() -> None:
    table = table_of(capacity=4)
    rows = table.fetch(torch.tensor([1, 2]))
    more = table.fetch(torch.tensor([3, 4]))
    with pytest.raises(TableError, match=r"raise model.item_capacity"):
        table.fetch(torch.tensor([5]))
    (rows.sum() + more.sum()).backward()
    table.update(table.collect(), Settings(0.1, 1))
    assert set(table.tensors()["ids"].tolist()) == {1, 2, 3, 4}


def test_bf16_rows_are_rounded_at_random_so_that_small_steps_count() -> None:
    table = table_of(4000, optimizer="sgd", dtype="bf16", initial_std=0.0)
    ids = torch.arange(4000)
    table.put(ids, {"rows": torch.ones(4000, FEATURES)})
    for number in range(1, 21):
        table.fetch(ids).sum().backward()
        table.update(table.collect(), Settings(2.0**-12, number))  # a sixteenth of the distance to the next bf16 below
    assert all_rows(table).mean() == pytest.approx(1 - 20 * 2.0**-12, rel=1e-4)
    again = table_of(4000, optimizer="sgd", dtype="bf16", initial_std=0.0)
    again.put(ids.flip(0), {"rows": torch.ones(4000, FEATURES)})
    for number in range(1, 21):
        again.fetch(ids).sum().backward()
        again.update(again.collect(), Settings(2.0**-12, number))
    assert torch.equal(all_rows(again), all_rows(table))  # whatever slots the rows have


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_a_checkpoint_holds_is_taken_by_any_number_of_ranks(ranks: int) -> None:
    table = table_of(optimizer="lazy_adam")
    train(table, SOME)
    saved = table.tensors()
    found = torch.full((40, FEATURES), torch.nan)
    for rank in range(ranks):
        part = ShardedTable(table.spec, rank=rank, world_size=ranks)
        part.put(saved["ids"], saved)
        for ids, rows in part.whole():
            found[ids] = rows
        own = part.tensors()
        place = {int(item): i for i, item in enumerate(saved["ids"])}
        at = [place[int(item)] for item in own["ids"]]
        assert all(torch.equal(own[name], saved[name][at]) for name in saved)
    assert torch.equal(found, all_rows(table))


def test_more_rows_than_may_be_held_are_not_loaded() -> None:
    with pytest.raises(TableError, match=r"5 rows are to be loaded on a rank that may hold 4; raise model.item_cap"):
        table_of(capacity=4).put(torch.arange(5), {"rows": torch.zeros(5, FEATURES)})


def test_of_more_rows_than_may_be_held_the_ones_used_last_are_taken_in_any_order() -> None:
    whole = table_of(optimizer="adagrad", capacity=20)
    train(whole, [torch.tensor([i, i + 20]) for i in range(10)])
    saved = whole.tensors()
    place = {int(item): i for i, item in enumerate(saved["ids"])}
    for order in (torch.arange(20), torch.arange(20).flip(0)):
        part = table_of(optimizer="adagrad", capacity=6)
        for at in order.split(4):
            part.put(saved["ids"][at], {name: values[at] for name, values in saved.items()})
        own = part.tensors()
        assert set(own["ids"].tolist()) == {7, 8, 9, 27, 28, 29}
        at = torch.tensor([place[int(item)] for item in own["ids"]])
        assert all(torch.equal(own[name], saved[name][at]) for name in saved)


@pytest.mark.parametrize("seed", range(4))
def test_what_makes_room_does_not_depend_on_when_a_run_was_resumed(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    one, two = (table_of(300, optimizer="sgd", capacity=120) for _ in range(2))
    for step in range(120):
        ids = [torch.randperm(300, generator=draw)[: 1 + step % 23] for _ in range(2)]
        is_skipped = step % 5 == 4
        if step % 7 == 0:
            saved, steps = {name: values.clone() for name, values in two.tensors().items()}, two.steps
            if step % 2:
                two = table_of(300, optimizer="sgd", capacity=120)
            two.clear()
            two.put(saved["ids"], saved)
            two.steps = steps
        for table in (one, two):
            for part in ids:
                table.fetch(part).sum().backward()
            found = table.collect()
            if not is_skipped:
                table.update(found, Settings(0.1, 1))
        assert all(torch.equal(one.tensors()[name], two.tensors()[name]) for name in one.tensors())
    assert one.evicted > 500


def test_a_table_that_no_memory_has_room_for_is_told_with_what_to_change() -> None:
    with pytest.raises(TableError, match=r"10,000,000,000,000 rows of 64 .* memory of cpu .*; take more proc"):
        ShardedTable(TableSpec(rows=10**13, features=64))
