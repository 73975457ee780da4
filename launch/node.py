"""Starts the ranks of this node: launch/train.sh runs this once it has found the interpreter. Without a checkout:
`python -m launch.node CONFIG`.

CONFIG, its overrides and the environment (launch/train.sh --help) are checked here, so that a mistake is reported once
and not by every rank. They then become the arguments of torchrun (launch/ranks.py).
"""

from __future__ import annotations

import os
import re
import resource
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hunyuan_pretrain.config.exit_status import COMMAND, LAUNCHER
from launch.ranks import EXIT_MISTAKE, Stop, run_ranks

DEFAULT_PORT = "29500"


RESTARTS = "MAX_RESTARTS"
OPTIONS = ("--accept-changes", "--from-step")
"""Options of `hunyuan-pretrain train` that are passed on to the ranks; each takes a value."""


VARIABLES = ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_ADDR", "RDZV_ID", RESTARTS)
"""The environment that describes a job."""


class MistakeError(Exception):
    """The arguments or the environment are invalid; the message says why."""


def read_arguments(arguments: Sequence[str], hint: str = "see --help") -> tuple[list[str], list[str]]:
    """(CONFIG and its overrides, options as NAME=VALUE), each in the order given. Raises MistakeError."""
    settings, options = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name in OPTIONS:
            value = None if equals else next(rest, None)
            if not equals and value is None:
                raise MistakeError(f"{argument}: no value; {hint}")
            options.append(argument if equals else f"{argument}={value}")
        elif argument.startswith("-"):
            raise MistakeError(f"{argument}: unknown option; settings are KEY=VALUE; {hint}")
        else:
            settings.append(argument)
    if not settings:
        raise MistakeError(f"no CONFIG; {hint}")
    for option in options:
        if option.startswith("--from-step=") and not is_count(option.partition("=")[2]):
            raise MistakeError(f"{option}: must be a number of steps")
    if not os.path.isfile(settings[0]):
        raise MistakeError(f"{settings[0]}: {'not a file' if os.path.exists(settings[0]) else 'no such file'}")
    return settings, options


@dataclass(frozen=True)
class Job:
    """The job as the environment of this node describes it; "" for a variable that is not set."""

    num_nodes: int
    ranks_per_node: int | None
    node_rank: str
    slurm_node: str
    master_addr: str
    master_port: str
    local_addr: str
    rendezvous: str
    """Name of the job, under which its nodes rendezvous and agree on their ranks."""
    restarts: int = 0
    """How often ranks that failed are started again."""


def read_job(environment: Mapping[str, str]) -> Job:
    """The job from the environment; an empty variable counts as unset. Raises MistakeError."""
    nodes, ranks = environment.get("NNODES") or "1", environment.get("NPROC_PER_NODE", "")
    if not is_count(nodes):
        raise MistakeError(f"NNODES={nodes}: must be a number of nodes")
    if ranks and not is_count(ranks):
        raise MistakeError(f"NPROC_PER_NODE={ranks}: must be a number of ranks")
    job = Job(
        num_nodes=int(nodes),
        ranks_per_node=int(ranks) if ranks else None,
        node_rank=environment.get("NODE_RANK", ""),
        slurm_node=environment.get("SLURM_NODEID", ""),
        master_addr=environment.get("MASTER_ADDR", ""),
        master_port=environment.get("MASTER_PORT") or DEFAULT_PORT,
        local_addr=environment.get("LOCAL_ADDR", ""),
        rendezvous=environment.get("RDZV_ID", ""),
        restarts=count_restarts(environment.get(RESTARTS) or "0", int(nodes)),
    )
    if job.num_nodes > 1:
        check_meeting(job)
    return job


def check_meeting(job: Job) -> None:
    """Raise MistakeError if several nodes could not find each other."""
    nodes, port, number = job.num_nodes, job.master_port, job.node_rank
    if not is_count(port) or int(port) > 65535:
        raise MistakeError(f"MASTER_PORT={port}: must be a port, 1 to 65535")
    if number and not (re.fullmatch("[0-9]+", number) and int(number) < nodes):
        raise MistakeError(f"NODE_RANK={number}: must be a number from 0 to {nodes - 1}, for NNODES={nodes}")
    if not job.master_addr:
        raise MistakeError(f"NNODES={nodes}, but MASTER_ADDR does not name the first node")
    if not (number or job.rendezvous):
        raise MistakeError(f"NNODES={nodes}, but neither NODE_RANK nor RDZV_ID says which node this is")


def count_restarts(text: str, nodes: int) -> int:
    """Raises MistakeError."""
    if not re.fullmatch("[0-9]{1,6}", text):
        raise MistakeError(f"{RESTARTS}={text}: must be a number")
    if int(text) and nodes > 1:
        raise MistakeError(
            f"{RESTARTS}={text}: is for one node; on several, the job is started again as a whole (sbatch --requeue)"
        )
    return int(text)


def is_count(text: str) -> bool:
    """Whether a text is a positive integer without leading zeros."""
    return re.fullmatch("[1-9][0-9]*", text) is not None


def count_ranks(config: str, overrides: Sequence[str], job: Job) -> int:
    """Ranks on this node: NPROC_PER_NODE, else its number of GPUs, else its share of parallel.world_size.

    Raises ValueError (ConfigError) if the experiment is invalid or does not fit this number of ranks.
    """
    from hunyuan_pretrain.config.load import load_experiment

    experiment = load_experiment(config, overrides)
    ranks = job.ranks_per_node
    if ranks is None:
        import torch

        gpus = torch.cuda.device_count() if experiment.runtime.device != "cpu" else 0
        share, rest = divmod(experiment.parallel.world_size or job.num_nodes, job.num_nodes)
        if not gpus and rest:
            raise ValueError(
                f"{config}: parallel.world_size={experiment.parallel.world_size} does not divide over "
                f"{job.num_nodes} nodes"
            )
        ranks = gpus or share
    load_experiment(config, overrides, job.num_nodes * ranks)
    return ranks


def address_towards(master: str) -> str:
    """The address of this node on the network that reaches the first node; no packet is sent. Raises MistakeError."""
    try:
        family, kind, protocol, _, peer = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError as error:
        reason = error.strerror or error
        raise MistakeError(f"MASTER_ADDR={master}: {reason}; give an address that this node reaches") from None


def torchrun_arguments(job: Job, ranks: int) -> list[str]:
    """torchrun's arguments for the job. Raises MistakeError if the first node cannot be reached."""
    found = ["--nnodes", str(job.num_nodes), "--nproc-per-node", str(ranks)]
    if job.num_nodes > 1:
        # All ranks rendezvous at the address that torchrun reports for the first node. By default that is its host
        # name, which does not always resolve.
        found += ["--local-addr", job.local_addr or address_towards(job.master_addr)]
    if job.rendezvous:
        endpoint = f"{job.master_addr or 'localhost'}:{job.master_port}"
        found += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", job.rendezvous]
        # By default torchrun compares names and addresses; on some clusters no node then considers itself the host.
        if place := job.node_rank or job.slurm_node:
            found += ["--rdzv-conf", f"is_host={'true' if place == '0' else 'false'}"]
    elif job.num_nodes > 1:
        found += ["--node-rank", job.node_rank, "--master-addr", job.master_addr, "--master-port", job.master_port]
    else:
        found.append("--standalone")
    return found


def program_of(settings: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """What each rank runs: `train`, or what HUNYUAN_PROGRAM names. Raises MistakeError."""
    name = environment.get("HUNYUAN_PROGRAM") or "train"
    if name not in ("train", "doctor"):
        raise MistakeError(f"HUNYUAN_PROGRAM={name}: must be train or doctor")
    return ["train", *settings] if name == "train" else ["doctor", *settings, "--cluster"]


def command_line(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """What started the ranks of this node, for a shell."""
    job = [f"{name}={environment[name]}" for name in VARIABLES if environment.get(name)]
    launcher = [environment["HUNYUAN_LAUNCHER"]] if "HUNYUAN_LAUNCHER" in environment else []
    return " ".join(map(shlex.quote, [*job, *(launcher or [sys.executable, "-m", "launch.node"]), *arguments]))


def prepare_environment(arguments: Sequence[str]) -> None:
    """Set the environment that the ranks inherit. `arguments`: of this program."""
    os.environ.setdefault(COMMAND, command_line(arguments, os.environ))
    os.environ[LAUNCHER] = str(os.getpid())
    # this process serves the store of the job, with some connections of each rank
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]  # defaults for another torchrun
    # If it is unset, torchrun sets it to 1 and prints a banner; ranks on CPU choose their own number of threads anyway.
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"


def main(arguments: Sequence[str], stop: Stop) -> int:
    """Run `hunyuan-pretrain train` with these arguments on all ranks of this node; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        import subprocess  # not before the launcher listens to SIGTERM

        return subprocess.run(["bash", Path(__file__).with_name("train.sh"), "--help"], check=False).returncode
    try:
        settings, options = read_arguments(arguments)
        job = read_job(os.environ)
        launcher = torchrun_arguments(job, count_ranks(settings[0], settings[1:], job))
        program = program_of(settings, os.environ)
    except MistakeError as error:
        print(f"launch/train.sh: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_MISTAKE
    prepare_environment(arguments)
    return run_ranks([*launcher, "-m", "hunyuan_pretrain", *program, *options], stop, job.restarts)


if __name__ == "__main__":
    _stop = Stop()
    _stop.listen()
    sys.exit(main(sys.argv[1:], _stop))
