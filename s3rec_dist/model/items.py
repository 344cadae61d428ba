"""Vectors of items and attributes, wherever their rows lie: in the model's own tables, or in ones that are cut over the
ranks."""

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
class Vectors:
    """Those of the items, or attributes, that a pass needs."""

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
