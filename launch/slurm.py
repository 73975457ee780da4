"""A training run as a Slurm job: launch/train.sbatch runs this on the first node once it has found the interpreter.

It checks the experiment before any node starts, starts one launch/train.sh per node with srun, and reports how they
ended.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hunyuan_pretrain.config.exit_status import COMMAND, STOP_SIGNALS
from launch.node import MistakeError, is_count, read_arguments
from launch.ranks import EXIT_MISTAKE, EXIT_STOPPED

NEEDED = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES")


def count_ranks(config: str, world_size: int | None, environment: Mapping[str, str]) -> int:
    """Ranks per node: NPROC_PER_NODE, else the GPUs of a node, else its share of parallel.world_size. Raises
    MistakeError."""
    nodes = int(environment["SLURM_JOB_NUM_NODES"])
    if told := environment.get("NPROC_PER_NODE") or environment.get("SLURM_GPUS_ON_NODE"):
        if not is_count(told):
            raise MistakeError(f"NPROC_PER_NODE={told}: must be a number of ranks")
        return int(told)
    if world_size is None:
        raise MistakeError(
            f"no GPUs on this node and no parallel.world_size in {config}: set the ranks per node with NPROC_PER_NODE"
        )
    if world_size % nodes:
        raise MistakeError(f"parallel.world_size={world_size} does not divide over {nodes} nodes")
    return world_size // nodes


def first_address(nodelist: str) -> str:
    """The address of the first node according to Slurm, because a node's name need not resolve. Raises MistakeError,
    CalledProcessError."""
    names = said_by("scontrol", "show", "hostnames", nodelist).split()
    found = re.search(r" NodeAddr=(\S+)", said_by("scontrol", "show", "node", names[0], "--oneliner"))
    if found is None:
        raise MistakeError(f"Slurm does not report the address of {names[0]}")
    return found[1]


def said_by(*command: str) -> str:
    """The stdout of a command. Raises CalledProcessError if it fails; its stderr has then shown the reason."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def meeting(ranks: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that describe the job to each node's launcher (launch/train.sh --help). Raises as `first_address`
    does."""
    job = environment["SLURM_JOB_ID"]
    return {
        "NNODES": environment["SLURM_JOB_NUM_NODES"],
        "NPROC_PER_NODE": str(ranks),
        "MASTER_ADDR": first_address(environment["SLURM_JOB_NODELIST"]),
        # jobs that share a first node use different ports
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + int(job) % 20000),
        "RDZV_ID": f"{job}.{environment.get('SLURM_RESTART_COUNT') or 0}",
    }


def start(script: str, arguments: Sequence[str]) -> int:
    """Run the job; returns its exit status. Raises MistakeError, ValueError (ConfigError), CalledProcessError."""
    from hunyuan_pretrain.config.load import load_experiment

    if not all(os.environ.get(name) for name in NEEDED):
        raise MistakeError(
            "not inside a Slurm job (no SLURM_JOB_NODELIST): submit it with sbatch; for one node use launch/train.sh"
        )
    settings, _ = read_arguments(arguments, "sbatch launch/train.sbatch CONFIG [KEY=VALUE]...")
    experiment = load_experiment(settings[0], settings[1:])
    ranks = count_ranks(settings[0], experiment.parallel.world_size, os.environ)
    # refuses a world size that does not fit the layout before any node starts
    world_size = ranks * int(os.environ["SLURM_JOB_NUM_NODES"])
    plan = [sys.executable, "-m", "hunyuan_pretrain", "plan", *settings, "--world-size", str(world_size)]
    subprocess.run(plan, check=True)
    job = meeting(ranks, os.environ)
    logs = Path(experiment.run_dir) / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    number, nodes = os.environ["SLURM_JOB_ID"], job["NNODES"]
    place = f"{job['MASTER_ADDR']}:{job['MASTER_PORT']}"
    print(
        f"job {number}: {nodes} nodes x {ranks} ranks, rendezvous at {place}; logs: {logs}/{number}.*.log",
        flush=True,
    )
    srun = ["srun", "--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", "--kill-on-bad-exit=0"]
    srun += ["--open-mode", "append", "--output", f"{logs}/%j.%n.log"]
    srun += [*container_options(os.environ), *node_command(script, os.environ), *arguments]
    again = shlex.join(["sbatch", "--nodes", nodes, "launch/train.sbatch", *arguments])
    status = run_nodes(srun, {COMMAND: again} | os.environ | job)
    return end(status if status >= 0 else 128 - status, number, logs)


def run_nodes(srun: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run srun; returns its status. A stop that reaches the batch script only (sbatch --signal=B:USR1@300) is passed on
    to it, and by it to the nodes."""
    with subprocess.Popen(srun, env=environment) as nodes:
        for number in STOP_SIGNALS:
            # srun would only print how its tasks are at a SIGINT
            signal.signal(number, lambda *_: nodes.send_signal(signal.SIGTERM))
        return nodes.wait()


def container_options(environment: Mapping[str, str]) -> list[str]:
    """Options of srun that start a container (Pyxis), from `hunyuan-pretrain submit`."""
    return [str(option) for option in json.loads(environment.get("HUNYUAN_SRUN_OPTIONS") or "[]")]


def node_command(script: str, environment: Mapping[str, str]) -> list[str]:
    """What starts the ranks of a node: launch/train.sh, or in a container, which has no checkout and an interpreter of
    its own, what train.sh would run."""
    inside = environment.get("HUNYUAN_RUN_IN")
    return [*json.loads(inside), "python3", "-m", "launch.node"] if inside else [script]


def end(status: int, job: str, logs: Path) -> int:
    """Print how the nodes ended, and requeue a stopped job if HUNYUAN_REQUEUE=1; returns the job's status."""
    if status == 0:
        print("done", flush=True)
    elif status == EXIT_STOPPED:
        print("stopped after saving (status 75): the same job resumes from there", flush=True)
        if os.environ.get("HUNYUAN_REQUEUE") == "1":
            subprocess.run(["scontrol", "requeue", job], check=True)
    else:
        print(f"failed with status {status}; see {logs}/{job}.*.log", file=sys.stderr)
    return status


def main(script: str, arguments: Sequence[str]) -> int:
    """Run the job and print a mistake as one message; returns the exit status."""
    try:
        return start(script, arguments)
    except MistakeError as error:
        print(f"launch/train.sbatch: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ValueError as error:
        print(error, file=sys.stderr)
    return EXIT_MISTAKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
