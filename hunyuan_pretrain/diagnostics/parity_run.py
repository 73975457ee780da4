"""`hunyuan-pretrain parity`: run two layouts of an experiment and report whether they train the same model.

Without torchrun, the ranks of each layout are processes on this machine. Under torchrun, both layouts run one after the
other in the job's ranks, which checks a cluster with its own kernels and network.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.layouts import Engine, Precision, layout_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.diagnostics.parity import Difference, StepTrace, compare, trace_layout
from hunyuan_pretrain.diagnostics.parity_noise import NOISE_SEEDS, compare_rounded
from hunyuan_pretrain.runtime import cpu_megatron
from hunyuan_pretrain.runtime.device import probe
from hunyuan_pretrain.runtime.policy import obstacles

Result = TypeVar("Result")


def run_parity(
    experiment: Experiment,
    layout: str,
    against: str,
    steps: int,
    precision: Precision = "fp32",
    engine: Engine = "own",
    against_engine: Engine = "own",
) -> list[Difference]:
    """Train `steps` steps in each layout and return the differences of `layout` from `against`. Under torchrun, ranks
    other than 0 return an empty list.

    In bf16 and fp8 the reference also runs once per seed of rounding noise, see parity_noise. Raises ConfigError.
    """
    with tempfile.TemporaryDirectory(prefix="hunyuan_parity_") as folder:
        in_job = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
        runs = [
            layout_experiment(experiment, text, in_job, Path(folder) / name, precision, layers)
            for name, text, layers in (("a", layout, engine), ("b", against, against_engine))
        ]
        for run, ranks in runs if in_job is None else []:
            if found := obstacles(probe(), run, ranks):
                raise ConfigError("this machine", found)

        def trace(run: Experiment, ranks: int, *options: Any) -> list[StepTrace]:
            return (
                trace_layout(run, steps, *options)
                if in_job
                else in_processes(ranks, trace_layout, run, steps, *options)
            )

        reference = trace(*runs[1])
        choices = None if precision == "fp32" else [step.choices for step in reference]
        actual = trace(*runs[0], None, choices)
        noisy = [] if precision == "fp32" else [trace(*runs[1], seed, choices) for seed in NOISE_SEEDS]
    if int(os.environ.get("RANK", "0")) > 0:
        return []
    return compare(actual, reference) if precision == "fp32" else compare_rounded(actual, reference, noisy)


def in_processes(num_ranks: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call function(*arguments) on `num_ranks` ranks, processes of this machine, and return rank 0's result. A failure
    on one rank ends all and is raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pool = ProcessPoolExecutor(
        num_ranks, mp_context=multiprocessing.get_context("spawn"), initializer=cpu_megatron.install
    )
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
    """Rows (what, number compared, number bitwise equal, largest relative difference and its name, verdict), one per
    step and kind."""
    rows = []
    for step in sorted({difference.step for difference in differences}):
        kinds = list(dict.fromkeys(difference.kind for difference in differences if difference.step == step))
        for kind in kinds:
            found = [difference for difference in differences if (difference.step, difference.kind) == (step, kind)]
            worst = max(found, key=lambda difference: (not difference.is_within, difference.relative))
            bitwise = sum(difference.relative == 0 for difference in found)
            verdict = "equal" if all(difference.is_within for difference in found) else "DIFFERENT"
            rows.append(
                (
                    f"step {step + 1}: {kind}",
                    f"{len(found)}",
                    f"{bitwise}",
                    f"{worst.relative:.2e} {worst.name}",
                    verdict,
                )
            )
    return rows


def conclusion(differences: list[Difference]) -> Iterator[str]:
    """Lines that say whether the layouts are equal, and if not, where they first differ."""
    outside = [difference for difference in differences if not difference.is_within]
    bounds = {difference.tolerance for difference in differences if difference.tolerance}
    if not outside:
        if len(bounds) == 1:
            yield (
                f"the layouts train the same model: every difference is within {bounds.pop():g} of the largest entry "
                "of its tensor"
            )
        else:
            yield "the layouts train the same model: no difference exceeds what rounding in another order produces"
        return
    first = outside[0]
    yield f"the layouts DIFFER in {len(outside)} of {len(differences)} comparisons"
    what = f"step {first.step + 1}, {first.kind} of {first.name}"
    yield f"first in order of execution: {what}, by {first.relative:.2e} (tolerance {first.tolerance:.3g})"
    if first.kind == "gradient":
        yield "the forward pass is the same; the backward pass, or the reduction of this gradient, is not"
    if first.kind in ("moment", "parameter"):
        yield "the gradients are the same; clipping or the update is not"
