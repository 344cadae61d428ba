"""Checkpoints as transactions: a tag is whole, or it is not there.

    RUN/checkpoints/
      step-00001200/
        deepspeed/            each rank's shard, as DeepSpeed writes it: what a run resumes from
        tables/               each rank's rows of sharded tables, with their optimizer's state
        model.safetensors     the other weights, whole and fp32, at any ZeRO stage: what everything else reads
        state.json            stage, epoch, step, best validation, settings, dataset, world size
        manifest.json         size and SHA-256 of every file above
      latest, best            the tag's name

A tag is written as ``.writing-TAG``, synced to disk, hashed, and renamed when every rank is done; then
``latest`` and ``best`` move, each by a rename. On other storage, where nothing can be renamed, every rank uploads
what it wrote, and the manifest follows last: a tag without one is not there. Old tags lose it first, and only whole
ones count among those that are kept. All this happens in a thread, on a copy of the state, while training goes on.
Loading trusts only what matches the manifest: a damaged tag is passed over, with a word about it, for the newest whole
one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from s3rec_dist.config import Config
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.formats import sha256_of, sync_file
from s3rec_dist.hashing import key_of
from s3rec_dist.model.items import MASK_ROW
from s3rec_dist.storage import DamagedFile, Storage, in_parallel
from s3rec_dist.tables import ShardedTable, TableSpec
from s3rec_dist.training.engine import (
    Engine,
    EngineError,
    background_group,
    gather,
    heeding_peers,
    on_rank_zero,
    together,
)
from s3rec_dist.training.nonfinite import check_finite
from s3rec_dist.training.relayout import read_adam_state
from s3rec_dist.training.snapshot import HostCopies
from s3rec_dist.training.weights import (
    INDEX,
    ROWS_READ,
    TENSORS,
    WEIGHTS,
    FirstRows,
    Joined,
    ShardsError,
    Slice,
    StoredTensor,
    TableRows,
    Weights,
    in_file,
    in_shards,
)

FOLDER = "checkpoints"
SHARDS, TABLES = "deepspeed", "tables"
STATE, MANIFEST = "state.json", "manifest.json"
_FORMAT = "s3rec_dist checkpoint"
WRITING, _OLD = ".writing-", ".old-"
_DESCRIBED = {"bytes": int, "sha256": str}
"""What a manifest says of a file."""


Tables = Mapping[str, ShardedTable]
TablesFor = Callable[[Mapping[str, Any]], Tables]
"""From a checkpoint's or model folder's metadata to the tables that its rows are to go into."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another shape, or cannot be written."""


@dataclass(frozen=True)
class Remote:
    """Storage that checkpoints are kept in, where that is not the local folder: it then holds them on their way."""

    url: str
    """Their folder there."""
    storage: Storage
    leads_host: bool
    """Whether this process is the one of its host that makes and fills the local folder."""

    def upload(self, draft: Path, tag: str, names: Iterable[str]) -> None:
        """Moves files of a tag from the local ``draft`` to their place."""

        def move(name: str) -> None:
            self.storage.upload(str(draft / name), f"{self.url}/{tag}/{name}")
            (draft / name).unlink()

        in_parallel(move, names)

    def fetch(self, tag: str, target: Path) -> dict[str, Any]:
        """Copies a tag to ``target`` and returns its state. Where it is damaged, raises :class:`CheckpointError` and
        leaves nothing."""
        folder = f"{self.url}/{tag}"
        try:
            with _told_as_damage():
                in_parallel(lambda file: self._download(folder, target, *file), _files_of(folder, self.storage).items())
            return _read_json(str(target / STATE), Storage())
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise

    def _download(self, folder: str, target: Path, name: str, expected: Mapping[str, Any]) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        self.storage.download(f"{folder}/{name}", str(target / name), size=expected["bytes"], sha256=expected["sha256"])

    def remove(self, tag: str) -> None:
        """Removes a tag. However far this comes, what is left is no tag."""
        self.storage.remove(f"{self.url}/{tag}/{MANIFEST}")
        self.storage.remove(f"{self.url}/{tag}")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path
    """Where its files can be read on this host."""
    source: str
    """Where it is kept, a path or URL."""
    state: dict[str, Any]
    """Its state.json."""
    damaged: tuple[str, ...] = ()
    """Newer tags that were passed over, each with the reason."""


def tag_of(step: int) -> str:
    """The tag of a step; tags sort by step."""
    return f"step-{step:08d}"


class Saver:
    """Writes a run's checkpoints into ``folder``, or by way of it to ``remote``, one at a time. In the background, a
    thread writes a copy of the state while training goes on; the copy takes as much host memory as this rank's state,
    for good.

    All ranks call every method but :meth:`outcome` alike.
    """

    def __init__(self, engine: Engine, folder: Path, remote: Remote | None = None, *, background: bool = False) -> None:
        self._engine, self._folder, self._remote = engine, folder, remote
        self._known: set[str] = set()  # tags that were written or found whole by this process
        self._copies = HostCopies() if background else None
        self._group = background_group() if background else None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[str] | None = None

    def save(self, state: Mapping[str, Any], *, keep: int, best: str | None = None) -> str:
        """Writes the tag of ``state["step"]``, then removes all but the ``keep`` newest whole ones and ``best``;
        returns the tag.

        Raises :class:`CheckpointError` on every rank where a write fails on one, Diverged where a weight is not a
        finite number; earlier checkpoints and ``latest`` are untouched then.
        """
        self.begin(state, keep=keep, best=best)
        assert self._writing is not None
        return self._writing.result()

    def begin(self, state: Mapping[str, Any], *, keep: int, best: str | None = None) -> None:
        """As :meth:`save`, in the background if there is one, once the save before is done; :meth:`outcome` tells."""
        self.wait()
        weights = self._engine.fp32_weights()
        with together():
            shards = self._engine.shards(self._copies)
            tables = self._engine.table_shards(copied=self._thread is not None)
        if self._thread is not None:
            self._writing = self._thread.submit(self._write, weights, shards, tables, state, keep, best)
            return
        self._writing = Future()
        try:
            self._writing.set_result(self._write(weights, shards, tables, state, keep, best))
        except Exception as error:
            self._writing.set_exception(error)

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        if self._writing is not None:
            wait([self._writing])

    def outcome(self) -> str | BaseException | None:
        """The tag that was written since this was last asked, or why it was not. None where there is nothing new."""
        if self._writing is None or not self._writing.done():
            return None
        done, self._writing = self._writing, None
        return done.exception() or done.result()

    def close(self) -> None:
        """Ends the thread once it has nothing to write."""
        if self._thread is not None:
            self._thread.shutdown()

    def _write(
        self,
        weights: dict[str, torch.Tensor],
        shards: Mapping[str, Any],
        tables: Mapping[str, dict[str, torch.Tensor]],
        state: Mapping[str, Any],
        keep: int,
        best: str | None,
    ) -> str:
        folder, remote, group, rank = self._folder, self._remote, self._group, self._engine.world.rank
        tag = tag_of(state["step"])
        draft = folder / f"{WRITING}{tag}"
        with heeding_peers(), together(group):
            check_finite({**weights, **{f"{name}, rows": tensors["rows"] for name, tensors in tables.items()}})
        try:
            with heeding_peers():
                with together(group):
                    _make_room(folder, draft, tag, rank, remote)
                hashes: dict[str, dict[str, Any]] = {}
                with together(group):
                    for name, tree in shards.items():
                        _write_tensors(draft / SHARDS / name, tree)
                        hashes[f"{SHARDS}/{name}"] = describe(draft / SHARDS / name)
                    for name, tensors in tables.items():
                        (draft / TABLES).mkdir(exist_ok=True)
                        save_file(tensors, draft / TABLES / name)
                        sync_file(str(draft / TABLES / name))
                        hashes[f"{TABLES}/{name}"] = describe(draft / TABLES / name)
                    if rank == 0:
                        save_file(weights, draft / WEIGHTS, metadata={"format": "pt"})
                        sync_file(str(draft / WEIGHTS))
                        _write(draft / STATE, json.dumps(dict(state), indent=1))
                        hashes |= {name: describe(draft / name) for name in (WEIGHTS, STATE)}
                    if remote is not None:
                        remote.upload(draft, tag, hashes)
                files = {name: entry for part in gather(hashes, group) for name, entry in part.items()}
                on_rank_zero(lambda: self._publish(draft, tag, files, keep, best), group)
        except Exception as error:
            if rank == 0 if remote is None else remote.leads_host:
                shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, EngineError):  # another process has stopped
                raise
            remedy = "make room or repair the disk" if remote is None else "see to the storage"
            raise CheckpointError(
                f"{remote.url if remote else folder}: could not write checkpoint {tag}: {error}. Earlier checkpoints "
                f"are whole; {remedy}"
            ) from error
        return tag

    def _publish(self, draft: Path, tag: str, files: Mapping[str, Any], keep: int, best: str | None) -> None:
        """Puts a tag in its place, and removes what is older than the ``keep`` newest whole ones."""
        folder, remote = self._folder, self._remote
        manifest = json.dumps({"format": _FORMAT, "version": 1, "files": dict(sorted(files.items()))}, indent=1)
        if remote is None:
            _write(draft / MANIFEST, manifest)
            for part in (SHARDS, TABLES):
                if (draft / part).is_dir():
                    sync_file(str(draft / part))
            sync_file(str(draft))
            target = folder / tag
            if target.exists():  # an earlier run's, passed over as damaged
                target.rename(folder / f"{_OLD}{tag}")
            draft.rename(target)
            sync_file(str(folder))
        else:
            remote.storage.write(f"{remote.url}/{tag}/{MANIFEST}", f"{manifest}\n".encode())
        self._known.add(tag)
        _point(folder, "latest", tag, remote)
        if best is not None:
            _point(folder, "best", best, remote)
        place, storage = (remote.url, remote.storage) if remote else (str(folder), Storage())
        whole = 0
        for other in _tags(place, storage):
            # Tags after this one come from steps that are being trained again.
            if other != best and (other > tag or whole >= keep):
                _remove(folder, other, remote)
            elif whole < keep and _is_whole(f"{place}/{other}", storage, hashes=other not in self._known):
                self._known.add(other)
                whole += 1


def _make_room(folder: Path, draft: Path, tag: str, rank: int, remote: Remote | None) -> None:
    """Makes the draft's folder, and clears away what saves that were killed have left."""
    if remote is None and rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.glob(f"{WRITING}*"), *folder.glob(f"{_OLD}*")]:
            shutil.rmtree(leftover)
        (draft / SHARDS).mkdir(parents=True)
    if remote is not None and remote.leads_host:
        shutil.rmtree(folder, ignore_errors=True)  # a draft, or the tag that the run has gone on from
        (draft / SHARDS).mkdir(parents=True)
    if remote is not None and rank == 0:
        for other in _tags(remote.url, remote.storage):
            if other == tag or not remote.storage.exists(f"{remote.url}/{other}/{MANIFEST}"):
                remote.remove(other)


def _remove(folder: Path, tag: str, remote: Remote | None) -> None:
    if remote is not None:
        remote.remove(tag)
        return
    old = folder / f"{_OLD}{tag}"
    (folder / tag).rename(old)
    shutil.rmtree(old)


def _is_whole(folder: str, storage: Storage, *, hashes: bool) -> bool:
    """Whether a checkpoint's files have the sizes of its manifest and, locally with ``hashes``, their contents."""
    try:
        if hashes and storage.local(folder) is not None:
            verify(folder)
        else:
            with _told_as_damage():
                files = _files_of(folder, storage)
                return all(storage.size(f"{folder}/{name}") == entry["bytes"] for name, entry in files.items())
    except CheckpointError:
        return False
    return True


def _write_tensors(path: Path, tree: Any) -> None:
    with open(path, "wb") as file:
        torch.save(tree, file)
        file.flush()
        os.fsync(file.fileno())


def _tags(folder: str, storage: Storage) -> list[str]:
    """Tags, newest first."""
    return sorted((name for name in storage.names(folder) if name.startswith("step-")), reverse=True)


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as manifests list them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(str(path))}


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _point(folder: Path, name: str, tag: str, remote: Remote | None) -> None:
    """Moves ``latest`` or ``best`` to another tag, atomically."""
    if remote is not None:
        remote.storage.write(f"{remote.url}/{name}", f"{tag}\n".encode())
        return
    draft = folder / f".{name}"
    try:
        _write(draft, tag)
        draft.replace(folder / name)
    finally:
        draft.unlink(missing_ok=True)
    sync_file(str(folder))


def newest(folder: Path, remote: Remote | None = None) -> Checkpoint | None:
    """The newest whole checkpoint, the same on all ranks; None where there has never been one. From ``remote`` it is
    copied into ``folder``, once on every host.

    Raises :class:`CheckpointError` where there are checkpoints but none is whole: starting over would hide it.
    """
    found = on_rank_zero(lambda: _newest(folder, remote))
    if found is None or remote is None:
        return found
    here = folder / found.folder.name  # hosts may have their folders for temporary files at different places
    with together():
        if remote.leads_host and not here.exists():
            remote.fetch(here.name, here)
    return dataclasses.replace(found, folder=here)


def _newest(folder: Path, remote: Remote | None) -> Checkpoint | None:
    place, storage = (remote.url, remote.storage) if remote else (str(folder), Storage())
    damaged: list[str] = []
    for tag in _tags(place, storage):
        try:
            state = remote.fetch(tag, folder / tag) if remote else verify(f"{folder}/{tag}")
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return Checkpoint(folder / tag, f"{place}/{tag}", state, tuple(damaged))
    if damaged and (remote is None or storage.exists(f"{place}/latest")):  # else they are uploads that were cut short
        raise _none_is_whole(place, damaged)
    return None


def _none_is_whole(folder: str, damaged: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder}: no checkpoint is whole; restore one, or start over with --no_resume:\n  " + "\n  ".join(damaged)
    )


def verify(folder: str) -> dict[str, Any]:
    """Compares a local checkpoint's files with its manifest and returns its state. Raises :class:`CheckpointError`
    naming the file that is missing or differs."""
    storage = Storage()
    files = _files_of(folder, storage)
    for name in files:
        with _checked(folder, name, files, storage):
            pass
    return _read_json(f"{folder}/{STATE}", storage)


def _files_of(folder: str, storage: Storage) -> dict[str, Any]:
    """Size and SHA-256 of a checkpoint's files, by name."""
    source = f"{folder}/{MANIFEST}"
    manifest = _read_json(source, storage)
    files = manifest.get("files", {})
    if manifest.get("format") != _FORMAT or manifest.get("version") != 1 or STATE not in files:
        raise CheckpointError(f"{source}: not the manifest of a checkpoint that this version writes")
    for name, entry in files.items():
        if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != _DESCRIBED:
            raise CheckpointError(f"{source}: does not say size and SHA-256 of {name}, it has changed")
    if outside := [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise CheckpointError(f"{source}: names a file outside the checkpoint, {outside[0]!r}")
    return dict(files)


def _read_json(path: str, storage: Storage) -> dict[str, Any]:
    with _told_as_damage():
        text = storage.read(path)
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return tree


@contextlib.contextmanager
def _checked(folder: str, name: str, files: Mapping[str, Any], storage: Storage) -> Iterator[str]:
    """A local path to read a folder's file from, held against what ``files`` says of it, if anything."""
    expected = files.get(name, {})
    with contextlib.ExitStack() as stack:
        with _told_as_damage():
            copy = storage.at_hand(f"{folder}/{name}", size=expected.get("bytes"), sha256=expected.get("sha256", ""))
            path = stack.enter_context(copy)
        yield path


@contextlib.contextmanager
def _told_as_damage() -> Iterator[None]:
    """What is missing or damaged, as :class:`CheckpointError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{error.filename}: is missing") from None
    except DamagedFile as error:
        raise CheckpointError(str(error)) from error


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Restores weights and optimizer. All ranks call it. The world size and ZeRO stage may differ from those of the
    run that saved it; raises :class:`CheckpointError` where the precision does."""
    state, shards = checkpoint.state, checkpoint.folder / SHARDS
    if state["precision"] != engine.precision:
        raise CheckpointError(
            f"{checkpoint.source}: was saved with precision {state['precision']}, this run has {engine.precision}; "
            f"resume with engine.precision={state['precision']}, or start over with --no_resume"
        )
    with together():
        for name, table in engine.tables.items():
            table.clear()
            _read_rows(table, [str(path) for path in sorted((checkpoint.folder / TABLES).glob(f"{name}-*"))])
            table.steps = state["tables"][name]["steps"]
    if not is_relayout(engine, state):
        with together():
            engine.load_shards(shards)
        return
    with together():
        weights = load_file(checkpoint.folder / WEIGHTS)
        names = [name for name, _ in engine.model.named_parameters()]
        adam = read_adam_state(shards, state["zero_stage"], names)
    engine.load_tensors(weights, adam)


def item_rows(checkpoint: Checkpoint) -> torch.Tensor:
    """The rows [N + 2, E] of a model's own item table, fp32."""
    stored = in_file(str(checkpoint.folder / WEIGHTS))[TENSORS["items"]]
    return stored.rows(0, stored.shape[0])


def is_relayout(engine: Engine, state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's shards are cut for another world size or ZeRO stage; uncut ones, of stage 0, fit any."""
    if state["zero_stage"] != engine.zero_stage:
        return True
    return engine.zero_stage > 0 and state["world_size"] != engine.world.size


def run_layout(engine: Engine) -> dict[str, Any]:
    """What of the engine a state.json records: how its shards are cut, and the precision, which a resumed run keeps."""
    return {"world_size": engine.world.size, "zero_stage": engine.zero_stage, "precision": engine.precision}


def tables_layout(engine: Engine) -> dict[str, Any]:
    """What a state.json records of tables, from which rows that were never allotted can be made again."""
    if not engine.tables:
        return {}
    tables = engine.tables.items()
    return {"tables": {name: {**dataclasses.asdict(table.spec), "steps": table.steps} for name, table in tables}}


def _read_rows(table: ShardedTable, files: Iterable[str], wanted: Collection[str] | None = None) -> None:
    """Puts the rows of a checkpoint's files, of any world size, that are this rank's into ``table``: all that is known
    of them, or what is ``wanted`` of it."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            ids = tensors.get_tensor("ids")
            for begin in range(0, len(ids), ROWS_READ):
                part = slice(begin, begin + ROWS_READ)
                if table.owns(ids[part]).any():
                    names = [name for name in tensors.keys() if wanted is None or name in wanted]  # noqa: SIM118
                    table.put(ids[part], {name: tensors.get_slice(name)[part] for name in names})


def load_weights(
    path: str, storage: Storage | None = None, tables: TablesFor = lambda _: {}
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Whole fp32 weights and their metadata (state.json or config.json, and ``path``), verified, without DeepSpeed.

    Where ``tables``, given the metadata, has ``"items"`` or ``"attributes"``, their rows go into this rank's part of
    that, else with the other weights, and no rank needs memory for all of them. ``path`` is as :func:`open_weights`
    takes it. Raises :class:`CheckpointError`.
    """
    weights: dict[str, torch.Tensor] = {}
    with open_weights(path, storage) as (stored, metadata), _told_as_unreadable(metadata["path"]):
        own = tables(metadata)
        for name, tensor in stored.items():
            kind = _KINDS.get(name, "")
            if kind in own:
                _put(kind, own[kind], tensor, metadata["path"])
            else:
                weights[name] = tensor.rows(0, tensor.shape[0])
    return weights, metadata


@contextlib.contextmanager
def open_weights(path: str, storage: Storage | None = None) -> Iterator[tuple[Weights, dict[str, Any]]]:
    """Whole weights that are read when they are asked for, verified already, and their metadata. Files of other storage
    are copied to this host for as long as the block lasts.

    ``path`` is the folder or URL of a run (its best checkpoint, or the newest where none is marked), a checkpoint, or
    an exported model. Raises :class:`CheckpointError`.
    """
    with contextlib.ExitStack() as stack:
        yield _open(path, storage or Storage(), stack)


def _open(path: str, storage: Storage, stack: contextlib.ExitStack) -> tuple[Weights, dict[str, Any]]:
    local = storage.local(path)
    folder = path.rstrip("/") if local is None else str(Path(local))
    if not storage.is_folder(folder):
        raise CheckpointError(f"{path}: no such folder; expected a run, a checkpoint or an exported model")
    names = storage.names(folder)
    if FOLDER in names:
        return _open_run(f"{folder}/{FOLDER}", storage, stack)
    if MANIFEST in names and STATE in names:
        return _open_tag(folder, storage, stack)
    if "config.json" in names:
        metadata = _read_json(f"{folder}/config.json", storage)
        return _open_files(folder, metadata.get("files", {}), storage, metadata, stack), {**metadata, "path": folder}
    stages = [stage for stage in ("finetune", "pretrain") if storage.is_folder(f"{folder}/{stage}/{FOLDER}")]
    hint = f"did you mean {folder}/{stages[0]}?" if stages else "expected a run, a checkpoint or an exported model"
    raise CheckpointError(f"{path}: holds no model; {hint}")


def _open_run(folder: str, storage: Storage, stack: contextlib.ExitStack) -> tuple[Weights, dict[str, Any]]:
    if "best" in storage.names(folder):
        return _open_tag(f"{folder}/{storage.read(f'{folder}/best').decode().strip()}", storage, stack)
    damaged: list[str] = []
    for tag in _tags(folder, storage):
        with contextlib.ExitStack() as attempt:
            try:
                found = _open_tag(f"{folder}/{tag}", storage, attempt)
            except CheckpointError as error:
                damaged.append(str(error))
            else:
                stack.enter_context(attempt.pop_all())
                return found
    if damaged:
        raise _none_is_whole(folder, damaged)
    raise CheckpointError(f"{folder}: holds no checkpoint yet; train first")


def _open_tag(folder: str, storage: Storage, stack: contextlib.ExitStack) -> tuple[Weights, dict[str, Any]]:
    files = _files_of(folder, storage)
    with _checked(folder, STATE, files, storage) as path:
        metadata = _read_json(path, Storage())
    return _open_files(folder, files, storage, metadata, stack), {**metadata, "path": folder}


def _open_files(
    folder: str, files: Mapping[str, Any], storage: Storage, metadata: Mapping[str, Any], stack: contextlib.ExitStack
) -> Weights:
    """The weights in a folder, held against what ``files`` says about them."""

    def at_hand(name: str) -> str:
        return stack.enter_context(_checked(folder, name, files, storage))

    with _told_as_unreadable(folder):
        try:
            weights = in_shards(at_hand(INDEX), at_hand) if INDEX in files else in_file(at_hand(WEIGHTS))
        except ShardsError as error:
            raise CheckpointError(f"{folder}/{INDEX}: {error}; export the model again") from error
        for name, described in metadata.get("tables", {}).items():
            spec = TableSpec(**{key: value for key, value in described.items() if key != "steps"})
            shards = sorted(file for file in files if file.startswith(f"{TABLES}/{name}-"))
            weights[TENSORS[name]] = TableRows(spec, [at_hand(file) for file in shards], is_of_items=name == "items")
    return weights


@contextlib.contextmanager
def _told_as_unreadable(folder: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}/{WEIGHTS}: cannot be read ({error})") from error


_KINDS = {tensor: kind for kind, tensor in TENSORS.items()}


def _put(kind: str, table: ShardedTable, stored: StoredTensor, source: str) -> None:
    """Puts the rows of a model's own tensor in a table: of items [N + 2, E] the mask token's is the last."""
    size = stored.shape[0]
    rows = size - (kind == "items")
    if table.spec.rows < rows:
        raise CheckpointError(
            f"{source}: has {rows - 1:,} {kind}, this dataset {table.spec.rows - 1:,}; take the one it was trained on"
        )
    if stored.shape[1] != table.spec.features:
        raise CheckpointError(
            f"{source}: rows of {kind} have shape [{stored.shape[1]}], this model's are [{table.spec.features}]; it "
            "follows from model.hidden_size"
        )
    if isinstance(stored, TableRows):
        _read_rows(table, stored.files, ("rows", "used_at"))  # another stage's optimizer begins anew
        table.forget_use()
        return
    for begin in range(kind == "items", size, ROWS_READ):
        values = stored.rows(begin, min(begin + ROWS_READ, size))
        ids = torch.arange(begin, begin + len(values))
        own = ids.masked_fill(ids == size - 1, MASK_ROW) if kind == "items" else ids
        table.put(own, {"rows": values})


def catalogue_of(dataset: Dataset) -> str:
    """A name for what each item id means."""
    return dataset.manifest.catalogue


@dataclass(frozen=True)
class Growth:
    """What a dataset has more than the one that a model was trained on."""

    items: int = 0
    attributes: int = 0

    def __bool__(self) -> bool:
        return bool(self.items or self.attributes)


def growth_since(metadata: Mapping[str, Any], dataset: Dataset) -> Growth:
    """What ``dataset`` has more than a model knows that the ``metadata`` of :func:`load_weights` describes. Raises
    :class:`CheckpointError` where it does not begin with the items, and if it has grown the attributes, of that."""
    if "catalogue" not in metadata:
        return Growth()
    items, attributes = metadata["n_items"], metadata["n_attributes"]
    if dataset.items_digest(items) != metadata["catalogue"]:
        raise CheckpointError(
            f"{metadata['path']}: was trained on a dataset with other items than {dataset.path}, so that its item "
            "ids mean other items; take the dataset it was trained on, a later revision of that, or a model trained "
            "on this one"
        )
    growth = Growth(dataset.n_items - items, dataset.n_attributes - attributes)
    if growth and dataset.attributes_digest(attributes) != metadata.get("attribute_catalogue"):
        raise CheckpointError(
            f"{metadata['path']}: was trained on a dataset with other attributes than {dataset.path}, so that its "
            "attribute ids mean other ones; take the dataset it was trained on, a later revision of that, or a model "
            "trained on this one"
        )
    return growth


def with_growth(weights: Weights, growth: Growth, config: Config) -> Weights:
    """``weights``, and where a dataset has grown the rows with which sharded tables would begin what is new."""
    grown = dict(weights)
    for kind, more in (("items", growth.items), ("attributes", growth.attributes)):
        name = TENSORS[kind]
        if more and name in weights:
            old = weights[name]
            last = old.shape[0]
            kept = last - (kind == "items")  # the mask token's row stays the last
            spec = TableSpec(rows=kept + more, features=config.model.hidden_size, **first_rows(config, kind))
            grown[name] = Joined([Slice(old, 0, kept), FirstRows(spec, kept, kept + more), Slice(old, kept, last)])
    return grown


def first_rows(config: Config, kind: str) -> dict[str, Any]:
    """What of a table's specification its first rows follow from; ``kind`` is items or attributes."""
    if kind == "attributes":
        return {"seed": key_of(config.seed, 1), "initial_std": config.model.initializer_range}
    std = 0.0 if config.model.item_features == "add" else config.model.initializer_range
    return {"seed": config.seed, "initial_std": std}


def fit_to_dataset(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], dataset: Dataset
) -> Growth:
    """Loads what :func:`load_weights` gave into ``model``, which was made for ``dataset``: where that has grown since,
    new items and attributes keep the rows that the model began with. Raises :class:`CheckpointError`."""
    growth = growth_since(metadata, dataset)
    if growth:
        weights = {name: _with_new_rows(name, old, model) for name, old in weights.items()}
    fit_weights(model, weights, metadata["path"])
    return growth


def _with_new_rows(name: str, old: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """A table's ``old`` rows, and what ``model`` has more; the last of the items' is the mask token's."""
    if name not in _KINDS:
        return old
    new = model.state_dict()[name]
    moved = int(_KINDS[name] == "items")
    return torch.cat((old[: len(old) - moved], new[len(old) - moved : len(new) - moved], old[len(old) - moved :]))


_SHAPE_HINTS = {
    "item_embedding.weight": ("the dataset's items plus two", "model.hidden_size"),
    "attribute_embedding.weight": ("the dataset's attributes plus one", "model.hidden_size"),
    "position_embedding.weight": ("model.max_length", "model.hidden_size"),
}


def fit_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads ``weights`` into ``model``. Raises what :func:`check_shapes` raises."""
    check_shapes(model, {name: tuple(tensor.shape) for name, tensor in weights.items()}, source)
    model.load_state_dict(dict(weights))


def check_shapes(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises :class:`CheckpointError` naming the first tensor of ``shapes`` that is missing, unknown or of another
    shape than in ``model``, and the setting behind it."""
    own = model.state_dict()
    for name in own:
        if name not in shapes:
            raise CheckpointError(
                f"{source}: has no tensor {name}, which this model needs; is {_setting_of(name)} the same?"
            )
    for name in shapes:
        if name not in own:
            raise CheckpointError(
                f"{source}: has a tensor {name}, unknown to this model; is {_setting_of(name)} the same?"
            )
    for name, tensor in own.items():
        expected, found = tuple(tensor.shape), shapes[name]
        if expected != found:
            hints = _SHAPE_HINTS.get(name, ("model.hidden_size or model.inner_size",) * 2)
            axis = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
            raise CheckpointError(
                f"{source}: {name} has shape {list(found)}, this model's is {list(expected)}; it follows from "
                f"{hints[min(axis, 1)]}"
            )


def _setting_of(name: str) -> str:
    """What decides on whether a model has the tensor ``name``."""
    return "model.item_features" if name.startswith("feature_head.") else "model.layers"
