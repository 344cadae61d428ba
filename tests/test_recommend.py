"""Recommendations are the brute-force ones, in a file that is whole, for users of a dataset or of a Parquet file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist import __main__ as cli
from s3rec_dist import recommend as module
from s3rec_dist.config import Config, ModelConfig
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.output import OutputError
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.evaluation import EvaluationError, Histories
from s3rec_dist.export import write_model
from s3rec_dist.model import S3Rec
from s3rec_dist.recommend import SCHEMA, Counts, RecommendError, dataset_histories, file_histories, recommend, top_k
from s3rec_dist.tables.scored import WholeItems

SMALL = ModelConfig(hidden_size=8, layers=1, heads=2, inner_size=8, max_length=4)
NOTHING = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


def by_brute_force(scores: np.ndarray, excluded: set[tuple[int, int]], k: int) -> list[list[tuple[int, float]]]:
    """Each row's best (item id, score), lower ids first where scores are equal."""
    rows = [
        [(item + 1, float(score)) for item, score in enumerate(row) if (user, item + 1) not in excluded]
        for user, row in enumerate(scores)
    ]
    return [sorted(row, key=lambda pair: (-pair[1], pair[0]))[:k] for row in rows]


def found_by_top_k(
    users: torch.Tensor, items: torch.Tensor, k: int, excluded: Sequence[tuple[int, int]], chunk: int
) -> list[list[tuple[int, float]]]:
    pairs = torch.tensor(excluded, dtype=torch.int64).view(-1, 2)
    best, scores = top_k(users, WholeItems(items), k, (pairs[:, 0], pairs[:, 1]), chunk)
    assert best.shape == scores.shape == (len(users), min(k, len(items)))
    return [
        [(item, score) for item, score in zip(ids, values, strict=True) if score > -np.inf]
        for ids, values in zip(best.tolist(), scores.tolist(), strict=True)
    ]


# top_k


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_top_k_is_the_brute_force_with_ties_by_item_id_whatever_the_chunk(data: st.DataObject) -> None:
    """Small whole numbers, so that many scores tie and none is rounded; k beyond the items, users with nothing left."""
    n_users, n_items, k = (data.draw(st.integers(1, high)) for high in (4, 12, 14))
    values = st.integers(-2, 2).map(float)
    users = torch.tensor(
        data.draw(st.lists(st.lists(values, min_size=2, max_size=2), min_size=n_users, max_size=n_users))
    )
    items = torch.tensor(
        data.draw(st.lists(st.lists(values, min_size=2, max_size=2), min_size=n_items, max_size=n_items))
    )
    pair = st.tuples(st.integers(0, n_users - 1), st.integers(1, n_items))
    excluded = data.draw(st.lists(pair, max_size=2 * n_items))  # repeats included
    expected = by_brute_force((users @ items.T).numpy(), set(excluded), k)
    for chunk in (1, 2, 3, 5, n_items, 100):
        assert found_by_top_k(users, items, k, excluded, chunk) == expected


@pytest.mark.parametrize("k", [1, 10, 100])
def test_top_k_of_random_scores_is_the_brute_force(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(5, 16, generator=generator), torch.randn(2000, 16, generator=generator)
    excluded = [(user, item) for user in range(5) for item in range(1 + user, 2000, 7)]
    for chunk in (64, 700, 5000):
        parts = torch.cat([users @ items[i : i + chunk].T for i in range(0, len(items), chunk)], 1)
        assert found_by_top_k(users, items, k, excluded, chunk) == by_brute_force(parts.numpy(), set(excluded), k)


def test_scores_keep_their_bits_and_the_order_of_floats() -> None:
    values = torch.tensor([3.4e38, 1.5, 1e-45, 0.0, -1e-45, -1.5, -3.4e38, -torch.inf])
    best, scores = top_k(torch.ones(1, 1), WholeItems(values.flip(0)[:, None]), 8, NOTHING, 3)
    assert torch.equal(scores[0], values) and best[0].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]


def test_minus_zero_ties_with_zero() -> None:
    keys = module._encode(torch.tensor([-0.0, 0.0, -0.0]), torch.tensor([3, 2, 1]))
    assert keys.argsort(descending=True).tolist() == [2, 1, 0]


# Files


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Items a..h by raw id, taken often to rarely, in several row groups."""
    folder = tmp_path_factory.mktemp("toy")
    rows = ["u1 a b c d", "u2 b c a", "u3 a e f b", "u4 g h a b c", "u5 c d a", "u6 a b h", "u7 d e f g h a b"]
    (folder / "toy.txt").write_text("\n".join(rows) + "\n")
    output = str(folder / "dataset")
    prepare(
        PrepareSettings(
            source="s3rec", input=str(folder / "toy.txt"), attributes="none", output=output, rows_per_group=3
        )
    )
    return Dataset.open(output)


@pytest.fixture(scope="module")
def model(dataset: Dataset) -> S3Rec:
    torch.manual_seed(1)
    model = S3Rec(SMALL, dataset.n_items, dataset.n_attributes)
    torch.nn.init.normal_(model.item_embedding.weight)
    return model.eval()


@pytest.fixture(scope="module")
def folder(dataset: Dataset, model: S3Rec, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model's folder, with the catalogue."""
    path = str(tmp_path_factory.mktemp("model") / "m")
    write_model(model, path, {"stage": "finetune"}, dataclasses.replace(Config(), model=SMALL), dataset)
    return path


def histories_of(dataset: Dataset) -> dict[str, list[int]]:
    return {
        user: part.values[start:end].tolist()
        for part in dataset_histories(dataset)
        for user, start, end in zip(part.users.to_pylist(), part.starts, part.ends, strict=True)
    }


def expected_rows(
    model: S3Rec, dataset: Dataset, histories: dict[str, list[int]], k: int, include_seen: bool = False
) -> dict[str, list[str]]:
    """{user: raw items} from a pass of the model over each history alone."""
    raw = dataset.item_raw_ids()
    rows = {}
    for user, items in histories.items():
        latest = torch.tensor(items[-SMALL.max_length :], dtype=torch.int32)
        with torch.no_grad():
            state = model.encode_last(latest, torch.tensor([0, len(latest)], dtype=torch.int32), len(latest))
            scores = (state @ model.item_embedding.weight[1:-1].T).numpy()
        seen = set() if include_seen else {(0, item) for item in items}
        rows[user] = [raw[item] for item, _ in by_brute_force(scores, seen, k)[0]]
    return rows


def written(path: Path) -> dict[str, list[str]]:
    """{user: items} of a file whose ranks and scores are checked."""
    table = pq.read_table(path, page_checksum_verification=True)
    assert table.schema.equals(SCHEMA)
    found: dict[str, list[str]] = {}
    last: dict[str, float] = {}
    for row in table.to_pylist():
        found.setdefault(row["user"], []).append(row["item"])
        assert row["rank"] == len(found[row["user"]])
        assert row["score"] <= last.get(row["user"], np.inf)
        last[row["user"]] = row["score"]
    return found


@pytest.mark.parametrize("include_seen", [False, True])
@pytest.mark.parametrize(("batch_users", "item_chunk"), [(1, 1), (2, 3), (256, 65536)])
def test_each_user_gets_what_the_model_alone_would_give_whatever_the_batches_and_chunks(
    model: S3Rec, dataset: Dataset, tmp_path: Path, batch_users: int, item_chunk: int, include_seen: bool
) -> None:
    output, counts = tmp_path / "recs" / "r.parquet", Counts()
    sizes: dict[str, Any] = {"batch_users": batch_users, "item_chunk": item_chunk}
    recommend(model, dataset_histories(dataset), dataset, str(output), counts, k=3, include_seen=include_seen, **sizes)
    expected = expected_rows(model, dataset, histories_of(dataset), 3, include_seen)
    assert written(output) == expected and list(expected) == [f"u{i}" for i in range(1, 8)]
    assert (counts.users, counts.rows) == (7, sum(map(len, expected.values())))
    assert list(output.parent.iterdir()) == [output]


def test_a_user_with_fewer_candidates_than_k_gets_fewer_rows(model: S3Rec, dataset: Dataset, tmp_path: Path) -> None:
    recommend(model, dataset_histories(dataset), dataset, str(tmp_path / "r"), Counts(), k=100)
    found = written(tmp_path / "r")
    assert {user: len(items) for user, items in found.items()} == {
        user: dataset.n_items - len(set(items)) for user, items in histories_of(dataset).items()
    }
    assert found["u7"] == ["c"]


def test_ids_that_name_no_item_are_never_recommended(tmp_path: Path) -> None:
    """``--ids keep`` numbers the gaps between raw ids too."""
    (tmp_path / "toy.txt").write_text("a 1 3 7\nb 3 7 9\n")
    output = str(tmp_path / "dataset")
    prepare(
        PrepareSettings(source="s3rec", input=str(tmp_path / "toy.txt"), attributes="none", output=output, ids="keep")
    )
    gaps = Dataset.open(output)
    assert gaps.n_items == 9
    model = S3Rec(SMALL, gaps.n_items, gaps.n_attributes).eval()
    for include_seen, expected in ((False, {"a": {"9"}, "b": {"1"}}), (True, {user: set("1379") for user in "ab"})):
        recommend(
            model,
            dataset_histories(gaps),
            gaps,
            str(tmp_path / "r"),
            Counts(),
            k=20,
            include_seen=include_seen,
            item_chunk=2,
        )
        assert {user: set(items) for user, items in written(tmp_path / "r").items()} == expected


def s3rec(*arguments: str) -> int:
    return cli.main(["recommend", *arguments, "--device", "cpu"])


def test_the_command_recommends_to_a_datasets_users_and_says_what_it_wrote(
    folder: str, model: S3Rec, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "r.parquet"
    assert s3rec(folder, "--dataset", dataset.path, "--k", "2", "--output", str(output)) == 0
    assert written(output) == expected_rows(model, dataset, histories_of(dataset), 2)
    assert f"{output}: 13 recommendations for 7 users among 8 items, in" in capsys.readouterr().out


def test_the_command_recommends_to_chosen_users_alone(
    folder: str, model: S3Rec, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "r.parquet"
    arguments = [folder, "--dataset", dataset.path, "--k", "2", "--output", str(output)]
    assert s3rec(*arguments, "--users", "u6", "u2") == 0
    chosen = {user: items for user, items in histories_of(dataset).items() if user in ("u2", "u6")}
    assert written(output) == expected_rows(model, dataset, chosen, 2)
    before = output.read_bytes()
    assert s3rec(*arguments, "--users", "u2", "nobody") == 2
    assert "--users: 1 without a history, among them 'nobody'; leave them out" in capsys.readouterr().err
    assert output.read_bytes() == before and list(tmp_path.iterdir()) == [output]


STRINGS = pa.schema([("user", pa.string()), ("items", pa.list_(pa.string()))])


def write_histories(path: Path, rows: Sequence[tuple[Any, Any]], schema: pa.Schema = STRINGS) -> str:
    users, items = zip(*rows, strict=True)
    pq.write_table(pa.table({"user": users, "items": items}, schema=schema), path)
    return str(path)


def test_given_histories_need_only_the_model_folder(
    folder: str, model: S3Rec, dataset: Dataset, tmp_path: Path
) -> None:
    rows = [("new", ["b", "e", "a", "a", "c", "d"]), ("u1", ["h"]), ("x y", ["g", "a"])]
    path, output = write_histories(tmp_path / "h.parquet", rows), tmp_path / "r.parquet"
    assert s3rec(folder, "--histories", path, "--k", "4", "--output", str(output)) == 0
    ids = dataset.item_ids()
    histories = {user: [ids[item] for item in items] for user, items in rows}
    assert written(output) == expected_rows(model, dataset, histories, 4)


@pytest.mark.parametrize(
    ("user", "item"),
    [(pa.int64(), pa.int32()), (pa.large_string(), pa.large_string()), (pa.uint16(), pa.string())],
)
@pytest.mark.parametrize("make_list", [pa.list_, pa.large_list])
def test_histories_may_hold_integers_and_either_kind_of_string_and_list(
    tmp_path: Path, user: pa.DataType, item: pa.DataType, make_list: Any
) -> None:
    (tmp_path / "toy.txt").write_text("a 11 22 33\nb 22 33 44\n")
    output = str(tmp_path / "dataset")
    prepare(PrepareSettings(source="s3rec", input=str(tmp_path / "toy.txt"), attributes="none", output=output))
    dataset = Dataset.open(output)
    schema = pa.schema([("extra", pa.float64()), ("items", make_list(item)), ("user", user)])
    lists = [[11, 44], [22]] if pa.types.is_integer(item) else [["11", "44"], ["22"]]
    users = [7, 8] if pa.types.is_integer(user) else ["7", "8"]
    pq.write_table(pa.table({"extra": [0.5, 1.5], "items": lists, "user": users}, schema=schema), tmp_path / "h")
    (part,) = file_histories(str(tmp_path / "h"), dataset, Counts())
    raw = dataset.item_raw_ids()
    assert part.users.to_pylist() == ["7", "8"] and raw[part.values].tolist() == ["11", "44", "22"]
    assert (part.starts.tolist(), part.ends.tolist()) == ([0, 2], [2, 3])


def test_histories_are_read_a_part_at_a_time(
    dataset: Dataset, model: S3Rec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_READ", 3)
    monkeypatch.setattr(module, "_ROWS_WRITTEN", 5)
    rows = [(f"n{i}", list("abcdefgh"[: 1 + i % 5])) for i in range(10)]
    path = write_histories(tmp_path / "h.parquet", rows)
    assert [len(part.users) for part in file_histories(path, dataset, Counts())] == [3, 3, 3, 1]
    recommend(model, file_histories(path, dataset, Counts()), dataset, str(tmp_path / "r"), Counts(), k=2)
    ids = dataset.item_ids()
    histories = {user: [ids[item] for item in items] for user, items in rows}
    assert written(tmp_path / "r") == expected_rows(model, dataset, histories, 2)
    assert pq.ParquetFile(tmp_path / "r").num_row_groups == 4


def test_an_unknown_item_is_an_error_with_file_row_and_item_or_is_dropped_and_counted(
    folder: str,
    model: S3Rec,
    dataset: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_ROWS_READ", 2)
    rows = [("n1", ["a"]), ("n2", ["b"]), ("n3", []), ("n4", ["z", "a", "zz", "c"]), ("n5", ["y"])]
    path, output = write_histories(tmp_path / "h.parquet", rows), tmp_path / "r.parquet"
    arguments = [folder, "--histories", path, "--k", "2", "--output", str(output)]
    assert s3rec(*arguments) == 2
    assert f"{path}: row 4: item 'z' is not in the catalogue" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "h.parquet"]
    assert s3rec(*arguments, "--unknown-items", "skip") == 0
    ids = dataset.item_ids()
    known = {"n1": [ids["a"]], "n2": [ids["b"]], "n4": [ids["a"], ids["c"]]}
    assert written(output) == expected_rows(model, dataset, known, 2)
    told = capsys.readouterr().out
    assert "dropped 3 items that the catalogue lacks" in told and "left out 2 users without a known item" in told


def test_a_file_without_a_single_known_item_gives_an_empty_table(
    model: S3Rec, dataset: Dataset, tmp_path: Path
) -> None:
    path = write_histories(tmp_path / "h.parquet", [("n1", ["z"]), ("n2", [])])
    counts = Counts()
    histories = file_histories(path, dataset, counts, skip_unknown=True)
    recommend(model, histories, dataset, str(tmp_path / "r"), counts, k=2)
    assert written(tmp_path / "r") == {} and counts == Counts(unknown_items=1, empty_users=2)


@pytest.mark.parametrize(
    ("rows", "schema", "message"),
    [
        (
            [("n", "a")],
            pa.schema([("user", pa.string()), ("items", pa.string())]),
            "'items' holds string; expected lists",
        ),
        (
            [("n", [1.0])],
            pa.schema([("user", pa.string()), ("items", pa.list_(pa.float64()))]),
            r"'items' holds list<.*double>; expected lists of strings or integers",
        ),
        (
            [(1.5, ["a"])],
            pa.schema([("user", pa.float64()), ("items", pa.list_(pa.string()))]),
            "'user' holds double; expected strings or integers",
        ),
        ([("n", ["a"]), (None, ["a"])], STRINGS, "row 2: user is null"),
        ([("n", ["a"]), ("m", ["a", "b"]), ("o", None)], STRINGS, "row 3: items is null"),
        ([("n", ["a"]), ("m", ["a", None])], STRINGS, "row 2: item None is not in the catalogue"),
    ],
)
def test_histories_of_another_shape_are_errors_naming_column_or_row(
    dataset: Dataset, tmp_path: Path, rows: Any, schema: pa.Schema, message: str
) -> None:
    path = write_histories(tmp_path / "h.parquet", rows, schema)
    with pytest.raises(RecommendError, match=message):
        list(file_histories(path, dataset, Counts()))


class Extension(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.list_(pa.string()), "test.extension")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Extension:
        return cls()


def test_extension_types_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    pa.register_extension_type(Extension())
    try:
        items = pa.ExtensionArray.from_storage(Extension(), pa.array([["a"]]))
        pq.write_table(pa.table({"user": ["n"], "items": items}), tmp_path / "h")
        with pytest.raises(RecommendError, match="column 'items' holds extension<"):
            list(file_histories(str(tmp_path / "h"), dataset, Counts()))
    finally:
        pa.unregister_extension_type("test.extension")


def test_missing_columns_and_files_and_damaged_files_are_errors(dataset: Dataset, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": ["n"], "item": ["a"]}), tmp_path / "flat")
    path = write_histories(tmp_path / "h", [("n", ["a"])])
    data = Path(path).read_bytes()
    (tmp_path / "cut").write_bytes(data[:-20])
    for name, message in (
        ("flat", "has no column 'items', only user, item; expected lists of strings or integers"),
        ("nothing", "no such file; expected Parquet with columns user and items"),
        ("cut", "cut: not a readable Parquet file"),
    ):
        with pytest.raises(RecommendError, match=message):
            list(file_histories(str(tmp_path / name), dataset, Counts()))


def test_what_cannot_be_done_is_an_error_with_the_remedy(
    folder: str, model: S3Rec, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bare = str(tmp_path / "bare")
    write_model(model, bare, {}, dataclasses.replace(Config(), model=SMALL), None)
    path, output = write_histories(tmp_path / "h", [("n", ["a"])]), str(tmp_path / "r")
    for arguments, message in (
        ([folder, "--output", output], "nobody to recommend to; give --dataset"),
        ([bare, "--histories", path, "--output", output], "has no catalogue, so raw ids mean nothing to it"),
        ([str(tmp_path / "none"), "--histories", path, "--output", output], "not a model folder"),
        ([folder, "--histories", path, "--output", str(tmp_path)], "is a folder; name a file"),
    ):
        assert s3rec(*arguments) == 2
        assert message in capsys.readouterr().err
    assert s3rec(bare, "--histories", path, "--dataset", dataset.path, "--output", output) == 0


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_k_and_sizes_are_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--k", "--batch-users", "--item-chunk"):
        with pytest.raises(SystemExit):
            s3rec("m", "--dataset", "d", "--output", "o", f"{option}={value}")
        assert "expected an integer of at least 1" in capsys.readouterr().err


# Whole or not at all


def test_a_failure_in_the_middle_leaves_the_earlier_file_and_nothing_else(
    model: S3Rec, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.parquet"
    recommend(model, dataset_histories(dataset), dataset, str(output), Counts(), k=3)
    before = output.read_bytes()

    def broken() -> Iterator[Histories]:
        yield next(iter(dataset_histories(dataset)))
        raise RecommendError("the second part is damaged")

    monkeypatch.setattr(module, "_ROWS_WRITTEN", 1)
    with pytest.raises(RecommendError, match="the second part is damaged"):
        recommend(model, broken(), dataset, str(output), Counts(), k=1)
    diverged = S3Rec(SMALL, dataset.n_items, dataset.n_attributes).eval()
    torch.nn.init.constant_(diverged.item_embedding.weight, torch.nan)
    with pytest.raises(EvaluationError, match="its embedding is not finite"):
        recommend(diverged, dataset_histories(dataset), dataset, str(output), Counts(), k=1)
    assert output.read_bytes() == before and list(tmp_path.iterdir()) == [output]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_is_full_leaves_the_earlier_file(
    model: S3Rec, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_WRITTEN", 1000)
    with small_disk(tmp_path / "disk", "64k") as disk:
        output = disk / "r.parquet"
        recommend(model, dataset_histories(dataset), dataset, str(output), Counts(), k=3)
        before = output.read_bytes()
        part = next(iter(dataset_histories(dataset)))
        rows = np.arange(600) % len(part.users)
        names = (pa.array([f"{hash((i, j)):x}" for j in range(len(rows))]) for i in range(1000))
        many = (Histories(users, part.values, part.starts[rows], part.ends[rows]) for users in names)
        with pytest.raises(OutputError, match=r"r\.parquet: could not be written .*No space left"):
            recommend(model, many, dataset, str(output), Counts(), k=8)
        assert output.read_bytes() == before and list(disk.iterdir()) == [output]


# Real data


def test_recommendations_for_lastfm_are_the_brute_force_and_hold_no_seen_item(
    published_data: Path, tmp_path: Path
) -> None:
    """The authors' checkpoint, imported; scores of all items at once, with seen ones at minus infinity."""
    data, folder, output = (str(tmp_path / name) for name in ("dataset", "model", "r.parquet"))
    prepare(PrepareSettings(source="s3rec", input=str(published_data / "LastFM.txt"), output=data))
    checkpoint = str(published_data / "LastFM-epochs-150.pt")
    assert cli.main(["import", "--checkpoint", checkpoint, "--dataset", data, "--output", folder]) == 0
    assert s3rec(folder, "--dataset", data, "--item-chunk", "1000", "--output", output) == 0
    dataset, model = Dataset.open(data), S3Rec.from_pretrained(folder).eval()
    found = written(Path(output))
    seen = {
        line.split()[0]: line.split()[1:] for line in (published_data / "LastFM.txt").read_text().splitlines() if line
    }
    assert found.keys() == seen.keys() and all(len(items) == 10 for items in found.values())
    assert not any(set(found[user]) & set(seen[user]) for user in found)
    ids = dataset.item_ids()
    padded = torch.zeros(len(found), 50, dtype=torch.long)
    for row, user in enumerate(found):
        latest = [ids[item] for item in seen[user][-50:]]
        padded[row, 50 - len(latest) :] = torch.tensor(latest)
    with torch.no_grad():
        scores = model.forward(padded, bidirectional=False)[:, -1] @ model.item_embedding.weight[1:-1].T
    for row, user in enumerate(found):
        scores[row, [ids[item] - 1 for item in seen[user]]] = -torch.inf
    best = scores.topk(10).values
    chosen = scores.gather(1, torch.tensor([[ids[item] - 1 for item in items] for items in found.values()]))
    torch.testing.assert_close(chosen, best, rtol=1e-5, atol=1e-5)
    assert json.loads(Path(folder, "config.json").read_text())["dataset"]["name"] == "LastFM"
