"""ONNX files: the encoder, or for catalogues that are not large also the best items, for any batch and length.

    s3rec export runs/beauty/finetune --dataset data/beauty --format onnx --output beauty.onnx
    s3rec export runs/beauty/finetune --dataset data/beauty --format onnx --top-k 20 --int8 --output beauty.onnx

Inputs and outputs are those of ``padded.py``; the file's metadata say the sizes and the catalogue. What was written is
run in onnxruntime on real histories and compared with PyTorch before it takes its place.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import tempfile
import warnings
from typing import Any

import numpy as np
import torch

from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.output import file_output
from s3rec_dist.export import ExportError
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.serving.padded import Outputs, PaddedModel, Run, check, difference, example, overlap, padded_model
from s3rec_dist.training.checkpoint import catalogue_of

OPSET = 18
MOST_BYTES = 2_000_000_000
"""Of weights: a protobuf file ends at 2 GiB."""


def write_onnx(model: S3Rec, dataset: Dataset, args: argparse.Namespace) -> None:
    """Writes ``args.output``: ``s3rec export --format onnx``. Raises :class:`ExportError` where it differs from
    PyTorch by more than the tolerance, or is too large."""
    onnx = _needed("onnx")
    exported = padded_model(model, dataset, args.top_k)
    size = sum(t.numel() * t.element_size() for t in exported.state_dict().values())
    if size > MOST_BYTES:
        raise ExportError(
            f"{args.output}: {size / 1e9:.1f} GB of weights, and an ONNX file holds 2; use --format torch, or for the "
            "items' vectors --format vectors"
        )
    with file_output(args.output, dataset.storage, overwrite=args.overwrite) as draft:
        _export(exported, draft)
        if args.int8:
            _quantize(draft)
        proto = onnx.load(draft)
        onnx.helper.set_model_props(proto, _metadata(model, dataset, args))
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, draft)
        run = onnx_run(draft)
        if args.int8:
            _tell_int8(run, model, dataset, args)
        else:
            check(run, model, dataset, args.top_k, args.output, "onnxruntime")


def _export(exported: PaddedModel, path: str) -> None:
    _needed("onnxscript")
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {"items": {0: batch, 1: length}, "lengths": {0: batch}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript"):
            logging.getLogger(name).setLevel(logging.ERROR)
        program = torch.onnx.export(
            exported,
            example(),
            dynamo=True,
            input_names=["items", "lengths"],
            output_names=list(exported.names),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=False)


def _quantize(path: str) -> None:
    """Weights of products and the tables as int8, in place; sums and norms stay fp32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="s3rec-") as folder:
        prepared = os.path.join(folder, "prepared.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, path, weight_type=QuantType.QInt8, per_channel=True)


def _metadata(model: S3Rec, dataset: Dataset, args: argparse.Namespace) -> dict[str, str]:
    return {
        "format": "s3rec_dist onnx 1",
        "n_items": str(model.n_items),
        "max_length": str(model.config.max_length),
        "hidden_size": str(model.config.hidden_size),
        "top_k": str(args.top_k),
        "catalogue": str(catalogue_of(dataset)),
        "precision": "int8" if args.int8 else "fp32",
    }


def onnx_run(path: str) -> Run:
    """What runs a file in onnxruntime on the CPU."""
    runtime = _needed("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(items: torch.Tensor, lengths: torch.Tensor) -> Outputs:
        found = session.run(None, {"items": items.numpy(), "lengths": lengths.numpy()})
        return tuple(torch.from_numpy(np.asarray(part)) for part in found)

    return run


def _tell_int8(run: Run, model: S3Rec, dataset: Dataset, args: argparse.Namespace) -> None:
    """int8 is another model, so it is told how near it is, not held to the tolerance."""
    worst, share = difference(run, model, dataset, args.top_k), overlap(run, model, dataset, args.top_k)
    what = "score" if args.top_k else "vector"
    print(f"int8: largest difference of a {what} {worst:.3g}; {share:.1%} of fp32's 20 best items are among its own")


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(f"--format onnx needs {package}: pip install 's3rec-dist[onnx]'") from error


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The options of ``--format onnx``, the first also of ``--format torch``."""
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="also score all items and give the K best, those of the history left out (default: the user's vector); "
        "for --format torch too",
    )
    group.add_argument("--int8", action="store_true", help="weights as int8, a quarter of the size; says what it costs")
