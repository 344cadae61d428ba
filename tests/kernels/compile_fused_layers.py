"""Compiles the kernels of the fused layers for a GPU that is not there, as compile_triton.py does for attention."""

from __future__ import annotations

import sys

import torch
from compile_triton import Machine
from triton.runtime import driver

from s3rec_dist.hashing import hash64
from s3rec_dist.kernels.fused_layers import triton as operators

CASES = [
    {"width": 64, "dtype": "bfloat16", "p": 0.5},
    {"width": 100, "dtype": "float32", "p": 0.0},
]


def compile_case(width: int, dtype: str, p: float) -> None:
    """Forward and backward of all three operators on five tokens."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=getattr(torch, dtype), requires_grad=True)

    keys = hash64(torch.arange(5), 1) if p else None
    row = [tensor(width) for _ in range(3)]
    ids = torch.zeros(5, dtype=torch.int32)
    operators.embed(ids, ids.long(), tensor(9, width), tensor(50, width), *row[:2], keys, 1e-12, 0, p)[
        0
    ].sum().backward()
    inner = operators.bias_gelu(tensor(5, width), row[0])
    operators.dropout_add_norm(inner, row[0], tensor(5, width), *row[1:], keys, 1e-12, 1, p)[0].sum().backward()


def main() -> None:
    machine = Machine(int(sys.argv[1]))
    driver.set_active(machine)
    for case in CASES:
        machine.case = case
        compile_case(**case)


if __name__ == "__main__":
    main()
