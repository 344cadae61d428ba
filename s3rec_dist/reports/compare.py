"""``s3rec compare``: does pretraining pay on your data? Trains and ranks, and tells how sure the answer is.

    s3rec compare --data data/mine --output runs/compare --config configs/quickstart.yaml

Four recommenders under one protocol, with the same candidates for each user: popularity, item-item neighbours, SASRec
(this encoder trained from scratch) and S3-Rec (the same, pretrained first). The two are trained by the ordinary
stages, in OUTPUT/sasrec and OUTPUT/s3rec, so the command goes on where it was stopped, runs under any launcher, and its
runs can be looked at with ``s3rec report``. The epoch is chosen on the validation items, by ``finetune.metric``.

    OUTPUT/compare.json    metrics with intervals, and the differences between S3-Rec and each other one
    OUTPUT/compare.html    the same as a page
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from s3rec_dist.config import Config, load_config
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.evaluation import Scorer, model_scorer, user_ranks
from s3rec_dist.export import load_model
from s3rec_dist.reports.baselines import NEIGHBOURS_KEPT, BaselineError, item_neighbours, popularity, scipy_sparse
from s3rec_dist.reports.bootstrap import LEVEL, interval, resampled_means, user_metrics
from s3rec_dist.storage import Storage
from s3rec_dist.training.engine import start, together
from s3rec_dist.training.loop import run_finetune, run_pretrain

S3REC, SASREC = "S3-Rec", "SASRec"
POPULARITY, NEIGHBOURS = "popularity", "item neighbours"
_SCORES_AT_ONCE = 2**26


@dataclass(frozen=True)
class Estimate:
    """A mean over the users and its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What was measured, and on what."""

    dataset: str
    users: int
    protocol: str
    settings: str
    """What both trained models had, in words."""
    metrics: dict[str, dict[str, Estimate]]
    """By recommender, then by metric."""
    gains: dict[str, dict[str, Estimate]]
    """S3-Rec's metrics less those of each other recommender, user by user."""

    def answer(self, metric: str) -> str:
        """Whether pretraining pays, in a sentence."""
        gain, before = self.gains[SASREC][metric], self.metrics[SASREC][metric].mean
        change = f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
        share = f", {gain.mean / before:+.1%}" if before else ""
        if gain.low > 0:
            verdict = "Pretraining pays"
        elif gain.high < 0:
            verdict = "Pretraining costs"
        else:
            verdict = "Whether pretraining pays is not sure"
        return f"{verdict} on {self.dataset}: {metric} {change}{share} against the same model from scratch."


def compare(config: Config, neighbours: int = NEIGHBOURS_KEPT) -> Comparison:
    """Trains what is not trained yet, and ranks; all processes of a launcher call it together."""
    runs = {
        SASREC: replace(config, output=f"{config.output}/sasrec", finetune=replace(config.finetune, pretrained="none")),
        S3REC: replace(config, output=f"{config.output}/s3rec", finetune=replace(config.finetune, pretrained="auto")),
    }
    run_finetune(runs[SASREC])
    run_pretrain(runs[S3REC])
    run_finetune(runs[S3REC])
    device = start(config.engine).device
    with together():
        dataset = Dataset.open(config.data.path, Storage(config.storage))
        scorers: dict[str, Scorer] = {
            POPULARITY: popularity(dataset, "test"),
            NEIGHBOURS: item_neighbours(dataset, "test", neighbours),
        }
        for name, run in runs.items():
            model = load_model(f"{run.output}/finetune", dataset).to(device).eval()
            scorers[name] = model_scorer(model, dataset, device)
    # neighbours give every item a score, which [users, items] bounds; ranks do not depend on the batches
    users = min(config.evaluation.batch_users, max(1, _SCORES_AT_ONCE // dataset.n_items))
    ranks = {}
    for name, scorer in scorers.items():
        evaluation = replace(config.evaluation, batch_users=users) if name == NEIGHBOURS else config.evaluation
        ranks[name], protocol = user_ranks(scorer, dataset, evaluation, "test")
    finetune = config.finetune
    settings = (
        f"loss {finetune.loss}, the epoch with the best {finetune.metric} on validation items, seed {config.seed}"
    )
    return summary(ranks, config, dataset.manifest.name, protocol, settings)


def summary(ranks: dict[str, np.ndarray], config: Config, dataset: str, protocol: str, settings: str) -> Comparison:
    """Means and intervals of everybody's ``ranks`` [U] by recommender."""
    values = {name: user_metrics(own, config.evaluation.cutoffs) for name, own in ranks.items()}
    names = list(values[S3REC])
    table = np.stack([values[name][metric] for name in values for metric in names], 1)  # [U, recommenders * metrics]
    shape = (len(values), len(names))
    means = table.mean(0).reshape(shape)
    drawn = resampled_means(table, seed=config.seed).reshape(-1, *shape)

    def estimates(mean: np.ndarray, resampled: np.ndarray) -> dict[str, Estimate]:
        return {metric: Estimate(float(mean[i]), *interval(resampled[:, i])) for i, metric in enumerate(names)}

    places = {name: i for i, name in enumerate(values)}
    own = places[S3REC]
    return Comparison(
        dataset=dataset,
        users=len(table),
        protocol=protocol,
        settings=settings,
        metrics={name: estimates(means[i], drawn[:, i]) for name, i in places.items()},
        gains={
            name: estimates(means[own] - means[i], drawn[:, own] - drawn[:, i])
            for name, i in places.items()
            if name != S3REC
        },
    )


def as_text(found: Comparison, metric: str) -> str:
    """The table, its protocol and the answer."""
    metrics = list(found.metrics[S3REC])
    rows = [["", *metrics]]
    for name, own in found.metrics.items():
        rows.append([name, *(f"{own[key].mean:.4f} ±{(own[key].high - own[key].low) / 2:.4f}" for key in metrics)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    notes = [
        f"{found.protocol}; {found.users:,} users; ± half of the {LEVEL:.0%} interval, users drawn with replacement",
        f"{SASREC} and {S3REC}: {found.settings}",
        found.answer(metric),
    ]
    return "\n".join([*lines, *notes])


def as_json(found: Comparison) -> dict[str, Any]:
    """Plain values."""
    return asdict(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec compare``."""
    parser.add_argument(
        "--data", "--dataset", metavar="URL", help="dataset that 's3rec prepare' wrote: folder or URL (data.path)"
    )
    parser.add_argument("--output", metavar="URL", help="folder or URL for runs and results (output)")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (default: every setting's default)")
    parser.add_argument(
        "--neighbours",
        type=int,
        default=NEIGHBOURS_KEPT,
        metavar="N",
        help=f"most similar items that item neighbours keep of each item (default: {NEIGHBOURS_KEPT})",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings, as in pretrain.epochs=20; without finetune.loss both are fine-tuned with ce, the full softmax",
    )


def run(args: argparse.Namespace) -> None:
    """``s3rec compare``: a table on stdout, and two files."""
    from s3rec_dist.reports.page import comparison_page, plotly

    plotly()  # what is missing is told before hours of training, not after
    scipy_sparse()
    if args.neighbours < 1:
        raise BaselineError(f"--neighbours {args.neighbours}: expected at least 1")
    given = [f"data.path={args.data}"] * bool(args.data) + [f"output={args.output}"] * bool(args.output)
    config = load_config(args.config, ["finetune.loss=ce", *given, *args.overrides])
    found = compare(config, args.neighbours)
    if dist.is_initialized() and dist.get_rank():
        return
    metric = config.finetune.metric
    print(as_text(found, metric))
    storage = Storage(config.storage)
    storage.write(f"{config.output}/compare.json", (json.dumps(as_json(found), indent=1) + "\n").encode())
    storage.write(f"{config.output}/compare.html", comparison_page(found, metric).encode())
    print(f"{config.output}: compare.json, compare.html", file=sys.stderr)
