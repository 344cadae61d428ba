"""Models of large catalogues are exported, read and searched without ever being in memory as a whole."""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from toy_models import assert_same_weights, six_items, small_model, write_run

from s3rec_dist import __main__ as cli
from s3rec_dist.config import Config, ModelConfig
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.export import (
    MODEL_FILES,
    MODEL_PATTERNS,
    ExportError,
    export,
    load_export,
    load_model,
    verify_export,
    write_model,
)
from s3rec_dist.model import S3Rec
from s3rec_dist.tables import ShardedTable, TableSpec
from s3rec_dist.training import weights as module
from s3rec_dist.training.checkpoint import CheckpointError, Growth, describe, load_weights, with_growth
from s3rec_dist.training.weights import InMemory, StoredRows, TableRows, in_file, in_shards, write_weights

ROWS = "item_embedding.weight"
SMALL_SHARD = 3 * 8 * 4  # three rows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return six_items(tmp_path_factory.mktemp("toy") / "a")


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards of three item rows."""
    folder = tmp_path_factory.mktemp("models") / "m"
    export(str(run), dataset, str(folder), max_shard_bytes=SMALL_SHARD)
    return folder


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors"))


def test_a_large_model_is_shards_with_an_index_and_its_item_table_is_cut(model: Path, dataset: Dataset) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shards = shards_of(model)
    assert not (model / "model.safetensors").exists() and len(shards) > 3
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    stored = {path.name: load_file(path) for path in shards}
    assert index["weight_map"] == {tensor: name for name, own in stored.items() for tensor in own}
    cut = [name for name in index["weight_map"] if name.startswith(f"{ROWS}.")]
    assert cut == [f"{ROWS}.rows-0-3", f"{ROWS}.rows-3-6", f"{ROWS}.rows-6-8"]
    sizes = [sum(tensor.nbytes for tensor in own.values()) for own in stored.values()]
    assert max(sizes) <= SMALL_SHARD and index["metadata"]["total_size"] == sum(sizes)
    files = json.loads((model / "config.json").read_text())["files"]
    assert files.keys() >= {"model.safetensors.index.json", *stored}


def test_what_reads_a_model_folder_reads_shards(
    model: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for loaded in (S3Rec.from_pretrained(str(model)), load_export(str(model)), load_model(str(model), dataset)):
        assert_same_weights(loaded, small_model(dataset))
    verify_export(str(model))
    export(str(model), dataset, str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert_same_weights(load_export(str(tmp_path / "whole")), small_model(dataset))
    found = []
    for folder in (model, tmp_path / "whole"):
        output = tmp_path / f"{folder.name}.parquet"
        assert cli.main(["recommend", str(folder), "--dataset", dataset.path, "--output", str(output)]) == 0
        found.append(output.read_bytes())
    assert found[0] == found[1]


def test_rows_of_shards_go_into_a_sharded_table(model: Path, dataset: Dataset) -> None:
    tables = [
        ShardedTable(TableSpec(rows=7, features=8, optimizer="sgd"), rank=rank, world_size=2) for rank in range(2)
    ]
    expected = small_model(dataset).state_dict()[ROWS]
    for table in tables:
        weights, _ = load_weights(str(model), tables=lambda _, table=table: {"items": table})
        assert ROWS not in weights
        for ids, rows in table.whole():
            assert torch.equal(rows, expected[ids.masked_fill(ids == 0, 7)])


def test_shards_are_uploaded_and_read_from_other_storage(run: Path, dataset: Dataset) -> None:
    place = "memory://large-exports/m"
    export(str(run), dataset, place, max_shard_bytes=SMALL_SHARD)
    assert_same_weights(load_export(place), small_model(dataset))
    with pytest.raises(ExportError, match="exists already"):
        export(str(run), dataset, place)
    export(place, dataset, place, overwrite=True)
    assert dataset.storage.names(place) == sorted(MODEL_FILES)
    assert_same_weights(load_export(place), small_model(dataset))
    dataset.storage.remove(f"{place}/config.json")  # as an upload that was cut short
    export(str(run), dataset, place, overwrite=True, max_shard_bytes=SMALL_SHARD)
    dataset.storage.remove(f"{place}/config.json")
    export(str(run), dataset, place, overwrite=True)
    assert dataset.storage.names(place) == sorted(MODEL_FILES)


def test_the_card_says_that_tensors_are_cut_and_the_hub_is_asked_for_every_file(model: Path) -> None:
    assert "whose names end in `.rows-BEGIN-END`" in (model / "README.md").read_text()
    for path in model.iterdir():
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in MODEL_PATTERNS)


def test_overwriting_replaces_shards_by_one_file_and_the_other_way(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    for most, is_cut in ((SMALL_SHARD, True), (1 << 20, False), (SMALL_SHARD, True)):
        export(str(run), dataset, str(tmp_path / "m"), overwrite=True, max_shard_bytes=most)
        assert bool(shards_of(tmp_path / "m")) == is_cut
        assert (tmp_path / "m" / "model.safetensors").exists() != is_cut
    (tmp_path / "m" / "model-notes.safetensors").touch()
    with pytest.raises(ExportError, match=r"holds model-notes\.safetensors too"):
        export(str(run), dataset, str(tmp_path / "m"), overwrite=True)


def test_a_damaged_or_missing_shard_is_named(model: Path, dataset: Dataset, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = shards_of(tmp_path)[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    for read in (load_export, verify_export):
        with pytest.raises(CheckpointError, match=rf"{victim.name}: SHA-256 is .*, its manifest says"):
            read(str(tmp_path))
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"{victim.name}: is missing"):
        load_export(str(tmp_path))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.replace("3-6", "4-7"), rf"index\.json: row 3 of {ROWS} is in no shard, or in two"),
        (lambda name: name.replace("rows-3-6", "x"), rf"index\.json: row 3 of {ROWS} is in no shard"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(model: Path, tmp_path: Path, rename: Any, message: str) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in shards_of(tmp_path):
        save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {rename(name): shard for name, shard in index["weight_map"].items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((tmp_path / "config.json").read_text())
    config["files"] = {name: describe(tmp_path / name) for name in config["files"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_export(str(tmp_path))


def test_an_index_of_other_files_is_refused(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for text in ("no json", "[]", '{"weight_map": {"a": "../../secret"}}', '{"weight_map": {"a": {}}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        config = json.loads((tmp_path / "config.json").read_text())
        config["files"]["model.safetensors.index.json"] = describe(tmp_path / "model.safetensors.index.json")
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"index\.json: not an index that names shards of a model"):
            load_export(str(tmp_path))


@pytest.mark.parametrize("size", ["0", "-1", "inf", "much"])
def test_impossible_shard_sizes_are_refused(capsys: pytest.CaptureFixture[str], size: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["export", "m", "--dataset", "d", "--output", "o", f"--max-shard-mb={size}"])
    assert f"'{size}': expected a number above 0" in capsys.readouterr().err


def test_the_command_cuts_shards_of_the_size_asked_for(
    run: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["export", str(run), "--dataset", dataset.path, "--output"]
    assert cli.main([*common, str(tmp_path / "m"), "--max-shard-mb", "0.001"]) == 0
    assert all(path.stat().st_size < 2500 for path in shards_of(tmp_path / "m"))
    assert_same_weights(load_export(str(tmp_path / "m")), small_model(dataset))
    assert cli.main([*common, str(tmp_path / "v"), "--format", "vectors", "--max-shard-mb", "1"]) == 2
    assert "--max-shard-mb is an option of --format folder, not of vectors" in capsys.readouterr().err


# A sharded table's rows


ITEMS, FEATURES = 3000, 16


@pytest.fixture
def table(tmp_path: Path) -> tuple[TableRows, torch.Tensor]:
    """Files of four ranks, rows in the order of their allotment and some never allotted; and the whole [N + 2, E]."""
    spec = TableSpec(rows=ITEMS + 1, features=FEATURES, seed=3, optimizer="rowwise_adagrad", dtype="bf16")
    whole = torch.zeros(ITEMS + 2, FEATURES)
    torch.manual_seed(0)
    for rank in range(4):
        part = ShardedTable(spec, rank=rank, world_size=4)
        ids = torch.randperm(ITEMS + 1)[: ITEMS // 2]
        part.put(ids, {"rows": torch.randn(len(ids), FEATURES)})
        save_file(part.tensors(), tmp_path / f"items-{rank}.safetensors")
        for own, rows in part.whole():
            whole[own.masked_fill(own == 0, ITEMS + 1)] = rows
    return TableRows(spec, [str(path) for path in sorted(tmp_path.glob("items-*"))], is_of_items=True), whole


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes, but for files that are mapped into memory."""

    bytes = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not call.is_view and call is not torch.ops.aten.set_.source_Storage:
            self.bytes = max(self.bytes, result.nbytes)
        return result


@pytest.fixture
def few_rows_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "ROWS_READ", 64)
    yield


@pytest.mark.parametrize("most", [1 << 14, (1 << 14) - 1, 10 * FEATURES * 4, 1 << 30])
def test_a_sharded_tables_rows_are_written_a_shard_at_a_time(
    table: tuple[TableRows, torch.Tensor], tmp_path: Path, most: int, few_rows_read: None
) -> None:
    stored, whole = table
    (tmp_path / "m").mkdir()
    with Largest() as largest:
        names = write_weights({"a": InMemory(torch.ones(3)), ROWS: stored}, tmp_path / "m", most)
    assert largest.bytes <= max(most, 64 * FEATURES * 4)
    if len(names) == 1:
        found = in_file(str(tmp_path / "m" / names[0]))
    else:
        found = in_shards(str(tmp_path / "m" / names[-1]), lambda name: str(tmp_path / "m" / name))
    assert found.keys() == {"a", ROWS} and found[ROWS].shape == whole.shape
    assert torch.equal(found[ROWS].rows(0, ITEMS + 2), whole)
    assert torch.equal(found[ROWS].rows(1000, 1777), whole[1000:1777])


def test_single_rows_are_read_wherever_they_lie(table: tuple[TableRows, torch.Tensor], tmp_path: Path) -> None:
    stored, whole = table
    names = write_weights({ROWS: stored}, tmp_path, 1 << 14)
    cut = in_shards(str(tmp_path / names[-1]), lambda name: str(tmp_path / name))[ROWS]
    save_file({ROWS: whole}, tmp_path / "one.safetensors")
    for each in (stored, cut, in_file(str(tmp_path / "one.safetensors"))[ROWS], InMemory(whole)):
        for ids in ([0, 5, 2999], [ITEMS + 1], [], [1, 2, 3]):
            assert torch.equal(each.gather(torch.tensor(ids, dtype=torch.int64)), whole[ids])
        assert torch.equal(StoredRows(each).fetch(torch.tensor([7, 0, 3])), whole[[7, ITEMS + 1, 3]])


def test_rows_of_new_items_and_attributes_are_those_of_a_new_table_and_the_mask_tokens_stays_last(
    table: tuple[TableRows, torch.Tensor], tmp_path: Path
) -> None:
    stored, whole = table
    config = Config(seed=5, model=ModelConfig(hidden_size=FEATURES))
    attributes = torch.ones(4, FEATURES)
    grown = with_growth(
        {ROWS: stored, "attribute_embedding.weight": InMemory(attributes), "a": InMemory(torch.ones(3))},
        Growth(items=50, attributes=2),
        config,
    )
    names = write_weights(grown, tmp_path, 1 << 14)
    found = in_shards(str(tmp_path / names[-1]), lambda name: str(tmp_path / name))
    rows = found[ROWS].rows(0, ITEMS + 52)
    assert torch.equal(rows[: ITEMS + 1], whole[:-1]) and torch.equal(rows[-1], whole[-1])
    spec = TableSpec(rows=ITEMS + 51, features=FEATURES, seed=5, initial_std=config.model.initializer_range)
    ids = torch.arange(ITEMS + 1, ITEMS + 51)
    assert torch.equal(rows[ids], ShardedTable(spec).peek(ids)) and rows[ids].std() > 0.01
    some = torch.tensor([3, ITEMS, ITEMS + 1, ITEMS + 51])
    assert torch.equal(grown[ROWS].gather(some), rows[some])
    made = found["attribute_embedding.weight"].rows(0, 6)
    assert torch.equal(made[:4], attributes) and made[4:].abs().max() < 0.2 and made[4:].all()


def test_a_model_written_from_memory_is_cut_too(dataset: Dataset, tmp_path: Path) -> None:
    write_model(
        small_model(dataset), str(tmp_path / "m"), {"stage": "finetune"}, Config(model=small_model(dataset).config),
        dataset, max_shard_bytes=SMALL_SHARD,
    )  # fmt: skip
    assert len(shards_of(tmp_path / "m")) > 3
    assert_same_weights(load_export(str(tmp_path / "m")), small_model(dataset))


_EXPORTING = """
import resource, sys
from pathlib import Path
import torch
from s3rec_dist.tables import TableSpec
from s3rec_dist.training.weights import TableRows, write_weights

*files, folder, most = sys.argv[1:]
stored = TableRows(TableSpec(rows=1_000_000, features=32), files, is_of_items=True)
stored.rows(0, 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
names = write_weights({"item_embedding.weight": stored}, Path(folder), int(most))
print(len(names), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_memory_is_that_of_a_shard_not_of_the_table(tmp_path: Path) -> None:
    files = []
    for rank in range(2):  # 128 MB in all
        ids = torch.arange(rank, 1_000_000, 2)
        path = tmp_path / f"items-{rank}.safetensors"
        save_file({"ids": ids[torch.randperm(len(ids))], "rows": torch.ones(len(ids), 32)}, path)
        files.append(str(path))
    (tmp_path / "m").mkdir()
    command = [sys.executable, "-c", _EXPORTING, *files, str(tmp_path / "m"), str(16 << 20)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shards, grown = map(int, output.split())
    assert shards == 8 + 1 and grown < 64 << 20
