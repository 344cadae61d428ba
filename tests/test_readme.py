"""README.md, followed word for word."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from shop import write_shop

from s3rec_dist.__main__ import main
from s3rec_dist.data.order import OrderError, check_world


def section_of(repository: Path, heading: str) -> str:
    return (repository / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def commands_below(repository: Path, heading: str) -> str:
    """The first shell block of a section."""
    return section_of(repository, heading).split("```sh\n")[1].split("```")[0]


@pytest.mark.slow
def test_your_own_data_in_five_minutes(repository: Path, tmp_path: Path) -> None:
    write_shop(tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = commands_below(repository, "Your own data in five minutes")
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert pq.read_table(tmp_path / "recommendations.parquet").num_rows == 60 * 10
    assert re.search(r"^runs/mine/finetune +0\.\d{4}", done.stdout, re.MULTILINE), done.stdout


PRETRAIN = ["pretrain", "data.path=data/mine", "output=runs/mine", "pretrain.epochs=1"]
MISTAKES = {
    "a misspelt setting": ["pretrain", "pretrain.epoch=3"],
    "no such column": [
        *("prepare", "--source", "table", "--input", "events/*.parquet", "--output", "data/other"),
        *("--user-column", "user", "--item-column", "item", "--time-column", "time"),
    ],
    "nothing pretrained": ["finetune", "data.path=data/mine", "output=runs/mine"],
    "another seed": [*PRETRAIN, "seed=7"],
    "long sequences of few items": [*PRETRAIN, "model.max_length=500"],
    "another protocol": ["pretrain", "data.path=https://host/data"],
    "a dataset as a model": ["recommend", "data/mine", "--histories", "items.parquet", "--output", "best.parquet"],
}


def test_the_errors_are_printed_as_they_stand(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shop(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = commands_below(repository, "Your own data in five minutes").replace("\\\n", "").splitlines()
    assert main(shlex.split(commands[2])[1:]) == 0  # prepare
    section = section_of(repository, "Errors and answers")
    with pytest.raises(OrderError) as streams:
        check_world(64, 3)
    printed = [str(streams.value)]
    for mistake, arguments in MISTAKES.items():
        if mistake == "another seed":
            assert main(PRETRAIN) == 0
        capsys.readouterr()
        assert main(arguments) == 2, mistake
        printed.append(capsys.readouterr().err.strip().splitlines()[-1].removeprefix("s3rec: error: "))
    assert sorted(re.findall(r"^- `(.*)`$", section, re.MULTILINE)) == sorted(printed)


@pytest.mark.slow
def test_the_api_pages_are_made_without_a_warning(repository: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"^pdoc .*$", (repository / "README.md").read_text(), re.MULTILINE)
    done = subprocess.run(
        ["bash", "-ec", f"{Path(sys.executable).parent}/{command.replace('site', str(tmp_path))}"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "full_sort_predict" in (tmp_path / "s3rec_dist/model/s3rec.html").read_text()
