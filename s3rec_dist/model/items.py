"""The vectors of items, wherever their rows lie: in the model's own table, or in one that is cut over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

MASK_ROW = 0
"""The mask token's row in a table of rows: its own id grows with the catalogue, and padding, whose id this is, has no
vector there."""


class RowTable(Protocol):
    """Rows that do not lie in the model, as :class:`s3rec_dist.tables.ShardedTable` has them."""

    def fetch(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows [U, E] of distinct ``ids`` [U], to which a backward pass brings their gradient. A collective."""


@dataclass(frozen=True)
class ItemVectors:
    """The vectors of the items that a pass needs."""

    weight: torch.Tensor
    """[U, E]."""
    ids: torch.Tensor | None = None
    """int64 [U], ascending: the item of each row. None where row i is item i."""

    def rows(self, items: torch.Tensor) -> torch.Tensor:
        """Where the vectors of ``items`` lie, integers of the same shape."""
        return items if self.ids is None else torch.searchsorted(self.ids, items.long())

    def of(self, items: torch.Tensor) -> torch.Tensor:
        """The vectors of ``items`` [...]: [..., E]."""
        return F.embedding(self.rows(items), self.weight)


def pooled_attributes(
    ids: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """The mean of the attribute vectors of each of ``ids`` [U], zeros where it has none: [U, E]. An item's attributes
    are ``values[offsets[item]:offsets[item + 1]]``, rows of ``table`` [A, E]."""
    begins, counts = offsets[ids], offsets[ids + 1] - offsets[ids]
    ends = counts.cumsum(0)
    places = torch.arange(int(ends[-1]) if len(ids) else 0, device=ids.device)
    places += torch.repeat_interleave(begins - (ends - counts), counts)
    return F.embedding_bag(values[places], table, ends - counts, mode="mean")
