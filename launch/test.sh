#!/usr/bin/env bash
# Every check: lint, format, types, tests. Arguments go to pytest, as in `launch/test.sh -m 'not slow' -k order`;
# `-n 0` runs the tests in one process.
# S3REC_DATA names a folder with the reference's data and checkpoints, S3REC_GOLDEN one with its recorded outputs;
# tests that need them skip themselves where these are unset.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source launch/lib.sh
make_venv dev
fetch_ml100k
export S3REC_ML100K=$ml100k
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} WANDB_MODE=offline
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests start several processes side by side

ruff check .
ruff format --check .
mypy s3rec_dist
# A worker for each core. A file's tests stay with one, which runs once what they share.
pytest -q --durations=15 -n auto --maxprocesses 4 --dist loadfile "$@"
