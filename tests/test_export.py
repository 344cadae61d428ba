"""Model folders are whole and load alike everywhere; the authors' checkpoints give the authors' outputs."""

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

import numpy as np
import pytest
import torch
import yaml
from processes import start_process, wait_for
from safetensors.torch import load_file, save_file

from s3rec_dist import __main__ as cli
from s3rec_dist import export as module
from s3rec_dist.config import Config, ModelConfig, PretrainConfig, to_dict
from s3rec_dist.data.dataset import Dataset, DatasetError
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.data.reconstruct import FinetuneBatch, PretrainBatch, pretrain_batch
from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.export import ExportError, export, import_reference, load_export, load_model, model_card
from s3rec_dist.model import S3Rec
from s3rec_dist.recommend import top_k
from s3rec_dist.training.checkpoint import CheckpointError, catalogue_of, describe, load_weights

FILES = {"README.md", "attributes.parquet", "config.json", "items.parquet", "model.safetensors"}
SMALL = ModelConfig(hidden_size=8, layers=3, heads=4, inner_size=12, max_length=6)


def prepared(folder: Path, sequences: str, attributes: dict[str, list[int]], **options: Any) -> Dataset:
    folder.mkdir(parents=True)
    (folder / "toy.txt").write_text(sequences)
    (folder / "toy_item2attributes.json").write_text(json.dumps(attributes))
    output = str(folder / "dataset")
    prepare(PrepareSettings(source="s3rec", input=str(folder / "toy.txt"), output=output, **options))
    return Dataset.open(output)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Items 1..6, numbered as they are, attributes 1..4."""
    folder = tmp_path_factory.mktemp("toy") / "a"
    return prepared(folder, "a 1 2 3 4\nb 4 5 6\nc 2 6 1 3 5\n", {"1": [1, 2], "2": [2], "4": [3, 4], "6": [1]})


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """As many items and attributes, numbered otherwise."""
    folder = tmp_path_factory.mktemp("toy") / "b"
    sequences = "a u v w x\nb x y z\nc v z u w y\n"
    return prepared(folder, sequences, {"u": [1, 2], "v": [2], "w": [3], "z": [4]})


def small_model(dataset: Dataset) -> S3Rec:
    torch.manual_seed(0)
    model = S3Rec(SMALL, dataset.n_items, dataset.n_attributes, dataset.item_attributes())
    for parameter in model.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture
def run(dataset: Dataset, tmp_path: Path) -> Path:
    """A run's folder with one checkpoint."""
    config = dataclasses.replace(
        Config(),
        model=SMALL,
        output=str(tmp_path / "run"),
        data=dataclasses.replace(Config().data, path=dataset.path),
        pretrain=PretrainConfig(pairwise="bpr"),
        finetune=dataclasses.replace(Config().finetune, pretrained=str(tmp_path / "earlier")),
        evaluation=dataclasses.replace(Config().evaluation, protocol="sampled", negatives_file=str(tmp_path / "n.txt")),
    )
    tag = tmp_path / "run" / "finetune" / "checkpoints" / "step-00000007"
    tag.mkdir(parents=True)
    save_file(small_model(dataset).state_dict(), tag / "model.safetensors")
    state = {
        "stage": "finetune",
        "epoch": 3.5,
        "step": 7,
        "metrics": {"HR@10": 0.25, "MRR": 0.125},
        "config": to_dict(config),
        "dataset_fingerprint": dataset.fingerprint,
        "catalogue": catalogue_of(dataset),
        "n_items": dataset.n_items,
        "n_attributes": dataset.n_attributes,
    }
    (tag / "state.json").write_text(json.dumps(state))
    files = {name: describe(tag / name) for name in ("model.safetensors", "state.json")}
    (tag / "manifest.json").write_text(json.dumps({"format": "s3rec_dist checkpoint", "version": 1, "files": files}))
    return tmp_path / "run" / "finetune"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_weights(a: S3Rec, b: S3Rec) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


# Model folders


def test_an_exported_folder_holds_weights_settings_catalogue_and_card(
    run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    export(str(run), dataset, str(tmp_path / "models" / "m"))
    folder = tmp_path / "models" / "m"
    assert {path.name for path in folder.iterdir()} == FILES
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
@pytest.mark.parametrize("step", ["save_file", "describe", "_copy", "model_card", "sync_file", "rename"])
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
        assert all({path.name for path in folder.iterdir()} == FILES for folder in disk.iterdir())


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


# The reference's checkpoints


def reference_state(model: S3Rec) -> dict[str, torch.Tensor]:
    """The model as the reference names and cuts its tensors."""
    state = model.state_dict()
    return {
        part: piece.clone()
        for name, parts in module._reference_names(model.config.layers).items()
        for part, piece in zip(parts, state[name].chunk(len(parts)), strict=True)
    }


@pytest.fixture
def reference(dataset: Dataset, tmp_path: Path) -> Path:
    path = tmp_path / "reference.pt"
    torch.save(reference_state(small_model(dataset)), path)
    return path


def test_import_reads_every_size_but_the_heads_from_the_tensors(dataset: Dataset, reference: Path) -> None:
    model = import_reference(str(reference), heads=4, dataset=dataset)
    assert model.config == SMALL and (model.n_items, model.n_attributes) == (6, 4)
    assert_same_weights(model, small_model(dataset))
    assert import_reference(str(reference)).config == dataclasses.replace(SMALL, heads=2)
    with pytest.raises(ValueError, match=r"model\.heads=3 does not divide model\.hidden_size=8"):
        import_reference(str(reference), heads=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_import_turns_other_floats_into_fp32(dataset: Dataset, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in reference_state(small_model(dataset)).items()}
    torch.save(state, tmp_path / "half.pt")
    model = import_reference(str(tmp_path / "half.pt"), heads=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.mip_head.weight, state["mip_norm.weight"].float())


def test_import_without_a_dataset_gives_a_folder_without_catalogue_that_loads_and_fine_tunes(
    dataset: Dataset, reference: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "m")
    arguments = ["--format", "reference", "--checkpoint", str(reference), "--heads", "4", "--output", output]
    assert cli.main(["import", *arguments]) == 0
    assert {path.name for path in Path(output).iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert_same_weights(S3Rec.from_pretrained(output), small_model(dataset))
    assert_same_weights(load_model(output, dataset), small_model(dataset))
    assert module.open_catalogue(output) is None and "catalogue" not in load_weights(output)[1]
    export(output, dataset, str(tmp_path / "whole"))  # which adds the catalogue
    assert {path.name for path in (tmp_path / "whole").iterdir()} == FILES


def test_import_refuses_a_dataset_of_other_sizes_or_numbers(
    dataset: Dataset, other: Dataset, reference: Path, tmp_path: Path
) -> None:
    larger = prepared(tmp_path / "larger", "a 1 2 3 4\nb 4 5 6 7\n", {"1": [1, 2]})
    with pytest.raises(ExportError, match=r"knows 6 items and 4 attributes, .* has 7 and 2; prepare the dataset"):
        import_reference(str(reference), 4, larger)
    with pytest.raises(ExportError, match=r"items\.parquet: id 1 stands for '[u-z]', but the reference trains on"):
        import_reference(str(reference), 4, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("item_embeddings.weight"), r"tensor item_embeddings\.weight is missing"),
        (lambda s: s.pop("sp_norm.bias"), r"has no tensor sp_norm\.bias; expected a checkpoint of the S3-Rec authors"),
        (lambda s: s.pop("item_encoder.layer.1.attention.key.bias"), r"has no tensor item_encoder\.layer\.1\.att"),
        (lambda s: s.update({"gru.weight": torch.zeros(2)}), r"has a tensor gru\.weight, which an S3-Rec model"),
        (lambda s: s.update({"LayerNorm.bias": torch.zeros(3)}), r"LayerNorm\.bias has shape \[3\], expected \[8\]"),
        (
            lambda s: s.update({"item_encoder.layer.2.attention.value.weight": torch.zeros(8, 7)}),
            r"layer\.2\.attention\.value\.weight has shape \[8, 7\], expected \[8, 8\]",
        ),
        (
            lambda s: s.update({"position_embeddings.weight": torch.zeros(6)}),
            r"position_embeddings\.weight is of",
        ),
        (lambda s: s.update({"LayerNorm.bias": torch.zeros(8).int()}), r"'LayerNorm\.bias' holds a torch\.IntTensor"),
        (lambda s: s.update({"epoch": 3}), "'epoch' holds a int, not a dense tensor of floats"),
    ],
)
def test_import_accounts_for_every_tensor_by_name(
    dataset: Dataset, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    state = reference_state(small_model(dataset))
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(ExportError, match=message):
        import_reference(str(tmp_path / "changed.pt"), heads=4)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_import_runs_nothing_that_a_pickle_asks_for(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**reference_state(small_model(dataset)), "trap": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    arguments = ["--checkpoint", str(tmp_path / "trap.pt"), "--output", str(tmp_path / "m")]
    assert cli.main(["import", *arguments]) == 2
    message = capsys.readouterr().err
    assert "trap.pt: holds more than tensors" in message and "save the model's state_dict() alone" in message
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "m").exists()


def test_import_refuses_what_is_no_state_dict(dataset: Dataset, tmp_path: Path, reference: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ExportError, match=r"list\.pt: holds a list, not a state dict"):
        import_reference(str(tmp_path / "list.pt"))
    torch.save(small_model(dataset), tmp_path / "model.pt")
    with pytest.raises(ExportError, match="holds more than tensors"):
        import_reference(str(tmp_path / "model.pt"))
    for name, data in (("text.pt", b"hello\n"), ("empty.pt", b""), ("cut.pt", reference.read_bytes()[:3000])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ExportError, match=name):
            import_reference(str(tmp_path / name))
    assert cli.main(["import", "--checkpoint", str(tmp_path / "none.pt"), "--output", str(tmp_path / "m")]) == 2


# Parity with the authors' model, on their data and their weights after 150 epochs. Recorded and found outputs are
# fp32; they may differ by 1e-4 of the largest recorded value, and losses by 1e-4 of themselves.

TOLERANCE = 1e-4


def assert_close(found: torch.Tensor, recorded: np.ndarray) -> None:
    expected = torch.from_numpy(np.asarray(recorded))
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"relative error {error:.1e}"


@dataclasses.dataclass(frozen=True)
class Parity:
    model: S3Rec
    golden: dict[str, np.ndarray]

    def ids(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.golden[name]).long()


@pytest.fixture(scope="module", params=["Beauty", "LastFM"])
def imported(
    request: pytest.FixtureRequest, published_data: Path, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Parity:
    """The authors' checkpoint after import with the prepared dataset, as from_pretrained gives it."""
    folder = tmp_path_factory.mktemp(request.param)
    dataset, output = str(folder / "dataset"), str(folder / "model")
    prepare(PrepareSettings(source="s3rec", input=str(published_data / f"{request.param}.txt"), output=dataset))
    checkpoint = str(published_data / f"{request.param}-epochs-150.pt")
    assert cli.main(["import", "--checkpoint", checkpoint, "--dataset", dataset, "--output", output]) == 0
    with np.load(golden / f"{request.param}.npz") as file:
        return Parity(S3Rec.from_pretrained(output).eval(), dict(file))


@pytest.fixture(params=["reference", "sdpa", "triton"])
def parity(request: pytest.FixtureRequest, imported: Parity, monkeypatch: pytest.MonkeyPatch) -> Parity:
    """The same with each backend; Triton's kernels are interpreted here, in fewer steps of larger tiles."""
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr("s3rec_dist.kernels.attribute_loss.triton.TILE", {4: 64})
    old = imported.model
    config = dataclasses.replace(old.config, attention=request.param)
    model = S3Rec(config, old.n_items, old.n_attributes)
    model.load_state_dict(old.state_dict())
    model.attribute_offsets, model.attribute_values = old.attribute_offsets, old.attribute_values
    return Parity(model.eval(), imported.golden)


SEQUENCES = ("masked_item_sequence", "masked_segment_sequence", "pos_segment", "neg_segment")
TASKS = ("aap", "mip", "map", "sp")


def packed(*padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 items and offsets of padded [B, L] ids, table after table."""
    rows = torch.cat(padded)
    lengths = (rows != 0).sum(1)
    return rows[rows != 0].int(), torch.cat((torch.zeros(1), lengths.cumsum(0))).int()


def test_sizes_are_the_references(imported: Parity) -> None:
    model, golden = imported.model, imported.golden
    assert (model.n_items + 2, model.mask_id, model.n_attributes + 1) == tuple(
        int(golden[name]) for name in ("item_size", "mask_id", "attribute_size")
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("output", "sequences", "bidirectional"),
    [("bidirectional_output", "masked_item_sequence", True), ("causal_output", "pos_items", False)],
)
def test_padded_hidden_states_are_the_references_within_1e_4(
    parity: Parity, output: str, sequences: str, bidirectional: bool
) -> None:
    items = parity.ids(sequences)
    hidden = parity.model.forward(items, bidirectional=bidirectional)
    inside = items != 0
    assert_close(hidden[inside], parity.golden[output][inside.numpy()])


@torch.no_grad()
@pytest.mark.parametrize("parity", ["reference", "sdpa"], indirect=True)  # the packed test below has Triton's losses
def test_padded_pretraining_losses_are_the_references_within_1e_4(parity: Parity) -> None:
    model = parity.model
    features = torch.zeros(*parity.golden["pos_items"].shape, model.n_attributes + 1, dtype=torch.long)
    features[tuple(torch.from_numpy(parity.golden["attributes_nonzero_b_l_a"]).long().T)] = 1
    masked, masked_segment, pos_segment, neg_segment = map(parity.ids, SEQUENCES)
    losses = model.padded_pretrain_losses(
        features, masked, parity.ids("pos_items"), parity.ids("neg_items"), masked_segment, pos_segment, neg_segment
    )
    for task in TASKS:
        assert_close(losses.terms[task], parity.golden[f"loss_{task}"])


@torch.no_grad()
@pytest.mark.timeout(600)  # interpreted attention and losses: half a minute, on a machine that is busy many times that
def test_packed_pretraining_losses_are_the_references_within_1e_4(parity: Parity) -> None:
    """With the attributes of the exported catalogue, where the recorded ones come from the authors' file."""
    items, offsets = packed(*map(parity.ids, SEQUENCES))
    original, lengths = packed(parity.ids("pos_items"))
    is_masked = items[: len(original)] == parity.model.mask_id
    batch = PretrainBatch(
        items=items,
        offsets=offsets,
        max_length=int(lengths.diff().max()),
        original=original,
        masked=is_masked.nonzero().squeeze(1),
        unmasked=is_masked.logical_not().nonzero().squeeze(1),
        negatives=packed(parity.ids("neg_items"))[0][is_masked],
        sample_keys=torch.zeros(len(lengths) - 1, dtype=torch.int64),
    )
    losses = parity.model.pretrain_losses(batch)
    for task in TASKS:
        assert_close(losses.terms[task], parity.golden[f"loss_{task}"])


@torch.no_grad()
def test_the_packed_fine_tuning_loss_is_the_references_within_1e_4(parity: Parity) -> None:
    items, offsets = packed(parity.ids("finetune_input"))
    batch = FinetuneBatch(
        items=items,
        offsets=offsets,
        max_length=int(offsets.diff().max()),
        targets=packed(parity.ids("finetune_pos"))[0],
        negatives=packed(parity.ids("finetune_neg"))[0],
        sample_keys=torch.zeros(len(offsets) - 1, dtype=torch.int64),
    )
    losses = parity.model.finetune_losses(batch)
    assert_close(losses.total / losses.counts["bce"], parity.golden["loss_finetune_bce"])


@torch.no_grad()
def test_packed_scores_are_the_references_within_1e_4_and_the_best_20_items_the_same(parity: Parity) -> None:
    items, offsets = packed(parity.ids("finetune_input"))
    users = parity.model.encode_last(items, offsets, int(offsets.diff().max()))
    table = parity.model.item_embedding.weight
    assert_close(users[:16] @ table.T, parity.golden["full_scores_first16"])
    nothing = torch.zeros(0, dtype=torch.int64)
    best, _ = top_k(users, table[1:-1], 20, (nothing, nothing), item_chunk=1000)
    assert torch.equal(best, parity.ids("full_top20"))


@torch.no_grad()
def test_full_sort_predict_takes_right_padded_histories_to_the_references_scores_within_1e_4(parity: Parity) -> None:
    rows = [row[row != 0] for row in parity.ids("finetune_input")[:16]]
    lengths = torch.tensor([len(row) for row in rows])
    right_padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    scores = parity.model.full_sort_predict({"item_id_list": right_padded, "item_length": lengths})
    assert_close(scores, parity.golden["full_scores_first16"][:, :-1])  # the last column is the mask token's


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
