"""How fast masked_attention is against its rivals, on the lengths of real batches: ``s3rec bench kernels``.

Every way is first held against the definition, output and gradients, then timed, forward alone and with backward.
It gets its inputs in the layout that it likes best, made beforehand. Times are of the device; on a GPU a large buffer
is written between calls, which empties the cache and lets the host, launching the next call, run ahead. GB/s are of
the traffic that no kernel can avoid (q, k, v read and the output written; for the backward pass q, k, v, output and
its gradient read, three gradients written), to be held against ``copy GB/s``; TFLOP/s, of the products within
sequences, against ``matmul TFLOP/s``.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from s3rec_dist.bench.compare import ERROR, is_left_out, seconds_of, wrong
from s3rec_dist.hashing import hash64
from s3rec_dist.kernels.backends import BACKENDS
from s3rec_dist.kernels.masked_attention import masked_attention

BEAUTY_PREFIXES = [
    *(22363, 22363, 22363, 15201, 10980, 8300, 6489, 5123, 4242, 3547, 2989, 2550, 2189, 1927, 1720, 1507, 1366),
    *(1248, 1136, 1019, 935, 869, 796, 722, 661, 607, 563, 519, 481, 451, 413, 393, 374, 353, 334, 311, 287, 265),
    *(250, 233, 226, 216, 206, 191, 184, 173, 165, 161, 153, 144),
]
"""Of length 1, 2, ... 50, in the Amazon Beauty pretraining samples: 7.15 on average."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A batch to measure on."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    head_size: int
    causal: bool = False

    def __str__(self) -> str:
        return f"{self.name} H{self.heads} D{self.head_size}{' causal' if self.causal else ''}"

    def traffic(self, elements: int) -> int:
        """Bytes that forward, or forward and backward, cannot avoid, with so many bytes to an element."""
        return sum(self.lengths) * self.heads * self.head_size * elements

    def flops(self) -> int:
        """Of the two products of the forward pass."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        return 4 * pairs * self.heads * self.head_size


class Inputs:
    """Packed q, k, v and the output's gradient of a shape, with what describes its sequences."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(1)
        self.lengths = torch.tensor(shape.lengths, device=device)
        self.cu = F.pad(self.lengths.cumsum(0), (1, 0)).int()
        self.longest = max(shape.lengths)
        size = (sum(shape.lengths), shape.heads, shape.head_size)
        # Not views of one tensor: nested tensors go wrong on those.
        self.q, self.k, self.v, self.grad = (
            torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4)
        )
        self.sequence = torch.repeat_interleave(self.lengths, output_size=size[0])
        self.place = torch.arange(size[0], device=device) - self.cu[self.sequence]

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, D] -> [B, H, L, D]."""
        out = x.new_zeros(len(self.lengths), self.longest, *x.shape[1:])
        out[self.sequence, self.place] = x
        return out.transpose(1, 2).contiguous()


Call = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One way to compute attention: tensors in its own layout, and the call that is measured."""

    leaves: list[torch.Tensor]
    """q, k, v."""
    grad: torch.Tensor
    """The output's gradient."""
    call: Call
    packed: Call = lambda x: x
    """From its own layout to [T, H, D]."""
    dropout_p: float = 0.0


def ours(inputs: Inputs, backend: str, dropout_p: float = 0.0, mixed: bool = False) -> Rival:
    """A backend of masked_attention; ``mixed`` says for each sequence whether it is causal, the same for all."""
    causal: bool | torch.Tensor = inputs.shape.causal
    if mixed:
        causal = torch.full_like(inputs.lengths, inputs.shape.causal, dtype=torch.bool)
    keys = hash64(torch.arange(len(inputs.lengths), device=inputs.cu.device), 1)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return masked_attention(
            q,
            k,
            v,
            inputs.cu,
            inputs.longest,
            causal=causal,
            dropout_p=dropout_p,
            dropout_keys=keys if dropout_p else None,
            backend=backend,
        )

    return Rival(leaves=[inputs.q, inputs.k, inputs.v], grad=inputs.grad, call=call, dropout_p=dropout_p)


def padded_sdpa(inputs: Inputs) -> Rival:
    """PyTorch's attention on sequences padded to the longest, under a mask."""
    at = torch.arange(inputs.longest, device=inputs.cu.device)
    # Padding queries look at all real keys, so that no row is without one.
    mask = (at < inputs.lengths[:, None])[:, None, None, :].expand(-1, 1, inputs.longest, -1)
    if inputs.shape.causal:
        mask = mask & (at <= at[:, None])

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q, k, v, grad = (inputs.padded(x) for x in (inputs.q, inputs.k, inputs.v, inputs.grad))
    return Rival(
        leaves=[q, k, v], grad=grad, call=call, packed=lambda x: x.transpose(1, 2)[inputs.sequence, inputs.place]
    )


def jagged_sdpa(inputs: Inputs) -> Rival:
    """PyTorch's attention on jagged nested tensors."""
    offsets = inputs.cu.long()  # one object: it is what tells nested tensors that their lengths are the same

    def nested(x: torch.Tensor) -> torch.Tensor:
        low, high = min(inputs.shape.lengths), inputs.longest
        return torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=low, max_seqlen=high)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (nested(x).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=inputs.shape.causal)
        return out.transpose(1, 2).contiguous().values()

    return Rival(leaves=[inputs.q, inputs.k, inputs.v], grad=inputs.grad, call=call)


def flex_attention(inputs: Inputs) -> Rival:
    """FlexAttention, compiled, under a block mask that is made beforehand."""
    from torch.nn.attention import flex_attention as flex

    sequence, causal, tokens = inputs.sequence, inputs.shape.causal, len(inputs.q)

    def same(_: torch.Tensor, __: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = sequence[query] == sequence[key]
        return own & (key <= query) if causal else own

    torch._dynamo.reset()  # after a few shapes it would no longer compile, and run dense
    mask = flex.create_block_mask(same, None, None, tokens, tokens, device=inputs.cu.device, _compile=True)
    compiled = torch.compile(flex.flex_attention)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return compiled(q, k, v, block_mask=mask)

    q, k, v, grad = (x.transpose(0, 1).contiguous()[None] for x in (inputs.q, inputs.k, inputs.v, inputs.grad))
    return Rival(leaves=[q, k, v], grad=grad, call=call, packed=lambda x: x[0].transpose(0, 1))


def varlen_attn(inputs: Inputs) -> Rival:
    """PyTorch's own variable-length attention."""
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    causal = inputs.shape.causal
    if "is_causal" in inspect.signature(attend).parameters:
        options: dict[str, Any] = {"is_causal": causal}
    else:
        options = {"window_size": (-1, 0 if causal else -1)}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, inputs.cu, inputs.cu, inputs.longest, inputs.longest, **options)

    return Rival(leaves=[inputs.q, inputs.k, inputs.v], grad=inputs.grad, call=call)


def flash_attention(inputs: Inputs) -> Rival:
    """The package flash-attn."""
    attend = importlib.import_module("flash_attn").flash_attn_varlen_func

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        size = inputs.longest
        return attend(q, k, v, inputs.cu, inputs.cu, size, size, causal=inputs.shape.causal)

    return Rival(leaves=[inputs.q, inputs.k, inputs.v], grad=inputs.grad, call=call)


def rivals(device: torch.device) -> dict[str, Callable[[Inputs], Rival]]:
    """Those that run on this device, by name."""
    if device.type == "cpu":
        return {
            "sdpa": lambda x: ours(x, "sdpa"),
            "sdpa dropout": lambda x: ours(x, "sdpa", dropout_p=0.5),
            "padded sdpa": padded_sdpa,
            "jagged sdpa": jagged_sdpa,
            "reference": lambda x: ours(x, "reference"),
        }
    found: dict[str, Callable[[Inputs], Rival]] = {
        "triton": lambda x: ours(x, "triton"),
        "triton mixed masks": lambda x: ours(x, "triton", mixed=True),
        "triton dropout": lambda x: ours(x, "triton", dropout_p=0.5),
        "sdpa": lambda x: ours(x, "sdpa"),
        "padded sdpa": padded_sdpa,
        "jagged sdpa": jagged_sdpa,
        "flex_attention": flex_attention,
    }
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        found["varlen_attn"] = varlen_attn
    if importlib.util.find_spec("flash_attn"):
        found["flash_attn varlen"] = flash_attention
    return found


def shapes(device: torch.device) -> list[Shape]:
    """Beauty's lengths, uniform and mixed ones; small on a CPU."""
    on_gpu = device.type == "cuda"
    count = 4096 if on_gpu else 256
    options = [(h, d) for h in (2, 4, 8) for d in (32, 64)] if on_gpu else [(2, 32)]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(torch.tensor(BEAUTY_PREFIXES).double(), count, replacement=True, generator=generator)
    batches = {
        "Beauty": tuple((drawn + 1).tolist()),
        "50": (50,) * count,
        "200": (200,) * (count // 4),
        "1-512": tuple(torch.randint(1, 513, (count // 4,), generator=generator).tolist()),
    }
    if not on_gpu:
        batches = {name: batches[name] for name in ("Beauty", "50")}
    found = [
        Shape(name=name, lengths=lengths, heads=h, head_size=d) for name, lengths in batches.items() for h, d in options
    ]
    if on_gpu:
        found.append(Shape(name="128", lengths=(128,) * 512, heads=4, head_size=64, causal=True))
    return found


def bench_kernels(
    device: torch.device, *, repetitions: int, measured: Sequence[Shape] | None = None
) -> dict[str, list[float]]:
    """What was measured, by name with unit: a value for each repetition. bf16 on a GPU, fp32 on a CPU.

    A rival that fails on a shape, or is wrong, is named on the terminal with the reason and not timed. Raises
    RuntimeError if it is a backend of ours.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures = _limits(device, repetitions) if device.type == "cuda" else {}
    for shape in shapes(device) if measured is None else measured:
        inputs = Inputs(shape, device, dtype)
        for name, build in rivals(device).items():
            rival = cache(partial(build, inputs))
            is_ours = name.startswith(("triton", *BACKENDS))
            if not is_left_out(f"{shape}: {name}", partial(_wrong, inputs, rival), is_ours=is_ours):
                figures |= _figures(f"{shape} {name}", rival(), shape, device, repetitions)
    return figures


def _wrong(inputs: Inputs, build: Callable[[], Rival]) -> str | None:
    """How the rival's results differ from the definition's, in fp32, if they do."""
    rival = build()
    reference = ours(inputs, "reference", rival.dropout_p)
    reference = replace(reference, leaves=[x.float() for x in reference.leaves], grad=reference.grad.float())
    return wrong(("output", "dq", "dk", "dv"), _results(rival), _results(reference), ERROR[inputs.q.dtype])


def _results(rival: Rival) -> list[torch.Tensor]:
    """Output and gradients, packed, fp32."""
    leaves = [x.detach().requires_grad_() for x in rival.leaves]
    out = rival.call(*leaves)
    grads = torch.autograd.grad(out, leaves, rival.grad)
    return [rival.packed(x.detach()).float() for x in (out, *grads)]


def _figures(name: str, rival: Rival, shape: Shape, device: torch.device, repetitions: int) -> dict[str, list[float]]:
    plain = [x.detach() for x in rival.leaves]
    leaves = [x.detach().requires_grad_() for x in rival.leaves]

    def forward() -> None:
        with torch.no_grad():
            rival.call(*plain)

    def both() -> None:
        torch.autograd.grad(rival.call(*leaves), leaves, rival.grad)

    size = rival.grad.element_size()
    figures = {}
    # Elements moved: 4 forward, 8 backward. The backward pass has five products where the forward pass has two.
    for title, call, moved, work in (("forward", forward, 4, 1.0), ("forward+backward", both, 12, 3.5)):
        seconds = seconds_of(call, device, repetitions)
        figures[f"{name} {title} us"] = [s * 1e6 for s in seconds]
        figures[f"{name} {title} GB/s"] = [shape.traffic(moved * size) / s / 1e9 for s in seconds]
        figures[f"{name} {title} TFLOP/s"] = [shape.flops() * work / s / 1e12 for s in seconds]
    return figures


def _limits(device: torch.device, repetitions: int) -> dict[str, list[float]]:
    """What this GPU can do: bytes copied, read and write counted, and products of bf16 matrices."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, device=device).bfloat16()
    copies = seconds_of(lambda: target.copy_(source), device, repetitions)
    products = seconds_of(lambda: square @ square, device, repetitions)
    return {
        "copy GB/s": [2 * len(source) / s / 1e9 for s in copies],
        "matmul TFLOP/s": [2 * 8192**3 / s / 1e12 for s in products],
    }
