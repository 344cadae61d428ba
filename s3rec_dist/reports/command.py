"""``s3rec report RUN [RUN ...]``: runs as one HTML page, to read on any screen and without a network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from s3rec_dist.data.dataset import Dataset, DatasetError
from s3rec_dist.reports.page import report_page
from s3rec_dist.reports.runs import ReportError, Run, read_runs
from s3rec_dist.storage import Storage, StorageError, add_storage_argument, storage_of


def read_results(paths: Sequence[str], storage: Storage) -> list[Mapping[str, Any]]:
    """The results of ``s3rec evaluate --json`` files. Raises :class:`ReportError`."""
    found: list[Mapping[str, Any]] = []
    for path in paths:
        try:
            results = json.loads(storage.read(path))["results"]
            found += [{key: result[key] for key in ("label", "metrics", "protocol", "users")} for result in results]
        except FileNotFoundError as error:
            raise ReportError(f"{path}: no such file; expected what 's3rec evaluate --json' writes") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{path}: not what 's3rec evaluate --json' writes ({error!r})") from error
    return found


def dataset_facts(runs: Sequence[Run], storage: Storage) -> dict[str, dict[str, Any]]:
    """What is in the datasets of ``runs``, those that can be read from here."""
    facts: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(run.config.data.path for run in runs):
        try:
            manifest = Dataset.open(path, storage).manifest
        except (DatasetError, StorageError, OSError) as error:
            facts[path] = {"not readable": str(error)}
            continue
        facts[path] = {
            "name": manifest.name,
            "users": manifest.users,
            "items": manifest.items,
            "attributes": manifest.attributes,
            "interactions": manifest.interactions,
            "mean length": manifest.interactions / max(manifest.users, 1),
            "shards": len(manifest.shards),
        }
    return facts


def write_report(runs: Sequence[Run], results: Sequence[Mapping[str, Any]], output: str, storage: Storage) -> None:
    """Writes the page of ``runs``, whole or not at all."""
    storage.write(output, report_page(runs, results, dataset_facts(runs, storage)).encode())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec report``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders or URLs of runs, or of single stages")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="FILE", help="what 's3rec evaluate --json FILE' wrote, to show too"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="page to write, a path or URL (default: report.html in the first run's folder)"
    )
    add_storage_argument(parser)


def run(args: argparse.Namespace) -> None:
    """``s3rec report``: the page, and its name on stdout."""
    storage = storage_of(args)
    output = args.output or f"{args.runs[0].rstrip('/')}/report.html"
    if storage.is_folder(output):
        raise ReportError(f"{output}: is a folder; name a file")
    write_report(read_runs(args.runs, storage), read_results(args.results, storage), output, storage)
    print(f"{output}: {storage.size(output) / 1e6:.1f} MB")
