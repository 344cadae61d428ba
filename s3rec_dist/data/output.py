"""Where a new dataset, or a file, is built, and how it gets to its place: whole, or not at all.

with dataset_output("s3://bucket/beauty", storage, overwrite=False) as (folder, work):
    ...                                       # write the dataset into ``folder``; ``work`` is for anything else
with file_output("s3://bucket/beauty.pt", storage, overwrite=False) as path:
    ...                                       # write the file at ``path``
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from s3rec_dist.data.dataset import Manifest
from s3rec_dist.data.formats import put_in_place, sync_file
from s3rec_dist.storage import Storage, files_below, in_parallel

Progress = Callable[[str], None]
"""Takes a line about what is being done."""

_NAMES = re.compile(r"manifest\.json|manifests|shards|v[0-9]+|g[0-9a-f]{8}|(index|items|attributes|leftover)\.parquet")
"""What a dataset's folder holds."""


def progress_on_stderr() -> Progress:
    """Lines on stderr, each with the seconds since this call."""
    start = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", file=sys.stderr, flush=True)

    return progress


def clean_up_on_sigterm() -> None:
    """SIGTERM ends the process by SystemExit, so that scratch files are removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


class OutputError(ValueError):
    """An output that is not to be written to; nothing has been changed."""


@contextlib.contextmanager
def dataset_output(
    output: str, storage: Storage, *, overwrite: bool, progress: Progress = lambda line: None
) -> Iterator[tuple[str, str]]:
    """(dataset folder, scratch folder), both local and empty; the first becomes ``output``, a path or URL, when the
    block ends well, and both are gone after it.

    A local dataset is built beside its place and renamed. One for other storage is built in ``storage.scratch_dir`` and
    uploaded, its manifest last; what ``overwrite`` replaces is whole until then, and removed after it. Raises
    :class:`OutputError` where there is something already that may not be replaced, or a local folder holds more.
    """
    output = output.rstrip("/") or "/"
    path = storage.local(output)
    place = output if path is None else os.path.abspath(path)
    if storage.exists(place) and not (storage.is_folder(place) and not storage.names(place)):
        if not overwrite:
            raise OutputError(f"{place}: exists already; choose another output, or pass --overwrite to replace it")
        is_cut_short = path is None and all(map(_NAMES.fullmatch, storage.names(place)))  # an upload that was killed
        if not (is_cut_short or storage.exists(f"{place}/manifest.json")):
            raise OutputError(f"{place}: not a dataset, so --overwrite leaves it alone; choose another output")
        others = [name for name in storage.names(place) if not _NAMES.fullmatch(name)]
        if path is not None and others:
            raise OutputError(
                f"{place}: holds {others[0]} too, which --overwrite would remove with the dataset; move it elsewhere, "
                "or choose another output"
            )
    parent, name = os.path.split(place)
    if path is not None:
        for leftover in glob.glob(os.path.join(glob.escape(parent), f".{glob.escape(name)}.partial-*")):
            progress(f"{leftover}: left by a command that was killed or still runs; remove it if none does")
    beside = storage.config.scratch_dir or tempfile.gettempdir() if path is None else parent
    os.makedirs(beside, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f".{name}.partial-", dir=beside)
    try:
        folder, work = os.path.join(partial, "dataset"), os.path.join(partial, "work")
        os.mkdir(folder)
        os.mkdir(work)
        yield folder, work
        if path is None:
            progress(f"uploading to {place}")
            _publish(folder, place, storage)
        else:
            put_in_place(folder, place, os.path.join(partial, "replaced"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(folder: str, url: str, storage: Storage) -> None:
    """Uploads a dataset, its manifest last; where there is something of one already, into a folder of its own, so that
    the other is whole until the manifest is replaced."""
    before = set(filter(_NAMES.fullmatch, storage.names(url)))
    sub = f"g{secrets.token_hex(4)}/" if before else ""
    names = set(files_below(folder)) - {"manifest.json"}
    try:
        in_parallel(lambda name: storage.upload(os.path.join(folder, name), f"{url}/{sub}{name}"), names)
    except BaseException:
        with contextlib.suppress(Exception):  # the error that brought us here is the one to report
            for name in {sub.rstrip("/")} if sub else {name.partition("/")[0] for name in names}:
                storage.remove(f"{url}/{name}")
        raise
    manifest = Manifest.from_json(Path(folder, "manifest.json").read_text(encoding="utf-8"))
    storage.write(f"{url}/manifest.json", manifest.below(sub).to_json().encode())
    for name in before - {"manifest.json"}:
        storage.remove(f"{url}/{name}")


@contextlib.contextmanager
def file_output(output: str, storage: Storage, *, overwrite: bool) -> Iterator[str]:
    """A local path to write a file at, which becomes ``output``, a path or URL, when the block ends well; when not,
    nothing has changed. Raises :class:`OutputError` where ``output`` is a folder, or a file and not ``overwrite``, or
    cannot be written."""
    if storage.is_folder(output):
        raise OutputError(f"{output}: is a folder; name a file")
    if not overwrite and storage.exists(output):
        raise OutputError(f"{output}: exists already; choose another output, or pass --overwrite to replace it")
    try:
        with _draft_of(output, storage) as draft:
            yield draft
    except OSError as error:
        raise OutputError(
            f"{output}: could not be written ({error}); make room, or choose another output. Nothing has been changed"
        ) from error


@contextlib.contextmanager
def _draft_of(output: str, storage: Storage) -> Iterator[str]:
    """A local path that becomes ``output`` when the block ends well and is gone when not."""
    local = storage.local(output)
    if local is None:
        with tempfile.TemporaryDirectory(prefix="s3rec-", dir=storage.config.scratch_dir or None) as folder:
            draft = os.path.join(folder, output.rsplit("/", 1)[-1])
            yield draft
            storage.upload(draft, output)
        return
    target = Path(local)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield str(beside)
        sync_file(str(beside))
        beside.replace(target)
        sync_file(str(target.parent))
    finally:
        beside.unlink(missing_ok=True)
