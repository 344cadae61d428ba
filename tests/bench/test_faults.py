"""``s3rec bench faults``: a short campaign holds, and what it looks for would be found."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from processes import leave_behind

from s3rec_dist.__main__ import main
from s3rec_dist.bench.faults import _free_port, _Job


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize(("table", "corruptions"), [("dense", 120), ("sharded", 30)])
def test_a_run_survives_kills_sigterm_and_damage(
    table: str, corruptions: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"model.item_table={table}"]
    settings += ["model.hidden_size=16", "model.inner_size=32", "model.max_length=10", "pretrain.batch_size=64"]
    settings += ["engine.device=cpu", "engine.threads=1", "engine.zero_stage=1", "pretrain.checkpoint_every_steps=5"]
    faults = ["--kills", "3", "--kills-in-saves", "1", "--terms", "1", "--corruptions", str(corruptions)]
    assert main(["bench", "faults", *faults, *settings]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["SIGKILLs"] >= 3 and result["SIGKILLs_during_a_save"] >= 1 and result["SIGTERMs"] == 1
    assert result["corrupted_checkpoints"] == corruptions and result["steps_with_equal_losses"] > 20
    assert result["s_from_SIGTERM_to_the_end"] < 25 and result["s_to_agree_on_a_whole_one"] < 60


def test_what_a_job_leaves_behind_is_found(tmp_path: Path) -> None:
    port = _free_port(random.Random(os.getpid()))
    shared = Path(f"/dev/shm/s3rec-test-{os.getpid()}")
    shared.touch()
    job = _Job("cpu", port, tmp_path / "log", leave_behind, str(shared), port)
    try:
        deadline = time.monotonic() + 60
        while len(job.left_behind()) < 5 and time.monotonic() < deadline:  # two processes, a child of each, a port
            time.sleep(0.1)
        assert f"port {port}" in job.left_behind()
        assert job.wait(0.1) is None, "it does not end by itself"
        job.signal(None, signal.SIGKILL)
        assert job.wait(30) is not None
        left = job.left_behind()
        assert str(shared) in left and sum(each.startswith("process") for each in left) == 2, left
    finally:
        for each in job.left_behind():
            if each.startswith("process"):
                os.kill(int(each.split()[1]), signal.SIGKILL)
        shared.unlink(missing_ok=True)
