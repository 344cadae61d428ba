"""Model folders are whole and load alike everywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import start_process, wait_for
from safetensors.torch import load_file
from toy_models import (
    MODEL_FOLDER,
    SMALL,
    assert_same_weights,
    contents,
    six_items,
    six_other_items,
    small_model,
    write_run,
)

from s3rec_dist import __main__ as cli
from s3rec_dist import export as module
from s3rec_dist.config import Config, PretrainConfig, to_dict
from s3rec_dist.data.dataset import Dataset, DatasetError
from s3rec_dist.data.reconstruct import pretrain_batch
from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.export import ExportError, export, load_export, load_model, model_card
from s3rec_dist.model import S3Rec
from s3rec_dist.training.checkpoint import CheckpointError, catalogue_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return six_items(tmp_path_factory.mktemp("toy") / "a")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return six_other_items(tmp_path_factory.mktemp("toy") / "b")


@pytest.fixture
def run(dataset: Dataset, tmp_path: Path) -> Path:
    return write_run(dataset, tmp_path)


# Model folders


def test_an_exported_folder_holds_weights_settings_catalogue_and_card(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    export(str(run), dataset, str(tmp_path / "models" / "m"))
    folder = tmp_path / "models" / "m"
    assert {path.name for path in folder.iterdir()} == MODEL_FOLDER
    for name in ("items.parquet", "attributes.parquet"):
        assert (folder / name).read_bytes() == Path(dataset.path, name).read_bytes()
    metadata = json.loads((folder / "config.json").read_text())
    assert (metadata["stage"], metadata["step"], metadata["metrics"]["MRR"]) == ("finetune", 7, 0.125)
    assert (metadata["n_items"], metadata["n_attributes"]) == (6, 4)
    assert metadata["dataset"] == {"name": "toy", "users": 3, "interactions": 12}
    assert metadata["dataset_fingerprint"] == dataset.fingerprint and metadata["catalogue"] == catalogue_of(dataset)
    assert metadata["config"]["model"] == to_dict(dataclasses.replace(Config(), model=SMALL))["model"]
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert list((tmp_path / "models").iterdir()) == [folder]


def test_an_exported_folder_names_no_place_on_the_machine_that_trained(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    export(str(run), dataset, str(tmp_path / "m"))
    for name in ("config.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "m" / name).read_text()


def test_every_file_of_an_exported_folder_is_readable_by_whoever_may_read_new_files(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    export(str(run), dataset, str(tmp_path / "m"))
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in (tmp_path / "m").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_from_pretrained_restores_weights_settings_and_item_attributes(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    export(str(run), dataset, str(tmp_path / "m"))
    original, loaded = small_model(dataset), S3Rec.from_pretrained(str(tmp_path / "m"))
    assert loaded.config == SMALL and loaded.pretrain_config == PretrainConfig(pairwise="bpr")
    assert_same_weights(loaded, original)
    sequences = dataset.read_row_group(0)
    items = torch.from_numpy(sequences.values.copy())
    packed = PackedSequences(items, torch.from_numpy(sequences.offsets).int(), torch.arange(3), 5)
    batch = pretrain_batch(packed, n_items=6, segment_pool=items, mask_ratio=0.2, key=1)
    expected, found = original.pretrain_losses(batch), loaded.pretrain_losses(batch)
    for task in ("aap", "map"):
        assert torch.equal(expected.terms[task], found.terms[task])


def test_a_run_a_checkpoint_and_an_exported_folder_load_alike(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    export(str(run), dataset, str(tmp_path / "m"))
    export(str(tmp_path / "m"), dataset, str(tmp_path / "again"))
    assert contents(tmp_path / "m").keys() == contents(tmp_path / "again").keys()
    for path in (run, run / "checkpoints" / "step-00000007", tmp_path / "m", tmp_path / "again"):
        model = load_model(str(path), dataset)
        assert_same_weights(model, small_model(dataset))
        assert torch.equal(model.attribute_values, small_model(dataset).attribute_values)


def test_a_model_trained_with_another_attention_backend_loads_here(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    export(str(run), dataset, str(tmp_path / "m"))
    rewrite(tmp_path / "m", lambda tree: tree["config"]["model"].update(attention="sdpa"))
    assert load_export(str(tmp_path / "m")).config.attention == "auto"


def test_a_model_of_another_catalogue_is_refused_though_the_sizes_agree(
    run: Path, dataset: Dataset, other: Dataset, tmp_path: Path
) -> None:
    assert (other.n_items, other.n_attributes) == (dataset.n_items, dataset.n_attributes)
    with pytest.raises(CheckpointError, match=r"trained on a dataset with other items than .*b/dataset"):
        load_model(str(run), other)
    with pytest.raises(CheckpointError, match="other items"):
        export(str(run), other, str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_a_folder_that_is_no_model_folder_is_refused_with_the_remedy(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a model folder; make one from a run or checkpoint with 's3rec export'"):
        S3Rec.from_pretrained(str(run))
    with pytest.raises(CheckpointError, match="no such folder"):
        S3Rec.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(ExportError, match="not a model folder"):
        module.open_catalogue(str(tmp_path / "nothing"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads((folder / "config.json").read_text())
    change(tree)
    (folder / "config.json").write_text(json.dumps(tree))


def test_another_version_unknown_settings_and_lost_settings_are_errors(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    export(str(run), dataset, str(tmp_path / "m"))
    rewrite(tmp_path / "m", lambda tree: tree["config"]["model"].update(depth=3))
    with pytest.raises(ValueError, match=r"m: unknown setting model\.depth"):
        S3Rec.from_pretrained(str(tmp_path / "m"))
    rewrite(tmp_path / "m", lambda tree: tree.pop("config"))
    with pytest.raises(ExportError, match="has no settings"):
        S3Rec.from_pretrained(str(tmp_path / "m"))
    rewrite(tmp_path / "m", lambda tree: tree.update(version=2))
    with pytest.raises(ExportError, match="version 2, this program reads version 1"):
        S3Rec.from_pretrained(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("name", "error"),
    [("model.safetensors", CheckpointError), ("items.parquet", DatasetError), ("attributes.parquet", DatasetError)],
)
def test_one_flipped_bit_is_found(run: Path, dataset: Dataset, tmp_path: Path, name: str, error: type) -> None:
    export(str(run), dataset, str(tmp_path / "m"))
    path = tmp_path / "m" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(error, match=f"{name}: (its )?SHA-256 is"):
        S3Rec.from_pretrained(str(tmp_path / "m"))


def test_a_catalogue_that_differs_from_the_datasets_manifest_is_not_exported(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(dataset.path, tmp_path / "copy")
    with open(tmp_path / "copy" / "attributes.parquet", "ab") as file:
        file.write(b"x")
    with pytest.raises(ExportError, match=r"attributes\.parquet: SHA-256 is .*restore the file"):
        export(str(run), Dataset.open(str(tmp_path / "copy")), str(tmp_path / "m"))
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".*"))


# Whole or not at all


def test_an_existing_output_is_left_as_it_is_unless_overwrite_is_given(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    output = tmp_path / "m"
    output.mkdir()
    export(str(run), dataset, str(output))  # an empty folder may be the output
    (output / "README.md").write_text("mine")
    with pytest.raises(ExportError, match="exists already; choose another output, or pass --overwrite"):
        export(str(run), dataset, str(output))
    assert (output / "README.md").read_text() == "mine"
    export(str(run), dataset, str(output), overwrite=True)
    assert (output / "README.md").read_text() != "mine" and not list(tmp_path.glob(".*"))


def test_overwrite_replaces_model_folders_only(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    for name in ("thesis", "file"):
        with pytest.raises(ExportError, match="not a model folder, so --overwrite leaves it alone"):
            export(str(run), dataset, str(tmp_path / name), overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"
    export(str(run), dataset, str(tmp_path / "m"))
    (tmp_path / "m" / ".git").mkdir()
    with pytest.raises(ExportError, match=r"holds \.git too, which --overwrite would remove with the model"):
        export(str(run), dataset, str(tmp_path / "m"), overwrite=True)
    assert (tmp_path / "m" / ".git").is_dir()


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("step", ["write_weights", "describe", "_copy", "model_card", "sync_file", "rename"])
def test_a_write_that_fails_anywhere_changes_nothing(
    run: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, earlier: bool
) -> None:
    output = tmp_path / "models" / "m"
    output.parent.mkdir()
    if earlier:
        export(str(run), dataset, str(output))
    before = contents(output.parent)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "rename":
            rename = os.rename
            patch.setattr(os, "rename", lambda a, b: full() if Path(a).name == "model" else rename(a, b))
        else:
            patch.setattr(module, step, full)
        with pytest.raises(ExportError, match=r"m: the model could not be written .*No space left.*Nothing has been"):
            export(str(run), dataset, str(output), overwrite=True)
    assert contents(output.parent) == before
    assert list(output.parent.iterdir()) == ([output] if earlier else [])


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


def test_a_disk_that_really_is_full_leaves_what_was_there(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        export(str(run), dataset, str(disk / "m"))
        before = contents(disk)
        with pytest.raises(ExportError, match="could not be written"):
            for i in range(100):
                export(str(run), dataset, str(disk / f"m{i}"))
        after = contents(disk)
        assert before.items() <= after.items() and not list(disk.glob(".*"))
        assert all({path.name for path in folder.iterdir()} == MODEL_FOLDER for folder in disk.iterdir())


# The model card


def test_the_card_has_front_matter_data_settings_and_measured_metrics(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    export(str(run), dataset, str(tmp_path / "m"))
    _, front, text = (tmp_path / "m" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "s3rec_dist" and "s3-rec" in yaml.safe_load(front)["tags"]
    for part in ("3 users, 6 items, 4 attributes, 12 interactions", "| hidden_size | 8 |", "| steps trained | 7 |"):
        assert part in text
    assert "| MRR | 0.1250 |" in text and "ranked among the negatives of n.txt:" in text
    assert "trained to predict the next item, after pretraining" in text


@pytest.mark.parametrize(("protocol", "words"), [("full", "all items not yet seen"), ("sampled", "99 sampled items")])
def test_the_card_says_what_was_ranked_against_what(
    dataset: Dataset, tmp_path: Path, protocol: Any, words: str
) -> None:
    config = dataclasses.replace(
        Config(),
        evaluation=dataclasses.replace(Config().evaluation, protocol=protocol),
        finetune=dataclasses.replace(Config().finetune, pretrained="none"),
    )
    module.write_model(
        small_model(dataset), str(tmp_path / "m"), {"stage": "finetune", "metrics": {"MRR": 0.5}}, config, dataset
    )
    text = (tmp_path / "m" / "README.md").read_text()
    assert f"ranked among {words}:" in text and "trained to predict the next item, from scratch" in text


def test_a_model_without_metrics_has_no_validation_section(dataset: Dataset, tmp_path: Path) -> None:
    module.write_model(small_model(dataset), str(tmp_path / "m"), {"stage": "pretrain"}, Config(), dataset)
    assert "Validation" not in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize("with_dataset", [False, True])
def test_the_commands_and_the_code_of_the_card_are_accepted(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_dataset: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(Config(), model=SMALL)
    module.write_model(small_model(dataset), "m", {}, config, dataset if with_dataset else None)
    card = model_card(json.loads(Path("m", "config.json").read_text()), "m")
    commands = [shlex.split(line) for line in card.splitlines() if line.startswith("s3rec ")]
    assert [words[1] for words in commands] == (["recommend", "finetune"] if with_dataset else ["finetune"])
    for _, name, *arguments in commands:
        cli.parser_of(name)[0].parse_intermixed_args(arguments)
    exec(card.split("```python\n")[1].split("```")[0])


# Through the commands


@pytest.mark.slow
def test_pretrain_export_fine_tune_from_the_export_and_recommend(dataset: Dataset, tmp_path: Path) -> None:
    def s3rec(*arguments: str) -> str:
        command = [sys.executable, "-m", "s3rec_dist", *arguments]
        return wait_for([start_process(command, {"OMP_NUM_THREADS": "1"})], timeout=120)[0]

    settings = [f"data.path={dataset.path}", "pretrain.epochs=1", "finetune.epochs=1", "evaluation.protocol=full"]
    settings += ["model.hidden_size=8", "model.max_length=4", f"output={tmp_path / 'run'}"]
    s3rec("pretrain", *settings)
    s3rec("export", str(tmp_path / "run/pretrain"), "--dataset", dataset.path, "--output", str(tmp_path / "m"))
    s3rec("finetune", *settings, f"finetune.pretrained={tmp_path / 'm'}")
    s3rec("export", str(tmp_path / "run/finetune"), "--dataset", dataset.path, "--output", str(tmp_path / "f"))
    assert "| MRR |" in (tmp_path / "f" / "README.md").read_text()
    told = s3rec("recommend", str(tmp_path / "f"), "--dataset", dataset.path, "--output", str(tmp_path / "r.parquet"))
    assert "6 recommendations for 3 users among 6 items" in told
