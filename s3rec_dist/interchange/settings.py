"""RecBole's settings for S3Rec as ours: ``s3rec config from-recbole``.

    s3rec config from-recbole S3Rec.yaml ml-100k.yaml --output configs/ml-100k.yaml

Settings that the files leave out have RecBole 1.2.1's defaults. What the result cannot say is listed with what happens
here instead; nothing is dropped in silence.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from s3rec_dist.config import Config, from_dict
from s3rec_dist.storage import Storage, StorageError, add_storage_argument, storage_of

DEFAULTS: dict[str, Any] = {
    "dataset": "ml-100k",
    "data_path": "dataset/",
    "seed": 2020,
    "use_gpu": True,
    "epochs": 300,
    "train_batch_size": 2048,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "clip_grad_norm": None,
    "enable_amp": False,
    "eval_step": 1,
    "stopping_step": 10,
    "eval_args": {"mode": "full"},
    "topk": [10],
    "valid_metric": "MRR@10",
    "log_wandb": False,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_size": 64,
    "inner_size": 256,
    "hidden_dropout_prob": 0.5,
    "attn_dropout_prob": 0.5,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "MAX_ITEM_LIST_LENGTH": 50,
    "item_attribute": "class",
    "mask_ratio": 0.2,
    "aap_weight": 0.2,
    "mip_weight": 1.0,
    "map_weight": 1.0,
    "sp_weight": 0.5,
    "pretrain_epochs": 500,
    "save_step": 50,
    "loss_type": "CE",
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "RATING_FIELD": "rating",
    "TIME_FIELD": "timestamp",
}
"""RecBole 1.2.1's values of the settings that have a counterpart."""

_SAME: dict[str, tuple[str, ...]] = {
    "seed": ("seed",),
    "n_layers": ("model.layers",),
    "n_heads": ("model.heads",),
    "hidden_size": ("model.hidden_size",),
    "inner_size": ("model.inner_size",),
    "hidden_dropout_prob": ("model.hidden_dropout",),
    "attn_dropout_prob": ("model.attention_dropout",),
    "layer_norm_eps": ("model.layer_norm_eps",),
    "initializer_range": ("model.initializer_range",),
    "MAX_ITEM_LIST_LENGTH": ("model.max_length",),
    "mask_ratio": ("pretrain.mask_ratio",),
    "aap_weight": ("pretrain.aap_weight",),
    "mip_weight": ("pretrain.mip_weight",),
    "map_weight": ("pretrain.map_weight",),
    "sp_weight": ("pretrain.sp_weight",),
    "pretrain_epochs": ("pretrain.epochs",),
    "save_step": ("pretrain.checkpoint_every_epochs",),
    "epochs": ("finetune.epochs",),
    "train_batch_size": ("pretrain.batch_size", "finetune.batch_size"),
    "learning_rate": ("pretrain.learning_rate", "finetune.learning_rate"),
    "weight_decay": ("pretrain.weight_decay", "finetune.weight_decay"),
    "checkpoint_dir": ("output",),
    "wandb_project": ("tracking.project",),
}
"""Settings that mean the same here under another name."""

_TASKS = ("mask_ratio", "aap_weight", "mip_weight", "map_weight", "sp_weight")
MODEL = {key: names[0] for key, names in _SAME.items() if names[0].startswith("model.") or key in _TASKS}
"""Settings that RecBole's S3Rec is built from, and ours that mean the same."""

_ALWAYS = {
    "model.position_alignment": "start",
    "pretrain.samples": "all_prefixes",
    "finetune.samples": "all_prefixes",
    "finetune.positions": "last",
}
"""How RecBole's S3Rec always trains."""

_DIFFERENCES = (
    "samples: RecBole trains on every prefix of a history; here on those of its latest model.max_length training items",
    "pretraining: RecBole puts the newest item at the last position, fine-tuning the oldest at the first, so that its "
    "position embeddings change their meaning in between; here model.position_alignment=start holds for both",
    "pretraining: the last item of a sequence is always masked here, as in the authors' code; RecBole masks it as any",
)
"""What is done otherwise here whatever the settings."""

_NONE = {
    "gpu_id": "choose GPUs with CUDA_VISIBLE_DEVICES or the launcher",
    "worker": "threads read ahead, data.prefetch_threads",
    "state": "there are no logging levels",
    "show_progress": "a line every log_every_steps steps",
    "reproducibility": "a run always repeats itself",
    "save_dataset": "the prepared dataset is always kept",
    "save_dataloaders": "batches follow from the seed and the step",
    "eval_batch_size": "users scored together are evaluation.batch_users",
    "metrics": "HR, NDCG and MRR are always reported",
    "load_col": "prepare reads the columns it needs",
    "unload_col": "prepare reads the columns it needs",
    "train_stage": "the stages are commands: s3rec pretrain, s3rec finetune",
    "valid_metric_bigger": "every metric here is better when larger",
    "field_separator": "prepare --source recbole reads tabs; for others take --source table",
    "seq_separator": "prepare --source recbole splits at spaces; for others take --source table --attribute-separator",
}
"""Settings without a counterpart, and what there is instead."""

_HARMLESS: dict[str, Any] = {
    "field_separator": "\t",
    "seq_separator": " ",
    "hidden_act": "gelu",
    "learner": "adam",
    "shuffle": True,
    "filter_inter_by_user_or_item": True,
    "valid_metric_bigger": True,
    "model": "S3Rec",
    "train_neg_sample_args": None,
    "enable_scaler": False,
    "save_dataset": False,
    "save_dataloaders": False,
    "worker": 0,
    "state": "INFO",
    "reproducibility": True,
    "show_progress": True,
    "require_pow": False,
    "loss_decimal_place": 4,
    "metric_decimal_place": 4,
    "numerical_features": [],
    "kg_reverse_r": False,
    "entity_kg_num_interval": "[0,inf)",
    "relation_kg_num_interval": "[0,inf)",
    "HEAD_ENTITY_ID_FIELD": "head_id",
    "TAIL_ENTITY_ID_FIELD": "tail_id",
    "RELATION_ID_FIELD": "relation_id",
    "ENTITY_ID_FIELD": "entity_id",
    "NEG_PREFIX": "neg_",
    "LIST_SUFFIX": "_list",
    "LABEL_FIELD": "label",
    "POSITION_FIELD": "position_id",
    "ITEM_LIST_LENGTH_FIELD": "item_length",
}
"""Values that need no word, because they say what is done here anyway or name what is not needed."""

_METRICS = {"hit": "HR", "recall": "HR", "ndcg": "NDCG", "mrr": "MRR"}
"""RecBole's metrics by lower-case name; with one relevant item recall is the hit rate."""


class SettingsError(ValueError):
    """RecBole settings that cannot be read or that contradict each other."""


@dataclass(kw_only=True)
class Converted:
    """What became of RecBole's settings."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Ours, by dotted key."""
    prepare: list[str] = field(default_factory=list)
    """Arguments of ``s3rec prepare`` for the same data."""
    notes: list[str] = field(default_factory=list)
    """A line for each setting without a counterpart: what it was, and what happens here."""

    def tree(self) -> dict[str, Any]:
        """The settings as the sections of a config file."""
        tree: dict[str, Any] = {}
        for key, value in self.settings.items():
            *sections, leaf = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = value
        return tree

    def config(self, source: str) -> Config:
        """The settings, checked. Raises ConfigError naming ``source``."""
        return from_dict(self.tree(), source)


def read_settings(files: list[str], storage: Storage) -> dict[str, Any]:
    """RecBole's settings of these YAML files, paths or URLs; later ones win. Raises :class:`SettingsError`."""
    settings: dict[str, Any] = {}
    for path in files:
        try:
            found = yaml.safe_load(storage.read(path))
        except (StorageError, OSError):
            raise
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(found, dict):
            raise SettingsError(f"{path}: expected RecBole settings as 'key: value', got {type(found).__name__}")
        settings |= found
    return settings


def convert(given: Mapping[str, Any]) -> Converted:
    """RecBole settings as ours; what ``given`` leaves out has RecBole's defaults. Raises :class:`SettingsError` for a
    value that RecBole would not take either."""
    found = Converted()
    if str(given.get("model", "S3Rec")) != "S3Rec":
        raise SettingsError(f"model: {given['model']}: the settings are another model's; expected S3Rec")
    settings = {**DEFAULTS, **{key: value for key, value in given.items() if value is not None}}
    for key, names in _SAME.items():
        if key in settings:
            found.settings |= dict.fromkeys(names, _number(settings[key]))
    found.settings |= _ALWAYS
    converted = {*_SAME, *DEFAULTS}
    for keys, rule in _RULES.items():
        try:
            rule(settings, found)
        except SettingsError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise SettingsError(
                f"{', '.join(keys)}: a value is of another kind than RecBole takes ({error})"
            ) from error
        converted |= set(keys)
    for key, value in given.items():
        if key in converted or value is None or (key in _HARMLESS and value == _HARMLESS[key]):
            continue
        told = f"no counterpart; {_NONE[key]}" if key in _NONE else "no counterpart, left out"
        found.notes.append(f"{key}: {_shown(value)}: {told}")
    found.notes.extend(_DIFFERENCES)
    return found


def _number(value: Any) -> Any:
    """YAML's safe loader reads 1e-3, without a dot, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip().removesuffix("...").strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dataset(settings: Mapping[str, Any], found: Converted) -> None:
    name = str(settings["dataset"])
    place = str(settings["data_path"]).rstrip("/")
    place = place if place.endswith(f"/{name}") else f"{place}/{name}"  # RecBole adds the name to a checkpoint's config
    found.settings["data.path"] = f"data/{name}"
    found.settings.setdefault("output", f"runs/{name}")
    found.prepare.extend(["--source", "recbole", "--input", place])
    columns = {"--user-column": "USER_ID_FIELD", "--item-column": "ITEM_ID_FIELD", "--time-column": "TIME_FIELD"}
    for option, key in columns.items():
        if settings[key] != DEFAULTS[key]:
            found.prepare.extend([option, str(settings[key])])
    if isinstance(settings["item_attribute"], str):
        found.prepare.extend(["--attribute-fields", settings["item_attribute"]])
    else:
        raise SettingsError(f"item_attribute: {_shown(settings['item_attribute'])}: expected the name of one field")


def _filters(settings: Mapping[str, Any], found: Converted) -> None:
    for key, option in (
        ("user_inter_num_interval", "--min-user-count"),
        ("item_inter_num_interval", "--min-item-count"),
    ):
        least, exact = _least(settings.get(key, "[0,inf)"))
        if least:
            found.prepare.extend([option, str(least)])
        if not exact:
            found.notes.append(f"{key}: {settings[key]}: there is only a least count, {option} {least}; no largest one")
    for name, interval in (settings.get("val_interval") or {}).items():
        least, exact = _least(interval, whole=False)
        if name == settings["RATING_FIELD"] and exact:
            found.prepare.extend(["--min-rating", f"{least:g}"])
            if name != DEFAULTS["RATING_FIELD"]:
                found.prepare.extend(["--rating-column", name])
        else:
            found.notes.append(
                f"val_interval: {name}: {_shown(interval)}: prepare filters by a least rating alone, as in "
                f"'{settings['RATING_FIELD']}: \"[3,inf)\"'; filter the file first"
            )
    if duplicates := settings.get("rm_dup_inter"):
        if duplicates == "first":
            found.prepare.extend(["--duplicates", "drop_repeats"])
        else:
            found.notes.append(
                f"rm_dup_inter: {_shown(duplicates)}: of a user's repeats of an item prepare keeps all, or with "
                "--duplicates drop_repeats the first"
            )


def _least(interval: Any, whole: bool = True) -> tuple[Any, bool]:
    """The least value of an interval such as ``[5,inf)``, and whether it says all of it."""
    match = re.fullmatch(r"\s*([\[(])\s*([^,]+?)\s*,\s*([^,]+?)\s*([\])])\s*", str(interval))
    try:
        if not match:
            raise ValueError
        low, high = float(match[2]), float(match[3])
        if whole:
            low = max(math.floor(low) + 1 if match[1] == "(" else math.ceil(low), 0)
    except (ValueError, OverflowError):
        raise SettingsError(f"{interval!r}: expected one interval, as in '[5,inf)'") from None
    return low, high == math.inf and (whole or match[1] == "[")


def _device(settings: Mapping[str, Any], found: Converted) -> None:
    found.settings["engine.device"] = "auto" if settings["use_gpu"] else "cpu"
    found.settings["engine.precision"] = "auto" if settings["enable_amp"] else "fp32"


def _gradients(settings: Mapping[str, Any], found: Converted) -> None:
    clip = settings["clip_grad_norm"]
    if clip is not None:
        clip = clip if isinstance(clip, Mapping) else {"max_norm": clip}
        norm = float(_number(clip.get("max_norm", 0)))
        found.settings |= {"pretrain.gradient_clipping": norm, "finetune.gradient_clipping": norm}
        if clip.get("norm_type", 2) != 2:
            found.notes.append(f"clip_grad_norm: norm_type {clip['norm_type']}: the norm here is always the L2 norm")
    if str(settings.get("learner", "adam")).lower() != "adam":
        found.notes.append(f"learner: {settings['learner']}: the optimizer here is always Adam")


def _loss(settings: Mapping[str, Any], found: Converted) -> None:
    losses = {"CE": "ce", "BPR": "bpr"}
    loss = losses.get(str(settings["loss_type"]))
    if loss is None:
        raise SettingsError(f"loss_type: {_shown(settings['loss_type'])}: expected CE or BPR")
    found.settings["finetune.loss"] = loss
    if loss == "ce":
        found.notes.append(
            "loss_type: CE: the classes are the items; RecBole counts padding and the mask token as well"
        )
    if settings.get("hidden_act", "gelu") != "gelu":
        found.notes.append(f"hidden_act: {settings['hidden_act']}: the activation here is always gelu")
    if settings.get("shuffle") is False:
        found.notes.append("shuffle: false: every epoch is shuffled here")
    sampling = settings.get("train_neg_sample_args")
    usual = {"distribution": ("uniform", "none"), "sample_num": (1, "none"), "dynamic": (False,)}
    if isinstance(sampling, Mapping) and any(
        sampling.get(key, values[0]) not in values for key, values in usual.items()
    ):
        found.notes.append(
            f"train_neg_sample_args: {_shown(sampling)}: bpr draws one negative, uniformly, that the user has not seen"
        )
    if settings.get("pre_model_path"):
        found.notes.append(
            f"pre_model_path: {settings['pre_model_path']}: make a model folder of it with 's3rec import --format "
            "recbole' and name that in finetune.pretrained; by default it is this run's own pretraining"
        )


def _validation(settings: Mapping[str, Any], found: Converted) -> None:
    topk = settings["topk"]
    cutoffs = {int(k) for k in (topk if isinstance(topk, (list, tuple)) else [topk])}
    name, _, cutoff = str(settings["valid_metric"]).partition("@")
    metric = _METRICS.get(name.lower())
    if metric is None:
        found.notes.append(f"valid_metric: {settings['valid_metric']}: the best checkpoint here is chosen by MRR")
    elif metric == "MRR" and cutoff:
        found.notes.append(f"valid_metric: {settings['valid_metric']}: MRR here has no cut-off")
    elif cutoff:
        cutoffs.add(int(cutoff))
    has_cutoff = metric in ("HR", "NDCG") and bool(cutoff)
    found.settings["finetune.metric"] = f"{metric}@{cutoff}" if has_cutoff else "MRR"
    found.settings["evaluation.cutoffs"] = sorted(cutoffs)
    # RecBole goes on through stopping_step validations without improvement and stops at the next.
    found.settings["finetune.patience"] = int(settings["stopping_step"]) + 1
    every = int(settings["eval_step"])
    if every < 1:
        found.notes.append(f"eval_step: {every}: every epoch is validated here; the last one is not simply taken")
    found.settings["finetune.validate_every_epochs"] = max(every, 1)


def _ranking(settings: Mapping[str, Any], found: Converted) -> None:
    arguments = settings["eval_args"]
    if not isinstance(arguments, Mapping):
        raise SettingsError(f"eval_args: {_shown(arguments)}: expected split, order, group_by and mode")
    mode = arguments.get("mode", "full")
    if isinstance(mode, Mapping):
        if len({str(value) for value in mode.values()}) > 1:
            found.notes.append(f"eval_args: mode {_shown(mode)}: validation and test rank alike here; valid's is taken")
        mode = mode.get("valid", "full")
    if match := re.fullmatch(r"uni(\d+)", str(mode)):
        found.settings |= {"evaluation.protocol": "sampled", "evaluation.negatives": int(match[1])}
    else:
        found.settings["evaluation.protocol"] = "full"
        if settings.get("repeatable", True):
            found.notes.append("repeatable: true: items of a user's own history are left out of the ranking here")
        if mode != "full":
            found.notes.append(
                f"eval_args: mode {mode}: negatives here are drawn uniformly (evaluation.protocol=sampled) or given in "
                "evaluation.negatives_file; all items are ranked now"
            )
    if arguments.get("split", {"LS": "valid_and_test"}) != {"LS": "valid_and_test"}:
        found.notes.append(
            f"eval_args: split {_shown(arguments['split'])}: each user's last item is for test, the one before it for "
            "validation, as under LS: valid_and_test"
        )
    if arguments.get("order", "TO") != "TO":
        found.notes.append(
            f"eval_args: order {arguments['order']}: interactions are in order of time here, as under TO"
        )


def _tracking(settings: Mapping[str, Any], found: Converted) -> None:
    found.settings["tracking.wandb"] = "online" if settings["log_wandb"] else "disabled"


_RULES: dict[tuple[str, ...], Callable[[Mapping[str, Any], Converted], None]] = {
    ("dataset", "data_path"): _dataset,
    ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter"): _filters,
    ("use_gpu",): _device,
    ("clip_grad_norm", "learner"): _gradients,
    ("loss_type", "hidden_act", "shuffle", "train_neg_sample_args", "pre_model_path"): _loss,
    ("valid_metric", "topk"): _validation,
    ("eval_args", "repeatable"): _ranking,
    ("log_wandb",): _tracking,
}
"""Settings that do not translate one by one: those that a rule answers for, besides the ones with defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec config``."""
    parser.add_argument("action", choices=("from-recbole",), help="convert RecBole's YAML settings for S3Rec")
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="YAML files, paths or URLs, as RecBole's config_file_list: later ones win",
    )
    parser.add_argument("--output", metavar="FILE", help="config file to write, a path or URL (default: stdout)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    add_storage_argument(parser)


def run(args: argparse.Namespace) -> None:
    """``s3rec config``: the config file; on stderr a line for each setting without a counterpart."""
    from s3rec_dist.data.output import file_output

    storage = storage_of(args)
    source = " ".join(args.files)
    settings = read_settings(args.files, storage)
    try:
        found = convert(settings)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None
    found.config(source)
    prepare = shlex.join(["s3rec", "prepare", *found.prepare, "--output", found.settings["data.path"]])
    text = f"# Made from RecBole's {source}. Its dataset:\n#   {prepare}\n"
    text += yaml.safe_dump(found.tree(), sort_keys=False)
    if args.output:
        with file_output(args.output, storage, overwrite=args.overwrite) as draft, open(draft, "w") as file:
            file.write(text)
        print(prepare)
        print(f"s3rec pretrain --config {shlex.quote(args.output)}")
        print(f"s3rec finetune --config {shlex.quote(args.output)}")
    else:
        print(text, end="")
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
