"""Rules of the gradient noise scale: where it can be measured, and where a measured value can be used."""

from __future__ import annotations

from collections.abc import Iterator

from hunyuan_pretrain.config.derived import LEAST_MEASUREMENTS
from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.schema import Experiment

EVERY = "optimizer.measure_noise_scale_every_steps"


def noise_scale_can_be_measured(experiment: Experiment) -> Iterator[Problem]:
    """A rank's gradient after its first micro-batch must be that of whole sequences."""
    every = experiment.optimizer.measure_noise_scale_every_steps
    if every is None:
        return
    for setting, reason, hint in _obstacles(experiment):
        yield Problem(EVERY, every, f"{setting}: {reason}", f"{hint}, or this to null")
    steps = sum(stage.num_steps for stage in experiment.stages)
    if every > steps:
        yield Problem(EVERY, every, f"the run has {steps} steps, so nothing would be measured", f"use {steps} or fewer")


def _obstacles(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """(setting, why nothing can be measured with it, what to set)."""
    parallel = experiment.parallel
    if experiment.runtime.cuda_graphs:
        reason = "in a recorded step nothing can be read between two micro-batches"
        yield "runtime.cuda_graphs=true", reason, "set it to false"
    if (size := parallel.context_parallel_size) > 1:
        reason = "a rank's gradient is that of a part of each sequence, whose tokens are not independent samples"
        yield f"parallel.context_parallel_size={size}", reason, "set it to 1"
    if (size := parallel.virtual_pipeline_model_parallel_size) > 1:
        reason = "in the interleaved schedule the first micro-batch is not the only one whose gradients are there"
        yield f"parallel.virtual_pipeline_model_parallel_size={size}", reason, "set it to 1"
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    if (shared := expert * parallel.expert_tensor_parallel_size) % tensor:
        name = "expert_model_parallel_size * expert_tensor_parallel_size"
        reason = f"no multiple of tensor_model_parallel_size {tensor}, so a rank's experts see a part of each sequence"
        yield f"parallel.{name}={shared}", reason, f"make it a multiple of {tensor}"
    for index, stage in enumerate(experiment.stages):
        if stage.balance_attention != "off" and _is_measured(experiment, index):
            reason = "a rank's first micro-batch is its dearest, and no random sample of the batch"
            yield f"stages.{index}.balance_attention={stage.balance_attention}", reason, "set it to off"


def _is_measured(experiment: Experiment, index: int) -> bool:
    """Whether a step of this stage is measured."""
    every = experiment.optimizer.measure_noise_scale_every_steps
    before = steps_before(experiment, index)
    return every is not None and (before + experiment.stages[index].num_steps) // every > before // every


def steps_before(experiment: Experiment, index: int) -> int:
    """Steps of all stages before this one."""
    return sum(stage.num_steps for stage in experiment.stages[:index])


def noise_micro_batches(experiment: Experiment, data_parallel: int) -> Iterator[Problem]:
    """The first micro-batch is measured when a stage of the pipeline begins the forward pass before its second backward
    pass; this must exist on all of them. `data_parallel`: ranks with different sequences."""
    every, pipeline = (
        experiment.optimizer.measure_noise_scale_every_steps,
        experiment.parallel.pipeline_model_parallel_size,
    )
    if every is None:
        return
    for index, stage in enumerate(experiment.stages):
        at_once = stage.micro_batch_sequences * data_parallel
        found = stage.global_batch_sequences // at_once
        if stage.global_batch_sequences % at_once == 0 and found <= pipeline:
            over = f" with {pipeline} pipeline ranks" if pipeline > 1 else ""
            rule = (
                f"stages.{index} has {found} micro-batch{'es' if found > 1 else ''} per data-parallel rank; to tell "
                f"the first from the whole batch{over}, at least {pipeline + 1} are needed"
            )
            hint = f"use global_batch_sequences {(pipeline + 1) * at_once} or smaller micro-batches, or this null"
            yield Problem(EVERY, every, rule, hint)


def a_measured_noise_scale_is_measured(experiment: Experiment) -> Iterator[Problem]:
    optimizer = experiment.optimizer
    if optimizer.expert_lr_noise_scale_tokens != "measured":
        return
    path = "optimizer.expert_lr_noise_scale_tokens"
    if optimizer.measure_noise_scale_every_steps is None:
        yield Problem(
            path, "measured", f"{EVERY} is null, so nothing measures it", "set that to 10, or this to a number"
        )
    if len(experiment.stages) == 1:
        rule = "each stage uses what was measured before it, and there is only one"
        yield Problem(path, "measured", rule, "make the warmup a stage of its own, or set a number")
    elif (every := optimizer.measure_noise_scale_every_steps) is not None:
        steps = steps_before(experiment, len(experiment.stages) - 1)
        if steps // every < LEAST_MEASUREMENTS:
            rule = (
                f"a stage uses it after {LEAST_MEASUREMENTS} measurements; before the last one there are "
                f"{steps // every}, in {steps} steps"
            )
            enough = steps // LEAST_MEASUREMENTS
            hint = f"use {EVERY} {enough} or less, or a number here" if enough else "set a number"
            yield Problem(path, "measured", rule, hint)
    if optimizer.expert_lr_ratio is None:
        rule = "the first stage uses it, before anything is measured"
        yield Problem("optimizer.expert_lr_ratio", None, rule, "use 0.31")


NOISE_RULES = (noise_scale_can_be_measured, a_measured_noise_scale_is_measured)
