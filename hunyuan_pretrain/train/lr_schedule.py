"""The learning rates of a step. `config.schedule` has the schedule, `config.derived.expert_lr_ratio` the routed
experts' share of the rate."""

from __future__ import annotations

from typing import NamedTuple

from hunyuan_pretrain.config.derived import LEAST_MEASUREMENTS, computed_lr_ratio, expert_lr_ratio
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.train.noise_scale import NoiseScale
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


def measured_ratio_line(experiment: Experiment, batch_tokens: int, noise: NoiseScale) -> str:
    """What a stage with expert_lr_noise_scale_tokens=measured uses, and why."""
    ratio = expert_lr_ratio(experiment.model, experiment.optimizer, batch_tokens, noise.in_use)
    rate = f"learning rate of experts x {ratio:.4g}"
    if noise.in_use is None:
        needed = f"{LEAST_MEASUREMENTS} are needed, and positive estimates"
        return f"noise scale not known after {noise.count} measurements ({needed}), {rate} as configured"
    computed = computed_lr_ratio(experiment.model, batch_tokens, noise.in_use)
    limit = f", the limit (computed: {computed:.4g})" if computed > ratio else ""
    return f"noise scale {noise.in_use:.4g} tokens, {rate}{limit}"
