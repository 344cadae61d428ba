"""A model folder in memory that answers histories, and says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from s3rec_dist.data.dataset import Dataset
from s3rec_dist.evaluation import Histories, user_vectors
from s3rec_dist.export import load_export, open_catalogue
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.recommend import Candidates
from s3rec_dist.serving.padded import PaddedEncoder
from s3rec_dist.storage import Storage


class ServeError(ValueError):
    """A model that cannot be served, or a request that cannot be answered; the message says what to change."""


@dataclass(frozen=True)
class Request:
    """What is asked for one history."""

    items: Sequence[int]
    """Item ids, oldest first, at least one."""
    k: int
    include_seen: bool = False
    exclude: Sequence[int] = ()
    """Item ids that are no candidates either."""


@dataclass(frozen=True)
class Recommendation:
    """One item and its score."""

    item: int
    score: float


@dataclass(frozen=True)
class Reason:
    """Why an item might be among the best."""

    shared: list[tuple[int, list[int]]] = field(default_factory=list)
    """(item of the history, attributes that both have, rarer ones first), the most recent first."""
    similarity: list[float] = field(default_factory=list)
    """Cosine of the item's vector with each of the history's."""


class Recommender:
    """Answers from one model, to any thread."""

    def __init__(self, model: S3Rec, catalogue: Dataset, names: Mapping[str, str] | None = None) -> None:
        self.model, self.catalogue = model.eval(), catalogue
        with torch.no_grad():
            self.candidates = Candidates.of(model, catalogue)
        table = catalogue.items_table()
        self.raw: list[str] = table.column("raw").to_pylist()
        self.counts = table.column("count").to_numpy()
        self.ids = catalogue.item_ids()
        names = names or {}
        self.names = [names.get(raw, raw) for raw in self.raw]
        self._lower = [f"{raw}\n{name}".lower() for raw, name in zip(self.raw, self.names, strict=True)]
        self._by_count = np.argsort(-self.counts, kind="stable")
        attributes = catalogue.attributes_table()
        self.attributes = list(
            zip(attributes.column("field").to_pylist(), attributes.column("raw").to_pylist(), strict=True)
        )
        """(field, raw) of attribute a + 1."""
        self._of_items = catalogue.item_attributes()
        self._owners = np.bincount(self._of_items.values, minlength=len(self.attributes) + 1)
        self._encoder = PaddedEncoder(model).eval()

    @classmethod
    def load(cls, folder: str, storage: Storage, names: Mapping[str, str] | None = None) -> Recommender:
        """That of a model folder or URL; ``names`` of items by raw id. Raises :class:`ServeError`."""
        catalogue = open_catalogue(folder, storage=storage)
        if catalogue is None:
            raise ServeError(f"{folder}: has no catalogue, so its items have no ids; import it again with --dataset")
        return cls(load_export(folder, storage), catalogue, names)

    def recommend(self, requests: Sequence[Request]) -> list[list[Recommendation]]:
        """The best items for each request, best first, as ``s3rec recommend`` has them."""
        histories = _histories([request.items for request in requests])
        rows, items = [], []
        for row, request in enumerate(requests):
            own = [*request.exclude, *(() if request.include_seen else request.items)]
            rows += [row] * len(own)
            items += own
        left_out = np.array(rows, dtype=np.int64), np.array(items, dtype=np.int64)
        with torch.no_grad():
            users = user_vectors(self.model, histories, "cpu")
            best, scores = self.candidates.best(users, max(request.k for request in requests), left_out)
        return [
            [
                Recommendation(int(item), float(score))
                for item, score in zip(best[row][: request.k], scores[row][: request.k], strict=True)
                if score > -np.inf
            ]
            for row, request in enumerate(requests)
        ]

    def attention(self, items: Sequence[int]) -> list[float]:
        """What the last layer's attention puts on each item of a history, mean over heads; sums to 1. Items before the
        latest ``max_length`` have 0."""
        latest = list(items)[-self.model.config.max_length :]
        with torch.no_grad():
            shares = self._encoder.attention(torch.tensor([latest]), torch.tensor([len(latest)]))
        found: list[float] = shares[0].mean(0).tolist()
        return [0.0] * (len(items) - len(latest)) + found

    def reasons(self, history: Sequence[int], items: Sequence[int]) -> list[Reason]:
        """What each of ``items`` has in common with the items of ``history``."""
        vectors = torch.nn.functional.normalize(self.model.item_embedding.weight.detach(), dim=1)
        cosines = (vectors[list(items)] @ vectors[list(history)].T).tolist()
        of_history = {item: self.attributes_of(item) for item in reversed(history)}
        found = []
        for item, own in zip(items, cosines, strict=True):
            mine = set(self.attributes_of(item))
            shared = [(other, [a for a in theirs if a in mine]) for other, theirs in of_history.items()]
            found.append(Reason([(other, both) for other, both in shared if both], own))
        return found

    def attributes_of(self, item: int) -> list[int]:
        """An item's attribute ids, rarer ones first."""
        offsets = self._of_items.offsets
        own = self._of_items.values[offsets[item] : offsets[item + 1]]
        return sorted(own.tolist(), key=self._owners.__getitem__)

    def search(self, text: str, limit: int) -> list[int]:
        """Items whose raw id or name holds ``text``, those that more users have first."""
        text = text.lower()
        found: list[int] = []
        for row in self._by_count:
            if text in self._lower[row]:
                found.append(int(row) + 1)
                if len(found) == limit:
                    break
        return found


def _histories(lists: Sequence[Sequence[int]]) -> Histories:
    ends = np.cumsum([len(items) for items in lists])
    values = np.concatenate([np.asarray(items, dtype=np.int32) for items in lists])
    starts = ends - [len(items) for items in lists]
    return Histories(pa.array([str(i) for i in range(len(lists))]), values, starts, ends)
