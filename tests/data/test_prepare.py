"""Preparation: equal to a naive reference on any small input, exact on the published data, whole or not at all."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.data import output, plan
from s3rec_dist.data import prepare as module
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareError, PrepareSettings, add_arguments, prepare, run, summary
from s3rec_dist.data.sources import Columns, Table
from s3rec_dist.storage import Storage

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def histories(dataset: Dataset) -> dict[str, list[str]]:
    """{raw user: raw items} in the dataset's order."""
    raw = dataset.item_raw_ids()
    found: dict[str, list[str]] = {}
    for index in range(len(dataset.index)):
        sequences = dataset.read_row_group(index)
        for row, user in enumerate(sequences.users.to_pylist()):
            found[user] = raw[sequences.values[sequences.offsets[row] : sequences.offsets[row + 1]]].tolist()
    return found


def described(dataset: Dataset) -> dict[str, list[tuple[str, str]]]:
    """{raw item: [(field, raw attribute)]}, attributes in the order of their ids."""
    names = [(row["field"], row["raw"]) for row in dataset.attributes_table().to_pylist()]
    lists, raw = dataset.item_attributes(), dataset.item_raw_ids()
    return {
        raw[item]: [names[a - 1] for a in lists.values[lists.offsets[item] : lists.offsets[item + 1]]]
        for item in range(1, dataset.n_items + 1)
    }


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def from_recbole(folder: Path, inter: str, item: str | None = None, **options: Any) -> Dataset:
    (folder / "toy.inter").write_text(inter)
    if item is not None:
        (folder / "toy.item").write_text(item)
    given: dict[str, Any] = {"attributes": "" if item is not None else "none", "overwrite": True, **options}
    prepare(PrepareSettings(source="recbole", input=str(folder), output=str(folder / "out"), **given))
    return Dataset.open(str(folder / "out"))


def from_pair(folder: Path, text: str, attributes: dict[str, list[Any]] | None = None, **options: Any) -> Dataset:
    (folder / "toy.txt").write_text(text)
    if attributes is not None:
        (folder / "toy_item2attributes.json").write_text(json.dumps(attributes))
    given: dict[str, Any] = {"attributes": "" if attributes is not None else "none", "overwrite": True, **options}
    prepare(PrepareSettings(source="s3rec", input=str(folder / "toy.txt"), output=str(folder / "out"), **given))
    return Dataset.open(str(folder / "out"))


@dataclass(frozen=True)
class Event:
    user: str
    item: str
    rating: float
    time: int


def naive(
    events: Sequence[Event], values: dict[str, list[str]], options: dict[str, Any]
) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """({user: items}, items by id, attributes by id), by the rules as the documentation words them."""
    first: dict[str, int] = {}
    for event in events:
        first.setdefault(event.user, len(first))
    rows = [event for event in events if event.rating >= options["min_rating"]]
    rows.sort(key=lambda event: (first[event.user], event.time))  # stable: input order decides ties
    kept: list[Event] = []
    for event in rows:
        before = [old.item for old in kept if old.user == event.user]
        repeat = event.item in (before[-1:] if options["duplicates"] == "drop_consecutive" else before)
        if options["duplicates"] == "keep" or not repeat:
            kept.append(event)
    while True:
        users, items = Counter(e.user for e in kept), Counter(e.item for e in kept)
        core = [
            e for e in kept if users[e.user] >= options["min_user_count"] and items[e.item] >= options["min_item_count"]
        ]
        if len(core) == len(kept):
            break
        kept = core
    users = Counter(e.user for e in kept)
    found: dict[str, list[str]] = {}
    for event in kept:
        if users[event.user] >= 3:
            found.setdefault(event.user, []).append(event.item)
    counts = Counter(item for items in found.values() for item in items)
    by_id = sorted(counts, key=lambda item: (-counts[item], item))
    uses = Counter(value for item in by_id for value in set(values.get(item, [])))
    return found, by_id, sorted(uses, key=lambda value: (-uses[value], value))


EVENTS = st.lists(
    st.builds(
        Event,
        user=st.sampled_from(["a", "b", "B", "é", "10"]),
        item=st.sampled_from(["1", "2", "10", "x", "X", "ß"]),
        rating=st.sampled_from([1.0, 2.5, 5.0]),
        time=st.integers(-2, 3),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(
    events=EVENTS,
    values=st.dictionaries(
        st.sampled_from(["1", "2", "10", "unknown"]), st.lists(st.sampled_from(["u", "v", "W"]), max_size=4)
    ),
    options=st.fixed_dictionaries(
        {
            "min_rating": st.sampled_from([0.0, 2.5]),
            "duplicates": st.sampled_from(["keep", "drop_consecutive", "drop_repeats"]),
            "min_user_count": st.integers(0, 5),
            "min_item_count": st.integers(0, 4),
        }
    ),
    rows_per_group=st.integers(1, 3),
    groups_per_shard=st.integers(1, 2),
)
def test_equals_the_naive_reference_on_any_small_input(
    events: list[Event],
    values: dict[str, list[str]],
    options: dict[str, Any],
    rows_per_group: int,
    groups_per_shard: int,
) -> None:
    expected, by_id, attributes = naive(events, values, options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inter = HEADER + "".join(f"{e.user}\t{e.item}\t{e.rating}\t{e.time}\n" for e in events)
        item = "item_id:token\tclass:token_seq\n" + "".join(f"{i}\t{' '.join(v)}\n" for i, v in values.items())
        given = {"rows_per_group": rows_per_group, "groups_per_shard": groups_per_shard, **options}
        if not expected:
            with pytest.raises(PrepareError, match="no user is left with at least 3 interactions"):
                from_recbole(folder, inter, item, **given)
            assert not (folder / "out").exists()
            return
        dataset = from_recbole(folder, inter, item, **given)
        dataset.verify()
        found = histories(dataset)
        assert found == expected and list(found) == list(expected)
        assert dataset.item_raw_ids()[1:-1].tolist() == by_id
        assert [row["raw"] for row in dataset.attributes_table().to_pylist()] == attributes
        assert described(dataset) == {
            item: sorted({("class", v) for v in values.get(item, [])}, key=lambda pair: attributes.index(pair[1]))
            for item in by_id
        }
        assert dataset.manifest.interactions == sum(map(len, expected.values()))
        assert dataset.items_table().column("count").to_pylist() == [
            sum(items.count(item) for items in expected.values()) for item in by_id
        ]
        facts = dataset.manifest.preparation
        assert facts["users_read"] == len(expected) + facts["users_dropped_by_core"] + facts["short_users"]
        assert len(events) == facts["rows_read"]


@pytest.mark.parametrize(
    ("name", "users", "items", "attributes", "interactions", "prefixes"),
    [("Beauty", 22_363, 12_101, 637, 198_502, 150_258), ("LastFM", 1_090, 3_646, 388, 52_551, 25_726)],
)
def test_the_published_pairs_come_through_exactly(
    published_data: Path,
    tmp_path: Path,
    name: str,
    users: int,
    items: int,
    attributes: int,
    interactions: int,
    prefixes: int,
) -> None:
    output = str(tmp_path / name)
    manifest = prepare(PrepareSettings(source="s3rec", input=str(published_data / f"{name}.txt"), output=output))
    assert (manifest.users, manifest.items, manifest.attributes) == (users, items, attributes)
    assert (manifest.interactions, manifest.name, manifest.preparation["ids"]) == (interactions, name, "keep")
    dataset = Dataset.open(output)
    dataset.verify()
    assert np.minimum(dataset.index.lengths - 2, 50) @ dataset.index.counts == prefixes
    lines = (published_data / f"{name}.txt").read_text().splitlines()
    assert histories(dataset) == {line.split()[0]: line.split()[1:] for line in lines}
    lists = json.loads((published_data / f"{name}_item2attributes.json").read_text())
    assert described(dataset) == {
        item: [("attribute", str(value)) for value in sorted(set(values))] for item, values in sorted(lists.items())
    }


def test_movielens_100k_with_genres(ml100k: Path, tmp_path: Path) -> None:
    manifest = prepare(
        PrepareSettings(
            source="recbole",
            input=str(ml100k),
            output=str(tmp_path / "out"),
            attribute_fields=("class", "release_year"),
        )
    )
    assert (manifest.users, manifest.items, manifest.interactions) == (943, 1_682, 100_000)
    dataset = Dataset.open(str(tmp_path / "out"))
    fields = Counter(row["field"] for row in dataset.attributes_table().to_pylist())
    assert fields["class"] == 19 and fields["release_year"] > 50
    toy_story = described(dataset)["1"]
    assert set(toy_story) == {
        ("class", "Animation"),
        ("class", "Children's"),
        ("class", "Comedy"),
        ("release_year", "1995"),
    }
    rows = [line.split("\t") for line in (ml100k / "ml-100k.inter").read_text().splitlines()[1:]]
    expected: dict[str, list[tuple[float, int, str]]] = {}
    for number, (user, item, _, when) in enumerate(rows):
        expected.setdefault(user, []).append((float(when), number, item))
    found = histories(dataset)
    assert found == {user: [item for *_, item in sorted(events)] for user, events in expected.items()}
    assert list(found) == list(expected)


def test_equal_input_gives_equal_bytes_whatever_the_machine_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "user_id": rng.integers(0, 3_000, 60_000),
            "item_id": rng.integers(0, 500, 60_000),
            "timestamp": rng.integers(0, 50, 60_000),
        }
    )
    pq.write_table(table, tmp_path / "events.parquet", row_group_size=7_000)
    written = []
    for name, threads, memory in (("a", 1, "100MB"), ("b", 4, "1GB")):
        prepare(
            PrepareSettings(
                source="table",
                input=str(tmp_path / "events.parquet"),
                output=str(tmp_path / name),
                threads=threads,
                memory_limit=memory,
                rows_per_group=1_000,
                groups_per_shard=2,
            )
        )
        written.append(digest(tmp_path / name))
    assert written[0] == written[1] and len(written[0]) == 7


def test_every_kind_of_table_gives_the_same_sequences(tmp_path: Path) -> None:
    rows = [{"uid": f"u{i % 3}", "sku": i * i % 5, "ts": 100 - i} for i in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "events.parquet")
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "events.csv").write_text("uid,sku,ts\n" + "".join(f"{r['uid']},{r['sku']},{r['ts']}\n" for r in rows))
    found = []
    for suffix in ("parquet", "jsonl", "csv"):
        prepare(
            PrepareSettings(
                source="table",
                input=str(tmp_path / f"events.{suffix}"),
                output=str(tmp_path / suffix),
                user_column="uid",
                item_column="sku",
                time_column="ts",
            )
        )
        found.append(histories(Dataset.open(str(tmp_path / suffix))))
    assert found[0] == found[1] == found[2]
    assert list(found[0]) == ["u0", "u1", "u2"]
    assert found[0]["u1"] == [str(i * i % 5) for i in range(28, 0, -3)]


def shop(folder: Path, size: int = 5_000) -> Path:
    """Parquet in three files: users as text, items as integers, moments."""
    rng = np.random.default_rng(1)
    (folder / "shop").mkdir()
    table = pa.table(
        {
            "user_id": [f"u{u}" for u in rng.zipf(1.4, size) % 300],
            "item_id": (rng.zipf(1.4, size) % 200).astype(np.uint16),
            "timestamp": pa.array(rng.integers(0, 99, size) * 10**9, pa.timestamp("ns")),
            "rating": rng.integers(1, 6, size).astype(np.float32),
        }
    )
    for part in range(3):
        pq.write_table(table.slice(part * (size // 3), size // 3 + 2 * (part == 2)), folder / f"shop/{part}.parquet")
    return folder / "shop"


def from_shop(folder: Path, output: str, **given: Any) -> Dataset:
    prepare(PrepareSettings(source="table", input=str(folder), output=output, overwrite=True, **given))
    return Dataset.open(output)


def test_parquet_that_the_engine_scans_and_that_arrow_reads_give_the_same_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"min_rating": 2, "duplicates": "drop_consecutive", "min_item_count": 4}
    scanned = from_shop(shop(tmp_path), str(tmp_path / "scanned"), **given)
    assert Table(str(tmp_path / "shop"), "", Columns("user_id", "item_id", "", ""), (), "").lake() is not None
    monkeypatch.setattr(Table, "lake", lambda self: None)
    read = from_shop(tmp_path / "shop", str(tmp_path / "read"), **given)
    assert read.manifest == scanned.manifest and digest(tmp_path / "read") == digest(tmp_path / "scanned")


def test_a_flipped_bit_in_parquet_with_page_checksums_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    columns = {name: np.arange(1_000) % size for name, size in (("user_id", 7), ("item_id", 90), ("timestamp", 999))}
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[2_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(PrepareError, match=r"events\.parquet: not a readable Parquet file .*CRC"):
        from_shop(path, str(tmp_path / "out"))


def test_files_may_differ_in_the_width_of_integers_but_not_in_kind(tmp_path: Path) -> None:
    for name, kind in (("a", pa.int16()), ("b", pa.int64()), ("c", pa.string())):
        when = {"user_id": pa.array([1, 1, 1]), "timestamp": pa.array([1, 2, 3])}
        item = pa.array([1, 2, 1 << 40 if name == "b" else 3]).cast(kind)
        pq.write_table(pa.table({**when, "item_id": item}), tmp_path / f"{name}.parquet")
    assert histories(from_shop(tmp_path / "[ab].parquet", str(tmp_path / "out"))) == {
        "1": ["1", "1", "2", "2", "3", str(1 << 40)]
    }
    with pytest.raises(PrepareError, match=r"c\.parquet: column 'item_id' holds string, but int64 in .*a\.parquet"):
        from_shop(tmp_path / "*.parquet", str(tmp_path / "out"))


def test_long_histories_keep_their_latest_interactions(tmp_path: Path) -> None:
    dataset = from_pair(tmp_path, "a 1 2 3 4 5 6\nb 6 1 2 3\nc 6 6 6 6 6\n", max_history=4)
    assert histories(dataset) == {"a": ["3", "4", "5", "6"], "b": ["6", "1", "2", "3"], "c": ["6", "6", "6", "6"]}
    facts = dataset.manifest.preparation
    assert (facts["users_truncated"], facts["interactions_truncated"]) == (2, 3)
    assert dataset.manifest.interactions == 12
    assert dataset.items_table().column("count").to_pylist() == [1, 1, 2, 1, 1, 6]  # of what was kept
    assert "longest histories cut to 4: 2 users lose 3 older interactions" in summary(dataset.manifest, "out", 1.0)


def test_what_the_filters_leave_out_is_kept_for_an_append(tmp_path: Path) -> None:
    lines = ["s a 1 7", "k a 5 4", "k b 5 3", "k a 5 2", "s a 5 6", "k rare 5 5", "k c 5 8", "s c 5 9"]
    lines += ["m b 5 1", "m a 5 2", "m c 5 3"]
    inter = HEADER + "".join("\t".join(line.split()) + "\n" for line in lines)
    dataset = from_recbole(tmp_path, inter, min_rating=2.0, min_item_count=2, duplicates="drop_repeats")
    assert histories(dataset) == {"k": ["a", "b", "c"], "m": ["b", "a", "c"]}
    left = pq.read_table(tmp_path / "out" / "leftover.parquet").to_pylist()
    assert left == [
        {"user": "s", "item": "a", "t": 6},
        {"user": "k", "item": "rare", "t": 5},
        {"user": "s", "item": "c", "t": 9},
    ]


def test_inputs_and_outputs_may_be_urls(tmp_path: Path) -> None:
    storage = Storage()
    for path in shop(tmp_path).iterdir():
        storage.upload(str(path), f"memory://lake/shop/{path.name}")
    try:
        expected = from_shop(tmp_path / "shop", str(tmp_path / "out"))
        for given in ("memory://lake/shop", "memory://lake/shop/*.parquet"):
            prepare(
                PrepareSettings(source="table", input=given, output="memory://lake/out/", overwrite=True),
                storage=storage,
            )
            found = Dataset.open("memory://lake/out", storage)
            found.verify()
            assert found.manifest.name == "shop" and found.manifest.content == expected.manifest.content
        storage.write("memory://lake/toy.inter", (HEADER + "u\ta\t1\t1\n" * 3).encode())
        storage.write("memory://lake/toy.item", b"item_id:token\tclass:token_seq\na\tX Y\n")
        output = str(tmp_path / "toy")
        assert prepare(PrepareSettings(source="recbole", input="memory://lake/toy", output=output)).attributes == 2
    finally:
        storage.remove("memory://lake")


def test_scratch_files_lie_in_the_work_folder_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    add = plan.load_attributes
    monkeypatch.setattr(
        plan,
        "load_attributes",
        lambda *args: (seen.append(os.listdir(next((tmp_path / "work").iterdir()))), add(*args)),
    )
    from_pair(tmp_path, "a 1 2 3\n", work_dir=str(tmp_path / "work"))
    assert "prepare.duckdb" in seen[0] and os.listdir(tmp_path / "work") == []


def test_spark_without_pyspark_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.setitem(sys.modules, "pyspark.errors", None)
    with pytest.raises(PrepareError, match=r"engine=spark: .* pip install 's3rec-dist\[spark\]'"):
        from_pair(tmp_path, "a 1 2 3\n", engine="spark")
    assert sorted(os.listdir(tmp_path)) == ["toy.txt"]


@pytest.mark.parametrize(
    ("given", "name"), [("shop/may.csv", "may"), ("shop", "shop"), ("shop/*.csv", "shop"), ("shop/m?y/*.csv", "shop")]
)
def test_a_dataset_is_named_after_its_input_file_or_folder(tmp_path: Path, given: str, name: str) -> None:
    (tmp_path / "shop/may").mkdir(parents=True)
    for file in ("shop/may.csv", "shop/may/may.csv"):
        (tmp_path / file).write_text("u,i\na,1\na,2\na,3\n")
    manifest = prepare(
        PrepareSettings(
            source="table",
            input=str(tmp_path / given),
            output=str(tmp_path / "out"),
            user_column="u",
            item_column="i",
            time_column="",
        )
    )
    assert manifest.name == name


@pytest.mark.parametrize(
    ("times", "order"),
    [
        (["10", "9", "8"], [3, 2, 1]),  # as text, 10 comes first
        (["1700000000000000002", "1700000000000000001", "1700000000000000003"], [1, 2, 3]),
        (["170000000000000002", "170000000000000001", "170000000000000003"], [2, 1, 3]),  # equal as doubles
        (["1.5", "1", "-2e3"], [3, 2, 1]),
        (["2024-02-01", "2023-12-31 23:59:59", "2024-01-01T00:00:00Z"], [2, 3, 1]),
        (["2024-01-01 01:00:00+02:00", "2024-01-01", "2023-12-31 20:30:00-0230"], [1, 3, 2]),  # 23:00, 24:00, 23:00
        (["5", "5", "5"], [1, 2, 3]),
    ],
)
def test_times_are_read_as_integers_floats_or_dates(tmp_path: Path, times: list[str], order: list[int]) -> None:
    inter = HEADER + "".join(f"u\t{i}\t1\t{when}\n" for i, when in enumerate(times, start=1))
    assert histories(from_recbole(tmp_path, inter)) == {"u": [str(i) for i in order]}


def test_without_a_time_column_the_input_order_is_time(tmp_path: Path) -> None:
    inter = HEADER + "u\ta\t1\t3\nu\tb\t1\t2\nu\tc\t1\t1\n"
    assert histories(from_recbole(tmp_path, inter, time_column="")) == {"u": ["a", "b", "c"]}


def test_users_too_short_for_the_split_are_kept_out_and_counted(tmp_path: Path) -> None:
    dataset = from_pair(tmp_path, "a 1 2\nb 1 2 3\nc 1\n")
    assert histories(dataset) == {"b": ["1", "2", "3"]}
    assert dataset.manifest.preparation["short_users"] == 2
    assert dataset.manifest.preparation["short_user_interactions"] == 3


def test_count_ids_are_by_descending_count_then_raw_id(tmp_path: Path) -> None:
    dataset = from_pair(tmp_path, "a x 2 10 x\nb 10 2 x\n")
    assert dataset.manifest.preparation["ids"] == "count"
    assert dataset.item_raw_ids().tolist() == ["", "x", "10", "2", ""]


def test_auto_keeps_only_a_pair_whose_ids_are_1_to_n(tmp_path: Path) -> None:
    assert from_pair(tmp_path, "a 3 2 1\n").manifest.preparation["ids"] == "keep"
    assert from_pair(tmp_path, "a 4 2 1\n").manifest.preparation["ids"] == "count"
    assert from_pair(tmp_path, "a 0 2 1\n").manifest.preparation["ids"] == "count"
    assert from_pair(tmp_path, "a 03 2 1\n").manifest.preparation["ids"] == "count"
    assert from_recbole(tmp_path, HEADER + "u\t1\t1\t1\n" * 3).manifest.preparation["ids"] == "count"


def test_kept_ids_may_have_gaps_and_attributes_on_them(tmp_path: Path) -> None:
    dataset = from_pair(tmp_path, "a 7 2 4 2\nb 9 1\n", {"3": [5], "9": [2], "2": [2, 2], "50": [9]}, ids="keep")
    assert (dataset.n_items, dataset.n_attributes) == (9, 9)  # item 9 was left with user b
    assert histories(dataset) == {"a": ["7", "2", "4", "2"]}
    assert described(dataset)["3"] == [("attribute", "5")] and described(dataset)["2"] == [("attribute", "2")]
    assert dataset.manifest.preparation["described_items_unknown"] == 1
    assert dataset.items_table().column("count").to_pylist() == [0, 2, 0, 1, 0, 0, 1, 0, 0]


def test_kept_ids_that_would_leave_the_table_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"ids up to 900,000,000 for 3 items .*--ids count"):
        from_pair(tmp_path, "a 900000000 2 4\n", ids="keep")


def test_attributes_that_are_not_integers_are_counted(tmp_path: Path) -> None:
    dataset = from_pair(tmp_path, "a 1 2 3\n", {"1": ["red", "blue"], "2": ["red"]})
    assert dataset.attributes_table().column("raw").to_pylist() == ["red", "blue"]
    assert dataset.manifest.preparation["items_without_attributes"] == 1


def test_one_raw_value_in_two_fields_is_two_attributes(tmp_path: Path) -> None:
    item = "item_id:token\tgenre:token_seq\tmood:token_seq\na\tdark light\tdark\n"
    dataset = from_recbole(tmp_path, HEADER + "u\ta\t1\t1\n" * 3, item)
    assert described(dataset)["a"] == [("genre", "dark"), ("genre", "light"), ("mood", "dark")]


def test_a_dataset_without_attributes_is_legal(tmp_path: Path) -> None:
    dataset = from_pair(tmp_path, "a 1 2 3\n")
    assert dataset.n_attributes == 0 and len(dataset.item_attributes().values) == 0
    assert dataset.attributes_table().num_rows == 0


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_ROWS = [
    ("u\t\t1\t1", "empty item id"),
    ("\ti\t1\t1", "empty user id"),
    ("u\ti\t1\tnoon", 'time "noon" is not a finite number'),
    ("u\ti\t1\t", 'time "" is not a finite number'),
    ("u\ti\t1\tnan", 'time "nan" is not a finite number'),
    ("u\ti\t1\t-inf", 'time "-inf" is not a finite number'),
    ("u\ti\tgood\t1", 'rating "good" is not a finite number'),
    ("u\ti\tNaN\t1", 'rating "NaN" is not a finite number'),
    ("u\ti\t1", "3 columns, expected 4"),
    ("u\ti\t1\t1\t1", "5 columns, expected 4"),
    ("", "empty user id"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS)
def test_a_malformed_row_stops_with_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    good = "".join(f"u\ti{i}\t1\t{i}\n" for i in range(3))
    with pytest.raises(PrepareError) as caught:
        from_recbole(tmp_path, HEADER + good + line + "\n" + good, min_rating=0.0)
    assert str(caught.value).startswith(f"{tmp_path}/toy.inter:5: {reason}; ")
    assert "--on-bad-row skip" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["toy.inter"]


def test_malformed_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    good = "".join(f"u\ti{i}\t1\t{i}\n" for i in range(3))
    inter = HEADER + good + "".join(f"{line}\n" for line, _ in BAD_ROWS) + good
    clean = from_recbole(tmp_path, HEADER + good + good, min_rating=0.0)
    expected = histories(clean)
    dataset = from_recbole(tmp_path, inter, min_rating=0.0, on_bad_row="skip", max_bad_rows=len(BAD_ROWS))
    assert histories(dataset) == expected
    facts = dataset.manifest.preparation
    assert facts["bad_rows"] == len(BAD_ROWS) and facts["rows_read"] == len(BAD_ROWS) + 6
    assert "toy.inter:13: 3 columns, expected 4" in facts["bad_row_examples"]
    with pytest.raises(PrepareError, match=r"this is bad row 11, more than --max-bad-rows 10"):
        from_recbole(tmp_path, inter, min_rating=0.0, on_bad_row="skip", max_bad_rows=len(BAD_ROWS) - 1)
    assert histories(Dataset.open(str(tmp_path / "out"))) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a 1 2 3\nb\n", "toy.txt:2: a user without items"),
        ("a 1 2 3\n\nb 1 2 3\n", "toy.txt:2: empty line"),
        ("a 1 2 3\nb 1 2 3\na 4 5 6\n", "toy.txt:3: user 'a' has a line already"),
    ],
)
def test_malformed_lines_of_a_pair(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(PrepareError) as caught:
        from_pair(tmp_path, text)
    assert reason in str(caught.value)
    dataset = from_pair(tmp_path, text, on_bad_row="skip")
    assert histories(dataset)["a"] == ["1", "2", "3"]
    assert dataset.manifest.preparation["bad_rows"] == 1


@pytest.mark.parametrize("item", ["0", "-1", "x", "1.0", "01", "10000000000"])
def test_ids_that_cannot_be_kept_are_malformed_rows(tmp_path: Path, item: str) -> None:
    text = f"a 1 2 3\nb 3 {item} 1 1\n"
    with pytest.raises(PrepareError, match=rf'toy\.txt:2: item id "{item}" cannot be kept, expected an integer from 1'):
        from_pair(tmp_path, text, ids="keep")
    dataset = from_pair(tmp_path, text, ids="keep", on_bad_row="skip")
    assert histories(dataset) == {"a": ["1", "2", "3"], "b": ["3", "1", "1"]}


def test_an_attribute_row_without_an_item_is_malformed(tmp_path: Path) -> None:
    item = "item_id:token\tclass:token_seq\ni\tA\n\tB C\n"
    with pytest.raises(PrepareError, match=r"toy\.item:3: empty item id"):
        from_recbole(tmp_path, HEADER + "u\ti\t1\t1\n" * 3, item)
    dataset = from_recbole(tmp_path, HEADER + "u\ti\t1\t1\n" * 3, item, on_bad_row="skip")
    assert dataset.n_attributes == 1 and dataset.manifest.preparation["bad_rows"] == 1


@pytest.mark.parametrize("inter", ["", HEADER])
def test_empty_inputs(tmp_path: Path, inter: str) -> None:
    with pytest.raises(PrepareError, match=r"the file is empty|no interactions; expected at least one row"):
        from_recbole(tmp_path, inter)
    assert sorted(os.listdir(tmp_path)) == ["toy.inter"]


def test_missing_input(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"gone\.txt: no such input file"):
        prepare(PrepareSettings(source="s3rec", input=str(tmp_path / "gone.txt"), output=str(tmp_path / "out")))


def test_nobody_left_says_which_filter_took_them(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"no user is left .* \(3 rows under min_rating, 0 duplicates"):
        from_recbole(tmp_path, HEADER + "u\ti\t1\t1\n" * 3, min_rating=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"duplicates": "drop"}, "duplicates='drop': expected one of keep, drop_consecutive, drop_repeats"),
        ({"rows_per_group": 0}, "rows_per_group=0: expected at least 1"),
        ({"min_user_count": -1}, "min_user_count=-1"),
        ({"min_rating": float("nan")}, "min_rating=nan: expected a finite number"),
        ({"output": ""}, "output is empty"),
        ({"max_history": 2}, "max_history=2: expected at least 3"),
        ({"max_history": 1 << 24}, "max_history=16777216: expected less than 16777216"),
        ({"item_column": ""}, "item_column is empty"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        PrepareSettings(**{"source": "table", "input": "x.csv", "output": "y", **options})


def test_a_pair_has_no_ratings_to_filter_by(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="holds no ratings"):
        from_pair(tmp_path, "a 1 2 3\n", min_rating=1.0)


def test_a_memory_limit_that_is_not_a_size_is_explained(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"memory_limit='lots': expected a size, as in 2GB"):
        from_pair(tmp_path, "a 1 2 3\n", memory_limit="lots")


@pytest.mark.parametrize("limit", ["1MB", "10MB"])
def test_too_little_memory_says_so(tmp_path: Path, limit: str) -> None:
    text = "".join(f"u{i} 1 2 3 {i}\n" for i in range(20_000))
    with pytest.raises(PrepareError, match=rf"memory_limit={limit}: too small .*raise --memory-limit"):
        from_pair(tmp_path, text, memory_limit=limit)
    assert os.listdir(tmp_path) == ["toy.txt"]


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    from_pair(tmp_path, "a 1 2 3\n")
    before = digest(tmp_path / "out")
    with pytest.raises(PrepareError, match=r"out: exists already; .*--overwrite"):
        from_pair(tmp_path, "a 3 2 1\n", overwrite=False)
    assert digest(tmp_path / "out") == before
    assert histories(from_pair(tmp_path, "a 3 2 1\n")) == {"a": ["3", "2", "1"]}
    assert sorted(os.listdir(tmp_path)) == ["out", "toy.txt"]


def test_overwrite_replaces_datasets_only(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(PrepareError, match="not a dataset, so --overwrite leaves it alone"):
        from_pair(tmp_path, "a 1 2 3\n")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert from_pair(tmp_path, "a 1 2 3\n", overwrite=False).n_rows == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", [(plan, "write_leftover"), (module, "new_manifest"), (output, "put_in_place")])
def test_a_full_disk_leaves_the_earlier_output_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str], overwrite: bool
) -> None:
    if overwrite:
        from_pair(tmp_path, "a 1 2 3\n")
    before = digest(tmp_path)

    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*step, full)
    (tmp_path / "toy.txt").write_text("a 3 2 1\n")
    with pytest.raises(PrepareError, match=r"out: no room on the output's disk .*free some space or choose an output"):
        from_pair(tmp_path, "a 3 2 1\n", overwrite=overwrite)
    (tmp_path / "toy.txt").write_text("a 1 2 3\n")
    after = digest(tmp_path)
    assert after == before if overwrite else list(after) == ["toy.txt"]


FULL_DISK = """
import os, sys
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareError, PrepareSettings, prepare

disk, toy = sys.argv[1:]
def attempt(lines):
    with open(toy, "w") as file:
        file.write("".join(f"u{i} 1 2 3 {i}\\n" for i in range(1, lines)))
    prepare(PrepareSettings(source="s3rec", input=toy, output=disk + "/out", attributes="none", overwrite=True))
attempt(20)
before = Dataset.open(disk + "/out").fingerprint
try:
    attempt(600_000)
except PrepareError as error:
    print(error)
dataset = Dataset.open(disk + "/out")
dataset.verify()
assert dataset.fingerprint == before and os.listdir(disk) == ["out"], os.listdir(disk)
"""


def test_a_disk_that_really_is_full(tmp_path: Path) -> None:
    """On a tmpfs of 12 MB in a mount namespace of its own."""
    disk, toy = tmp_path / "disk", tmp_path / "toy.txt"
    disk.mkdir()
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs unshare with user and mount namespaces")
    script = f"mount -t tmpfs -o size=12m tmpfs {disk} && exec {sys.executable} -c '{FULL_DISK}' {disk} {toy}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert f"{disk}/out: no room on the output's disk" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_preparation_removes_its_scratch_files(tmp_path: Path, number: int) -> None:
    rows = "".join(f"u{i} " + "1 2 3 4 5 6 7 8\n" for i in range(300_000))
    (tmp_path / "toy.txt").write_text(rows)
    script = (
        "import argparse, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's & ignores it
        "from s3rec_dist.data.prepare import add_arguments, run; p = argparse.ArgumentParser(); "
        "add_arguments(p); run(p.parse_args())"
    )
    command = [sys.executable, "-c", script, "--source", "s3rec", "--attributes", "none"]
    command += ["--input", str(tmp_path / "toy.txt"), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and "reading" in process.stderr.readline()
        process.send_signal(number)
        assert process.wait(60) != 0
    assert os.listdir(tmp_path) == ["toy.txt"]


def test_leftovers_of_a_killed_run_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-abc").mkdir()
    (tmp_path / "toy.txt").write_text("a 1 2 3\n")
    told: list[str] = []
    prepare(
        PrepareSettings(
            source="s3rec", input=str(tmp_path / "toy.txt"), output=str(tmp_path / "out"), attributes="none"
        ),
        told.append,
    )
    assert any(".out.partial-abc: left by a command" in line for line in told)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="s3rec prepare")
    add_arguments(made)
    return made


def test_every_setting_is_an_option_with_the_same_default() -> None:
    args = parser().parse_args(["--source", "table", "--input", "x", "--output", "y"])
    expected = PrepareSettings(source="table", input="x", output="y")
    values = vars(args)
    assert (values.pop("storage"), values.pop("append")) == ([], False)
    assert PrepareSettings(**values) == expected
    assert {field.name for field in dataclasses.fields(PrepareSettings)} <= {a.dest for a in parser()._actions}


def test_run_reports_progress_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.inter").write_text(HEADER + "u\ta\t5\t1\nu\tb\t5\t2\nu\ta\t5\t3\nu\tc\t1\t4\nv\ta\t5\t1\nbad\n")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        run(
            parser().parse_args(
                f"--source recbole --input {tmp_path} --output {tmp_path}/out --attributes none --min-rating 3 "
                "--on-bad-row skip".split()
            )
        )
    finally:
        signal.signal(signal.SIGTERM, handler)
    shown = capsys.readouterr()
    assert "reading" in shown.err and "writing sequences" in shown.err
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["users", "1"] in lines and ["items", "2"] in lines and ["interactions", "3"] in lines
    assert ["mean", "length", "3.00"] in lines and ["density", "150.0000%"] in lines and ["shards", "1"] in lines
    assert (
        "left out: 1 bad rows, 1 rows under the rating threshold, 1 users with fewer than 3 interactions" in shown.out
    )
    assert "toy.inter:7: 1 columns, expected 4" in shown.out
