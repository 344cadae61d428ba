"""Checkpoints of RecBole 1.2.1's S3Rec, ``S3Rec-*.pth``, in and out; RecBole itself is not needed.

    s3rec import --format recbole --checkpoint saved/S3Rec-Nov-27-2026_17-34-42.pth --tokens dataset/ml-100k \
        --dataset data/ml-100k --output models/ml-100k --allow-pickle
    s3rec export runs/ml-100k/finetune --dataset data/ml-100k --format recbole --tokens dataset/ml-100k \
        --output S3Rec-ml-100k.pth

RecBole numbers items and attributes when it loads a dataset, and its checkpoints do not say how. Its token tables come
from ``--tokens``: the atomic files, where the settings filter nothing, numbered as RecBole numbers them; a dataset that
RecBole saved (``save_dataset: True``); or a JSON file of ``dataset.field2id_token``. Files that are written here hold
their tables.

RecBole's fine-tuned models count positions from the oldest item (``model.position_alignment=start``); its pretrained
ones count from the newest, and come in so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from s3rec_dist.config import Config, flat
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.output import file_output
from s3rec_dist.data.sources import recbole_tokens
from s3rec_dist.export import ExportError
from s3rec_dist.interchange.pickles import load_object, load_tensors, state_of, texts
from s3rec_dist.interchange.settings import DEFAULTS, MODEL, SettingsError, convert
from s3rec_dist.interchange.tensors import cut, fuse, plain_state_dict
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.storage import Storage
from s3rec_dist.training.checkpoint import fit_weights

PADDING = "[PAD]"
"""RecBole's token 0 of every field."""
_TABLES = "field2id_token"
_EXPECTED = "expected a checkpoint of RecBole's S3Rec"
_EXPECTED_TABLES = f"{_EXPECTED} and the token tables of the dataset that it was trained on"
_UNFILTERED: dict[str, tuple[Any, ...]] = {
    "user_inter_num_interval": (None, "[0,inf)"),
    "item_inter_num_interval": (None, "[0,inf)"),
    "val_interval": (None,),
    "rm_dup_inter": (None,),
    "benchmark_filename": (None,),
    "filter_inter_by_user_or_item": (None, True),
    "alias_of_item_id": (None, []),
}
"""Settings under which RecBole numbers what the atomic files hold, in their order."""

Tokens = Mapping[str, Sequence[str]]
"""RecBole's ``field2id_token``: by field, the token behind each id."""


def write_recbole(model: S3Rec, dataset: Dataset, args: argparse.Namespace) -> None:
    """Writes a ``.pth`` that RecBole's S3Rec loads strictly, also as ``pre_model_path``, to ``args.output``: ``s3rec
    export --format recbole``. Raises :class:`ExportError` where RecBole cannot have such a model, or where its items
    or attributes are others than those of ``dataset``."""
    if model.config.position_alignment != "start":
        raise ExportError(
            f"{args.model}: was trained with model.position_alignment=end, where an item's position depends on the "
            "history's length; RecBole counts from the oldest item. Train with model.position_alignment=start to "
            "export to it"
        )
    if not args.tokens:
        raise ExportError(
            "RecBole numbers items in its own way; say how with --tokens: its atomic files, a dataset that it saved, "
            "or a JSON file of dataset.field2id_token"
        )
    field = _attribute_field(dataset, None)
    tokens = read_tokens(args.tokens, args.item_field, field, dataset.storage, args.allow_pickle)
    items = _rows_of(tokens[args.item_field], _raw_items(dataset), args.item_field, args.tokens, dataset.path)
    attributes = _rows_of(tokens[field], _raw_attributes(dataset), field, args.tokens, dataset.path)
    weights = model.state_dict()
    weights["item_embedding.weight"] = weights["item_embedding.weight"][[0, *items, model.mask_id]]
    weights["attribute_embedding.weight"] = weights["attribute_embedding.weight"][attributes]
    tree = {
        "config": {**_settings_of(model), "ITEM_ID_FIELD": args.item_field, "item_attribute": field},
        "epoch": 0,
        "cur_step": 0,
        "best_valid_score": 0.0,
        "state_dict": cut(weights, recbole_names(model.config.layers)),
        "other_parameter": {},
        _TABLES: {name: list(tokens[name]) for name in (args.item_field, field)},
    }
    with file_output(args.output, dataset.storage, overwrite=args.overwrite) as draft:
        torch.save(tree, draft)


def import_recbole(
    checkpoint: str, dataset: Dataset, tokens: str = "", *, allow_pickle: bool = False
) -> tuple[S3Rec, Config, str]:
    """(model, settings, stage) of a file that RecBole's trainer saved, at a path or URL; item and attribute ids become
    those of ``dataset``, whose storage is used.

    Only tensors and plain values are unpickled (``weights_only``). RecBole's own files hold objects too: with
    ``allow_pickle`` these are read as inert values, and still nothing that the file names is imported or called.
    Raises :class:`ExportError` for a file that is no such checkpoint, naming the tensor, and for items or attributes
    of ``dataset`` that it does not know.
    """
    tree = load_tensors(checkpoint, dataset.storage, allow_pickle=allow_pickle)
    if not isinstance(tree, Mapping) or "state_dict" not in tree:
        raise ExportError(f"{checkpoint}: has no 'state_dict'; {_EXPECTED}")
    settings = _plain_settings(tree.get("config"), checkpoint)
    if not settings:
        raise ExportError(f"{checkpoint}: has no 'config', which says the number of heads; {_EXPECTED}")
    if settings.get("model", "S3Rec") != "S3Rec":
        raise ExportError(f"{checkpoint}: holds a model {settings['model']!r}; {_EXPECTED}")
    stage = settings.get("train_stage", "finetune")
    try:
        found = convert(settings)
        found.settings["model.position_alignment"] = "start" if stage == "finetune" else "end"
        config = found.config(checkpoint)
    except SettingsError as error:
        raise ExportError(f"{checkpoint}: {error}") from error
    if settings.get("hidden_act", "gelu") != "gelu":
        raise ExportError(
            f"{checkpoint}: was trained with hidden_act {settings['hidden_act']}; only gelu is known here"
        )
    item_field = str(settings.get("ITEM_ID_FIELD", DEFAULTS["ITEM_ID_FIELD"]))
    field = _attribute_field(dataset, str(settings.get("item_attribute", DEFAULTS["item_attribute"])))
    tables = _tables_of(tree, tokens, settings, item_field, field, dataset, checkpoint, allow_pickle)
    model = S3Rec(
        config.model, dataset.n_items, dataset.n_attributes, dataset.item_attributes(), config.pretrain, config.finetune
    )
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes["item_embedding.weight"][0] = len(tables[item_field]) + 1  # padding is among the tokens, the mask is not
    shapes["attribute_embedding.weight"][0] = len(tables[field]) - 1  # no padding
    tensors = plain_state_dict(tree.get("state_dict"), checkpoint, _EXPECTED)
    state = fuse(tensors, recbole_names(config.model.layers), shapes, checkpoint, _EXPECTED_TABLES)
    items = _places_of(tables[item_field], _raw_items(dataset), item_field, checkpoint, dataset.path)
    attributes = _places_of(tables[field], _raw_attributes(dataset), field, checkpoint, dataset.path)
    table = state["item_embedding.weight"]
    state["item_embedding.weight"] = table[[0, *items, len(table) - 1]]
    table = state["attribute_embedding.weight"]
    unused = torch.zeros_like(table[:1])  # our row 0, which RecBole does not have
    state["attribute_embedding.weight"] = torch.cat((unused, table[[place - 1 for place in attributes]]))
    fit_weights(model, state, checkpoint)
    return model, config, stage


def recbole_names(layers: int) -> dict[str, tuple[str, ...]]:
    """RecBole's tensor behind each of ours, or its tensors, stacked by rows."""
    modules: dict[str, tuple[str, ...]] = {"embedding_norm": ("LayerNorm",)}
    modules |= {f"{task}_head": (f"{task}_norm",) for task in ("aap", "mip", "map", "sp")}
    for i in range(layers):
        layer = f"trm_encoder.layer.{i}"
        attention = f"{layer}.multi_head_attention"
        modules |= {
            f"blocks.{i}.qkv": tuple(f"{attention}.{part}" for part in ("query", "key", "value")),
            f"blocks.{i}.attention_output": (f"{attention}.dense",),
            f"blocks.{i}.attention_norm": (f"{attention}.LayerNorm",),
            f"blocks.{i}.inner": (f"{layer}.feed_forward.dense_1",),
            f"blocks.{i}.inner_output": (f"{layer}.feed_forward.dense_2",),
            f"blocks.{i}.output_norm": (f"{layer}.feed_forward.LayerNorm",),
        }
    tables = {"item": "item", "attribute": "feature", "position": "position"}
    return {f"{own}_embedding.weight": (f"{theirs}_embedding.weight",) for own, theirs in tables.items()} | {
        f"{own}.{kind}": tuple(f"{part}.{kind}" for part in parts)
        for own, parts in modules.items()
        for kind in ("weight", "bias")
    }


def _settings_of(model: S3Rec) -> dict[str, Any]:
    """What RecBole's S3Rec is built from, to go on with a model of ours."""
    own = flat({"model": dataclasses.asdict(model.config), "pretrain": dataclasses.asdict(model.pretrain_config)})
    loss = "CE" if model.finetune_config.loss in ("ce", "sampled_ce") else "BPR"
    same = {key: own[name] for key, name in MODEL.items()}
    return {"model": "S3Rec", **same, "hidden_act": "gelu", "loss_type": loss, "train_stage": "finetune"}


def read_tokens(source: str, item_field: str, field: str, storage: Storage, allow_pickle: bool) -> Tokens:
    """RecBole's tables of an item field and an attribute field, from atomic files (a folder, ``NAME.inter`` or
    ``NAME``), a saved dataset (``.pth``, which needs ``allow_pickle``) or a JSON file. Raises :class:`ExportError`, or
    SourceError for atomic files."""
    if source.endswith(".json"):
        try:
            tables = json.loads(storage.read(source))
        except ValueError as error:
            raise ExportError(f"{source}: not a JSON file ({error}); {_JSON}") from error
    elif source.endswith(".pth"):
        found = state_of(load_object(source, storage, allow_pickle=allow_pickle)).get(_TABLES)
        if not isinstance(found, Mapping):
            raise ExportError(f"{source}: has no {_TABLES}; expected a dataset that RecBole saved")
        tables = {_name(key): tokens for key, tokens in found.items()}
    else:
        tables = recbole_tokens(source, item_field, field, storage)
    return _checked_tables(tables, item_field, field, source)


_JSON = "expected {field: [token, ...]}, RecBole's dataset.field2id_token"


def _name(key: Any) -> str:
    """A field's name; some are scalars of NumPy."""
    try:
        return key if isinstance(key, str) else "".join(texts(key))
    except (ValueError, TypeError, LookupError):
        return str(key)


def _checked_tables(tables: Any, item_field: str, field: str, source: str) -> Tokens:
    if not isinstance(tables, Mapping):
        raise ExportError(f"{source}: holds a {type(tables).__name__}; {_JSON}")
    checked = {}
    for name in (item_field, field):
        if name not in tables:
            raise ExportError(f"{source}: has no token table of {name!r}, but of {', '.join(map(str, tables))}")
        try:
            tokens = texts(tables[name])
        except (ValueError, TypeError, LookupError) as error:
            raise ExportError(f"{source}: {name}: {error}; {_JSON}") from error
        if tokens[:1] != [PADDING] or len(set(tokens)) != len(tokens):
            raise ExportError(f"{source}: {name}: expected different tokens, {PADDING} the first")
        checked[name] = tokens
    return checked


def _tables_of(
    tree: Mapping[str, Any],
    source: str,
    settings: Mapping[str, Any],
    item_field: str,
    field: str,
    dataset: Dataset,
    checkpoint: str,
    allow_pickle: bool,
) -> Tokens:
    """The token tables under which a checkpoint was trained."""
    if not source:
        if _TABLES in tree:
            return _checked_tables(tree[_TABLES], item_field, field, checkpoint)
        raise ExportError(
            f"{checkpoint}: does not say which items its numbers mean; give --tokens: RecBole's atomic files, a "
            "dataset that it saved, or a JSON file of dataset.field2id_token"
        )
    if not source.endswith((".json", ".pth")):
        for key, usual in _UNFILTERED.items():
            if settings.get(key) not in usual:
                raise ExportError(
                    f"{checkpoint}: was trained with {key}={settings[key]!r}, so {source} does not tell how its items "
                    "are numbered; give --tokens a dataset that RecBole saved, or a JSON file of dataset.field2id_token"
                )
    return read_tokens(source, item_field, field, dataset.storage, allow_pickle)


def _places_of(tokens: Sequence[str], raw: Sequence[str], field: str, source: str, place: str) -> list[int]:
    """The place among ``tokens`` of each raw id of ours."""
    places = {token: i for i, token in enumerate(tokens)}
    if unknown := [name for name in raw if name not in places]:
        raise ExportError(
            f"{source}: does not know {field} {unknown[0]!r}, and {len(unknown) - 1:,} more that {place} has; prepare "
            "the dataset from the files that RecBole read, with the same filters"
        )
    return [places[name] for name in raw]


def _rows_of(tokens: Sequence[str], raw: Sequence[str], field: str, source: str, place: str) -> list[int]:
    """Our id of each token but padding."""
    ids = {name: i for i, name in enumerate(raw, 1)}
    if unknown := [token for token in tokens[1:] if token not in ids]:
        raise ExportError(
            f"{source}: has {field} {unknown[0]!r}, and {len(unknown) - 1:,} more, for which the model has no weights, "
            f"because {place} lacks them; filter both alike (in RecBole item_inter_num_interval: '[1,inf)' leaves out "
            "items without interactions)"
        )
    return [ids[token] for token in tokens[1:]]


def _raw_items(dataset: Dataset) -> list[str]:
    return dataset.items_table().column("raw").to_pylist()


def _raw_attributes(dataset: Dataset) -> list[str]:
    return dataset.attributes_table().column("raw").to_pylist()


def _attribute_field(dataset: Dataset, wanted: str | None) -> str:
    """The one field that the attributes of ``dataset`` come from. Raises where there are others than ``wanted``."""
    fields = sorted(set(dataset.attributes_table().column("field").to_pylist()))
    if len(fields) != 1 or wanted not in (None, fields[0]):
        raise ExportError(
            f"{dataset.path}: has attributes of {', '.join(fields) or 'no field'}, and RecBole's S3Rec knows those of "
            f"one field; prepare the dataset with --attribute-fields {wanted or 'FIELD'}"
        )
    return fields[0]


def _plain_settings(config: Any, checkpoint: str) -> dict[str, Any]:
    """The settings of RecBole's pickled Config, or of a plain dictionary, without what is inert."""
    state = state_of(config)
    found = state.get("final_config_dict", state)
    if not isinstance(found, Mapping):
        return {}
    if unknown := [key for key, value in found.items() if key in DEFAULTS and not _is_plain(value)]:
        raise ExportError(f"{checkpoint}: its setting {unknown[0]} is no plain value; {_EXPECTED}")
    return {key: value for key, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for part in (*value.keys(), *value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def add_export_arguments(group: argparse._ArgumentGroup) -> None:
    """The options of ``--format recbole``."""
    add_tokens_argument(group)
    group.add_argument("--item-field", default="item_id", metavar="NAME", help="ITEM_ID_FIELD (default: item_id)")
    add_pickle_argument(group)


def add_tokens_argument(group: argparse._ArgumentGroup) -> None:
    """``--tokens``."""
    group.add_argument(
        "--tokens",
        default="",
        metavar="URL",
        help="RecBole's token tables, which say how it numbers items and attributes: its atomic files (a folder; for "
        "settings that filter nothing), a dataset that it saved (.pth), or a JSON file of dataset.field2id_token",
    )


def add_pickle_argument(group: argparse._ArgumentGroup) -> None:
    """``--allow-pickle``."""
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read RecBole's own .pth files, which are pickles of objects; what they name is neither imported nor run",
    )
