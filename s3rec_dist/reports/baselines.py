"""Two recommenders without training, as :data:`~s3rec_dist.evaluation.Scorer`: popularity, and item-item neighbours.

Both learn from what the split leaves in the histories: all but the held-out item and what follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from s3rec_dist.data.dataset import Dataset
from s3rec_dist.evaluation import Histories, Scorer, Split, held_out
from s3rec_dist.tables.scored import WholeItems

NEIGHBOURS_KEPT = 100
_PAIRS_AT_ONCE = 2**25
_USERS_READ = 4096


class BaselineError(ValueError):
    """A baseline that cannot be computed; the message says what is missing."""


def popularity(dataset: Dataset, split: Split) -> Scorer:
    """An item's score is how often the histories have it, the same for all users."""
    counts = np.zeros(dataset.n_items + 1)
    for histories in _histories(dataset, split):
        counts += np.bincount(histories.seen()[1], minlength=len(counts))
    items = WholeItems(torch.from_numpy(counts[1:, None]).float())
    return lambda histories: (torch.ones(len(histories.users), 1), items)


def item_neighbours(
    dataset: Dataset, split: Split, neighbours: int = NEIGHBOURS_KEPT, shrinkage: float = 10.0
) -> Scorer:
    """An item's score is the sum of its similarities with the history's distinct items.

    The similarity of two items is the cosine between the sets of users who have them, common users divided by
    sqrt(users of one * users of the other) + ``shrinkage``; each item keeps its ``neighbours`` most similar ones.
    Where no similarity tells, popularity does. Needs scipy, and memory for N x ``neighbours`` numbers.
    """
    sparse = scipy_sparse()
    width = dataset.n_items + 1
    parts = []
    for histories in _histories(dataset, split):
        rows, items = histories.seen()
        parts.append(_incidence(sparse, rows, items, len(histories.users), width))
    taken = sparse.vstack(parts, format="csr")  # users x items, 0 or 1
    similar = _similarities(sparse, taken, neighbours, shrinkage)
    counts = np.asarray(taken.sum(0)).ravel()
    least = similar.data.min() if similar.nnz else 1.0
    tie_break = counts / (counts.max() + 1) * least / 2

    def score(histories: Histories) -> tuple[torch.Tensor, WholeItems]:
        rows, items = histories.seen()
        users = len(histories.users)
        scores = (_incidence(sparse, rows, items, users, width) @ similar).toarray() + tie_break
        # a user's scores are its products with unit vectors
        return torch.eye(users), WholeItems(torch.from_numpy(scores[:, 1:].T.astype(np.float32).copy()))

    return score


def _histories(dataset: Dataset, split: Split) -> Iterator[Histories]:
    return (batch.histories for batch in held_out(dataset, split, _USERS_READ))


def _incidence(sparse: Any, rows: np.ndarray, items: np.ndarray, users: int, width: int) -> Any:
    """CSR [users, width]: 1 where the user has the item."""
    matrix = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, items)), shape=(users, width))
    matrix.data[:] = 1  # repeats were added up
    return matrix


def _similarities(sparse: Any, taken: Any, neighbours: int, shrinkage: float) -> Any:
    """CSR [items, items], fp32, with at most ``neighbours`` entries a row and none on the diagonal; of equal ones the
    lower item ids stay."""
    by_item = taken.T.tocsr()
    roots = np.sqrt(np.asarray(taken.sum(0)).ravel())
    items = by_item.shape[0]
    # an item has common users with no more items than its users have
    pairs = np.cumsum(np.minimum(by_item @ np.diff(taken.indptr), items))
    blocks, begin = [], 0
    while begin < items:
        before = pairs[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(pairs, before + _PAIRS_AT_ONCE, side="right")))
        common = (by_item[begin:end] @ taken).tocoo()
        rows, columns = common.row, common.col
        keep = rows + begin != columns
        rows, columns = rows[keep], columns[keep]
        values = common.data[keep] / (roots[rows + begin] * roots[columns] + shrinkage)
        order = np.lexsort((columns, -values, rows))  # by row, best first
        rows, columns, values = rows[order], columns[order], values[order]
        place = np.arange(len(rows)) - np.searchsorted(rows, rows)
        best = place < neighbours
        kept = (values[best].astype(np.float32), (rows[best], columns[best]))
        blocks.append(sparse.csr_matrix(kept, shape=(end - begin, items)))
        begin = end
    return sparse.vstack(blocks, format="csr")


def scipy_sparse() -> Any:
    """The library. Raises :class:`BaselineError` where it is missing."""
    try:
        import scipy.sparse
    except ImportError as error:
        raise BaselineError("item-item neighbours need scipy: pip install 's3rec-dist[report]'") from error
    return scipy.sparse
