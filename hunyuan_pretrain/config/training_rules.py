"""Rules for routing groups, learning rates, stages and checkpoints; and warnings about legal settings that are only
partly effective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from hunyuan_pretrain.config.derived import SMALLEST_OFFLOADED_BYTES
from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.nearest import nearest_multiples
from hunyuan_pretrain.config.schema import Experiment


def ranks_hold_whole_routing_groups(experiment: Experiment) -> Iterator[Problem]:
    """A rank routes T / (CP * TP) tokens of a micro-batch. They must form whole routing groups, because capacity and
    recycling apply to whole groups."""
    parallel, group = experiment.parallel, experiment.model.moe_routing_group_tokens
    context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    for path, length, sequences in token_counts(experiment):
        if length % group:
            continue  # routing_group_divides_sequences reports it
        if length % (context * group):
            rule = (
                f"{context} context-parallel ranks cannot share {length // group} routing groups of {group} "
                "tokens evenly"
            )
            fewer = next(size for size in range(context, 0, -1) if length // group % size == 0)
            hint = (
                f"use sequences of {nearest_multiples(length, context * group)[4:]} tokens, or "
                f"parallel.context_parallel_size {fewer}"
            )
            smaller = _smaller_group(group, length, context)
            yield Problem(f"{path}.sequence_length" if path != "evaluation" else path, length, rule, hint + smaller)
        elif length * sequences // context % (tensor * group):
            share = length * sequences // context
            rule = (
                f"{tensor} tensor-parallel ranks cannot share a micro-batch of {share // group} routing groups of "
                f"{group} tokens evenly"
            )
            unit = tensor // math.gcd(tensor, length // context // group)
            fewer = math.gcd(tensor, share // group)
            hint = f"{nearest_multiples(sequences, unit)}, or parallel.tensor_model_parallel_size {fewer}"
            smaller = _smaller_group(group, share, tensor)
            yield Problem(f"{path}.micro_batch_sequences", sequences, rule, hint + smaller)


def _smaller_group(group: int, tokens: int, ranks: int) -> str:
    """The end of a hint: the largest routing group of which each of `ranks` ranks that share `tokens` holds whole ones.
    None below 128 tokens: with a few slots for each expert, chance alone would recycle many tokens."""
    whole = math.gcd(group, tokens // ranks) if tokens % ranks == 0 else 1
    return f", or model.moe_routing_group_tokens {whole}, which changes the routing" if whole >= 128 else ""


def token_counts(experiment: Experiment) -> Iterator[tuple[str, int, int]]:
    """(path, sequence length, sequences per micro-batch) of each stage, and of validation, which uses the sequence
    length of the first stage."""
    for index, stage in enumerate(experiment.stages):
        yield f"stages.{index}", stage.sequence_length, stage.micro_batch_sequences
    if experiment.evaluation.paths:
        yield "evaluation", experiment.stages[0].sequence_length, experiment.evaluation.micro_batch_sequences


def routing_group_divides_sequences(experiment: Experiment) -> Iterator[Problem]:
    group = experiment.model.moe_routing_group_tokens
    for index, stage in enumerate(experiment.stages):
        length = stage.sequence_length
        if length % group:
            rule = f"not a multiple of model.moe_routing_group_tokens {group}"
            hint = f"{nearest_multiples(length, group)}, or a routing group of {math.gcd(length, group)}"
            yield Problem(f"stages.{index}.sequence_length", length, rule, hint)


def one_source_of_the_expert_lr(experiment: Experiment) -> Iterator[Problem]:
    ratio, noise = experiment.optimizer.expert_lr_ratio, experiment.optimizer.expert_lr_noise_scale_tokens
    if noise == "measured":
        return  # config.noise_rules
    if ratio is None and noise is None:
        rule = "expert_lr_ratio and expert_lr_noise_scale_tokens are both null"
        yield Problem("optimizer.expert_lr_ratio", None, rule, "set exactly one, such as expert_lr_ratio 0.31")
    elif ratio is not None and noise is not None:
        rule = f"expert_lr_noise_scale_tokens={noise:g} is set too, and the ratio would be computed from it"
        yield Problem("optimizer.expert_lr_ratio", ratio, rule, "set exactly one, the other null")


def betas_are_decays(experiment: Experiment) -> Iterator[Problem]:
    for name in ("adam_beta1", "adam_beta2"):
        beta = getattr(experiment.optimizer, name)
        if not 0 <= beta < 1:
            yield Problem(
                f"optimizer.{name}", beta, "must be at least 0 and below 1", "use 0.9 or 0.95" if beta >= 1 else "use 0"
            )


def average_follows_and_remembers(experiment: Experiment) -> Iterator[Problem]:
    decay = experiment.optimizer.ema_decay
    if decay is not None and not 0 < decay < 1:
        rule, hint = "must be above 0 and below 1", "use 0.999" if decay > 0 else "use null for the weights themselves"
        yield Problem("optimizer.ema_decay", decay, rule, hint)


def stage_names_are_unique(experiment: Experiment) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, stage in enumerate(experiment.stages):
        if stage.name in first:
            rule = f"stages.{first[stage.name]} already has this name"
            yield Problem(f"stages.{index}.name", stage.name, rule, f"use {stage.name}_{index}")
        first.setdefault(stage.name, index)


def stages_have_a_learning_rate(experiment: Experiment) -> Iterator[Problem]:
    start = 0.0
    for index, stage in enumerate(experiment.stages):
        if stage.lr_end > 1:
            rule = "a fraction of optimizer.lr, which is the peak"
            yield Problem(f"stages.{index}.lr_end", stage.lr_end, rule, "use 1.0, or raise optimizer.lr")
        elif stage.lr_end == 0 and (start == 0 or stage.lr_shape == "constant"):
            rule = "the learning rate is 0 throughout the stage, which would train nothing"
            yield Problem(f"stages.{index}.lr_end", stage.lr_end, rule, "use a value above 0")
        start = stage.lr_end


def one_way_to_begin(experiment: Experiment) -> Iterator[Problem]:
    checkpoint = experiment.checkpoint
    if checkpoint.resume_from is None:
        return
    path = "checkpoint.resume_from"
    if not checkpoint.resume:
        yield Problem(
            path, checkpoint.resume_from, "checkpoint.resume is false, which refuses to resume", "set one of them"
        )
    if checkpoint.init_from is not None and experiment.tuning.lora is None:  # with LoRA, every start reads the base
        rule = (
            f"takes the whole state of a checkpoint, and checkpoint.init_from={checkpoint.init_from} the weights only"
        )
        yield Problem(path, checkpoint.resume_from, rule, "set one of them, the other null")


def steps_to_keep_are_saved(experiment: Experiment) -> Iterator[Problem]:
    checkpoint, path = experiment.checkpoint, "checkpoint.keep_every_steps"
    every, saved = checkpoint.keep_every_steps, checkpoint.save_every_steps
    if every is None:
        return
    if checkpoint.keep_last is None:
        rule = "checkpoint.keep_last is null, which keeps every checkpoint"
        yield Problem(path, every, rule, "set checkpoint.keep_last, or use null")
    if saved is None:
        rule = "checkpoint.save_every_steps is null: no checkpoint is saved after a given step"
        yield Problem(path, every, rule, "set checkpoint.save_every_steps, or use null")
    elif every % saved:
        common = math.lcm(every, saved)
        rule = f"checkpoints are saved every {saved} steps, so only every {common}th step would be kept"
        yield Problem(path, every, rule, nearest_multiples(every, saved))


# --- warnings ---------------------------------------------------------------------------------------------------------


def capacity_below_one_drops(experiment: Experiment) -> Iterator[Problem]:
    factor = experiment.model.moe_expert_capacity_factor
    if factor is not None and factor < 1:
        rule = f"the experts have room for {factor:.0%} of the tokens; the others are dropped even with recycle_routing"
        yield Problem("model.moe_expert_capacity_factor", factor, rule, "use 1.0")


def peak_is_reached(experiment: Experiment) -> Iterator[Problem]:
    highest = max(stage.lr_end for stage in experiment.stages)
    if highest < 1:
        rule = f"no stage reaches it: the highest lr_end is {highest:g}"
        yield Problem(
            "optimizer.lr", experiment.optimizer.lr, rule, "set lr_end 1.0 in the stage that reaches the peak"
        )


def average_leaves_its_start(experiment: Experiment) -> Iterator[Problem]:
    decay, steps = experiment.optimizer.ema_decay, total_steps(experiment)
    if decay is not None and 0 < decay < 1 and decay**steps > 0.5:
        rule = f"after the run's {steps:,} steps the average still is {decay**steps:.0%} the weights it began with"
        yield Problem("optimizer.ema_decay", decay, rule, f"use {0.01 ** (1 / steps):.6g}, which leaves 1%")


def keep_last_has_something_to_remove(experiment: Experiment) -> Iterator[Problem]:
    checkpoint = experiment.checkpoint
    if checkpoint.keep_last is not None and checkpoint.save_every_steps is None:
        rule = (
            "checkpoint.save_every_steps is null: each job saves one checkpoint, so only resumed jobs leave any "
            "to remove"
        )
        yield Problem("checkpoint.keep_last", checkpoint.keep_last, rule, "set checkpoint.save_every_steps")
    elif checkpoint.save_every_steps is not None and checkpoint.save_every_steps > total_steps(experiment):
        rule = f"the run has {total_steps(experiment)} steps, so only its end is saved"
        yield Problem("checkpoint.save_every_steps", checkpoint.save_every_steps, rule, "use fewer steps")
    elif checkpoint.keep_every_steps is not None and checkpoint.keep_every_steps > total_steps(experiment):
        rule = f"the run has {total_steps(experiment)} steps, so it keeps none beside the newest"
        yield Problem("checkpoint.keep_every_steps", checkpoint.keep_every_steps, rule, "use fewer steps")


def offload_has_a_device_to_relieve(experiment: Experiment) -> Iterator[Problem]:
    fraction = experiment.optimizer.cpu_offload_fraction
    if fraction and experiment.runtime.device == "cpu":
        rule = "runtime.device is cpu: the state is in host memory anyway, and offloading adds copies of the weights"
        yield Problem("optimizer.cpu_offload_fraction", fraction, rule, "use 0")
    layers = experiment.parallel.cpu_offloading_num_layers
    if layers and experiment.runtime.device == "cpu":
        rule = "runtime.device is cpu: activations are in host memory anyway, and offloading copies them twice"
        yield Problem("parallel.cpu_offloading_num_layers", layers, rule, "use 0")


def offloaded_activations_are_large(experiment: Experiment) -> Iterator[Problem]:
    model, parallel = experiment.model, experiment.parallel
    layers, width = parallel.cpu_offloading_num_layers, 2 if experiment.precision.dtype == "bf16" else 4
    ranks = parallel.context_parallel_size * parallel.tensor_model_parallel_size
    for index, stage in enumerate(experiment.stages if layers else ()):
        size = stage.sequence_length * stage.micro_batch_sequences // ranks * model.hidden_size * width
        if size < SMALLEST_OFFLOADED_BYTES:
            rule = (
                f"in stages.{index} a layer's input has {size:,} bytes, and blocks below "
                f"{SMALLEST_OFFLOADED_BYTES:,} stay on the device"
            )
            yield Problem("parallel.cpu_offloading_num_layers", layers, rule, "use 0, or larger micro-batches")
            return


def attention_dropout_knows_its_tokens(experiment: Experiment) -> Iterator[Problem]:
    """With all_to_all a rank attends for queries of other ranks, whose places in the batch it does not know."""
    parallel = experiment.parallel
    if parallel.context_parallel_size == 1 or parallel.context_parallel_method != "all_to_all":
        return
    for number, stage in enumerate(experiment.stages):
        if stage.attention_dropout:
            rule = "is for parallel.context_parallel_method all_gather, and it is all_to_all"
            yield Problem(f"stages.{number}.attention_dropout", stage.attention_dropout, rule, "use 0, or all_gather")


def attention_dropout_is_computed_by_torch(experiment: Experiment) -> Iterator[Problem]:
    if experiment.runtime.device == "cpu":
        return
    for number, stage in enumerate(experiment.stages):
        if stage.attention_dropout:
            backend = experiment.runtime.attention_backend
            rule = f"no kernel of runtime.attention_backend ({backend}) has this dropout: torch's operations compute it"
            where = f"stages.{number}.attention_dropout"
            yield Problem(where, stage.attention_dropout, rule, "use 0 for the speed of flash kernels")
            return


def total_steps(experiment: Experiment) -> int:
    """Total steps of all stages."""
    return sum(stage.num_steps for stage in experiment.stages)


TRAINING_RULES: tuple[Callable[[Experiment], Iterator[Problem]], ...] = (
    routing_group_divides_sequences,
    ranks_hold_whole_routing_groups,
    attention_dropout_knows_its_tokens,
    one_source_of_the_expert_lr,
    betas_are_decays,
    average_follows_and_remembers,
    stage_names_are_unique,
    stages_have_a_learning_rate,
    one_way_to_begin,
    steps_to_keep_are_saved,
)
WARNING_RULES: tuple[Callable[[Experiment], Iterator[Problem]], ...] = (
    capacity_below_one_drops,
    peak_is_reached,
    average_leaves_its_start,
    keep_last_has_something_to_remove,
    offload_has_a_device_to_relieve,
    offloaded_activations_are_large,
    attention_dropout_is_computed_by_torch,
)
