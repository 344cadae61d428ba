"""The encoder on padded histories, for runtimes that know dense tensors alone: what ONNX and ``torch.export`` get.

B histories, L padded length, E hidden size, H heads, D head size. Histories are right-padded: ``items`` int64 [B, L],
oldest first, 0 behind them, and ``lengths`` int64 [B], at least 1. The latest ``max_length`` items count.
The packed encoder in ``model/encoder.py`` is the definition; what an export computes is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from s3rec_dist.data.dataset import Dataset
from s3rec_dist.evaluation import Histories, user_vectors
from s3rec_dist.export import ExportError
from s3rec_dist.model.encoder import Block
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.recommend import Candidates, dataset_histories, is_taken

TOLERANCE = 1e-4
"""Most that a vector or score may differ from the packed encoder's, absolutely."""
CHECKED_USERS = 256

Outputs = tuple[torch.Tensor, ...]
Run = Callable[[torch.Tensor, torch.Tensor], Outputs]
"""(items [B, L], lengths [B]) -> what the exported model gives."""


class PaddedEncoder(nn.Module):
    """(items [B, L], lengths [B]) -> user vectors [B, E], whose products with the items' vectors are the scores."""

    names: tuple[str, ...] = ("vector",)
    """Of the outputs."""

    def __init__(self, model: S3Rec) -> None:
        super().__init__()
        self.config = model.config
        self.item_embedding, self.position_embedding = model.item_embedding, model.position_embedding
        self.embedding_norm, self.blocks = model.embedding_norm, model.blocks

    def forward(self, items: torch.Tensor, lengths: torch.Tensor) -> Outputs:
        """See the class."""
        newest, x, mask = self._before_last_block(items, lengths)
        return (_block(self.blocks[-1], newest, x, mask)[:, 0],)

    def attention(self, items: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What the last block's attention at the newest item puts on each item of the history, [B, H, L]; sums to 1."""
        newest, x, mask = self._before_last_block(items, lengths)
        q, k, _ = _projections(self.blocks[-1], newest, x)
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + mask[:, None]
        return scores.softmax(3)[:, :, 0]

    def _before_last_block(
        self, items: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states of the newest item [B, 1, E] and of all [B, L, E], and what the newest may see [B, 1, L]."""
        most = self.config.max_length
        place = torch.arange(items.shape[1], device=items.device)
        first = (lengths - most).clamp(min=0)[:, None]  # of the items that count
        counts = (place >= first) & (place < lengths[:, None])  # [B, L]
        start = most - lengths[:, None] if self.config.position_alignment == "end" else -first
        x = self.item_embedding(items) + self.position_embedding((place + start).clamp(0, most - 1))
        x = self.embedding_norm(x)
        # finite: a row that sees nothing must not make NaN, which zero probability would not hide
        hidden = torch.finfo(x.dtype).min / 2
        earlier = counts[:, None, :] & (place <= place[:, None])  # [B, query, key]
        mask = torch.zeros_like(earlier, dtype=x.dtype).masked_fill(~earlier, hidden)
        for block in self.blocks[:-1]:
            x = _block(block, x, x, mask)
        last = (lengths - 1)[:, None, None]
        newest = x.gather(1, last.expand(-1, 1, x.shape[2]))
        return newest, x, mask.gather(1, last.expand(-1, 1, mask.shape[2]))


def _block(block: nn.Module, queries: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A block's output [B, Q, E] for ``queries`` [B, Q, E] over ``x`` [B, L, E]; ``mask`` [B, Q, L] is added to the
    attention scores."""
    assert isinstance(block, Block)
    q, k, v = _projections(block, queries, x)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    x = block.attention_norm(queries + block.attention_output(attended.transpose(1, 2).flatten(2)))
    y: torch.Tensor = block.output_norm(x + block.inner_output(F.gelu(block.inner(x))))
    return y


def _projections(block: nn.Module, queries: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q [B, H, Q, D] of ``queries``, k and v [B, H, L, D] of ``x``."""
    assert isinstance(block, Block)
    e, heads = block.config.hidden_size, block.config.heads
    weight, bias = block.qkv.weight, block.qkv.bias
    q, (k, v) = F.linear(queries, weight[:e], bias[:e]), F.linear(x, weight[e:], bias[e:]).split(e, 2)
    return tuple(rows.unflatten(2, (heads, e // heads)).transpose(1, 2) for rows in (q, k, v))


class PaddedRecommender(nn.Module):
    """(items [B, L], lengths [B]) -> the best K items' ids int64 and scores fp32, [B, K] each, best first.

    As ``s3rec recommend`` has it: candidates are items that somebody has taken, less those of the history, all L of
    it; where no more are left the score is minus infinity.
    """

    names = ("item", "score")
    closed: torch.Tensor
    """fp32 [1, N + 2]: minus infinity where a row of the table is no candidate."""

    def __init__(self, model: S3Rec, dataset: Dataset, k: int) -> None:
        super().__init__()
        self.encoder, self.k = PaddedEncoder(model), k
        closed = torch.full((1, dataset.n_items + 2), -torch.inf)  # padding and mask too
        closed[0, 1:-1][torch.from_numpy(is_taken(dataset))] = 0
        self.register_buffer("closed", closed)

    def forward(self, items: torch.Tensor, lengths: torch.Tensor) -> Outputs:
        """See the class."""
        (users,) = self.encoder(items, lengths)
        scores = F.linear(users, self.encoder.item_embedding.weight) + self.closed
        scores = scores.scatter(1, items, -torch.inf)
        best, ids = scores.topk(self.k)
        return ids, best


PaddedModel = PaddedEncoder | PaddedRecommender


def padded_model(model: S3Rec, dataset: Dataset, k: int) -> PaddedModel:
    """What is exported: the encoder, or with ``k`` the recommender. Raises :class:`ExportError`."""
    if not k:
        return PaddedEncoder(model).eval()
    if k < 0:
        raise ExportError(f"--top-k {k}: expected 0 or more")
    if k > dataset.n_items:
        raise ExportError(f"--top-k {k}: {dataset.path} has {dataset.n_items} items; ask for fewer")
    if dataset.n_items > MOST_RANKED:
        raise ExportError(
            f"--top-k: {dataset.path} has {dataset.n_items:,} items, and every request would score them all; it is for "
            f"at most {MOST_RANKED:,}. Export the encoder (without --top-k), and --format vectors for an index"
        )
    return PaddedRecommender(model, dataset, k).eval()


MOST_RANKED = 1_000_000
"""Items that an exported recommender may score."""


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Input to trace a model with; no size in it is 0 or 1, which would be taken for constants."""
    return torch.tensor([[1, 2, 0], [1, 2, 3]]), torch.tensor([2, 3])


def real_histories(dataset: Dataset, count: int = CHECKED_USERS) -> Histories:
    """The first users' histories: every other one whole, the rest cut to lengths that go round, from 1 upwards."""
    users: list[str] = []
    parts: list[np.ndarray] = []
    for part in dataset_histories(dataset):
        for i, user in enumerate(part.users[: count - len(users)].to_pylist()):
            own = part.values[part.starts[i] : part.ends[i]]
            place = len(users) // 2
            parts.append(own if len(users) % 2 else own[: 1 + place % len(own)])
            users.append(user)
        if len(users) == count:
            break
    ends = np.cumsum([len(part) for part in parts])
    return Histories(pa.array(users), np.concatenate(parts), ends - [len(part) for part in parts], ends)


def padded(histories: Histories) -> tuple[torch.Tensor, torch.Tensor]:
    """(items [B, L], lengths [B]) of whole histories."""
    lengths = torch.from_numpy(histories.ends - histories.starts)
    items = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    inside = torch.arange(items.shape[1]) < lengths[:, None]
    values = [histories.values[a:b] for a, b in zip(histories.starts, histories.ends, strict=True)]
    items[inside] = torch.from_numpy(np.concatenate(values).astype(np.int64))
    return items, lengths


def difference(run: Run, model: S3Rec, dataset: Dataset, k: int) -> float:
    """Largest absolute difference of vectors, or of the best items' scores, between ``run`` and the packed encoder on
    real histories, in batches of 1, of a few and of all."""
    histories = real_histories(dataset)
    with torch.no_grad():
        wanted = user_vectors(model, histories, "cpu")
        if k:
            _, scores = Candidates.of(model, dataset).best(wanted, k, histories.seen())
            wanted = F.pad(torch.from_numpy(scores), (0, k - scores.shape[1]), value=-torch.inf)
    items, lengths = padded(histories)
    worst, count = 0.0, len(lengths)
    for rows in (slice(0, 1), slice(0, 4), slice(count // 2, None), slice(None)):
        found = run(items[rows, : int(lengths[rows].max())], lengths[rows])[-1].detach()
        finite = torch.isfinite(wanted[rows])
        if not torch.equal(torch.isfinite(found), finite):
            return torch.inf
        worst = max(worst, float(torch.where(finite, (found - wanted[rows]).abs(), 0).max()))
    return worst


def check(run: Run, model: S3Rec, dataset: Dataset, k: int, output: str, runtime: str) -> None:
    """Tells how far ``run`` is from the packed encoder; beyond the tolerance raises :class:`ExportError`."""
    worst = difference(run, model, dataset, k)
    what = "score" if k else "vector"
    if not worst <= TOLERANCE:
        raise ExportError(
            f"{output}: in {runtime} a {what} differs by {worst:.3g} from PyTorch's on real histories, more than "
            f"{TOLERANCE:g}; nothing was written"
        )
    users = min(CHECKED_USERS, dataset.n_rows)
    print(f"{runtime} and PyTorch on {users} histories: largest difference of a {what} {worst:.2g}")


def overlap(run: Run, model: S3Rec, dataset: Dataset, k: int) -> float:
    """Share of the packed encoder's best items (k, or 20) that are among those of ``run``, on real histories."""
    histories = real_histories(dataset)
    candidates, seen = Candidates.of(model, dataset), histories.seen()
    found = run(*padded(histories))[0].detach()
    with torch.no_grad():
        wanted, _ = candidates.best(user_vectors(model, histories, "cpu"), k or 20, seen)
        items = found.numpy() if k else candidates.best(found, 20, seen)[0]
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(wanted, items, strict=True)]))
