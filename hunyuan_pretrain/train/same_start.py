"""Before a run starts: what has to be the same on all its ranks, compared. Ranks that differ are named, and nothing
starts.

Each node has its own files, packages, drivers and clock, and nothing else notices if they differ: ranks would train
different models together, wait for each other in collectives that do not fit, or compute at the speed of the slowest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import change_paths
from hunyuan_pretrain.data.digests import digest_of
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.sample_order import facts_of
from hunyuan_pretrain.data.tokenizer import Tokenizer
from hunyuan_pretrain.parallel.agreement import from_rank_0
from hunyuan_pretrain.parallel.comparison import Difference, clocks_off, differences, named
from hunyuan_pretrain.runtime.device import gpu_state, libraries, versions
from hunyuan_pretrain.runtime.environment import compared
from hunyuan_pretrain.runtime.logging import code_version
from hunyuan_pretrain.train import resume

MOST_CLOCK_SKEW_S = 10.0
"""Time services keep clocks to milliseconds: beyond this none is at work, and the logs of different nodes, and the ages
of files, cannot be compared."""

HINTS = {
    **dict.fromkeys(
        ("settings", "data", "tokenizer", "validation"), "give every node the same files and the same command"
    ),
    "code": "give every node the same version of this project",
    "packages": "give every node the same environment, or the same container image",
    "environment": "set the variables for all nodes",
    "gpu": "use nodes of one kind, with the same driver, clocks and power limit",
    "clock": "start a time service (chrony, ntpd) on every node",
}


def meet(experiment: Experiment) -> dict[str, Any]:
    """What this start meets (resume.what_is_met), once it is the same on all ranks.

    Raises ConfigError, the same on every rank, that names the ranks which differ from rank 0 and in what;
    DataFormatError if no rank can read the data or the tokenizer. Communicates: all ranks.
    """
    met: dict[str, Any] = {}
    errors: list[DataFormatError] = []

    def told(read: Callable[[], str]) -> str:
        try:
            return read()
        except DataFormatError as error:
            errors.append(error)
            return str(error)

    def read_data() -> str:
        met.update(resume.what_is_met(experiment, "", {}))
        return digest_of([facts.digest for facts in met["sources"].values()])

    def read_validation() -> str:
        return digest_of([facts_of(PackedDataset(path)).digest for path in experiment.evaluation.paths])

    tokenizer = told(lambda: Tokenizer.load(experiment.tokenizer).digest)
    data = told(read_data)
    if dist.get_world_size() > 1:  # otherwise opened only to be read
        refuse_other_starts(experiment, data, tokenizer, told(read_validation))
    if errors:
        raise errors[0]
    code, _ = from_rank_0(code_version)
    return met | {"tokenizer_digest": tokenizer, "versions": {**(code or {}), **versions()}}


def refuse_other_starts(experiment: Experiment, data: str, tokenizer: str, validation: str) -> None:
    """Raise ConfigError, on every rank, if what a rank has differs from what rank 0 has, except for what
    runtime.ranks_may_differ_in names. `data`, `tokenizer`, `validation` data: digests.

    Paths may differ: nodes may keep copies in different places, and a comparison of layouts has a run_dir for each
    rank. Communicates: all ranks.
    """
    settings = digest_of(change_paths(Experiment, experiment.model_dump(mode="json"), lambda path: ""))
    of_run: dict[str, str | None] = {
        "settings": settings,
        "data": data,
        "tokenizer": tokenizer,
        "validation": validation,
    }
    found = differing(of_run | facts_of_this_rank())
    allowed: tuple[str, ...] = experiment.runtime.ranks_may_differ_in
    if problems := [problem for problem in found if problem.path not in allowed]:
        raise ConfigError("ranks of this job", problems)


def facts_of_this_rank() -> dict[str, str | None]:
    """What does not depend on an experiment; texts whose parts are separated by "; ". The files of the code are read
    by the first rank of each node only."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    device = torch.cuda.current_device() if dist.get_backend() == "nccl" else None
    return {
        "code": code_digest() if is_first else None,
        "packages": "; ".join(f"{name} {version}" for name, version in (versions() | libraries()).items()),
        "environment": "; ".join(f"{name}={value}" for name, value in compared().items()),
        "gpu": gpu_state(device),
    }


def differing(facts: Mapping[str, str | None]) -> list[Problem]:
    """A problem for each fact, and for the clock, in which ranks differ from rank 0; the same on every rank.
    Communicates: all ranks, some hundred bytes each if none differs."""
    problems = [_problem(found) for found in differences(facts)]
    if off := clocks_off(MOST_CLOCK_SKEW_S):
        ranks, most = [rank for rank, _ in off], max(seconds for _, seconds in off)
        rule = f"not the same on all ranks: differs from rank 0 on {named(ranks)}, by {most:.0f} s at least"
        problems.append(Problem("clock", Problem.NO_VALUE, rule, HINTS["clock"]))
    return problems


def _problem(found: Difference) -> Problem:
    rule = f"not the same on all ranks: differs from rank 0 on {found.named_ranks()}"
    parts = [text.split("; ") for text in found.texts]
    first, other = (
        "; ".join(part for part in mine if part not in theirs) or "nothing" for mine, theirs in (parts, reversed(parts))
    )
    if found.name != "settings":  # of those only a digest is known
        rule += f" (rank 0: {_short(first)}; rank {found.ranks[0]}: {_short(other)})"
    return Problem(found.name, Problem.NO_VALUE, rule, HINTS.get(found.name, ""))


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


@cache
def code_digest() -> str:
    """Identifies the code of this project as it lies on disk, whether or not git knows it."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(_sources(package)):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return f"SHA-256 {digest.hexdigest()[:16]} of {package.name}"


def _sources(package: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(package):
        yield from (Path(folder) / name for name in names if name.endswith(".py"))
