#!/usr/bin/env bash
# From a fresh machine to recommendations, in about five minutes on two CPU cores: prepares MovieLens-100K, pretrains
# S3-Rec with genres as attributes, fine-tunes it, compares it with the same model without pretraining, exports it and
# recommends films. A second run goes on where the first one stopped.
#
#   launch/quickstart.sh [--data DIR] [--attributes FIELD] [--output DIR] [key=value ...]
#
#   --data DIR          another dataset as RecBole's atomic files (NAME.inter, NAME.item)
#   --attributes FIELD  its field of item attributes (class)
#   --output DIR        where everything is written (runs/quickstart)
#   key=value           settings on top of configs/quickstart.yaml, as in pretrain.epochs=10
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data='' attributes=class output=$root/runs/quickstart settings=()
while (($#)); do
    case $1 in
        --data) data=$(realpath "${2:?--data needs a folder}") && shift ;;
        --attributes) attributes=${2:?--attributes needs a field} && shift ;;
        --output) output=$(realpath -m "${2:?--output needs a folder}") && shift ;;
        *=*) settings+=("$1") ;;
        *) awk 'NR > 1 && /^#/ {print substr($0, 3); next} NR > 1 {exit}' "${BASH_SOURCE[0]}" && exit $(($1 != --help)) ;;
    esac
    shift
done
