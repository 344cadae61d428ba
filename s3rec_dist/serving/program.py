"""``torch.export`` programs: the encoder, or the best items, as a graph that PyTorch runs without this package.

    s3rec export runs/beauty/finetune --dataset data/beauty --format torch --output beauty.pt2
    torch.export.load("beauty.pt2").module()(items, lengths)

Inputs and outputs are those of ``padded.py``.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch

from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.output import file_output
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.serving.padded import Run, check, example, padded_model


def write_program(model: S3Rec, dataset: Dataset, args: argparse.Namespace) -> None:
    """Writes ``args.output``: ``s3rec export --format torch``. Raises :class:`ExportError` where it differs from the
    packed encoder by more than the tolerance."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {"items": {0: batch, 1: length}, "lengths": {0: batch}}
    program = torch.export.export(
        padded_model(model, dataset, args.top_k), example(), dynamic_shapes=shapes, strict=False
    )
    buffer = io.BytesIO()  # torch.export.save wants a name that ends in .pt2
    torch.export.save(program, buffer)
    with file_output(args.output, dataset.storage, overwrite=args.overwrite) as draft:
        Path(draft).write_bytes(buffer.getvalue())
        check(program_run(draft), model, dataset, args.top_k, args.output, "torch.export")


def program_run(path: str) -> Run:
    """What runs a file."""
    program = torch.export.load(io.BytesIO(Path(path).read_bytes()))
    run: Run = program.module()
    return run
