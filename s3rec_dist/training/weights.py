"""Weights that need not fit into memory: read by rows, written as one safetensors file or as shards of one.

    model.safetensors                         every weight, or, where that would be larger than a shard may be,
    model-00001-of-0000K.safetensors, ...     shards, and
    model.safetensors.index.json              the shard of each tensor, as Hugging Face lays them out

A tensor that is larger than a shard is cut along its rows: ``item_embedding.weight.rows-0-8388608`` are its rows 0 to
8,388,607, and its parts one after the other are the tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from s3rec_dist.model.items import MASK_ROW
from s3rec_dist.tables.sharded import TableSpec, initial_rows

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_PATTERN = "model-*-of-*.safetensors"
TENSORS = {"items": "item_embedding.weight", "attributes": "attribute_embedding.weight"}
"""A model's own tensor for each table."""
MAX_SHARD_BYTES = 2048 << 20
"""Of a shard, and of rows that are read together, where nothing else is asked for."""
ROWS_READ = 1 << 16
"""Rows of a file that are in memory at a time."""

_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_PART = re.compile(r"(.+)\.rows-(\d+)-(\d+)")


class ShardsError(ValueError):
    """An index that does not fit its shards; the message names both."""


class StoredTensor(Protocol):
    """A tensor whose rows are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows ``begin`` to ``end``, fp32, which take no more memory than twice theirs."""

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows ``ids`` int64 [U], ascending and distinct, fp32."""


Weights = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class InMemory:
    """A tensor that is in memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.tensor[begin:end].float()

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tensor[ids].float()


@dataclass(frozen=True)
class InFile:
    """A tensor of a safetensors file, which is mapped into memory only while what was read is in use."""

    path: str
    name: str
    shape: tuple[int, ...]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return _read(self.path, self.name, begin, end).float()

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return _read(self.path, self.name, 0, self.shape[0])[ids].float()


@dataclass(frozen=True)
class Joined:
    """A tensor that was cut along its rows."""

    parts: Sequence[StoredTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def rows(self, begin: int, end: int) -> torch.Tensor:
        found = [
            part.rows(max(begin - at, 0), min(end - at, part.shape[0])) for at, part in self._overlapping(begin, end)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        if not len(ids):
            return self.rows(0, 1)[:0]
        found = []
        for at, part in self._overlapping(int(ids[0]), int(ids[-1]) + 1):
            begin, end = torch.searchsorted(ids, torch.tensor([at, at + part.shape[0]])).tolist()
            found.append(part.gather(ids[begin:end] - at))
        return torch.cat(found)

    def _overlapping(self, begin: int, end: int) -> Iterator[tuple[int, StoredTensor]]:
        """(first row, part) of those that have rows from ``begin`` to ``end``."""
        at = 0
        for part in self.parts:
            if begin < at + part.shape[0] and at < end:
                yield at, part
            at += part.shape[0]


@dataclass(frozen=True)
class Slice:
    """Rows ``begin`` to ``end`` of a tensor."""

    stored: StoredTensor
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.end - self.begin, *self.stored.shape[1:])

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.stored.rows(self.begin + begin, self.begin + end)

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return self.stored.gather(ids + self.begin)


@dataclass(frozen=True)
class FirstRows:
    """Rows ``begin`` to ``end`` of a sharded table, as they are at first."""

    spec: TableSpec
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.end - self.begin, self.spec.features)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.gather(torch.arange(begin, end))

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        result = torch.empty(len(ids), self.spec.features)
        for values, own in zip(result.split(ROWS_READ), ids.split(ROWS_READ), strict=True):
            values.copy_(initial_rows(self.spec, own + self.begin))
        return result


@dataclass(frozen=True)
class TableRows:
    """A model's own tensor made of a sharded table's rows, which a checkpoint's files have in any order: each reading
    goes through all of them. Rows that were never allotted are as they would be at first."""

    spec: TableSpec
    files: Sequence[str]
    is_of_items: bool
    """Then it is [N + 2, E]: padding's row is zeros, and the mask token's the last."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.spec.rows + self.is_of_items, self.spec.features)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.gather(torch.arange(begin, end))

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        mask = self.spec.rows if self.is_of_items else MASK_ROW
        result = torch.zeros(len(ids), self.spec.features)
        is_made = (ids == 0) & self.is_of_items
        for file in self.files:
            with safe_open(file, framework="pt") as stored:
                count = stored.get_slice("ids").get_shape()[0]
            for begin in range(0, count if len(ids) else 0, ROWS_READ):
                end = min(begin + ROWS_READ, count)
                found = _read(file, "ids", begin, end)
                found = found.masked_fill(found == MASK_ROW, mask)
                places = torch.searchsorted(ids, found).clamp_(max=len(ids) - 1)
                wanted = (ids[places] == found).nonzero().squeeze(1)
                if len(wanted):
                    places = places[wanted]
                    result[places] = _read(file, "rows", begin, end)[wanted].float()
                    is_made[places] = True
        for places in (~is_made).nonzero().squeeze(1).split(ROWS_READ):
            own = ids[places]
            result[places] = initial_rows(self.spec, own.masked_fill(own == mask, MASK_ROW))
        return result


@dataclass(frozen=True)
class StoredRows:
    """Rows of items [N + 2, E] for a model with ``item_table="sharded"`` that is only used."""

    stored: StoredTensor

    def fetch(self, ids: torch.Tensor) -> torch.Tensor:
        """As :class:`s3rec_dist.model.items.RowTable` has it, on the CPU."""
        ids, order = ids.masked_fill(ids == MASK_ROW, self.stored.shape[0] - 1).sort()
        rows = self.stored.gather(ids)
        result = torch.empty_like(rows)
        result[order] = rows
        return result


def _read(path: str, name: str, begin: int, end: int) -> torch.Tensor:
    """Rows of a file's tensor, mapped into memory for as long as they are referred to."""
    with safe_open(path, framework="pt") as stored:
        tensor: torch.Tensor = stored.get_slice(name)[begin:end]
        return tensor


def in_file(path: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file."""
    with safe_open(path, framework="pt") as stored:
        return {
            name: InFile(path, name, tuple(stored.get_slice(name).get_shape()))
            for name in stored.keys()  # noqa: SIM118
        }


def is_weights_file(name: str) -> bool:
    """Whether it is the name of a file that :func:`write_weights` writes."""
    return name in (WEIGHTS, INDEX) or bool(_SHARD.fullmatch(name))


def in_shards(index: str, at_hand: Callable[[str], str]) -> dict[str, StoredTensor]:
    """The tensors of the shards that the local file ``index`` names, which ``at_hand`` makes local paths of. Raises
    :class:`ShardsError` where they do not fit together."""
    try:
        shard_of = json.loads(Path(index).read_text("utf-8"))["weight_map"]
        names = sorted(set(shard_of.values()))
        is_right = all(isinstance(name, str) and _SHARD.fullmatch(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_right = False
    if not is_right:
        raise ShardsError("not an index that names shards of a model")
    found: dict[str, StoredTensor] = {}
    for name in names:
        own = in_file(at_hand(name))
        named = {tensor for tensor, shard in shard_of.items() if shard == name}
        if differing := sorted(named ^ own.keys()):
            raise ShardsError(f"does not name the tensors that {name} has, as for {differing[0]}")
        found |= own
    return _joined(found)


def _joined(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors, of which those that were cut are whole again."""
    result: dict[str, StoredTensor] = {}
    parts: dict[str, list[tuple[int, int, StoredTensor]]] = {}
    for name, tensor in found.items():
        if cut := _PART.fullmatch(name):
            parts.setdefault(cut[1], []).append((int(cut[2]), int(cut[3]), tensor))
        else:
            result[name] = tensor
    for name, pieces in parts.items():
        at = 0
        for begin, end, tensor in sorted(pieces, key=lambda piece: piece[:2]):
            if begin != at or tensor.shape[0] != end - begin:
                raise ShardsError(f"row {at:,} of {name} is in no shard, or in two")
            at = end
        result[name] = Joined([tensor for _, _, tensor in sorted(pieces, key=lambda piece: piece[:2])])
    return result


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor under the name that they have in a file."""

    name: str
    tensor: StoredTensor
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return 4 * (self.end - self.begin) * math.prod(self.tensor.shape[1:])


def _pieces(weights: Weights, most: int) -> Iterator[_Piece]:
    for name, tensor in weights.items():
        rows = tensor.shape[0]
        step = max(1, most // max(1, 4 * math.prod(tensor.shape[1:])))
        if rows <= step:
            yield _Piece(name, tensor, 0, rows)
            continue
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            yield _Piece(f"{name}.rows-{begin}-{end}", tensor, begin, end)


def _shards(pieces: Iterable[_Piece], most: int) -> list[list[_Piece]]:
    shards: list[list[_Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + piece.bytes > most:
            shards.append([])
        shards[-1].append(piece)
    return shards


def write_weights(weights: Weights, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[str]:
    """Writes the files of the module's docstring, fp32, into ``folder``, and returns their names. One shard is in
    memory at a time."""
    shards = _shards(_pieces(weights, max_shard_bytes), max_shard_bytes)
    if len(shards) == 1:
        _save(shards[0], folder / WEIGHTS)
        return [WEIGHTS]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _save(shard, folder / name)
    shard_of = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
    size = sum(piece.bytes for shard in shards for piece in shard)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(shard_of.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return [*names, INDEX]


def _save(shard: Sequence[_Piece], path: Path) -> None:
    tensors = {piece.name: piece.tensor.rows(piece.begin, piece.end).contiguous() for piece in shard}
    save_file(tensors, path, metadata={"format": "pt"})
