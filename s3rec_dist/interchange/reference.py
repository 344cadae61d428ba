"""Checkpoints of the S3-Rec authors' PyTorch implementation: plain state dicts, read without unpickling anything but
tensors.

    s3rec import --format reference --checkpoint Beauty-epochs-150.pt --dataset data/beauty --output models/beauty-150
    s3rec export runs/beauty/pretrain --dataset data/beauty --format reference --output Beauty-epochs-150.pt
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping

import torch

from s3rec_dist.config import ModelConfig
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.output import file_output
from s3rec_dist.export import CATALOGUE, ExportError
from s3rec_dist.interchange.tensors import cut, fuse, plain_state_dict
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.storage import Storage, StorageError
from s3rec_dist.training.checkpoint import fit_weights


def import_reference(
    checkpoint: str, heads: int = 2, dataset: Dataset | None = None, storage: Storage | None = None
) -> S3Rec:
    """The model of a state dict that the S3-Rec authors' PyTorch implementation saved, at a path or URL.

    Sizes come from the tensors' shapes; the number of ``heads`` is not among them. ``dataset`` must have the
    checkpoint's items and attributes, numbered alike. Raises :class:`ExportError` for a file that is not a plain
    state dict, or naming a tensor that is unknown, missing or of an unexpected shape.
    """
    tensors = _read_state_dict(checkpoint, storage or Storage())
    model = _model_of_shapes(tensors, heads, checkpoint, dataset)
    own = model.state_dict()
    names = reference_names(model.config.layers)
    fused = fuse(tensors, names, {name: tensor.shape for name, tensor in own.items()}, checkpoint, _EXPECTED)
    fit_weights(model, fused, checkpoint)
    return model


def write_reference(model: S3Rec, dataset: Dataset, args: argparse.Namespace) -> None:
    """Writes the state dict that the reference's model loads strictly to ``args.output``: ``s3rec export --format
    reference``. Raises :class:`ExportError` where the ids of ``dataset`` are not the numbers of the reference's input
    files, or where its sizes or positions are not what the reference can have."""
    _check_numbering(dataset, model.n_items, model.n_attributes, args.model)
    if model.config.position_alignment != "end":
        raise ExportError(
            f"{args.model}: was trained with model.position_alignment=start, and the reference places the newest item "
            "at the last position; train with model.position_alignment=end to export to it"
        )
    if model.config.layer_norm_eps != 1e-12:
        raise ExportError(
            f"{args.model}: was trained with model.layer_norm_eps={model.config.layer_norm_eps:g}, which the reference "
            "has fixed at 1e-12; train with that to export to it"
        )
    with file_output(args.output, dataset.storage, overwrite=args.overwrite) as draft:
        torch.save(reference_state(model), draft)


def reference_state(model: S3Rec) -> dict[str, torch.Tensor]:
    """The weights of ``model`` as the reference names and cuts them, fp32."""
    return cut(model.state_dict(), reference_names(model.config.layers))


_EXPECTED = "expected a checkpoint of the S3-Rec authors' PyTorch implementation"


def _read_state_dict(path: str, storage: Storage) -> dict[str, torch.Tensor]:
    """Float tensors by name; nothing else is unpickled."""
    try:
        with storage.at_hand(path) as local:
            tree = torch.load(local, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{path}: holds more than tensors, or is no torch file, and was not loaded, because unpickling it could "
            f"run code; save the model's state_dict() alone ({str(error).strip().splitlines()[0]})"
        ) from error
    except (OSError, StorageError):
        raise
    except Exception as error:  # torch raises whatever its zip reader and unpickler meet
        raise ExportError(f"{path}: cannot be read ({error}); {_EXPECTED}") from error
    return plain_state_dict(tree, path, _EXPECTED)


def _model_of_shapes(tensors: Mapping[str, torch.Tensor], heads: int, path: str, dataset: Dataset | None) -> S3Rec:
    """An S3Rec of the sizes that a reference state dict has."""

    def shape(name: str) -> tuple[int, int]:
        if name not in tensors or tensors[name].ndim != 2:
            found = f"of shape {list(tensors[name].shape)}" if name in tensors else "missing"
            raise ExportError(f"{path}: tensor {name} is {found}; {_EXPECTED}")
        rows, columns = tensors[name].shape
        return rows, columns

    item_rows, hidden_size = shape("item_embeddings.weight")
    layers = [int(match[1]) for name in tensors if (match := re.match(r"item_encoder\.layer\.(\d+)\.", name))]
    config = ModelConfig(
        hidden_size=hidden_size,
        layers=max(layers, default=0) + 1,
        heads=heads,
        inner_size=shape("item_encoder.layer.0.intermediate.dense_1.weight")[0],
        max_length=shape("position_embeddings.weight")[0],
    )
    n_items, n_attributes = item_rows - 2, shape("attribute_embeddings.weight")[0] - 1
    if dataset is not None:
        _check_numbering(dataset, n_items, n_attributes, path)
    return S3Rec(config, n_items, n_attributes, dataset.item_attributes() if dataset else None)


def _check_numbering(dataset: Dataset, n_items: int, n_attributes: int, path: str) -> None:
    """Raises where the ids of ``dataset`` are not the numbers that the reference trains on."""
    if (dataset.n_items, dataset.n_attributes) != (n_items, n_attributes):
        raise ExportError(
            f"{path}: knows {n_items} items and {n_attributes} attributes, {dataset.path} has {dataset.n_items} and "
            f"{dataset.n_attributes}; prepare the dataset that it was trained on, with --ids keep"
        )
    for name, table in zip(CATALOGUE, (dataset.items_table(), dataset.attributes_table()), strict=True):
        for number, raw in enumerate(table.column("raw").to_pylist(), 1):
            if raw != str(number):
                raise ExportError(
                    f"{dataset.path}/{name}: id {number} stands for {raw!r}, but the reference trains on the ids of "
                    "its input files as they are; prepare the dataset with --source s3rec --ids keep"
                )


def reference_names(layers: int) -> dict[str, tuple[str, ...]]:
    """The reference's tensor behind each of ours, or its tensors, stacked by rows."""
    modules: dict[str, tuple[str, ...]] = {"embedding_norm": ("LayerNorm",)}
    modules |= {f"{task}_head": (f"{task}_norm",) for task in ("aap", "mip", "map", "sp")}
    for i in range(layers):
        layer = f"item_encoder.layer.{i}"
        modules |= {
            f"blocks.{i}.qkv": tuple(f"{layer}.attention.{part}" for part in ("query", "key", "value")),
            f"blocks.{i}.attention_output": (f"{layer}.attention.dense",),
            f"blocks.{i}.attention_norm": (f"{layer}.attention.LayerNorm",),
            f"blocks.{i}.inner": (f"{layer}.intermediate.dense_1",),
            f"blocks.{i}.inner_output": (f"{layer}.intermediate.dense_2",),
            f"blocks.{i}.output_norm": (f"{layer}.intermediate.LayerNorm",),
        }
    tables = {
        f"{table}_embedding.weight": (f"{table}_embeddings.weight",) for table in ("item", "attribute", "position")
    }
    return tables | {
        f"{own}.{kind}": tuple(f"{part}.{kind}" for part in parts)
        for own, parts in modules.items()
        for kind in ("weight", "bias")
    }
