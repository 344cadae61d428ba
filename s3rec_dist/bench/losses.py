"""The part of ``s3rec bench kernels`` about the attribute loss: each way held against the definition, then timed.

TFLOP/s are of the products that no way can do without: that of the logits, and with gradients two more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from s3rec_dist.bench.compare import ERROR, is_left_out, seconds_of, wrong
from s3rec_dist.kernels.attribute_loss import attribute_loss, attribute_pairs

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From hidden states and table to a scalar."""


@dataclass(frozen=True, kw_only=True)
class LossShape:
    """A batch to measure on; its items have 5 attributes each, as Beauty's have on average."""

    rows: int
    attributes: int
    features: int
    items: int = 12_101

    def __str__(self) -> str:
        return f"attribute loss M{self.rows} A{self.attributes} E{self.features}"

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Hidden states and table, and the lists of positives."""
        generator = torch.Generator(device).manual_seed(1)

        def normal(rows: int) -> torch.Tensor:
            return torch.randn(rows, self.features, generator=generator, device=device)

        count = min(5, self.attributes)
        steps = torch.randint(1, self.attributes // count + 1, (self.items, count), generator=generator, device=device)
        values = (steps.cumsum(1) - 1).flatten()
        offsets = torch.arange(self.items + 1, device=device) * count
        items = torch.randint(self.items, (self.rows,), generator=generator, device=device, dtype=torch.int32)
        matrices = [normal(self.rows).to(dtype), (normal(self.attributes) / self.features**0.5).to(dtype)]
        return matrices, [items, offsets, values]


def rivals(device: torch.device, lists: list[torch.Tensor]) -> dict[str, Loss]:
    """Those that run on this device, by name."""

    def dense(hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        logits = (hidden @ table.T).float()
        return F.binary_cross_entropy_with_logits(logits, targets(logits), reduction="sum")

    def targets(logits: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits).index_put_(pairs, torch.ones((), device=device))

    pairs = attribute_pairs(*lists)
    found: dict[str, Loss] = {"reference": lambda h, t: attribute_loss(h, t, *lists, backend="reference")}
    if device.type == "cuda":
        found["triton"] = lambda h, t: attribute_loss(h, t, *lists, backend="triton")
    found["dense BCE"] = dense
    if device.type == "cuda":
        found["dense BCE compiled"] = torch.compile(dense)
    return found


def shapes(device: torch.device) -> list[LossShape]:
    """Beauty's unmasked places at batch 256 and, on a GPU, of a large batch, and many attributes."""
    small = LossShape(rows=1_400, attributes=638, features=64)
    if device.type == "cpu":
        return [small]
    return [
        small,
        LossShape(rows=125_000, attributes=638, features=64),
        LossShape(rows=125_000, attributes=638, features=128),
        LossShape(rows=20_000, attributes=50_000, features=64, items=1_000_000),
    ]


def bench_losses(
    device: torch.device, *, repetitions: int, measured: Sequence[LossShape] | None = None
) -> dict[str, list[float]]:
    """What was measured, by name with unit: a value for each repetition. bf16 on a GPU, fp32 on a CPU.

    A rival that fails on a shape, or is wrong, is named on the terminal with the reason and not timed. Raises
    RuntimeError if it is a backend of ours.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures: dict[str, list[float]] = {}
    for shape in shapes(device) if measured is None else measured:
        matrices, lists = shape.inputs(device, dtype)
        expected = _results(rivals(device, lists)["reference"], [x.float() for x in matrices])
        for name, loss in rivals(device, lists).items():
            check = partial(_wrong, loss, matrices, expected)
            if not is_left_out(f"{shape}: {name}", check, is_ours=name in ("reference", "triton")):
                figures |= _figures(f"{shape} {name}", loss, matrices, shape, repetitions)
    return figures


def _results(loss: Loss, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """The loss and its gradients."""
    leaves = [x.detach().requires_grad_() for x in matrices]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _wrong(loss: Loss, matrices: list[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    names = ("loss", "gradient of hidden", "gradient of table")
    return wrong(names, _results(loss, matrices), expected, ERROR[matrices[0].dtype])


def _figures(
    name: str, loss: Loss, matrices: list[torch.Tensor], shape: LossShape, repetitions: int
) -> dict[str, list[float]]:
    def forward() -> None:
        with torch.no_grad():
            loss(*matrices)

    def both() -> None:
        _results(loss, matrices)

    figures = {}
    product = 2 * shape.rows * shape.attributes * shape.features
    for title, call, products in (("forward", forward, 1), ("forward+backward", both, 3)):
        seconds = seconds_of(call, matrices[0].device, repetitions)
        figures[f"{name} {title} us"] = [s * 1e6 for s in seconds]
        figures[f"{name} {title} TFLOP/s"] = [products * product / s / 1e12 for s in seconds]
    return figures
