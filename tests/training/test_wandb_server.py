"""W&B online, with a server that lives and servers that die: training goes on, and what was not sent can be synced."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import wandb
from processes import start_process, wait_for
from runs import arguments, curve, events
from wandb_server import WandbServer, serve_wandb

SCRIPT = """
import sys
from unittest import mock
from s3rec_dist.__main__ import main
from s3rec_dist.training import tracking
with mock.patch.multiple(tracking, WANDB_INIT_S=float(sys.argv[1]), WANDB_FINISH_S=3.0):
    sys.exit(main(sys.argv[2:]))
"""


def train(
    dataset: Path, output: Path, server: WandbServer, *, hangs: bool = False, wait: float = 60, epochs: int = 1
) -> str:
    """Pretrains as a process of its own; returns what it printed. A server that ``hangs`` does when the run begins."""
    settings = arguments(dataset, output, pretrain__epochs=epochs, tracking__wandb="online", tracking__name="shop")
    environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}
    process = start_process([sys.executable, "-c", SCRIPT, str(wait), "pretrain", *settings], environment)
    printed = ""
    if hangs:
        assert process.stdout is not None
        for line in process.stdout:
            printed += line
            if line.startswith("pretrain start"):
                server.hang()
                break
    return printed + wait_for([process], 280)[0]


@pytest.mark.extended
def test_a_resumed_run_goes_on_as_the_same_one_with_all_its_numbers(dataset: Path, tmp_path: Path) -> None:
    with serve_wandb() as server:
        for epochs in (1, 2):
            train(dataset, tmp_path, server, epochs=epochs)
        folder = tmp_path / "pretrain"
        assert set(server.sent("name")) == {(folder / "wandb_id").read_text()}
        assert set(server.sent("groupName")) == {"shop"} and set(server.sent("jobType")) == {"pretrain"}
        logged = {row["step"]: row["train/loss"] for row in server.history() if "train/loss" in row}
    assert logged == curve(folder)
    assert [event["restarts"] for event in events(folder, "start")] == [0, 1]


def test_a_server_that_dies_stops_nothing(dataset: Path, tmp_path: Path) -> None:
    with serve_wandb() as server:
        printed = train(dataset, tmp_path, server, hangs=True)
    assert "pretrain done" in printed
    assert len(curve(tmp_path / "pretrain")) == events(tmp_path / "pretrain", "start")[0]["steps"]


def test_a_server_that_is_not_there_leaves_an_offline_run(dataset: Path, tmp_path: Path) -> None:
    """Also where a parent process has a W&B service, which holds on to the run's id."""
    wandb.setup()
    assert os.environ["WANDB_SERVICE"]  # for child processes
    try:
        with serve_wandb() as server:
            server.refuse()
            printed = train(dataset, tmp_path, server, wait=2)
    finally:
        wandb.teardown()
    assert "pretrain done" in printed and "W&B is not reached" in printed
    assert list((tmp_path / "pretrain").glob("wandb/offline-run-*/run-*.wandb")), printed
