"""Rules that span several fields, one small function each.

Every rule yields the problems it finds; `check` collects them into one ConfigError. A rule that depends on a value
which another rule refuses yields nothing, so that each mistake is reported once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from hunyuan_pretrain.config.attention import BACKENDS, Work, nearest
from hunyuan_pretrain.config.data_rules import DATA_RULES
from hunyuan_pretrain.config.derived import data_parallel_size, pipeline_stages, smallest_world_size
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.logging_rules import LOGGING_RULES
from hunyuan_pretrain.config.model_rules import MODEL_RULES
from hunyuan_pretrain.config.nearest import nearest_divisors, nearest_multiples
from hunyuan_pretrain.config.noise_rules import NOISE_RULES, noise_micro_batches
from hunyuan_pretrain.config.precision_rules import PRECISION_RULES
from hunyuan_pretrain.config.recording_rules import RECORDING_RULES
from hunyuan_pretrain.config.resilience_rules import RESILIENCE_RULES
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, ParallelConfig, StageConfig
from hunyuan_pretrain.config.stage_lengths import stages_have_one_length
from hunyuan_pretrain.config.training_rules import TRAINING_RULES, WARNING_RULES
from hunyuan_pretrain.config.tuning import TUNING_RULES


def check(experiment: Experiment, world_size: int | None = None, source: str | None = None) -> None:
    """Raise ConfigError, with every violation in one message, if an experiment cannot run.

    `world_size`: ranks of the job; None: parallel.world_size. If that is None too, only the rules that do not depend on
    the number of ranks apply. `source`: start of the message; default: the experiment's name.
    """
    found = find_problems(experiment, world_size)
    if found:
        raise ConfigError(source or experiment.name, found)


def check_model(model: ModelConfig, source: str = "model") -> None:
    """Raise ConfigError, with every violation, if an architecture cannot be built."""
    found = [problem for rule in MODEL_RULES for problem in rule(model)]
    if found:
        raise ConfigError(source, found)


def find_problems(experiment: Experiment, world_size: int | None = None) -> list[Problem]:
    """The violations that `check` reports, as a list."""
    if without_length := list(stages_have_one_length(experiment)):
        return without_length  # other rules count steps
    found = [problem for rule in MODEL_RULES for problem in rule(experiment.model)]
    found += [problem for rule in EXPERIMENT_RULES for problem in rule(experiment)]
    found += world_size_rules(experiment, world_size)
    return found


def find_warnings(experiment: Experiment) -> list[Problem]:
    """Settings that are legal but only partly effective; the run prints them once and stores them in its folder."""
    return [problem for rule in WARNING_RULES for problem in rule(experiment)]


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
        rule = f"routed experts have width {width}, {width} % {size} != 0"
        yield Problem("parallel.expert_tensor_parallel_size", size, rule, nearest_divisors(size, width))


def sequence_parallel_goes_with_tensor_parallel(experiment: Experiment) -> Iterator[Problem]:
    parallel = experiment.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        rule = "splits over the tensor-parallel ranks, but there is only one"
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
        rule = "interleaves the chunks of several pipeline ranks, but there is only one"
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
        rule = f"adds up to {sum(layout)} layers, but the model has {model.num_layers}"
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
    missing = [
        name for name in ("use_distributed_optimizer", "overlap_grad_reduce") if getattr(parallel, name) is False
    ]
    if missing:
        needs = " and ".join(f"parallel.{name}" for name in missing)
        yield Problem("parallel.overlap_param_gather", True, f"needs {needs}", f"set {needs} to true, or this to false")


def shared_expert_overlap_needs_an_exchange(experiment: Experiment) -> Iterator[Problem]:
    parallel = experiment.parallel
    if not parallel.overlap_shared_expert:
        return
    if parallel.expert_model_parallel_size == 1:
        rule = "there is no exchange to run beside: parallel.expert_model_parallel_size is 1"
        yield Problem("parallel.overlap_shared_expert", True, rule, "set it to false")
    if parallel.tensor_model_parallel_size > 1:
        rule = (
            "the tensor-parallel ranks of the shared expert would communicate during the exchange, and NCCL does not "
            "promise that two process groups can at the same time"
        )
        yield Problem(
            "parallel.overlap_shared_expert", True, rule, "set it to false, or tensor_model_parallel_size to 1"
        )
    for name, value, is_used in (
        ("recompute", parallel.recompute, "norms" in parallel.recomputed_parts),
        ("cpu_offloading_num_layers", parallel.cpu_offloading_num_layers, parallel.cpu_offloading_num_layers > 0),
    ):
        if is_used:
            rule = f"with parallel.{name}={value} both streams read what one of them brings back"
            yield Problem("parallel.overlap_shared_expert", True, rule, f"set it to false, or change parallel.{name}")


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


def offloaded_layers_are_whole_groups(experiment: Experiment) -> Iterator[Problem]:
    """Activations are offloaded by CLA group, and those of the model's last group never are."""
    model, parallel = experiment.model, experiment.parallel
    wanted, share = parallel.cpu_offloading_num_layers, model.cla_share_factor
    if not wanted or any(pipeline_never_cuts_a_cla_group(experiment)) or model.num_layers % share:
        return
    path, stages = "parallel.cpu_offloading_num_layers", pipeline_stages(model, parallel)
    if wanted % share:
        rule = f"a CLA group of {share} layers goes to the host as a whole, {wanted} % {share} != 0"
        yield Problem(path, wanted, rule, nearest_multiples(wanted, share))
        return
    most = max(len(layers) - share * (layers is stages[-1]) for layers in stages)
    if wanted > most:
        rule = f"no stage has more than {most} layers to offload; the model's last CLA group stays on the device"
        yield Problem(path, wanted, rule, f"use {most}")


def world_size_rules(experiment: Experiment, world_size: int | None) -> Iterator[Problem]:
    """Rules that need the number of ranks. `world_size`: that of the job; None: parallel.world_size applies."""
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
        yield from noise_micro_batches(experiment, 1)
    elif ranks % unit:
        dense = "tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size"
        expert = "expert_tensor_parallel_size * expert_model_parallel_size * pipeline_model_parallel_size"
        rule = f"not a multiple of {unit}, which {dense} and {expert} must divide"
        yield Problem("parallel.world_size", ranks, rule, nearest_multiples(ranks, unit))
    else:
        for index, stage in enumerate(experiment.stages):
            yield from batch_splits(experiment.parallel, index, stage, data_parallel_size(experiment, ranks))
        yield from noise_micro_batches(experiment, data_parallel_size(experiment, ranks))


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
            f"{batch // (micro * data_parallel)} micro-batches per rank; the interleaved schedule needs a multiple of "
            f"{ranks}"
        )
        yield Problem(
            f"stages.{index}.global_batch_sequences",
            batch,
            rule,
            nearest_multiples(batch, micro * data_parallel * ranks),
        )


def attention_backend_fits(experiment: Experiment) -> Iterator[Problem]:
    """A named backend that other settings exclude on every machine."""
    setting, runtime, parallel = experiment.runtime.attention_backend, experiment.runtime, experiment.parallel
    if setting == "auto":
        return
    backend = BACKENDS[setting]
    installed = {} if backend.package is None else {backend.package: ".".join(map(str, backend.version)) or "2.11"}
    work = Work(
        capability=None if runtime.device == "cpu" else backend.capability,
        packages={} if runtime.transformer_engine == "never" and backend.package == "transformer-engine" else installed,
        dtype=experiment.precision.dtype,
        head_dim=experiment.model.head_dim,
        is_deterministic=False,
        is_gathered=parallel.context_parallel_size > 1 and parallel.context_parallel_method == "all_gather",
        is_recorded=False,
        longest_scores=0,
    )
    if (reason := backend.missing(work)) is not None:
        yield Problem("runtime.attention_backend", setting, reason, nearest(setting, work))


EXPERIMENT_RULES: tuple[Callable[[Experiment], Iterator[Problem]], ...] = (
    experts_split_over_ranks,
    tensor_parallel_divides,
    expert_tensor_parallel_divides,
    sequence_parallel_goes_with_tensor_parallel,
    pipeline_never_cuts_a_cla_group,
    heads_trade_for_tokens,
    param_gather_overlap_needs_its_base,
    shared_expert_overlap_needs_an_exchange,
    offload_needs_the_distributed_optimizer,
    attention_backend_fits,
    offloaded_layers_are_whole_groups,
    *TRAINING_RULES,
    *DATA_RULES,
    *PRECISION_RULES,
    *RECORDING_RULES,
    *NOISE_RULES,
    *LOGGING_RULES,
    *RESILIENCE_RULES,
    *TUNING_RULES,
)
