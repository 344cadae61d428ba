"""The items of a catalogue as users are scored against them: all of them here, or this rank's part.

Over several ranks that each have a part, all rank the same users: each among its own items, then together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from s3rec_dist.tables.sharded import ShardedTable


class WholeItems:
    """Every item is here. ``vectors`` [N, E], row i of item i + 1."""

    def __init__(self, vectors: torch.Tensor) -> None:
        self.vectors = vectors

    def __len__(self) -> int:
        """Items here."""
        return len(self.vectors)

    def part(self, begin: int, end: int) -> torch.Tensor:
        """The vectors [C, E] of the items at ``begin`` to ``end``."""
        return self.vectors[begin:end]

    def places(self, items: torch.Tensor) -> torch.Tensor:
        """Where ``items`` stand, int64; -1 for those that are not here."""
        return items - 1

    def ids(self, begin: int, end: int) -> torch.Tensor:
        """The items at ``begin`` to ``end``, int64, ascending."""
        return torch.arange(begin + 1, end + 1, device=self.vectors.device)

    def of(self, items: torch.Tensor) -> torch.Tensor:
        """The vectors of ``items`` [...], here or not: [..., E]."""
        return self.vectors[items - 1]

    def summed(self, counts: torch.Tensor) -> torch.Tensor:
        """What all ranks have counted among their parts of the items."""
        return counts

    def joined(self, found: torch.Tensor) -> torch.Tensor:
        """What all ranks have found [B, k] among their parts, side by side."""
        return found


class ItemShard:
    """Items that this rank of a sharded table owns. ``complete(ids, rows)`` makes vectors of rows. All ranks call
    ``of``, ``summed`` and ``joined`` alike."""

    def __init__(self, table: ShardedTable, complete: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self._table, self._complete = table, complete
        self._first = table.rank or table.world_size  # the first own id that is an item: 0 is none

    def __len__(self) -> int:
        """Items of the rank that has most, so that all take as many parts, of which the last may be empty."""
        return -(-(self._table.spec.rows - 1) // self._table.world_size)

    def part(self, begin: int, end: int) -> torch.Tensor:
        ids = self.ids(begin, end)
        return self._made(ids, self._table.peek(ids.to(self._table.device)))

    def places(self, items: torch.Tensor) -> torch.Tensor:
        own = (items - self._first) // self._table.world_size
        return own.masked_fill(~self._table.owns(items), -1)

    def ids(self, begin: int, end: int) -> torch.Tensor:
        ids = torch.arange(begin, min(end, len(self)), device=self._table.compute_device)
        ids = ids * self._table.world_size + self._first
        return ids[ids < self._table.spec.rows]

    def of(self, items: torch.Tensor) -> torch.Tensor:
        ids, place = items.unique(return_inverse=True)
        return self._made(ids, self._table.fetch(ids))[place]

    def summed(self, counts: torch.Tensor) -> torch.Tensor:
        if self._table.world_size > 1:
            dist.all_reduce(counts)
        return counts

    def joined(self, found: torch.Tensor) -> torch.Tensor:
        world = self._table.world_size
        if world == 1:
            return found
        # A rank with fewer items has found fewer.
        width = torch.tensor(found.shape[1], device=found.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
        padded = found.new_full((len(found), int(width)), torch.iinfo(found.dtype).min)
        padded[:, : found.shape[1]] = found
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        return torch.cat(parts, 1)

    def _made(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self._complete(ids, rows.to(self._table.compute_device)).float()


Scored = WholeItems | ItemShard
