"""Every setting, as frozen dataclasses; read from YAML, overridden by dotted ``key=value`` arguments.

    config = load_config("configs/beauty.yaml", ["pretrain.epochs=10", "engine.zero_stage=2"])

Unknown keys, wrong types and impossible combinations raise :class:`ConfigError`, which names the
place (file or argument, and key), what was expected and what came. ``to_yaml(config)`` is stored
with every run and checkpoint, and reads back to an equal config.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A setting that cannot be used; the message says where it stands and what to write instead."""


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """A further dataset that is streamed together with ``data.path``."""

    path: str
    """Dataset with the same items (a path or fsspec URL)."""
    revision: int = 0
    """Revision of the dataset; 0 is the newest."""
    weight: float = 1.0
    """How often an epoch takes each of its samples; 0.25 takes a quarter of them, the next epoch the next quarter."""

    def __post_init__(self) -> None:
        _at_least("data.mix: revision", self.revision, 0)
        if not 0 < self.weight <= 1000:
            raise ConfigError(f"data.mix: weight={self.weight} of {self.path}: expected more than 0, up to 1000")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset is streamed, and how."""

    path: str = ""
    """Dataset folder written by ``s3rec prepare`` (a path or fsspec URL)."""
    revision: int = 0
    """Revision of the dataset; 0 is the newest."""
    mix: tuple[MixConfig, ...] = ()
    """Further datasets, as in ``[{path: data/older, weight: 0.25}]``; validation is on ``path`` alone."""
    streams: int = 0
    """Parts an epoch is cut into; any world size that divides it sees the same global batches.
    0 takes the largest divisor of the batch size up to 64."""
    shuffle_window: int = 8192
    """Samples of one stream that are shuffled together."""
    prefetch_threads: int = 2
    """Threads that read, decode and pack ahead of training."""
    prefetch_mb: int = 16
    """Packed batches that may wait to be used, and bytes read from remote storage at a time, in MiB per process."""
    cache_mb: int = 256
    """Decoded row groups kept in memory between epochs, in MiB per process."""
    verify: Literal["size", "hash"] = "size"
    """What is checked of every shard before training; whatever is read is held against its SHA-256 anyway."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """A damaged shard stops the run, or what is damaged of it is left out, on all ranks alike."""
    max_bad_shards: int = 10
    """Damaged shards beyond which ``skip`` stops too."""

    def __post_init__(self) -> None:
        _at_least("data.revision", self.revision, 0)
        _at_least("data.streams", self.streams, 0)
        _at_least("data.shuffle_window", self.shuffle_window, 1)
        _at_least("data.prefetch_threads", self.prefetch_threads, 1)
        _at_least("data.prefetch_mb", self.prefetch_mb, 1)
        _at_least("data.cache_mb", self.cache_mb, 0)
        _at_least("data.max_bad_shards", self.max_bad_shards, 1)


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """How datasets, runs and exports are reached, on local disks and any other fsspec storage.

    Credentials and endpoints are no settings: they come from the environment or from the storage's own
    configuration files (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, FSSPEC_*, ...).
    """

    protocols: tuple[str, ...] = ("file", "s3", "gs", "hf", "hdfs", "memory")
    """Protocols of URLs that may be opened; any other one is refused."""
    chained_urls: bool = False
    """Allow fsspec's chained URLs, as in ``simplecache::s3://bucket/file``."""
    retries: int = 8
    """Times a failed request is tried again, after waits that double from 0.1 s to 10 s, with jitter."""
    timeout_s: float = 60.0
    """Seconds after which a request counts as failed."""
    cache_dir: str = ""
    """Local folder that keeps what was read from remote datasets; processes of a host may share it. Empty: none."""
    cache_mb: int = 10240
    """Size limit of ``cache_dir``, in MiB; what was used least recently goes first."""
    scratch_dir: str = ""
    """Local folder for what is on its way to remote storage or from it; empty takes the system's for temporary files.
    Checkpoints of a run on remote storage are written there first."""

    def __post_init__(self) -> None:
        _at_least("storage.retries", self.retries, 0)
        _at_least("storage.timeout_s", self.timeout_s, 1)
        _at_least("storage.cache_mb", self.cache_mb, 1)
        for name in ("cache_dir", "scratch_dir"):
            folder = getattr(self, name)
            if "://" in folder or "::" in folder:
                raise ConfigError(f"storage.{name}={folder!r}: expected a local folder")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder. Defaults are the S3-Rec paper's."""

    hidden_size: int = 64
    """Embedding and hidden size E."""
    layers: int = 2
    """Transformer blocks."""
    heads: int = 2
    """Attention heads; must divide ``hidden_size``."""
    inner_size: int = 256
    """Width of the feed-forward layer."""
    max_length: int = 50
    """Most recent items of a sequence the encoder sees."""
    hidden_dropout: float = 0.5
    """Dropout on the embeddings and on both sublayer outputs."""
    attention_dropout: float = 0.5
    """Dropout on attention probabilities."""
    layer_norm_eps: float = 1e-12
    """Added to the variance, inside the root."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    position_alignment: Literal["end", "start"] = "end"
    """``end``: the newest item always sits at the last position (the paper); ``start``: the oldest at the first."""
    attention: Literal["auto", "reference", "sdpa", "triton"] = "auto"
    """Backend of attention and of the operators around it, which have only ``triton`` and plain PyTorch; ``auto``
    picks the fastest for the device."""
    item_table: Literal["dense", "sharded"] = "dense"
    """``dense``: every rank holds all items, which is faster up to some 100,000 of them; ``sharded``: each holds its
    part, and a step costs what the rows cost that it touches."""
    attribute_table: Literal["dense", "sharded"] = "dense"
    """The same of attributes, for millions of them; ``sharded`` needs ``pretrain.attribute_negatives``."""
    item_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of a sharded table's rows; bf16 is rounded at random, so that small steps count."""
    item_device: Literal["auto", "cpu"] = "auto"
    """Where a sharded table lies: ``auto`` is where training is, ``cpu`` the host's memory."""
    item_capacity: int = 0
    """Rows of a sharded item table, over all ranks; beyond it those that were used least recently are forgotten. 0 has
    room for all items."""
    item_features: Literal["none", "add"] = "none"
    """``add``: an item's vector is its own row plus a learned map of the mean of its attributes' vectors, so that items
    never trained on are ranked by their attributes."""
    item_id_dropout: float = 0.3
    """With ``item_features=add``, probability that a training step leaves an item's own row out."""
    activation_checkpointing: bool = False
    """Keep only the blocks' inputs for the backward pass, which computes the rest again: less memory, more time."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "inner_size", "max_length"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"model.heads={self.heads} does not divide model.hidden_size={self.hidden_size}; "
                "choose a head count that does"
            )
        for name in ("hidden_dropout", "attention_dropout", "item_id_dropout"):
            _within(f"model.{name}", getattr(self, name), 0.0, 0.99)
        _at_least("model.item_capacity", self.item_capacity, 0)
        for name in ("layer_norm_eps", "initializer_range"):
            _at_least(f"model.{name}", getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What both training stages share: batches, optimizer, schedule, validation, checkpoints."""

    epochs: int = 100
    """Passes over the data, at most."""
    batch_size: int = 256
    """Samples of one optimizer step over all ranks."""
    gradient_accumulation: int = 1
    """Micro-batches each rank's share of the batch is cut into."""
    samples: Literal["all_prefixes", "full_sequence", "one_random_prefix"] = "all_prefixes"
    """What one user contributes to an epoch."""
    learning_rate: float = 1e-3
    """Adam's peak learning rate."""
    item_optimizer: Literal["lazy_adam", "adagrad", "rowwise_adagrad", "sgd"] = "lazy_adam"
    """Of sharded tables: it changes only rows that a step has touched. ``lazy_adam`` keeps two numbers beside
    each of a row's, ``adagrad`` one, ``rowwise_adagrad`` one a row."""
    item_learning_rate: float = 0.0
    """Peak learning rate of sharded tables, under the same schedule; 0 takes ``learning_rate``."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decay rates."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling to zero at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    gradient_clipping: float = 0.0
    """Largest global gradient norm, and of a sharded table's gradient by itself; 0 is off."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped because a loss or the gradient is not a finite number; then the run goes back
    to its last checkpoint, and where it has done that in vain, stops."""
    checkpoint_every_epochs: int = 1
    """Epochs between checkpoints."""
    checkpoint_every_steps: int = 0
    """Steps between checkpoints inside an epoch; 0 is off."""
    checkpoint_async: bool = True
    """Write checkpoints while training goes on, from a copy in host memory as large as a process's state."""
    keep_checkpoints: int = 2
    """Newest whole checkpoints kept, the best one aside."""
    log_every_steps: int = 50
    """Steps between logged training metrics."""

    def __post_init__(self) -> None:
        section = self._section
        for name in ("epochs", "checkpoint_every_steps", "warmup_steps"):
            _at_least(f"{section}.{name}", getattr(self, name), 0)
        for name in (
            "batch_size",
            "gradient_accumulation",
            "checkpoint_every_epochs",
            "keep_checkpoints",
            "log_every_steps",
            "max_skipped_steps",
        ):
            _at_least(f"{section}.{name}", getattr(self, name), 1)
        _within(f"{section}.learning_rate", self.learning_rate, 0.0, 10.0)
        _within(f"{section}.item_learning_rate", self.item_learning_rate, 0.0, 100.0)
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise ConfigError(f"{section}.adam_betas={list(self.adam_betas)}: expected values from 0 to below 1")
        _at_least(f"{section}.adam_eps", self.adam_eps, 0)
        _at_least(f"{section}.gradient_clipping", self.gradient_clipping, 0)
        _at_least(f"{section}.weight_decay", self.weight_decay, 0)

    @property
    def _section(self) -> str:
        return "pretrain" if isinstance(self, PretrainConfig) else "finetune"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """Self-supervised pretraining: the four tasks and their weights."""

    mask_ratio: float = 0.2
    """Probability that an item is masked; the last item always is."""
    aap_weight: float = 0.2
    """Weight of associated attribute prediction."""
    mip_weight: float = 1.0
    """Weight of masked item prediction."""
    map_weight: float = 1.0
    """Weight of masked attribute prediction."""
    sp_weight: float = 0.5
    """Weight of segment prediction."""
    attribute_negatives: int = 0
    """Attributes that a step draws as negatives of associated and masked attribute prediction, uniformly, which all
    positions of the global batch share; 0 takes all. For catalogues with very many."""
    pairwise: Literal["original", "bpr"] = "original"
    """Loss of a (positive, negative) score pair: the paper's double sigmoid, or BPR on logits."""
    segment_negatives: Literal["train_only", "all"] = "train_only"
    """Items negative segments come from; ``all`` lets held-out items in, as the original does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("pretrain.mask_ratio", self.mask_ratio, 0.0, 1.0)
        _at_least("pretrain.attribute_negatives", self.attribute_negatives, 0)
        weights = ("aap_weight", "mip_weight", "map_weight", "sp_weight")
        for name in weights:
            _at_least(f"pretrain.{name}", getattr(self, name), 0)
        if not any(getattr(self, name) for name in weights):
            raise ConfigError(f"pretrain: {', '.join(weights)} are all 0, which leaves nothing to learn; raise one")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    """Next-item fine-tuning with a causal encoder, stopped early on validation."""

    samples: Literal["all_prefixes", "full_sequence", "one_random_prefix"] = "full_sequence"
    """What one user contributes to an epoch."""
    pretrained: str = "auto"
    """Weights to start from: ``auto`` is the newest checkpoint of ``<output>/pretrain``; a run's, a checkpoint's or an
    exported model's folder (a path or fsspec URL), trained on this dataset or an earlier revision of it; or ``none`` to
    train from scratch."""
    loss: Literal["bce", "bpr", "ce", "sampled_ce"] = "bce"
    """``bce`` and ``bpr`` against one sampled negative a position, ``ce`` (softmax) against all items, ``sampled_ce``
    against an estimate of that from ``negatives`` items."""
    negatives: int = 1024
    """Items that ``sampled_ce`` draws for a step; all positions of the global batch share them."""
    negative_sampling: Literal["uniform", "popularity", "in_batch"] = "uniform"
    """How ``sampled_ce`` draws: from all items alike, from all as often as they are taken, or from the targets of the
    global batch."""
    positions: Literal["all", "last"] = "all"
    """Positions that are trained on."""
    metric: str = "MRR"
    """Validation metric that picks the best checkpoint: MRR, HR@k or NDCG@k."""
    patience: int = 10
    """Validations without improvement after which training stops; 0 never stops early."""
    validate_every_epochs: int = 1
    """Epochs between validations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("finetune.patience", self.patience, 0)
        _at_least("finetune.negatives", self.negatives, 1)
        _at_least("finetune.validate_every_epochs", self.validate_every_epochs, 1)
        if not self.pretrained:
            raise ConfigError(
                "finetune.pretrained is empty; write a checkpoint or export folder, 'auto', "
                "or 'none' to train from scratch"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Leave-one-out ranking."""

    protocol: Literal["sampled", "full"] = "full"
    """Rank the held-out item among sampled negatives, or among all items not yet seen."""
    negatives: int = 99
    """Negatives drawn for each user under ``sampled``."""
    negatives_file: str = ""
    """File (a path or URL) of lines ``user item item ...`` in raw ids, used instead of a draw under ``sampled``."""
    seed: int = 2020
    """Seed of the negative draw."""
    cutoffs: tuple[int, ...] = (1, 5, 10, 20)
    """k of HR@k and NDCG@k."""
    batch_users: int = 256
    """Users scored together."""
    item_chunk: int = 65536
    """Items scored together under ``full``; bounds memory."""

    def __post_init__(self) -> None:
        for name in ("negatives", "batch_users", "item_chunk"):
            _at_least(f"evaluation.{name}", getattr(self, name), 1)
        if not self.cutoffs or min(self.cutoffs) < 1:
            raise ConfigError(f"evaluation.cutoffs={list(self.cutoffs)}: expected positive integers, as in [5, 10]")
        if self.negatives_file and self.protocol == "full":
            raise ConfigError("evaluation.negatives_file needs evaluation.protocol=sampled")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """DeepSpeed: precision, ZeRO, or a JSON of one's own."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """``auto`` is bf16 on GPUs that have it, else fp32. Master weights are always fp32."""
    zero_stage: int = 0
    """ZeRO stage 0 to 3."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lies in the host's memory instead of the GPU's: ``optimizer`` state and step (from ZeRO 1 on), or with
    ``parameters`` these as well (ZeRO 3)."""
    deepspeed_config: str = ""
    """A DeepSpeed JSON file to merge in; what it contradicts is an error."""
    compile: bool = False
    """Whether ``torch.compile`` fuses what lies between the kernels; at the first step, for batches of any size. Up to
    ZeRO 2."""
    threads: int = 0
    """CPU threads per process; 0 shares the cores among the host's ranks."""
    hang_seconds: float = 30.0
    """Seconds without progress after which a process ends where another one gives no sign of life, or none of them
    comes to the end of a step; 0 is never."""
    stall_seconds: float = 1800.0
    """Seconds that the others wait for a process that is at work: reads data, saves, validates, compiles."""

    def __post_init__(self) -> None:
        _within("engine.zero_stage", self.zero_stage, 0, 3)
        _at_least("engine.hang_seconds", self.hang_seconds, 0)
        _at_least("engine.stall_seconds", self.stall_seconds, max(self.hang_seconds, 1))
        _at_least("engine.threads", self.threads, 0)
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ConfigError(
                f"engine.offload={self.offload} does not work with engine.zero_stage={self.zero_stage}; "
                f"use engine.zero_stage={needed}" + (" or above" if needed < 3 else "")
            )
        if self.compile and self.zero_stage == 3:
            raise ConfigError(
                "engine.compile does not work with engine.zero_stage=3, whose weights come and go layer by layer; "
                "use engine.zero_stage=2 or below"
            )
        if self.device == "cpu" and self.precision == "fp16":
            raise ConfigError("engine.precision=fp16 does not run with engine.device=cpu; use bf16 or fp32")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides the run's metrics.jsonl and the terminal."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases mode."""
    project: str = "s3rec-dist"
    """W&B project."""
    entity: str = ""
    """W&B entity; empty is the account's default."""
    name: str = ""
    """Run name; empty takes the output folder's."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment: both stages, on one dataset."""

    output: str = "runs/default"
    """Folder of the run (a path or fsspec URL); stages write to ``<output>/pretrain`` and ``<output>/finetune``."""
    seed: int = 42
    """Seed of initial weights, order, reconstruction and dropout."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        for stage in (self.pretrain, self.finetune):
            streams = self.data.streams
            if streams and stage.batch_size % streams:
                raise ConfigError(
                    f"data.streams={streams} does not divide {stage._section}.batch_size={stage.batch_size}; "
                    "leave data.streams=0 or choose a divisor of both batch sizes"
                )
        if self.model.item_table == "sharded" and self.finetune.loss == "ce":
            raise ConfigError(
                "finetune.loss=ce needs all items at each step, which model.item_table=sharded has in no one place; "
                "use finetune.loss=sampled_ce"
            )
        if self.model.item_capacity and self.model.item_table == "dense":
            raise ConfigError(
                f"model.item_capacity={self.model.item_capacity} is of a sharded item table; set "
                "model.item_table=sharded, or leave model.item_capacity out"
            )
        if self.model.attribute_table == "sharded" and not self.pretrain.attribute_negatives:
            raise ConfigError(
                "model.attribute_table=sharded has all attributes in no one place, as pretrain.attribute_negatives=0 "
                "needs them; set pretrain.attribute_negatives=1024"
            )
        if (self.model.attribute_table, self.model.item_table, self.model.item_features) == ("sharded", "dense", "add"):
            raise ConfigError(
                "model.item_features=add with model.attribute_table=sharded needs model.item_table=sharded too"
            )
        metric = self.finetune.metric
        name, _, cutoff = metric.partition("@")
        if metric != "MRR" and (name not in ("HR", "NDCG") or not cutoff.isdigit()):
            raise ConfigError(f"finetune.metric={metric!r}: expected MRR, HR@k or NDCG@k, as in NDCG@20")
        if cutoff and int(cutoff) not in self.evaluation.cutoffs:
            raise ConfigError(
                f"finetune.metric={metric!r} is not computed with evaluation.cutoffs={list(self.evaluation.cutoffs)}; "
                f"add {cutoff} to evaluation.cutoffs"
            )


def load_config(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads ``path`` (defaults where None), applies ``key.sub=value`` overrides, and checks the whole.

    Raises :class:`ConfigError` for a missing or malformed file, an unknown key, a wrong type or an
    impossible combination.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the config file ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text, so not a config file ({error.reason})") from error
        try:
            loaded = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{path}: expected settings as 'key: value', got {type(loaded).__name__}")
        tree = loaded or {}
        _build(Config, tree, str(path), "")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"argument {override!r}: expected key=value, as in pretrain.epochs=10")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"argument {override!r}: the value is not valid YAML: {error}") from error
        node = tree
        *sections, leaf = key.removeprefix("--").split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"argument {override!r}: {section!r} is not a section")
        node[leaf] = "" if text == "" else value
    return _build(Config, tree, str(path) if path is not None and not overrides else "command line", "")


def from_dict(tree: dict[str, Any], source: str) -> Config:
    """A config from nested dictionaries, as :func:`to_dict` gives; ``source`` names them in errors."""
    return _build(Config, tree, source, "")


def to_dict(config: Config) -> dict[str, Any]:
    """The whole resolved config as plain dictionaries and lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    tree = plain(config)
    assert isinstance(tree, dict)
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of :func:`to_dict` by dotted key, as in ``pretrain.epochs``."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def to_yaml(config: Config) -> str:
    """The whole resolved config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _build(cls: type, tree: Any, source: str, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: {prefix.rstrip('.')}: expected a section of settings, got {tree!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in tree.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(names)}"
            raise ConfigError(f"{source}: unknown setting {prefix}{key}; {hint}")
        values[key] = _coerce(hints[key], value, source, f"{prefix}{key}")
    try:
        return cls(**values)
    except ConfigError as error:
        if str(error).startswith(source):
            raise
        raise ConfigError(f"{source}: {error}") from None


def _coerce(hint: Any, value: Any, source: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, source, f"{key}.")
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{source}: {key}={value!r}: expected one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        args = typing.get_args(hint)
        fixed = Ellipsis not in args
        if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(args)):
            raise ConfigError(f"{source}: {key}={value!r}: expected a list, as in [a, b]")
        return tuple(_coerce(args[i] if fixed else args[0], v, source, f"{key}[{i}]") for i, v in enumerate(value))
    assert not isinstance(hint, types.UnionType)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-3, without a dot, as text
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{source}: {key}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _at_least(key: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{key}={value}: expected at least {low}")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{key}={value}: expected a value from {low} to {high}")
