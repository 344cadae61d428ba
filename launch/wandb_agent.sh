#!/usr/bin/env bash
# What `wandb agent` starts (configs/sweeps/wandb.yaml): a stage with the agent's settings, each run in a folder of its own.
set -euo pipefail
exec s3rec "$@" tracking.wandb=online output="${S3REC_OUTPUT:-runs/sweep}/${WANDB_RUN_ID:?is set by wandb agent}"
