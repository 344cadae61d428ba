"""ONNX files, torch.export programs and item vectors give what the packed encoder and ``s3rec recommend`` give."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from handmade import random_groups, write

from s3rec_dist import evaluation
from s3rec_dist.__main__ import main
from s3rec_dist.config import Config, ModelConfig
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.output import OutputError
from s3rec_dist.evaluation import user_vectors
from s3rec_dist.export import ExportError, write_model
from s3rec_dist.model import S3Rec
from s3rec_dist.recommend import Candidates
from s3rec_dist.serving import onnx, program, vectors
from s3rec_dist.serving.padded import PaddedEncoder, Run, difference, padded, real_histories
from s3rec_dist.training.weights import Joined

for package in ("onnx", "onnxscript", "onnxruntime", "faiss"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

ALIGNMENTS = ("end", "start")
LENGTH = 10
"""The models' max_length; histories have 3 to 14 items."""


def make_model(dataset: Dataset, alignment: Any = "end") -> S3Rec:
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=16, inner_size=32, heads=2, layers=2, max_length=LENGTH, position_alignment=alignment,
        initializer_range=0.5,
    )  # fmt: skip
    return S3Rec(config, dataset.n_items, dataset.n_attributes, dataset.item_attributes()).eval()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write(tmp_path_factory.mktemp("exports") / "dataset", random_groups())


def options(output: Path, **given: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"model": "m", "output": str(output), "overwrite": False, "top_k": 0, "int8": False, "index": "auto", **given}
    )


def written(format: str, model: S3Rec, dataset: Dataset, path: Path, **given: Any) -> Run:
    """What runs an exported file."""
    if format == "onnx":
        onnx.write_onnx(model, dataset, options(path, **given))
        return onnx.onnx_run(str(path))
    program.write_program(model, dataset, options(path, **given))
    return program.program_run(str(path))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_the_padded_encoder_is_the_packed_one_whatever_surrounds_a_history(dataset: Dataset, alignment: str) -> None:
    model = make_model(dataset, alignment)
    histories = real_histories(dataset)
    assert {1, 14} <= set(histories.ends - histories.starts)  # beyond max_length too
    items, lengths = padded(histories)
    wider = torch.nn.functional.pad(items, (0, 5), value=7)  # what lies behind a history does not count
    with torch.no_grad():
        expected = user_vectors(model, histories, "cpu")
        for given in (items, wider):
            torch.testing.assert_close(PaddedEncoder(model)(given, lengths)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_an_exported_encoder_takes_any_batch_and_length(
    dataset: Dataset, tmp_path: Path, format: str, alignment: str
) -> None:
    model = make_model(dataset, alignment)
    run = written(format, model, dataset, tmp_path / "m")
    assert difference(run, model, dataset, 0) < 3e-5
    one = run(torch.tensor([[3]]), torch.tensor([1]))[0]
    assert one.shape == (1, 16)
    with torch.no_grad():
        packed = model.encode_last(torch.tensor([3], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), 1)
    torch.testing.assert_close(one.detach(), packed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_exported_best_items_are_those_of_recommend(dataset: Dataset, tmp_path: Path, format: str) -> None:
    model = make_model(dataset)
    run = written(format, model, dataset, tmp_path / "m", top_k=30)
    histories = real_histories(dataset)
    items, scores = run(*padded(histories))
    with torch.no_grad():
        users = user_vectors(model, histories, "cpu")
    expected, expected_scores = Candidates.of(model, dataset).best(users, 30, histories.seen())
    finite = np.isfinite(expected_scores)  # who has had more than 9 items has fewer than 30 left
    assert not finite.all()
    assert np.array_equal(items.numpy()[finite], expected[finite])
    assert np.array_equal(np.isfinite(scores.detach().numpy()), finite)


def test_int8_is_smaller_and_says_what_it_costs(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(dataset)
    run = written("onnx", model, dataset, tmp_path / "m", int8=True)
    (share,) = re.findall(r"(\d+\.\d)% of fp32's 20 best items are among its own", capsys.readouterr().out)
    assert float(share) > 80
    assert 1e-4 < difference(run, model, dataset, 0) < 1


def test_the_file_says_what_it_is_of(dataset: Dataset, tmp_path: Path) -> None:
    import onnx as library

    onnx.write_onnx(make_model(dataset), dataset, options(tmp_path / "m.onnx", top_k=5))
    proto = library.load(tmp_path / "m.onnx")
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert (facts["n_items"], facts["max_length"], facts["top_k"]) == (str(dataset.n_items), "10", "5")
    assert [value.name for value in proto.graph.input] == ["items", "lengths"]
    assert [value.name for value in proto.graph.output] == ["item", "score"]


def test_a_file_that_differs_is_not_put_in_place(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = make_model(dataset), make_model(dataset, "start")
    real = onnx._export
    monkeypatch.setattr(onnx, "_export", lambda exported, path: real(PaddedEncoder(other).eval(), path))
    with pytest.raises(ExportError, match=r"in onnxruntime a vector differs by .* nothing was written"):
        onnx.write_onnx(model, dataset, options(tmp_path / "m.onnx"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_item_vectors_for_other_systems(
    dataset: Dataset, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import faiss

    model = make_model(dataset)
    vectors.write_vectors(model, dataset, options(tmp_path / "v", index=kind))
    table = model.item_embedding.weight.detach()[1:-1].numpy()
    assert np.array_equal(np.load(tmp_path / "v/vectors.npy"), table)
    rows = pq.read_table(tmp_path / "v/vectors.parquet")
    assert rows.column("item").to_pylist() == [f"i{i}" for i in rows.column("id").to_pylist()]
    assert np.array_equal(np.stack(rows.column("vector").to_numpy()), table)
    index = faiss.read_index(str(tmp_path / "v/index.faiss"))
    assert index.ntotal == dataset.n_items
    _, found = index.search(table[4:5] * 100, 3)
    if kind == "flat":
        assert np.array_equal(found[0], np.argsort(-table @ table[4])[:3] + 1)
    printed = capsys.readouterr().out
    (recall,) = map(float, re.findall(r"recall@10 (\d\.\d+) against exact search for", printed))
    assert recall == 1 if kind == "flat" else 0 < recall <= 1
    with pytest.raises(OutputError, match="exists already"):
        vectors.write_vectors(model, dataset, options(tmp_path / "v"))


@pytest.mark.parametrize("features", ["none", "add"])
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_vectors_of_a_large_model_are_made_and_indexed_some_at_a_time(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, features: Any
) -> None:
    model = make_model(dataset)
    model = S3Rec(
        dataclasses.replace(model.config, item_features=features),
        dataset.n_items,
        dataset.n_attributes,
        dataset.item_attributes(),
    ).eval()
    torch.nn.init.normal_(model.item_embedding.weight)
    config = dataclasses.replace(Config(), model=model.config)
    write_model(model, str(tmp_path / "m"), {"stage": "finetune"}, config, dataset, max_shard_bytes=10 * 16 * 4)
    common = ["export", str(tmp_path / "m"), "--dataset", dataset.path, "--format", "vectors", "--index", kind]
    assert main([*common, "--output", str(tmp_path / "whole")]) == 0
    read: list[int] = []
    rows = Joined.rows

    def counted(stored: Joined, begin: int, end: int) -> torch.Tensor:
        if stored.shape[0] == dataset.n_items + 2:
            read.append(end - begin)
        return rows(stored, begin, end)

    monkeypatch.setattr(Joined, "rows", counted)
    monkeypatch.setattr(evaluation, "MAX_SHARD_BYTES", 10 * 16 * 4)
    monkeypatch.setattr(evaluation, "ROWS_READ", 3)
    monkeypatch.setattr(vectors, "ROWS_READ", 7)
    assert main([*common, "--output", str(tmp_path / "parts")]) == 0
    assert max(read) == 10 and sum(read) == dataset.n_items
    for name in ("vectors.npy", "index.faiss") if features == "none" else ():
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    expected = model.catalogue_vectors.detach()[1:-1].numpy()
    found = pq.read_table(tmp_path / "parts/vectors.parquet").column("vector").to_numpy()
    np.testing.assert_allclose(np.stack(found), expected, rtol=0, atol=1e-6 if features == "add" else 0)
    np.testing.assert_allclose(np.load(tmp_path / "parts/vectors.npy"), expected, rtol=0, atol=1e-6)


def test_the_index_may_be_left_out(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    vectors.write_vectors(make_model(dataset), dataset, options(tmp_path / "v", index="none"))
    assert {path.name for path in (tmp_path / "v").iterdir()} == {"vectors.parquet", "vectors.npy"}


def test_an_ivf_index_of_many_items_finds_most_of_the_exact_best() -> None:
    draw = np.random.default_rng(0)
    table = draw.standard_normal((30_000, 16), dtype=np.float32)
    rows = np.arange(5, len(table))
    index = vectors.build_index(table, rows, "ivf")
    queries = draw.standard_normal((50, 16), dtype=np.float32)
    exact = rows[np.argsort(-queries @ table[rows].T)[:, :10]] + 1
    _, found = index.search(queries, 10)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)]) > 0.6


@pytest.mark.parametrize(
    ("k", "message"), [(100, r"--top-k 100: .* has 39 items; ask for fewer"), (-1, "--top-k -1: expected 0 or more")]
)
def test_impossible_numbers_of_best_items_are_named(dataset: Dataset, tmp_path: Path, k: int, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        onnx.write_onnx(make_model(dataset), dataset, options(tmp_path / "m.onnx", top_k=k))


@pytest.mark.parametrize(("format", "package", "extra"), [("onnx", "onnx", "onnx"), ("vectors", "faiss", "faiss")])
def test_a_missing_package_is_named_with_what_to_install(
    dataset: Dataset, tmp_path: Path, format: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    write = {"onnx": onnx.write_onnx, "vectors": vectors.write_vectors}[format]
    with pytest.raises(ExportError, match=rf"needs {package}: pip install 's3rec-dist\[{extra}\]'"):
        write(make_model(dataset), dataset, options(tmp_path / "m"))


def test_the_commands_write_what_they_say(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(dataset)
    config = dataclasses.replace(Config(), model=model.config)
    write_model(model, str(tmp_path / "m"), {"stage": "finetune"}, config, dataset)
    common = ["export", str(tmp_path / "m"), "--dataset", dataset.path]
    for format, output in (("onnx", "m.onnx"), ("torch", "m.pt2"), ("vectors", "v")):
        assert main([*common, "--format", format, "--output", str(tmp_path / output)]) == 0
        assert f"{tmp_path / output}: " in capsys.readouterr().out
    assert main([*common, "--format", "torch", "--output", str(tmp_path / "m.pt2")]) == 2


@pytest.mark.parametrize(("histories", "k"), [([[1, 2, 3]], 0), ([[1, 2, 3], [2, 1]], 0), ([[1]], 1)])
def test_datasets_of_few_users_are_checked_on_all_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], histories: list[list[int]], k: int
) -> None:
    few = write(tmp_path / "dataset", [histories])
    written("torch", make_model(few), few, tmp_path / "m", top_k=k)
    assert f"on {len(histories)} histories: largest difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("format", "option", "owner"),
    [("torch", ["--int8"], "onnx"), ("vectors", ["--top-k", "3"], "onnx"), ("folder", ["--index", "ivf"], "vectors")],
)
def test_options_of_another_format_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, option: list[str], owner: str
) -> None:
    given = ["export", "m", "--dataset", "d", "--format", format, "--output", str(tmp_path / "o"), *option]
    assert main(given) == 2
    assert f"{option[0]} is an option of --format {owner}, not of {format}" in capsys.readouterr().err


@pytest.mark.slow
def test_beauty_s_checkpoint_exports_within_the_tolerance(published_data: Path, tmp_path: Path) -> None:
    data = str(tmp_path / "beauty")
    assert main(["prepare", "--source", "s3rec", "--input", str(published_data / "Beauty.txt"), "--output", data]) == 0
    dataset = Dataset.open(data)
    from s3rec_dist.interchange.reference import import_reference

    model = import_reference(str(published_data / "Beauty-epochs-150.pt"), 2, dataset).eval()
    for format in ("onnx", "torch"):
        run = written(format, model, dataset, tmp_path / format, top_k=20)
        assert difference(run, model, dataset, 20) < 2e-5
