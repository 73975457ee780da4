"""What a user asks of `hunyuan-pretrain submit`, checked against the experiment before anything is written."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import Experiment

PLACES = ("local", "slurm", "ssh", "kubernetes")
RUNTIMES = ("pyxis", "apptainer")
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")


@dataclass(frozen=True)
class Request:
    """A job."""

    config: Path
    overrides: tuple[str, ...]
    place: str
    nodes: int
    ranks_per_node: int
    train_options: tuple[str, ...] = ()
    """Options of `train`, as NAME=VALUE."""
    is_doctor: bool = False
    """Whether the ranks run `doctor --cluster` instead of `train`."""
    hosts: tuple[str, ...] = ()
    """With ssh: a host for each node, the first one where the ranks rendezvous."""
    time: str = ""
    """Time limit as Slurm writes it, such as 24:00:00."""
    partition: str = ""
    account: str = ""
    options: tuple[str, ...] = ()
    """More options of sbatch, NAME or NAME=VALUE."""
    chain: int = 1
    """Jobs, each of which begins when the one before it ends."""
    requeue: bool = False
    image: str = ""
    """Container image; "" runs on the host."""
    runtime: str = ""
    """What starts the container under Slurm; "": pyxis."""
    mounts: tuple[str, ...] = ()
    """Folders that a container sees under the same path; with kubernetes CLAIM=PATH."""
    grace_s: int = 0
    """Between the scheduler's request to stop and the end of the job (grace.py)."""
    python: str = field(default=sys.executable)
    """The interpreter on the nodes."""

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * self.ranks_per_node

    @property
    def variables(self) -> dict[str, str]:
        """What tells the launcher of a node (launch/node.py) about the job, wherever it runs."""
        program = {"HUNYUAN_PROGRAM": "doctor"} if self.is_doctor else {}
        return {"NPROC_PER_NODE": str(self.ranks_per_node), **program}


def ranks_per_node(config: Path, overrides: list[str], nodes: int, told: int | None) -> int:
    """`told`, or what parallel.world_size leaves for each node. Raises ConfigError."""
    if told is not None:
        return told
    world_size = load_experiment(config, overrides).parallel.world_size
    if world_size is None or world_size % nodes:
        value = Problem.NO_VALUE if world_size is None else world_size
        rule = f"does not say how many ranks each of {nodes} nodes has"
        raise ConfigError(str(config), [Problem("parallel.world_size", value, rule, "add --gpus-per-node")])
    return world_size // nodes


def check(request: Request) -> Experiment:
    """The experiment, for the ranks of the job. Raises ConfigError with every problem: the job's ranks are not those
    of the experiment, an option that its place does not have, a malformed one."""
    experiment = load_experiment(request.config, list(request.overrides), request.ranks)
    # where the job runs, another number of ranks is then refused
    parallel = experiment.parallel.model_copy(update={"world_size": request.ranks})
    experiment = experiment.model_copy(update={"parallel": parallel})
    problems = [*_misplaced(request), *_malformed(request)]
    if request.place == "local" and request.nodes > 1:
        problems.append(Problem("--nodes", request.nodes, "this machine is one node", "use --slurm or --ssh"))
    if request.place == "ssh" and len(request.hosts) != request.nodes:
        rule = f"{len(request.hosts)} hosts for {request.nodes} nodes"
        problems.append(Problem("--ssh", ",".join(request.hosts), rule, f"--nodes {len(request.hosts)}"))
    if request.place == "kubernetes" and not request.image:
        problems.append(Problem("--image", Problem.NO_VALUE, "a pod needs an image", "see docs/guide/submit.md"))
    if problems:
        raise ConfigError("submit", problems)
    return experiment


def _misplaced(request: Request) -> list[Problem]:
    """Options that would have no effect."""
    only = {
        "--time": (request.time, ("slurm",)),
        "--partition": (request.partition, ("slurm",)),
        "--account": (request.account, ("slurm",)),
        "--option": (request.options, ("slurm",)),
        "--chain": (request.chain > 1, ("slurm",)),
        "--requeue": (request.requeue, ("slurm",)),
        "--image": (request.image, ("slurm", "kubernetes")),
        "--container-runtime": (request.runtime, ("slurm",)),
        "--mount": (request.mounts, ("slurm", "kubernetes")),
    }
    found = [
        Problem(
            name, Problem.NO_VALUE, f"has no effect with --{request.place}", f"only with --{' and --'.join(places)}"
        )
        for name, (value, places) in only.items()
        if value and request.place not in places
    ]
    if request.is_doctor and (request.train_options or request.chain > 1 or request.requeue):
        rule = "starts no training, so --accept-changes, --from-step, --chain and --requeue have no effect"
        found.append(Problem("--doctor", Problem.NO_VALUE, rule, "leave them out"))
    for name, value in (("--mount", request.mounts), ("--container-runtime", request.runtime)):
        if value and not request.image:
            found.append(Problem(name, Problem.NO_VALUE, "has no effect without --image", "leave it out"))
    return found


def _malformed(request: Request) -> list[Problem]:
    found = []
    if request.time and not _TIME.fullmatch(request.time):
        found.append(Problem("--time", request.time, "is no time limit", "MINUTES, HH:MM:SS or DAYS-HH:MM:SS"))
    for option in request.options:
        if not _NAME.fullmatch(option.partition("=")[0]) or "\n" in option:
            found.append(Problem("--option", option, "is no option of sbatch", "NAME or NAME=VALUE, without dashes"))
    for name in ("partition", "account", "image"):
        if re.search(r"\s", getattr(request, name)):
            found.append(Problem(f"--{name}", getattr(request, name), "contains a space", "a name"))
    for host in request.hosts:
        if not re.fullmatch(r"([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9][\w.:-]*", host):
            found.append(Problem("--ssh", host, "is no host", "names or addresses with commas, or a file of them"))
    if request.runtime and request.runtime not in RUNTIMES:
        found.append(Problem("--container-runtime", request.runtime, "is unknown", " or ".join(RUNTIMES)))
    return found
