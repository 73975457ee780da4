#!/usr/bin/env bash
# Starts the ranks of a training run on this node.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'TEXT'
Usage: launch/train.sh CONFIG [KEY=VALUE]... [--accept-changes KEY[,KEY]...]... [--from-step STEP]

Starts the ranks of one training run on this node, each with `hunyuan-pretrain train` and these arguments, which
`hunyuan-pretrain train --help` explains. The same command goes on from the newest checkpoint.

Exit status: 0 done; 75 stopped by SIGTERM or Ctrl-C after saving, start it again; 130 a second Ctrl-C; 2 a mistake in CONFIG, an override,
the data or here; 1 another failure.

Environment (RANK, WORLD_SIZE, LOCAL_RANK and torchrun's PET_* do not count: this sets them for the ranks that it starts):
  NPROC_PER_NODE   ranks on this node; default: its GPUs, else parallel.world_size of CONFIG / NNODES, else 1
  NNODES           nodes, default 1
  NODE_RANK        number of this node from 0, default 0; not needed with RDZV_ID
  MASTER_ADDR      first node, needed for NNODES > 1, without meaning for one node
  MASTER_PORT      a free port of it, the same on all nodes, default 29500; one node takes any port that is free
  LOCAL_ADDR       address of this node for the others, default: that from which it reaches MASTER_ADDR
  RDZV_ID          name of the job: the nodes then meet at MASTER_ADDR:MASTER_PORT (c10d) and agree on their numbers; the node with
                   NODE_RANK (else SLURM_NODEID) 0 is the meeting place
  HUNYUAN_PYTHON   interpreter, default: that of the hunyuan-pretrain on PATH, else .venv of this checkout
TEXT
}

fail() {
    echo "launch/train.sh: $1" >&2
    exit 2
}

settings=() options=()
while (($# > 0)); do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --accept-changes | --from-step)
        (($# > 1)) || fail "$1: no value; see --help"
        options+=("$1=$2")
        shift
        ;;
    --accept-changes=* | --from-step=*) options+=("$1") ;;
    -*) fail "$1: unknown option; settings are KEY=VALUE; see --help" ;;
    *) settings+=("$1") ;;
    esac
    shift
done
((${#settings[@]} > 0)) || fail "no CONFIG; see --help"
for option in ${options[@]+"${options[@]}"}; do
    [[ $option != --from-step=* || $option =~ =[1-9][0-9]*$ ]] || fail "$option: must be a number of steps"
done
config=${settings[0]}
[[ -f $config ]] || fail "$config: $([[ -e $config ]] && echo "not a file" || echo "no such file")"

# The first line of a console script names its interpreter; one beside it need not be it (~/.local/bin, /usr/local/bin).
if [[ -n ${HUNYUAN_PYTHON:-} ]]; then
    python=$HUNYUAN_PYTHON
elif command=$(command -v hunyuan-pretrain); then
    python=$(dirname "$command")/python
    [[ -x $python ]] || python=$(sed -n '1s/^#! *//p' "$command")
else
    python=$here/../.venv/bin/python
fi
"$python" -c "" 2>/dev/null || fail "$python: no such interpreter; install the project (docs/guide/installation.md) or set HUNYUAN_PYTHON"
"$python" -c "from importlib.util import find_spec; exit(not all(map(find_spec, ('hunyuan_pretrain', 'torch', 'megatron'))))" ||
    fail "$python has not got the project, or not what it needs; install it there (docs/guide/installation.md) or set HUNYUAN_PYTHON"

nnodes=${NNODES:-1} port=${MASTER_PORT:-29500}
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$nnodes: must be a number of nodes"
[[ ${NPROC_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE=$NPROC_PER_NODE: must be a number of ranks"
if ((nnodes > 1)); then
    [[ $port =~ ^[1-9][0-9]{0,4}$ ]] && ((port < 65536)) || fail "MASTER_PORT=$port: must be a port, 1 to 65535"
    if [[ -n ${NODE_RANK:-} && ! ($NODE_RANK =~ ^[0-9]+$ && $NODE_RANK -lt $nnodes) ]]; then
        fail "NODE_RANK=$NODE_RANK: must be a number from 0 to $((nnodes - 1)), for NNODES=$nnodes"
    fi
    [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$nnodes, but MASTER_ADDR does not name the first node"
    [[ -n ${NODE_RANK:-}${RDZV_ID:-} ]] || fail "NNODES=$nnodes, but neither NODE_RANK nor RDZV_ID says which node this is"
fi

trap 'echo "stopped before the first step; nothing to save: the same command starts again"; exit 75' TERM INT HUP
# Checked here, so that a mistake is told once and not by every rank.
NPROC_PER_NODE=$("$python" - "$nnodes" "${NPROC_PER_NODE:-}" "${settings[@]}" <<'CODE'
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # the script says it

from hunyuan_pretrain.config.load import load_experiment

nodes, ranks, config, *overrides = sys.argv[1:]
try:
    experiment = load_experiment(config, overrides)
    if not ranks:
        import torch

        gpus = torch.cuda.device_count() if experiment.runtime.device != "cpu" else 0
        world, rest = divmod(experiment.parallel.world_size or int(nodes), int(nodes))
        if not gpus and rest:
            raise ValueError(f"{config}: parallel.world_size={experiment.parallel.world_size} does not divide over {nodes} nodes")
        ranks = gpus or world
    load_experiment(config, overrides, int(nodes) * int(ranks))
except ValueError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print(ranks)
CODE
) || exit

address=()
if ((nnodes > 1)); then
    # The ranks of all nodes meet at what torchrun says of the first node: its name, which is not always one that resolves, if not told.
    # The address that leads to MASTER_ADDR is in the right network; asking for it sends nothing.
    LOCAL_ADDR=${LOCAL_ADDR:-$("$python" - "$MASTER_ADDR" <<'CODE'
import socket
import sys

try:
    family, kind, protocol, _, peer = socket.getaddrinfo(sys.argv[1], 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(peer)
        print(probe.getsockname()[0])
except OSError as error:
    sys.exit(f"launch/train.sh: MASTER_ADDR={sys.argv[1]}: {error.strerror or error}; give an address that this node reaches")
CODE
    )} || exit 2
    address=(--local-addr "$LOCAL_ADDR")
fi
if [[ -n ${RDZV_ID:-} ]]; then
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR:-localhost}:$port" --rdzv-id "$RDZV_ID")
    place=${NODE_RANK:-${SLURM_NODEID:-}}
    # Left to itself torchrun compares names and addresses, and on some clusters no node takes itself for the first.
    [[ -z $place ]] || rendezvous+=(--rdzv-conf "is_host=$([[ $place == 0 ]] && echo true || echo false)")
elif ((nnodes > 1)); then
    rendezvous=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$port")
else
    rendezvous=(--standalone)
fi

unset "${!PET_@}"  # torchrun's defaults, meant for a torchrun that somebody else starts
# Unset, torchrun sets it to 1 and says so in a banner; ranks on CPU choose their own number of threads anyway.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" "$here/ranks.py" --nnodes "$nnodes" --nproc-per-node "$NPROC_PER_NODE" ${address[@]+"${address[@]}"} \
    "${rendezvous[@]}" -m hunyuan_pretrain train "${settings[@]}" ${options[@]+"${options[@]}"}
