"""Model folders: what ``s3rec export`` and ``s3rec import`` write, to keep, share, load and recommend from.

    MODEL/model.safetensors    every weight, fp32; or, of more than --max-shard-mb, shards of that size with an index
                               (s3rec_dist/training/weights.py)
    MODEL/config.json          settings, sizes, stage, metrics, dataset and catalogue, size and SHA-256 of the files
    MODEL/items.parquet        the item catalogue and the attributes, as the dataset has them; absent where a
    MODEL/attributes.parquet   checkpoint was imported without a dataset
    MODEL/README.md            a model card

    s3rec export runs/beauty/finetune --dataset data/beauty --output models/beauty
    model = S3Rec.from_pretrained("models/beauty").eval()

Both may be URLs. A folder appears only when it is whole, by a rename; on other storage by config.json, which comes
last. Writing one takes the memory of a shard and the small weights, also where item rows come from a sharded table's
checkpoint. Other storage's files are copied to ``storage.scratch_dir`` first. Other programs' files are
``s3rec_dist/interchange/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError

import s3rec_dist
from s3rec_dist.config import Config, from_dict, to_dict
from s3rec_dist.data.dataset import Dataset, Manifest
from s3rec_dist.data.formats import put_in_place, sync_file
from s3rec_dist.data.output import Progress
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.storage import DamagedFile, Storage
from s3rec_dist.tables import ShardedTable, TableSpec
from s3rec_dist.training.checkpoint import (
    catalogue_of,
    check_shapes,
    describe,
    first_rows,
    fit_weights,
    growth_since,
    load_weights,
    open_weights,
    with_growth,
)
from s3rec_dist.training.weights import (
    INDEX,
    MAX_SHARD_BYTES,
    SHARD_PATTERN,
    TENSORS,
    WEIGHTS,
    InMemory,
    StoredRows,
    Weights,
    is_weights_file,
    write_weights,
)

FORMAT = "s3rec_dist model"
VERSION = 1
CONFIG, CARD = "config.json", "README.md"
CATALOGUE = ("items.parquet", "attributes.parquet")
MODEL_FILES = (CONFIG, WEIGHTS, *CATALOGUE, CARD)
"""What may be in a model folder whose weights are one file."""
MODEL_PATTERNS = (*MODEL_FILES, INDEX, SHARD_PATTERN)
"""What may be in any."""

_KEPT_SETTINGS = ("seed", "model", "pretrain", "finetune", "evaluation")
_FACTS = ("stage", "origin", "epoch", "step", "metrics")
_PATHS = {"finetune": "pretrained", "evaluation": "negatives_file"}
"""Settings that name a place on the machine that trained; the last part of the path is kept."""


class ExportError(ValueError):
    """A model that cannot be exported, imported or loaded; the message names the file or tensor."""


def _nobody(line: str) -> None:
    pass


def load_export(folder: str, storage: Storage | None = None) -> S3Rec:
    """The model of a folder or URL written by ``s3rec export`` or ``s3rec import``, folded for use, on the CPU, with
    the item attributes where the folder has a catalogue.

    Raises :class:`ExportError` for another kind of folder, and CheckpointError or DatasetError for a damaged file.
    """
    weights, metadata = load_weights(folder, storage)
    return _model(weights, metadata, open_catalogue(folder, metadata, storage)).folded()


def load_model(path: str, dataset: Dataset, cut_on: torch.device | None = None, tell: Progress = _nobody) -> S3Rec:
    """The model of a run's, a checkpoint's or an exported folder or URL, folded for use, on the CPU, with the
    attributes of ``dataset``, whose storage is used. ``tell`` is told where that has grown since.

    With ``cut_on``, and several ranks that all call this, a model that was trained over a sharded table is not folded:
    its items' rows stay cut over the ranks, on that device.

    Raises CheckpointError where its weights are missing or damaged, or where its item ids are not those that
    ``dataset`` begins with.
    """
    return open_model(path, dataset, cut_on, tell)[0]


def open_model(
    path: str, dataset: Dataset, cut_on: torch.device | None = None, tell: Progress = _nobody
) -> tuple[S3Rec, dict[str, Any]]:
    """As :func:`load_model`, with the model's metadata."""
    tables: dict[str, ShardedTable] = {}

    def cut(metadata: Mapping[str, Any]) -> Mapping[str, ShardedTable]:
        if cut_on is None or "config" not in metadata:
            return tables
        config = from_dict(metadata["config"], path)
        if config.model.item_table == "sharded" and dist.is_initialized() and dist.get_world_size() > 1:
            first = first_rows(config, "items")
            rows, features = dataset.n_items + 1, config.model.hidden_size
            spec = TableSpec(rows=rows, features=features, optimizer="sgd", **first)
            tables["items"] = ShardedTable.among_ranks(spec, device=cut_on)
        return tables

    loaded, metadata = load_weights(path, dataset.storage, cut)
    weights = _for_dataset({name: InMemory(tensor) for name, tensor in loaded.items()}, metadata, path, dataset, tell)
    model = _model(_whole(weights), metadata, dataset, item_table="sharded" if tables else "dense")
    if not tables:
        return model.folded(), metadata
    model.item_rows = tables["items"]
    return model, metadata


def open_catalogue(
    folder: str, metadata: Mapping[str, Any] | None = None, storage: Storage | None = None
) -> Dataset | None:
    """The catalogue of an exported folder or URL, verified, as a dataset without sequences; None where it has none.

    ``metadata`` is the folder's, where it has been read already. Raises :class:`ExportError` for another kind of
    folder, DatasetError for a damaged catalogue.
    """
    storage = storage or Storage()
    folder = folder.rstrip("/")
    if metadata is None:
        try:
            metadata = json.loads(storage.read(f"{folder}/{CONFIG}"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
            metadata = {}
    if not isinstance(metadata, Mapping) or metadata.get("format") != FORMAT:
        raise ExportError(f"{folder}: not a model folder; make one from a run or checkpoint with 's3rec export'")
    if metadata.get("version") != VERSION:
        raise ExportError(
            f"{folder}: a model folder of version {metadata.get('version')!r}, this program reads version {VERSION}; "
            "export the run again with this version"
        )
    if "catalogue" not in metadata:
        return None
    manifest = Manifest(
        name=metadata["dataset"]["name"],
        format="parquet",
        users=0,
        items=metadata["n_items"],
        attributes=metadata["n_attributes"],
        interactions=0,
        content="",
        rows_content=(0, 0),
        catalogue=metadata["catalogue"],
        shards=(),
        files={name: metadata["files"][name]["sha256"] for name in CATALOGUE},
        preparation={},
        created_with=metadata["created_with"],
    )
    catalogue = Dataset(folder, manifest, storage)
    catalogue.verify()
    return catalogue


def _for_dataset(weights: Weights, metadata: Mapping[str, Any], path: str, dataset: Dataset, tell: Progress) -> Weights:
    """Weights for all that ``dataset`` has. Raises CheckpointError where it has other ids."""
    growth = growth_since(metadata, dataset)
    if not growth:
        return weights
    tell(
        f"{path}: {dataset.path} has {growth.items:,} items and {growth.attributes:,} attributes more than the "
        "model was trained on"
    )
    return with_growth(weights, growth, _config_of(metadata))


def _whole(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: tensor.rows(0, tensor.shape[0]) for name, tensor in weights.items()}


def _model(
    weights: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    catalogue: Dataset | None,
    item_table: Literal["dense", "sharded"] = "dense",
) -> S3Rec:
    model = _new_model(metadata, catalogue, item_table)
    fit_weights(model, weights, metadata["path"])
    return model


def _new_model(
    metadata: Mapping[str, Any], catalogue: Dataset | None, item_table: Literal["dense", "sharded"] = "dense"
) -> S3Rec:
    config = _config_of(metadata)
    return S3Rec(
        # this machine's choice, not the training machine's
        dataclasses.replace(config.model, attention="auto", item_table=item_table, attribute_table="dense"),
        catalogue.n_items if catalogue else metadata["n_items"],
        catalogue.n_attributes if catalogue else metadata["n_attributes"],
        catalogue.item_attributes() if catalogue else None,
        config.pretrain,
        config.finetune,
    )


def _config_of(metadata: Mapping[str, Any]) -> Config:
    path = metadata["path"]
    if "config" not in metadata:
        raise ExportError(f"{path}: its metadata has no settings; expected a run, a checkpoint or an exported model")
    return from_dict(metadata["config"], path)


def _fitting(weights: Weights, metadata: Mapping[str, Any], catalogue: Dataset | None) -> Weights:
    """Weights in the order of the model that they fit to. Raises CheckpointError where there is none."""
    with torch.device("meta"):
        model = _new_model(metadata, catalogue)
    check_shapes(model, {name: tensor.shape for name, tensor in weights.items()}, metadata["path"])
    return {name: weights[name] for name in model.state_dict()}


def verify_export(folder: str, storage: Storage | None = None) -> None:
    """Compares every file of a model folder with its hash, and the shapes of its weights with its settings. Raises as
    :func:`load_export`."""
    with open_weights(folder, storage) as (weights, metadata):
        _fitting(weights, metadata, open_catalogue(folder, metadata, storage))


@contextlib.contextmanager
def _opened(path: str, dataset: Dataset, tell: Progress) -> Iterator[tuple[Weights, dict[str, Any]]]:
    """The weights of a model for ``dataset``, which are read when they are asked for. Raises as :func:`load_model`."""
    with open_weights(path, dataset.storage) as (weights, metadata):
        yield _fitting(_for_dataset(weights, metadata, path, dataset, tell), metadata, dataset), metadata


@contextlib.contextmanager
def streamed_model(path: str, dataset: Dataset, tell: Progress = _nobody) -> Iterator[S3Rec]:
    """The model that :func:`load_model` loads, but not folded, and its items' own rows stay where they lie: its
    ``item_rows`` are :class:`StoredRows`."""
    with _opened(path, dataset, tell) as (weights, metadata):
        model = _new_model(metadata, dataset, "sharded")
        model.load_state_dict(_whole({name: weights[name] for name in model.state_dict()}))
        model.item_rows = StoredRows(weights[TENSORS["items"]])
        yield model


def export(
    path: str,
    dataset: Dataset,
    output: str,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tell: Progress = _nobody,
) -> None:
    """Writes the model of a run, checkpoint or exported folder as a model folder with the catalogue of ``dataset``,
    whose storage is used. Both may be paths or URLs. ``tell`` is told where the dataset has grown since.

    Raises :class:`ExportError` where ``output`` exists or cannot be written, and what :func:`load_model` raises.
    """
    with _opened(path, dataset, tell) as (weights, metadata):
        facts: dict[str, Any] = {"n_items": dataset.n_items, "n_attributes": dataset.n_attributes}
        facts |= {name: metadata[name] for name in _FACTS if name in metadata}
        if fingerprint := trained_on(metadata):
            facts["trained_on"] = fingerprint
        config = _config_of(metadata)
        _write(weights, output, facts, config, dataset, dataset.storage, overwrite, max_shard_bytes)


def trained_on(metadata: Mapping[str, Any]) -> str:
    """The fingerprint of the data that a model of :func:`load_weights` was trained on, '' where it is not known."""
    return str(metadata.get("trained_on" if "format" in metadata else "dataset_fingerprint", ""))


def write_model(
    model: S3Rec,
    output: str,
    facts: Mapping[str, Any],
    config: Config,
    dataset: Dataset | None,
    *,
    overwrite: bool = False,
    storage: Storage | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model folder, whole or not at all; an earlier model folder is replaced only with ``overwrite``.
    ``output`` is a path or URL under ``storage``, or else the dataset's.

    ``facts`` (stage, epoch, step, metrics, trained_on) go into config.json and the model card. Raises
    :class:`ExportError`.
    """
    facts = {"n_items": model.n_items, "n_attributes": model.n_attributes, **facts}
    storage = storage or (dataset.storage if dataset else Storage())
    weights = {name: InMemory(tensor) for name, tensor in model.state_dict().items()}
    _write(weights, output, facts, config, dataset, storage, overwrite, max_shard_bytes)


def _write(
    weights: Weights,
    output: str,
    facts: Mapping[str, Any],
    config: Config,
    dataset: Dataset | None,
    storage: Storage,
    overwrite: bool,
    max_shard_bytes: int,
) -> None:
    settings = {name: value for name, value in to_dict(config).items() if name in _KEPT_SETTINGS}
    for section, name in _PATHS.items():
        settings[section][name] = os.path.basename(settings[section][name].rstrip("/"))
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model_type": "s3rec",
        "architectures": ["S3Rec"],
        "created_with": f"s3rec_dist {s3rec_dist.__version__}",
        **facts,
        "config": settings,
    }
    if dataset is not None:
        manifest = dataset.manifest
        counts = {"name": manifest.name, "users": manifest.users, "interactions": manifest.interactions}
        metadata |= {
            "dataset": counts,
            "dataset_fingerprint": dataset.fingerprint,
            "catalogue": catalogue_of(dataset),
        }
    local = storage.local(output)
    place = output.rstrip("/") if local is None else os.path.abspath(local)
    try:
        with _whole_folder(place, overwrite, storage) as folder:
            stored = write_weights(weights, folder, max_shard_bytes)
            files = {name: describe(folder / name) for name in stored}
            if dataset is not None:
                for name in CATALOGUE:
                    files[name] = _copy(dataset, name, folder)
                metadata["attribute_catalogue"] = dataset.attributes_digest(dataset.n_attributes)
            metadata["files"] = files
            (folder / CONFIG).write_text(json.dumps(metadata, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            (folder / CARD).write_text(model_card(metadata, os.path.basename(place)), "utf-8")
            for name in stored:
                (folder / name).chmod((folder / CARD).stat().st_mode)  # safetensors makes files for their owner alone
            for name in (*files, CONFIG, CARD, "."):
                sync_file(str(folder / name))
    except (OSError, SafetensorError) as error:
        unchanged = "" if local is None else ". Nothing has been changed"
        raise ExportError(
            f"{output}: the model could not be written ({error}); make room, or choose another output{unchanged}"
        ) from error


def _copy(dataset: Dataset, name: str, folder: Path) -> dict[str, Any]:
    """Copies a file of the catalogue and compares it with the dataset's manifest."""
    try:
        dataset.storage.download(dataset.file(name), str(folder / name), sha256=dataset.manifest.files[name])
    except DamagedFile as error:
        raise ExportError(f"{error}; restore the file or prepare the dataset again") from error
    return describe(folder / name)


@contextlib.contextmanager
def _whole_folder(place: str, overwrite: bool, storage: Storage) -> Iterator[Path]:
    """A local folder that takes the place of ``place`` when the block ends well, and leaves nothing when not. Other
    storage gets config.json last: until then a reader finds no model there."""
    is_local = storage.local(place) is not None
    replaced = _replaced(place, overwrite, storage)
    parent, name = os.path.split(place)
    if is_local:
        os.makedirs(parent, exist_ok=True)
    beside = parent if is_local else storage.config.scratch_dir or None
    draft = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=beside))
    whole = draft / "model"
    try:
        whole.mkdir()
        yield whole
        if is_local:
            put_in_place(str(whole), place, str(draft / "replaced"))
        else:
            for name in replaced:
                storage.remove(f"{place}/{name}")
            storage.publish(str(whole), place, last=CONFIG)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replaced(place: str, overwrite: bool, storage: Storage) -> list[str]:
    """Names of the files of a model that is there already, config.json first. Raises :class:`ExportError` where it may
    not be replaced."""
    names = set(storage.names(place))
    if storage.local(place) is not None:
        is_there = os.path.lexists(place) and (bool(names) or not os.path.isdir(place))
        is_cut_short = False
    else:
        names = {name for name in names if not name.startswith(".")}  # as in a new Hugging Face repository
        is_there = bool(names)
        is_cut_short = CONFIG not in names and all(map(_is_model_file, names))
    if is_there and not overwrite:
        raise ExportError(f"{place}: exists already; choose another output, or pass --overwrite to replace it")
    if is_there and not is_cut_short and not (CONFIG in names and names & {WEIGHTS, INDEX}):
        raise ExportError(f"{place}: not a model folder, so --overwrite leaves it alone; choose another output")
    own = {name for name in names if _is_model_file(name)}
    if storage.local(place) is not None and (others := names - own):
        raise ExportError(
            f"{place}: holds {min(others)} too, which --overwrite would remove with the model; move it elsewhere, or "
            "choose another output"
        )
    return sorted(own, key=lambda name: name != CONFIG)


def _is_model_file(name: str) -> bool:
    return name in (CONFIG, *CATALOGUE, CARD) or is_weights_file(name)


def _ranked_among(evaluation: Mapping[str, Any]) -> str:
    if evaluation["negatives_file"]:
        return f"the negatives of {evaluation['negatives_file']}"
    return (
        f"{evaluation['negatives']} sampled items" if evaluation["protocol"] == "sampled" else "all items not yet seen"
    )


def _front_matter(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the Hugging Face Hub reads of a model card; ``model-index`` has the measured metrics."""
    front: dict[str, Any] = {
        "library_name": "s3rec_dist",
        "tags": ["recommendation", "sequential-recommendation", "s3-rec", "safetensors"],
    }
    if dataset := metadata.get("dataset"):
        front["datasets"] = [dataset["name"]]
        if metadata.get("metrics"):
            evaluation = metadata["config"]["evaluation"]
            result = {
                "task": {"type": "next-item-recommendation", "name": "Next-item recommendation"},
                "dataset": {
                    "type": dataset["name"],
                    "name": dataset["name"],
                    "split": "validation",
                    "revision": metadata["dataset_fingerprint"],
                    "args": {"protocol": f"leave one out, ranked among {_ranked_among(evaluation)}"},
                },
                "metrics": [
                    {"type": key.lower().replace("@", "_at_"), "name": key, "value": value}
                    for key, value in metadata["metrics"].items()
                ],
            }
            front["model-index"] = [{"name": name, "results": [result]}]
    return front


def model_card(metadata: Mapping[str, Any], name: str, url: str = "") -> str:
    """README.md of a model folder called ``name`` with this config.json: front matter, then prose in Markdown. Commands
    take it from ``url``, where that is another place."""
    url = url or name
    config, dataset = metadata["config"], metadata.get("dataset")
    model = config["model"]
    from_scratch = config["finetune"]["pretrained"] == "none"
    stage = {
        "finetune": "trained to predict the next item, " + ("from scratch" if from_scratch else "after pretraining"),
        "pretrain": "pretrained with the four self-supervised tasks and not fine-tuned",
    }.get(metadata.get("stage", ""), "imported from a checkpoint of the S3-Rec authors' PyTorch implementation")
    if "origin" in metadata:
        stage += f"; imported from a checkpoint of {metadata['origin']}"
    lines = [
        "---",
        yaml.safe_dump(_front_matter(metadata, name), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"An S3-Rec sequential recommender, {stage}. It scores every item as the next one of a user's history.",
        "",
        "## Data",
        "",
    ]
    sizes = f"{metadata['n_items']:,} items, {metadata['n_attributes']:,} attributes"
    if dataset:
        lines += [
            f"{dataset['name']}: {dataset['users']:,} users, {sizes}, {dataset['interactions']:,} interactions "
            f"(dataset fingerprint `{metadata['dataset_fingerprint'][:12]}`). The catalogue lies beside the weights: "
            f"`{CATALOGUE[0]}` has each item's id, raw id, count and attributes.",
        ]
    else:
        lines += [f"{sizes}. The catalogue is not part of this folder: item ids are the numbers trained on."]
    shown = ("hidden_size", "layers", "heads", "inner_size", "max_length", "position_alignment")
    lines += ["", "## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {model[key]} |" for key in shown]
    if "step" in metadata:
        lines += [f"| epochs trained | {metadata['epoch']:g} |", f"| steps trained | {metadata['step']:,} |"]
    lines += ["", "All settings are in `config.json`.", ""]
    if INDEX in metadata.get("files", {}):
        lines += [
            f"The weights are shards with an index, `{INDEX}`. A tensor that is larger than a shard is cut along its "
            "rows into parts, whose names end in `.rows-BEGIN-END`: one after the other they are the tensor.",
            "",
        ]
    if metadata.get("metrics"):
        lines += [
            "## Validation",
            "",
            f"The item before each user's last one, ranked among {_ranked_among(config['evaluation'])}:",
            "",
            "| metric | value |",
            "|---|---|",
            *(f"| {key} | {value:.4f} |" for key, value in metadata["metrics"].items()),
            "",
        ]
    lines += [
        "## Use",
        "",
        "```python",
        "from s3rec_dist.model import S3Rec",
        "",
        f'model = S3Rec.from_pretrained("{name}").eval()',
        "```",
        "",
    ]
    if dataset:
        lines += [
            "```sh",
            f"s3rec recommend {url} --histories histories.parquet --k 10 --output recommendations.parquet",
            f"s3rec finetune data.path=DATASET finetune.pretrained={url}",
            "```",
            "",
            "`histories.parquet` has a row per user: `user`, and `items`, a list of raw item ids, oldest first.",
        ]
    else:
        lines += ["```sh", f"s3rec finetune data.path=DATASET finetune.pretrained={url}", "```"]
    return "\n".join(lines) + "\n"
