"""Benchmarks during training: between two steps, on the ranks and in the layout of the run.

What loads and answers them is passed in: `evaluation` builds on `train`, not the reverse.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.parallel import whereabouts
from hunyuan_pretrain.parallel.agreement import from_rank_0, patience
from hunyuan_pretrain.runtime.seeding import generator_state, restore_generator_state
from hunyuan_pretrain.train import TrainingError

if TYPE_CHECKING:
    from hunyuan_pretrain.train.run import Run


@dataclass(frozen=True)
class Measured:
    """What came of the benchmarks after a step; the same on all ranks."""

    values: dict[str, float] = field(default_factory=dict)
    """By "<task>/<metric>"."""
    failure: str | None = None
    """Why there are none."""
    is_stopped: bool = False
    """A stop was asked for, so there are none."""


class Benchmarks(Protocol):
    """What evaluation/in_training.py provides."""

    def obstacle(self, experiment: Experiment) -> str | None:
        """Load evaluation.tasks. Returns what is wrong with them, None if nothing. On rank 0 only."""

    def measure(self, run: Run, stage: StageConfig, is_stop_asked: Callable[[], bool]) -> Measured:
        """Evaluate the model as it is. is_stop_asked: communicates. Communicates: all ranks."""


def open_benchmarks(experiment: Experiment, benchmarks: Benchmarks | None) -> Benchmarks | None:
    """Load evaluation.tasks on rank 0; None without any. Raises ConfigError, on all ranks, if they cannot be evaluated.
    Communicates: all ranks."""
    if not experiment.evaluation.tasks:
        return None
    if benchmarks is None:
        raise TrainingError("evaluation.tasks: only the command `hunyuan-pretrain train` evaluates tasks in a run")
    generators = generator_state()
    with patience():  # the files may be large
        obstacle, error = from_rank_0(lambda: benchmarks.obstacle(experiment))
    restore_generator_state(generators)  # packages that load the tasks draw from them
    if (reason := error or obstacle) is not None:
        raise ConfigError(experiment.name, [Problem("evaluation.tasks", Problem.NO_VALUE, reason)])
    return benchmarks


def measure(run: Run, stage: StageConfig, done: int, is_stop_asked: Callable[[], bool]) -> bool:
    """Evaluate evaluation.tasks after `done` steps and write one record, tasks/<task>/<metric>. Returns False, without
    a record, if told to stop. A failure is logged, and the run goes on.

    The run is afterwards as it was: lm-eval seeds the generators, and the model is in evaluation mode meanwhile.
    """
    assert run.benchmarks is not None
    whereabouts.phase("benchmarks")
    began, generators = time.perf_counter(), generator_state()
    try:
        with patience():
            found = run.benchmarks.measure(run, stage, is_stop_asked)
    finally:
        restore_generator_state(generators)
        for model in run.wrapped:
            model.train()
    if found.is_stopped:
        run.log.line(f"step {done}: told to stop; the next start repeats these benchmarks")
        return False
    if found.failure is not None:
        run.log.line(f"WARNING: step {done}: benchmarks failed: {found.failure}")
        run.log.event("benchmarks failed", found.failure.partition("\n")[0], done)
        return True
    run.log.line(f"step {done}: benchmarks in {time.perf_counter() - began:.1f} s")
    for name, value in found.values.items():
        run.log.line(f"  {name} {value:.4f}")
    run.log.metrics({"step": done, **{f"tasks/{name}": value for name, value in found.values.items()}})
    return True
