"""Rules for number formats: FP8 recipes, and the matrix sizes that their kernels need."""

from __future__ import annotations

from collections.abc import Iterator

from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.recipe import RECIPES
from hunyuan_pretrain.config.schema import Experiment

DELAYED_ONLY = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
"""Settings that every recipe except delayed would silently ignore."""


def fp8_settings_take_effect(experiment: Experiment) -> Iterator[Problem]:
    """FP8 settings without a recipe, and settings of the delayed recipe with another one, are refused: nothing would
    read them."""
    precision, recipe = experiment.precision, experiment.precision.recipe
    names: tuple[str, ...] = ()
    reason = ""
    if recipe is None:
        names, reason = ("fp8_format", *DELAYED_ONLY), "fp8_recipe is null: nothing is quantised"
    elif not recipe.is_delayed:
        names, reason = DELAYED_ONLY, "only the delayed recipe reads it"
    for name in names:
        if getattr(precision, name) is not None:
            yield Problem(
                f"precision.{name}",
                getattr(precision, name),
                reason,
                "use null, or set precision.fp8_recipe to delayed",
            )
    if recipe is None:
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if getattr(precision, name):
                yield Problem(
                    f"precision.{name}", getattr(precision, name), "fp8_recipe is null: no layer is in FP8", "use 0"
                )


def fp8_parameters_have_main_weights(experiment: Experiment) -> Iterator[Problem]:
    """fp8_parameters needs an optimizer with separate fp32 main weights, and a format that it can all-gather."""
    precision, recipe = experiment.precision, experiment.precision.recipe
    if not precision.fp8_parameters:
        return
    if recipe is None:
        reason, hint = "fp8_recipe is null: nothing is quantised", "use false, or choose a recipe"
    elif recipe.no_parameters is not None:
        reason, hint = recipe.no_parameters, "use false, or another recipe"
    elif precision.dtype == "fp32":
        reason, hint = (
            "with precision.dtype=fp32 the optimizer has no separate main weights",
            "use precision.dtype=bf16",
        )
    elif not experiment.parallel.use_distributed_optimizer:
        reason, hint = "only the distributed optimizer updates them", "use parallel.use_distributed_optimizer=true"
    elif experiment.optimizer.cpu_offload_fraction:
        reason, hint = "the offloaded optimizer writes weights in bf16", "use optimizer.cpu_offload_fraction=0"
    else:
        return
    yield Problem("precision.fp8_parameters", True, reason, hint)


def fp8_margin_leaves_a_scale(experiment: Experiment) -> Iterator[Problem]:
    margin = experiment.precision.fp8_margin
    if margin is not None and not 0 <= margin <= 8:
        rule = "headroom of 2^margin; below 0 values would saturate, above 8 E4M3 has few values left"
        yield Problem("precision.fp8_margin", margin, rule, "use 0")


def most_recent_reads_one_step(experiment: Experiment) -> Iterator[Problem]:
    precision = experiment.precision
    if precision.fp8_amax_compute_algo == "most_recent" and precision.fp8_amax_history_len not in (None, 1):
        rule = "most_recent reads the last step only; the rest of the history would have no effect"
        yield Problem(
            "precision.fp8_amax_history_len",
            precision.fp8_amax_history_len,
            rule,
            "use null or 1, or fp8_amax_compute_algo max",
        )


def some_layer_is_in_fp8(experiment: Experiment) -> Iterator[Problem]:
    precision, layers = experiment.precision, experiment.model.num_layers
    kept = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    if precision.fp8_recipe is not None and kept >= layers:
        rule = (
            f"with num_layers_at_end_in_bf16={precision.num_layers_at_end_in_bf16} none of the {layers} layers is "
            "left for FP8"
        )
        yield Problem(
            "precision.num_layers_at_start_in_bf16",
            precision.num_layers_at_start_in_bf16,
            rule,
            "lower one, or fp8_recipe null",
        )


def fp8_products_are_aligned(experiment: Experiment) -> Iterator[Problem]:
    """FP8 matmuls need both sizes of each operand to be multiples of `Recipe.size_multiple` on every rank.

    The rule ignores the rows of routed experts, which are padded if necessary.
    """
    model, parallel, recipe = experiment.model, experiment.parallel, experiment.precision.recipe
    if recipe is None:
        return
    unit, tensor, expert_tensor = (
        recipe.size_multiple,
        parallel.tensor_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )
    sizes = {
        "hidden_size": (model.hidden_size, 1),
        "num_attention_heads * head width": (model.num_attention_heads * model.head_dim, tensor),
        "(num_attention_heads + 2 * num_query_groups) * head width": (
            (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim,
            tensor,
        ),
        "ffn_hidden_size": (model.ffn_hidden_size, tensor),
        "moe_ffn_hidden_size": (model.expert_ffn_size, expert_tensor),
    }
    broken = [
        f"{name} {size}{f' over {ranks} ranks' if ranks > 1 else ''} is {size // ranks}"
        for name, (size, ranks) in sizes.items()
        if size % ranks == 0 and size // ranks % unit
    ]
    if broken:
        rule = f"{recipe.name} needs matrix sizes that are multiples of {unit}, but {'; '.join(broken)}"
        others = [other for other in RECIPES.values() if other.size_multiple < unit and not other.is_delayed]
        hint = "choose other sizes or fewer ranks, or null"
        if others:
            names = " or ".join(other.name for other in others)
            hint = f"use {names}, which need multiples of {others[0].size_multiple}"
        yield Problem("precision.fp8_recipe", recipe.name, rule, hint)
    for index, stage in enumerate(experiment.stages):
        tokens, ranks = stage.sequence_length * stage.micro_batch_sequences, parallel.context_parallel_size * tensor
        if tokens % ranks == 0 and tokens // ranks % unit:
            rule = f"a rank has {tokens // ranks} tokens per micro-batch, but {recipe.name} needs a multiple of {unit}"
            yield Problem(
                f"stages.{index}.sequence_length", stage.sequence_length, rule, f"use a multiple of {unit * ranks}"
            )


def gathered_blocks_are_whole(experiment: Experiment) -> Iterator[Problem]:
    """With sequence parallelism, Transformer Engine gathers blockwise inputs as whole blocks with their scales, never
    parts of a block."""
    model, parallel, recipe = experiment.model, experiment.parallel, experiment.precision.recipe
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if recipe is None or recipe.block is None or not recipe.gathers_whole_blocks:
        return
    if not parallel.sequence_parallel or parallel.tensor_model_parallel_size == 1:
        return
    block = recipe.block
    if model.hidden_size % block:
        rule = f"sequence parallelism gathers each token in blocks of {block}, but hidden_size is {model.hidden_size}"
        yield Problem("precision.fp8_recipe", recipe.name, rule, f"use tensorwise, or a multiple of {block}")
    for index, stage in enumerate(experiment.stages):
        tokens = stage.sequence_length * stage.micro_batch_sequences
        if tokens % ranks == 0 and tokens // ranks % block:
            rule = (
                f"a rank has {tokens // ranks} tokens per micro-batch, but sequence parallelism gathers {recipe.name} "
                f"in blocks of {block}"
            )
            yield Problem(
                f"stages.{index}.sequence_length",
                stage.sequence_length,
                rule,
                f"use a multiple of {block * ranks}, or tensorwise",
            )


def delayed_scales_leave_nothing_to_recompute(experiment: Experiment) -> Iterator[Problem]:
    """With a delayed scale, Transformer Engine's linear layers keep the FP8 copy of their input and cannot make it
    again in the backward pass."""
    recipe, recompute = experiment.precision.recipe, experiment.parallel.recompute
    if recipe is None or not recipe.is_delayed or not experiment.parallel.recomputed_parts & {"swiglu", "norms"}:
        return
    rule = "with fp8_recipe=delayed the linear layers keep FP8 copies of their inputs, which recomputing would not free"
    yield Problem(
        "parallel.recompute", recompute, rule, "use selective or cla_group, or precision.fp8_recipe=tensorwise"
    )


def required_transformer_engine_can_run(experiment: Experiment) -> Iterator[Problem]:
    """Settings that runtime.transformer_engine=required excludes on every machine."""
    runtime = experiment.runtime
    if runtime.transformer_engine != "required":
        return
    if runtime.device == "cpu":
        rule = "it runs on CUDA devices only, but runtime.device is cpu"
        yield Problem("runtime.transformer_engine", "required", rule, "use auto or never")
    if experiment.precision.dtype == "fp32":
        rule = "it multiplies fp32 matrices in TF32, with 10 bits of precision, but precision.dtype is fp32"
        yield Problem(
            "runtime.transformer_engine",
            "required",
            rule,
            "use precision.dtype=bf16, or auto, which uses the local layers for fp32",
        )


def state_formats_take_effect(experiment: Experiment) -> Iterator[Problem]:
    """Core stores optimizer state in other formats only with bf16 weights, its distributed optimizer, and all state in
    one place."""
    optimizer, path = experiment.optimizer, "optimizer.use_precision_aware_optimizer"
    if not optimizer.use_precision_aware_optimizer:
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(optimizer, name) != "fp32":
                rule = "only the precision-aware optimizer stores moments in another format than fp32"
                yield Problem(
                    f"optimizer.{name}", getattr(optimizer, name), rule, f"set {path} to true, or this to fp32"
                )
        return
    if experiment.precision.dtype != "bf16":
        rule, hint = "it splits fp32 main weights into bf16 weights and a rest", "use precision.dtype=bf16, or false"
    elif not experiment.parallel.use_distributed_optimizer:
        rule, hint = (
            "it takes its weights and gradients from the distributed optimizer",
            "set parallel.use_distributed_optimizer to true, or this to false",
        )
    elif optimizer.cpu_offload_fraction:
        rule, hint = (
            "core's offloaded optimizer keeps moments and main weights in fp32",
            "use optimizer.cpu_offload_fraction=0, or false",
        )
    elif experiment.precision.fp8_parameters:
        rule, hint = (
            "there are no bf16 weights to keep with precision.fp8_parameters",
            "use precision.fp8_parameters=false, or false",
        )
    else:
        return
    yield Problem(path, True, rule, hint)


def rounded_moments_decay(experiment: Experiment) -> Iterator[Problem]:
    """A step multiplies a moment by beta. The distance of bf16 numbers is 2^-8 to 2^-7 of their value, so rounding to
    nearest undoes a decay by less than half of that, 2^-9 to 2^-8: such a moment could grow, but not shrink."""
    optimizer = experiment.optimizer
    for name, beta in (("exp_avg_dtype", "adam_beta1"), ("exp_avg_sq_dtype", "adam_beta2")):
        decay = getattr(optimizer, beta)
        if getattr(optimizer, name) == "bf16" and 1 - 2**-8 < decay < 1:
            rule = f"with {beta}={decay:g} a step takes less than 2^-8 from a moment; rounding to bf16 can undo that"
            yield Problem(f"optimizer.{name}", "bf16", rule, f"use fp32, or {beta} of at most 0.996")


PRECISION_RULES = (
    state_formats_take_effect,
    rounded_moments_decay,
    delayed_scales_leave_nothing_to_recompute,
    required_transformer_engine_can_run,
    fp8_settings_take_effect,
    fp8_parameters_have_main_weights,
    fp8_margin_leaves_a_scale,
    most_recent_reads_one_step,
    some_layer_is_in_fp8,
    fp8_products_are_aligned,
    gathered_blocks_are_whole,
)
