"""One training loop for both stages: ``run_pretrain(config)`` and ``run_finetune(config)``.

A stage streams packed sequences, reconstructs its samples on the training device, steps the engine, logs,
validates (fine-tuning) and writes checkpoints. Where it stands is one integer, the optimizer step: order,
reconstruction, dropout and learning rate are functions of it, so a run goes on from its newest whole
checkpoint as if it had never stopped, and a step does the same on any number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import s3rec_dist
from s3rec_dist.config import Config, ConfigError, PretrainConfig, StageConfig, flat, to_dict, to_yaml
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.order import stage_spec
from s3rec_dist.data.reconstruct import (
    FinetuneBatch,
    Popularity,
    PretrainBatch,
    SharedNegatives,
    attribute_negatives,
    finetune_batch,
    in_batch_negatives,
    pretrain_batch,
    pretrain_sizes,
    shared_negatives,
)
from s3rec_dist.data.stream import PackedSequences, Stream, sampled_items
from s3rec_dist.evaluation import evaluate
from s3rec_dist.hashing import key_of
from s3rec_dist.model.dropout import not_compiled
from s3rec_dist.model.flops import finetune_flops, pretrain_flops
from s3rec_dist.model.s3rec import Losses, S3Rec
from s3rec_dist.storage import Storage, StorageError
from s3rec_dist.tables import ShardedTable, TableSpec
from s3rec_dist.training import checkpoint
from s3rec_dist.training.checkpoint import Checkpoint, CheckpointError, Growth
from s3rec_dist.training.engine import (
    Engine,
    World,
    gather,
    heeding_peers,
    learning_rate,
    on_rank_zero,
    start,
    together,
)
from s3rec_dist.training.folder import RunFolder
from s3rec_dist.training.nonfinite import Diverged, Launched, Skips, check_finite
from s3rec_dist.training.phases import IDLE
from s3rec_dist.training.preemption import STATUS, CutShort, Preempted, Preemption
from s3rec_dist.training.preflight import agree
from s3rec_dist.training.profiling import ProfiledSteps, StepProfiler
from s3rec_dist.training.telemetry import Meter, Stragglers, Work
from s3rec_dist.training.tracking import (
    KEPT_FILES,
    METRICS_FILE,
    JsonlTracker,
    Tracker,
    clock,
    open_tracker,
    times_started,
)
from s3rec_dist.training.watchdog import Watchdog

StageName = Literal["pretrain", "finetune"]

MANY_ITEMS = 250_000
"""From here on a dense item table is slower than a sharded one, on one process or several (s3rec bench catalogue)."""

_STAGE_KEYS = {"pretrain": 1, "finetune": 2}
_NEGATIVES_KEY = 0x5A3


class TrainingError(ValueError):
    """Training that cannot go on; the message says why and what to change."""


def run_pretrain(config: Config, *, resume: bool = True, profile: ProfiledSteps | None = None) -> str:
    """Pretrains and returns the run's folder or URL, ``<output>/pretrain``. Raises :class:`Preempted`, which as a
    SystemExit ends the process with its status, where a signal calls for it."""
    with heeding_peers(), Preemption() as preemption:
        return _run(config, "pretrain", resume, preemption, profile)


def run_finetune(config: Config, *, resume: bool = True, profile: ProfiledSteps | None = None) -> str:
    """Fine-tunes and returns the run's folder or URL, ``<output>/finetune``; otherwise as :func:`run_pretrain`."""
    with heeding_peers(), Preemption() as preemption:
        return _run(config, "finetune", resume, preemption, profile)


class Task:
    """What sets one stage apart: its samples, its batches, its loss and what the loss is averaged over."""

    def __init__(
        self,
        config: Config,
        name: StageName,
        dataset: Dataset,
        device: torch.device,
        mix: Sequence[tuple[Dataset, float]] = (),
    ) -> None:
        self.name, self.config, self.dataset, self.device, self.mix = name, config, dataset, device, mix
        self.stage: StageConfig = config.pretrain if name == "pretrain" else config.finetune
        length = config.model.max_length
        if dataset.n_items <= length + 1:
            raise ConfigError(
                f"model.max_length={length} with {dataset.n_items} items: a sequence may hold all of them, and then "
                f"has no negatives; set model.max_length to at most {max(dataset.n_items - 2, 0)}"
            )
        self.spec = stage_spec(name, self.stage.samples, length)
        self.is_cold: torch.Tensor | None = None
        """bool [N + 2] on the device with ``item_features="add"``: items that training does not know."""
        if config.model.item_features == "add":
            self.is_cold = torch.from_numpy(self._unsampled_items()).to(device)
        if name == "pretrain":
            holdout = self.spec.holdout if config.pretrain.segment_negatives == "train_only" else 0
            self._segment_pool = torch.from_numpy(dataset.segment_pool(holdout)).to(device)

    @cached_property
    def fingerprint(self) -> str:
        """One name for exactly this data: the dataset's, or that of all that are mixed and their weights."""
        if not self.mix:
            return self.dataset.fingerprint
        parts = [(dataset.fingerprint, weight) for dataset, weight in [(self.dataset, 1.0), *self.mix]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _unsampled_items(self) -> np.ndarray:
        if not self.dataset.n_attributes:
            raise ConfigError(
                f"model.item_features=add, but {self.dataset.path} has no attributes; prepare it with --attributes, or "
                "set model.item_features=none"
            )
        parts = [sampled_items(dataset, self.spec) for dataset in (self.dataset, *(other for other, _ in self.mix))]
        is_cold = ~np.any(parts, 0)
        is_cold[[0, -1]] = False
        return is_cold

    def keep_trained(self, rows: torch.Tensor) -> None:
        """Of items that this stage has no samples of, those whose own ``rows`` [N + 2, E] are not zero any more are not
        cold: earlier training had them."""
        if self.is_cold is not None:
            self.is_cold &= ~rows.any(1).to(self.device)

    def keep_trained_rows(self) -> None:
        """As :meth:`keep_trained`, of the rows that a sharded table has. A collective."""
        if self.is_cold is None or "items" not in self.tables:
            return
        held = self.tables["items"].tensors()
        self.is_cold[held["ids"][held["rows"].any(1)].to(self.device)] = False
        if dist.is_initialized() and dist.get_world_size() > 1:
            agreed = self.is_cold.int()
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
            self.is_cold.copy_(agreed)

    def model(self) -> S3Rec:
        """A model with this run's initial weights."""
        config, dataset = self.config, self.dataset
        torch.manual_seed(config.seed)
        attributes = dataset.item_attributes()
        sizes = dataset.n_items, dataset.n_attributes
        model = S3Rec(config.model, *sizes, attributes, config.pretrain, config.finetune)
        model.is_cold, model.item_rows = self.is_cold, self.tables.get("items")
        model.attribute_rows = self.tables.get("attributes")
        return model

    @cached_property
    def tables(self) -> dict[str, ShardedTable]:
        """This rank's parts of the tables that lie outside of the model."""
        tables, model = {}, self.config.model
        if model.item_table == "sharded":
            tables["items"] = item_table(self.config, self.stage, self.dataset.n_items, self.device)
        if model.attribute_table == "sharded":
            tables["attributes"] = attribute_table(self.config, self.stage, self.dataset.n_attributes, self.device)
        return tables

    def stream(self, world: World) -> Stream:
        """This rank's part of the stage's batches."""
        data = self.config.data
        return Stream(
            self.dataset,
            self.spec,
            batch_size=self.stage.batch_size,
            streams=data.streams,
            seed=self.config.seed,
            rank=world.rank,
            world_size=world.size,
            shuffle_window=data.shuffle_window,
            prefetch_threads=data.prefetch_threads,
            prefetch_bytes=data.prefetch_mb << 20,
            cache_bytes=data.cache_mb << 20,
            mix=self.mix,
        )

    def batch(self, packed: PackedSequences, epoch: int) -> PretrainBatch | FinetuneBatch:
        """The samples of ``packed``, which is on the host, as they are in this epoch, on the device."""
        key = key_of(self.config.seed, _STAGE_KEYS[self.name], epoch)
        if self.name == "finetune":
            return finetune_batch(packed.to(self.device), n_items=self.dataset.n_items, key=key)
        mask_ratio = self.config.pretrain.mask_ratio
        on_cpu = self.device.type == "cpu"
        return pretrain_batch(
            packed.to(self.device),
            n_items=self.dataset.n_items,
            segment_pool=self._segment_pool,
            mask_ratio=mask_ratio,
            key=key,
            sizes=None if on_cpu else pretrain_sizes(packed, mask_ratio=mask_ratio, key=key),
        )

    def batches(self, packed: PackedSequences, epoch: int, engine: Engine) -> list[Any]:
        """This rank's micro-batches of a step."""
        batches: list[Any] = [self.batch(part, epoch) for part in packed.split(self.stage.gradient_accumulation)]
        if self.name == "pretrain" or not self._is_in_batch:
            return batches
        targets = own = self._targets(packed, engine.world.size)
        if engine.world.size > 1:
            targets = own.new_empty(engine.world.size * len(own))
            with engine.clock.during("communication"):
                dist.all_gather_into_tensor(targets, own)
        return [replace(batch, step_targets=targets) for batch in batches]

    def _targets(self, packed: PackedSequences, world_size: int) -> torch.Tensor:
        """int32 on the device: the targets of ``packed``, filled up with zeros to what a rank has at most."""
        last_only = self.config.finetune.positions == "last"
        is_target = torch.full(packed.items.shape, not last_only)
        is_target[packed.offsets[1:].long() - 1 if last_only else packed.offsets[:-1].long()] = last_only
        found = packed.items[is_target]
        most = self.stage.batch_size // world_size * (1 if last_only else self.spec.max_items - 1)
        targets = F.pad(found, (0, most - len(found)))
        return (targets.pin_memory() if self.device.type == "cuda" else targets).to(self.device, non_blocking=True)

    @property
    def _is_in_batch(self) -> bool:
        config = self.config.finetune
        return config.loss == "sampled_ce" and config.negative_sampling == "in_batch"

    def losses(self, model: S3Rec, batch: Any, dropout_seed: int | None) -> Losses:
        """The stage's loss sums."""
        if self.name == "pretrain":
            return model.pretrain_losses(batch, dropout_seed, self._attribute_negatives(dropout_seed))
        return model.finetune_losses(batch, dropout_seed, self._shared_negatives(batch, dropout_seed))

    @not_compiled
    def _attribute_negatives(self, step_seed: int | None) -> torch.Tensor | None:
        """Those of a step, the same on every rank."""
        count = self.config.pretrain.attribute_negatives
        if not count:
            return None
        key = key_of(step_seed or 0, _NEGATIVES_KEY)
        return attribute_negatives(count, self.dataset.n_attributes, key, self.device)

    @not_compiled
    def _shared_negatives(self, batch: FinetuneBatch, step_seed: int | None) -> SharedNegatives | None:
        """Those of a step, the same on every rank."""
        config = self.config.finetune
        if config.loss != "sampled_ce":
            return None
        key = key_of(step_seed or 0, _NEGATIVES_KEY)
        if self._is_in_batch:
            assert batch.step_targets is not None and self._popularity is not None
            return in_batch_negatives(config.negatives, batch.step_targets, key, self._popularity.shares)
        return shared_negatives(config.negatives, self.dataset.n_items, key, self._popularity, self.device)

    @cached_property
    def _popularity(self) -> Popularity | None:
        """The share of all interactions that each item has, where negatives are drawn by popularity; or by batch, where
        one that another dataset of a mix has alone counts as taken once."""
        if self.config.finetune.negative_sampling == "uniform":
            return None
        counts = torch.from_numpy(self.dataset.items_table().column("count").to_numpy().astype(np.float64))
        if self._is_in_batch:
            counts.clamp_(min=1)
        return Popularity.of((counts / counts.sum()).to(self.device))

    def dropout_seed(self, step: int) -> int:
        """The same on every rank; the samples' own keys set them apart."""
        return key_of(self.config.seed, _STAGE_KEYS[self.name], 1 << 40, step)

    def count(self, packed: PackedSequences) -> int:
        """What of this rank's batch the loss is averaged over: samples, or positions in fine-tuning."""
        if self.name == "finetune" and self.config.finetune.positions == "all":
            return len(packed.items) - len(packed)
        return len(packed)

    def flops(self, work: Work) -> float:
        """The arithmetic of training on so much."""
        model, samples, tokens, squares = self.config.model, work.samples, work.tokens, work.squares
        if self.name == "pretrain":
            attributes = self.config.pretrain.attribute_negatives or self.dataset.n_attributes + 1
            masked = work.counts["mip"]
            return pretrain_flops(model, attributes, samples=samples, tokens=tokens, squares=squares, masked=masked)
        return finetune_flops(
            model,
            {"ce": self.dataset.n_items, "sampled_ce": self.config.finetune.negatives}.get(
                self.config.finetune.loss, 0
            ),
            samples=samples,
            tokens=tokens - samples,  # the last item of each is only a target
            squares=squares - 2 * tokens + samples,
            last_only=self.config.finetune.positions == "last",
        )


def item_table(config: Config, stage: StageConfig, n_items: int, device: torch.device) -> ShardedTable:
    """This rank's part of a sharded item table, whose rows are new."""
    own = {"rows": n_items + 1, "capacity": config.model.item_capacity}
    return _table(config, stage, device, **own, **checkpoint.first_rows(config, "items"))


def attribute_table(config: Config, stage: StageConfig, n_attributes: int, device: torch.device) -> ShardedTable:
    """This rank's part of a sharded attribute table, whose rows are new."""
    first = checkpoint.first_rows(config, "attributes")
    return _table(config, stage, device, rows=n_attributes + 1, **first)


def _table(config: Config, stage: StageConfig, device: torch.device, **own: Any) -> ShardedTable:
    model = config.model
    spec = TableSpec(features=model.hidden_size, optimizer=stage.item_optimizer, dtype=model.item_dtype, **own)
    place = device if model.item_device == "auto" else "cpu"
    return ShardedTable.among_ranks(spec, device=place, compute_device=device)


def open_datasets(config: Config, storage: Storage) -> list[Dataset]:
    """The dataset that is trained on, and those that are mixed in, which must know the same items."""
    data = config.data
    if data.on_bad_shard == "skip" and data.verify == "hash":
        raise ConfigError(
            "data.verify=hash stops at a damaged shard, data.on_bad_shard=skip goes on; choose one of them"
        )
    bad = data.max_bad_shards if data.on_bad_shard == "skip" else 0
    dataset = Dataset.open(data.path, storage, revision=data.revision, max_bad_shards=bad)
    others = [Dataset.open(entry.path, storage, revision=entry.revision, max_bad_shards=bad) for entry in data.mix]
    for other in others:
        if other.manifest.catalogue != dataset.manifest.catalogue:
            raise ConfigError(
                f"data.mix: {other.path} has other items than {dataset.path}; datasets are mixed only where an item "
                "has the same id in all of them"
            )
    return [dataset, *others]


def _run(config: Config, name: StageName, resume: bool, preemption: Preemption, profile: ProfiledSteps | None) -> str:
    if not config.data.path:
        raise ConfigError("data.path is empty; name the dataset to train on, a folder that 's3rec prepare' wrote")
    world = start(config.engine)
    storage = Storage(config.storage)
    with Watchdog(world, config.engine) as watchdog:
        with together():
            _check_places(config, storage)
            dataset, *others = open_datasets(config, storage)
            for each in (dataset, *others):
                if not each.max_bad_shards:
                    each.verify(world.rank, world.size, hashes=config.data.verify == "hash")
        agree(config, [dataset, *others], world.device)
        with together():
            mix = [(other, entry.weight) for other, entry in zip(others, config.data.mix, strict=True)]
            task = Task(config, name, dataset, world.device, mix)
            model = task.model()
            dataset.release_catalogue()
        with RunFolder(os.path.join(config.output, name), storage, world) as folder:
            _train(task, model, world, folder, resume, preemption, watchdog, profile)
    return folder.url


def _check_places(config: Config, storage: Storage) -> None:
    """Raises StorageError where a setting names a place that may not be used, before it is written anywhere: an URL
    that carries a secret."""
    data, wanted = config.data, (config.finetune.pretrained, config.evaluation.negatives_file)
    for place in (config.output, data.path, *(entry.path for entry in data.mix), *wanted):
        storage.local(place)


def _train(
    task: Task,
    model: S3Rec,
    world: World,
    folder: RunFolder,
    resume: bool,
    preemption: Preemption,
    watchdog: Watchdog,
    profile: ProfiledSteps | None,
) -> None:
    config, name = task.config, task.name
    found = checkpoint.newest(*folder.checkpoints) if resume else None
    with together():
        if found is not None:
            _check_same_run(config, name, task.fingerprint, found)
            if task.is_cold is not None and config.model.item_table == "dense":
                task.keep_trained(checkpoint.item_rows(found))
        elif name == "finetune":
            pretrained, growth = _load_pretrained(config, model, task.dataset, task.tables)
            if config.model.item_table == "dense":
                task.keep_trained(model.item_embedding.weight.detach())
    if not resume:
        on_rank_zero(folder.move_aside)
    on_rank_zero(lambda: _prepare_folder(folder, config))

    restarts = times_started(folder.local / METRICS_FILE)
    with together():
        tracker = open_tracker(config, name, folder.local, world.rank)
    watchdog.record = lambda facts: _record_hang(facts, tracker, folder, world)
    status = "failed"
    try:
        training = _Training(task, model, world, folder, tracker, preemption, watchdog, profile)
        try:
            training.restarts = restarts
            if found is not None:
                training.resume(found)
            elif name == "finetune":
                more = {"new_items": growth.items, "new_attributes": growth.attributes} if growth else {}
                tracker.event("pretrained", weights=pretrained, **more)
            task.keep_trained_rows()
            training.run()
            status = "finished"
        except Preempted:
            status = "preempted"
            raise
        finally:
            watchdog.working("finishing")
            training.close()
    finally:
        tracker.finish(status)
        # Where training has failed, that is the error to report; where it was preempted, the checkpoint is there.
        with contextlib.suppress(*[OSError, StorageError] if status != "finished" else []):
            folder.keep(whole=True)


def _record_hang(facts: dict[str, Any], tracker: Tracker, folder: RunFolder, world: World) -> None:
    """Writes down that a run ends because its processes wait for one another in vain."""
    if world.rank:  # rank 0, whose tracker it would be, is gone
        if folder.is_remote:
            return
        tracker = JsonlTracker(folder.local / METRICS_FILE)
    tracker.event("hang", **facts)
    tracker.finish("failed")
    folder.keep()


class _Training:
    """A stage at work."""

    def __init__(
        self,
        task: Task,
        model: S3Rec,
        world: World,
        folder: RunFolder,
        tracker: Tracker,
        preemption: Preemption,
        watchdog: Watchdog,
        profile: ProfiledSteps | None,
    ) -> None:
        self.task, self.stage, self.config = task, task.stage, task.config
        own_rate = self.stage.item_learning_rate
        self.item_stage = replace(self.stage, learning_rate=own_rate) if own_rate else None
        self.attribute_catalogue = task.dataset.attributes_digest(task.dataset.n_attributes)
        self.world, self.folder, self.tracker = world, folder, tracker
        self.preemption, self.watchdog = preemption, watchdog
        self.stream = task.stream(world)
        self.steps_per_epoch = self.stream.steps_per_epoch
        if not self.stream.samples_per_epoch:
            held_out = task.spec.holdout
            raise TrainingError(
                f"{self.config.data.path}: no sequence is long enough to train on; with its last {held_out} items held "
                f"out for validation and test, one needs {held_out + task.spec.min_items} items or more"
            )
        self.total_steps = self.stage.epochs * self.steps_per_epoch
        self.parameters = sum(p.numel() for p in model.parameters())
        self.parameters += sum(table.spec.rows * table.spec.features for table in task.tables.values())
        self.engine = Engine(model, task.losses, self.stage, self.config.engine, world, task.tables)
        self.clock = self.engine.clock
        self.meter = Meter(self.engine, task.flops)
        self.stragglers = Stragglers()
        self.profile, self.profiler = profile, StepProfiler(profile, folder.local, world.rank)
        self.saver = checkpoint.Saver(self.engine, *folder.checkpoints, background=self.stage.checkpoint_async)
        self.restarts = 0
        self.step = 0
        self.saved_step = -1
        self.save_error: BaseException | None = None
        self.saved_best: dict[str, Any] | None = None
        self.launched: Launched | None = None
        self.skips = Skips(self.engine, self.stage.max_skipped_steps)
        self.rewound_to = -1
        self.owes_epoch_end = False  # an epoch's last step is done, its validation not
        self.best: dict[str, Any] | None = None
        self.since_best = 0
        self.metrics: dict[str, float] = {}
        self.left_out: set[tuple[str, str]] = set()

    def resume(self, found: Checkpoint) -> None:
        """Goes on from a checkpoint."""
        self.load(found)
        self.skips.total = found.state.get("skipped_steps", 0)
        layout = {}
        if checkpoint.is_relayout(self.engine, found.state):
            saved_by = f"{found.state['world_size']} processes with engine.zero_stage={found.state['zero_stage']}"
            layout = {"saved_by": saved_by}
        self.tracker.event("resume", step=self.step, checkpoint=found.folder.name, **layout)

    def load(self, found: Checkpoint) -> None:
        """Puts everything that a step changes back to where it was at a checkpoint."""
        for reason in found.damaged:
            self.tracker.event("damaged_checkpoint", reason=reason, used=found.folder.name)
        checkpoint.load(self.engine, found)
        state = found.state
        self.step = self.saved_step = state["step"]
        self.best, self.since_best, self.metrics = state["best"], state["since_best"], state["metrics"]
        self.owes_epoch_end = state.get("owes_epoch_end", False)
        self.saved_best = self.best

    def rewind(self, diverged: Diverged) -> None:
        """Goes back to the last checkpoint, once to each: what made training diverge may have been a fault of the
        moment."""
        self.saver.wait()
        self.tell_of_save()
        self.save_error = None
        found = checkpoint.newest(*self.folder.checkpoints)
        if found is None or found.state["step"] <= self.rewound_to:
            tried = f"{found.folder.name} has led here twice" if found else "there is no checkpoint to go back to"
            self.tracker.event("diverged", step=self.step, reason=str(diverged))
            raise TrainingError(f"{diverged}; {tried}") from diverged
        at, self.launched = self.step, None
        self.load(found)
        self.rewound_to = self.step
        self.skips.in_a_row = 0
        self.clock.enter(IDLE)
        self.clock.read()
        self.meter.reset()
        self.tracker.event("rewind", step=at, to=self.step, checkpoint=found.folder.name, reason=diverged.args[0])

    def run(self) -> None:
        """Trains to the last epoch, or until validation stops improving."""
        self.tracker.event(
            "start",
            restarts=self.restarts,
            step=self.step,
            steps=self.total_steps,
            samples_per_epoch=self.stream.samples_per_epoch,
            batch_size=self.stage.batch_size,
            processes=self.world.size,
            device=str(self.world.device),
            precision=self.engine.precision,
            zero_stage=self.engine.zero_stage,
            parameters=self.parameters,
        )
        if self.profile and (reason := self.profile.missed(self.step, self.total_steps)):
            self.tracker.event("not_profiled", reason=reason)
        if self.config.model.item_table == "dense" and self.task.dataset.n_items >= MANY_ITEMS:
            self.tracker.event("hint", items=self.task.dataset.n_items, faster="model.item_table=sharded")
        began = time.monotonic()
        self.tracker.begin(step=self.step, total_steps=self.total_steps)
        while True:
            try:
                self.train()
                break
            except Diverged as diverged:
                self.rewind(diverged)
        if self.best is not None:
            self.tracker.event("best", **{k: self.best[k] for k in ("metric", "value", "epoch")})
        epochs = round(self.step / self.steps_per_epoch, 2)
        self.tracker.event("done", epochs=epochs, took=clock(time.monotonic() - began), folder=str(self.folder))

    def train(self) -> None:
        """What is left of the run."""
        if self.owes_epoch_end:
            self.end_epoch(self.step // self.steps_per_epoch)
        while self.step < self.total_steps and not self.has_converged():
            self.train_epoch(self.step // self.steps_per_epoch)
        if self.saved_step != self.step:
            self.save()
        self.finish_save(must=True)

    def train_epoch(self, epoch: int) -> None:
        """The rest of an epoch, with what follows it: validation and checkpoint."""
        stage, task = self.stage, self.task
        order = self.stream.order(epoch)
        first = self.step % self.steps_per_epoch
        batches = self.stream.iterate(epoch, first)
        for in_epoch in range(first, self.steps_per_epoch):
            self.profiler.begin(self.step + 1)
            self.clock.enter("data")
            self.watchdog.working("reading data")
            packed = next(batches)
            self.watchdog.stepping(self.step + 1)
            self.clock.enter("reconstruct")
            self.meter.streamed(packed)
            rate = learning_rate(stage, self.step, self.total_steps)
            item_rate = learning_rate(self.item_stage, self.step, self.total_steps) if self.item_stage else None
            is_logged = (self.step + 1) % stage.log_every_steps == 0 or self.step + 1 == self.total_steps
            result = self.engine.step(
                task.batches(packed, epoch, self.engine),
                count=self.global_count(packed, order.batch_samples(in_epoch)),
                learning_rate=rate,
                item_learning_rate=item_rate,
                dropout_seed=task.dropout_seed(self.step),
                with_norm=is_logged,
            )
            self.step += 1
            self.settle()
            self.launched = Launched(self.step, result, task.count(packed))
            if is_logged:
                self.settle()
                numbers = self.meter.read()
                numbers |= {"train/learning_rate": rate, "train/epoch": self.step / self.steps_per_epoch}
                numbers |= {"train/skipped_steps": self.skips.total}
                if math.isfinite(norm := result.gradient_norm or 0.0):
                    numbers["train/gradient_norm"] = norm
                self.tracker.log(numbers, self.step)
                if slow := self.stragglers.see(numbers):
                    self.tracker.event("straggler", step=self.step, **slow)
                self.count_left_out()
            self.tracker.progress(self.step)
            if self.profile:
                self.keep_profile()
            self.tell_of_save()
            ends_epoch = in_epoch + 1 == self.steps_per_epoch
            if number := self.preemption.agreed(self.world):
                self.owes_epoch_end = ends_epoch
                self.leave(number)
            if not ends_epoch and stage.checkpoint_every_steps and self.step % stage.checkpoint_every_steps == 0:
                self.clock.enter(IDLE)
                self.save()
        self.clock.enter(IDLE)
        self.count_left_out()
        self.end_epoch(epoch + 1)

    def keep_profile(self) -> None:
        """Writes the trace of the chosen steps once they are done. A disk that has no room for it stops nothing."""
        clock = self.clock.enter(IDLE)
        self.watchdog.working("writing a profile")
        try:
            if name := self.profiler.end(self.step):
                self.folder.publish(name)
                self.tracker.event("profile", step=self.step, trace=name)
        except (OSError, StorageError) as error:
            self.tracker.event("not_profiled", reason=str(error))
        self.clock.enter(clock)

    def settle(self) -> None:
        """Counts the last step, whose end a GPU may keep this process waiting for."""
        launched, self.launched = self.launched, None
        if launched is None:
            return
        if not launched.was_skipped():
            self.skips.in_a_row = 0
            self.meter.add(launched)
            return
        facts = self.skips.add(launched)
        self.tracker.event("skipped_step", **facts)
        self.skips.check(facts)

    def end_epoch(self, done: int) -> None:
        """Validates and saves where ``done`` finished epochs call for it."""
        is_last = self.step == self.total_steps
        improved = False
        self.owes_epoch_end = True
        self.finish_save()  # before another one may be the best
        if not isinstance(self.stage, PretrainConfig) and (
            done % self.config.finetune.validate_every_epochs == 0 or is_last
        ):
            improved = self.validate(done)
        self.owes_epoch_end = False
        every = self.stage.checkpoint_every_steps
        is_due = done % self.stage.checkpoint_every_epochs == 0 or (every > 0 and self.step % every == 0)
        if improved or is_last or self.has_converged() or is_due:
            self.save()
        if self.has_converged() and not is_last:
            self.tracker.event("early_stop", epoch=done, patience=self.config.finetune.patience)

    def validate(self, epoch: int) -> bool:
        """Evaluates on the validation items; whether the metric is the best so far."""
        metric = self.config.finetune.metric
        self.settle()
        self.watchdog.working("validating")
        model = self.engine.whole_model(self.task.model)
        check_finite(model.state_dict())
        if tables := self.task.tables:
            with together():
                check_finite({f"rows of {name}": table.tensors()["rows"] for name, table in tables.items()})
        model.eval()
        assert isinstance(model, S3Rec)
        try:
            with torch.no_grad(), self._minding_batches(model.blocks[0]):
                result = evaluate(model, self.task.dataset, self.config.evaluation, "validation", self.world.device)
        except CutShort as cut:
            self.leave(cut.number)
        self.metrics = dict(result.metrics)
        self.tracker.log({f"validation/{name}": value for name, value in self.metrics.items()}, self.step)
        value = self.metrics[metric]
        if self.best is not None and not value > self.best["value"]:
            self.since_best += 1
            return False
        self.since_best = 0
        self.best = {"metric": metric, "value": value, "epoch": epoch, "step": self.step, "metrics": self.metrics}
        return True

    @contextlib.contextmanager
    def _minding_batches(self, block: nn.Module) -> Iterator[None]:
        """A validation: each batch, which goes through ``block``, is progress, and heeds a signal; where all ranks
        rank the same users, together."""
        hook = block.register_forward_pre_hook(lambda *_: self.watchdog.working("validating"))
        try:
            with self.preemption.cutting_short(block, self.world if "items" in self.task.tables else None):
                yield
        finally:
            hook.remove()

    def has_converged(self) -> bool:
        """Whether early stopping ends the run."""
        patience = self.config.finetune.patience if self.task.name == "finetune" else 0
        return 0 < patience <= self.since_best

    def global_count(self, packed: PackedSequences, samples: int) -> float | torch.Tensor:
        """What the loss of the global batch is divided by; ``samples`` is the batch's size over all ranks."""
        whole = not self.task.dataset.max_bad_shards  # no samples may be missing
        if whole and (self.task.name == "pretrain" or self.config.finetune.positions == "last"):
            return samples
        own = self.task.count(packed)
        if self.world.size == 1:
            return max(own, 1)
        total = torch.full((), float(own), device=self.world.device)
        with self.clock.during("communication"):
            dist.all_reduce(total)
        return total.clamp(min=1)

    def count_left_out(self) -> None:
        """Tells of damaged shards that were left out since the last time, on any rank, and stops where they are too
        many."""
        datasets = [self.task.dataset, *(dataset for dataset, _ in self.task.mix)]
        limit = datasets[0].max_bad_shards
        if not limit:
            return
        own = {
            (f"{dataset.path}/{dataset.manifest.shards[dataset.index.shard[group]].path}", reason)
            for dataset in datasets
            for group, reason in list(dataset.damaged.items())
        }
        found = set().union(*gather(own))
        for shard, reason in sorted(found - self.left_out):
            self.tracker.event("left_out", step=self.step, shard=shard, reason=reason.removeprefix(f"{shard}: "))
        self.left_out |= found
        shards = sorted({shard for shard, _ in found})
        if len(shards) > limit:
            raise TrainingError(
                f"{len(shards)} shards are damaged, more than data.max_bad_shards={limit}: {', '.join(shards)}; "
                "restore them or prepare the dataset again, and run the command again to go on from the last checkpoint"
            )

    def leave(self, number: int) -> NoReturn:
        """Saves where training stands because of a signal, and ends the run."""
        preempted = Preempted(number)
        if self.saved_step != self.step:
            self.save(keep_more=1)  # should this one be written again after its validation, another is whole meanwhile
        self.finish_save(must=True)
        tag = checkpoint.tag_of(self.step)
        self.tracker.event("preempted", step=self.step, signal=preempted.signal, checkpoint=tag, status=STATUS)
        raise preempted

    def save(self, keep_more: int = 0) -> None:
        """Begins a checkpoint of where training stands."""
        self.settle()
        self.finish_save()
        dataset = self.task.dataset
        state = {
            "stage": self.task.name,
            "epoch": self.step / self.steps_per_epoch,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "best": self.best,
            "since_best": self.since_best,
            "metrics": self.metrics,
            "owes_epoch_end": self.owes_epoch_end,
            "skipped_steps": self.skips.total,
            "config": to_dict(self.config),
            "dataset_fingerprint": self.task.fingerprint,
            "catalogue": checkpoint.catalogue_of(dataset),
            "n_items": dataset.n_items,
            "n_attributes": dataset.n_attributes,
            "attribute_catalogue": self.attribute_catalogue,
            **checkpoint.run_layout(self.engine),
            **checkpoint.tables_layout(self.engine),
            "version": s3rec_dist.__version__,
        }
        best = checkpoint.tag_of(self.best["step"]) if self.best else None
        self.saved_step = self.step
        try:
            on_rank_zero(self.folder.keep)  # before the checkpoint: a run that goes on from it has what led to it
        except (OSError, StorageError) as error:
            self.tell_of_failure(error)
        else:
            self.saver.begin(state, keep=self.stage.keep_checkpoints + keep_more, best=best)
        if not self.stage.checkpoint_async:
            self.finish_save()

    def finish_save(self, *, must: bool = False) -> None:
        """Waits for the checkpoint in writing, if there is one. Training goes on without one that could not be written,
        as on a full disk, unless it ``must`` be there."""
        self.watchdog.working("saving a checkpoint")
        self.saver.wait()
        self.tell_of_save()
        error, self.save_error = self.save_error, None
        if error is None:
            return
        if not isinstance(error, (CheckpointError, OSError, StorageError)):
            raise error
        if must:
            raise CheckpointError(f"{error}. Run the command again to go on from the newest checkpoint") from error
        if self.best is not None and self.best["step"] == self.saved_step:
            self.best = self.saved_best  # the best of those that are there
        self.saved_step = -1

    def tell_of_save(self) -> None:
        """Tells of the checkpoint in writing once it is written or has failed, which all ranks heed together later."""
        outcome = self.saver.outcome()
        if isinstance(outcome, str):
            self.saved_best = self.best
            self.tracker.event("checkpoint", step=self.saved_step, tag=outcome)
        elif outcome is not None:
            self.tell_of_failure(outcome)

    def tell_of_failure(self, error: BaseException) -> None:
        """Tells that a checkpoint was not written."""
        self.save_error = error
        self.tracker.event("checkpoint_failed", step=self.saved_step, reason=str(error))

    def close(self) -> None:
        """Stops the reading and writing threads and lets go of DeepSpeed."""
        self.profiler.close()
        self.stream.close()
        self.saver.close()
        self.tell_of_save()
        self.engine.close()


def _load_pretrained(
    config: Config, model: S3Rec, dataset: Dataset, tables: Mapping[str, ShardedTable]
) -> tuple[str, Growth]:
    """Puts the weights that finetune.pretrained names into the model and its tables; returns where they came from, and
    what the dataset has more than they know."""
    wanted = config.finetune.pretrained
    if wanted == "none":
        return "none, trained from scratch", Growth()
    path = os.path.join(config.output, "pretrain") if wanted == "auto" else wanted
    try:
        weights, metadata = checkpoint.load_weights(path, dataset.storage, lambda _: tables)
    except CheckpointError as error:
        raise CheckpointError(
            f"finetune.pretrained={wanted}: {error}. Pretrain first, name a checkpoint, or set "
            "finetune.pretrained=none to train from scratch"
        ) from error
    growth = checkpoint.fit_to_dataset(model, weights, metadata, dataset)
    return str(metadata["path"]), growth


def _check_same_run(config: Config, name: StageName, fingerprint: str, found: Checkpoint) -> None:
    """Raises :class:`CheckpointError` where a checkpoint in the output folder belongs to another run."""
    state = found.state
    start_over = "take another output folder, or start over with --no_resume"
    if state["dataset_fingerprint"] != fingerprint:
        mixed = " with this data.mix" if config.data.mix or state["config"]["data"].get("mix") else ""
        raise CheckpointError(
            f"{found.source}: was trained on another dataset than {config.data.path}{mixed}, or that has changed "
            f"since; restore it, name its data.revision, {start_over}"
        )
    then = {**flat(to_dict(Config())), **flat(state["config"])}  # settings that it did not know were at their defaults
    now = flat(to_dict(config))
    schedule_follows_epochs = now[f"{name}.schedule"] != "constant"
    differ = [
        f"{key} was {then[key]!r}, is {now[key]!r}"
        for key in now
        if key in then and then[key] != now[key] and _shapes_training(key, name, schedule_follows_epochs)
    ]
    if differ:
        raise CheckpointError(
            f"{found.source}: was trained with other settings: {'; '.join(differ)}. Use the same settings, {start_over}"
        )


_FREE = {
    "data": {
        "path",
        "revision",
        "mix",  # part of the dataset's fingerprint
        "prefetch_threads",
        "prefetch_mb",
        "cache_mb",
        "verify",
        "on_bad_shard",
        "max_bad_shards",
    },
    "model": {"attention", "activation_checkpointing", "item_device"},
    "stage": {
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "checkpoint_async",
        "keep_checkpoints",
        "log_every_steps",
        "max_skipped_steps",
        "gradient_accumulation",
        "patience",
    },
    "evaluation": {"batch_users", "item_chunk", "cutoffs"},
}
"""Settings that may change when a run resumes: they change no step, or only its rounding."""


def _shapes_training(key: str, name: StageName, schedule_follows_epochs: bool) -> bool:
    """Whether a run with another value of ``key`` is another run."""
    section, _, leaf = key.rpartition(".")
    if section == name:
        return leaf not in _FREE["stage"] and (leaf != "epochs" or schedule_follows_epochs)
    if section == "evaluation":
        return name == "finetune" and leaf not in _FREE["evaluation"]
    return key == "seed" or (section in ("data", "model") and leaf not in _FREE[section])


def _prepare_folder(folder: RunFolder, config: Config) -> None:
    """Writes the settings into the run's folder, where a run that goes on finds what it has logged."""
    folder.fetch(KEPT_FILES)
    folder.local.mkdir(parents=True, exist_ok=True)
    draft = folder.local / ".config.yaml"
    draft.write_text(to_yaml(config), encoding="utf-8")
    draft.replace(folder.local / "config.yaml")
    folder.keep()
