"""launch/quickstart.sh, with fewer epochs than it has for people."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SHORT = ["model.max_length=10", "pretrain.samples=one_random_prefix", "pretrain.epochs=2", "finetune.epochs=2"]


def run(repository: Path, *arguments: str) -> str:
    result = subprocess.run(
        [str(repository / "launch/quickstart.sh"), *arguments],
        env={**os.environ, "S3REC_VENV": sys.prefix},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.slow
def test_the_quickstart_goes_from_raw_data_to_recommendations_and_can_be_run_again(
    repository: Path, ml100k: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    printed = run(repository, "--data", str(ml100k), "--output", output, *SHORT)
    table = pq.read_table(f"{output}/recommendations.parquet")
    assert table.num_rows == 943 * 10
    assert (tmp_path / "out/model/model.safetensors").is_file()
    assert re.search(r"^S3-Rec +0\.\d{4}", printed, re.MULTILINE), printed
    assert re.search(r"^without pretraining +0\.\d{4}", printed, re.MULTILINE), printed

    again = run(repository, "--data", str(ml100k), "--output", output, *SHORT)
    assert "Installing" not in again
    assert pq.read_table(f"{output}/recommendations.parquet") == table
