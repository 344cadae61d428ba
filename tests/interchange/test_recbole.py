"""Models go to RecBole 1.2.1 and come from it, and score there as here."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from toy_models import assert_same_weights, six_items, small_model, write_run

from s3rec_dist import __main__ as cli
from s3rec_dist.config import ModelConfig
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.data.sources import SourceError, recbole_tokens
from s3rec_dist.export import ExportError, load_export
from s3rec_dist.interchange.recbole import import_recbole, read_tokens, recbole_names
from s3rec_dist.interchange.settings import DEFAULTS, convert
from s3rec_dist.model import S3Rec
from s3rec_dist.storage import Storage

RecBole = Callable[..., None]
PACKAGES = ("numpy==1.26.4", "scipy", "scikit-learn", "colorlog==4.7.2", "colorama==0.4.4", "tabulate", "texttable")
PACKAGES += ("tensorboard",)
ALONE = ("recbole==1.2.1", "thop==0.1.1.post2209072238")
"""Without what they depend on: all but ray, which only RecBole's tuning needs, is there."""
PATHS = f"""import sys; sys.modules["pyarrow"] = None
{Path(torch.__file__).parents[1]}
"""
"""This environment's torch and pandas, but not its pyarrow, which is for NumPy 2 and which scikit-learn looks for."""


@pytest.fixture(scope="session")
def environment() -> Path:
    """Site-packages with RecBole, of an environment of its own, which is made once inside this one: RecBole needs
    NumPy 1, but takes this environment's torch and pandas."""
    folder = Path(sys.prefix) / "recbole-1.2.1"
    python, marker = folder / "bin" / "python", folder / "installed"
    if not marker.exists() or marker.read_text() != "\n".join((*PACKAGES, *ALONE, PATHS)):
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--only-binary", ":all:"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)],
            [*install, *PACKAGES],
            [*install, "--no-deps", *ALONE],
        ):
            try:
                subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
            except subprocess.SubprocessError as error:
                told = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
                pytest.skip(f"no environment for RecBole 1.2.1 could be made: {told}")
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "zz_borrowed.pth").write_text(PATHS)
        marker.write_text("\n".join((*PACKAGES, *ALONE, PATHS)))

    (site,) = folder.glob("lib/python*/site-packages")
    return site


@pytest.fixture(scope="session")
def recbole(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> RecBole:
    """Runs recbole_worker.py there."""
    python = environment.parents[2] / "bin" / "python"
    here = tmp_path_factory.mktemp("recbole")  # where it leaves its logs

    def run(*arguments: object) -> None:
        worker = str(Path(__file__).with_name("recbole_worker.py"))
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"}
        command = [str(python), worker, *map(str, arguments)]
        done = subprocess.run(command, cwd=here, env=variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="module")
def few(ml100k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MovieLens-100K's first 40 users, as RecBole's data_path."""
    folder = tmp_path_factory.mktemp("recbole") / "data"
    (folder / "few").mkdir(parents=True)
    header, *rows = (ml100k / "ml-100k.inter").read_text().splitlines(keepends=True)
    (folder / "few/few.inter").write_text(header + "".join(row for row in rows if int(row.split("\t")[0]) <= 40))
    (folder / "few/few.item").write_text((ml100k / "ml-100k.item").read_text())
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Atomic files of six items, which a dataset numbers by count and RecBole by appearance: d first, then a."""
    folder = tmp_path_factory.mktemp("toy") / "toy"
    folder.mkdir()
    rows = ["u d 1", "u a 2", "u b 3", "v b 1", "v a 2", "v c 3", "w b 1", "w e 2", "w f 3", "w a 4"]
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    (folder / "toy.inter").write_text(header + "".join(row.replace(" ", "\t") + "\n" for row in rows))
    items = {"a": "x y", "b": "y", "c": "", "d": "z", "e": "x", "f": "y z"}
    lines = "".join(f"{item}\t{values}\n" for item, values in items.items())
    (folder / "toy.item").write_text("item_id:token\tclass:token_seq\n" + lines)
    return folder


@pytest.fixture(scope="module")
def dataset(toy: Path) -> Dataset:
    place = str(toy.parent / "dataset")
    prepare(PrepareSettings(source="recbole", input=str(toy), output=place, attribute_fields=("class",)))
    return Dataset.open(place)


def export_toy(dataset: Dataset, toy: Path, folder: Path, *more: str, **changes: Any) -> int:
    model = small_model(dataset, **{"position_alignment": "start", **changes})
    run = write_run(dataset, folder, model)
    arguments = ["--dataset", dataset.path, "--output", str(folder / "toy.pth"), "--tokens", str(toy), *more]
    return cli.main(["export", str(run), "--format", "recbole", *arguments])


def histories_of(dataset: Dataset, most: int) -> list[list[str]]:
    """Raw ids of each row's latest items, of different lengths."""
    raw = ["", *dataset.items_table().column("raw").to_pylist()]
    rows = dataset.read_row_group(0)
    return [
        [raw[item] for item in rows.values[start:end][-(1 + i % most) :]]
        for i, (start, end) in enumerate(zip(rows.offsets[:-1], rows.offsets[1:], strict=True))
    ]


def assert_scores_alike(model: S3Rec, dataset: Dataset, histories: list[list[str]], theirs: Path) -> None:
    """Scores within 1e-4, and the same best 20 items in the same order."""
    ids = {raw: i for i, raw in enumerate(dataset.items_table().column("raw").to_pylist(), 1)}
    rows = [torch.tensor([ids[item] for item in row]) for row in histories]
    batch = {"item_id_list": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}
    batch["item_length"] = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        scores = model.eval().full_sort_predict(batch)
    with np.load(theirs) as found:
        expected = torch.full_like(scores, float("nan"))
        shared = [i for i, item in enumerate(found["items"]) if item in ids]
        expected[:, [ids[found["items"][i]] for i in shared]] = torch.from_numpy(found["scores"][:, shared])
    assert len(shared) == dataset.n_items
    assert (scores[:, 1:] - expected[:, 1:]).abs().max() < 1e-4
    assert scores[:, 1:].std() > 0.01  # no difference is hidden by scores that are all alike
    assert torch.equal(scores[:, 1:].topk(20).indices, expected[:, 1:].topk(20).indices)


@pytest.mark.slow
def test_what_recbole_trained_scores_here_as_there(recbole: RecBole, few: Path, tmp_path: Path) -> None:
    recbole("train", few, tmp_path)
    settings = {"min_user_count": 5, "min_item_count": 2, "attribute_fields": ("class",)}
    place = str(tmp_path / "dataset")
    prepare(PrepareSettings(source="recbole", input=str(few / "few"), output=place, **settings))
    dataset = Dataset.open(place)
    histories = histories_of(dataset, 12)
    (tmp_path / "h.json").write_text(json.dumps(histories))
    for stage, tokens in (("finetune", "dataset.pth"), ("pretrain", "tokens.json")):
        arguments = ["--checkpoint", str(tmp_path / f"{stage}.pth"), "--tokens", str(tmp_path / tokens)]
        arguments += ["--dataset", place, "--output", str(tmp_path / stage), "--allow-pickle"]
        assert cli.main(["import", "--format", "recbole", *arguments]) == 0
    recbole("score", tmp_path / "finetune.pth", "few", few, tmp_path / "h.json", tmp_path / "scores.npz")
    model = load_export(str(tmp_path / "finetune"))
    assert (model.config.heads, model.config.position_alignment) == (4, "start")
    assert_scores_alike(model, dataset, histories, tmp_path / "scores.npz")
    assert load_export(str(tmp_path / "pretrain")).config.position_alignment == "end"
    card = (tmp_path / "finetune" / "README.md").read_text()
    assert "imported from a checkpoint of RecBole" in card


@pytest.mark.slow
def test_what_was_trained_here_scores_in_recbole_as_here(recbole: RecBole, ml100k: Path, tmp_path: Path) -> None:
    """All of MovieLens-100K, which RecBole numbers by its files alone."""
    place = str(tmp_path / "dataset")
    prepare(
        PrepareSettings(source="recbole", input=str(ml100k), output=place, attribute_fields=("class",)),
    )
    dataset = Dataset.open(place)
    config = ModelConfig(hidden_size=16, layers=3, heads=4, inner_size=24, max_length=10, position_alignment="start")
    torch.manual_seed(0)
    model = S3Rec(config, dataset.n_items, dataset.n_attributes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    run = write_run(dataset, tmp_path, model)
    output = str(tmp_path / "S3Rec.pth")
    arguments = ["--dataset", place, "--format", "recbole", "--tokens", str(ml100k), "--output", output]
    assert cli.main(["export", str(run), *arguments]) == 0
    histories = histories_of(dataset, 10)
    (tmp_path / "h.json").write_text(json.dumps(histories))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/ml-100k").symlink_to(ml100k)
    recbole("score", output, "ml-100k", tmp_path / "data", tmp_path / "h.json", tmp_path / "scores.npz")
    assert_scores_alike(model, dataset, histories, tmp_path / "scores.npz")


@pytest.mark.slow
def test_settings_that_a_file_leaves_out_have_recboles_own_defaults(environment: Path) -> None:
    own: dict[str, Any] = {}
    for name in ("overall", "dataset/sample", "model/S3Rec"):
        own |= yaml.safe_load((environment / f"recbole/properties/{name}.yaml").read_text())
    for key in DEFAULTS.keys() - {"dataset", "eval_args", "layer_norm_eps", "data_path"}:
        assert own[key] == DEFAULTS[key], key
    assert own["eval_args"]["mode"] == DEFAULTS["eval_args"]["mode"] and float(own["layer_norm_eps"]) == 1e-12
    assert own["data_path"] == DEFAULTS["data_path"]
    of_files, of_nothing = convert(own), convert({})
    assert of_files.settings == {**of_nothing.settings, "output": "saved", "tracking.project": "recbole"}


# Without the library


def test_items_and_attributes_are_numbered_by_appearance_in_inter_and_then_in_item(toy: Path, tmp_path: Path) -> None:
    tables = recbole_tokens(str(toy), "item_id", "class", Storage())
    assert tables == {"item_id": ["[PAD]", *"dabcef"], "class": ["[PAD]", *"xyz"]}
    (tmp_path / "more.inter").write_text((toy / "toy.inter").read_text() + "w\tunknown\t9\n")
    (tmp_path / "more.item").write_text((toy / "toy.item").read_text() + "g\tt\n")
    tables = recbole_tokens(str(tmp_path), "item_id", "class", Storage())
    assert tables == {"item_id": ["[PAD]", *"dabcefg"], "class": ["[PAD]", *"xyzt"]}
    (tmp_path / "more.item").unlink()
    with pytest.raises(SourceError, match=r"no \.item file"):
        recbole_tokens(str(tmp_path), "item_id", "class", Storage())


def test_an_exported_file_is_plain_and_has_recboles_names_and_rows(toy: Path, dataset: Dataset, tmp_path: Path) -> None:
    assert export_toy(dataset, toy, tmp_path) == 0
    tree = torch.load(tmp_path / "toy.pth", weights_only=True)
    model, state = small_model(dataset), tree["state_dict"]
    assert state.keys() == {part for parts in recbole_names(3).values() for part in parts}
    ids = {raw: i for i, raw in enumerate(dataset.items_table().column("raw").to_pylist(), 1)}
    assert list(ids) != [*"dabcef"]
    rows = [0, *(ids[item] for item in "dabcef"), model.mask_id]
    assert torch.equal(state["item_embedding.weight"], model.item_embedding.weight[rows])
    values = {raw: i for i, raw in enumerate(dataset.attributes_table().column("raw").to_pylist(), 1)}
    rows = [values[value] for value in "xyz"]
    assert torch.equal(state["feature_embedding.weight"], model.attribute_embedding.weight[rows])
    config = tree["config"]
    assert (config["n_layers"], config["n_heads"], config["MAX_ITEM_LIST_LENGTH"]) == (3, 4, 6)


def test_what_was_exported_comes_back_bit_for_bit(toy: Path, dataset: Dataset, tmp_path: Path) -> None:
    assert export_toy(dataset, toy, tmp_path) == 0
    model, config, stage = import_recbole(str(tmp_path / "toy.pth"), dataset)
    original = small_model(dataset, position_alignment="start")
    with torch.no_grad():
        original.attribute_embedding.weight[0] = 0  # which RecBole does not have
    assert_same_weights(model, original)
    assert model.config == original.config == config.model and stage == "finetune"


def test_a_model_whose_positions_count_from_the_newest_item_is_not_exported(
    toy: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_toy(dataset, toy, tmp_path, position_alignment="end") == 2
    assert "Train with model.position_alignment=start to export to it" in capsys.readouterr().err
    assert not (tmp_path / "toy.pth").exists()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (None, "say how with --tokens"),
        ({"item_id": ["[PAD]", *"abcdef"]}, "has no token table of 'class', but of item_id"),
        ({"item_id": [*"abcdef"], "class": ["[PAD]", *"xyz"]}, "item_id: expected different tokens, [PAD] the first"),
        ({"item_id": ["[PAD]", *"aabcdef"], "class": ["[PAD]", *"xyz"]}, "item_id: expected different tokens"),
        ({"item_id": ["[PAD]", *"abcdefgh"], "class": ["[PAD]", *"xyz"]}, "has item_id 'g', and 1 more, for which"),
        ([1], "holds a list; expected {field: [token, ...]}"),
        ({"item_id": 5, "class": ["[PAD]", *"xyz"]}, "item_id: expected strings, found int; expected {field: [token"),
    ],
)
def test_export_needs_tables_of_the_same_items(
    toy: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], tables: Any, message: str
) -> None:
    (tmp_path / "tokens.json").write_text(json.dumps(tables))
    assert export_toy(dataset, toy, tmp_path, "--tokens", "" if tables is None else str(tmp_path / "tokens.json")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "toy.pth").exists()


def test_a_dataset_with_attributes_of_another_field_is_refused(tmp_path: Path, toy: Path, dataset: Dataset) -> None:
    assert export_toy(dataset, toy, tmp_path) == 0
    six = six_items(tmp_path / "six")
    with pytest.raises(
        ExportError, match="knows those of one field; prepare the dataset with --attribute-fields class"
    ):
        import_recbole(str(tmp_path / "toy.pth"), six)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])  # those of RecBole's two ways to save
def test_import_needs_consent_for_a_pickle_and_runs_nothing_of_it_even_so(
    toy: Path, dataset: Dataset, tmp_path: Path, protocol: int
) -> None:
    assert export_toy(dataset, toy, tmp_path) == 0
    tree = torch.load(tmp_path / "toy.pth", weights_only=True)
    checkpoint = tmp_path / "trap.pth"
    torch.save({**tree, "trap": Trap(tmp_path / "sprung")}, checkpoint, pickle_protocol=protocol)
    with pytest.raises(ExportError, match=r"trap\.pth: is a pickle of more .* pass --allow-pickle to have it read"):
        import_recbole(str(checkpoint), dataset)
    model, _, _ = import_recbole(str(checkpoint), dataset, allow_pickle=True)
    assert_same_weights(model, import_recbole(str(tmp_path / "toy.pth"), dataset)[0])
    assert not (tmp_path / "sprung").exists()


class Forged:
    """Unpickled by NumPy, an array of objects at addresses of one's choice."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.ndarray, ((1,), "O", b"\x01" * 8)


class Saved:
    """As RecBole's dataset: an object that holds much, its token tables among it."""

    def __init__(self, **state: Any) -> None:
        vars(self).update(state)


def test_token_tables_come_from_a_saved_dataset_without_running_what_it_names(tmp_path: Path) -> None:
    tables = {np.str_("item_id"): np.array(["[PAD]", "b", "a"]), "class": np.array(["[PAD]", "x"], dtype=object)}
    saved = Saved(field2id_token=tables, trap=Trap(tmp_path / "sprung"), logger=os.getpid)
    (tmp_path / "d.pth").write_bytes(pickle.dumps(saved, protocol=4).replace(b"test_recbole", b"no_such_room"))
    with pytest.raises(ExportError, match=r"d\.pth: is a pickle of more .* pass --allow-pickle"):
        read_tokens(str(tmp_path / "d.pth"), "item_id", "class", Storage(), allow_pickle=False)
    found = read_tokens(str(tmp_path / "d.pth"), "item_id", "class", Storage(), allow_pickle=True)
    assert found == {"item_id": ["[PAD]", "b", "a"], "class": ["[PAD]", "x"]}
    assert not (tmp_path / "sprung").exists()
    tables["class"] = Forged()
    (tmp_path / "forged.pth").write_bytes(pickle.dumps(Saved(field2id_token=tables)))
    with pytest.raises(ExportError, match=r"forged\.pth: class: expected strings, found ndarray"):
        read_tokens(str(tmp_path / "forged.pth"), "item_id", "class", Storage(), allow_pickle=True)
    (tmp_path / "e.pth").write_bytes(pickle.dumps([1]))
    with pytest.raises(ExportError, match=r"e\.pth: has no field2id_token; expected a dataset that RecBole saved"):
        read_tokens(str(tmp_path / "e.pth"), "item_id", "class", Storage(), allow_pickle=True)
    (tmp_path / "f.pth").write_bytes(b"cut off")
    with pytest.raises(ExportError, match=r"f\.pth: cannot be read as a pickle"):
        read_tokens(str(tmp_path / "f.pth"), "item_id", "class", Storage(), allow_pickle=True)


@pytest.mark.parametrize(
    ("change", "tokens", "message"),
    [
        (lambda tree: tree.pop("state_dict"), "", "has no 'state_dict'; expected a checkpoint of RecBole's S3Rec"),
        (lambda tree: tree.pop("config"), "", "has no 'config'"),
        (lambda tree: tree["config"].update(model="SASRec"), "", "holds a model 'SASRec'"),
        (lambda tree: tree["config"].update(hidden_act="relu"), "", "was trained with hidden_act relu; only gelu"),
        (lambda tree: tree["config"].update(n_heads=3), "", "model.heads=3 does not divide"),
        (lambda tree: tree["config"].update(n_heads=torch.tensor(4)), "", "setting n_heads is no plain value"),
        (lambda tree: tree["config"].update(n_layers=2), "", r"has a tensor trm_encoder\.layer\.2"),
        (lambda tree: tree["state_dict"].pop("sp_norm.bias"), "", r"has no tensor sp_norm\.bias"),
        (
            lambda tree: tree["state_dict"].update({"LayerNorm.bias": torch.zeros(3)}),
            "",
            r"has shape \[3\], expected \[8\]",
        ),
        (lambda tree: tree["field2id_token"]["item_id"].pop(), "", "expected a checkpoint of .* and the token tables"),
        (lambda tree: tree.pop("field2id_token"), "", "does not say which items its numbers mean; give --tokens"),
        (
            lambda tree: tree["config"].update(user_inter_num_interval="[5,inf)"),
            "toy",
            r"was trained with user_inter_num_interval='\[5,inf\)', so .*toy does not tell",
        ),
        (
            lambda tree: tree["field2id_token"]["item_id"].__setitem__(3, "q"),
            "",
            "does not know item_id 'b', and 0 more that .*/dataset has",
        ),
    ],
)
def test_import_says_what_is_not_a_checkpoint_of_the_same_items(
    toy: Path, dataset: Dataset, tmp_path: Path, change: Callable[[dict[str, Any]], object], tokens: str, message: str
) -> None:
    assert export_toy(dataset, toy, tmp_path) == 0
    tree = torch.load(tmp_path / "toy.pth", weights_only=True)
    change(tree)
    torch.save(tree, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=message) as error:
        import_recbole(str(tmp_path / "changed.pth"), dataset, str(toy) if tokens else "")
    assert "changed.pth" in str(error.value)


def test_import_without_a_dataset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(tmp_path / "x.pth"), "--output", str(tmp_path / "m")]
    assert cli.main(["import", "--format", "recbole", *arguments]) == 2
    assert "give --dataset" in capsys.readouterr().err
