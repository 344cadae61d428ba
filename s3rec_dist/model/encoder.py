"""The S3-Rec encoder: a Transformer over packed sequences, without padding and without distributed code.

T packed tokens, B sequences, H heads, D head size, E = H * D hidden size. ``items`` [T] and ``offsets``
[B + 1] describe a batch; sequence b is ``items[offsets[b]:offsets[b + 1]]``. Blocks are post-LayerNorm
with an erf GELU, as in the reference implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from s3rec_dist.config import ModelConfig
from s3rec_dist.kernels.masked_attention import masked_attention
from s3rec_dist.model.dropout import DropoutKeys
from s3rec_dist.model.layers import linear_add_norm, linear_gelu

SITES_PER_BLOCK = 3  # attention probabilities, attention output, feed-forward output


@dataclass(frozen=True)
class Queries:
    """The tokens whose last hidden states are wanted: the last few of each sequence."""

    tokens: torch.Tensor
    """int64 [Q], ascending places in 0..T-1."""
    offsets: torch.Tensor
    """int32 [B + 1]: sequence b's queries are ``tokens[offsets[b]:offsets[b + 1]]``."""

    @staticmethod
    def last(offsets: torch.Tensor) -> Queries:
        """Only the last token of each (non-empty) sequence."""
        count = torch.arange(len(offsets), dtype=torch.int32, device=offsets.device)
        return Queries(offsets[1:].long() - 1, count)


class Block(nn.Module):
    """Self-attention and feed-forward, each with dropout, residual and LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e = config.hidden_size
        self.config = config
        self.qkv = nn.Linear(e, 3 * e)
        self.attention_output = nn.Linear(e, e)
        self.attention_norm = nn.LayerNorm(e, eps=config.layer_norm_eps)
        self.inner = nn.Linear(e, config.inner_size)
        self.inner_output = nn.Linear(config.inner_size, e)
        self.output_norm = nn.LayerNorm(e, eps=config.layer_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        offsets: torch.Tensor,
        max_length: int,
        *,
        causal: bool,
        keys: DropoutKeys | None,
        site: int,
        queries: Queries | None = None,
    ) -> torch.Tensor:
        """[T, E] -> [T, E], or [Q, E] where only some tokens' outputs are wanted."""
        config, e = self.config, self.config.hidden_size
        heads = (config.heads, e // config.heads)
        if queries is None:
            q, k, v = self.qkv(x).view(-1, 3, *heads).unbind(1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            k, v = F.linear(x, weight[e:], bias[e:]).view(-1, 2, *heads).unbind(1)
            x = x.index_select(0, queries.tokens)  # on a CPU far faster than x[...], backward too
            q = F.linear(x, weight[:e], bias[:e]).view(-1, *heads)
            keys = keys.take(queries.tokens) if keys else None
        attended = masked_attention(
            q,
            k,
            v,
            offsets,
            max_length,
            causal=causal,
            cu_seqlens_q=None if queries is None else queries.offsets,
            dropout_p=config.attention_dropout if keys else 0.0,
            dropout_keys=keys.sequences + site if keys else None,
            backend=config.attention,
        )
        attended, p, backend = attended.reshape(-1, e), config.hidden_dropout, config.attention
        x = linear_add_norm(
            self.attention_output, attended, x, self.attention_norm, keys=keys, site=site + 1, p=p, backend=backend
        )
        hidden = linear_gelu(self.inner, x, backend)
        return linear_add_norm(
            self.inner_output, hidden, x, self.output_norm, keys=keys, site=site + 2, p=p, backend=backend
        )


def position_ids(sequence: torch.Tensor, offsets: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rows of the position table for T packed tokens, int64 [T]; ``sequence`` [T] is each token's sequence."""
    place = torch.arange(len(sequence), device=sequence.device)
    if config.position_alignment == "end":
        return place + (config.max_length - offsets[1:].long())[sequence]
    return place - offsets.long()[sequence]
