"""Cost of a model in closed form: parameters, FLOPs and bytes.

Pure arithmetic on the configuration, without torch. The runtime builds the same model and asserts these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hunyuan_pretrain.config.derived import grid, stages_of
from hunyuan_pretrain.config.schema import (
    Experiment,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TuningConfig,
)
from hunyuan_pretrain.plan.buffers import Buffer, Weight, buffers_of_stage, bytes_of, weights_of_stage


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the whole model by part; every part is a sum over all layers."""

    embedding: int
    """Input embedding; also the output head if the two are tied."""
    output_head: int
    """0 if it is tied to the embedding."""
    attention: int
    """Query, key, value and output projections; key and value only in the layers that own them (CLA)."""
    router: int
    shared_expert: int
    routed_experts: int
    norms: int
    """Weights of every RMSNorm: two per layer and the final one; with qk_layernorm also a query and a key norm per
    layer."""
    active: int
    """Parameters used per token, in the convention of the published 52B (51,318,800,640 exactly): all except the routed
    experts that the token does not visit. The whole embedding is counted, once if it is tied."""

    @property
    def total(self) -> int:
        """All parameters; tied embedding and output head count once."""
        return (
            self.embedding
            + self.output_head
            + self.attention
            + self.router
            + self.shared_expert
            + self.routed_experts
            + self.norms
        )

    @property
    def dense(self) -> int:
        """All parameters except the routed experts; expert parallelism does not split these."""
        return self.total - self.routed_experts


def parameters(model: ModelConfig) -> ParameterCounts:
    """Parameters of a model. The published Hunyuan-Large has 388,698,128,640, of which 51,318,800,640 are active."""
    layers, hidden = model.num_layers, model.hidden_size
    query_width = model.num_attention_heads * model.head_dim
    key_width = model.num_query_groups * model.head_dim
    kv_owners = layers // model.cla_share_factor
    routed = layers * model.num_moe_experts * 3 * hidden * model.expert_ffn_size
    parts = {
        "embedding": model.padded_vocab_size * hidden,
        "output_head": 0 if model.share_embeddings_and_output_weights else model.padded_vocab_size * hidden,
        "attention": layers * 2 * hidden * query_width + kv_owners * 2 * hidden * key_width,
        "router": layers * model.num_moe_experts * hidden,
        "shared_expert": layers * 3 * hidden * model.ffn_hidden_size,
        "norms": hidden * (2 * layers + 1) + (layers * 2 * model.head_dim if model.qk_layernorm else 0),
    }
    visited = routed // model.num_moe_experts * model.moe_router_topk
    return ParameterCounts(**parts, routed_experts=routed, active=sum(parts.values()) + visited)


@dataclass(frozen=True)
class FlopsPerToken:
    """Model FLOPs per training token, forward and backward; a multiply-add counts as 2."""

    attention_projections: float
    router: float
    experts: float
    """Shared expert and the visited routed experts."""
    output_head: float
    attention_scores: float
    """Query times key, only for the pairs that the causal mask and document boundaries allow."""
    attention_values: float
    """Attention weights times value, for the same pairs."""

    @property
    def matmuls(self) -> float:
        """6 * the number of weights that a token is multiplied by."""
        return self.attention_projections + self.router + self.experts + self.output_head

    @property
    def total(self) -> float:
        """All terms."""
        return self.matmuls + self.attention_scores + self.attention_values


def flops_per_token(
    model: ModelConfig, sequence_length: int, document_lengths: Sequence[int] | None = None
) -> FlopsPerToken:
    """Model FLOPs per token, averaged over a packed sequence.

    The matmul terms are 6 FLOPs (2 forward, 4 backward) per weight on a token's path. The output head counts; the
    embedding lookup and the norms do not. The attention terms count n * (n + 1) / 2 query-key pairs for a causal
    document of n tokens. Recomputation does not count as model FLOPs. A recycled token visits as many experts as any
    other.

    `sequence_length`: in tokens. `document_lengths`: lengths of the documents packed into it, in tokens; None: one
    document that fills it. Raises ValueError if the documents are longer than the sequence.
    """
    documents = [sequence_length] if document_lengths is None else list(document_lengths)
    if sum(documents) > sequence_length:
        raise ValueError(
            f"document_lengths add up to {sum(documents)} tokens, more than sequence_length={sequence_length}"
        )
    pairs_per_token = sum(n * (n + 1) / 2 for n in documents) / sequence_length
    count = parameters(model)
    visited = count.routed_experts // model.num_moe_experts * model.moe_router_topk
    # Forward: 2 FLOPs per channel, head and pair. Backward: gradients of both factors, twice that.
    attention = 3 * 2 * model.num_layers * model.num_attention_heads * model.head_dim * pairs_per_token
    return FlopsPerToken(
        attention_projections=6 * count.attention,
        router=6 * count.router,
        experts=6 * (count.shared_expert + visited),
        output_head=6 * model.padded_vocab_size * model.hidden_size,
        attention_scores=attention,
        attention_values=attention,
    )


def report_flops_per_token(model: ModelConfig) -> float:
    """Training FLOPs per token by the scaling law of the Hunyuan-Large report (arXiv 2411.02265): C = 9.59 N D +
    2.3e8 D for N active parameters and D tokens.

    The report derives neither number. Forward and backward passes multiply by each weight 3 times, 6 FLOPs per active
    parameter and token; with full recompute 4 times, 8 FLOPs; attention grows with the length of the documents and not
    with N. So for Hunyuan-Large `flops_per_token` is 0.65 times this at 4K, 0.79 times at 32K, 1.93 times at 256K.
    """
    return 9.59 * parameters(model).active + 2.3e8


def kv_cache_bytes_per_token(model: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes of key/value cache per token in serving, over all layers. With CLA, only the owner layers store keys and
    values.

    Hunyuan-Large in bf16: 81,920; without CLA 163,840; with a key/value head for every query head 1,638,400 (report,
    table 1).
    """
    return 2 * model.num_layers // model.cla_share_factor * model.num_query_groups * model.head_dim * bytes_per_value


def logits_bytes(tokens: int, padded_vocab_size: int) -> int:
    """Bytes of fp32 logits. Training holds only the logits of one chunk of tokens at a time (model.cross_entropy)."""
    return 4 * tokens * padded_vocab_size


@dataclass(frozen=True)
class RankMemory:
    """Bytes that training keeps on one rank between steps. Activations, communication buffers and allocator overhead
    are not included."""

    weights: int
    gradients: int
    optimizer: int
    """Both Adam moments and, with bf16 weights, the fp32 main weights or what the weights lack of them; with
    optimizer.ema_decay the average of the weights."""
    host: int = 0
    """Host memory of the offloaded optimizer: `host_bytes` of each offloaded element."""

    @property
    def total(self) -> int:
        """Bytes of weights, gradients and optimizer state on the device."""
        return self.weights + self.gradients + self.optimizer


def average_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes of the moving average per element of a trained weight."""
    return 0 if optimizer.ema_decay is None else 4


def host_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes of the offloaded optimizer per element: both moments, weight, gradient and the average, in fp32."""
    return 16 + average_bytes(optimizer)


def state_bytes(optimizer: OptimizerConfig, weight_bytes: int) -> int:
    """Bytes of optimizer state per element of a weight of `weight_bytes` bytes: both moments; unless the weight is
    fp32, the fp32 main weight or what the weight lacks of it; and the average."""
    moments = sum({"fp32": 4, "bf16": 2}[dtype] for dtype in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
    main = 2 if optimizer.use_precision_aware_optimizer else 4
    return moments + (0 if weight_bytes == 4 else main) + average_bytes(optimizer)


def checkpoint_bytes(experiment: Experiment) -> int:
    """Bytes of the tensors in a checkpoint: each weight as in training and both moments, for a bf16 weight also its
    main weight, and the average if there is one, these in fp32. Routers are fp32 in every run."""
    if experiment.tuning.is_partial:
        whole = weights_of_stage(experiment.model, ParallelConfig(), 0, experiment.tuning)
        return sum(weight.size * sum(saved_sizes(experiment, weight)) for weight in whole)
    count, average = parameters(experiment.model), average_bytes(experiment.optimizer)
    if experiment.precision.dtype == "fp32":
        return (12 + average) * count.total
    return (12 + average) * count.router + (14 + average) * (count.total - count.router)


def saved_sizes(experiment: Experiment, weight: Weight) -> tuple[int, ...]:
    """Bytes per element of each tensor that a checkpoint has of a weight: none of a weight beside which there are
    adapters, one of another frozen weight."""
    is_fp32 = bytes_of(weight, experiment.precision) == 4
    if experiment.tuning.lora is not None and not weight.is_adapter:
        return ()
    if not weight.is_trained:
        return (4,) if is_fp32 else (2,)
    average = (4,) if average_bytes(experiment.optimizer) else ()
    return (4, 4, 4, *average) if is_fp32 else (2, 4, 4, 4, *average)


def memory_per_rank(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    world_size: int,
    pipeline_rank: int | None = None,
    optimizer: OptimizerConfig | None = None,
    tuning: TuningConfig | None = None,
) -> RankMemory:
    """Memory of the rank that keeps the most, among all ranks or among those of one pipeline rank.

    optimizer: the formats of its state and the offloaded fraction; None: fp32, nothing offloaded. tuning: which weights
    are trained; the others take their own bytes and nothing else. None: all.

    Router weights are fp32 in every precision. With tied embeddings, the last stage keeps a copy of the embedding. The
    distributed optimizer shards the state of the routed experts over the ranks that hold the same experts, and all
    other state over the data- and context-parallel ranks. Its buffers are padded, and the padding is counted. Left out:
    a 4-byte counter per parameter; with the precision-aware optimizer on a GPU, a copy of the routers' weights that
    Transformer Engine keeps; and what exists during an update only, such as an fp32 copy of bf16 gradients.
    Raises ValueError if the layout does not fit the number of ranks, or if there is no such pipeline rank.
    """
    pipeline_ranks = range(parallel.pipeline_model_parallel_size) if pipeline_rank is None else [pipeline_rank]
    parts = model, parallel, precision, world_size
    return max(
        (
            memory
            for pipeline_rank in pipeline_ranks
            for memory in memory_of_ranks(*parts, pipeline_rank, optimizer, tuning)
        ),
        key=_total,
    )


def _total(memory: RankMemory) -> int:
    return memory.total


def memory_of_ranks(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    world_size: int,
    pipeline_rank: int,
    optimizer: OptimizerConfig | None = None,
    tuning: TuningConfig | None = None,
) -> list[RankMemory]:
    """`memory_per_rank` for each of the world_size / PP consecutive ranks of one pipeline rank."""
    optimizer = optimizer or OptimizerConfig(lr=1.0)
    ranks = grid(parallel, world_size)
    chunks = stages_of(model, parallel, pipeline_rank)
    parts = model, parallel, precision, world_size
    buffers = [buffer for chunk in chunks for buffer in buffers_of_stage(*parts, chunk, tuning)]
    weights = sum(buffer.size * buffer.weight_bytes for buffer in buffers)
    weights += sum(
        weight.size * bytes_of(weight, precision)
        for chunk in chunks
        for weight in weights_of_stage(model, parallel, chunk, tuning)
        if not weight.is_trained
    )
    gradients = sum(buffer.size * buffer.gradient_bytes for buffer in buffers)
    states = {}
    for axis, size in (("dp", ranks.dp_cp), ("expert_dp", ranks.expert_dp)):
        shared = [(buffer, buffer.pieces()) for buffer in buffers if buffer.axis == axis]
        states[axis] = [
            _state_of_shard([(buffer, pieces[shard]) for buffer, pieces in shared], optimizer) for shard in range(size)
        ]
    shards = [
        (states["dp"][ranks.shard(rank, False)], states["expert_dp"][ranks.shard(rank, True)])
        for rank in range(world_size // ranks.pp)
    ]
    return [RankMemory(weights, gradients, dense[0] + expert[0], dense[1] + expert[1]) for dense, expert in shards]


def _state_of_shard(
    shares: list[tuple[Buffer, list[tuple[Weight, int]]]], optimizer: OptimizerConfig
) -> tuple[int, int]:
    """(device bytes, host bytes) of optimizer state of one of the ranks that share these buffers, from its pieces of
    each. One optimizer updates all of the buffers.

    Core's offloaded optimizer (HybridDeviceOptimizer) takes weights in the order of the parameter groups, fp32 weights
    first within each group, until it has the requested fraction of the elements.
    """
    pieces = [(buffer, weight, size) for buffer, mine in shares for weight, size in mine]
    pieces.sort(key=lambda piece: (piece[1].parameter_group, piece[0].weight_bytes != 4))
    wanted = sum(size for _, _, size in pieces) * optimizer.cpu_offload_fraction
    on_device = offloaded = 0
    for buffer, _, size in pieces:
        if offloaded < wanted:
            offloaded += size
        else:
            # it keeps an fp32 copy of bf16 gradients between steps
            copied = 4 if optimizer.cpu_offload_fraction and buffer.gradient_bytes < 4 else 0
            on_device += size * (state_bytes(optimizer, buffer.weight_bytes) + copied)
    return on_device, host_bytes(optimizer) * offloaded
