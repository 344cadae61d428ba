"""--profile: a trace of the chosen steps in the run's folder, and a word where there are none to profile."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from runs import Died, dying_before, events, make_config

from s3rec_dist.config import StorageConfig
from s3rec_dist.storage import Storage
from s3rec_dist.training import loop
from s3rec_dist.training.profiling import ProfiledSteps, ProfileError, StepProfiler


def traced(path: Path) -> list[str]:
    """The names of what was done, as Chrome and Perfetto read them."""
    return [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


def steps(names: list[str]) -> list[int]:
    return sorted({int(name.removeprefix("step ")) for name in names if re.fullmatch(r"step \d+", name)})


def test_the_chosen_steps_are_traced_and_what_a_resumed_run_does_of_them(dataset: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path, pretrain__epochs=1, pretrain__checkpoint_every_steps=5)
    folder = tmp_path / "pretrain"
    with pytest.raises(Died), dying_before(6):
        loop.run_pretrain(config, profile=ProfiledSteps(2, 3))
    (event,) = events(folder, "profile")
    assert event["trace"] == "profile/steps-2-3-rank-0.json.gz" and event["step"] == 3
    names = traced(folder / event["trace"])
    assert steps(names) == [2, 3] and {"aten::mm", "aten::_fused_adam_"} <= set(names)

    with pytest.raises(Died), dying_before(7):  # goes on from step 5
        loop.run_pretrain(config, profile=ProfiledSteps(4, 6))
    assert steps(traced(folder / "profile" / "steps-6-6-rank-0.json.gz")) == [6]

    loop.run_pretrain(config, profile=ProfiledSteps(2, 3))
    (told,) = events(folder, "not_profiled")
    assert told["reason"] == "the run goes on after step 5, beyond 2-3"
    assert len(events(folder, "profile")) == 2


def test_a_run_that_stops_among_the_chosen_steps_leaves_the_profiler_free(dataset: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path, pretrain__epochs=1)
    with pytest.raises(Died), dying_before(3):
        loop.run_pretrain(config, profile=ProfiledSteps(2, 5))
    assert not (tmp_path / "pretrain" / "profile").exists()
    loop.run_pretrain(config, profile=ProfiledSteps(1, 1))
    assert (tmp_path / "pretrain" / "profile" / "steps-1-1-rank-0.json.gz").exists()


def test_steps_that_the_run_does_not_have_are_refused(dataset: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path, pretrain__epochs=1)
    with pytest.raises(ProfileError, match=r"--profile 20-900: the run has \d+ steps"):
        loop.run_pretrain(config, profile=ProfiledSteps(20, 900))


def test_a_trace_that_cannot_be_written_stops_nothing(dataset: Path, tmp_path: Path) -> None:
    config = make_config(dataset, tmp_path, pretrain__epochs=1)
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "profile").write_text("in the way")
    loop.run_pretrain(config, profile=ProfiledSteps(1, 2))
    (told,) = events(tmp_path / "pretrain", "not_profiled")
    assert "profile" in told["reason"] and events(tmp_path / "pretrain", "done")


def test_a_remote_run_has_its_trace_beside_it(dataset: Path) -> None:
    url, storage = "memory://profiled", Storage(StorageConfig())
    config = make_config(dataset, url, pretrain__epochs=1)
    loop.run_pretrain(config, profile=ProfiledSteps(1, 1))
    trace = gzip.decompress(storage.read(f"{url}/pretrain/profile/steps-1-1-rank-0.json.gz"))
    assert steps([event.get("name", "") for event in json.loads(trace)["traceEvents"]]) == [1]
    storage.remove(url)


def test_other_ranks_profile_only_where_all_do(tmp_path: Path) -> None:
    for all_ranks, written in ((False, None), (True, "profile/steps-1-1-rank-3.json.gz")):
        profiler = StepProfiler(ProfiledSteps(1, 1, all_ranks), tmp_path, rank=3)
        profiler.begin(1)
        assert profiler.end(1) == written
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps-1-1-rank-3.json.gz"]


@pytest.mark.parametrize("text", ["", "5-3", "0-2", "-3", "3-", "a-b", "1-2-3", "1.5"])
def test_anything_but_a_range_of_steps_is_refused(text: str) -> None:
    with pytest.raises(ProfileError, match=re.escape(f"--profile {text}: expected the first and the last step")):
        ProfiledSteps.parse(text)


def test_profiles_of_all_ranks_need_steps() -> None:
    with pytest.raises(ProfileError, match="--profile-all-ranks needs the steps"):
        ProfiledSteps.parse(None, all_ranks=True)
