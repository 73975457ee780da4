"""Communication of one rank in one training step, in closed form: messages by axis and kind.

Messages are counted as parallel.traffic counts them in a real step; a test checks that the two agree. The bytes of a
call are those that this rank must send with the cheapest algorithm (ring, pairwise exchange) in a group of n ranks,
rounded up to whole bytes. all_gather and reduce_scatter: (n - 1) / n of the whole tensor; all_reduce: 2 (n - 1) / n of
it; all_to_all: what goes to other ranks; send: the tensor; recv: the tensor, which is excluded from all sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hunyuan_pretrain.config.derived import (
    LOSS_CHUNK_TOKENS,
    Grid,
    expert_capacity,
    grid,
    pipeline_stages,
    routed_model,
    stages_of,
)
from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, StageConfig, TuningConfig
from hunyuan_pretrain.plan.buffers import buffers_of_stage, weights_of_stage

AXES = ("tp", "cp", "ep", "expert_tp", "pp", "dp", "expert_dp", "embedding", "other")
"""The ranks that communicate. tp, cp, ep, expert_tp: ranks that share a matrix, a sequence, the experts, an expert. pp:
neighbours in the pipeline. dp, expert_dp, embedding: ranks that hold the same weights, the same experts, the tied
embedding. other: any other ranks, such as all of them. Gradients are reduced over dp including the ranks of cp."""

STATISTICS_BESIDE_LOAD = 7
"""Number of router statistics per layer in addition to the load of each expert: model.routing.RouterStatistics."""
SUMS_OVER_PAIRS = 7
"""Fields of model.preference.PairSums."""


class Messages(NamedTuple):
    """Calls of one kind on one axis."""

    calls: int
    bytes: int


@dataclass(frozen=True)
class Communication:
    """Messages of one rank in one training step."""

    messages: dict[tuple[str, str], Messages]
    """(axis, kind) -> messages."""
    is_exact: bool
    """False if there is expert parallelism but no capacity. What a rank sends then depends on the routing, and the
    bytes assume even routing. At most it sends all of its tokens: n / (n - 1) of the bytes of ep."""

    def sent_bytes(self, axis: str | None = None) -> int:
        """Bytes that the rank sends, on all axes or on one."""
        return sum(
            messages.bytes
            for (over, kind), messages in self.messages.items()
            if kind != "recv" and axis in (None, over)
        )


class _Ledger:
    """Adds up messages; a group of one rank sends none."""

    def __init__(self) -> None:
        self.messages: dict[tuple[str, str], Messages] = {}

    def add(self, axis: str, kind: str, size_bytes: int, num_ranks: int, calls: int = 1) -> None:
        """Add `calls` calls in a group of `num_ranks`, each on a tensor of `size_bytes` (the whole tensor if it is
        sharded)."""
        if num_ranks == 1 or calls == 0:
            return
        if kind not in ("send", "recv"):
            size_bytes = -(-size_bytes * (num_ranks - 1) * (2 if kind == "all_reduce" else 1) // num_ranks)
        before = self.messages.get((axis, kind), Messages(0, 0))
        self.messages[axis, kind] = Messages(before.calls + calls, before.bytes + calls * size_bytes)

    def transposed(self, axis: str, kind: str, size_bytes: int, num_ranks: int, forwards: int, backwards: int) -> None:
        """Add calls of the forward pass and, for the backward pass, their transpose."""
        backward = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather", "all_to_all": "all_to_all"}[kind]
        self.add(axis, kind, size_bytes, num_ranks, forwards)
        self.add(axis, backward, size_bytes, num_ranks, backwards)


@dataclass(frozen=True)
class _Batch:
    """What a rank computes in one step."""

    micro_batches: int
    tokens: int
    """Per micro-batch and context-parallel rank."""
    local_tokens: int
    """Per micro-batch and tensor-parallel rank, between layers."""
    value_bytes: int
    """Bytes per activation value."""
    answers: int
    """Of a micro-batch of pairs, at least; 0 for another task. Their log-probabilities are computed before the loss."""


def communication_per_rank(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    stage: StageConfig,
    world_size: int,
    pipeline_rank: int = 0,
    loss_chunk_tokens: int = LOSS_CHUNK_TOKENS["cuda"],
    tuning: TuningConfig | None = None,
) -> Communication:
    """Messages of one training step (train.step.train_step, with the optimizer) of any rank of a pipeline rank.

    Counts forward, backward and recomputation, gradient reduction, update and statistics, without the few numbers that
    a logged step adds to the statistics (train/logged_numbers.py). All ranks of a pipeline rank send the same, except
    with dropless routing (Communication.is_exact). `stage` sets the batch; `loss_chunk_tokens`: LOSS_CHUNK_TOKENS of
    the device. tuning: which weights are trained; what adapters exchange in forward and backward passes, a few numbers
    per token or row, is not counted (Communication.is_exact). With task=dpo, a sequence counts as one pair. Raises
    ValueError if the layout or the batch does not fit the number of ranks.
    """
    ranks, ledger, model = grid(parallel, world_size), _Ledger(), routed_model(model, stage)
    batch = _batch(precision, stage, ranks)
    chunks = stages_of(model, parallel, pipeline_rank)
    for number, layers in chunks.items():
        _passes(ledger, model, parallel, ranks, batch, number, layers, loss_chunk_tokens)
    _gradients(ledger, model, parallel, precision, ranks, list(chunks), tuning)
    _optimizer(ledger, model, parallel, precision, ranks, list(chunks), tuning)
    ledger.add("dp", "all_reduce", 8, ranks.dp)  # number of target tokens
    if batch.answers:
        ledger.add("dp", "all_reduce", 16, ranks.dp)  # numbers of pairs and of target tokens of chosen answers
    statistics = model.num_layers * (model.num_moe_experts + STATISTICS_BESIDE_LOAD)
    pairs = SUMS_OVER_PAIRS if batch.answers else 0
    # loss, ranks told to stop, saves, statistics
    ledger.add("other", "all_reduce", 8 * (3 + pairs + statistics), world_size)
    is_exact = model.moe_expert_capacity_factor is not None or ranks.ep == 1
    return Communication(ledger.messages, is_exact=is_exact and (tuning is None or tuning.lora is None))


def communication_of_passes(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    stage: StageConfig,
    world_size: int,
    number: int,
) -> Communication:
    """Of `communication_per_rank`, the messages of the forward and backward passes of pipeline stage `number`."""
    ranks, ledger, model = grid(parallel, world_size), _Ledger(), routed_model(model, stage)
    layers = pipeline_stages(model, parallel)[number]
    batch = _batch(precision, stage, ranks)
    _passes(ledger, model, parallel, ranks, batch, number, layers, LOSS_CHUNK_TOKENS["cuda"])
    return Communication(ledger.messages, is_exact=model.moe_expert_capacity_factor is not None or ranks.ep == 1)


def _batch(precision: PrecisionConfig, stage: StageConfig, ranks: Grid) -> _Batch:
    """Raises ValueError if the batch does not fit the number of ranks."""
    sequences = stage.micro_batch_sequences * ranks.dp
    tokens = stage.sequence_length * stage.micro_batch_sequences
    if stage.global_batch_sequences % sequences:
        raise ValueError(
            f"global_batch_sequences={stage.global_batch_sequences} is not a multiple of {sequences} = micro-batch * DP"
        )
    if tokens % (ranks.cp * ranks.tp):
        raise ValueError(f"a micro-batch of {tokens} tokens is not a multiple of CP*TP={ranks.cp}*{ranks.tp}")
    return _Batch(
        micro_batches=stage.global_batch_sequences // sequences,
        tokens=tokens // ranks.cp,
        local_tokens=tokens // ranks.cp // ranks.tp,
        value_bytes=2 if precision.dtype == "bf16" else 4,
        answers=2 * stage.micro_batch_sequences if stage.task == "dpo" else 0,
    )


def _passes(
    ledger: _Ledger,
    model: ModelConfig,
    parallel: ParallelConfig,
    ranks: Grid,
    batch: _Batch,
    number: int,
    layers: range,
    loss_chunk_tokens: int,
) -> None:
    _ends(ledger, model, parallel, ranks, batch, number, loss_chunk_tokens)
    for layer in layers:
        _attention(ledger, model, parallel, ranks, batch, is_owner=layer % model.cla_share_factor == 0)
        _mixture_of_experts(ledger, model, parallel, ranks, batch)


def _forwards(parallel: ParallelConfig, batch: _Batch, is_in_experts: bool = False) -> int:
    """Forward passes of a layer per step, including recomputation. The inside of the experts is also recomputed with
    recompute=selective."""
    is_again = parallel.recompute == "cla_group" or (is_in_experts and "selective" in parallel.recomputed_parts)
    return batch.micro_batches * (2 if is_again else 1)


def _ends(
    ledger: _Ledger,
    model: ModelConfig,
    parallel: ParallelConfig,
    ranks: Grid,
    batch: _Batch,
    number: int,
    loss_chunk_tokens: int,
) -> None:
    """Embedding and output layer, sharded along the vocabulary, and the messages to and from neighbouring stages."""
    last, times, width = (
        len(pipeline_stages(model, parallel)) - 1,
        batch.micro_batches,
        model.hidden_size * batch.value_bytes,
    )
    for is_there in (number > 0, number < last):
        ledger.add("pp", "send", batch.local_tokens * width, ranks.pp, times * is_there)
        ledger.add("pp", "recv", batch.local_tokens * width, ranks.pp, times * is_there)
    if number == 0:
        ledger.transposed("tp", "reduce_scatter", batch.tokens * width, ranks.tp, times, times)
    if number == last:
        chunk = max(loss_chunk_tokens // ranks.tp, 1)
        for start in range(0, batch.local_tokens, chunk):
            tokens, forwards = min(chunk, batch.local_tokens - start) * ranks.tp, times * (2 if batch.answers else 1)
            ledger.transposed("tp", "all_gather", tokens * width, ranks.tp, forwards, times)
            ledger.add("tp", "all_reduce", tokens * 4, ranks.tp, forwards)  # largest logit
            ledger.add("tp", "all_reduce", tokens * 8, ranks.tp, forwards)  # label logit and sum of exponentials
        if batch.answers:
            ledger.add("cp", "all_reduce", 8 * batch.answers, ranks.cp, times)


def _sharded_pair(ledger: _Ledger, size_bytes: int, ranks: Grid, forwards: int, backwards: int) -> None:
    """A column-parallel matrix and the row-parallel one after it: the input is all-gathered, the output is
    reduce-scattered.

    In the backward pass, the first one gathers its input again for its weight gradient.
    """
    ledger.transposed("tp", "all_gather", size_bytes, ranks.tp, forwards, backwards)
    ledger.add("tp", "all_gather", size_bytes, ranks.tp, backwards)
    ledger.transposed("tp", "reduce_scatter", size_bytes, ranks.tp, forwards, backwards)


def _attention(
    ledger: _Ledger, model: ModelConfig, parallel: ParallelConfig, ranks: Grid, batch: _Batch, is_owner: bool
) -> None:
    """Keys and values are communicated once per CLA group, by the layer that owns them."""
    forwards, backwards = _forwards(parallel, batch), batch.micro_batches
    _sharded_pair(ledger, batch.tokens * model.hidden_size * batch.value_bytes, ranks, forwards, backwards)
    head_bytes = batch.tokens * model.head_dim * batch.value_bytes
    key_value = 2 * model.num_query_groups // ranks.tp * head_bytes
    if parallel.context_parallel_method == "all_gather":
        if is_owner:
            ledger.transposed("cp", "all_gather", ranks.cp * key_value, ranks.cp, forwards, backwards)
        return
    query = model.num_attention_heads // ranks.tp * head_bytes
    for size in (query, query, *([key_value] if is_owner else [])):  # queries out, outputs back
        ledger.transposed("cp", "all_to_all", size, ranks.cp, forwards, backwards)


def _mixture_of_experts(
    ledger: _Ledger, model: ModelConfig, parallel: ParallelConfig, ranks: Grid, batch: _Batch
) -> None:
    """With a capacity, every rank sends every slot of every expert, filled or not. Without one, it first sends the
    counts, then the rows that the routing asks for."""
    times, row_bytes = batch.micro_batches, model.hidden_size * batch.value_bytes
    _sharded_pair(ledger, batch.tokens * row_bytes, ranks, _forwards(parallel, batch, is_in_experts=True), times)
    forwards = _forwards(parallel, batch)
    if model.moe_expert_capacity_factor is None:
        rows = batch.local_tokens * model.moe_router_topk
        experts = model.num_moe_experts // ranks.ep
        ledger.add("ep", "all_to_all", 8 * model.num_moe_experts, ranks.ep, forwards)
        ledger.add("expert_tp", "all_gather", ranks.expert_tp * 8 * experts, ranks.expert_tp, forwards)
    else:
        rows = model.num_moe_experts * batch.local_tokens // model.moe_routing_group_tokens * expert_capacity(model)
    for _ in ("to the experts", "and back"):
        ledger.transposed("ep", "all_to_all", rows * row_bytes, ranks.ep, forwards, times)
    whole = ranks.expert_tp * rows * row_bytes
    ledger.transposed("expert_tp", "all_gather", whole, ranks.expert_tp, forwards, times)
    ledger.transposed("expert_tp", "reduce_scatter", whole, ranks.expert_tp, forwards, times)


def _gradients(
    ledger: _Ledger,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    ranks: Grid,
    chunks: list[int],
    tuning: TuningConfig | None,
) -> None:
    """Reduction of every bucket, with its padding, over the ranks that hold the same weights. Then the sums of
    replicated weights over the tensor-parallel ranks, and of the tied embedding over its two stages."""
    gradient_bytes = 4 if precision.grad_reduce_in_fp32 or precision.dtype == "fp32" else 2
    for chunk in chunks:
        for buffer in buffers_of_stage(model, parallel, precision, ranks.world_size, chunk, tuning):
            for start, end in buffer.buckets:
                kind = "reduce_scatter" if buffer.is_sharded else "all_reduce"
                ledger.add(buffer.axis, kind, (end - start) * buffer.gradient_bytes, buffer.num_ranks)
    weights = [weight for chunk in chunks for weight in weights_of_stage(model, parallel, chunk, tuning)]
    weights = [weight for weight in weights if weight.is_trained]
    # one fp32 tensor in every precision, because the gradients of the routers are fp32
    ledger.add("tp", "all_reduce", 4 * sum(weight.size for weight in weights if weight.is_replicated), ranks.tp)
    for weight in weights:
        if weight.is_shared_embedding:
            ledger.add("embedding", "all_reduce", gradient_bytes * weight.size, 2)


def _optimizer(
    ledger: _Ledger,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    ranks: Grid,
    chunks: list[int],
    tuning: TuningConfig | None,
) -> None:
    """Gradient norm in fp64; all-gather of updated weights over the ranks that hold them."""
    if not parallel.use_distributed_optimizer:
        ledger.add("other", "all_reduce", 8, ranks.tp * ranks.pp)
        if ranks.has_expert_buffers:
            ledger.add("other", "all_reduce", 8, ranks.expert_tp * ranks.ep * ranks.pp)
        return
    ledger.add("other", "all_reduce", 8, ranks.world_size)
    for chunk in chunks:
        for buffer in buffers_of_stage(model, parallel, precision, ranks.world_size, chunk, tuning):
            for start, end in buffer.buckets:
                ledger.add(buffer.axis, "all_gather", (end - start) * buffer.weight_bytes, buffer.num_ranks)
