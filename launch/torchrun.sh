#!/usr/bin/env bash
# Trains through torchrun. Start it on every host at about the same time; a host that fails is waited for, and all go on
# from the newest checkpoint.
#
#   launch/torchrun.sh pretrain|finetune|doctor [--config FILE] [--no-resume] [key=value ...]
#
# Run it with the virtual environment active; output and data.path are folders that all hosts see, or URLs.
# Fill in the names, or set them in the environment:
nodes=${NODES:-1}                         # how many hosts
rendezvous=${RENDEZVOUS:-localhost:29400} # one of them, the same on all, and a free port
job=${JOB_ID:-s3rec}                      # the same on all hosts of a run
processes=${PROCESSES:-auto}              # on each host; auto: one a GPU, or one a core without GPUs
interface=${NETWORK_INTERFACE:-}          # of the network that connects the hosts; empty: NCCL and gloo choose
restarts=${MAX_RESTARTS:-3}
binding=${NUMA_BINDING:-} # node, socket, exclusive or core-complex: each process keeps to the cores beside its GPU
set -euo pipefail

case ${1:-} in
    pretrain | finetune) ;;
    doctor) restarts=0 ;;
    *) echo "torchrun.sh: the first argument is pretrain, finetune or doctor, not '${1:-}'" >&2 && exit 2 ;;
esac
if [[ -n $interface ]]; then export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface; fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise a restart meets the keys of the run before it
exec torchrun --nnodes "$nodes" --nproc-per-node "$processes" --rdzv-backend c10d --rdzv-endpoint "$rendezvous" \
    --rdzv-id "$job" --max-restarts "$restarts" ${binding:+--numa-binding "$binding"} -m s3rec_dist "$@"
