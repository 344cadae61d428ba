"""The part of ``s3rec bench kernels`` about the fused layers: each way held against the definition, then timed.

GB/s are of the traffic of [T, E] tensors that no way can do without, to be held against ``copy GB/s``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from s3rec_dist.bench.compare import ERROR, is_left_out, seconds_of, wrong
from s3rec_dist.hashing import hash64, keep_mask, keep_scale
from s3rec_dist.kernels import fused_layers
from s3rec_dist.kernels.backends import use_triton
from s3rec_dist.kernels.fused_layers import reference

Layer = Callable[..., torch.Tensor]

PASSES = {"dropout_add_norm": (3, 8), "embed": (2, 5), "bias_gelu": (2, 5)}
"""[T, E] tensors, or rows of the item table, that are read and written: forward, and forward and backward."""
P = 0.5
EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A layer to measure, and on what."""

    layer: str
    tokens: int
    features: int

    def __str__(self) -> str:
        return f"{self.layer} T{self.tokens} E{self.features}"

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Ids, and what has gradients. Tables are Beauty's."""
        generator = torch.Generator(device).manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def ids(count: int) -> torch.Tensor:
            return torch.randint(count, (self.tokens,), generator=generator, device=device, dtype=torch.int32)

        rows, row = (self.tokens, self.features), (self.features,)
        if self.layer == "bias_gelu":
            return [], [normal(*rows), normal(*row)]
        if self.layer == "dropout_add_norm":
            return [], [normal(*rows), normal(*row), normal(*rows), normal(*row), normal(*row)]
        return [ids(12_103), ids(50)], [normal(12_103, self.features), normal(50, self.features), *map(normal, row * 2)]


def rivals(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> dict[str, Layer]:
    """Those that run on this device, by name; they take ids and leaves."""
    plain = getattr(reference, f"reference_{shape.layer}")
    keys = hash64(torch.arange(shape.tokens, device=device), 1)
    options = () if shape.layer == "bias_gelu" else (EPS, keys, 1, P)
    found: dict[str, Layer] = {"plain": lambda *given: plain(*given, *options)}
    if use_triton(device, dtype):
        fused = getattr(fused_layers, shape.layer)
        found["triton"] = lambda *given: fused(*given, *options)
    if device.type == "cuda":
        compiled = torch.compile(plain)
        found["plain compiled"] = lambda *given: compiled(*given, *options)
    if shape.layer == "dropout_add_norm" and importlib.util.find_spec("liger_kernel"):
        norm = importlib.import_module("liger_kernel.transformers.functional").liger_layer_norm

        def with_liger(
            x: torch.Tensor, x_bias: torch.Tensor, residual: torch.Tensor, *rest: torch.Tensor
        ) -> torch.Tensor:
            kept = (x + x_bias) * keep_mask(keys, shape.features, 1, P, x.dtype) * keep_scale(P)
            return norm(residual + kept, *rest, EPS)

        found["plain with Liger's LayerNorm"] = with_liger
    return found


def shapes(device: torch.device) -> list[LayerShape]:
    """The tokens of Beauty's four sequences at batch 256 and, on a GPU, of large batches."""
    sizes = [(7_000, 64)]
    if device.type == "cuda":
        sizes += [(30_000, 64), (500_000, 64), (500_000, 128)]
    return [
        LayerShape(layer=layer, tokens=tokens, features=width * 4 if layer == "bias_gelu" else width)
        for tokens, width in sizes
        for layer in PASSES
    ]


def bench_layers(
    device: torch.device, *, repetitions: int, measured: Sequence[LayerShape] | None = None
) -> dict[str, list[float]]:
    """What was measured, by name with unit: a value for each repetition. bf16 on a GPU, fp32 on a CPU.

    A rival that fails on a shape, or is wrong, is named on the terminal with the reason and not timed. Raises
    RuntimeError if it is ours.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures: dict[str, list[float]] = {}
    for shape in shapes(device) if measured is None else measured:
        ids, leaves = shape.inputs(device, dtype)
        found = rivals(shape, device, dtype)
        expected = _results(found["plain"], ids, [x.float() for x in leaves])
        for name, layer in found.items():
            check = partial(_wrong, layer, ids, leaves, expected)
            if not is_left_out(f"{shape}: {name}", check, is_ours=name == "triton"):
                figures |= _figures(f"{shape} {name}", layer, ids, leaves, shape, repetitions)
    return figures


def _results(layer: Layer, ids: list[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and its gradients for an upstream gradient that is a function of the place."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = layer(*ids, *leaves)
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).cos().view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _wrong(
    layer: Layer, ids: list[torch.Tensor], leaves: list[torch.Tensor], expected: list[torch.Tensor]
) -> str | None:
    names = ("output", *(f"gradient {i}" for i in range(1, len(expected))))
    return wrong(names, _results(layer, ids, leaves), expected, ERROR[leaves[0].dtype])


def _figures(
    name: str, layer: Layer, ids: list[torch.Tensor], leaves: list[torch.Tensor], shape: LayerShape, repetitions: int
) -> dict[str, list[float]]:
    learned = [x.detach().requires_grad_() for x in leaves]
    upstream = torch.ones(shape.tokens, shape.features, dtype=leaves[0].dtype, device=leaves[0].device)

    def forward() -> None:
        with torch.no_grad():
            layer(*ids, *leaves)

    def both() -> None:
        torch.autograd.grad(layer(*ids, *learned), learned, upstream)

    figures = {}
    size = upstream.numel() * upstream.element_size()
    for title, call, passes in zip(("forward", "forward+backward"), (forward, both), PASSES[shape.layer], strict=True):
        seconds = seconds_of(call, upstream.device, repetitions)
        figures[f"{name} {title} us"] = [s * 1e6 for s in seconds]
        figures[f"{name} {title} GB/s"] = [passes * size / s / 1e9 for s in seconds]
    return figures
