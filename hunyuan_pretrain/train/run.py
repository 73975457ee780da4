"""A run that is ready to train: built by `train.setup`, passed to every training step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.checkpoint.folders import ADAPTER_OF
from hunyuan_pretrain.config.derived import grid
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.data.loader import EvaluationLoader, MicroBatch, StepLoader
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.runtime.lock import RunLock
from hunyuan_pretrain.runtime.logging import RunLog
from hunyuan_pretrain.train.benchmarks import Benchmarks
from hunyuan_pretrain.train.logged_numbers import Logging
from hunyuan_pretrain.train.noise_scale import GradientNoise
from hunyuan_pretrain.train.policies import Judge
from hunyuan_pretrain.train.resume import OWES_TASKS, Start


class RecordedWork(Protocol):
    """What train/recorded_step.py provides."""

    def forward_and_backward(
        self,
        run: Run,
        stage: StageConfig,
        step: int,
        batches: list[MicroBatch],
        num_target_tokens: Tensor,
        key_L: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]: ...

    def close(self) -> None: ...


@dataclass
class Run:
    """One rank's view of a run that is ready to train."""

    experiment: Experiment
    device: torch.device
    groups: ProcessGroupCollection
    chunks: list[HunyuanModel]
    """The model of this rank: one chunk, or several where the pipeline is interleaved."""
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    loader: StepLoader
    evaluation: EvaluationLoader | None
    first_step: int
    log: RunLog
    start: Start | None = None
    """How the run started or resumed; None if no history of it is kept."""
    lock: RunLock | None = None
    """Lock of the run directory, on rank 0."""
    evaluation_sets: dict[str, EvaluationLoader] = field(default_factory=dict)
    """evaluation.sets by name."""
    recorded: RecordedWork | None = None
    """Forward and backward passes as CUDA graphs; None: as always."""
    benchmarks: Benchmarks | None = None
    """evaluation.tasks; None: there are none."""

    @cached_property
    def noise(self) -> GradientNoise | None:
        """Measures the gradient noise scale, from where the checkpoint left off; None: it is not measured."""
        every_steps = self.experiment.optimizer.measure_noise_scale_every_steps
        if every_steps is None:
            return None
        ranks, state = grid(self.experiment.parallel, dist.get_world_size()), self.start.noise if self.start else None
        return GradientNoise(every_steps, ranks, self.groups.pp.rank(), self.wrapped, state)

    @cached_property
    def logging(self) -> Logging:
        """Measures what a logged step says beside its loss."""
        return Logging(self.groups, self.wrapped, dist.get_rank(), dist.get_world_size())

    @cached_property
    def judge(self) -> Judge | None:
        """Judges steps before their update, from where the checkpoint left off; None: all are updated."""
        settings, start = self.experiment.resilience, self.start
        if start is None:
            return None  # no ledger is kept
        if not settings.judges_steps and all(step <= start.first_step for step in start.decisions.skips):
            return None
        return Judge(settings, start.decisions, start.judged)

    def go_on_from(self, start: Start, loader: StepLoader) -> None:
        """Forget what was measured, recorded and read since a checkpoint from which the model's state was loaded."""
        self.start, self.first_step, self.loader = start, start.first_step, loader
        for measured in ("noise", "judge"):
            self.__dict__.pop(measured, None)
        if self.recorded is not None:
            self.recorded.close()

    @property
    def validations(self) -> dict[str, EvaluationLoader]:
        """Every validation set, keyed by the prefix of its metric names."""
        unnamed = {} if self.evaluation is None else {"validation_": self.evaluation}
        return unnamed | {f"validation/{name}/": loader for name, loader in self.evaluation_sets.items()}

    @property
    def owes(self) -> frozenset[str]:
        """What a stop after `first_step` has left undone, and still has to be done: OWES_VALIDATION, OWES_TASKS."""
        owed = self.start.owes if self.start is not None else frozenset()
        return owed if self.benchmarks is not None else owed - {OWES_TASKS}

    @property
    def schedule(self) -> Schedule:
        """The schedule of all steps, including those of earlier segments."""
        return self.loader.order.schedule

    def record(self, num_steps: int) -> dict[str, Any]:
        """The run's identity for a checkpoint after `num_steps` steps: position and history; with the measured noise
        scale, what a judge knows, the number of updates, that of the last roll-back and the base of adapters, where
        there are any."""
        found: dict[str, Any] = {"position": self.schedule.position(num_steps), "history": []}
        if self.noise is not None:
            found["noise_scale"] = self.noise.state()
        if (start := self.start) is None:
            return found
        segments = start.segments
        until = [one for number, one in enumerate(segments) if number == 0 or one.first_step < num_steps]
        found["history"] = [segment.model_dump(mode="json") for segment in until]
        if self.judge is not None:
            found["judged"] = self.judge.state()
        skipped = start.num_skipped + sum(start.first_step < step <= num_steps for step in start.decisions.skips)
        if skipped:
            found["updates"] = num_steps - skipped
        if start.decisions.number:
            found["rollback"] = start.decisions.number
        if start.base:
            found[ADAPTER_OF] = dict(start.base)
        return found

    @property
    def run_dir(self) -> Path:
        """Folder of everything that the run writes."""
        return Path(self.experiment.run_dir)
