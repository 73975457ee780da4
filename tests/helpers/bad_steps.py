"""Runs whose steps go wrong on purpose, through the training loop, on the ranks of a job."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from hunyuan_pretrain.config.schema import Experiment


@dataclass(frozen=True)
class Job:
    """A run, and what goes wrong in it."""

    fields: dict[str, Any]
    """The experiment."""
    poison: tuple[tuple[int, int, float], ...] = ()
    """(position in the stage's data of the first sequence of a step, rank, factor of the model's output there). A
    property of the data: the same step with other data is well."""
    copies: tuple[tuple[Path, Path], ...] = ()
    """(file or folder, copy) before the run: its ledger, checkpoints of another run."""
    dies_at: str = ""
    """Function of train/rollback.py that fails instead of doing anything."""
    stops_after: int | None = None
    """Step, counted from 1, during which the job is told to stop."""
    flips: tuple[int, int] | None = None
    """(step, rank): one bit of this rank's gradients differs in the second of the two computations of the step."""


@dataclass
class Outcome:
    """Of one rank."""

    error: str = ""
    kinds: list[tuple[int, str]] = field(default_factory=list)
    """(step counted from 1, verdict) of every launched step."""
    states: list[str] = field(default_factory=list)
    """Digest of main weights, moments and scales after each of them."""
    delivered: list[tuple[int, dict[int, list[int]]]] = field(default_factory=list)
    """(step counted from 1, position in the global batch -> tokens), in the order in which the model got them."""

    @property
    def final(self) -> str:
        return self.states[-1]


def train_jobs(jobs: list[Job]) -> list[Outcome]:
    """On every rank: train each run to its end or its error."""
    import torch.distributed as dist

    found = []
    for job in jobs:
        if not dist.is_initialized() or dist.get_rank() == 0:
            for source, copy in job.copies:
                copy.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
        found.append(_train(job))
    return found


def _train(job: Job) -> Outcome:
    from hunyuan_pretrain.runtime.stop import StopRequest
    from hunyuan_pretrain.train import TrainingError, loop, rollback, setup

    outcome = Outcome()
    run = setup.prepare(Experiment.model_validate(job.fields))
    real_launch, stop = loop.launch_step, StopRequest()

    def launch(run: Any, stage: Any, step: int, **more: Any) -> Any:
        with _poisoned(job, run, step), _flipped(job, step):
            launched = real_launch(run, stage, step, **more)
        stop.is_asked = stop.is_asked or step + 1 == job.stops_after
        outcome.kinds.append((step + 1, launched.verdict.kind))
        outcome.states.append(state_digest(run))
        return launched

    def fail(*_: Any) -> None:
        raise TrainingError("killed here")

    with (
        mock.patch.object(loop, "launch_step", launch),
        mock.patch.object(rollback, job.dies_at or "note_skip", fail if job.dies_at else rollback.note_skip),
        _watched(outcome),
    ):
        try:
            loop._train(run, stop)
        except TrainingError as error:
            outcome.error = str(error)
    setup.leave(run)
    return outcome


@contextmanager
def _poisoned(job: Job, run: Any, step: int) -> Iterator[None]:
    import torch.distributed as dist

    from hunyuan_pretrain.train.policies import data_of

    first = data_of(run.schedule, step)[1]
    factor = next((factor for place, rank, factor in job.poison if (place, rank) == (first, dist.get_rank())), None)
    if factor is None:
        yield
        return
    hooks = [
        chunk.register_forward_hook(lambda _module, _inputs, output: (output[0] * factor, *output[1:]))
        for chunk in run.chunks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _flipped(job: Job, step: int) -> Iterator[None]:
    import torch
    import torch.distributed as dist

    from hunyuan_pretrain.train import rerun

    if job.flips is None or job.flips != (step + 1, dist.get_rank()):
        yield
        return
    passes: list[int] = []
    real = rerun._buffers

    def buffers(run: Any) -> Any:
        passes.append(1)
        found = real(run)
        if len(passes) == 2:
            found[0].grad_data.view(torch.int32)[5] ^= 1
        return found

    with mock.patch.object(rerun, "_buffers", buffers):
        yield


@contextmanager
def _watched(outcome: Outcome) -> Iterator[None]:
    from hunyuan_pretrain.data.loader import StepLoader

    real = StepLoader.micro_batches

    def micro_batches(loader: StepLoader, step: int) -> Any:
        found = real(loader, step)
        places: dict[int, list[int]] = {}
        for batch in found:
            rows = batch.tokens_T.view(len(batch.sequence_ids), -1)
            places |= dict(zip(batch.sequence_ids.tolist(), rows.tolist(), strict=True))
        outcome.delivered.append((step + 1, places))
        return found

    with mock.patch.object(StepLoader, "micro_batches", micro_batches):
        yield


def state_digest(run: Any) -> str:
    """SHA-256 of this rank's main weights, their averages, moments, update counts and FP8 scales."""
    import torch

    from hunyuan_pretrain.model.engines import scaling_state

    found = hashlib.sha256()

    def add(tensor: torch.Tensor) -> None:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    for part in run.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                add(weight)
                state = part.optimizer.state.get(weight, {})
                for key in sorted(state):
                    add(torch.as_tensor(state[key]))
    for _, tensor in sorted(scaling_state(run.chunks).items()):
        add(tensor)
    return found.hexdigest()
