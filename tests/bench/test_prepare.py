"""The benchmark of preparation measures processes of its own and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

from s3rec_dist.bench.prepare import bench_prepare


def test_every_size_is_prepared_by_a_process_of_its_own(tmp_path: Path) -> None:
    figures = bench_prepare([3_000, 200_000], repetitions=2, work_dir=str(tmp_path))
    names = ["seconds", "CPU seconds", "events/s", "peak MiB"]
    assert list(figures) == [f"{events} events: {name}" for events in ("3,000", "200,000") for name in names]
    assert all(len(values) == 2 and min(values) > 0 for values in figures.values())
    small, large = (min(figures[f"{events} events: peak MiB"]) for events in ("3,000", "200,000"))
    assert small < large < 1_500
    for rate, seconds in zip(figures["3,000 events: events/s"], figures["3,000 events: seconds"], strict=True):
        assert abs(rate * seconds - 3_000) < 1e-6 * 3_000
    assert os.listdir(tmp_path) == []
