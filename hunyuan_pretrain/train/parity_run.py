"""`hunyuan-pretrain parity`: run two layouts of an experiment and say whether they train the same model.

Without torchrun, the ranks of each layout are processes of this machine. Under torchrun both layouts run one after the other in the
ranks of the job, which is how a cluster is checked: its own kernels and network.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.schema import ConfigError, Experiment, ParallelConfig, Problem
from hunyuan_pretrain.train.parity import TOLERANCE, Difference, compare, trace_layout

SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
Result = TypeVar("Result")

KEYS = (*SIZES, "dp", "micro", "zero1", "recompute", "method")


def layout_experiment(experiment: Experiment, layout: str, num_ranks: int | None, folder: Path) -> tuple[Experiment, int]:
    """The experiment under a layout such as "tp=2,pp=2", in fp32 without FP8, writing to `folder`; and its number of ranks.

    Sizes that the layout does not name are 1, but dp fills up `num_ranks` where those are given; micro (sequences of a micro-batch),
    zero1 (distributed optimizer, 0 or 1), recompute and method (of context parallelism) are the experiment's. Raises ConfigError.
    """
    values = _parse(layout)
    sizes = {field: int(values.get(key, 1)) for key, field in SIZES.items()}
    changes: dict[str, Any] = dict(sizes) | {"world_size": None, "sequence_parallel": sizes["tensor_model_parallel_size"] > 1}
    if any(sizes[SIZES[key]] != getattr(experiment.parallel, SIZES[key]) for key in ("pp", "vpp")):
        changes["pipeline_layout"] = None
    if "zero1" in values:
        changes["use_distributed_optimizer"] = bool(int(values["zero1"]))
        if not changes["use_distributed_optimizer"]:
            changes["overlap_param_gather"] = False
    for key, field in (("recompute", "recompute"), ("method", "context_parallel_method")):
        if key in values:
            changes[field] = values[key]
    fields = experiment.model_dump()
    fields["parallel"] = ParallelConfig.model_validate(experiment.parallel.model_dump() | changes).model_dump()
    # no FP8: the last bit of a sum in another order would become a step of FP8
    fields["precision"] = {"dtype": "fp32", "grad_reduce_in_fp32": experiment.precision.grad_reduce_in_fp32}
    fields["runtime"]["verify_data"] = "sizes"  # whether two layouts agree does not depend on what they read
    # Adam divides a gradient by its own size: without a large epsilon the sign of rounding noise would be an update
    fields["optimizer"]["adam_eps"] = max(experiment.optimizer.adam_eps, 1e-3)
    fields["run_dir"] = str(folder)
    fields["evaluation"] |= {"data": None, "sets": []}
    fields["logging"] |= {"wandb": "disabled", "tensorboard": False}
    if "micro" in values:
        for stage in fields["stages"]:
            stage["micro_batch_sequences"] = int(values["micro"])
    result = Experiment.model_validate(fields)
    needed = math.prod(sizes[SIZES[key]] for key in ("tp", "pp", "cp"))
    ranks = num_ranks if num_ranks and "dp" not in values else needed * int(values.get("dp", 1))
    rules.check(result, world_size=ranks, source=f"layout {layout}")
    if num_ranks is not None and ranks != num_ranks:
        raise ConfigError(
            f"layout {layout}", [Problem("dp", int(values["dp"]), f"makes {ranks} ranks, the job has {num_ranks}", "leave dp out")]
        )
    return result, ranks


def _parse(layout: str) -> dict[str, str]:
    """{"tp": "2", ...} of "tp=2,..."; raises ConfigError with every unknown or unreadable part."""
    values, problems = {}, []
    for part in filter(None, layout.split(",")):
        key, _, value = part.partition("=")
        if key not in KEYS:
            problems.append(Problem(key, Problem.NO_VALUE, "no such part of a layout", f"use {', '.join(KEYS)}"))
        elif key in ("recompute", "method"):
            allowed = {"recompute": ("none", "selective", "cla_group"), "method": ("all_gather", "all_to_all")}[key]
            if value not in allowed:
                problems.append(Problem(key, value, "no such choice", f"use {', '.join(allowed)}"))
        elif not value.isdecimal() or (int(value) < 1 and key != "zero1"):
            problems.append(Problem(key, value, "not a number of at least 1", "such as tp=2"))
        values[key] = value
    if problems:
        raise ConfigError(f"layout {layout}", problems)
    return values


def run_parity(experiment: Experiment, layout: str, against: str, steps: int) -> list[Difference]:
    """Differences of `layout` from `against` after training `steps` steps each; under torchrun on rank 0 only, elsewhere an empty list."""
    with tempfile.TemporaryDirectory(prefix="hunyuan_parity_") as folder:
        in_job = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
        runs = [layout_experiment(experiment, text, in_job, Path(folder) / name) for name, text in (("a", layout), ("b", against))]
        traces = [trace_layout(run, steps) if in_job else in_processes(ranks, trace_layout, run, steps) for run, ranks in runs]
    return compare(traces[0], traces[1]) if int(os.environ.get("RANK", "0")) == 0 else []


def in_processes(num_ranks: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments) in that many ranks, processes of this machine; what it returns on rank 0. A failure in one ends all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pool = ProcessPoolExecutor(num_ranks, mp_context=multiprocessing.get_context("spawn"))
    ranks = [pool.submit(_rank, rank, num_ranks, port, function, arguments) for rank in range(num_ranks)]
    done, running = wait(ranks, return_when=FIRST_EXCEPTION)
    if running:  # one failed; the others would wait for it in a collective
        for process in pool._processes.values():
            process.kill()
    pool.shutdown(wait=not running)
    for rank in done:
        rank.result()
    return ranks[0].result()


def _rank(rank: int, num_ranks: int, port: int, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return function(*arguments)


def report(differences: list[Difference]) -> list[tuple[str, str, str, str, str]]:
    """Rows (what, compared, bitwise equal, largest relative difference and where, verdict) for each step and kind."""
    rows = []
    for step in sorted({difference.step for difference in differences}):
        kinds = list(dict.fromkeys(difference.kind for difference in differences if difference.step == step))
        for kind in kinds:
            found = [difference for difference in differences if (difference.step, difference.kind) == (step, kind)]
            worst = max(found, key=lambda difference: difference.relative)
            bitwise = sum(difference.relative == 0 for difference in found)
            verdict = "equal" if all(difference.is_within for difference in found) else "DIFFERENT"
            rows.append((f"step {step + 1}: {kind}", f"{len(found)}", f"{bitwise}", f"{worst.relative:.2e} {worst.name}", verdict))
    return rows


def conclusion(differences: list[Difference]) -> Iterator[str]:
    """What a person has to know: equal, or where the layouts part first."""
    outside = [difference for difference in differences if not difference.is_within]
    if not outside:
        yield f"the layouts train the same model: every difference is within {TOLERANCE:g} of the largest entry of its tensor"
        return
    first = outside[0]
    yield f"the layouts DIFFER in {len(outside)} of {len(differences)} comparisons"
    what = f"step {first.step + 1}, {first.kind} of {first.name}"
    yield f"first in order of execution: {what}, by {first.relative:.2e} (tolerance {TOLERANCE:g})"
    if first.kind == "gradient":
        yield "the forward pass is the same; the backward pass, or the reduction of this gradient, is not"
    if first.kind in ("moment", "parameter"):
        yield "the gradients are the same; clipping or the update is not"
