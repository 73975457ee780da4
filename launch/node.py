"""The ranks of this node: what launch/train.sh runs once it has found the interpreter.

CONFIG, its overrides and the environment (launch/train.sh --help) are checked here, so that a mistake is told once and
not by every rank. Then they become the arguments of torchrun (launch/ranks.py).
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.ranks import EXIT_MISTAKE, Stop, run_ranks

DEFAULT_PORT = "29500"


OPTIONS = ("--accept-changes", "--from-step")
"""Options of `hunyuan-pretrain train` that are handed on to the ranks; each has a value."""


class MistakeError(Exception):
    """Something in the arguments or the environment that cannot be; the message says what."""


def read_arguments(arguments: Sequence[str], hint: str = "see --help") -> tuple[list[str], list[str]]:
    """(CONFIG and its overrides, options as NAME=VALUE), in the order in which they are given. Raises MistakeError."""
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
    """The job as its environment describes it to this node; "" where it does not say."""

    num_nodes: int
    ranks_per_node: int | None
    node_rank: str
    slurm_node: str
    master_addr: str
    master_port: str
    local_addr: str
    rendezvous: str
    """Name of the job, under which its nodes meet and agree on their numbers."""


def read_job(environment: Mapping[str, str]) -> Job:
    """What the environment says; a name with nothing behind it counts as absent. Raises MistakeError."""
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
    )
    if job.num_nodes > 1:
        check_meeting(job)
    return job


def check_meeting(job: Job) -> None:
    """Refuse several nodes that would not find one another; raises MistakeError."""
    nodes, port, number = job.num_nodes, job.master_port, job.node_rank
    if not is_count(port) or int(port) > 65535:
        raise MistakeError(f"MASTER_PORT={port}: must be a port, 1 to 65535")
    if number and not (re.fullmatch("[0-9]+", number) and int(number) < nodes):
        raise MistakeError(f"NODE_RANK={number}: must be a number from 0 to {nodes - 1}, for NNODES={nodes}")
    if not job.master_addr:
        raise MistakeError(f"NNODES={nodes}, but MASTER_ADDR does not name the first node")
    if not (number or job.rendezvous):
        raise MistakeError(f"NNODES={nodes}, but neither NODE_RANK nor RDZV_ID says which node this is")


def is_count(text: str) -> bool:
    """Whether a text is a whole number above 0, as a shell writes it."""
    return re.fullmatch("[1-9][0-9]*", text) is not None


def count_ranks(config: str, overrides: Sequence[str], job: Job) -> int:
    """Ranks of this node: as told, else its GPUs, else its share of parallel.world_size.

    Raises ValueError (ConfigError) where the experiment is wrong, or does not fit so many ranks.
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
    """The address of this node in the network that leads to the first node; asking for it sends nothing. Raises
    MistakeError."""
    try:
        family, kind, protocol, _, peer = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError as error:
        reason = error.strerror or error
        raise MistakeError(f"MASTER_ADDR={master}: {reason}; give an address that this node reaches") from None


def torchrun_arguments(job: Job, ranks: int) -> list[str]:
    """How torchrun is told of the job. Raises MistakeError where the first node cannot be reached."""
    found = ["--nnodes", str(job.num_nodes), "--nproc-per-node", str(ranks)]
    if job.num_nodes > 1:
        # The ranks of all nodes meet at what torchrun says of the first node: its name, which is not always one that
        # resolves, if not told.
        found += ["--local-addr", job.local_addr or address_towards(job.master_addr)]
    if job.rendezvous:
        endpoint = f"{job.master_addr or 'localhost'}:{job.master_port}"
        found += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", job.rendezvous]
        # Left to itself torchrun compares names and addresses, and on some clusters no node takes itself for the first.
        if place := job.node_rank or job.slurm_node:
            found += ["--rdzv-conf", f"is_host={'true' if place == '0' else 'false'}"]
    elif job.num_nodes > 1:
        found += ["--node-rank", job.node_rank, "--master-addr", job.master_addr, "--master-port", job.master_port]
    else:
        found.append("--standalone")
    return found


def prepare_environment() -> None:
    """What the ranks find in their environment."""
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]  # torchrun's defaults, meant for a torchrun that somebody else starts
    # Unset, torchrun sets it to 1 and says so in a banner; ranks on CPU choose their own number of threads anyway.
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"


def main(arguments: Sequence[str], stop: Stop) -> int:
    """Start the ranks of `hunyuan-pretrain train` with these arguments and wait for them; returns the exit status."""
    try:
        settings, options = read_arguments(arguments)
        job = read_job(os.environ)
        launcher = torchrun_arguments(job, count_ranks(settings[0], settings[1:], job))
    except MistakeError as error:
        print(f"launch/train.sh: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_MISTAKE
    prepare_environment()
    return run_ranks([*launcher, "-m", "hunyuan_pretrain", "train", *settings, *options], stop)


if __name__ == "__main__":
    _stop = Stop()
    _stop.listen()
    sys.exit(main(sys.argv[1:], _stop))
