"""``s3rec doctor`` and the preflight of training name what is wrong, and where, without a secret."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import start_process, wait_for
from runs import arguments

from s3rec_dist.__main__ import main
from s3rec_dist.training import doctor, preflight
from s3rec_dist.training.preflight import Facts, compare

AILING = str(Path(__file__).with_name("ailing.py"))
HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def a_plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "RANK"):
        monkeypatch.delenv(name, raising=False)


def told(capsys: pytest.CaptureFixture[str], *settings: str, status: int) -> str:
    """What the doctor says to one process."""
    assert main(["doctor", *settings]) == status
    return capsys.readouterr().out


def problems(output: str) -> list[str]:
    return [line.removeprefix("PROBLEM  ") for line in output.splitlines() if line.startswith("PROBLEM")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_two_ranks(commands: Sequence[Sequence[str]], expect: int, *, apart: bool = False) -> list[str]:
    """What ranks 0 and 1 say, which find each other or, ``apart``, wait in vain."""
    processes, port = [], free_port()
    for rank, command in enumerate(commands):
        port = free_port() if apart else port
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        environment |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        processes.append(start_process([sys.executable, AILING, *command], environment))
    return wait_for(processes, 90, expect)


def test_where_all_is_well_it_says_so_and_leaves_nothing(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = told(capsys, *arguments(dataset, tmp_path / "runs" / "toy"), status=0)
    assert output.endswith("no problem found\n")
    for words in ("torch 2", "sdpa, the fast path on a CPU", f"{dataset}: 73 users, 60 items", "CPU, ", "free"):
        assert words in output
    assert os.listdir(tmp_path) == []


def test_storage_that_does_not_answer_is_named_without_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "seeded-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "seeded-secret-key")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    output = told(capsys, "data.path=s3://bucket/data", "output=s3://bucket/runs", status=1)
    found = problems(output)
    assert [line.partition(": s3://")[0] for line in found] == [f"{HOST} (rank 0): {w}" for w in ("dataset", "output")]
    assert all("failed 2 times, the last time with" in line for line in found)
    assert "seeded" not in output


def test_storage_that_never_answers_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nobody writes to, as a server that is gone behind a mount."""
    monkeypatch.setattr(doctor, "LOOK_S", 0.3)
    os.mkfifo(tmp_path / "manifest.json")
    (line,) = problems(told(capsys, f"data.path={tmp_path}", f"output={tmp_path}/run", status=1))
    os.close(os.open(tmp_path / "manifest.json", os.O_RDWR))  # lets the thread go on
    assert line.startswith(f"{HOST} (rank 0): dataset: no answer within")


@pytest.mark.parametrize("place", ["/proc/nowhere", "file/run"])
def test_an_output_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    output = place if place.startswith("/") else str(tmp_path / place)
    (line,) = problems(told(capsys, f"output={output}", status=1))
    assert line.startswith(f"{HOST} (rank 0): output: /") and "expected a place that this user may" in line


@pytest.mark.parametrize(
    ("environment", "settings", "words"),
    [
        ({"GLOO_SOCKET_IFNAME": "nowhere0"}, [], ["environment: GLOO_SOCKET_IFNAME=nowhere0", "expected one of lo"]),
        ({}, ["tracking.wandb=online"], ["W&B: no key for api.wandb.ai", "set WANDB_API_KEY"]),
        ({"WANDB_API_KEY": "seeded-secret"}, ["tracking.wandb=online"], []),
        ({"WANDB_MODE": "offline"}, ["tracking.wandb=online"], []),
        ({}, ["data.path=nowhere"], ["dataset: nowhere/manifest.json: no such file", "s3rec prepare"]),
        ({}, ["data.path=s3://user:seeded-secret@bucket/data"], ["dataset: s3://***@bucket", "carries credentials"]),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    settings: list[str],
    words: list[str],
) -> None:
    for name, value in {"NETRC": str(tmp_path / "none"), **environment}.items():
        monkeypatch.setenv(name, value)
    output = told(capsys, *settings, f"output={tmp_path}", status=1 if words else 0)
    assert len(problems(output)) == (1 if words else 0)
    assert all(word in output for word in words), output
    assert "seeded" not in output


def facts(**changes: str) -> Facts:
    usual = {"version": {"torch": "2.13.0"}, "setting": {"seed": "42"}, "dataset": {"data": "fingerprint ab"}}
    return {kind: {name: changes.get(kind, v) for name, v in own.items()} for kind, own in usual.items()} | {
        "device": {"device": changes.get("device", "CPU")}
    }


def test_ranks_that_differ_from_most_are_named_together() -> None:
    hosts = ["node0", "node0", "node1", "node1"]
    odd = facts(dataset="fingerprint cd")
    (problem,) = compare([facts(), facts(), odd, odd], hosts)
    assert problem.line(hosts) == (
        "node1 (ranks 2, 3): dataset: data is fingerprint cd, expected fingerprint ab as on node0 (rank 0); "
        "let all hosts read one copy, or copy it anew"
    )
    assert compare([odd, facts(), None, facts()], hosts)[0].ranks == (0,), "the odd one out, be it rank 0"
    assert compare([facts(), None, facts(), facts()], hosts) == []


@pytest.mark.parametrize(("off", "words"), [(0.0, ""), (60.0, "60.0 s ahead of"), (-60.0, "60.0 s behind")])
def test_a_clock_is_judged_by_when_messages_were_sent_and_came(
    monkeypatch: pytest.MonkeyPatch, off: float, words: str
) -> None:
    """A slow exchange, three seconds long, blames nobody."""
    now = iter([100.0, 103.0])
    times: list[float] = []
    monkeypatch.setattr(preflight, "clock", lambda: next(now))

    def gather(value: Any) -> list[Any]:
        times.append(value)
        return [value, value + off, None]

    found = preflight.clock_problems(gather)
    assert times == [100.0, 103.0]
    assert [problem.ranks for problem in found] == ([(1,)] if words else [])
    assert all(words in problem.text for problem in found)


@pytest.mark.slow
def test_ranks_with_another_version_setting_and_time_are_named(dataset: Path, tmp_path: Path) -> None:
    settings = arguments(dataset, tmp_path / "run")
    ranks = [["", "doctor", *settings], ["clock,version", "doctor", *settings, "pretrain.batch_size=64"]]
    output, nothing = on_two_ranks(ranks, expect=1)
    found = problems(output)
    assert all(line.startswith(f"{HOST} (rank 1): ") for line in found), output
    told = [line.removeprefix(f"{HOST} (rank 1): ") for line in found]
    for words in (
        "versions: deepspeed is 0.9.1, expected >=0.17",
        "version: deepspeed is 0.9.1, expected ",
        "setting: pretrain.batch_size is 64, expected 32 as on",
        "clock: 60.0 s ahead of rank 0's",
    ):
        assert any(line.startswith(words) for line in told), (words, output)
    assert "all-reduce  right; " in output and "4 problems found" in output
    assert "PROBLEM" not in nothing and os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    command = ["impatient", "doctor", f"output={tmp_path}"]
    first, second = on_two_ranks([command, command], expect=1, apart=True)
    assert "PROBLEM  host 1 (rank 1): process: did not arrive within 2 s" in first
    assert "all-reduce  not tried" in first and "1 problem found" in first
    assert f"host 0 (rank 0) did not arrive: nothing answered {HOST} (rank 1)" in second


@pytest.mark.slow
def test_training_does_not_start_where_ranks_differ(dataset: Path, tmp_path: Path) -> None:
    settings = arguments(dataset, tmp_path / "run")
    ranks = [["", "pretrain", *settings], ["clock,version", "pretrain", *settings, "pretrain.learning_rate=0.1"]]
    for output in on_two_ranks(ranks, expect=2):
        assert "Traceback" not in output and "the processes do not agree" in output
        for words in (
            "version: deepspeed is 0.9.1",
            "setting: pretrain.learning_rate is 0.1, expected 0.003",
            "clock: ",
        ):
            assert f"{HOST} (rank 1): {words}" in output
    assert os.listdir(tmp_path) == []
