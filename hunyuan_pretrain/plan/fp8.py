"""What an FP8 recipe moves to FP8 and what it keeps in memory, in closed form, on Transformer Engine's kernels:
emulation saves nothing."""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_pretrain.config.derived import grid, stages_of
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, PrecisionConfig, StageConfig
from hunyuan_pretrain.plan.counts import flops_per_token


@dataclass(frozen=True)
class LayerSizes:
    """The quantised matrix products of one layer, whole matrices."""

    weights: int
    """Elements, of which every routed expert counts."""
    visited_weights: int
    """Elements that one token is multiplied with."""
    inputs: int
    """Values per token that the backward pass needs of the products' inputs."""


def layer_sizes(model: ModelConfig, layer: int) -> LayerSizes:
    """Of a layer, counted from 0; the first of a CLA group also projects keys and values."""
    hidden, query, key = (
        model.hidden_size,
        model.num_attention_heads * model.head_dim,
        model.num_query_groups * model.head_dim,
    )
    owns = layer % model.cla_share_factor == 0
    attention = hidden * (query + 2 * key * owns) + query * hidden
    shared, routed = 3 * hidden * model.ffn_hidden_size, 3 * hidden * model.expert_ffn_size
    inputs = (
        hidden + query + (hidden + model.ffn_hidden_size) + model.moe_router_topk * (hidden + model.expert_ffn_size)
    )
    return LayerSizes(
        attention + shared + model.num_moe_experts * routed, attention + shared + model.moe_router_topk * routed, inputs
    )


def fp8_layers(model: ModelConfig, precision: PrecisionConfig) -> list[int]:
    """Layers that compute in FP8."""
    return [layer for layer in range(model.num_layers) if precision.is_fp8_layer(layer, model.num_layers)]


@dataclass(frozen=True)
class Fp8Flops:
    """FLOPs of training on one token, forward and backward."""

    quantised: float
    matmuls: float
    """All products with weights."""
    total: float
    """And attention."""


def fp8_flops_per_token(model: ModelConfig, precision: PrecisionConfig, sequence_length: int) -> Fp8Flops:
    """How much of the work is in FP8; conventions of `counts.flops_per_token`, one document a sequence."""
    flops = flops_per_token(model, sequence_length)
    quantised = 6.0 * sum(layer_sizes(model, layer).visited_weights for layer in fp8_layers(model, precision))
    return Fp8Flops(quantised, flops.matmuls, flops.total)


@dataclass(frozen=True)
class Fp8Memory:
    """Bytes of one rank, of the pipeline rank that has the most."""

    inputs: int
    """What one micro-batch leaves for the backward pass of the quantised products: their inputs, in FP8 with scales."""
    inputs_without: int
    """The same in the dtype of the run."""
    weight_copies: int
    """FP8 weights, by rows and by columns, kept from the first micro-batch of a step to the last, beside the weights
    themselves; of parameters in FP8 only, which have the rows, the columns."""


def fp8_memory_per_rank(experiment: Experiment, stage: StageConfig, world_size: int) -> Fp8Memory:
    """Memory that FP8 products take and save. Routing is taken as even.

    Recomputed products leave no inputs: none with parallel.recompute cla_group, those of the attention projections only
    with selective.
    """
    model, parallel, precision = experiment.model, experiment.parallel, experiment.precision
    assert precision.recipe is not None
    ranks = grid(parallel, world_size)
    tokens = stage.sequence_length * stage.micro_batch_sequences // ranks.cp / ranks.tp
    scale_bytes = precision.recipe.scale_bytes_per_value
    expert_weights = 3 * model.hidden_size * model.expert_ffn_size * model.num_moe_experts
    most = Fp8Memory(0, 0, 0)
    for pipeline_rank in range(ranks.pp):
        mine = [layer for layers in stages_of(model, parallel, pipeline_rank).values() for layer in layers]
        values = weights = 0.0
        for layer in mine:
            if not precision.is_fp8_layer(layer, model.num_layers):
                continue
            sizes = layer_sizes(model, layer)
            attention_inputs = model.hidden_size + model.num_attention_heads * model.head_dim
            values += {"none": sizes.inputs, "selective": attention_inputs, "cla_group": 0}[parallel.recompute] * tokens
            weights += (sizes.weights - expert_weights) / ranks.tp + expert_weights / (ranks.ep * ranks.expert_tp)
        dtype_bytes = 2 if precision.dtype == "bf16" else 4
        copies = weights * (1 + 2 * scale_bytes if precision.fp8_parameters else 2 * (1 + scale_bytes))
        memory = Fp8Memory(round(values * (1 + scale_bytes)), round(values * dtype_bytes), round(copies))
        most = max(most, memory, key=lambda memory: memory.weight_copies)
    return most
