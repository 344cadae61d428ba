"""Appending: the same as preparing it all at once, ids stable, old shards untouched, whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from s3rec_dist.data import append as module
from s3rec_dist.data.append import append
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareError, PrepareSettings, add_arguments, prepare, run
from s3rec_dist.storage import Storage

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"

Event = tuple[str, str, int, int]
"""user, item, rating, time."""


def histories(dataset: Dataset) -> dict[str, list[str]]:
    """{raw user: raw items} in the dataset's order; a user has one living row."""
    raw = dataset.item_raw_ids()
    found: dict[str, list[str]] = {}
    for index in range(len(dataset.index)):
        sequences = dataset.read_row_group(index)
        for row, user in enumerate(sequences.users.to_pylist()):
            assert user not in found
            found[user] = raw[sequences.values[sequences.offsets[row] : sequences.offsets[row + 1]]].tolist()
    return found


def described(dataset: Dataset) -> dict[str, set[str]]:
    names = dataset.attributes_table().column("raw").to_pylist()
    lists, raw = dataset.item_attributes(), dataset.item_raw_ids()
    return {
        raw[item]: {names[a - 1] for a in lists.values[lists.offsets[item] : lists.offsets[item + 1]]}
        for item in range(1, dataset.n_items + 1)
    }


def counts(dataset: Dataset) -> dict[str, int]:
    table = dataset.items_table()
    return dict(zip(table.column("raw").to_pylist(), table.column("count").to_pylist(), strict=True))


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(folder: Path, name: str, events: Sequence[Event], attributes: dict[str, list[str]] | None = None) -> str:
    (folder / f"{name}.inter").write_text(HEADER + "".join("\t".join(map(str, event)) + "\n" for event in events))
    if attributes is not None:
        rows = "".join(f"{item}\t{' '.join(values)}\n" for item, values in attributes.items())
        (folder / f"{name}.item").write_text("item_id:token\tclass:token_seq\n" + rows)
    return str(folder / f"{name}.inter")


def prepared(folder: Path, events: Sequence[Event], output: str = "out", **options: Any) -> Dataset:
    path = write(folder, output, events)
    given = {"attributes": "none", "overwrite": True, **options}
    prepare(PrepareSettings(source="recbole", input=path, output=str(folder / output), **given))
    return Dataset.open(str(folder / output))


def appended(folder: Path, events: Sequence[Event], **options: Any) -> Dataset:
    path = write(folder, "new", events)
    append({"input": path, "output": str(folder / "out"), "attributes": "none", **options})
    return Dataset.open(str(folder / "out"))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "B", "é", "10"]),
        st.sampled_from(["1", "2", "10", "x", "X", "ß"]),
        st.integers(1, 5),
        st.integers(0, 9),
    ),
    min_size=3,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(
    events=EVENTS,
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    min_rating=st.sampled_from([None, 2.0]),
    duplicates=st.sampled_from(["keep", "drop_consecutive", "drop_repeats"]),
    max_history=st.sampled_from([3, 5, 100]),
    rows_per_group=st.integers(1, 3),
    groups_per_shard=st.integers(1, 2),
    format=st.sampled_from(["parquet", "webdataset"]),
)
def test_appending_is_preparing_at_once(events: list[Event], cuts: list[int], **options: Any) -> None:
    events.sort(key=lambda event: event[3])
    bounds = sorted({0, *(cut for cut in cuts if cut < len(events)), len(events)})
    parts = [events[a:b] for a, b in pairwise(bounds)]
    well_rated = [[e for e in part if options["min_rating"] is None or e[2] >= 2] for part in parts]
    assume(all(well_rated))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            first = prepared(folder, parts[0], **options)
        except PrepareError:  # nobody has three yet
            return
        whole = prepared(folder, events, "whole", **options)
        for number, part in enumerate(parts[1:], start=2):
            before = digest(folder / "out")
            dataset = appended(folder, part)
            dataset.verify()
            assert dataset.manifest.revision == number
            after = digest(folder / "out")
            assert {path: after.get(path) for path in before} | {"manifest.json": ""} == before | {"manifest.json": ""}
        dataset = Dataset.open(str(folder / "out"))
        if options["duplicates"] == "keep" or options["max_history"] == 100:
            assert histories(dataset) == histories(whole)
            assert counts(dataset) == counts(whole) or options["max_history"] < 100
        assert dataset.manifest.users == len(histories(dataset))
        assert (
            dataset.manifest.interactions == sum(map(len, histories(dataset).values())) == sum(counts(dataset).values())
        )
        assert dataset.item_raw_ids().tolist()[: first.n_items + 1] == first.item_raw_ids().tolist()[:-1]
        assert histories(Dataset.open(str(folder / "out"), revision=1)) == histories(first)
        assert sorted(os.listdir(folder / "out")) == sorted(
            ["attributes.parquet", "index.parquet", "items.parquet", "leftover.parquet", "manifest.json", "shards"]
            + (["manifests"] + [f"v{n}" for n in range(2, len(parts) + 1)]) * (len(parts) > 1)
        )


def test_only_rows_with_new_events_are_written_again(tmp_path: Path) -> None:
    events = [(f"u{i % 50:02}", f"i{i % 7}", 1, i) for i in range(500)]
    first = prepared(tmp_path, events, rows_per_group=10, groups_per_shard=2)
    dataset = appended(tmp_path, [("u03", "i1", 1, 600), ("new", "i2", 1, 601), ("u47", "i9", 1, 602)])
    found = histories(dataset)
    assert found["u03"] == [*histories(first)["u03"], "i1"] and found["u47"][-1] == "i9" and "new" not in found
    assert [shard.path for shard in dataset.manifest.shards[3:]] == ["v2/shards/00000.parquet"]
    assert [shard.rows for shard in dataset.manifest.shards] == [20, 20, 10, 2]
    assert [dataset.index.dead_rows(group).tolist() for group in range(6)] == [[3], [], [], [], [7], []]
    assert pq.read_table(tmp_path / "out/v2/leftover.parquet").to_pylist() == [{"user": "new", "item": "i2", "t": 601}]
    again = appended(tmp_path, [("u03", "i2", 1, 603), ("new", "i3", 1, 604), ("new", "i3", 1, 605)])
    assert histories(again)["u03"] == [*histories(first)["u03"], "i1", "i2"]
    assert histories(again)["new"] == ["i2", "i3", "i3"] and list(histories(again))[-2:] == ["new", "u03"]
    assert [again.index.dead_rows(group).tolist() for group in range(7)] == [[3], [], [], [], [7], [0], []]
    assert pq.read_table(tmp_path / "out/v3/leftover.parquet").num_rows == 0


def test_of_old_shards_only_users_are_read_and_row_groups_in_which_some_came_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,000 users of 100 items each."""
    events = [(f"u{i % 4_000:04}", f"i{i * i % 997}", 1, i) for i in range(400_000)]
    first = prepared(tmp_path, events, rows_per_group=100, groups_per_shard=10)
    read: list[int] = []
    groups: list[int] = []
    read_range, read_row_group = Storage.read_range, Dataset.read_row_group

    def counted(self: Storage, url: str, offset: int, size: int) -> bytes:
        read.append(size if "/shards/" in url else 0)
        return read_range(self, url, offset, size)

    def told(self: Dataset, index: int, *more: Any, **named: Any) -> Any:
        groups.append(index)
        return read_row_group(self, index, *more, **named)

    monkeypatch.setattr(Storage, "read_range", counted)
    monkeypatch.setattr(Dataset, "read_row_group", told)
    path = write(tmp_path, "new", [("u0713", "i1", 1, 400_000), ("u3999", "i1", 1, 400_000)])
    append({"input": path, "output": str(tmp_path / "out"), "attributes": "none"})
    assert set(groups) == {7, 39}
    assert sum(read) < 0.25 * sum(shard.size for shard in first.manifest.shards)


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_a_damaged_old_shard_is_told(tmp_path: Path, format: str) -> None:
    dataset = prepared(tmp_path, [(f"u{i % 9}", str(i % 7), 1, i) for i in range(99)], format=format)
    path = tmp_path / "out" / dataset.manifest.shards[0].path
    data = bytearray(path.read_bytes())
    data[int(dataset.index.offset[0] + dataset.index.size[0] // 9)] ^= 1
    path.write_bytes(data)
    before = digest(tmp_path / "out")
    with pytest.raises(PrepareError, match=rf"{path.name}: row group 0: .*(pages|damaged|SHA-256)"):
        appended(tmp_path, [("u1", "1", 1, 100)])
    assert digest(tmp_path / "out") == before


def test_items_and_attributes_keep_their_ids_and_new_ones_follow(tmp_path: Path) -> None:
    events = [("a", item, 1, t) for t, item in enumerate(["z", "z", "y", "x"])]
    write(tmp_path, "old", events, {"z": ["red", "hot"], "y": ["red"], "x": ["cold"]})
    output = str(tmp_path / "out")
    prepare(PrepareSettings(source="recbole", input=str(tmp_path / "old.inter"), output=output))
    first = Dataset.open(output)
    assert first.item_raw_ids().tolist() == ["", "z", "x", "y", ""]
    new = [("a", item, 1, 9) for item in ("w", "b", "v", "b", "y")]
    path = write(tmp_path, "new", new, {"b": ["blue", "hot"], "w": ["azure"], "v": ["azure"], "y": ["wet"], "q": ["q"]})
    append({"input": path, "output": output})
    dataset = Dataset.open(output)
    assert dataset.item_raw_ids().tolist() == ["", "z", "x", "y", "b", "v", "w", ""]
    assert dataset.attributes_table().column("raw").to_pylist() == ["red", "cold", "hot", "azure", "blue", "wet"]
    assert described(dataset) == {
        "z": {"red", "hot"}, "y": {"red", "wet"}, "x": {"cold"}, "b": {"blue", "hot"}, "w": {"azure"}, "v": {"azure"},
    }  # fmt: skip
    assert counts(dataset) == {"z": 2, "x": 1, "y": 2, "b": 2, "v": 1, "w": 1}
    assert histories(dataset) == {"a": ["z", "z", "y", "x", "w", "b", "v", "b", "y"]}
    assert dataset.manifest.preparation["described_items_unknown"] == 1


def test_kept_ids_grow_with_what_lies_between(tmp_path: Path) -> None:
    (tmp_path / "toy.txt").write_text("a 1 2 3\n")
    (tmp_path / "toy_item2attributes.json").write_text(json.dumps({"1": [1], "2": [2]}))
    output = str(tmp_path / "out")
    prepare(PrepareSettings(source="s3rec", input=str(tmp_path / "toy.txt"), output=output))
    (tmp_path / "new.txt").write_text("a 2 6\nb 5 5 1\n")
    (tmp_path / "new_item2attributes.json").write_text(json.dumps({"6": [4], "4": [2]}))
    append({"input": str(tmp_path / "new.txt"), "output": output})
    dataset = Dataset.open(output)
    assert histories(dataset) == {"a": ["1", "2", "3", "2", "6"], "b": ["5", "5", "1"]}
    assert counts(dataset) == {"1": 2, "2": 2, "3": 1, "4": 0, "5": 2, "6": 1}
    assert described(dataset) == {"1": {"1"}, "2": {"2"}, "3": set(), "4": {"2"}, "5": set(), "6": {"4"}}
    (tmp_path / "bad.txt").write_text("c 07 1 1\n")
    with pytest.raises(PrepareError, match=r'bad\.txt:1: item id "07" cannot be kept'):
        append({"input": str(tmp_path / "bad.txt"), "output": output, "attributes": "none"})
    (tmp_path / "far.txt").write_text("c 900000000 1 1\n")
    with pytest.raises(PrepareError, match="ids up to 900,000,000 for 7 items"):
        append({"input": str(tmp_path / "far.txt"), "output": output, "attributes": "none"})


def test_what_the_core_left_out_is_offered_again(tmp_path: Path) -> None:
    events = [
        (user, item, 1, t) for t, (user, item) in enumerate([*zip("aaabbb", "xyzxyz", strict=True), ("a", "rare")])
    ]
    first = prepared(tmp_path, [*events, ("c", "x", 1, 8), ("c", "y", 1, 8)], min_item_count=2, min_user_count=3)
    assert set(histories(first)) == {"a", "b"} and "rare" not in counts(first)
    dataset = appended(tmp_path, [("c", "y", 1, 9)])  # c has three now, rare has one still
    assert histories(dataset)["c"] == ["x", "y", "y"] and "rare" not in counts(dataset)
    dataset = appended(tmp_path, [("b", "rare", 1, 10)])
    assert counts(dataset)["rare"] == 2
    assert histories(dataset)["a"] == ["x", "y", "z", "rare"] and histories(dataset)["b"] == ["x", "y", "z", "rare"]
    dataset = appended(tmp_path, [("b", "x", 1, 11)])  # one event of what is known passes
    assert histories(dataset)["b"][-1] == "x"


def test_late_events_are_bad_rows(tmp_path: Path) -> None:
    prepared(tmp_path, [("a", str(t), 1, t) for t in range(5)])
    new = [("a", "x", 1, 4), ("a", "y", 1, 3), ("a", "z", 1, 5)]
    with pytest.raises(PrepareError, match=r'new\.inter:3: time "3" is older than the newest in the dataset; mend'):
        appended(tmp_path, new)
    dataset = appended(tmp_path, new, on_bad_row="skip")
    assert histories(dataset) == {"a": ["0", "1", "2", "3", "4", "x", "z"]}
    assert dataset.manifest.preparation["bad_row_examples"] == [
        'new.inter:3: time "3" is older than the newest in the dataset'
    ]
    with pytest.raises(PrepareError, match=r'new\.inter:2: time "4" is older'):
        appended(tmp_path, new[:1])


@pytest.mark.parametrize(
    ("old", "new", "order"),
    [
        (["1", "2", "3"], ["10", "9"], ["1", "0"]),
        (["1.5", "2", "3"], ["10", "9.5"], ["1", "0"]),
        (["2024-01-01"] * 3, ["2024-01-01T00:00:02Z", "2024-01-01 00:00:01"], ["1", "0"]),
    ],
)
def test_times_are_read_as_those_of_the_dataset(
    tmp_path: Path, old: list[str], new: list[str], order: list[str]
) -> None:
    def events(times: list[str]) -> list[Any]:
        return [("u", str(i), 1, time) for i, time in enumerate(times)]

    prepared(tmp_path, events(old))
    assert histories(appended(tmp_path, events(new)))["u"][3:] == order
    with pytest.raises(PrepareError, match=r'new\.inter:2: time "soon" is not a'):
        appended(tmp_path, events(["soon"]))


def test_parquet_and_moments(tmp_path: Path) -> None:
    def table(first: int, kind: pa.DataType) -> None:
        when = pa.array([10**9 * (first + t) for t in (2, 1, 3)], kind if first == 0 else pa.timestamp("ns")).cast(kind)
        pq.write_table(
            pa.table({"user_id": [7, 7, 7], "item_id": [1, 2, 3], "timestamp": when}), tmp_path / "e.parquet"
        )

    table(100, pa.timestamp("us"))
    output = str(tmp_path / "out")
    prepare(PrepareSettings(source="table", input=str(tmp_path / "e.parquet"), output=output))
    table(200, pa.timestamp("ms"))
    append({"input": str(tmp_path / "e.parquet"), "output": output})
    assert histories(Dataset.open(output)) == {"7": ["2", "1", "3", "2", "1", "3"]}
    table(0, pa.float64())
    with pytest.raises(PrepareError, match="times are of kind float, those of the dataset of kind integer"):
        append({"input": str(tmp_path / "e.parquet"), "output": output})


def test_nothing_to_append_is_an_error(tmp_path: Path) -> None:
    prepared(tmp_path, [("a", str(t), 5, t) for t in range(3)], min_rating=2.0)
    before = digest(tmp_path / "out")
    with pytest.raises(PrepareError, match="nothing to append: none of its 1 rows is left"):
        appended(tmp_path, [("a", "x", 1, 9)])
    with pytest.raises(PrepareError, match="no interactions"):
        appended(tmp_path, [])
    assert digest(tmp_path / "out") == before and not (tmp_path / "out/.append").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_item_count": 3}, r"min_item_count=3: .*out was prepared with 0, .* leave --min-item-count out"),
        ({"format": "webdataset"}, "format='webdataset': .* prepared with 'parquet'"),
        ({"overwrite": True}, "overwrite=True"),
        ({"output": "gone"}, "gone/manifest.json: no such file"),
    ],
)
def test_settings_that_shape_the_dataset_are_its_own(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    prepared(tmp_path, [("a", str(t), 1, t) for t in range(3)])
    with pytest.raises(PrepareError, match=message):
        appended(tmp_path, [("a", "x", 1, 9)], **options)
    assert appended(tmp_path, [("a", "x", 1, 9)], source="recbole", min_item_count=0).manifest.revision == 2


def test_histories_stay_within_max_history(tmp_path: Path) -> None:
    prepared(tmp_path, [("a", str(t), 1, t) for t in range(9)], max_history=4)
    dataset = appended(tmp_path, [("a", "x", 1, 10), ("a", "7", 1, 11), ("a", "y", 1, 12)])
    assert histories(dataset) == {"a": ["8", "x", "7", "y"]}
    assert counts(dataset)["5"] == 0 and counts(dataset)["7"] == 1
    assert dataset.manifest.preparation["interactions_truncated"] == 3


KILLED = """
import os, signal, sys
from s3rec_dist.data import append as module

def killed(*arguments, **more):
    os.kill(os.getpid(), signal.SIGKILL)

step, path, output = sys.argv[1:]
if step == "manifest":
    rename = os.rename
    os.rename = lambda a, b: killed() if b.endswith("manifest.json") else rename(a, b)
else:
    setattr(module, step, killed)
module.append({"input": path, "output": output, "attributes": "none"})
"""


@pytest.mark.parametrize("step", ["new_manifest", "_move_in", "manifest"])
def test_a_killed_append_leaves_the_dataset_as_it_was(tmp_path: Path, step: str) -> None:
    first = prepared(tmp_path, [("a", str(t), 1, t) for t in range(5)])
    before = digest(tmp_path / "out")
    path = write(tmp_path, "new", [("a", "x", 1, 9)])
    done = subprocess.run([sys.executable, "-c", KILLED, step, path, str(tmp_path / "out")], timeout=100)
    assert done.returncode == -signal.SIGKILL
    left = digest(tmp_path / "out")
    assert {name: left[name] for name in before} == before and len(left) > len(before)
    dataset = Dataset.open(str(tmp_path / "out"))
    dataset.verify()
    assert dataset.manifest == first.manifest
    dataset = appended(tmp_path, [("a", "y", 1, 9)])
    assert histories(dataset) == {"a": ["0", "1", "2", "3", "4", "y"]}
    names = {name.split("/")[0] for name in digest(tmp_path / "out")}
    assert names == {name.split("/")[0] for name in before} | {"manifests", "v2"}


@pytest.mark.parametrize("step", ["new_manifest", "_move_in", "_load_histories"])
def test_a_failed_append_leaves_the_dataset_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    prepared(tmp_path, [("a", str(t), 1, t) for t in range(5)])
    before = digest(tmp_path / "out")
    monkeypatch.setattr(module, step, full)
    with pytest.raises(PrepareError, match="no room on the output's disk"):
        appended(tmp_path, [("a", "x", 1, 9)])
    assert digest(tmp_path / "out") == before and "v2" not in os.listdir(tmp_path / "out")


def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path, [("a", str(t), 1, t) for t in range(5)])
    find = module._find_known

    def meanwhile(dataset: Dataset, engine: Any) -> None:
        monkeypatch.setattr(module, "_find_known", find)
        with pytest.raises(PrepareError, match="out: another append is at work on it"):
            appended(tmp_path, [("a", "y", 1, 9)])
        find(dataset, engine)

    monkeypatch.setattr(module, "_find_known", meanwhile)
    assert histories(appended(tmp_path, [("a", "x", 1, 9)])) == {"a": ["0", "1", "2", "3", "4", "x"]}


def test_a_dataset_that_was_replaced_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage()
    path = write(tmp_path, "old", [("a", str(t), 1, t) for t in range(5)])
    url = "memory://append/out"
    given: dict[str, Any] = {"source": "recbole", "input": path, "output": url, "attributes": "none"}
    try:
        prepare(PrepareSettings(**given))
        finish = module.new_manifest

        def meanwhile(*arguments: Any, **more: Any) -> Any:
            manifest = finish(*arguments, **more)
            prepare(PrepareSettings(**given, overwrite=True, name="another"))
            return manifest

        monkeypatch.setattr(module, "new_manifest", meanwhile)
        new = write(tmp_path, "new", [("a", "x", 1, 9)])
        with pytest.raises(PrepareError, match="memory://append/out: has changed meanwhile"):
            append({"input": new, "output": url, "attributes": "none"})
        assert "v2" not in storage.names(url) and Dataset.open(url).manifest.name == "another"
    finally:
        storage.remove("memory://append")


def test_a_dataset_on_remote_storage(tmp_path: Path) -> None:
    storage = Storage()
    path = write(tmp_path, "old", [("a", str(t), 1, t) for t in range(5)])
    url = "memory://append/out"
    try:
        prepare(PrepareSettings(source="recbole", input=path, output=url, attributes="none"))
        storage.write(f"{url}/v2/shards/00007.parquet", b"left by an append that was killed")
        for revision, item in ((2, "x"), (3, "y")):
            storage.write("memory://append/new.inter", (HEADER + f"a\t{item}\t1\t{revision + 7}\n").encode())
            append({"input": "memory://append/new.inter", "output": url, "attributes": "none"})
        dataset = Dataset.open(url)
        dataset.verify()
        assert histories(dataset) == {"a": ["0", "1", "2", "3", "4", "x", "y"]}
        assert histories(Dataset.open(url, revision=2)) == {"a": ["0", "1", "2", "3", "4", "x"]}
        assert storage.names(f"{url}/v2/shards") == ["00000.parquet"]
    finally:
        storage.remove("memory://append")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path, [("a", str(t), 1, t) for t in range(5)], min_item_count=1)
    write(tmp_path, "new", [("a", "x", 1, 9), ("b", "x", 1, 1)])
    parser = argparse.ArgumentParser(prog="s3rec prepare")
    add_arguments(parser)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(PrepareError, match="say what the input is with --source"):
            run(parser.parse_args(f"--input {tmp_path}/new --output {tmp_path}/out".split()))
        command = f"--append --input {tmp_path}/new --output {tmp_path}/out --attributes none --on-bad-row skip"
        run(parser.parse_args(command.split()))
    finally:
        signal.signal(signal.SIGTERM, handler)
    shown = capsys.readouterr()
    assert "looking for their users" in shown.err
    assert f"out -> {tmp_path}/out, revision 2" in shown.out and "left out: 1 bad rows" in shown.out
    assert ["interactions", "6"] in [line.split() for line in shown.out.splitlines()]


def test_many_row_groups_and_users(tmp_path: Path) -> None:
    """Enough for several batches, shards and revisions at once, against all of it at once."""
    rng = np.random.default_rng(3)
    size = 30_000
    when = np.sort(rng.integers(0, 10_000, size))
    table = pa.table({"user_id": rng.zipf(1.2, size) % 3_000, "item_id": rng.zipf(1.3, size) % 500, "timestamp": when})
    given: dict[str, Any] = {"source": "table", "rows_per_group": 100, "groups_per_shard": 3}
    bounds = [0, 15_000, 16_000, 25_000, size]
    for part, (a, b) in enumerate(pairwise(bounds)):
        path, output = str(tmp_path / f"{part}.parquet"), str(tmp_path / "out")
        pq.write_table(table.slice(a, b - a), path)
        if part == 0:
            prepare(PrepareSettings(input=path, output=output, **given))
        else:
            append({"input": path, "output": output})
    prepare(PrepareSettings(input=str(tmp_path / "?.parquet"), output=str(tmp_path / "whole"), **given))
    dataset, whole = Dataset.open(output), Dataset.open(str(tmp_path / "whole"))
    dataset.verify()
    assert histories(dataset) == histories(whole) and counts(dataset) == counts(whole)
    assert dataset.manifest.revision == 4 and len(dataset.manifest.shards) > len(whole.manifest.shards)
