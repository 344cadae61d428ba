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
        *) awk 'NR > 1 && /^#/ {print substr($0, 3); next} NR > 1 {exit}' "${BASH_SOURCE[0]}" && [[ $1 == --help ]] && exit; exit 2 ;;
    esac
    shift
done
cd "$root"
source launch/lib.sh
make_venv
if [[ -z $data ]]; then
    fetch_ml100k
    data=$ml100k
fi
step() { printf '\n== %s\n' "$*"; }
config=(--config configs/quickstart.yaml data.path="$output/dataset" "${settings[@]}")

step "Prepare: $data -> $output/dataset"
s3rec prepare --source recbole --input "$data" --attribute-fields "$attributes" --output "$output/dataset" --overwrite

step "Pretrain: attributes, masked items, masked attributes, segments"
s3rec pretrain "${config[@]}" output="$output"

step "Fine-tune from the pretrained weights: next item"
s3rec finetune "${config[@]}" output="$output"

step "Fine-tune the same model without pretraining"
s3rec finetune "${config[@]}" output="$output/scratch" finetune.pretrained=none

step "Export, and recommend"
s3rec export "$output/finetune" --dataset "$output/dataset" --output "$output/model" --overwrite
s3rec recommend "$output/model" --dataset "$output/dataset" --k 10 --output "$output/recommendations.parquet"
python - "$output/recommendations.parquet" "$data" <<'PYTHON'
import csv, pathlib, sys
import pyarrow.parquet as pq

(items,) = pathlib.Path(sys.argv[2]).glob("*.item")
with open(items, encoding="utf-8") as file:
    rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(rows)
    title = next((i for i, name in enumerate(header) if "title" in name or "name" in name), 0)
    titles = {row[0]: row[title] for row in rows}
table = pq.read_table(sys.argv[1], filters=[("rank", "<=", 3)])
for user in list(dict.fromkeys(table["user"].to_pylist()))[:5]:
    best = [titles[i] for u, i in zip(table["user"].to_pylist(), table["item"].to_pylist()) if u == user]
    print(f"user {user}: {'; '.join(best)}")
PYTHON

step "Each user's last item, ranked among all items the user has not had"
s3rec evaluate --model "S3-Rec=$output/finetune" "without pretraining=$output/scratch/finetune" \
    --dataset "$output/dataset" --cutoffs 5 10 20
echo "
Everything is in $output: model/ (weights, catalogue, model card), recommendations.parquet, and each run's metrics.jsonl.
To look at it (source $venv/bin/activate; pip install -e '.[report,serve]'):
  s3rec report $output $output/scratch
  s3rec serve $output/model"
