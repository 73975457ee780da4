"""The learning rates of a step: how the rate goes is in `config.schedule`, what the routed experts have of it in
`config.derived.expert_lr_ratio`."""

from __future__ import annotations

from typing import NamedTuple

from hunyuan_pretrain.config.derived import expert_lr_ratio
from hunyuan_pretrain.train.optimizer import set_learning_rate
from hunyuan_pretrain.train.run import Run


class LearningRates(NamedTuple):
    """Of one step."""

    lr: float
    """Of all weights but the routed experts."""
    expert_lr: float


def apply_learning_rate(run: Run, step: int) -> LearningRates:
    """Give the optimizer the learning rates of global step `step`, counted from 0. Raises IndexError past the end."""
    experiment = run.experiment
    tokens = run.schedule.stage(step).global_batch_tokens
    ratio = expert_lr_ratio(experiment.model, experiment.optimizer, tokens)
    lr = experiment.optimizer.lr * run.schedule.lr_fraction(step)
    set_learning_rate(run.optimizer, lr, ratio)
    return LearningRates(lr, lr * ratio)
