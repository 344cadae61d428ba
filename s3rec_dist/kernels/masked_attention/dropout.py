"""Which attention probabilities are dropped: the one definition that all backends share."""

from __future__ import annotations

import torch

from s3rec_dist.hashing import hash64

_HEAD_STRIDE = 1 << 32


def row_keys(sequence_keys: torch.Tensor, positions: torch.Tensor, heads: int) -> torch.Tensor:
    """A hash key for each row of attention probabilities, int64 [..., H, Lq].

    ``sequence_keys`` are int64 [...], ``positions`` [..., Lq] the queries' positions in their sequences.
    """
    head = torch.arange(heads, device=positions.device) * _HEAD_STRIDE
    return hash64(sequence_keys[..., None, None], positions[..., None, :] + head[:, None])
