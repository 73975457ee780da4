"""The weights of one rank, and how megatron-core lays them and their gradients out in buffers and buckets.

The order of the weights and core's padding rules decide how many bytes a rank stores, and how many it reduces and
gathers per step. Both are computed from this layout. Sizes are in elements. Source of the rules: _ParamAndGradBuffer in
megatron-core 0.16 to 0.19.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from hunyuan_pretrain.config.derived import grid, overlaps, pipeline_stages
from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, TuningConfig
from hunyuan_pretrain.config.tuning import (
    ADAPTER,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    adapted_sizes,
    is_trained,
    linears_of_layer,
    names_of_layer,
    targets,
)

SMALLEST_BUCKET = 40_000_000
"""With overlapped reduction, core closes a bucket once it has this many elements, or 1,000,000 per data-parallel rank
if that is more."""


@dataclass(frozen=True)
class Weight:
    """This rank's part of one parameter."""

    size: int
    is_routed_expert: bool = False
    is_router: bool = False
    """Kept in fp32 in every precision."""
    is_replicated: bool = False
    """The same on all tensor-parallel ranks: norms and routers. The ranks see different tokens and sum its gradient."""
    is_shared_embedding: bool = False
    """Also on another pipeline stage."""
    fp8_layer: int | None = None
    """The layer it belongs to, if an FP8 recipe can quantise it: weights of linear layers and experts."""
    name: str = ""
    """As in a checkpoint."""
    is_trained: bool = True
    """Else it is frozen: in no buffer."""

    @property
    def parameter_group(self) -> int:
        """Index of the weight's parameter group in the optimizer: 1 routed experts, 2 norms, 0 all others."""
        is_norm = self.is_replicated and not self.is_router and not self.is_adapter
        return 1 if self.is_routed_expert else 2 if is_norm else 0

    @property
    def is_adapter(self) -> bool:
        """Whether LoRA added it."""
        return ADAPTER in self.name


def weights_of_stage(
    model: ModelConfig, parallel: ParallelConfig, stage: int, tuning: TuningConfig | None = None
) -> list[Weight]:
    """This rank's parameters of one stage, in the order in which HunyuanModel registers them. tuning: which of them are
    trained, and adapters; None: all."""
    tp, etp, ep = (
        parallel.tensor_model_parallel_size,
        parallel.expert_tensor_parallel_size,
        parallel.expert_model_parallel_size,
    )
    stages, hidden, is_tied = (
        pipeline_stages(model, parallel),
        model.hidden_size,
        model.share_embeddings_and_output_weights,
    )
    is_first, is_last = stage == 0, stage == len(stages) - 1
    vocabulary = model.padded_vocab_size * hidden // tp
    query = hidden * model.num_attention_heads * model.head_dim // tp
    key_value = 2 * hidden * model.num_query_groups * model.head_dim // tp
    expert = model.num_moe_experts // ep * hidden * model.expert_ffn_size // etp
    shared = hidden * model.ffn_hidden_size // tp
    norm = partial(Weight, is_replicated=True)

    def layer(number: int) -> Iterator[Weight]:
        linear = partial(Weight, fp8_layer=number)
        routed = partial(linear, is_routed_expert=True)
        yield norm(hidden)
        yield linear(query + (key_value if number % model.cla_share_factor == 0 else 0))
        if model.qk_layernorm:
            yield from (norm(model.head_dim), norm(model.head_dim))
        yield from (linear(query), norm(hidden))
        yield Weight(model.num_moe_experts * hidden, is_router=True, is_replicated=True)
        yield from (routed(2 * expert), routed(expert), linear(2 * shared), linear(shared))

    def named(number: int) -> Iterator[Weight]:
        for weight, name in zip(layer(number), names_of_layer(model, number), strict=True):
            yield replace(weight, name=name)
            yield from _adapters(model, parallel, tuning, number, name)

    embedding = Weight(vocabulary, is_shared_embedding=is_tied and len(stages) > 1, name=EMBEDDING)
    weights = [embedding] if is_first else []
    weights += [weight for number in stages[stage] for weight in named(number)]
    if is_last:
        weights.append(replace(norm(hidden), name=FINAL_NORM))
        weights += [] if is_tied and is_first else [embedding if is_tied else Weight(vocabulary, name=HEAD)]
    if tuning is None or not tuning.is_partial:
        return weights
    return [replace(weight, is_trained=is_trained(tuning, weight.name)) for weight in weights]


def _adapters(
    model: ModelConfig, parallel: ParallelConfig, tuning: TuningConfig | None, layer: int, name: str
) -> Iterator[Weight]:
    """A and B of each part of the linear layer whose weight has this name."""
    if tuning is None or tuning.lora is None:
        return
    parts = targets(model, tuning.lora, layer)
    for linear in linears_of_layer(model, layer):
        if name != f"decoder.layers.{layer}.{linear.name}.weight":
            continue
        is_routed, rank = linear.is_routed, tuning.lora.rank
        ranks = parallel.expert_tensor_parallel_size if is_routed else parallel.tensor_model_parallel_size
        experts = model.num_moe_experts // parallel.expert_model_parallel_size if is_routed else 1
        for part in parts.get(linear.name, ()):
            sizes = adapted_sizes(model, linear, part)
            sharded = 0 if linear.is_row_parallel else 1
            for number, letter in enumerate("ab"):
                size = experts * rank * sizes[number] // (ranks if number == sharded else 1)
                yield Weight(
                    size,
                    is_routed_expert=is_routed,
                    is_replicated=number != sharded and not is_routed,
                    name=f"{name.removesuffix('weight')}adapter.{part}.{letter}",
                )


@dataclass
class Buffer:
    """Weights with the same number format that are reduced over the same ranks, stored contiguously from the last to
    the first."""

    axis: str
    """The ranks over which it is reduced: dp or expert_dp."""
    num_ranks: int
    weight_bytes: int
    """Of one element."""
    gradient_bytes: int
    """Of one element."""
    is_sharded: bool
    """Whether the optimizer state is sharded over the ranks (distributed optimizer); the buffer is then padded."""
    positions: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) of each weight."""
    weights: list[Weight] = field(default_factory=list)
    """The weight at each position."""
    buckets: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) of each bucket. A bucket is reduced and gathered in one call."""

    @property
    def size(self) -> int:
        """Elements, including padding."""
        return self.buckets[-1][1]

    def kept(self) -> list[int]:
        """Per rank, the number of elements whose optimizer state it keeps."""
        return [sum(size for _, size in pieces) for pieces in self.pieces()]

    def pieces(self) -> list[list[tuple[Weight, int]]]:
        """Per rank, in order: (weight, number of elements) for every weight whose optimizer state it keeps at least in
        part."""
        if not self.is_sharded:
            return [
                [(weight, end - start) for weight, (start, end) in zip(self.weights, self.positions, strict=True)]
            ] * self.num_ranks
        pieces: list[list[tuple[Weight, int]]] = [[] for _ in range(self.num_ranks)]
        for first, last in self.buckets:
            share = (last - first) // self.num_ranks
            for weight, (start, end) in zip(self.weights, self.positions, strict=True):
                if first <= start < last:
                    for rank in range((start - first) // share, -(-(end - first) // share)):
                        size = min(end - first, (rank + 1) * share) - max(start - first, rank * share)
                        pieces[rank].append((weight, size))
        return pieces


def bytes_of(weight: Weight, precision: PrecisionConfig) -> int:
    """Bytes of an element of a weight that is not kept in FP8."""
    return 4 if weight.is_router or precision.dtype == "fp32" else 2


def buffers_of_stage(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    world_size: int,
    stage: int,
    tuning: TuningConfig | None = None,
) -> list[Buffer]:
    """Buffers of one model chunk, laid out as in core; frozen weights are in none. Raises ValueError if the layout does
    not fit the number of ranks.

    With fp8_parameters, weights of FP8 layers count 1 byte, as with Transformer Engine; emulation keeps them in bf16.
    """
    ranks = grid(parallel, world_size)
    limit = None
    # later pipeline ranks do not wait for their reduction
    if overlaps(parallel, ranks.most_copies).grad_reduce and stage % ranks.pp == 0:
        limit = max(SMALLEST_BUCKET, 1_000_000 * ranks.dp)
    found: dict[tuple[bool, int], list[Weight]] = {}
    for weight in weights_of_stage(model, parallel, stage, tuning):
        if not weight.is_trained:
            continue
        weight_bytes = bytes_of(weight, precision)
        if (
            precision.fp8_parameters
            and weight.fp8_layer is not None
            and precision.is_fp8_layer(weight.fp8_layer, model.num_layers)
        ):
            weight_bytes = 1
        found.setdefault((weight.is_routed_expert and ranks.has_expert_buffers, weight_bytes), []).append(weight)
    return [
        _lay_out(
            weights,
            Buffer(
                axis="expert_dp" if is_expert else "dp",
                num_ranks=ranks.expert_dp if is_expert else ranks.dp_cp,
                weight_bytes=weight_bytes,
                gradient_bytes=4 if precision.grad_reduce_in_fp32 else max(weight_bytes, 2),
                is_sharded=parallel.use_distributed_optimizer,
            ),
            limit,
        )
        for (is_expert, weight_bytes), weights in found.items()
    ]


def _lay_out(weights: list[Weight], buffer: Buffer, limit: int | None) -> Buffer:
    """Place the weights from the last to the first.

    If sharded, a weight begins at a multiple of 64 elements, and a bucket ends at a multiple of 128 and of the number
    of ranks. An embedding that two stages hold gets its own bucket, so that both stages shard it the same way."""

    def padded(position: int, divisor: int) -> int:
        return -(-position // divisor) * divisor if buffer.is_sharded else position

    def close(end: int) -> int:
        buffer.buckets.append((first, padded(end, math.lcm(buffer.num_ranks, 128))))
        return buffer.buckets[-1][1]

    first = position = 0
    for weight in reversed(weights):
        position = padded(position, 64)
        is_alone = weight.is_shared_embedding and buffer.is_sharded
        if is_alone and position > first:
            first = position = close(position)
        buffer.positions.append((position, position + weight.size))
        buffer.weights.append(weight)
        position += weight.size
        if is_alone or (limit is not None and position - first >= limit):
            first = position = close(position)
    if position > first:
        close(position)
    return buffer
