"""Signals in the middle of a run: ``with signalled("validation"): run(...)``, or as a process with the command line

python preempted.py RANK MOMENT SIGNAL STAGE key=value ..., where only rank RANK (with -1, every one) gets the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from s3rec_dist import evaluation
from s3rec_dist.__main__ import main
from s3rec_dist.training import checkpoint, loop

MOMENTS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "start": (loop, "open_tracker", lambda call, *_: True),
    "training": (loop, "learning_rate", lambda call, stage, step, total: step == 24),
    "end of an epoch": (loop, "learning_rate", lambda call, stage, step, total: step == 29),
    "validation": (evaluation, "user_vectors", lambda call, *_: call == 2),
    "save": (checkpoint, "describe", lambda call, path: path.name == "model.safetensors" and "20" in str(path)),
}
"""What is called at that moment: where it is, its name, and which of its calls is the one."""


@contextlib.contextmanager
def signalled(moment: str, number: int = signal.SIGTERM, times: int = 1) -> Iterator[None]:
    """Within this block the process has a signal at one ``moment``, once or ``times`` with three seconds between."""
    place, name, is_it = MOMENTS[moment]
    original = getattr(place, name)
    calls, done = 0, False

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls, done
        calls += 1
        if not done and is_it(calls, *arguments):
            done = True
            for again in range(times):
                time.sleep(3 * (again > 0))
                os.kill(os.getpid(), number)
            time.sleep(0.2)  # it is a thread that notes it
        return original(*arguments, **options)

    with mock.patch.object(place, name, call):
        yield


if __name__ == "__main__":
    rank, moment, name, *command = sys.argv[1:]
    name, _, times = name.partition("*")
    mine = os.environ.get("RANK", "0") == rank or rank == "-1"
    with signalled(moment, getattr(signal, name), int(times or 1)) if mine else contextlib.nullcontext():
        sys.exit(main(command))
