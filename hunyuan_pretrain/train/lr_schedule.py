"""The learning rates of a step. `config.schedule` has the schedule, `config.derived.expert_lr_ratio` the routed
experts' share of the rate."""

from __future__ import annotations

from typing import NamedTuple

from hunyuan_pretrain.config.derived import expert_lr_ratio
from hunyuan_pretrain.train.optimizer import set_learning_rate
from hunyuan_pretrain.train.run import Run


class LearningRates(NamedTuple):
    """Learning rates of one step."""

    lr: float
    """For all weights except the routed experts."""
    expert_lr: float


def apply_learning_rate(run: Run, step: int) -> LearningRates:
    """Set and return the learning rates of global step `step`, counted from 0. Raises IndexError past the end."""
    experiment = run.experiment
    tokens = run.schedule.stage(step).global_batch_tokens
    measured = run.noise.in_use if run.noise is not None else None
    ratio = expert_lr_ratio(experiment.model, experiment.optimizer, tokens, measured)
    lr = experiment.optimizer.lr * run.schedule.lr_fraction(step)
    set_learning_rate(run.optimizer, lr, ratio)
    return LearningRates(lr, lr * ratio)
