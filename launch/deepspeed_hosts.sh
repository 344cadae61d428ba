#!/usr/bin/env bash
# Trains on the hosts of a hostfile through DeepSpeed's launcher: over pdsh, or where that is missing one ssh a host.
#
#   launch/deepspeed_hosts.sh pretrain|finetune|doctor [--config FILE] [--no-resume] [key=value ...]
#
# Start it in a folder that all hosts see under the same path, with the virtual environment active; output and data.path
# are folders that all hosts see, or URLs. Hosts need bash as the login shell. The settings are checked and resolved
# here, before any host is asked, and reach the hosts in a file, as do variables such as AWS_*: no shell reads a value.
# SIGTERM or Ctrl-C ends the run on all hosts.
#
# Fill in the names, or set them in the environment:
hostfile=${HOSTFILE:-$(dirname "${BASH_SOURCE[0]}")/hostfile}
interface=${NETWORK_INTERFACE:-} # of the network that connects the hosts, as in eth0; empty: NCCL and gloo choose
master_addr=${MASTER_ADDR:-}     # where ranks meet; empty: the hostfile's first host
master_port=${MASTER_PORT:-29500}
remote=${REMOTE:-auto}           # pdsh, ssh, or auto: pdsh where it is installed
bind_cores=${BIND_CORES:-}       # 1: each process keeps to its own cores. Needs numactl on the hosts, and REMOTE=ssh
set -euo pipefail

fail() { echo "deepspeed_hosts.sh: $*" >&2 && exit 2; }

# Writes what the hosts' shells source: this shell's variables that training reads, and a watch that ends a host's
# processes where the connection to it is lost, this script has ended, or another host has failed ($run/failed).
write_environment() {
    local name
    for name in $(compgen -e); do
        case $name in
            AWS_* | DS_ACCELERATOR | GLOO_* | GOOGLE_* | HF_* | LD_LIBRARY_PATH | MLFLOW* | NCCL_* | OMP_* | PATH | \
                PYTHON* | S3REC_* | TORCH_* | UCX* | WANDB_*) printf 'export %s=%q\n' "$name" "${!name}" ;;
        esac
    done
    echo "run=$run"
    cat <<'BASH'
setsid bash -c '
    group=$1 connection=$2 run=$3 patience=40 # seconds, to save a checkpoint
    while kill -0 "$connection" && [[ -d $run && ! -e $run/failed ]]; do sleep 1; done
    kill -0 -- "-$group" || exit # done
    if [[ -e $run/failed ]]; then
        sleep 5     # what stopped them may still be told
        patience=10 # no checkpoint without the host that failed
    fi
    kill -TERM -- "-$group"
    for ((; patience; patience--)); do
        kill -0 -- "-$group" || break
        sleep 1
    done
    kill -KILL -- "-$group"
    [[ -e $run/failed ]] || rm -rf "$run" # the script was killed
' watch "$$" "$PPID" "$run" </dev/null >/dev/null 2>&1 &
BASH
}

mark_failure() { [[ ! -d $run ]] || : >"$run/failed"; }

# Waits for all background jobs; the status of the last one that failed.
wait_for_all() {
    local status=0
    for _ in "$@"; do
        wait -n || { status=$? && mark_failure; }
    done
    return "$status"
}

# Passes on what pdsh prints. It waits for the other hosts when one fails.
mark_failures() {
    while IFS= read -r line; do
        printf '%s\n' "$line" >&2
        [[ $line != pdsh@*" exited with exit code "* ]] || mark_failure
    done
}

stage=${1:-}
[[ $stage =~ ^(pretrain|finetune|doctor)$ ]] || fail "the first argument is pretrain, finetune or doctor, not '$stage'"
shift
[[ -f $hostfile ]] || fail "$hostfile: no such hostfile; it has a line 'NAME slots=PROCESSES' for each host"
mapfile -t hosts < <(sed -nE 's/^([^#[:space:]]+)[[:space:]]+slots=[0-9]+.*/\1/p' "$hostfile")
((${#hosts[@]})) || fail "$hostfile: no host in it; expected lines as in 'worker-0 slots=8'"
[[ $remote != auto ]] || remote=$(command -v pdsh >/dev/null && echo pdsh || echo ssh)

settings=() flags=()
for argument in "$@"; do
    if [[ $argument == --no[-_]resume ]]; then flags+=(--no-resume); else settings+=("$argument"); fi
done
run=$(mktemp -d "$PWD/.s3rec-launch.XXXXXX")
trap 'rm -rf "$run"; wait' EXIT # without it the hosts save and end
for name in "$run" "${hosts[@]}" "$(command -v deepspeed)" "${PYTHONPATH:-}" "$master_addr$master_port"; do
    [[ $name =~ ^[[:alnum:]_./:,@%+=-]*$ ]] ||
        fail "'$name' goes through a shell on the hosts; use letters, digits and _./:,@%+=- only"
done
s3rec pretrain "${settings[@]}" --print-config >"$run/config.yaml"
cp "$hostfile" "$run/hostfile"
if [[ -n $interface ]]; then export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface; fi
write_environment >"$run/environment"

launcher=(--hostfile "$run/hostfile" --master_addr "${master_addr:-${hosts[0]}}" --master_port "$master_port")
training=(--module s3rec_dist "$stage" --config "$run/config.yaml" "${flags[@]}")
lost=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3) # after 20 s
case $remote in
    pdsh)
        [[ -z $bind_cores ]] || fail "BIND_CORES: DeepSpeed does not pass it through pdsh; set REMOTE=ssh"
        for name in $(compgen -e); do # DeepSpeed would pass them through the hosts' shells
            case $name in MLFLOW* | MV2* | NCCL* | PYTHON[!P]* | UCX*) unset "$name" ;; esac
        done
        export PDSH_SSH_ARGS_APPEND="${lost[*]} ${PDSH_SSH_ARGS_APPEND:-}"
        deepspeed "${launcher[@]}" --launcher pdsh --force_multi --no_ssh_check \
            --venv_script "$run/environment" "${training[@]}" 2> >(mark_failures) &
        wait_for_all $!
        ;;
    ssh)
        [[ -z $bind_cores ]] || launcher+=(--bind_cores_to_rank)
        jobs=()
        for i in "${!hosts[@]}"; do
            command="source $run/environment; cd $PWD; $(command -v deepspeed) --no_ssh --node_rank $i"
            command+=" ${launcher[*]} ${training[*]}"
            # shellcheck disable=SC2029
            setpriv --pdeathsig TERM ssh "${lost[@]}" "${hosts[i]}" "$command" </dev/null &
            jobs+=($!)
        done
        wait_for_all "${jobs[@]}"
        ;;
    *) fail "REMOTE=$remote: expected pdsh, ssh or auto" ;;
esac
