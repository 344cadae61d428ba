"""S3Rec: the model people use. Training runs on packed batches; RecBole's methods take padded ones.

Both go through :meth:`S3Rec.encode`. In padded input ``[B, L]`` of ``forward`` and ``pretrain`` zeros are padding, on
either side, and an item's position is its column, as in RecBole and in the reference implementation; hidden states at
padding are zeros. ``calculate_loss``, ``predict`` and ``full_sort_predict`` take right-padded histories, as RecBole
gives them, and place their items as ``position_alignment`` says, so that they score as ``s3rec evaluate`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from s3rec_dist.config import FinetuneConfig, ModelConfig, PretrainConfig
from s3rec_dist.data.dataset import ItemAttributes
from s3rec_dist.data.reconstruct import FinetuneBatch, PretrainBatch, SharedNegatives, pretrain_batch
from s3rec_dist.data.stream import PackedSequences
from s3rec_dist.hashing import hash64, keep_mask
from s3rec_dist.kernels.attribute_loss import attribute_loss, attribute_pairs
from s3rec_dist.model.dropout import DropoutKeys, not_compiled
from s3rec_dist.model.encoder import SITES_PER_BLOCK, Block, Queries, position_ids
from s3rec_dist.model.items import MASK_ROW, RowTable, Vectors
from s3rec_dist.model.layers import embed
from s3rec_dist.model.objectives import (
    binary_loss,
    pairwise_loss,
    sampled_attribute_loss,
    sampled_softmax_loss,
    softmax_loss,
)

AttributeLists = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Which attributes rows have: items, offsets and values as :func:`attribute_loss` takes them."""

ID_SITE = 1 << 10
"""Where the dropout of items' own rows stands among the sites of hashed dropout."""

ITEM_SEQ, ITEM_SEQ_LEN, ITEM_ID, NEG_ITEM_ID = "item_id_list", "item_length", "item_id", "neg_item_id"


@dataclass(frozen=True)
class Losses:
    """Loss sums of one batch."""

    total: torch.Tensor
    """Weighted sum over all terms: what is trained on, before it is divided by the batch's size."""
    terms: dict[str, torch.Tensor]
    """Unweighted sum of each task."""
    counts: dict[str, int]
    """Terms in each sum: ``terms[task] / counts[task]`` is a mean."""


class S3Rec(nn.Module):
    """S3-Rec for ``n_items`` items and ``n_attributes`` attributes.

    Item ids: 0 padding, 1..n_items, n_items + 1 the mask token. Attribute ids: 1..n_attributes; row 0 is
    unused, and a negative in every attribute loss. ``attributes`` lists each item's attributes; without it
    the attribute losses have no positives.

    With ``item_table="sharded"`` the model has no ``item_embedding``: ``item_rows``, which is to be set, has the rows;
    likewise ``attribute_table`` and ``attribute_rows``.
    """

    attribute_offsets: torch.Tensor
    attribute_values: torch.Tensor
    is_cold: torch.Tensor | None
    """bool [N + 2] with ``item_features="add"``: items never trained on, whose own rows stay zero; None for none."""

    def __init__(
        self,
        config: ModelConfig,
        n_items: int,
        n_attributes: int,
        attributes: ItemAttributes | None = None,
        pretrain: PretrainConfig | None = None,
        finetune: FinetuneConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.pretrain_config = pretrain or PretrainConfig()
        self.finetune_config = finetune or FinetuneConfig()
        self.n_items, self.n_attributes, self.mask_id = n_items, n_attributes, n_items + 1
        self.train_stage = "pretrain"
        e = config.hidden_size
        self.item_rows: RowTable | None = None
        if config.item_table == "dense":
            self.item_embedding = nn.Embedding(n_items + 2, e)
        self.attribute_rows: RowTable | None = None
        if config.attribute_table == "dense":
            self.attribute_embedding = nn.Embedding(n_attributes + 1, e)
        self.position_embedding = nn.Embedding(config.max_length, e)
        self.embedding_norm = nn.LayerNorm(e, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.aap_head = nn.Linear(e, e)
        self.mip_head = nn.Linear(e, e)
        self.map_head = nn.Linear(e, e)
        self.sp_head = nn.Linear(e, e)
        if attributes is None:
            offsets, values = torch.zeros(1, dtype=torch.int64).expand(n_items + 3), torch.zeros(0, dtype=torch.int64)
        else:
            offsets, values = torch.tensor(attributes.offsets), torch.tensor(attributes.values)
        self.register_buffer("attribute_offsets", offsets, persistent=False)
        self.register_buffer("attribute_values", values, persistent=False)
        self.register_buffer("is_cold", None, persistent=False)
        self.apply(self._initialise)
        if config.item_features == "add":
            # What an item is beyond its attributes: nothing, to begin with.
            self.feature_head = nn.Linear(e, e, bias=False)
            nn.init.eye_(self.feature_head.weight)
            if config.item_table == "dense":
                nn.init.zeros_(self.item_embedding.weight[1:-1].detach())

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def item_vectors(self, *wanted: torch.Tensor, dropout_seed: int | None = None) -> Vectors:
        """The vectors of the items in ``wanted``, or of all of them where none is named or they lie in one table as
        they are. ``dropout_seed`` turns the dropout of items' own rows on."""
        if self.config.item_table == "dense" and self.config.item_features == "none":
            return Vectors(self.item_embedding.weight)
        if not wanted:
            return self._whole(dropout_seed)
        return self._gathered(torch.cat([items.flatten().long() for items in wanted]).unique(), dropout_seed)

    @not_compiled
    def _whole(self, dropout_seed: int | None) -> Vectors:
        ids = torch.arange(self.n_items + 2, device=self.attribute_offsets.device)
        return Vectors(self.with_features(ids, self.item_embedding.weight, dropout_seed))

    @not_compiled
    def _gathered(self, ids: torch.Tensor, dropout_seed: int | None) -> Vectors:
        if self.config.item_table == "dense":
            rows = F.embedding(ids, self.item_embedding.weight)
        else:
            rows = self._fetched("item", self.item_rows, ids.masked_fill(ids == self.mask_id, MASK_ROW))
        return Vectors(self.with_features(ids, rows, dropout_seed), ids)

    def with_features(self, ids: torch.Tensor, rows: torch.Tensor, dropout_seed: int | None = None) -> torch.Tensor:
        """The vectors [U, E] of the items ``ids`` [U] whose own rows are ``rows`` [U, E]."""
        if self.config.item_features == "none":
            return rows
        if self.is_cold is not None:
            rows = rows * ~self.is_cold[ids, None]
        if dropout_seed is not None and self.config.item_id_dropout and len(ids):
            rows = rows * keep_mask(hash64(ids, dropout_seed), 1, ID_SITE, self.config.item_id_dropout, rows.dtype)
        owners, attributes = attribute_pairs(*self._attributes_of(ids))
        begins = torch.searchsorted(owners, torch.arange(len(ids), device=ids.device))
        vectors = self._attribute_vectors(attributes)
        pooled = F.embedding_bag(vectors.rows(attributes), vectors.weight, begins, mode="mean")  # zeros for none
        return rows + self.feature_head(pooled)

    def _attribute_vectors(self, wanted: torch.Tensor) -> Vectors:
        """The vectors of the attributes in ``wanted``, or of all of them where they lie in one table."""
        if self.config.attribute_table == "dense":
            return Vectors(self.attribute_embedding.weight)
        return self._gathered_attributes(wanted)

    @not_compiled
    def _gathered_attributes(self, wanted: torch.Tensor) -> Vectors:
        ids = wanted.unique()
        return Vectors(self._fetched("attribute", self.attribute_rows, ids), ids)

    def _fetched(self, kind: str, table: RowTable | None, ids: torch.Tensor) -> torch.Tensor:
        if table is None:
            raise ValueError(f"a model with {kind}_table='sharded' needs {kind}_rows, the table that has the rows")
        return table.fetch(ids).to(self.position_embedding.weight.dtype)

    @property
    def catalogue_vectors(self) -> torch.Tensor:
        """The vectors of all ids, [N + 2, E], of a model that is not sharded."""
        return self.item_vectors().weight

    def folded(self) -> S3Rec:
        """The same model for use: with ``item_features="none"``, and the items' vectors as their rows."""
        if self.config.item_features == "none":
            return self
        config = replace(self.config, item_features="none")
        sizes = self.n_items, self.n_attributes
        plain = S3Rec(config, *sizes, pretrain=self.pretrain_config, finetune=self.finetune_config)
        plain.attribute_offsets, plain.attribute_values = self.attribute_offsets, self.attribute_values
        weights = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("feature_head.")}
        plain.to(self.attribute_offsets.device).load_state_dict(
            {**weights, "item_embedding.weight": self.catalogue_vectors.detach()}
        )
        return plain.train(self.training)

    def encode(
        self,
        items: torch.Tensor,
        positions: torch.Tensor,
        offsets: torch.Tensor,
        max_length: int,
        *,
        causal: bool,
        keys: DropoutKeys | None = None,
        queries: Queries | None = None,
        vectors: Vectors | None = None,
    ) -> torch.Tensor:
        """Hidden states of packed ``items`` [T], at ``positions`` [T] of the position table: [T, E].

        With ``queries``, only their hidden states, [Q, E]; the last block then computes nothing else.
        ``keys`` turn dropout on. ``vectors`` has those of the items, where they are there already.
        """
        if max_length > self.config.max_length:
            raise ValueError(
                f"a sequence is {max_length} long, the model has {self.config.max_length} positions; cut it"
            )
        vectors = vectors or self.item_vectors(items)
        x = embed(
            vectors.rows(items),
            positions,
            vectors.weight,
            self.position_embedding,
            self.embedding_norm,
            keys=keys,
            site=0,
            p=self.config.hidden_dropout,
            backend=self.config.attention,
        )
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            site = 1 + i * SITES_PER_BLOCK
            run = partial(block, causal=causal, keys=keys, site=site, queries=queries if last else None)
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                # Dropout is hashed, so that computing again gives the same.
                x = checkpoint(run, x, offsets, max_length, use_reentrant=False, preserve_rng_state=False)
            else:
                x = run(x, offsets, max_length)
        return x

    def pretrain_losses(
        self, batch: PretrainBatch, dropout_seed: int | None = None, attribute_negatives: torch.Tensor | None = None
    ) -> Losses:
        """The four tasks on one batch, in one encoder pass. ``dropout_seed`` turns dropout on. The attribute losses are
        against all attributes, or estimates of that from ``attribute_negatives`` [S], drawn uniformly of the table."""
        tokens, samples = len(batch.original), len(batch)
        sequence = _sequence_of(batch.offsets, 4 * tokens)
        positions = position_ids(sequence, batch.offsets, self.config)
        keys = self._dropout_keys(_roles(batch.sample_keys, 4), sequence, positions, dropout_seed)
        # every hidden state of the masked-item sequences, the last one of the others
        device = batch.items.device
        queries = Queries(
            torch.cat((torch.arange(tokens, device=device), batch.offsets[samples + 1 :].long() - 1)),
            torch.cat(
                (
                    batch.offsets[: samples + 1],
                    torch.arange(tokens + 1, tokens + 3 * samples + 1, dtype=torch.int32, device=device),
                )
            ),
        )
        vectors = self.item_vectors(batch.items, batch.original, batch.negatives, dropout_seed=dropout_seed)
        hidden = self.encode(
            batch.items,
            positions,
            batch.offsets,
            batch.max_length,
            causal=False,
            keys=keys,
            queries=queries,
            vectors=vectors,
        )
        unmasked = batch.unmasked
        return self._task_losses(
            hidden.index_select(0, unmasked),
            hidden.index_select(0, batch.masked),
            hidden[tokens:].view(3, samples, hidden.shape[1]),
            self._attributes_of(batch.original[unmasked]),
            self._attributes_of(batch.original[batch.masked]),
            vectors.of(batch.original[batch.masked]),
            vectors.of(batch.negatives),
            attribute_negatives,
        )

    def _task_losses(
        self,
        unmasked: torch.Tensor,
        masked: torch.Tensor,
        segments: torch.Tensor,
        unmasked_attributes: AttributeLists,
        masked_attributes: AttributeLists,
        positives: torch.Tensor,
        negatives: torch.Tensor,
        attribute_negatives: torch.Tensor | None = None,
    ) -> Losses:
        """From hidden states at unmasked [U, E] and masked [M, E] places and of the segment sequences
        (context, positive, negative) [3, B, E]; ``positives`` and ``negatives`` [M, E] are items' vectors."""
        config = self.pretrain_config
        masked_item = self.mip_head(masked)
        context = self.sp_head(segments[0])
        terms = {
            "aap": self._attribute_loss(self.aap_head(unmasked), unmasked_attributes, attribute_negatives),
            "mip": pairwise_loss(
                (masked_item * positives).sum(-1),
                (masked_item * negatives).sum(-1),
                config.pairwise,
            ),
            "map": self._attribute_loss(self.map_head(masked), masked_attributes, attribute_negatives),
            "sp": pairwise_loss((context * segments[1]).sum(-1), (context * segments[2]).sum(-1), config.pairwise),
        }
        total = torch.stack([getattr(config, f"{task}_weight") * loss for task, loss in terms.items()]).sum()
        attributes = self.n_attributes + 1
        counts = {
            "aap": len(unmasked) * attributes,
            "mip": len(masked),
            "map": len(masked) * attributes,
            "sp": segments.shape[1],
        }
        return Losses(total, {task: loss.detach() for task, loss in terms.items()}, counts)

    def _attribute_loss(
        self, hidden: torch.Tensor, attributes: AttributeLists, negatives: torch.Tensor | None
    ) -> torch.Tensor:
        if negatives is None:
            return attribute_loss(hidden, self.attribute_embedding.weight, *attributes, backend=self.config.attention)
        rows, positives = attribute_pairs(*attributes)
        vectors = self._attribute_vectors(torch.cat((positives, negatives)))
        pairs = rows, vectors.rows(positives)
        weight = (self.n_attributes + 1) / len(negatives)
        return sampled_attribute_loss(hidden, vectors.weight, *pairs, vectors.rows(negatives), weight)

    def finetune_losses(
        self, batch: FinetuneBatch, dropout_seed: int | None = None, shared: SharedNegatives | None = None
    ) -> Losses:
        """The next-item loss on one batch, as the model's ``finetune`` settings say; ``sampled_ce`` needs negatives to
        share."""
        config = self.finetune_config
        sequence = _sequence_of(batch.offsets, len(batch.items))
        positions = position_ids(sequence, batch.offsets, self.config)
        keys = self._dropout_keys(batch.sample_keys, sequence, positions, dropout_seed)
        queries = Queries.last(batch.offsets) if config.positions == "last" else None
        targets, negatives = batch.targets, batch.negatives
        if queries is not None:
            targets, negatives = targets[queries.tokens], negatives[queries.tokens]
        wanted = [batch.items, targets, negatives if shared is None else shared.items]
        vectors = self.item_vectors(*(() if config.loss == "ce" else wanted), dropout_seed=dropout_seed)
        hidden = self.encode(
            batch.items,
            positions,
            batch.offsets,
            batch.max_length,
            causal=True,
            keys=keys,
            queries=queries,
            vectors=vectors,
        )
        if shared is None:
            loss = self._next_item_loss(hidden, targets, negatives, vectors)
        else:
            loss = sampled_softmax_loss(
                hidden,
                vectors.of(targets),
                vectors.of(shared.items),
                lambda rows: targets[rows, None] == shared.items,
                shared.log_expected,
            )
        return Losses(loss, {config.loss: loss.detach()}, {config.loss: len(targets)})

    def _next_item_loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor | None, vectors: Vectors
    ) -> torch.Tensor:
        """Sum over hidden states [M, E] with their next items and a negative each [M]; ``vectors`` has theirs, or of a
        softmax those of all items."""
        kind = self.finetune_config.loss
        if kind in ("ce", "sampled_ce"):
            return softmax_loss(hidden, vectors.weight[1 : self.mask_id], targets.long() - 1)
        if negatives is None:
            raise ValueError(f"loss={kind!r} needs a negative item for each target, {NEG_ITEM_ID!r}; or use loss='ce'")
        positive = (hidden * vectors.of(targets)).sum(-1)
        negative = (hidden * vectors.of(negatives)).sum(-1)
        return binary_loss(positive, negative) if kind == "bce" else pairwise_loss(positive, negative, "bpr")

    def encode_last(
        self, items: torch.Tensor, offsets: torch.Tensor, max_length: int, sample_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The causal hidden state at the last item of each history, [B, E]; its product with an item's embedding
        is that item's score. Histories hold 1 to ``config.max_length`` items. ``sample_keys`` [B] turn dropout on."""
        sequence = _sequence_of(offsets, len(items))
        positions = position_ids(sequence, offsets, self.config)
        keys = None if sample_keys is None else self._dropout_keys(sample_keys, sequence, positions, 0)
        return self.encode(items, positions, offsets, max_length, causal=True, keys=keys, queries=Queries.last(offsets))

    @not_compiled
    def _dropout_keys(
        self, sample_keys: torch.Tensor, sequence: torch.Tensor, positions: torch.Tensor, seed: int | None
    ) -> DropoutKeys | None:
        if seed is None or not (self.config.hidden_dropout or self.config.attention_dropout):
            return None
        return DropoutKeys.of(hash64(sample_keys, seed), sequence, positions)

    def _attributes_of(self, items: torch.Tensor) -> AttributeLists:
        return items, self.attribute_offsets, self.attribute_values

    @classmethod
    def from_pretrained(cls, folder: str, revision: str = "") -> S3Rec:
        """The model of a folder, a path or fsspec URL, written by ``s3rec export`` or ``s3rec import``; or, where there
        is no such folder, of the Hugging Face repository ``user/repo``, at a branch, tag or commit."""
        from s3rec_dist.export import load_export
        from s3rec_dist.interchange.hub import at_hand

        return load_export(at_hand(folder, revision))

    # RecBole's methods, on padded input

    def get_attention_mask(self, sequence: torch.Tensor, bidirectional: bool = True) -> torch.Tensor:
        """Additive attention mask [B, 1, L, L] for item ids [B, L]: 0 where a query may look, else -1e4."""
        allowed = (sequence != 0)[:, None, None, :]
        if not bidirectional:
            size = sequence.shape[1]
            allowed = allowed & torch.ones(size, size, dtype=torch.bool, device=sequence.device).tril()
        return torch.where(allowed.expand(-1, 1, sequence.shape[1], -1), 0.0, -10000.0)

    def forward(self, item_seq: torch.Tensor, bidirectional: bool = True) -> torch.Tensor:
        """Hidden states [B, L, E] of padded item ids [B, L]. Dropout is on in training mode."""
        batch, length = item_seq.shape
        mask = item_seq != 0
        offsets = _offsets_of(mask[mask.any(1)].sum(1))  # rows of nothing but padding are no sequences
        positions = mask.nonzero(as_tuple=True)[1]
        keys = None
        if self.training:
            sequence = _sequence_of(offsets, len(positions))
            keys = self._dropout_keys(_random_keys(len(offsets) - 1, item_seq.device), sequence, positions, 0)
        hidden = self.encode(item_seq[mask], positions, offsets, length, causal=not bidirectional, keys=keys)
        padded = hidden.new_zeros(batch, length, hidden.shape[1])
        padded[mask] = hidden
        return padded

    def reconstruct_pretrain_data(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(features, masked_item_sequence, pos_items, neg_items, masked_segment_sequence, pos_segment,
        neg_segment) from right-padded item ids [B, L], as RecBole gives them: left-padded [B, L] each, and
        features [B, L, A + 1], one where the item has the attribute. Negative segments come from the batch."""
        batch_size, length = item_seq.shape
        device = item_seq.device
        inside = torch.arange(length, device=device) < item_seq_len[:, None]
        items = item_seq[inside].int()
        packed = PackedSequences(items, _offsets_of(item_seq_len), _random_keys(batch_size, device), length)
        batch = pretrain_batch(
            packed,
            n_items=self.n_items,
            segment_pool=items,
            mask_ratio=self.pretrain_config.mask_ratio,
            key=0,
        )
        negatives = items.clone()
        negatives[batch.masked] = batch.negatives
        at_end = torch.arange(length, device=device) >= length - item_seq_len[:, None]

        def padded(values: torch.Tensor) -> torch.Tensor:
            result = torch.zeros_like(item_seq)
            result[at_end] = values.to(item_seq.dtype)
            return result

        masked, masked_segment, pos_segment, neg_segment = map(padded, batch.items.view(4, -1))
        pos_items = padded(items)
        features = torch.zeros(batch_size * length, self.n_attributes + 1, dtype=torch.long, device=device)
        features[attribute_pairs(*self._attributes_of(pos_items.flatten()))] = 1
        features = features.view(batch_size, length, -1)
        return features, masked, pos_items, padded(negatives), masked_segment, pos_segment, neg_segment

    def pretrain(
        self,
        features: torch.Tensor,
        masked_item_sequence: torch.Tensor,
        pos_items: torch.Tensor,
        neg_items: torch.Tensor,
        masked_segment_sequence: torch.Tensor,
        pos_segment: torch.Tensor,
        neg_segment: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted loss sum of the four tasks on padded input, as :meth:`reconstruct_pretrain_data` gives it."""
        return self.padded_pretrain_losses(
            features, masked_item_sequence, pos_items, neg_items, masked_segment_sequence, pos_segment, neg_segment
        ).total

    def padded_pretrain_losses(
        self,
        features: torch.Tensor,
        masked_item_sequence: torch.Tensor,
        pos_items: torch.Tensor,
        neg_items: torch.Tensor,
        masked_segment_sequence: torch.Tensor,
        pos_segment: torch.Tensor,
        neg_segment: torch.Tensor,
    ) -> Losses:
        """:meth:`pretrain`, with the tasks apart."""
        hidden = self.forward(masked_item_sequence)
        is_masked = masked_item_sequence == self.mask_id
        is_unmasked = (masked_item_sequence != 0) & ~is_masked
        features = features.view(*pos_items.shape, -1)
        vectors = self.item_vectors(pos_items, neg_items)
        segments = [self.forward(s)[:, -1] for s in (masked_segment_sequence, pos_segment, neg_segment)]
        return self._task_losses(
            hidden[is_unmasked],
            hidden[is_masked],
            torch.stack(segments),
            _lists_of(features[is_unmasked]),
            _lists_of(features[is_masked]),
            vectors.of(pos_items[is_masked]),
            vectors.of(neg_items[is_masked]),
        )

    def calculate_loss(self, interaction: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """RecBole's training loss: the pretraining sum, or, with ``train_stage = "finetune"``, the mean next-item
        loss at the last position of right-padded histories."""
        item_seq, lengths = interaction[ITEM_SEQ], interaction[ITEM_SEQ_LEN]
        if self.train_stage == "pretrain":
            return self.pretrain(*self.reconstruct_pretrain_data(item_seq, lengths))
        hidden = self._last_hidden(item_seq, lengths)
        targets, negatives = interaction[ITEM_ID], interaction.get(NEG_ITEM_ID)
        is_softmax = self.finetune_config.loss in ("ce", "sampled_ce")
        wanted = () if is_softmax else (targets, targets if negatives is None else negatives)
        vectors = self.item_vectors(*wanted)
        return self._next_item_loss(hidden, targets, negatives, vectors) / len(hidden)

    def predict(self, interaction: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores [B] of one item each after right-padded histories."""
        hidden = self._last_hidden(interaction[ITEM_SEQ], interaction[ITEM_SEQ_LEN])
        return (hidden * self.item_vectors(interaction[ITEM_ID]).of(interaction[ITEM_ID])).sum(-1)

    def full_sort_predict(self, interaction: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores [B, n_items + 1] of all items after right-padded histories; column 0 is padding."""
        hidden = self._last_hidden(interaction[ITEM_SEQ], interaction[ITEM_SEQ_LEN])
        return hidden @ self.catalogue_vectors[: self.mask_id].T

    def _last_hidden(self, item_seq: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """:meth:`encode_last` of right-padded histories [B, L]. Dropout is on in training mode."""
        inside = torch.arange(item_seq.shape[1], device=item_seq.device) < lengths[:, None]
        keys = _random_keys(len(lengths), lengths.device) if self.training else None
        return self.encode_last(item_seq[inside], _offsets_of(lengths), item_seq.shape[1], keys)


def _sequence_of(offsets: torch.Tensor, total: int) -> torch.Tensor:
    """The sequence of each of ``total`` packed tokens, int64."""
    return torch.repeat_interleave(offsets.diff().long(), output_size=total)


def _offsets_of(lengths: torch.Tensor) -> torch.Tensor:
    """cu_seqlens, int32 [B + 1], of lengths [B]."""
    zero = torch.zeros(1, dtype=torch.int32, device=lengths.device)
    return torch.cat((zero, lengths.cumsum(0).int()))


def _lists_of(features: torch.Tensor) -> AttributeLists:
    """The attributes of each row of ``features`` [M, A], those that are not zero."""
    rows, attributes = features.nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(features))
    return torch.arange(len(features), device=features.device), F.pad(counts.cumsum(0), (1, 0)), attributes


@not_compiled
def _roles(sample_keys: torch.Tensor, count: int) -> torch.Tensor:
    """A key for each of a sample's ``count`` sequences, role by role, int64 [count * B]."""
    roles = torch.arange(count, device=sample_keys.device)[:, None]
    return hash64(sample_keys[None, :], roles).view(-1)


def _random_keys(count: int, device: torch.device) -> torch.Tensor:
    """Keys from torch's generator, for padded input, which carries no sample ids."""
    return torch.randint(-(1 << 62), 1 << 62, (count,), device=device)
