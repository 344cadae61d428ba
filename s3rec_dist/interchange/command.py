"""``s3rec export`` and ``s3rec import``: the formats they know, and their arguments.

    s3rec export runs/beauty/finetune --dataset data/beauty --output models/beauty
    s3rec export runs/beauty/finetune --dataset data/beauty --format reference --output beauty.pt
    s3rec import --format reference --checkpoint Beauty-epochs-150.pt --dataset data/beauty --output models/beauty-150

What a format carries over, and what not, stands in its own module.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from s3rec_dist.config import Config
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.export import ExportError, export, load_model, streamed_model, write_model
from s3rec_dist.interchange import recbole, reference
from s3rec_dist.model.s3rec import S3Rec
from s3rec_dist.serving import onnx, program, vectors
from s3rec_dist.storage import Storage, add_storage_argument, storage_of
from s3rec_dist.training.weights import MAX_SHARD_BYTES

FOLDER = "folder"
"""The format of ``s3rec export`` that every command here reads: a model folder."""


def _no_arguments(group: argparse._ArgumentGroup) -> None:
    """For formats without options of their own."""


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """What ``--format NAME`` writes."""

    summary: str
    """One line of help: what is written, and who reads it."""
    write: Callable[[S3Rec, Dataset, argparse.Namespace], None]
    """Writes the model, on the CPU and in evaluation mode, to ``args.output``, whole or not at all; replaces what is
    there only with ``args.overwrite``. Raises a ValueError of ours."""
    add_arguments: Callable[[argparse._ArgumentGroup], None] = _no_arguments
    """Adds the format's own options."""
    is_streamed: bool = False
    """Whether it takes a model whose items' rows stay in its files."""
    also: tuple[str, ...] = ()
    """Options of another format that it takes too, by their names in the arguments."""


EXPORT_FORMATS = {
    "reference": ExportFormat(
        summary="a .pt file for the S3-Rec authors' PyTorch code", write=reference.write_reference
    ),
    "recbole": ExportFormat(
        summary="a .pth file for RecBole's S3Rec",
        write=recbole.write_recbole,
        add_arguments=recbole.add_export_arguments,
    ),
    "onnx": ExportFormat(
        summary="an .onnx file of the encoder, or of the best items",
        write=onnx.write_onnx,
        add_arguments=onnx.add_arguments,
    ),
    "torch": ExportFormat(summary="a .pt2 file for torch.export.load", write=program.write_program, also=("top_k",)),
    "vectors": ExportFormat(
        summary="a folder of item vectors: Parquet, .npy, a FAISS index",
        write=vectors.write_vectors,
        is_streamed=True,
        add_arguments=vectors.add_arguments,
    ),
}
"""By name, besides the model folder."""


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec export``."""
    parser.add_argument(
        "model", metavar="RUN", help="folder or URL of a run (its best checkpoint), a checkpoint or a model"
    )
    parser.add_argument(
        "--dataset", "--data", required=True, metavar="URL", help="dataset it was trained on, folder or URL"
    )
    known = "; ".join(f"{name}: {entry.summary}" for name, entry in EXPORT_FORMATS.items())
    parser.add_argument(
        "--format",
        choices=(FOLDER, *EXPORT_FORMATS),
        default=FOLDER,
        help=f"{FOLDER} (the default): a model folder with the catalogue; {known}",
    )
    _add_output_arguments(parser, "what to write, a path or URL: a folder, or a file of the format")
    for name, add in _options().items():
        if add is not _no_arguments:
            add(parser.add_argument_group(f"--format {name}"))


def _options() -> dict[str, Callable[[argparse._ArgumentGroup], None]]:
    """What adds the options of each format."""
    return {FOLDER: _add_folder_arguments, **{name: entry.add_arguments for name, entry in EXPORT_FORMATS.items()}}


def _add_folder_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-shard-mb",
        type=_positive_number,
        default=MAX_SHARD_BYTES / (1 << 20),
        metavar="MB",
        help="MiB of weights in a file: more than these are cut into shards with an index (default: %(default)g)",
    )


def _positive_number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec import``."""
    parser.add_argument(
        "--format",
        choices=("reference", "recbole"),
        default="reference",
        help="what wrote the checkpoint: reference (the default) is the S3-Rec authors' PyTorch code, recbole is "
        "RecBole 1.2.1",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="URL", help="path or URL of the authors' .pt or RecBole's .pth file"
    )
    parser.add_argument(
        "--dataset",
        "--data",
        metavar="URL",
        help="dataset with the same items, folder or URL, for its catalogue (default: none; recbole needs one)",
    )
    _add_output_arguments(parser, "model folder to write, a path or URL")
    group = parser.add_argument_group("--format reference")
    group.add_argument(
        "--heads", type=int, default=2, metavar="N", help="attention heads, which the file does not say (default: 2)"
    )
    group = parser.add_argument_group("--format recbole")
    recbole.add_tokens_argument(group)
    recbole.add_pickle_argument(group)


def _add_output_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("--output", required=True, metavar="URL", help=output)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of the same format")
    add_storage_argument(parser)


def run_export(args: argparse.Namespace) -> None:
    """``s3rec export``: the files, and a line about them on stdout."""
    _refuse_options_of_other_formats(args)
    storage = storage_of(args)
    dataset = Dataset.open(args.dataset, storage)
    tell = partial(print, file=sys.stderr)
    if args.format == FOLDER:
        most = max(1, int(args.max_shard_mb * (1 << 20)))
        export(args.model, dataset, args.output, overwrite=args.overwrite, max_shard_bytes=most, tell=tell)
    else:
        entry = EXPORT_FORMATS[args.format]
        with (
            streamed_model(args.model, dataset, tell)
            if entry.is_streamed
            else contextlib.nullcontext(load_model(args.model, dataset, tell=tell)) as model
        ):
            entry.write(model.eval(), dataset, args)
    _report(args.output, storage)


def _refuse_options_of_other_formats(args: argparse.Namespace) -> None:
    """Raises :class:`ExportError` for an option that the chosen format would not look at."""
    own = EXPORT_FORMATS[args.format].also if args.format != FOLDER else ()
    for name, add in _options().items():
        parser = argparse.ArgumentParser(add_help=False)
        add(parser.add_argument_group())
        for option, default in vars(parser.parse_args([])).items():
            if name != args.format and option not in own and getattr(args, option) != default:
                flag = "--" + option.replace("_", "-")
                raise ExportError(f"{flag} is an option of --format {name}, not of {args.format}; leave it out")


def run_import(args: argparse.Namespace) -> None:
    """``s3rec import``: the model folder, and a line about it on stdout."""
    storage = storage_of(args)
    dataset = Dataset.open(args.dataset, storage) if args.dataset else None
    if args.format == "recbole":
        if dataset is None:
            raise ExportError(
                "RecBole's item numbers mean nothing without its tokens; give --dataset, whose ids they become"
            )
        model, config, stage = recbole.import_recbole(
            args.checkpoint, dataset, args.tokens, allow_pickle=args.allow_pickle
        )
        facts = {"stage": stage, "origin": "RecBole"}
    else:
        model = reference.import_reference(args.checkpoint, args.heads, dataset, storage)
        config = dataclasses.replace(Config(), model=model.config)
        facts = {"stage": "reference"}
    write_model(model, args.output, facts, config, dataset, overwrite=args.overwrite, storage=storage)
    _report(args.output, storage)


def _report(output: str, storage: Storage) -> None:
    if storage.is_folder(output):
        names = storage.names(output)
        size = sum(storage.size(os.path.join(output, name)) for name in names)
        print(f"{output}: {', '.join(names)} ({size / 1e6:.1f} MB)")
    else:
        print(f"{output}: {storage.size(output) / 1e6:.1f} MB")
