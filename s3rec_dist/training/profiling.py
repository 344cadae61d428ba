"""``--profile 20-25``: what every operation of chosen steps takes, as a trace for https://ui.perfetto.dev or
chrome://tracing.

The steps are numbered as in metrics.jsonl. The trace of rank 0, or of every rank with ``--profile-all-ranks``, is
written to ``profile/`` in the run's folder, and an event in metrics.jsonl names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

FOLDER = "profile"


class ProfileError(ValueError):
    """Steps that cannot be profiled; the message says what was expected."""


@dataclass(frozen=True)
class ProfiledSteps:
    """Steps ``first`` to ``last``, both included."""

    first: int
    last: int
    all_ranks: bool = False

    @staticmethod
    def parse(text: str | None, all_ranks: bool = False) -> ProfiledSteps:
        """From the command line: ``20-25``, or ``20`` alone."""
        if text is None:
            raise ProfileError("--profile-all-ranks needs the steps as well: --profile 20-25")
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ProfileError(f"--profile {text}: expected the first and the last step, from 1 on, as in 20-25")
        return ProfiledSteps(first, last, all_ranks)

    def missed(self, step: int, total: int) -> str | None:
        """Why none of them will be profiled by a run that goes on from ``step`` of ``total``, if so. Raises
        :class:`ProfileError` where the run does not have them."""
        if self.last > total:
            raise ProfileError(f"--profile {self.first}-{self.last}: the run has {total} steps")
        return f"the run goes on after step {step}, beyond {self.first}-{self.last}" if step >= self.last else None


class StepProfiler:
    """Profiles this rank's chosen steps, if it has any."""

    def __init__(self, steps: ProfiledSteps | None, folder: Path, rank: int) -> None:
        self._steps = steps if steps and (rank == 0 or steps.all_ranks) else None
        self._folder, self._rank = folder, rank
        self._profile: Any = None
        self._range: Any = None

    def begin(self, step: int) -> None:
        """Step ``step`` begins."""
        if self._steps is None or not self._steps.first <= step <= self._steps.last:
            return
        if self._profile is None:
            on_gpu = torch.cuda.is_available()
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self._profile, self._first = profile(activities=activities), step
            self._profile.start()
        self._range = record_function(f"step {step}")
        self._range.__enter__()

    def end(self, step: int) -> str | None:
        """Step ``step`` is done. Returns the trace's place in the run's folder once it is written."""
        if self._profile is None or self._steps is None:
            return None
        self._range.__exit__(None, None, None)
        if step < self._steps.last:
            return None
        done, self._profile = self._profile, None
        done.stop()
        self._steps = None
        name = f"{FOLDER}/steps-{self._first}-{step}-rank-{self._rank}.json.gz"
        (self._folder / FOLDER).mkdir(exist_ok=True)
        done.export_chrome_trace(str(self._folder / name))
        return name

    def close(self) -> None:
        """Nothing more is profiled; steps of which the last is missing are dropped."""
        if self._profile is not None:
            self._profile.stop()
        self._profile = self._steps = None
