"""Rules that span several fields, a small function each.

Every rule yields the problems it finds; `check` gathers them all into one ConfigError. A rule that would divide by a
value which another rule refuses stays silent: the other one speaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from hunyuan_pretrain.config.data_rules import DATA_RULES
from hunyuan_pretrain.config.derived import data_parallel_size, smallest_world_size
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.precision_rules import PRECISION_RULES
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, ParallelConfig, StageConfig


def check(experiment: Experiment, world_size: int | None = None, source: str | None = None) -> None:
    """Refuse an experiment that cannot run.

    `world_size`: ranks of the job, where they are known; otherwise parallel.world_size, and without that one only the
    rules that hold for every number of ranks are applied. `source` heads the message; default: the experiment's name.
    Raises ConfigError with every violation in one message.
    """
    found = find_problems(experiment, world_size)
    if found:
        raise ConfigError(source or experiment.name, found)


def check_model(model: ModelConfig, source: str = "model") -> None:
    """Refuse an architecture that cannot be built; raises ConfigError with every violation."""
    found = [problem for rule in MODEL_RULES for problem in rule(model)]
    if found:
        raise ConfigError(source, found)


def find_problems(experiment: Experiment, world_size: int | None = None) -> list[Problem]:
    """Every violation of `check`, as a list."""
    found = [problem for rule in MODEL_RULES for problem in rule(experiment.model)]
    found += [problem for rule in EXPERIMENT_RULES for problem in rule(experiment)]
    found += world_size_rules(experiment, world_size)
    return found


def find_warnings(experiment: Experiment) -> list[Problem]:
    """Settings that are legal but take effect only partly; the run prints them once and keeps them in its folder."""
    return [problem for rule in WARNING_RULES for problem in rule(experiment)]


def nearest_multiples(value: int, step: int) -> str:
    """The multiples of `step` on both sides of `value`, as a hint."""
    below = value // step * step
    return f"use {below} or {below + step}" if below else f"use {step}"


def nearest_divisors(value: int, number: int) -> str:
    """The divisors of `number` on both sides of `value`, as a hint."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < value][-1:]
    above = [d for d in divisors if d > value][:1]
    return "use " + " or ".join(str(d) for d in below + above)


# --- the architecture -------------------------------------------------------------------------------------------------


def hidden_size_splits_into_heads(model: ModelConfig) -> Iterator[Problem]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.kv_channels is None and hidden % heads:
        hint = f"{nearest_multiples(hidden, heads)}, or set model.kv_channels"
        yield Problem(
            "model.hidden_size", hidden, f"{heads} heads, {hidden} % {heads} != 0 and model.kv_channels is null", hint
        )


def heads_split_into_query_groups(model: ModelConfig) -> Iterator[Problem]:
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        yield Problem(
            "model.num_query_groups", groups, f"{heads} heads, {heads} % {groups} != 0", nearest_divisors(groups, heads)
        )


def head_dim_is_even(model: ModelConfig) -> Iterator[Problem]:
    width = model.head_dim
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        return
    if width < 4 or width % 2:
        path = "model.kv_channels" if model.kv_channels else "model.num_attention_heads"
        value = model.kv_channels or model.num_attention_heads
        yield Problem(
            path,
            value,
            f"head width {width} must be even and at least 4, since RoPE rotates pairs",
            nearest_even(width),
        )


def nearest_even(width: int) -> str:
    return "use a head width of 4" if width < 4 else f"use a head width of {width - 1} or {width + 1}"


def layers_split_into_cla_groups(model: ModelConfig) -> Iterator[Problem]:
    layers, share = model.num_layers, model.cla_share_factor
    if layers % share:
        hint = f"{nearest_multiples(layers, share)}, or cla_share_factor 1"
        yield Problem("model.num_layers", layers, f"CLA groups of {share} layers, {layers} % {share} != 0", hint)


def topk_is_within_experts(model: ModelConfig) -> Iterator[Problem]:
    topk, experts = model.moe_router_topk, model.num_moe_experts
    if topk > experts:
        yield Problem(
            "model.moe_router_topk",
            topk,
            f"more than the {experts} experts of model.num_moe_experts",
            f"use 1 to {experts}",
        )


def recycling_needs_a_capacity(model: ModelConfig) -> Iterator[Problem]:
    if model.recycle_routing and model.moe_expert_capacity_factor is None:
        rule = "without a capacity no expert is ever full, so nothing can be recycled"
        yield Problem(
            "model.recycle_routing",
            True,
            rule,
            "set model.moe_expert_capacity_factor, such as 1.0, or recycle_routing false",
        )


# --- the layout -------------------------------------------------------------------------------------------------------


def experts_split_over_ranks(experiment: Experiment) -> Iterator[Problem]:
    experts, size = experiment.model.num_moe_experts, experiment.parallel.expert_model_parallel_size
    if experts % size:
        rule = f"{experts} experts, {experts} % {size} != 0"
        yield Problem("parallel.expert_model_parallel_size", size, rule, nearest_divisors(size, experts))


def tensor_parallel_divides(experiment: Experiment) -> Iterator[Problem]:
    size = experiment.parallel.tensor_model_parallel_size
    names = ("padded_vocab_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
    values = {name: getattr(experiment.model, name) for name in names}
    broken = [f"{name} {value} % {size} != 0" for name, value in values.items() if value % size]
    if broken:
        hint = nearest_divisors(size, math.gcd(*values.values()))
        yield Problem("parallel.tensor_model_parallel_size", size, f"must divide the model: {', '.join(broken)}", hint)


def expert_tensor_parallel_divides(experiment: Experiment) -> Iterator[Problem]:
    width, size = experiment.model.expert_ffn_size, experiment.parallel.expert_tensor_parallel_size
    if width % size:
        rule = f"routed experts are {width} wide, {width} % {size} != 0"
        yield Problem("parallel.expert_tensor_parallel_size", size, rule, nearest_divisors(size, width))


def sequence_parallel_goes_with_tensor_parallel(experiment: Experiment) -> Iterator[Problem]:
    parallel = experiment.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        rule = "splits over the tensor-parallel ranks, and there is only one"
        yield Problem(
            "parallel.sequence_parallel", True, rule, "set parallel.tensor_model_parallel_size above 1, or false"
        )
    if not parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1:
        rule = f"{parallel.tensor_model_parallel_size} tensor-parallel ranks would route the same tokens to the experts"
        yield Problem("parallel.sequence_parallel", False, rule, "set true")


def pipeline_never_cuts_a_cla_group(experiment: Experiment) -> Iterator[Problem]:
    model, parallel = experiment.model, experiment.parallel
    ranks, chunks, layout = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        parallel.pipeline_layout,
    )
    share, num_stages = model.cla_share_factor, ranks * chunks
    if chunks > 1 and ranks == 1:
        rule = "interleaves the chunks of several pipeline ranks, and there is only one"
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            chunks,
            rule,
            "set parallel.pipeline_model_parallel_size above 1, or 1",
        )
        return
    if model.num_layers % share:
        return
    if layout is None:
        num_groups = model.num_layers // share
        if num_groups % num_stages:
            stages = f"{ranks} ranks" + (f" * {chunks} chunks" if chunks > 1 else "")
            rule = (
                f"{model.num_layers} layers in CLA groups of {share} = {num_groups} groups, not divisible by {stages}"
            )
            hint = f"{nearest_divisors(num_stages, num_groups)} stages, or set parallel.pipeline_layout"
            yield Problem("parallel.pipeline_model_parallel_size", ranks, rule, hint)
        return
    if len(layout) != num_stages:
        rule = f"{len(layout)} stages, but {ranks} pipeline ranks with {chunks} chunks each have {num_stages}"
        yield Problem("parallel.pipeline_layout", list(layout), rule, f"give {num_stages} numbers")
    if sum(layout) != model.num_layers:
        rule = f"adds up to {sum(layout)} layers, and the model has {model.num_layers}"
        yield Problem("parallel.pipeline_layout", list(layout), rule, f"make it {model.num_layers}")
    cut = [size for size in layout if size % share]
    if cut:
        rule = f"a stage of {cut[0]} layers would cut a CLA group of {share}"
        yield Problem("parallel.pipeline_layout", list(layout), rule, f"{nearest_multiples(cut[0], share)} layers")


def heads_trade_for_tokens(experiment: Experiment) -> Iterator[Problem]:
    parallel, groups = experiment.parallel, experiment.model.num_query_groups
    size, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if parallel.context_parallel_method != "all_to_all" or size == 1 or groups % tensor:
        return
    heads = groups // tensor
    if heads % size:
        rule = (
            f"each tensor-parallel rank has {heads} key/value heads, {heads} % {size} != 0, and all_to_all gives "
            "every rank whole heads"
        )
        hint = f"{nearest_divisors(size, heads)}, or parallel.context_parallel_method all_gather"
        yield Problem("parallel.context_parallel_size", size, rule, hint)


def param_gather_overlap_needs_its_base(experiment: Experiment) -> Iterator[Problem]:
    parallel = experiment.parallel
    if not parallel.overlap_param_gather:
        return
    missing = [name for name in ("use_distributed_optimizer", "overlap_grad_reduce") if not getattr(parallel, name)]
    if missing:
        needs = " and ".join(f"parallel.{name}" for name in missing)
        yield Problem("parallel.overlap_param_gather", True, f"needs {needs}", f"set {needs} to true, or this to false")


def offload_needs_the_distributed_optimizer(experiment: Experiment) -> Iterator[Problem]:
    fraction = experiment.optimizer.cpu_offload_fraction
    if fraction > 1:
        yield Problem(
            "optimizer.cpu_offload_fraction",
            fraction,
            "a fraction of the optimizer state",
            "use 1 to offload all of it",
        )
    elif fraction and not experiment.parallel.use_distributed_optimizer:
        rule = "core's offloaded optimizer takes its weights and gradients from the distributed optimizer"
        yield Problem(
            "optimizer.cpu_offload_fraction",
            fraction,
            rule,
            "set parallel.use_distributed_optimizer to true, or this to 0",
        )


def world_size_rules(experiment: Experiment, world_size: int | None) -> Iterator[Problem]:
    """Rules that need the number of ranks; `world_size` is that of the job, None where only the config speaks."""
    parallel = experiment.parallel
    if world_size is not None and parallel.world_size is not None and world_size != parallel.world_size:
        rule = f"the job has {world_size} ranks"
        hint = f"start {parallel.world_size} ranks, or set parallel.world_size to {world_size} or null"
        yield Problem("parallel.world_size", parallel.world_size, rule, hint)
    ranks = world_size or parallel.world_size
    unit = smallest_world_size(experiment)
    if ranks is None:
        for index, stage in enumerate(experiment.stages):
            yield from batch_splits(experiment.parallel, index, stage, 1)
    elif ranks % unit:
        dense = "tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size"
        expert = "expert_tensor_parallel_size * expert_model_parallel_size * pipeline_model_parallel_size"
        rule = f"not a multiple of {unit}, which {dense} and {expert} must divide"
        yield Problem("parallel.world_size", ranks, rule, nearest_multiples(ranks, unit))
    else:
        for index, stage in enumerate(experiment.stages):
            yield from batch_splits(experiment.parallel, index, stage, data_parallel_size(experiment, ranks))


def batch_splits(parallel: ParallelConfig, index: int, stage: StageConfig, data_parallel: int) -> Iterator[Problem]:
    batch, micro = stage.global_batch_sequences, stage.micro_batch_sequences
    if batch % (micro * data_parallel):
        over = f" * {data_parallel} data-parallel ranks" if data_parallel > 1 else ""
        rule = f"not a multiple of micro_batch_sequences {micro}{over} = {micro * data_parallel}"
        yield Problem(
            f"stages.{index}.global_batch_sequences", batch, rule, nearest_multiples(batch, micro * data_parallel)
        )
    elif (
        parallel.virtual_pipeline_model_parallel_size > 1
        and batch // (micro * data_parallel) % parallel.pipeline_model_parallel_size
    ):
        ranks = parallel.pipeline_model_parallel_size
        rule = (
            f"{batch // (micro * data_parallel)} micro-batches a rank; the interleaved schedule runs rounds of {ranks}"
        )
        yield Problem(
            f"stages.{index}.global_batch_sequences",
            batch,
            rule,
            nearest_multiples(batch, micro * data_parallel * ranks),
        )


# --- the recipe -------------------------------------------------------------------------------------------------------


def ranks_hold_whole_routing_groups(experiment: Experiment) -> Iterator[Problem]:
    """A rank routes T / (CP * SP) tokens of a micro-batch, and capacity and recycling are those of whole groups."""
    parallel, group = experiment.parallel, experiment.model.moe_routing_group_tokens
    context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    for path, length, sequences in token_counts(experiment):
        if length % group:
            continue  # routing_group_divides_sequences speaks
        if length % (context * group):
            rule = (
                f"{context} context-parallel ranks cannot share {length // group} routing groups of {group} "
                "tokens evenly"
            )
            hint = (
                f"use sequences of {nearest_multiples(length, context * group)[4:]} tokens, or a smaller routing group"
            )
            yield Problem(f"{path}.sequence_length" if path != "evaluation" else path, length, rule, hint)
        elif length * sequences // context % (tensor * group):
            share = length * sequences // context
            rule = (
                f"{tensor} tensor-parallel ranks cannot share a micro-batch of {share // group} routing groups of "
                f"{group} tokens evenly"
            )
            hint = f"use {sequences * tensor}, or a smaller model.moe_routing_group_tokens"
            yield Problem(f"{path}.micro_batch_sequences", sequences, rule, hint)


def token_counts(experiment: Experiment) -> Iterator[tuple[str, int, int]]:
    """(path, sequence length, sequences of a micro-batch) of each stage, and of validation, which has the first stage's
    length."""
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


def stage_names_are_unique(experiment: Experiment) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, stage in enumerate(experiment.stages):
        if stage.name in first:
            rule = f"stages.{first[stage.name]} has this name already"
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
            path, checkpoint.resume_from, "checkpoint.resume is false, which refuses to go on", "set one of them"
        )
    if checkpoint.init_from is not None:
        rule = (
            f"takes the whole state of a checkpoint, and checkpoint.init_from={checkpoint.init_from} the weights only"
        )
        yield Problem(path, checkpoint.resume_from, rule, "set one of them, the other null")


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


def keep_last_has_something_to_remove(experiment: Experiment) -> Iterator[Problem]:
    checkpoint = experiment.checkpoint
    if checkpoint.keep_last is not None and checkpoint.save_every_steps is None:
        rule = (
            "checkpoint.save_every_steps is null: there is one checkpoint a job, so only resumed jobs leave any "
            "to remove"
        )
        yield Problem("checkpoint.keep_last", checkpoint.keep_last, rule, "set checkpoint.save_every_steps")
    elif checkpoint.save_every_steps is not None and checkpoint.save_every_steps > total_steps(experiment):
        rule = f"the run has {total_steps(experiment)} steps, so only its end is saved"
        yield Problem("checkpoint.save_every_steps", checkpoint.save_every_steps, rule, "use fewer steps")


def offload_has_a_device_to_relieve(experiment: Experiment) -> Iterator[Problem]:
    fraction = experiment.optimizer.cpu_offload_fraction
    if fraction and experiment.runtime.device == "cpu":
        rule = (
            "runtime.device is cpu: the state is in the host's memory anyway, and copies of the weights are added to it"
        )
        yield Problem("optimizer.cpu_offload_fraction", fraction, rule, "use 0")


def total_steps(experiment: Experiment) -> int:
    """Steps of all stages together."""
    return sum(stage.num_steps for stage in experiment.stages)


MODEL_RULES: tuple[Callable[[ModelConfig], Iterator[Problem]], ...] = (
    hidden_size_splits_into_heads,
    heads_split_into_query_groups,
    head_dim_is_even,
    layers_split_into_cla_groups,
    topk_is_within_experts,
    recycling_needs_a_capacity,
)
EXPERIMENT_RULES: tuple[Callable[[Experiment], Iterator[Problem]], ...] = (
    experts_split_over_ranks,
    tensor_parallel_divides,
    expert_tensor_parallel_divides,
    sequence_parallel_goes_with_tensor_parallel,
    pipeline_never_cuts_a_cla_group,
    heads_trade_for_tokens,
    param_gather_overlap_needs_its_base,
    offload_needs_the_distributed_optimizer,
    routing_group_divides_sequences,
    ranks_hold_whole_routing_groups,
    one_source_of_the_expert_lr,
    betas_are_decays,
    stage_names_are_unique,
    stages_have_a_learning_rate,
    one_way_to_begin,
    *DATA_RULES,
    *PRECISION_RULES,
)
WARNING_RULES: tuple[Callable[[Experiment], Iterator[Problem]], ...] = (
    capacity_below_one_drops,
    peak_is_reached,
    keep_last_has_something_to_remove,
    offload_has_a_device_to_relieve,
)
