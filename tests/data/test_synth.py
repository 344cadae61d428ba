"""The synthetic log: as large as asked for, the same bytes wherever it is made, with the structure it claims."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s3rec_dist.__main__ import main
from s3rec_dist.data import synth
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.data.synth import Structure, SynthError, SynthSettings, moments, skewed_below, write, zipf_ranks

BORDERS = (1 + (synth.ROWS - 1) * synth.START) / synth.ROWS
"""The share of a lane's events that start a session."""


def make(folder: Path, events: int, **options: Any) -> pa.Table:
    """The events of a new log, in order of the files."""
    write(SynthSettings(events=events, output=str(folder), **options))
    return pa.concat_tables(pq.read_table(path) for path in sorted((folder / "events").iterdir()))


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Log:
    """A million events, users and items counted from 0; ``before`` and ``after`` are neighbours in users' histories."""

    def __init__(self, folder: Path) -> None:
        table = make(folder, 1_000_000)
        self.items_table = pq.read_table(folder / "items.parquet")
        self.user, self.item = (table.column(name).to_numpy().astype(np.int64) - 1 for name in table.column_names[:2])
        self.structure = Structure(1_000_000 // 16, 10_000, 42)
        order = np.argsort(self.user, kind="stable")
        users, items = self.user[order], self.item[order]
        same = users[1:] == users[:-1]
        self.before, self.after = items[:-1][same], items[1:][same]

    def share(self, neighbours: np.ndarray) -> float:
        """Of all events, those whose neighbour before makes a condition true."""
        return float(neighbours.sum() / len(self.user))

    def leaf(self, items: np.ndarray) -> np.ndarray:
        return items % self.structure.leaves

    def category(self, items: np.ndarray) -> np.ndarray:
        return self.structure.category_of[self.leaf(items)]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return Log(tmp_path_factory.mktemp("synth") / "lake")


class TestFiles:
    @pytest.mark.parametrize(
        ("events", "options"),
        [
            (1, {}),
            (2, {"items": 1}),
            (1000, {}),
            (1000, {"users": 1}),
            (1000, {"users": 3, "items": 9}),
            (5000, {"users": 100_000, "items": 7}),
            (20_001, {"users": 129, "items": 30}),
        ],
    )
    def test_any_number_of_events_users_and_items(self, events: int, options: dict[str, int], tmp_path: Path) -> None:
        table = make(tmp_path / "lake", events, **options)
        assert table.num_rows == events
        settings = SynthSettings(events=events, output="-", **options)
        assert 1 <= min(table["user_id"].to_pylist()) <= max(table["user_id"].to_pylist()) <= settings.n_users()
        assert 1 <= min(table["item_id"].to_pylist()) <= max(table["item_id"].to_pylist()) <= settings.n_items()
        items = pq.read_table(tmp_path / "lake" / "items.parquet")
        assert items["item_id"].to_pylist() == list(range(1, settings.n_items() + 1))

    @pytest.mark.parametrize(
        ("events", "items", "users"), [(1, 1000, 1), (150_000, 1500, 9375), (10**9, 1_000_000, 62_500_000)]
    )
    def test_defaults_grow_with_the_events(self, events: int, items: int, users: int) -> None:
        settings = SynthSettings(events=events, output="-")
        assert (settings.n_items(), settings.n_users()) == (items, users)

    def test_files_hold_equal_parts_in_order_of_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(synth, "GROUP_EVENTS", 1 << 14)
        monkeypatch.setattr(synth, "PART_EVENTS", 1 << 16)
        table = make(tmp_path / "lake", 150_000)
        names = [f"part-{part:05d}.parquet" for part in range(3)]
        files = [pq.ParquetFile(tmp_path / "lake" / "events" / name) for name in names]
        assert sorted(os.listdir(tmp_path / "lake" / "events")) == names
        assert [file.metadata.num_rows for file in files] == [1 << 16, 1 << 16, 150_000 - (1 << 17)]
        assert {file.metadata.row_group(0).num_rows for file in files} == {1 << 14}
        times = table["timestamp"].to_numpy()
        assert (np.diff(times) > 0).all()
        assert times[0] == synth.FIRST_MOMENT and times[-1] < synth.FIRST_MOMENT + synth.DURATION

    def test_what_lies_in_a_file_does_not_depend_on_where_files_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = make(tmp_path / "whole", 150_000)
        monkeypatch.setattr(synth, "GROUP_EVENTS", 1 << 14)
        monkeypatch.setattr(synth, "PART_EVENTS", 1 << 15)
        assert make(tmp_path / "parts", 150_000).equals(whole)

    def test_a_longer_log_of_the_same_users_and_items_begins_alike(self, tmp_path: Path) -> None:
        short = make(tmp_path / "short", 30_000, users=5000, items=2000).drop(["timestamp"])
        long = make(tmp_path / "long", 90_000, users=5000, items=2000).drop(["timestamp"])
        assert long.slice(0, 30_000).equals(short)

    def test_equal_settings_give_equal_bytes_on_one_thread_and_two(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(synth, "GROUP_EVENTS", 1 << 14)
        monkeypatch.setattr(synth, "PART_EVENTS", 1 << 14)
        for name, options in {"one": {"threads": 1}, "two": {"threads": 2}, "other": {"seed": 1}}.items():
            make(tmp_path / name, 120_000, **options)
        one, two, other = (digest(tmp_path / name) for name in ("one", "two", "other"))
        assert one == two and len(one) == 10
        assert not set(one.values()) & set(other.values())

    def test_times_are_exact_where_products_pass_64_bits(self) -> None:
        events, first = 10**12, 7 * 10**11 + 3
        expected = [synth.FIRST_MOMENT + (first + i) * synth.DURATION // events for i in range(1000)]
        assert moments(first, 1000, events).tolist() == expected

    def test_the_folder_says_what_it_holds(self, tmp_path: Path) -> None:
        make(tmp_path / "lake", 5000, seed=7)
        mark = json.loads((tmp_path / "lake" / "synth.json").read_text())
        assert {name: mark[name] for name in ("events", "users", "items", "seed")} == {
            "events": 5000, "users": 312, "items": 1000, "seed": 7,
        }  # fmt: skip


class TestStructure:
    def test_a_lane_has_its_own_users_so_that_a_user_is_in_one_place_at_a_time(self, log: Log) -> None:
        lanes = log.structure.lanes
        assert (log.user % lanes == np.arange(len(log.user)) % lanes).all()

    def test_sessions_are_as_long_as_said(self, log: Log) -> None:
        lanes = log.structure.lanes
        whole = len(log.user) // (synth.ROWS * lanes) * synth.ROWS
        user = log.user[: whole * lanes].reshape(whole, lanes)
        changes = (user[1:] != user[:-1]).mean()
        same_user_again = 1 / 64  # at most about that, for the busiest of a lane's users are drawn more often
        assert BORDERS * (1 - 3 * same_user_again) < changes < BORDERS

    def test_users_have_a_dozen_events_and_some_have_many_spread_over_time(self, log: Log) -> None:
        lengths = np.bincount(log.user)
        lengths = lengths[lengths > 0]
        assert 10 < lengths.mean() < 20
        assert np.percentile(lengths, 99) > 6 * np.median(lengths)
        tenth = np.arange(len(log.user)) * 10 // len(log.user)
        tenths = np.bincount(np.unique(log.user * 10 + tenth) // 10)
        assert tenths[np.flatnonzero(np.bincount(log.user) >= 20)].mean() > 4

    def test_popularity_within_styles_is_zipf(self, log: Log) -> None:
        rank = log.item // log.structure.leaves
        counts = np.bincount(rank)
        slope = np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)[0]
        assert slope == pytest.approx(-1, abs=0.05)

    def test_the_next_item_is_among_the_successors_as_often_as_the_oracle_says(self, log: Log) -> None:
        structure = log.structure
        hits = (structure.successors(log.before) == log.after[:, None]).any(axis=1)
        rank_share = np.bincount(structure.ranks) / len(structure.ranks)
        own = np.sort(structure.successors(np.arange(structure.items)), axis=1)
        distinct = np.concatenate([np.ones((len(own), 1), bool), np.diff(own, axis=1) != 0], axis=1)
        by_chance = (rank_share[own // structure.leaves] * distinct).sum(axis=1)[log.before]
        chance = ((synth.STYLE + synth.DRIFT / synth.STYLES) * by_chance).mean()
        expected = (1 - BORDERS) * (synth.SUCCESSOR + chance)
        assert 0.315 < (1 - BORDERS) * synth.SUCCESSOR < 0.32 and 0.09 < chance < 0.11
        assert expected < log.share(hits) < expected + 0.005  # jumps and other sessions hit by chance, too

    def test_successors_are_drawn_evenly_and_follow_in_style(self, log: Log) -> None:
        structure = log.structure
        items = np.arange(structure.items)
        successors = structure.successors(items)
        assert (structure.following[log.leaf(items)][:, None] == log.leaf(successors)).all()
        distinct = (np.diff(np.sort(successors, axis=1), axis=1) != 0).all(axis=1)
        heads = np.flatnonzero(distinct & (np.bincount(log.before, minlength=structure.items) > 2000))
        shares = [(log.after[log.before == item][:, None] == successors[item]).mean(axis=0) for item in heads]
        least = (1 - BORDERS) * synth.SUCCESSOR / synth.SUCCESSORS
        assert len(shares) >= 20 and np.min(shares) > least - 0.02 and np.median(shares) < least + 0.04

    def test_a_user_stays_in_a_category_and_in_its_order_of_styles(self, log: Log) -> None:
        stays = log.share(log.category(log.before) == log.category(log.after))
        assert (1 - BORDERS) * (1 - synth.JUMP) < stays < (1 - BORDERS) * (1 - synth.JUMP) + BORDERS
        follows = log.share(log.structure.following[log.leaf(log.before)] == log.leaf(log.after))
        expected = (1 - BORDERS) * (synth.SUCCESSOR + synth.STYLE + synth.DRIFT / synth.STYLES)
        assert expected < follows < expected + BORDERS / synth.STYLES

    def test_sessions_of_a_user_begin_at_home(self, log: Log) -> None:
        lanes = log.structure.lanes
        first = np.concatenate([np.arange(lanes) + block for block in range(0, len(log.user), synth.ROWS * lanes)])
        at_home = log.structure.home(log.user[first]) == log.category(log.item[first])
        assert at_home.mean() == pytest.approx(synth.HOME + (1 - synth.HOME) * 0.06, abs=0.02)

    def test_attributes_tell_category_and_style(self, log: Log) -> None:
        rows = log.items_table.to_pylist()
        items = np.arange(len(rows))
        assert [row["category"] for row in rows] == [f"category-{category}" for category in log.category(items)]
        tagged = np.array([bool(row["tags"]) for row in rows])
        assert tagged.mean() == pytest.approx(1 - synth.TAGLESS, abs=0.01)
        tags = np.array([[int(tag.split("-")[1]) for tag in row["tags"]] for row in rows if row["tags"]])
        leaf = log.leaf(items)[tagged]
        assert (tags[:, 0] == leaf).mean() == pytest.approx(synth.RIGHT_TAG, abs=0.015)
        entropy = information(leaf, leaf)
        assert information(tags[:, 0], leaf) > 0.8 * entropy
        shuffled = np.random.default_rng(0).permutation(leaf)
        assert information(tags[:, 1], leaf) == pytest.approx(information(tags[:, 1], shuffled), rel=0.03)

    def test_zipf_ranks_are_drawn_by_their_weights(self) -> None:
        ranks = zipf_ranks(50)
        weights = 1 / np.arange(1, 51)
        assert np.bincount(ranks) / len(ranks) == pytest.approx(weights / weights.sum(), abs=1 / len(ranks))
        assert zipf_ranks(1).max() == 0 and len(zipf_ranks(1_000_000)) == 1 << 20

    def test_skewed_numbers_stay_below_their_bound(self) -> None:
        bits = np.arange(1 << 12)
        assert skewed_below(bits, 12, 1).max() == 0
        for bound in (4, 20, 100):
            drawn = skewed_below(bits, 12, bound)
            assert drawn.min() == 0 and drawn.max() == bound - 1
            assert (drawn < bound / 4).mean() == 0.5
        assert skewed_below(np.array([(1 << 31) - 1]), 31, synth.LARGEST_ID)[0] < synth.LARGEST_ID


def information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of two discrete samples, in bits."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / independent[there])).sum())


def test_models_can_be_told_apart(tmp_path: Path) -> None:
    """HR@10 of the last item among all: popularity < counts of what followed the item < these and its style's."""
    write(SynthSettings(events=200_000, items=8000, output=str(tmp_path / "lake")))
    settings = PrepareSettings(
        source="table",
        input=str(tmp_path / "lake" / "events"),
        attributes=str(tmp_path / "lake" / "items.parquet"),
        attribute_fields=("category", "tags"),
        output=str(tmp_path / "dataset"),
        memory_limit="500MB",
        threads=1,
    )
    prepare(settings)
    dataset = Dataset.open(str(tmp_path / "dataset"))
    sequences = [dataset.read_row_group(index) for index in range(len(dataset.index))]
    histories = [
        s.values[a:b].astype(np.int64) - 1
        for s in sequences
        for a, b in zip(s.offsets[:-1], s.offsets[1:], strict=True)
    ]
    lists, names = dataset.item_attributes(), dataset.attributes_table()["raw"].to_pylist()
    style = np.zeros(dataset.n_items, np.int64)
    for item in range(dataset.n_items):
        for attribute in lists.values[lists.offsets[item + 1] : lists.offsets[item + 2]]:
            kind, _, number = names[attribute - 1].partition("-")
            style[item] = int(number) + 1 if kind == "style" else style[item]

    before = np.concatenate([history[:-3] for history in histories])
    after = np.concatenate([history[1:-2] for history in histories])
    popularity = np.bincount(after, minlength=dataset.n_items) / len(after)
    followed = np.zeros((dataset.n_items, dataset.n_items), np.float32)
    np.add.at(followed, (before, after), 1)
    styles = np.zeros((style.max() + 1, style.max() + 1), np.float32)
    np.add.at(styles, (style[before], style[after]), 1)
    styles /= styles.sum(axis=1, keepdims=True) + 1

    models: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "popularity": lambda items: np.tile(popularity, (len(items), 1)),
        "items": lambda items: followed[items] + popularity,
        "items and styles": lambda items: followed[items] + 100 * styles[style[items]][:, style] * popularity,
    }

    def hit_rate(model: str) -> float:
        hits = 0
        for first in range(0, len(histories), 500):
            some = histories[first : first + 500]
            scores = models[model](np.array([history[-2] for history in some]))
            best = np.argpartition(-scores, 10, axis=1)[:, :10]
            hits += sum(history[-1] in row for history, row in zip(some, best, strict=True))
        return hits / len(histories)

    rates = {model: hit_rate(model) for model in models}
    assert 0 < rates["popularity"] < 0.08
    assert rates["items"] > rates["popularity"] + 0.25
    assert rates["items and styles"] > rates["items"] + 0.01


class TestOutput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"events": 0}, "events=0: expected 1 to "),
            ({"events": -5}, "events=-5: expected 1 to "),
            ({"items": -1}, "items=-1: expected 0 to 2,147,483,647"),
            ({"users": 1 << 31}, "users=2,147,483,648: expected 0 to 2,147,483,647"),
            ({"threads": -1}, "threads=-1: expected 0 to 1,024"),
            ({"output": ""}, "output='': expected a local folder"),
            ({"output": "s3://bucket/lake"}, "output='s3://bucket/lake': expected a local folder"),
        ],
    )
    def test_bad_settings_say_what_was_expected(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(SynthError) as error:
            SynthSettings(**{"events": 10, "output": "lake", **options})
        assert str(error.value).startswith(message)

    def test_what_exists_is_replaced_only_where_asked_and_only_a_synthetic_log(self, tmp_path: Path) -> None:
        make(tmp_path / "lake", 1000)
        before = digest(tmp_path / "lake")
        with pytest.raises(SynthError, match=r"lake: exists already; choose another output, or pass --overwrite"):
            make(tmp_path / "lake", 2000)
        assert digest(tmp_path / "lake") == before
        assert make(tmp_path / "lake", 2000, overwrite=True).num_rows == 2000
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "letter.txt").write_text("dear")
        with pytest.raises(SynthError, match="mine: not a synthetic log, so --overwrite leaves it alone"):
            make(tmp_path / "mine", 1000, overwrite=True)
        assert sorted(os.listdir(tmp_path)) == ["lake", "mine"]

    def test_a_failure_leaves_the_output_as_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make(tmp_path / "lake", 1000)
        before = digest(tmp_path / "lake")
        monkeypatch.setattr(synth, "GROUP_EVENTS", 1 << 13)
        monkeypatch.setattr(synth, "PART_EVENTS", 1 << 13)

        def full(self: Structure, number: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Structure, "block", full)
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path / "lake", 100_000, overwrite=True)
        assert digest(tmp_path / "lake") == before
        assert os.listdir(tmp_path) == ["lake"]

    def test_a_signal_ends_the_command_soon_and_leaves_nothing(self, tmp_path: Path) -> None:
        arguments = ["synth", "--events", "10_000_000_000", "--output", "lake", "--threads", "1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "s3rec_dist", *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            assert "part-00000.parquet, 1 of 2385" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 128 + signal.SIGTERM
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
        assert os.listdir(tmp_path) == []

    def test_the_command_says_what_it_wrote_and_what_reads_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)
        lake = tmp_path / "lake"
        assert main(["synth", "--events", "3_000", "--items", "50", "--users", "200", "--output", str(lake)]) == 0
        captured = capsys.readouterr()
        assert "part-00000.parquet, 1 of 1" in captured.err
        lines = captured.out.splitlines()
        counts = {name: number for name, number in (line.split() for line in lines[1:5])}
        assert counts == {"events": "3,000", "users": "200", "items": "50", "files": "1"}
        command = lines[-1].removeprefix("next: s3rec ").replace("DATASET", str(tmp_path / "dataset"))
        assert main(command.split()) == 0
        assert Dataset.open(str(tmp_path / "dataset")).n_items <= 50
        assert main(["synth", "--events", "3_000", "--output", str(lake)]) == 2
        assert "lake: exists already" in capsys.readouterr().err
