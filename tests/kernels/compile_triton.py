"""Compiles the Triton kernels for a GPU that is not there: ``python compile_triton.py COMPUTE_CAPABILITY``.

The code that launches them runs as it is, on CPU tensors; only the driver is a stand-in, which takes the machine code
and starts nothing. Prints a JSON line for each kernel: its name, the case, and its bytes of shared memory. Where the
variable KEEP_CUBIN names a folder, the machine code is kept there, for cuobjdump to tell registers and spills.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from s3rec_dist.hashing import hash64
from s3rec_dist.kernels.attribute_loss.triton import triton_loss
from s3rec_dist.kernels.fused_layers import triton as fused_layers
from s3rec_dist.kernels.masked_attention.triton import triton_attention

SHARED_BYTES = 99 << 10
"""What a program may use on every GPU from compute capability 8.0 on (8.6 and 8.9 have no more)."""

CASES = [
    {"d": 16, "dtype": "float32", "causal": "all", "p": 0.5, "max_seqlen": 50},
    {"d": 32, "dtype": "bfloat16", "causal": "none", "p": 0.5, "max_seqlen": 50},
    {"d": 32, "dtype": "float16", "causal": "each", "p": 0.0, "max_seqlen": 200},
    {"d": 64, "dtype": "bfloat16", "causal": "all", "p": 0.5, "max_seqlen": 64},
    {"d": 64, "dtype": "float32", "causal": "each", "p": 0.5, "max_seqlen": 50},
    {"d": 128, "dtype": "bfloat16", "causal": "all", "p": 0.0, "max_seqlen": 50},
    {"d": 128, "dtype": "float32", "causal": "each", "p": 0.5, "max_seqlen": 512},
    {"d": 16, "dtype": "float16", "causal": "none", "p": 0.0, "max_seqlen": 7},
]

LOSS_CASES = [
    {"features": 64, "dtype": "bfloat16"},
    {"features": 100, "dtype": "float32"},
    {"features": 512, "dtype": "float16"},
]

LAYER_CASES = [
    {"width": 64, "dtype": "bfloat16", "p": 0.5},
    {"width": 100, "dtype": "float32", "p": 0.0},
]


class Machine:
    """Stands in for the driver of a GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.case: dict[str, Any] = {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": SHARED_BYTES}, load_binary=self._load
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *_: None

    def _load(self, name: str, code: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        if folder := os.environ.get("KEEP_CUBIN"):
            label = "_".join(map(str, self.case.values()))
            with open(f"{folder}/{name}-{label}-{self.capability}.cubin", "wb") as file:
                file.write(code)
        print(json.dumps({"kernel": name, "shared": shared, "bytes": len(code), **self.case}), flush=True)
        return 1, 1, 0, 0, 1024


def compile_case(d: int, dtype: str, causal: str, p: float, max_seqlen: int) -> None:
    """Forward and backward of two sequences; with ``each``, also masked keys and the queries of only the last token."""
    few = causal == "each"
    cu = torch.tensor([0, max_seqlen, max_seqlen + 1], dtype=torch.int32)
    cu_q = torch.tensor([0, 1, 2], dtype=torch.int32) if few else None
    tokens = max_seqlen + 1
    qkv = torch.randn(tokens, 3, 2, d, dtype=getattr(torch, dtype), requires_grad=True)
    q, k, v = qkv.unbind(1)
    out = triton_attention(
        q[:2] if few else q,
        k,
        v,
        cu,
        cu_q,
        max_seqlen,
        torch.tensor([True, False]) if few else causal == "all",
        torch.ones(tokens, dtype=torch.bool) if few else None,
        p,
        hash64(torch.arange(2), 1) if p else None,
        d**-0.5,
    )
    out.sum().backward()


def compile_loss(features: int, dtype: str) -> None:
    """Loss and gradients of three rows, whose items have an attribute each, in parts."""
    rows, table = (torch.randn(count, features, dtype=getattr(torch, dtype)) for count in (3, 700))
    triton_loss(rows, table, torch.arange(3).int(), torch.arange(4), torch.arange(3), True, True)


def compile_layers(width: int, dtype: str, p: float) -> None:
    """Forward and backward of the fused layers on five tokens."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=getattr(torch, dtype), requires_grad=True)

    ids, row = torch.zeros(5, dtype=torch.int32), normal(width)
    dropout = (hash64(torch.arange(5), 1) if p else None, 1e-12, 1, p)
    fused_layers.embed(ids, ids.long(), normal(9, width), normal(50, width), row, row, *dropout)[0].sum().backward()
    fused_layers.bias_gelu(normal(5, width), row).sum().backward()
    fused_layers.dropout_add_norm(normal(5, width), row, normal(5, width), row, row, *dropout)[0].sum().backward()


def main() -> None:
    machine = Machine(int(sys.argv[1]))
    driver.set_active(machine)
    for cases, compile_one in ((CASES, compile_case), (LOSS_CASES, compile_loss), (LAYER_CASES, compile_layers)):
        for case in cases:
            machine.case = case
            compile_one(**case)


if __name__ == "__main__":
    main()
