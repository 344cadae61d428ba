"""The command line: ``s3rec COMMAND ...``, or ``python -m s3rec_dist COMMAND ...``.

Only the module of the chosen command is imported, so help and mistakes answer at once. Errors that
name the mistake and its remedy (every exception class of this package) are printed without a
traceback, with exit status 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import s3rec_dist

# Read when torch loads OpenMP. Threads that spin long while they wait for each other make a step ten times slower as
# soon as another process wants a core; threads that never spin make every step a third slower.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

Run = Callable[[argparse.Namespace], object]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: what its help says, and where its arguments and its work are defined."""

    summary: str
    description: str
    example: str
    build: Callable[[argparse.ArgumentParser], Run]


def _defined_in(module: str, add_arguments: str = "add_arguments", run: str = "run") -> Callable[..., Run]:
    """A command whose module defines ``add_arguments(parser)`` and ``run(args)``."""

    def build(parser: argparse.ArgumentParser) -> Run:
        loaded = importlib.import_module(module)
        getattr(loaded, add_arguments)(parser)
        return getattr(loaded, run)

    return build


def _training_stage(stage: str) -> Callable[..., Run]:
    """``pretrain`` or ``finetune``: a config file, overrides, and the training loop."""

    def build(parser: argparse.ArgumentParser) -> Run:
        parser.add_argument("--config", metavar="FILE", help="YAML file of settings (default: every setting's default)")
        parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
        parser.add_argument(
            "--no-resume",
            action="store_true",
            help="start over; without it, training goes on from the newest checkpoint in the output folder",
        )
        parser.add_argument(
            "--profile", metavar="FIRST-LAST", help="write a torch profiler trace of these steps into the run's folder"
        )
        parser.add_argument("--profile-all-ranks", action="store_true", help="one of every rank, not of rank 0 alone")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"settings, as in {stage}.epochs=10")
        return run

    def run(args: argparse.Namespace) -> None:
        from s3rec_dist.config import load_config, to_yaml

        config = load_config(args.config, args.overrides)
        if args.print_config:
            print(to_yaml(config), end="")
            return
        profile = None
        if args.profile or args.profile_all_ranks:
            from s3rec_dist.training.profiling import ProfiledSteps

            profile = ProfiledSteps.parse(args.profile, args.profile_all_ranks)
        loop = importlib.import_module("s3rec_dist.training.loop")
        getattr(loop, f"run_{stage}")(config, resume=not args.no_resume, profile=profile)

    return build


COMMANDS = {
    "prepare": Command(
        summary="turn raw interactions into a dataset",
        description="""
            Reads raw interactions, checks and filters them, numbers items and attributes, and writes the dataset
            that every other command reads: sequences in shards, the item catalogue, and a manifest with
            counts and checksums. The folder appears only when it is whole.""",
        example="""
            s3rec prepare --source s3rec --input Beauty.txt --output data/beauty
            s3rec prepare --source recbole --input ml-100k --attribute-fields class --output data/ml-100k
            s3rec prepare --source table --input 'events/*.parquet' --user-column uid --item-column sku \\
                --time-column ts --attributes items.csv --attribute-fields brand category \\
                --min-user-count 5 --min-item-count 5 --output data/shop
            s3rec prepare --append --input events/2026-11-25.parquet --output data/shop
            s3rec prepare --source webdataset --input 'logs/shard-*.tar' --output s3://bucket/logs
            s3rec prepare --engine spark --master spark://head:7077 --source table --input /lake/events \\
                --output /lake/dataset""",
        build=_defined_in("s3rec_dist.data.prepare"),
    ),
    "inspect": Command(
        summary="show what is in a dataset, and check it",
        description="""
            Prints a dataset's counts, lengths, item popularity, attribute coverage, shards and what its preparation
            left out, and checks its files: their sizes, or with --verify every hash and every row. Lists all that is
            wrong, and then ends with status 1.""",
        example="""
            s3rec inspect data/beauty
            s3rec inspect s3://bucket/beauty --verify --json beauty.json""",
        build=_defined_in("s3rec_dist.data.inspect"),
    ),
    "convert": Command(
        summary="rewrite a dataset in another format or shard size",
        description="""
            Rewrites a dataset as Parquet or as tars that the webdataset library reads, or with other row groups and
            shards. Rows, their order and ids stay; rows that an append has replaced are left out. Reads and writes
            local folders and remote storage, and compares the result with what it read.""",
        example="""
            s3rec convert data/beauty --output data/beauty-tars --format webdataset
            s3rec convert data/shop --output s3://bucket/shop --rows-per-group 16384 --groups-per-shard 16""",
        build=_defined_in("s3rec_dist.data.convert"),
    ),
    "pretrain": Command(
        summary="pretrain the encoder with the four self-supervised tasks",
        description="""
            Pretrains on attributes, masked items, masked attributes and segments; writes metrics and checkpoints to
            OUTPUT/pretrain. Runs as one process; start it through deepspeed, torchrun or Slurm for several.""",
        example="""
            s3rec pretrain --config configs/beauty.yaml data.path=data/beauty output=runs/beauty
            deepspeed --num_gpus 8 --module s3rec_dist pretrain --config configs/beauty.yaml engine.zero_stage=1""",
        build=_training_stage("pretrain"),
    ),
    "finetune": Command(
        summary="fine-tune it to predict the next item",
        description="""
            Starts from the pretrained weights that finetune.pretrained names (by default the newest checkpoint of
            OUTPUT/pretrain; 'none' trains from scratch), validates after each epoch, keeps the best checkpoint, and
            writes to OUTPUT/finetune.""",
        example="""
            s3rec finetune --config configs/beauty.yaml data.path=data/beauty output=runs/beauty
            s3rec finetune --config configs/beauty.yaml output=runs/beauty-scratch finetune.pretrained=none""",
        build=_training_stage("finetune"),
    ),
    "doctor": Command(
        summary="check whether training can work here, on all hosts",
        description="""
            Checks versions, device, memory, dataset, output, W&B and the attention backend, and under a launcher that
            all processes have the same versions, settings and dataset, the same time, and can sum numbers together.
            Says what is wrong on which host and rank, within a minute, and then ends with status 1.""",
        example="""
            s3rec doctor --config configs/beauty.yaml data.path=data/beauty output=runs/beauty
            deepspeed --num_gpus 8 --module s3rec_dist doctor --config configs/beauty.yaml engine.zero_stage=1""",
        build=_defined_in("s3rec_dist.training.doctor"),
    ),
    "evaluate": Command(
        summary="rank held-out items: HR, NDCG, MRR",
        description="""
            Ranks each user's held-out item among sampled negatives or among all items not yet seen, and reports
            hit rate, NDCG and mean reciprocal rank.""",
        example="""
            s3rec evaluate --model runs/beauty/finetune --dataset data/beauty
            s3rec evaluate --model S3-Rec=runs/beauty/finetune SASRec=runs/scratch/finetune \\
                --dataset data/beauty --protocol sampled --cutoffs 5 10 --json metrics.json
            deepspeed --num_gpus 8 --module s3rec_dist evaluate --model models/beauty --dataset data/beauty""",
        build=_defined_in("s3rec_dist.evaluation"),
    ),
    "compare": Command(
        summary="train and rank S3-Rec beside its rivals: does pretraining pay?",
        description="""
            Trains SASRec (the encoder from scratch) and S3-Rec (pretrained first) and ranks both beside popularity and
            item-item neighbours, with the same candidates for all; prints a table with confidence intervals over
            users, and says whether pretraining pays. Goes on where it was stopped.""",
        example="""
            s3rec compare --data data/mine --output runs/compare
            s3rec compare --data data/beauty --output runs/compare --config configs/beauty.yaml pretrain.epochs=50""",
        build=_defined_in("s3rec_dist.reports.compare"),
    ),
    "sweep": Command(
        summary="try many settings, one after another, and see which did best",
        description="""
            Runs the ordinary commands with a list or a random sample of settings, passes over what is finished, goes on
            where it was cut, and shows the trials beside each other. W&B sweeps drive the same commands
            (configs/sweeps/wandb.yaml).""",
        example="s3rec sweep configs/sweeps/random.yaml",
        build=_defined_in("s3rec_dist.reports.sweep"),
    ),
    "report": Command(
        summary="show runs on one page: losses, metrics, speed, what went wrong",
        description="""
            Writes one self-contained HTML page of runs beside each other, finished or not: losses of each task,
            validation metrics, throughput and what a step's time goes to, faults, data, and the settings that
            differ.""",
        example="""
            s3rec report runs/beauty
            s3rec report runs/beauty runs/beauty-scratch --results metrics.json --output beauty.html""",
        build=_defined_in("s3rec_dist.reports.command"),
    ),
    "recommend": Command(
        summary="write each user's best items to Parquet",
        description="""
            Recommends items for many users at once: histories in, the best k items and their scores out. Users and
            their whole histories come from a dataset, or from a Parquet file with a row per user: user, and items, a
            list of raw item ids, oldest first. The output has a row per recommendation: user, rank, item, score.""",
        example="""
            s3rec recommend models/beauty --dataset data/beauty --k 10 --output recommendations.parquet
            s3rec recommend models/beauty --histories histories.parquet --output recommendations.parquet""",
        build=_defined_in("s3rec_dist.recommend"),
    ),
    "serve": Command(
        summary="answer requests over HTTP, with a page to try it on",
        description="""
            Serves a model folder: POST /recommend takes a history and gives the best items, /items finds items by name,
            /health and /metrics are for operators, and / is a page that shows recommendations and what they have in
            common with the history.""",
        example="""
            s3rec serve models/beauty --port 8080
            s3rec serve models/ml-100k --names ml-100k.item --item-column item_id --name-column movie_title""",
        build=_defined_in("s3rec_dist.serving.server"),
    ),
    "export": Command(
        summary="turn a checkpoint into a model folder to keep or share, or a file for another program",
        description="""
            Writes fp32 weights as safetensors, the model's settings, the item catalogue and a model card into one
            folder, which recommend, evaluate and finetune.pretrained accept; or with --format what another program
            reads.""",
        example="""
            s3rec export runs/beauty/finetune --dataset data/beauty --output models/beauty
            s3rec export runs/beauty/pretrain --dataset data/beauty --format reference --output beauty.pt
            s3rec export runs/ml-100k/finetune --dataset data/ml-100k --format recbole --tokens dataset/ml-100k \\
                --output S3Rec-ml-100k.pth
            s3rec export runs/beauty/finetune --dataset data/beauty --format onnx --top-k 20 --output beauty.onnx
            s3rec export runs/beauty/finetune --dataset data/beauty --format vectors --output beauty-vectors""",
        build=_defined_in("s3rec_dist.interchange.command", "add_export_arguments", "run_export"),
    ),
    "import": Command(
        summary="turn a checkpoint of the original S3-Rec or of RecBole into a model folder",
        description="""
            Converts what the S3-Rec authors' PyTorch code or RecBole's S3Rec saved into the folder that export writes,
            with the catalogue of a dataset of the same items. The authors' checkpoints do without one, and then still
            serve as finetune.pretrained.""",
        example="""
            s3rec import --format reference --checkpoint Beauty-epochs-150.pt --output models/beauty-reference
            s3rec import --checkpoint Beauty-epochs-150.pt --dataset data/beauty --output models/beauty-reference
            s3rec import --format recbole --checkpoint saved/S3Rec-ml-100k-50.pth --tokens dataset/ml-100k \\
                --dataset data/ml-100k --output models/ml-100k-recbole --allow-pickle""",
        build=_defined_in("s3rec_dist.interchange.command", "add_import_arguments", "run_import"),
    ),
    "push": Command(
        summary="put a model folder on the Hugging Face Hub",
        description="""
            Checks a model folder's files against their hashes and puts them into a repository on the Hugging Face Hub,
            in one commit; makes the repository where there is none. S3Rec.from_pretrained("user/repo") loads it. Needs
            a token: hf auth login, or HF_TOKEN.""",
        example="""
            s3rec push models/beauty ann/s3rec-beauty
            s3rec push models/beauty ann/s3rec-beauty --private --revision v2 --message 'trained on all of November'""",
        build=_defined_in("s3rec_dist.interchange.hub"),
    ),
    "config": Command(
        summary="turn RecBole's settings into a config file",
        description="""
            Reads RecBole's YAML settings for S3Rec and writes a config file with the same model, stages and
            evaluation, and the prepare command for the same data. Lists on stderr what has no counterpart, and what
            happens here instead.""",
        example="""
            s3rec config from-recbole ml-100k.yaml
            s3rec config from-recbole S3Rec.yaml mine.yaml --output configs/mine.yaml""",
        build=_defined_in("s3rec_dist.interchange.settings"),
    ),
    "bench": Command(
        summary="measure speed and memory on this machine",
        description="Measures one part of the system; prints a table, and one JSON object as the last line.",
        example="s3rec bench pretrain --dataset data/beauty",
        build=_defined_in("s3rec_dist.bench.command"),
    ),
    "synth": Command(
        summary="make a synthetic event log of any size with a known structure",
        description="""
            Writes events and an item catalogue with planted structure (Zipf popularity, first-order transitions, tags
            that tell about rare items), as Parquet that prepare reads. Equal settings give equal bytes. What a perfect
            model scores is written down in s3rec_dist/data/synth.py.""",
        example="""
            s3rec synth --events 50_000_000 --output lake
            s3rec synth --events 200_000 --items 5_000 --users 20_000 --seed 7 --output small""",
        build=_defined_in("s3rec_dist.data.synth"),
    ),
    "completion": Command(
        summary="let your shell complete commands, options and settings",
        description="""
            Prints a script that completes commands, options, key=value settings and file names. Where it goes: for
            bash ~/.local/share/bash-completion/completions/s3rec, for zsh _s3rec in a folder of $fpath, for fish
            ~/.config/fish/completions/s3rec.fish. Make it again after an update.""",
        example="s3rec completion bash",
        build=_defined_in("s3rec_dist.completion"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = _normalised(sys.argv[1:] if argv is None else list(argv))
    try:
        if not arguments or arguments[0].startswith("-"):
            parser = _overview()
            parser.parse_args(arguments)
            parser.print_help()
            return 2
        return _run(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as in `s3rec ... | head`
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(
                f"the disk is full{_at(error)}; earlier outputs are whole. Make room and run the command again"
            )
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        if not type(error).__module__.startswith("s3rec_dist."):
            raise
        return _fail(str(error))


def _run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name!r}; {hint}")
    parser, run = parser_of(name)
    result = run(parser.parse_intermixed_args(arguments))
    return result if isinstance(result, int) else 0


def parser_of(name: str) -> tuple[argparse.ArgumentParser, Run]:
    """One command's parser, and what to call with the arguments it parsed."""
    command = COMMANDS[name]
    examples = textwrap.dedent(command.example).strip()
    parser = argparse.ArgumentParser(
        prog=f"s3rec {name}",
        description=textwrap.fill(" ".join(command.description.split()), 100),
        epilog=("examples:\n" if "\n" in examples else "example:\n") + textwrap.indent(examples, "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser, command.build(parser)


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="s3rec",
        usage="s3rec COMMAND [options]",
        description="Distributed training of the S3-Rec sequential recommender.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items())
        + "\n\n's3rec COMMAND --help' shows a command's options and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"s3rec_dist {s3rec_dist.__version__}")
    return parser


def _normalised(arguments: list[str]) -> list[str]:
    """Options with dashes (``--print_config`` is ``--print-config``), and without the ``--local_rank N`` that launchers
    put before the command; the environment's LOCAL_RANK says the same."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        option = argument.partition("=")[0]
        if re.fullmatch("--[a-z_]+", option):
            argument = option.replace("_", "-") + argument[len(option) :]
        if not skip and not re.match("--local-rank(=|$)", argument):
            kept.append(argument)
        skip = argument == "--local-rank"
    return kept


def _fail(message: str) -> int:
    if "://" in message:
        from s3rec_dist.storage import hide

        message = hide(message)
    rank = f" (rank {os.environ.get('RANK', '?')})" if int(os.environ.get("WORLD_SIZE") or 1) > 1 else ""
    print(f"s3rec: error{rank}: {message}", file=sys.stderr)
    return 2


def _at(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


if __name__ == "__main__":
    sys.exit(main())
