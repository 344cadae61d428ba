"""A run's folder: a local one, or one on other storage that is filled by way of a local one.

    with RunFolder("s3://bucket/runs/beauty/pretrain", Storage(config.storage), world) as folder:
        ...  # write to folder.local
        folder.keep()

Object stores neither append nor rename, and DeepSpeed writes local files. So metrics.jsonl, config.yaml and what W&B
writes lie in a scratch folder of each host and are uploaded at every checkpoint and at the end; the checkpoints are
uploaded as ``checkpoint.py`` says. A run that starts again takes nothing from the scratch folder, only what was
uploaded, so it may start on another machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from s3rec_dist.storage import Storage, files_below, in_parallel
from s3rec_dist.training.checkpoint import FOLDER, Remote
from s3rec_dist.training.engine import World, together


class RunFolder:
    """``local`` is where files are written, ``url`` where they are to be found: the same place, or not. As a context
    all ranks must enter it."""

    def __init__(self, url: str, storage: Storage, world: World) -> None:
        local = storage.local(url)
        self.url, self.storage = url if local is None else str(Path(local)), storage
        self.is_remote = local is None
        self.local = Path(storage.scratch(url) if local is None else local)
        self._leads, self._leads_host = world.rank == 0, world.local_rank == 0

    def __str__(self) -> str:
        return self.url

    @property
    def checkpoints(self) -> tuple[Path, Remote | None]:
        """The local folder of the run's checkpoints, and where they are kept if elsewhere."""
        remote = Remote(f"{self.url}/{FOLDER}", self.storage, self._leads_host) if self.is_remote else None
        return self.local / FOLDER, remote

    def __enter__(self) -> RunFolder:
        with together():
            if self.is_remote and self._leads_host:
                if os.path.lexists(self.local):  # a run that was killed has left it
                    shutil.rmtree(self.local)
                self.local.mkdir(parents=True, mode=0o700)
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_remote and self._leads_host:
            shutil.rmtree(self.local, ignore_errors=True)

    def fetch(self, names: Iterable[str]) -> None:
        """Brings back files that a run before this one has kept, where there are any. For rank 0."""
        if self.is_remote:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self.storage.download(f"{self.url}/{name}", str(self.local / name))

    def keep(self, *, whole: bool = False) -> None:
        """Uploads the local folder's files, or with ``whole`` those of its subfolders too, checkpoints aside. On rank 0
        alone."""
        if self.is_remote and self._leads:
            names = [n for n in files_below(str(self.local)) if whole or "/" not in n]
            own = [name for name in names if not name.startswith(f"{FOLDER}/")]
            in_parallel(lambda name: self.storage.upload(str(self.local / name), f"{self.url}/{name}"), own)

    def publish(self, name: str) -> None:
        """Uploads one file of this process."""
        if self.is_remote:
            self.storage.upload(str(self.local / name), f"{self.url}/{name}")

    def move_aside(self) -> None:
        """Starting over keeps what an earlier run left, under the next free name. For rank 0."""
        if not self.storage.exists(self.url):
            return
        number = 1
        while self.storage.exists(moved := f"{self.url}.{number}"):
            number += 1
        if self.is_remote:
            self.storage.move(self.url, moved)
        else:
            self.local.rename(moved)
