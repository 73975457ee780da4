"""The memory that each pipeline rank needs at its peak, by part, and what its host needs.

Between steps a rank keeps weights, gradients and optimizer state. The peak comes when the most micro-batches wait for
their backward pass and one more part is at work: a layer's backward pass, or the loss of a chunk of tokens; or during
the update, if that copies gradients. Outside of torch's allocator there are the CUDA context and NCCL's buffers.

A recorded step (runtime.cuda_graphs) keeps the memory of its passes between steps; the update and a validation then
need their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_pretrain.config.derived import (
    LOSS_CHUNK_TOKENS,
    TASKS_BATCH_TOKENS,
    Grid,
    grid,
    pipeline_stages,
    routed_experiment,
    stages_of,
)
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.plan.activations import activations, kept_by_layer
from hunyuan_pretrain.plan.buffers import buffers_of_stage
from hunyuan_pretrain.plan.counts import RankMemory, memory_of_ranks
from hunyuan_pretrain.plan.fp8 import weight_copies
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.matmuls import rows_of_expert
from hunyuan_pretrain.plan.saving import bytes_copied

CUDA_CONTEXT = 600 * 2**20
"""Bytes. Ours: what nvidia-smi shows for a process with loaded kernels and no tensors, 500 to 600 MiB on Hopper."""
COMMUNICATOR = 688 * 10**6
"""Bytes of NCCL's buffers for a group, after an all-reduce: github.com/NVIDIA/nccl issue 964, groups of 4."""
EXCHANGE_PER_PEER = 3_280_000_000 // 7
"""More bytes for each rank that an all-to-all reaches over NVLink: github.com/NVIDIA/nccl issue 1685, 8 H100: 1.06 GB
before the first one, 4.34 after it."""
EXCHANGE_PEERS = 7
"""Most ranks for which that is counted. Ours: over the network NCCL shares buffers between peers; larger NVLink domains
were not measured."""
ALLOCATOR_SLACK = 0.04
"""Memory that torch's allocator holds beyond the tensors, over what comes and goes in a step. Ours, not measured; with
expandable segments, which this project sets, less is lost to fragments."""
TO_SPARE = 0.05
"""Share of a GPU's memory that a chosen layout leaves free: about what the peaks in docs/benchmarks.md lack at most."""
HOST_PROCESS = 5 * 10**9
"""Bytes of host memory of a rank besides what it offloads: libraries, pinned batches, the file cache of the data. Ours,
not measured."""


@dataclass(frozen=True)
class Peak:
    """Bytes on the rank of a pipeline rank that needs the most, at its peak."""

    weights: int
    gradients: int
    optimizer: int
    fp8_weights: int
    """Quantised copies, kept through a step."""
    activations: int
    """Kept by all micro-batches in flight."""
    working: int
    """In addition at one time: a recomputed part, and gradients of activations or the logits of a chunk."""
    messages: int
    """Buffers that messages are received in."""
    update: int
    """Copies during the optimizer's update, when there are no activations."""
    outside: int
    """Not torch's: CUDA context and NCCL."""
    pinned: int
    """Host memory: offloaded activations and optimizer state."""
    saved: int = 0
    """Host memory: the copy of the state that a save writes. It stays allocated with checkpoint.async_save."""
    validation: int | None = None
    """In a validation beside a recorded step; None: steps are not recorded."""

    @property
    def kept(self) -> int:
        """Between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def passes(self) -> int:
        """What forward and backward passes take, at its most."""
        return self.fp8_weights + self.activations + self.working + self.messages

    @property
    def transient(self) -> int:
        """What comes and goes in a step, at its most."""
        return max(self.passes, self.update)

    @property
    def beside_recorded(self) -> int:
        """What finds no room in the memory of a recorded step: the update's copies, or a validation if that is more. 0
        if steps are not recorded."""
        return 0 if self.validation is None else max(self.update, self.validation)

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated would show."""
        return self.kept + self.transient

    @property
    def slack(self) -> int:
        """Held by torch's allocator, used by nothing."""
        return round(ALLOCATOR_SLACK * self.transient)

    @property
    def total(self) -> int:
        """Device memory."""
        if self.validation is not None:
            return self.kept + self.passes + self.beside_recorded + self.slack + self.outside
        return self.allocated + self.slack + self.outside

    @property
    def host(self) -> int:
        """Host memory of the rank."""
        return self.pinned + self.saved + HOST_PROCESS


def peaks(experiment: Experiment, stage: StageConfig, world_size: int, imbalance: float = 1.0) -> list[Peak]:
    """The peak of each pipeline rank with the batch of `stage`. `imbalance`: rows of the fullest rank's experts over
    even routing, where there is no capacity. Raises ValueError if the layout does not fit the number of ranks."""
    ranks, experiment = grid(experiment.parallel, world_size), routed_experiment(experiment, stage)
    return [
        peak_of_rank(experiment, stage, world_size, rank, kept_of_rank(experiment, world_size, rank), imbalance)
        for rank in range(ranks.pp)
    ]


@dataclass(frozen=True)
class Kept:
    """Bytes of a pipeline rank that depend neither on the batch nor on what is recomputed."""

    state: RankMemory
    """Of its rank that keeps the most."""
    fp8_weights: int
    update: int
    saved: int


def kept_of_rank(experiment: Experiment, world_size: int, pipeline_rank: int) -> Kept:
    """What `peak_of_rank` needs of a layout."""
    model, parallel, precision = experiment.model, experiment.parallel, experiment.precision
    parts = model, parallel, precision, world_size, pipeline_rank, experiment.optimizer
    states = memory_of_ranks(*parts, experiment.tuning)
    return Kept(
        max(states, key=lambda memory: memory.total),
        weight_copies(experiment, world_size, pipeline_rank),
        _update(experiment, world_size, pipeline_rank),
        bytes_copied(experiment, world_size, pipeline_rank),
    )


def peak_of_rank(
    experiment: Experiment, stage: StageConfig, world_size: int, pipeline_rank: int, kept: Kept, imbalance: float
) -> Peak:
    """The peak of one pipeline rank."""
    ranks = grid(experiment.parallel, world_size)
    active = activations(experiment, stage, world_size, pipeline_rank, imbalance)
    return Peak(
        weights=kept.state.weights,
        gradients=kept.state.gradients,
        optimizer=kept.state.optimizer,
        fp8_weights=kept.fp8_weights,
        activations=active.device,
        working=active.working + _at_work(experiment, stage, ranks, pipeline_rank, imbalance),
        messages=_messages(experiment, stage, ranks, imbalance),
        update=kept.update,
        outside=outside(ranks),
        pinned=active.pinned + kept.state.host,
        saved=kept.saved,
        validation=_validation(experiment, stage, ranks),
    )


def missing(peak: Peak, hardware: Hardware) -> int:
    """Bytes of device memory that a peak lacks on this hardware; negative: bytes to spare."""
    return round(peak.total - hardware.memory_bytes)


def host_missing(found: list[Peak], hardware: Hardware) -> int:
    """The same for the host of the GPUs whose ranks pin the most."""
    return round(hardware.node_gpus * max(peak.host for peak in found) - hardware.host_memory_bytes)


def _at_work(experiment: Experiment, stage: StageConfig, ranks: Grid, pipeline_rank: int, imbalance: float) -> int:
    """The larger of: gradients within an expert's backward pass, those of SwiGLU's output and both of its inputs, with
    their FP8 copies for two matmuls each, beside the gradients of the residual, of what the router, the shared and the
    routed expert read; on the last stage, logits of a chunk and, if gathered, its hidden states and their gradient."""
    model, width = experiment.model, 2 if experiment.precision.dtype == "bf16" else 4
    tokens = stage.sequence_length * stage.micro_batch_sequences // ranks.cp
    experts = model.num_moe_experts // ranks.ep
    routed = experts * rows_of_expert(experiment, stage, ranks, imbalance)
    inner = max(tokens * model.ffn_hidden_size // ranks.tp, routed * model.expert_ffn_size // ranks.expert_tp)
    backward = 3 * inner * width + (4 * inner if experiment.precision.recipe else 0)
    backward += 4 * tokens // ranks.tp * model.hidden_size * width
    last = len(pipeline_stages(model, experiment.parallel)) - 1
    if last not in stages_of(model, experiment.parallel, pipeline_rank):
        return backward
    return max(backward, _loss(experiment, tokens, ranks))


def _loss(experiment: Experiment, tokens: int, ranks: Grid) -> int:
    """Logits of a chunk and, if gathered, its hidden states and their gradient."""
    model, width = experiment.model, 2 if experiment.precision.dtype == "bf16" else 4
    chunk = min(LOSS_CHUNK_TOKENS["cuda"], tokens)
    # torch's operations also hold the chunk in fp32
    logit_bytes = width + (4 if experiment.runtime.kernels == "never" and width == 2 else 0)
    loss = chunk * model.padded_vocab_size // ranks.tp * logit_bytes
    return loss + (2 * chunk * model.hidden_size * width if ranks.tp > 1 else 0)


def _validation(experiment: Experiment, stage: StageConfig, ranks: Grid) -> int | None:
    """At most, beside a recorded step: what a layer makes of a micro-batch, without a capacity and with even routing,
    and its messages; or the logits of a chunk. For sequences of the stage's length. None: steps are not recorded."""
    if not experiment.runtime.cuda_graphs:
        return None
    settings, sequences = experiment.evaluation, 0
    if settings.paths:
        sequences = settings.micro_batch_sequences
    if settings.tasks:
        sequences = max(sequences, -(-TASKS_BATCH_TOKENS // stage.sequence_length))
    if not sequences:
        return 0
    dropless = experiment.model.model_copy(update={"moe_expert_capacity_factor": None, "recycle_routing": False})
    plain = experiment.precision.model_copy(update={"fp8_recipe": None})
    experiment = experiment.model_copy(update={"model": dropless, "precision": plain})
    stage = stage.model_copy(update={"micro_batch_sequences": sequences})
    blocks = kept_by_layer(experiment, stage, ranks.world_size, layer=0)
    layer = sum(block.bytes for block in blocks if block.is_kept(frozenset()))
    tokens = stage.sequence_length * stage.micro_batch_sequences // ranks.cp
    return max(layer + _messages(experiment, stage, ranks, 1.0), _loss(experiment, tokens, ranks))


def _messages(experiment: Experiment, stage: StageConfig, ranks: Grid, imbalance: float) -> int:
    """Tensor parallelism: a layer's gathered input, and the one that the backward pass gathers again. Experts of other
    ranks: the rows that came, and the same in the order of the experts. Pipeline: one input and one gradient."""
    model, width = experiment.model, 2 if experiment.precision.dtype == "bf16" else 4
    tokens = stage.sequence_length * stage.micro_batch_sequences // ranks.cp
    rows = 0
    if ranks.tp > 1:
        rows += 2 * tokens
    if ranks.ep * ranks.expert_tp > 1:
        rows += 2 * (model.num_moe_experts // ranks.ep) * rows_of_expert(experiment, stage, ranks, imbalance)
    if ranks.pp > 1:
        rows += 2 * tokens // ranks.tp
    return rows * model.hidden_size * width


def _update(experiment: Experiment, world_size: int, pipeline_rank: int) -> int:
    """Without the precision-aware optimizer, bf16 gradients are copied to fp32."""
    precision = experiment.precision
    if precision.grad_reduce_in_fp32 or precision.dtype == "fp32":
        return 0
    if experiment.optimizer.use_precision_aware_optimizer or experiment.optimizer.cpu_offload_fraction:
        return 0  # an offloaded optimizer keeps the copies between steps: they count as its state
    chunks = stages_of(experiment.model, experiment.parallel, pipeline_rank)
    parts = experiment.model, experiment.parallel, precision
    buffers = [buffer for chunk in chunks for buffer in buffers_of_stage(*parts, world_size, chunk, experiment.tuning)]
    return 4 * sum(max(buffer.kept()) for buffer in buffers if buffer.gradient_bytes < 4)


def outside(ranks: Grid) -> int:
    """CUDA context, and NCCL's buffers of the groups of several ranks; all-to-alls of experts reach every rank of
    theirs."""
    sizes = [ranks.tp, ranks.cp, ranks.pp, ranks.ep, ranks.expert_tp, ranks.dp_cp, ranks.expert_dp, ranks.world_size]
    nccl = COMMUNICATOR * sum(size > 1 for size in sizes) + EXCHANGE_PER_PEER * min(ranks.ep - 1, EXCHANGE_PEERS)
    return CUDA_CONTEXT + nccl
