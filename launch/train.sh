#!/usr/bin/env bash
# Starts the ranks of a training run on this node. This script finds the interpreter; launch/node.py does the rest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
program=launch/train.sh
. "$here/interpreter.sh"

usage() {
    cat <<'TEXT'
Usage: launch/train.sh CONFIG [KEY=VALUE]... [--accept-changes KEY[,KEY]...]... [--from-step STEP]

Starts the ranks of one training run on this node. Each rank runs `hunyuan-pretrain train` with these arguments, which
`hunyuan-pretrain train --help` explains. The same command resumes from the newest checkpoint.

Exit status: 0 done; 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C after saving, start it again; 130 a second Ctrl-C; 2 a mistake in CONFIG, an override,
the data or this command; 1 any other failure.

Environment (RANK, WORLD_SIZE, LOCAL_RANK and torchrun's PET_* are ignored; the launcher sets them for the ranks that it starts):
  NPROC_PER_NODE   ranks on this node; default: its number of GPUs, else parallel.world_size of CONFIG / NNODES, else 1
  NNODES           number of nodes, default 1
  NODE_RANK        index of this node from 0, required for NNODES > 1; not needed with RDZV_ID
  MASTER_ADDR      address of the first node, required for NNODES > 1, ignored for one node
  MASTER_PORT      a free port on the first node, the same on all nodes, default 29500; a single node takes any free port
  LOCAL_ADDR       address of this node for the others, default: the one from which it reaches MASTER_ADDR
  RDZV_ID          name of the job: the nodes then rendezvous at MASTER_ADDR:MASTER_PORT (c10d) and agree on their ranks; the node with
                   NODE_RANK (else SLURM_NODEID) 0 hosts the rendezvous
  MAX_RESTARTS     how often ranks that fail are started again, from the newest good checkpoint; default 0; one node only
  HUNYUAN_PYTHON   interpreter, default: the one behind hunyuan-pretrain on PATH, else .venv of this checkout
  HUNYUAN_PROGRAM  train (default), or doctor: `hunyuan-pretrain doctor CONFIG --cluster` on the same ranks
TEXT
}

for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
        usage
        exit 0
    fi
done
trap 'echo "stopped before the first step; nothing to save: the same command starts again"; exit 75' TERM INT HUP USR1
find_interpreter
HUNYUAN_LAUNCHER=$0 exec "$python" -m launch.node "$@"
