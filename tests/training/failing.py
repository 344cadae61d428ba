"""Pretraining in which one rank fails: python failing.py RANK HOW key=value ..."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from s3rec_dist.__main__ import main
from s3rec_dist.data.dataset import Dataset, DatasetError
from s3rec_dist.data.stream import Stream
from s3rec_dist.training import checkpoint, loop


def fail(how: str) -> None:
    """Prepares the failure, at about the sixth step."""
    if how == "read":
        read = Dataset.read_row_group

        def damaged(self: Dataset, index: int, with_users: bool = True) -> Any:
            if index == 7:
                raise DatasetError("shard 7: damaged")
            return read(self, index, with_users)

        pool = Dataset.segment_pool

        def whole_pool(self: Dataset, *arguments: Any) -> Any:
            with mock.patch.object(Dataset, "read_row_group", read):
                return pool(self, *arguments)

        mock.patch.object(Dataset, "segment_pool", whole_pool).start()
        mock.patch.object(Dataset, "read_row_group", damaged).start()
    elif how == "save":

        def no_room(*arguments: Any, **options: Any) -> None:
            raise OSError(28, "no room left")

        mock.patch.object(checkpoint, "save_file", no_room).start()
    elif how == "killed while it saves":
        mock.patch.object(checkpoint, "describe", lambda path: AT_STEP_SIX["killed"]()).start()
    elif how in AT_STEP_SIX:
        rate = loop.learning_rate

        def failing(stage: Any, step: int, total: int) -> float:
            if step == 6:
                AT_STEP_SIX[how]()
            return rate(stage, step, total)

        mock.patch.object(loop, "learning_rate", failing).start()
    elif how == "slow data":
        iterate = Stream.iterate

        def slow(self: Stream, *arguments: Any) -> Iterator[Any]:
            for step, packed in enumerate(iterate(self, *arguments)):
                time.sleep(8 * (step == 6))
                yield packed

        mock.patch.object(Stream, "iterate", slow).start()


AT_STEP_SIX: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hung": lambda: time.sleep(600),
}


if __name__ == "__main__":
    if os.environ["RANK"] == sys.argv[1]:
        fail(sys.argv[2])
    sys.exit(main(["pretrain", *sys.argv[3:]]))
