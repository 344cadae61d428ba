"""DeepSpeed, and the only file that imports it.

    world = start(config.engine)                       # torch.distributed, threads, device
    engine = Engine(model, S3Rec.pretrain_losses, config.pretrain, config.engine, world)
    result = engine.step(micro_batches, count=256, learning_rate=1e-3, dropout_seed=seed)

One path for every world size, 1 without a launcher included. Losses are sums over a rank's samples; the
gradient that Adam sees is that of (sum over all ranks and micro-batches) / ``count``, at any world size,
ZeRO stage and accumulation. The learning rate is a function of the step and set from outside, so there is
no scheduler state.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import itertools
import json
import logging
import math
import os
import pickle
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from s3rec_dist.config import ConfigError, EngineConfig, PretrainConfig, StageConfig
from s3rec_dist.tables import ShardedTable
from s3rec_dist.tables.optimizers import Settings
from s3rec_dist.tables.sharded import Gradient
from s3rec_dist.training.phases import Collectives, PhaseClock
from s3rec_dist.training.relayout import MOMENTS, AdamState
from s3rec_dist.training.rendezvous import Meeting, is_launched
from s3rec_dist.training.snapshot import HostCopies

T = TypeVar("T")

Precision = Literal["fp32", "bf16", "fp16"]

LARGEST_BUCKET = 50_000_000
"""Gradient elements that ZeRO reduces at a time, at most; smaller models take one bucket of their own size."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


class EngineError(ValueError):
    """Processes that cannot train together; the message says what to change."""


class LossSums(Protocol):
    """What a model's loss function returns: sums over the batch (see ``model.s3rec.Losses``)."""

    @property
    def total(self) -> torch.Tensor: ...
    @property
    def terms(self) -> dict[str, torch.Tensor]: ...
    @property
    def counts(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


PATIENCE_S = 600.0
"""Seconds that the processes of a launcher wait for each other at the start."""


def start(config: EngineConfig, meeting: Meeting | None = None) -> World:
    """Joins the processes that a launcher started (deepspeed, torchrun), or starts a world of one.

    Sets the CPU threads and chooses the device. May be called again in the same process. ``meeting`` is where the
    processes have met already, if they have.
    """
    device = choose_device(config)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    if device.type == "cuda":
        torch.cuda.set_device(device)

    _import_deepspeed()
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        if meeting is None and is_launched():
            meeting = Meeting(PATIENCE_S)
            _check_arrivals(meeting, meeting.arrive(backend, PATIENCE_S, notices=True))
        if meeting is not None:
            store = dist.PrefixStore("group", meeting.store)
            longest = datetime.timedelta(seconds=config.stall_seconds + 60)  # before, the watchdog says what is wrong
            dist.init_process_group(backend, timeout=longest, store=store, rank=meeting.rank, world_size=meeting.size)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave)
    _import_deepspeed().init_distributed(auto_mpi_discovery=False, verbose=False)
    return World(dist.get_rank(), int(os.environ["LOCAL_RANK"]), dist.get_world_size(), device)


def choose_device(config: EngineConfig) -> torch.device:
    """This process's device. Raises ConfigError where it is not there."""
    on_cpu = config.device == "cpu" or (
        config.device == "auto" and (os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available())
    )
    if not on_cpu and not torch.cuda.is_available():
        raise ConfigError("engine.device=cuda, but torch finds no GPU here; use engine.device=auto or cpu")
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # oneDNN keeps a kernel for each of the last 1,024 shapes, and no two batches have the same: it never finds one
        # again, and what it keeps holds the freed tensors around it in the heap, hundreds of MB of them.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
        _keep_freed_memory()
    if not is_launched() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise EngineError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT "
            "are not all set; start with deepspeed or torchrun"
        )
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    return torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)


def _check_arrivals(meeting: Meeting, backends: Sequence[str | None]) -> None:
    """Raises :class:`EngineError` where processes are missing, or some train on GPUs and others do not."""
    missing = [rank for rank, backend in enumerate(backends) if backend is None]
    if missing:
        raise EngineError(f"{meeting.names(missing)} did not arrive within {PATIENCE_S:.0f} s")
    without = [rank for rank, backend in enumerate(backends) if backend == "gloo"]
    if 0 < len(without) < meeting.size:
        raise EngineError(
            f"{meeting.names(without)} trains on the CPU and the others on GPUs; 'python -c \"import torch; "
            "print(torch.cuda.is_available())\"' there should say True, or set engine.device=cpu for all"
        )


def _keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one, which else may pay a page fault for each 4 KiB anew."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _import_deepspeed() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed")
    # Its shared-memory all-reduce compiles for half a minute and leaves files in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _leave() -> None:
    if dist.is_initialized():
        uses_threads = dist.get_backend() == "gloo" and dist.get_world_size() > 1
        dist.destroy_process_group()
        if uses_threads:
            # Gloo's threads may still hold the last collective's tensors. They need the interpreter to let go of them,
            # and if it has begun to end by then, they abort the process: one in fifty, with everything done.
            time.sleep(0.2)


@cache
def background_group() -> dist.ProcessGroup | None:
    """All ranks, for a thread that talks to the other ranks' while training goes on. All ranks must call it."""
    return dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's ``value``, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


@contextlib.contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A block that fails on every rank where it fails on one, with the first failing rank's exception.

    Without it, the other ranks would wait for the failed one in their next collective. The block itself
    may hold no collective that only some ranks reach.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors = gather(_portable(error), group)
    if error is not None:
        raise error
    if (first := next((e for e in errors if e is not None), None)) is not None:
        raise first


def on_rank_zero(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs ``function`` on rank 0 alone; every rank gets its result or its exception."""
    results: list[T] = []
    with together(group):
        if not dist.is_initialized() or dist.get_rank() == 0:
            results.append(function())
    return gather(results, group)[0][0]


@contextlib.contextmanager
def heeding_peers() -> Iterator[None]:
    """A block in which another process's end is told in one line; the reason stands in that one's own output."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("(closed|reset) by peer|likely closed|remote worker|remote process exited", str(error)):
            raise
        raise EngineError("another process has stopped; what it printed says why") from error


def _portable(error: Exception | None) -> Exception | None:
    """The exception as other ranks can raise it."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def learning_rate(stage: StageConfig, step: int, total_steps: int) -> float:
    """The learning rate of step 0, 1, ... of ``total_steps``: a linear rise over the warm-up, whose first step
    has 1/warmup of the peak, then constant, or falling to what would be 0 at step ``total_steps``."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return stage.learning_rate
    progress = min((step - stage.warmup_steps) / max(total_steps - stage.warmup_steps, 1), 1.0)
    left = 1 - progress if stage.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return stage.learning_rate * left


def deepspeed_config(stage: StageConfig, config: EngineConfig, world: World) -> tuple[dict[str, Any], Precision]:
    """DeepSpeed's settings for a stage, the user's own file merged in, and the precision.

    Raises :class:`ConfigError` where that file contradicts a setting of ours.
    """
    section = "pretrain" if isinstance(stage, PretrainConfig) else "finetune"
    path = config.deepspeed_config
    theirs = _read_json(path) if path else {}
    precision = _resolve_precision(config, world.device, theirs)
    micro_batch = max(stage.batch_size // (world.size * stage.gradient_accumulation), 1)
    derived = f"{section}.batch_size / (ranks * {section}.gradient_accumulation)"
    ours: dict[str, tuple[Any, str]] = {
        "train_batch_size": (stage.batch_size, f"{section}.batch_size"),
        "train_micro_batch_size_per_gpu": (micro_batch, derived),
        "gradient_accumulation_steps": (stage.gradient_accumulation, f"{section}.gradient_accumulation"),
        "gradient_clipping": (stage.gradient_clipping, f"{section}.gradient_clipping"),
        "zero_optimization.stage": (config.zero_stage, "engine.zero_stage"),
        "zero_optimization.round_robin_gradients": (
            False,
            "reading whole weights and Adam's state, which DeepSpeed mistakes for one another's there",
        ),
        "zero_optimization.compute_grad_norm": (True, "skipping steps whose gradient is not finite"),
        "bf16.enabled": (precision == "bf16", "engine.precision=bf16"),
        "fp16.enabled": (precision == "fp16", "engine.precision=fp16"),
        "torch_autocast.enabled": (False, "torch_autocast, which this program leaves to engine.precision"),
        "optimizer.type": ("Adam", "the optimizer"),
        "optimizer.params.lr": (stage.learning_rate, f"{section}.learning_rate"),
        "optimizer.params.betas": (list(stage.adam_betas), f"{section}.adam_betas"),
        "optimizer.params.eps": (stage.adam_eps, f"{section}.adam_eps"),
        "optimizer.params.weight_decay": (stage.weight_decay, f"{section}.weight_decay"),
    }
    merged = _without_auto(theirs)
    for key, (value, setting) in ours.items():
        found = _look_up(merged, key)
        if found is not None and found != value:
            raise ConfigError(
                f"{path}: {key}={found!r} contradicts {setting}, which is {value!r} here; "
                f"make them agree, or leave {key} out of the file"
            )
    if "scheduler" in merged:
        raise ConfigError(
            f"{path}: 'scheduler' contradicts {section}.schedule={stage.schedule}; "
            f"take it out and set {section}.schedule and {section}.warmup_steps"
        )
    for part in ("offload_optimizer", "offload_param"):
        if _look_up(merged, f"zero_optimization.{part}.device") == "nvme":
            raise ConfigError(f"{path}: {part} to nvme is not held by checkpoints; use cpu, or engine.offload")
    for key in ("optimizer", "torch_autocast", "train_batch_size"):
        merged.pop(key, None)
    only_checked = ("zero_optimization.round_robin_gradients", "zero_optimization.compute_grad_norm")
    for key, (value, _) in ours.items():
        if not key.startswith(("optimizer", "torch_autocast", "train_batch_size", *only_checked)):
            _put(merged, key, value)
    for part in ("offload_optimizer", "offload_param")[: ("none", "optimizer", "parameters").index(config.offload)]:
        merged["zero_optimization"].setdefault(part, {"device": "cpu", "pin_memory": world.device.type == "cuda"})
    if "offload_optimizer" in merged["zero_optimization"]:
        merged.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's Adam will do
    timers = merged.setdefault("timers", {})
    timers.setdefault("throughput", {"enabled": False})  # it would wait for the GPU at every step
    return merged, precision


def _read_json(path: str) -> dict[str, Any]:
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.deepspeed_config={path}: cannot read the file ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed_config={path}: not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"engine.deepspeed_config={path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _resolve_precision(config: EngineConfig, device: torch.device, theirs: dict[str, Any]) -> Precision:
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    precision: Precision
    if config.precision != "auto":
        precision = config.precision
    elif _look_up(theirs, "fp16.enabled") is True:
        precision = "fp16"
    elif _look_up(theirs, "bf16.enabled") is True:
        precision = "bf16"
    else:
        precision = "bf16" if device.type == "cuda" and has_bf16 else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 does not run on CPU, which has no fp16 arithmetic; use engine.precision=bf16 or fp32")
    if precision == "fp16" and config.zero_stage == 0:
        raise ConfigError(
            "engine.precision=fp16 with engine.zero_stage=0: DeepSpeed does not scale the loss there; "
            "use engine.zero_stage=1 or bf16"
        )
    if precision == "bf16" and not has_bf16:
        raise ConfigError("engine.precision=bf16, but this GPU has no bf16 arithmetic; use fp16 or fp32")
    return precision


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy without the settings that are ``"auto"``: ours, or DeepSpeed's defaults, take their place."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value != "auto"
    }


def _look_up(tree: dict[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    losses: list[LossSums]
    """This rank's loss sums, one for each micro-batch, still on the device."""
    gradient_norm: float | None
    """Global norm before clipping, where it was asked for."""
    skipped: torch.Tensor
    """1 where a loss or the gradient was not finite, so that nothing has changed, else 0; the same on all ranks, still
    on the device."""


class Engine:
    """A model in training. ``losses(model, batch, dropout_seed)`` gives a micro-batch's loss sums. Rows of ``tables``,
    by name, that it fetches are trained too."""

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[[Any, Any, int | None], LossSums],
        stage: StageConfig,
        config: EngineConfig,
        world: World,
        tables: Mapping[str, ShardedTable] | None = None,
    ) -> None:
        self.model, self.world, self.zero_stage = model, world, config.zero_stage
        self.tables, self._stage = dict(tables or {}), stage
        settings, self.precision = deepspeed_config(stage, config, world)
        if self.tables and self.precision == "fp16":
            raise ConfigError(
                "engine.precision=fp16 does not work with a sharded table, whose gradients are not scaled; use bf16"
            )
        elements = sum(p.numel() for p in model.parameters())
        bucket = min(elements, LARGEST_BUCKET)
        settings["zero_optimization"].setdefault("reduce_bucket_size", bucket)
        self._accumulation = stage.gradient_accumulation
        self._forward = _Forward(model.to(world.device), losses, config.compile)
        optimizer = torch.optim.Adam(
            model.parameters(),
            lr=stage.learning_rate,
            betas=stage.adam_betas,
            eps=stage.adam_eps,
            weight_decay=stage.weight_decay,
            fused=True,
        )
        try:
            self._deepspeed, *_ = _import_deepspeed().initialize(
                model=self._forward, optimizer=optimizer, config=settings, dist_init_required=False
            )
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            if config.deepspeed_config:
                raise ConfigError(f"{config.deepspeed_config}: DeepSpeed does not accept it: {error}") from error
            raise
        self._plain = config.zero_stage == 0 and self.precision == "fp32"
        self._adam: Any = optimizer
        if not self._plain:
            optimizer.register_step_pre_hook(lambda adam, *_: self._skip_unless_finite(self._deepspeed_norm()))
        if config.zero_stage == 0 and self.precision == "bf16":
            optimizer.state.clear()  # DeepSpeed has taken a step with zero gradients, which spoils Adam's first ones
            self._deepspeed.optimizer.step = partial(_step_masters, self._deepspeed.optimizer)
        if config.zero_stage == 0 and world.size == 1:
            self._deepspeed.enable_backward_allreduce = False  # nothing to sum, and the copies cost milliseconds
        self.clock = PhaseClock(world.device)
        for table in self.tables.values():
            table.timed = partial(self.clock.during, "communication")
        self._found: list[Gradient] = []
        self._found_norm = torch.zeros((), device=world.device)
        self.collectives = Collectives(_import_deepspeed().comm.comm.cdb, self.clock)
        writer = self._deepspeed.checkpoint_engine
        writer.save = self._keep_shard
        writer.makedirs = lambda path, exist_ok=False: None
        self._deepspeed._copy_recovery_script = lambda folder: None  # model.safetensors is there instead
        self._fp32_copy: nn.Module | None = None

    def step(
        self,
        batches: Sequence[Any],
        *,
        count: float | torch.Tensor,
        learning_rate: float,
        item_learning_rate: float | None = None,
        dropout_seed: int | None = None,
        with_norm: bool = False,
    ) -> StepResult:
        """Trains on this rank's micro-batches, as many as ``gradient_accumulation``, some perhaps empty.

        ``count`` is what the loss is divided by: the samples or positions of the global batch. ``item_learning_rate``
        is that of tables, where it is another one.
        """
        if len(batches) != self._accumulation:
            raise ValueError(f"expected {self._accumulation} micro-batches, got {len(batches)}")
        engine = self._deepspeed
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.precision == "fp16":
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # steps are skipped there too
        engine.train()
        scale = self.world.size / count  # DeepSpeed averages over the ranks
        losses = []
        norm: Any = None
        for i, batch in enumerate(batches):
            self.clock.enter("forward")
            loss = engine(batch, dropout_seed)
            self.clock.enter("backward")
            losses.append(self._forward.take())
            # A loss that is not finite makes the gradient so too, on all ranks. And a new tensor: on the forward's own
            # output, DeepSpeed divides by the accumulation all the same.
            engine.backward(loss * (scale * (1 + 0 * loss.detach())), scale_wrt_gas=False)
            if self.tables and i == len(batches) - 1:
                self._collect()
            if self._plain and i == len(batches) - 1:
                norm = _norm_of([p.grad for p in self.model.parameters() if p.grad is not None])
                self._skip_unless_finite(norm)
            self.clock.enter("optimizer")
            engine.step()
        self.clock.enter("other")
        if getattr(engine.optimizer, "overflow", False):  # DeepSpeed has left the step out without asking Adam
            self._adam.found_inf = torch.ones((), device=self.world.device)
        if self.tables:
            self._update_tables(learning_rate if item_learning_rate is None else item_learning_rate)
        norm = float(norm if self._plain else self._deepspeed_norm()) if with_norm else None
        if norm is not None and self.tables:
            norm = math.hypot(norm, float(self._found_norm))
        return StepResult(losses, norm, self._adam.found_inf)

    @property
    def table_bytes_sent(self) -> int:
        """By this rank, for rows of tables."""
        return sum(table.bytes_sent for table in self.tables.values())

    def table_shards(self, *, copied: bool) -> dict[str, dict[str, torch.Tensor]]:
        """This rank's rows on the host, by the names of the files that it is to write: those that training goes on
        with, or copies."""
        return {
            f"{name}-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors": {
                key: values.to("cpu", copy=copied) for key, values in table.tensors().items()
            }
            for name, table in self.tables.items()
        }

    def _deepspeed_norm(self) -> torch.Tensor | float:
        """The norm of the gradient over all ranks, infinite where DeepSpeed found it so."""
        norm: torch.Tensor | float = self._deepspeed.optimizer._global_grad_norm
        return norm

    def _skip_unless_finite(self, norm: torch.Tensor | float) -> None:
        """Has Adam, whose kernel reads it on the device, leave weights and state as they are where ``norm`` is not
        finite."""
        norm = torch.as_tensor(norm, device=self.world.device) + 0 * self._found_norm
        self._adam.found_inf = (~torch.isfinite(norm)).float()

    def _collect(self) -> None:
        """Brings the gradients of tables' rows home, as DeepSpeed does the others, and finds their norm."""
        self._found = [table.collect() for table in self.tables.values()]
        for found in self._found:
            found.values.div_(self.world.size)
        norms = torch.stack([found.squared_norm().to(self.world.device) for found in self._found])
        if self.world.size > 1:
            with self.clock.during("communication"):
                dist.all_reduce(norms)
        self._found_norm = norms.sum().sqrt()
        if limit := self._stage.gradient_clipping:
            for found, norm in zip(self._found, norms.sqrt(), strict=True):
                found.values.mul_((limit / (norm + 1e-6)).clamp(max=1).to(found.values.device))

    def _update_tables(self, learning_rate: float) -> None:
        """Changes the rows that have a gradient, unless the step is skipped."""
        found, self._found = self._found, []
        if bool(self._adam.found_inf):
            return
        stage = self._stage
        for table, gradient in zip(self.tables.values(), found, strict=True):
            settings = Settings(learning_rate, table.steps + 1, stage.adam_betas, stage.adam_eps)
            table.update(gradient, settings, weight_decay=stage.weight_decay)

    @property
    def loss_scale_may_fall(self) -> bool:
        """Whether a step in fp16 that was skipped may have been so for its loss scale alone."""
        if self.precision != "fp16":
            return False
        scaler = self._deepspeed.optimizer.loss_scaler
        return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)

    def fp32_weights(self, *, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """The master weights under the model's own names, on CPU; only rank 0 has them unless ``everywhere``.

        All ranks must call it: shards are gathered one tensor at a time.
        """
        keep = everywhere or self.world.rank == 0
        weights = {}
        for name, parameter in self.model.named_parameters():
            full = self._master_weight(parameter)
            if keep:
                weights[name] = full.detach().float().cpu().clone()
        parameters = dict(self.model.named_parameters())
        for name, value in self.model.state_dict().items():
            if name not in parameters and keep:
                weights[name] = value.detach().cpu().clone()
        return weights

    def _master_weight(self, parameter: nn.Parameter) -> torch.Tensor:
        optimizer = self._deepspeed.optimizer
        if self.zero_stage == 0 and self.precision != "fp32":
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for mine, master in zip(low, high, strict=True):
                    if mine is parameter:
                        return master
        if self.zero_stage == 3 or (self.zero_stage and self.precision != "fp32"):
            from deepspeed.utils import safe_get_full_fp32_param

            full: torch.Tensor = safe_get_full_fp32_param(parameter)
            return full
        return parameter

    def whole_model(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A model with the whole fp32 weights on this rank, for evaluation: the trained one where it is whole and
        fp32, else one from ``make``, which is kept and refreshed. All ranks must call it."""
        if self.precision == "fp32" and self.zero_stage < 3:
            return self.model
        if self._fp32_copy is None:
            self._fp32_copy = make().to(self.world.device)
        self._fp32_copy.load_state_dict(self.fp32_weights(everywhere=True))
        return self._fp32_copy

    def shards(self, copies: HostCopies | None = None) -> dict[str, Any]:
        """DeepSpeed's state, by the names of the files that this rank is to write with ``torch.save``: the tensors
        that training goes on with, or ``copies`` of them. All ranks must call it."""
        self._shards: dict[str, Any] = {}
        self._deepspeed.save_checkpoint("nowhere", tag="none", save_latest=False)
        return self._shards if copies is None else copies.of(self._shards)

    def load_shards(self, folder: Path) -> None:
        """Restores what :meth:`shards` gave, at the same world size (any under stage 0) and ZeRO stage."""
        path, _ = self._deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise EngineError(f"{folder}: DeepSpeed found no checkpoint in it")

    def load_tensors(self, weights: Mapping[str, torch.Tensor], adam: AdamState) -> None:
        """Restores whole fp32 weights and Adam's state, whatever world size and ZeRO stage they were saved with. All
        ranks must call it, with the same."""
        optimizer = self._deepspeed.optimizer
        if self.zero_stage == 3:
            optimizer.checkpoint_event_prologue()  # every parameter is only its parts from here on
        if self.zero_stage and adam.step is not None:
            flat = optimizer.fp32_partitioned_groups_flat if self.zero_stage == 3 else None
            for part in optimizer.single_partition_of_fp32_groups if flat is None else flat:
                moments = {key: torch.zeros_like(part) for key in MOMENTS}
                optimizer.optimizer.state[part] = {"step": adam.step.clone().to(part.device), **moments}
            if flat is None:
                optimizer._lazy_init_hp_params_optimizer_state()
        if self.zero_stage and adam.loss_scaler is not None:
            optimizer.loss_scaler = adam.loss_scaler
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self._put(parameter, weights[name].to(parameter.device), adam.moments(name, parameter), adam.step)
            for name, buffer in self.model.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])
        if self.zero_stage == 3:
            optimizer.checkpoint_event_epilogue()

    def _put(
        self,
        parameter: Any,
        weight: torch.Tensor,
        moments: dict[str, torch.Tensor],
        step: torch.Tensor | None,
    ) -> None:
        """Sets one parameter, its master weight and what Adam knows of it."""
        from deepspeed import utils

        if self.zero_stage == 3:
            part = self._own_part(parameter, weight)
            parameter.ds_tensor.copy_(part)
            utils.safe_set_local_fp32_param(parameter, part)
            for key, moment in moments.items():
                utils.safe_set_local_optimizer_state(parameter, self._own_part(parameter, moment), key)
            return
        parameter.copy_(weight)
        if self.zero_stage:
            utils.safe_set_full_fp32_param(parameter, weight)
            for key, moment in moments.items():
                utils.safe_set_full_optimizer_state(parameter, moment, key)
            return
        master = self._master_weight(parameter)
        master.copy_(weight)
        if moments and step is not None:
            adam = self._deepspeed.optimizer if self._plain else self._deepspeed.optimizer.optimizer
            adam.state[master] = {"step": step.clone().to(master.device), **moments}

    def _own_part(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor that ZeRO 3 cuts as it cuts ``parameter``, padded with zeros."""
        share = parameter.ds_tensor.numel()
        padded = nn.functional.pad(whole.flatten(), (0, share * self.world.size - whole.numel()))
        return padded.narrow(0, share * self.world.rank, share)

    def _keep_shard(self, state_dict: Any, path: str) -> None:
        """Takes the place of DeepSpeed's writer."""
        self._shards[Path(path).name] = state_dict

    def close(self) -> None:
        """Lets go of the model's hooks and buffers."""
        self.collectives.close()
        self._deepspeed.destroy()
        self._fp32_copy = None


class _Forward(nn.Module):
    """The loss function as a module's forward, which is what DeepSpeed trains."""

    def __init__(self, model: nn.Module, losses: Callable[[Any, Any, int | None], LossSums], compiled: bool) -> None:
        super().__init__()
        self.model = model
        self._losses = torch.compile(losses, dynamic=True) if compiled else losses
        self._last: LossSums | None = None

    def forward(self, batch: Any, dropout_seed: int | None) -> torch.Tensor:
        self._last = self._losses(self.model, batch, dropout_seed)
        return self._last.total

    def take(self) -> LossSums:
        """The loss sums of the last forward pass."""
        last, self._last = self._last, None
        assert last is not None
        return last


@torch.no_grad()
def _step_masters(optimizer: Any) -> None:
    """A step of bf16 weights through their fp32 masters, in place of DeepSpeed's own, which has the host read every
    gradient."""
    weights, masters = (list(itertools.chain(*groups)) for groups in (optimizer.fp16_groups, optimizer.fp32_groups))
    low = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    gradients = [torch.empty_like(master) for master in masters]
    torch._foreach_copy_(gradients, low)
    norm = optimizer._global_grad_norm = _norm_of(gradients)
    if optimizer.clip_grad:
        torch._foreach_mul_(gradients, optimizer.clip_grad / (norm + 1e-6).clamp(min=optimizer.clip_grad))
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    optimizer.optimizer.step()
    torch._foreach_copy_(weights, masters)
    for master in masters:
        master.grad = None


def _norm_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
