#!/usr/bin/env bash
# Starts the ranks of a training run on this node.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'TEXT'
Usage: launch/train.sh CONFIG [KEY=VALUE]...

Starts the ranks of one training run on this node, each with `hunyuan-pretrain train CONFIG [KEY=VALUE]...`.
The same command goes on from the newest checkpoint.

Exit status: 0 done; 75 stopped by SIGTERM or Ctrl-C after saving, start it again; 130 a second Ctrl-C; 2 a mistake in CONFIG, an override
or here; else a failure.

Environment:
  NPROC_PER_NODE   ranks on this node; default: its GPUs, else parallel.world_size of CONFIG / NNODES, else 1
  NNODES           nodes, default 1
  NODE_RANK        number of this node from 0, default 0; not needed with RDZV_ID
  MASTER_ADDR      first node, needed for NNODES > 1
  MASTER_PORT      its port, default 29500
  RDZV_ID          name of the job: the nodes then meet at MASTER_ADDR:MASTER_PORT (c10d) and agree on their numbers; the node with
                   NODE_RANK (else SLURM_NODEID) 0 is the meeting place
  HUNYUAN_PYTHON   interpreter, default: that of the hunyuan-pretrain on PATH, else .venv of this checkout
TEXT
}

fail() {
    echo "launch/train.sh: $1" >&2
    exit 2
}

case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
"") fail "no CONFIG; see --help" ;;
-*) fail "$1: unknown option; see --help" ;;
esac
config=$1
[[ -f $config ]] || fail "$config: no such file"

# The first line of a console script names its interpreter; one beside it need not be it (~/.local/bin, /usr/local/bin).
if [[ -n ${HUNYUAN_PYTHON:-} ]]; then
    python=$HUNYUAN_PYTHON
elif command=$(command -v hunyuan-pretrain); then
    python=$(dirname "$command")/python
    [[ -x $python ]] || python=$(sed -n '1s/^#! *//p' "$command")
else
    python=$here/../.venv/bin/python
fi
"$python" -c "" 2>/dev/null || fail "$python: no such interpreter; install the project (README, Installation) or set HUNYUAN_PYTHON"
"$python" -c "from importlib.util import find_spec; exit(not all(map(find_spec, ('hunyuan_pretrain', 'torch', 'megatron'))))" ||
    fail "$python has not got the project, or not what it needs; install it there (README, Installation) or set HUNYUAN_PYTHON"

nnodes=${NNODES:-1}
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$nnodes: must be a number of nodes"
if ((nnodes > 1)); then
    [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$nnodes, but MASTER_ADDR does not name the first node"
    [[ -n ${NODE_RANK:-}${RDZV_ID:-} ]] || fail "NNODES=$nnodes, but neither NODE_RANK nor RDZV_ID says which node this is"
fi

trap 'echo "stopped before the first step; nothing to save: the same command starts again"; exit 75' TERM INT HUP
if [[ -z ${NPROC_PER_NODE:-} ]]; then
    NPROC_PER_NODE=$("$python" - "$nnodes" "$@" <<'CODE'
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # the script says it

import torch

from hunyuan_pretrain.config.load import load_experiment

nodes, config, *overrides = sys.argv[1:]
try:
    experiment = load_experiment(config, overrides)
except ValueError as error:
    sys.exit(f"{error}")
gpus = torch.cuda.device_count() if experiment.runtime.device != "cpu" else 0
world, rest = divmod(experiment.parallel.world_size or int(nodes), int(nodes))
if not gpus and rest:
    sys.exit(f"{config}: parallel.world_size={experiment.parallel.world_size} does not divide over {nodes} nodes")
print(gpus or world)
CODE
    ) || exit 2
fi

if [[ -n ${RDZV_ID:-} ]]; then
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}" --rdzv-id "$RDZV_ID")
    place=${NODE_RANK:-${SLURM_NODEID:-}}
    # Left to itself torchrun compares names and addresses, and on some clusters no node takes itself for the first.
    [[ -z $place ]] || rendezvous+=(--rdzv-conf "is_host=$([[ $place == 0 ]] && echo true || echo false)")
elif ((nnodes > 1)); then
    rendezvous=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    rendezvous=(--standalone)
fi

# Unset, torchrun sets it to 1 and says so in a banner; ranks on CPU choose their own number of threads anyway.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" "$here/ranks.py" --nnodes "$nnodes" --nproc-per-node "$NPROC_PER_NODE" "${rendezvous[@]}" -m hunyuan_pretrain train "$@"
