"""What a model costs, in closed form: parameters, FLOPs and bytes.

Pure arithmetic on the configuration, without torch. The runtime builds the same model and asserts these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hunyuan_pretrain.config.derived import grid, stages_of
from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from hunyuan_pretrain.plan.buffers import Buffer, buffers_of_stage


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the whole model by part; every part is a sum over all layers."""

    embedding: int
    """Input embedding; also the output head where the two are tied."""
    output_head: int
    """0 where it is tied to the embedding."""
    attention: int
    """Query, key, value and output projections; key and value only in the layers that own them (CLA)."""
    router: int
    shared_expert: int
    routed_experts: int
    norms: int
    """Weights of every RMSNorm: two a layer, the final one, and a query and a key norm a layer where qk_layernorm is
    set."""
    active: int
    """Parameters that one token touches. Convention of the published 52B (51,318,800,640 exactly): everything except
    the routed experts that it does not visit, so the whole embedding is counted, once where it is tied."""

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
        """All parameters but the routed experts: what expert parallelism does not split."""
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
    """Model FLOPs of training on one token, forward and backward; a multiply-add is 2."""

    attention_projections: float
    router: float
    experts: float
    """Shared expert and the visited routed experts."""
    output_head: float
    attention_scores: float
    """Query times key, only the pairs that causality and document borders leave."""
    attention_values: float
    """Attention weights times value, the same pairs."""

    @property
    def matmuls(self) -> float:
        """6 * the weights that a token is multiplied with."""
        return self.attention_projections + self.router + self.experts + self.output_head

    @property
    def total(self) -> float:
        """All terms."""
        return self.matmuls + self.attention_scores + self.attention_values


def flops_per_token(
    model: ModelConfig, sequence_length: int, document_lengths: Sequence[int] | None = None
) -> FlopsPerToken:
    """Model FLOPs per token, averaged over a packed sequence.

    The matmul terms are 6 * weights (2 forward, 4 backward) of a token's path: the output head counts, the embedding
    lookup and the norms do not. The attention terms count n * (n + 1) / 2 query-key pairs for a causal document of n
    tokens. Recomputed activations are no model FLOPs, and a recycled token visits as many experts as any other.

    `sequence_length` in tokens; `document_lengths`: lengths of the documents packed into it, in tokens; None: one
    document that fills it. Raises ValueError where the documents are longer than the sequence.
    """
    documents = [sequence_length] if document_lengths is None else list(document_lengths)
    if sum(documents) > sequence_length:
        raise ValueError(
            f"document_lengths add up to {sum(documents)} tokens, more than sequence_length={sequence_length}"
        )
    pairs_per_token = sum(n * (n + 1) / 2 for n in documents) / sequence_length
    count = parameters(model)
    visited = count.routed_experts // model.num_moe_experts * model.moe_router_topk
    # Forward: 2 FLOPs for each channel of each head and pair; backward: the gradients of both factors, twice that.
    attention = 3 * 2 * model.num_layers * model.num_attention_heads * model.head_dim * pairs_per_token
    return FlopsPerToken(
        attention_projections=6 * count.attention,
        router=6 * count.router,
        experts=6 * (count.shared_expert + visited),
        output_head=6 * model.padded_vocab_size * model.hidden_size,
        attention_scores=attention,
        attention_values=attention,
    )


def kv_cache_bytes_per_token(model: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes of the key/value cache that serving keeps for one token, over all layers; only owner layers store (CLA).

    Hunyuan-Large in bf16: 81,920; without CLA 163,840; with a key/value head for every query head 1,638,400 (report,
    table 1).
    """
    return 2 * model.num_layers // model.cla_share_factor * model.num_query_groups * model.head_dim * bytes_per_value


def logits_bytes(tokens: int, padded_vocab_size: int) -> int:
    """Bytes of fp32 logits; training holds those of a chunk of tokens only (model.cross_entropy)."""
    return 4 * tokens * padded_vocab_size


@dataclass(frozen=True)
class RankMemory:
    """Bytes that training keeps on one rank from step to step. Activations, communication buffers and the allocator
    come on top."""

    weights: int
    gradients: int
    optimizer: int
    """Both Adam moments in fp32 and, with bf16 weights, the fp32 main weights."""
    host: int = 0
    """What the offloaded optimizer keeps in the host's memory, beside the device's: of each element both moments,
    weight and gradient, in fp32."""

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer state on the device together, bytes."""
        return self.weights + self.gradients + self.optimizer


def memory_per_rank(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    world_size: int,
    pipeline_rank: int | None = None,
    cpu_offload_fraction: float = 0.0,
) -> RankMemory:
    """Bytes of the rank that keeps the most, of all ranks or of those at one place of the pipeline.

    Router weights are fp32 in every precision; the last stage of a model with tied embeddings keeps a copy of them. The
    distributed optimizer divides the optimizer state of the routed experts over the ranks that hold the same ones, of
    all else over data and context parallel ranks; its buffers are padded, and the padding is counted. Left out: a
    counter of 4 bytes for each parameter.
    cpu_offload_fraction: optimizer.cpu_offload_fraction, of the state of the rank.
    Raises ValueError where the layout does not divide the ranks, or there is no such pipeline rank.
    """
    pipeline_ranks = range(parallel.pipeline_model_parallel_size) if pipeline_rank is None else [pipeline_rank]
    parts = model, parallel, precision, world_size
    return max(
        (
            memory
            for pipeline_rank in pipeline_ranks
            for memory in memory_of_ranks(*parts, pipeline_rank, cpu_offload_fraction)
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
    cpu_offload_fraction: float = 0.0,
) -> list[RankMemory]:
    """The same for each of the world_size / PP ranks at one place of the pipeline, which are consecutive."""
    ranks = grid(parallel, world_size)
    chunks = stages_of(model, parallel, pipeline_rank)
    buffers = [buffer for chunk in chunks for buffer in buffers_of_stage(model, parallel, precision, world_size, chunk)]
    weights = sum(buffer.size * buffer.weight_bytes for buffer in buffers)
    gradients = sum(buffer.size * buffer.gradient_bytes for buffer in buffers)
    states = {
        axis: [
            _state_of_shard([buffer for buffer in buffers if buffer.axis == axis], shard, cpu_offload_fraction)
            for shard in range(size)
        ]
        for axis, size in (("dp", ranks.dp_cp), ("expert_dp", ranks.expert_dp))
    }
    shards = [
        (states["dp"][ranks.shard(rank, False)], states["expert_dp"][ranks.shard(rank, True)])
        for rank in range(world_size // ranks.pp)
    ]
    return [RankMemory(weights, gradients, dense[0] + expert[0], dense[1] + expert[1]) for dense, expert in shards]


def _state_of_shard(buffers: list[Buffer], shard: int, cpu_offload_fraction: float) -> tuple[int, int]:
    """Bytes of optimizer state on (the device, the host) of one rank of those that share these buffers, which one
    optimizer updates.

    Core's offloaded optimizer (HybridDeviceOptimizer) takes weights in the order of parameter groups, in each group
    fp32 ones first, until it has the wanted share of the elements.
    """
    pieces = [(buffer, weight, size) for buffer in buffers for weight, size in buffer.pieces()[shard]]
    pieces.sort(key=lambda piece: (piece[1].parameter_group, piece[0].weight_bytes != 4))
    wanted = sum(size for _, _, size in pieces) * cpu_offload_fraction
    on_device = offloaded = 0
    for buffer, _, size in pieces:
        if offloaded < wanted:
            offloaded += size
        else:
            # between the steps it keeps an fp32 copy of gradients in bf16
            copied = 4 if cpu_offload_fraction and buffer.gradient_bytes < 4 else 0
            on_device += size * (buffer.state_bytes + copied)
    return on_device, 16 * offloaded
