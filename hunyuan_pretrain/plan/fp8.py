"""The FLOPs and memory that an FP8 recipe affects, in closed form. All numbers are for Transformer Engine's kernels;
emulation saves nothing."""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_pretrain.config.derived import grid, stages_of
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, PrecisionConfig, StageConfig
from hunyuan_pretrain.plan.counts import flops_per_token


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of the quantised linears of one layer, before sharding."""

    weights: int
    """Weight elements, including every routed expert."""
    visited_weights: int
    """Weight elements that one token is multiplied by."""
    inputs: int
    """Input values per token that the linears keep for the backward pass."""


def layer_sizes(model: ModelConfig, layer: int) -> LayerSizes:
    """Sizes of a layer, counted from 0. The first layer of a CLA group also projects keys and values."""
    hidden, query, key = (
        model.hidden_size,
        model.num_attention_heads * model.head_dim,
        model.num_query_groups * model.head_dim,
    )
    owns = layer % model.cla_share_factor == 0
    attention = hidden * (query + 2 * key * owns) + query * hidden
    shared, routed = 3 * hidden * model.ffn_hidden_size, 3 * hidden * model.expert_ffn_size
    return LayerSizes(
        attention + shared + model.num_moe_experts * routed,
        attention + shared + model.moe_router_topk * routed,
        kept_inputs(model, frozenset()),
    )


def kept_inputs(model: ModelConfig, parts: frozenset[str]) -> int:
    """Input values per token that a layer's linears keep for the backward pass with these parts recomputed."""
    if "cla_group" in parts:
        return 0
    hidden, topk = model.hidden_size, model.moe_router_topk
    inputs = model.num_attention_heads * model.head_dim  # of the output projection
    inputs += 0 if "norms" in parts else hidden  # of the query, key and value projection
    if "selective" in parts:
        return inputs
    inputs += (0 if "norms" in parts else hidden) + topk * hidden
    return inputs + (0 if "swiglu" in parts else model.ffn_hidden_size + topk * model.expert_ffn_size)


def fp8_layers(model: ModelConfig, precision: PrecisionConfig) -> list[int]:
    """Layers that compute in FP8."""
    return [layer for layer in range(model.num_layers) if precision.is_fp8_layer(layer, model.num_layers)]


@dataclass(frozen=True)
class Fp8Flops:
    """FLOPs per training token, forward and backward."""

    quantised: float
    matmuls: float
    """All matmuls with weights."""
    total: float
    """`matmuls` plus attention."""


def fp8_flops_per_token(model: ModelConfig, precision: PrecisionConfig, sequence_length: int) -> Fp8Flops:
    """FLOPs in FP8, in the conventions of `counts.flops_per_token`, with one document per sequence."""
    flops = flops_per_token(model, sequence_length)
    quantised = 6.0 * sum(layer_sizes(model, layer).visited_weights for layer in fp8_layers(model, precision))
    return Fp8Flops(quantised, flops.matmuls, flops.total)


@dataclass(frozen=True)
class Fp8Memory:
    """Bytes per rank, on the pipeline rank with the largest weight copies."""

    inputs: int
    """Inputs of the quantised linears that one micro-batch keeps for the backward pass, in FP8 with scales."""
    inputs_without: int
    """The same in the run's dtype."""
    weight_copies: int
    """FP8 weights, quantised by rows and by columns, kept from the first micro-batch of a step to the last in addition
    to the weights. With fp8_parameters only the columns: the weights themselves are the rows."""


def fp8_memory_per_rank(experiment: Experiment, stage: StageConfig, world_size: int) -> Fp8Memory:
    """Memory that FP8 linears need and save, assuming even routing.

    Recomputed linears keep no inputs, nor do linears whose input is recomputed (parallel.recompute).
    """
    model, parallel, precision = experiment.model, experiment.parallel, experiment.precision
    assert precision.recipe is not None
    ranks = grid(parallel, world_size)
    tokens = stage.sequence_length * stage.micro_batch_sequences // ranks.cp / ranks.tp
    scale_bytes = precision.recipe.scale_bytes_per_value
    dtype_bytes = 2 if precision.dtype == "bf16" else 4
    most = Fp8Memory(0, 0, 0)
    for pipeline_rank in range(ranks.pp):
        mine = [layer for layers in stages_of(model, parallel, pipeline_rank).values() for layer in layers]
        quantised = sum(precision.is_fp8_layer(layer, model.num_layers) for layer in mine)
        values = quantised * kept_inputs(model, parallel.recomputed_parts) * tokens
        copies = weight_copies(experiment, world_size, pipeline_rank)
        memory = Fp8Memory(round(values * (1 + scale_bytes)), round(values * dtype_bytes), copies)
        most = max(most, memory, key=lambda memory: memory.weight_copies)
    return most


def weight_copies(experiment: Experiment, world_size: int, pipeline_rank: int) -> int:
    """`Fp8Memory.weight_copies` of one pipeline rank; 0 without a recipe."""
    model, parallel, precision = experiment.model, experiment.parallel, experiment.precision
    if precision.recipe is None:
        return 0
    ranks, scale_bytes = grid(parallel, world_size), precision.recipe.scale_bytes_per_value
    expert_weights = 3 * model.hidden_size * model.expert_ffn_size * model.num_moe_experts
    weights = 0.0
    for layers in stages_of(model, parallel, pipeline_rank).values():
        for layer in layers:
            if precision.is_fp8_layer(layer, model.num_layers):
                dense = layer_sizes(model, layer).weights - expert_weights
                weights += dense / ranks.tp + expert_weights / (ranks.ep * ranks.expert_tp)
    return round(weights * (1 + 2 * scale_bytes if precision.fp8_parameters else 2 * (1 + scale_bytes)))
