"""Calls of masked_attention whose inputs are a function of a few words, and how to compare what they give."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from s3rec_dist.hashing import hash64
from s3rec_dist.kernels.masked_attention import masked_attention


@dataclass(frozen=True)
class Case:
    """One call of masked_attention, with inputs that are a function of the case."""

    lengths: tuple[int, ...]
    queries: tuple[int, ...] | None = None
    """Queries of each sequence, its last ones; None is all of them."""
    causal: bool | tuple[bool, ...] = False
    """Of all sequences, or of each."""
    p: float = 0.0
    heads: int = 2
    d: int = 32
    dtype: torch.dtype = torch.float32
    layout: str = "separate"
    invalid: str = "none"
    """Keys that are masked, and hold NaN: none, all, or some, which is half of them and the whole second sequence."""
    device: str = "cpu"

    def tensors(self) -> list[torch.Tensor]:
        """q, k, v and the output's gradient, the same values in every layout."""
        generator = torch.Generator().manual_seed(1)
        count = sum(self.lengths if self.queries is None else self.queries)
        rows = (count, sum(self.lengths), sum(self.lengths), count)
        q, k, v, grad = (
            torch.randn(n, self.heads, self.d, generator=generator).to(self.device, self.dtype) for n in rows
        )
        if (valid := self.key_valid()) is not None:
            k[~valid] = v[~valid] = torch.nan
        return [q, k, v, grad]

    def keys(self) -> torch.Tensor:
        return hash64(torch.arange(len(self.lengths)), 99).to(self.device)

    def key_valid(self) -> torch.Tensor | None:
        if self.invalid == "none":
            return None
        valid = torch.rand(sum(self.lengths), generator=torch.Generator().manual_seed(2)) < 0.5
        if self.invalid == "all":
            valid[:] = False
        elif len(self.lengths) > 1:
            valid[self.lengths[0] : sum(self.lengths[:2])] = False
        return valid.to(self.device)

    def attend(self, backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return masked_attention(
            q,
            k,
            v,
            cu_seqlens(self.lengths).to(self.device),
            max(self.lengths, default=0),
            causal=self.causal
            if isinstance(self.causal, bool)
            else torch.tensor(self.causal, dtype=torch.bool, device=self.device),
            cu_seqlens_q=None if self.queries is None else cu_seqlens(self.queries).to(self.device),
            key_valid=self.key_valid(),
            dropout_p=self.p,
            dropout_keys=self.keys() if self.p else None,
            backend=backend,
        )

    def results(self, backend: str) -> dict[str, torch.Tensor]:
        """The output and the gradients of q, k and v."""
        q, k, v, grad = self.tensors()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if self.layout == "one qkv projection":
            base = torch.cat([q, k, v], 1).detach().requires_grad_()
            views = base.view(len(base), 3, self.heads, self.d).unbind(1)
            leaves = [base]
        elif self.layout == "heads first":
            views = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
        elif self.layout == "features first":
            views = tuple(x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v))
        else:
            views = (q, k, v)
        out = self.attend(backend, *views)
        grads = torch.autograd.grad(out, leaves, grad)
        if len(grads) == 1:
            grads = grads[0].view(-1, 3, self.heads, self.d).unbind(1)
        return {"output": out.detach()} | dict(zip(("grad of q", "grad of k", "grad of v"), grads, strict=True))


def cu_seqlens(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def parts(x: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """``x`` [T, ...] by sequence."""
    return x.split(list(lengths))


def last(count: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(count, length) for length in lengths)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    assert actual.shape == expected.shape, what
    expected = expected.detach().to(actual.device, torch.float64)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}"
    )
