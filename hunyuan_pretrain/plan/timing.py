"""How long a training step takes on a GPU, by part: the passes of plan.passes, the pipeline's waiting, what the
data-parallel ranks send, the optimizer.

Not modelled: slower computation beside messages, variation between GPUs and steps, the host's part of an offloaded
optimizer. Saving and validation: `overheads`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hunyuan_pretrain.config.derived import grid, overlaps, routed_experiment, stages_of
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.plan import links
from hunyuan_pretrain.plan.buffers import Buffer, buffers_of_stage
from hunyuan_pretrain.plan.communication import communication_per_rank
from hunyuan_pretrain.plan.counts import flops_per_token, host_bytes, memory_of_ranks, parameters
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.passes import Assumptions, Job, Parts, Passes, add, passes_of_stages
from hunyuan_pretrain.plan.pipeline import Timeline, simulate
from hunyuan_pretrain.plan.traffic import optimizer_bytes

ROUNDING = 1e-9
"""Share by which sums in another order may differ; `least_seconds` stays below by this much."""


@dataclass(frozen=True)
class StepTime:
    """An optimizer step of a stage."""

    seconds: float
    parts: Parts
    """Of the pipeline rank that computes longest; they add up to `seconds`. "pipeline" is its waiting for others."""
    timeline: Timeline
    """Forward and backward passes of all pipeline ranks."""
    tokens_per_s: float
    mfu: float
    """Model FLOP/s over the peak in bf16, with FP8 too: `counts.flops_per_token`, attention counted."""
    tflops_per_gpu: float
    """6 * active parameters * tokens, without attention, in 10^12 FLOP/s of one GPU."""

    @property
    def mean_idle(self) -> float:
        """Share of the step in which a pipeline rank does not compute while the passes run; the mean over all ranks."""
        busy = self.timeline.busy
        return (self.timeline.seconds - sum(busy) / len(busy)) / self.seconds


def step_time(
    experiment: Experiment,
    stage: StageConfig,
    world_size: int,
    hardware: Hardware,
    assumptions: Assumptions | None = None,
) -> StepTime:
    """Time of one step with the batch of `stage` on `world_size` GPUs. Raises ConfigError if the hardware cannot
    compute in the experiment's formats, ValueError if layout or batch do not fit the number of ranks."""
    job = job_of(experiment, stage, world_size, hardware, assumptions)
    stages = passes_of_stages(job)
    forward, backward = seconds_of(stages)
    timeline = simulate(forward, backward, job.ranks.pp, job.micro_batches, _message_s(job))
    starts = [slots[0].start for slots in timeline.slots]
    around = [_around_passes(job, rank, starts[rank], forward, backward) for rank in range(job.ranks.pp)]
    gather = max(one.gather for one in around)
    reduced = max(end + one.reduce for end, one in zip(timeline.ends, around, strict=True))
    update = max(one.update for one in around)
    seconds = gather + reduced + update
    busiest = timeline.busy.index(max(timeline.busy))
    parts: Parts = {}
    for number in range(busiest, len(stages), job.ranks.pp):
        for way in stages[number].both:
            for part, each in way.items():
                add(parts, part, each * job.micro_batches)
    add(parts, "gathering weights", gather)
    add(parts, "reducing gradients", around[busiest].reduce)
    add(parts, "optimizer", update)
    add(parts, "pipeline", max(0.0, seconds - sum(parts.values())) if job.ranks.pp > 1 else 0.0)
    tokens_per_s = stage.global_batch_tokens / seconds
    return StepTime(
        seconds,
        parts,
        timeline,
        tokens_per_s,
        model_flops(job) * tokens_per_s / world_size / hardware.peak_bf16_flops_per_s,
        6 * parameters(experiment.model).active * tokens_per_s / world_size / 1e12,
    )


def job_of(
    experiment: Experiment,
    stage: StageConfig,
    world_size: int,
    hardware: Hardware,
    assumptions: Assumptions | None = None,
) -> Job:
    """Raises as `step_time`."""
    if experiment.precision.dtype != "bf16":
        rule = "the time of a step is planned in bf16 and FP8; hardware profiles give no speed of fp32 matmuls"
        raise ConfigError(experiment.name, [Problem("precision.dtype", experiment.precision.dtype, rule, "use bf16")])
    experiment = routed_experiment(experiment, stage)
    return Job(experiment, stage, grid(experiment.parallel, world_size), hardware, assumptions or Assumptions())


def seconds_of(stages: list[Passes]) -> tuple[list[float], list[float]]:
    """Of a forward and of a backward pass in each pipeline stage."""
    forward, backward = zip(*([sum(parts.values()) for parts in stage.both] for stage in stages), strict=True)
    return list(forward), list(backward)


def least_seconds(job: Job, limit: float = float("inf")) -> float:
    """What a step takes at least, without simulating the pipeline: a rank starts when its first micro-batch has passed
    the ranks before it, computes, and then the last gradient passes them on the way back. Under 1F1B with equal stages
    and instant messages the passes take just that. Above `limit` it may leave out what is around the passes."""
    forward, backward = seconds_of(passes_of_stages(job))
    ranks, message = job.ranks.pp, _message_s(job)
    starts = [sum(forward[:rank]) + rank * message for rank in range(ranks)]
    backs = [sum(backward[:rank]) + rank * message for rank in range(ranks)]
    ends = [
        starts[rank] + job.micro_batches * (sum(forward[rank::ranks]) + sum(backward[rank::ranks]))
        for rank in range(ranks)
    ]
    least = max(end + back for end, back in zip(ends, backs, strict=True))
    if least <= limit:
        around = [_around_passes(job, rank, starts[rank], forward, backward) for rank in range(ranks)]
        # each rank reduces after its last pass; the first one after the last gradient has come back to it
        least = max(least + around[0].reduce, *(end + one.reduce for end, one in zip(ends, around, strict=True)))
        least += max(one.gather for one in around) + max(one.update for one in around)
    return least * (1 - ROUNDING)


def model_flops(job: Job) -> float:
    """Per token, forward and backward, with attention within documents."""
    length = job.stage.sequence_length
    whole, rest = divmod(length, job.document_tokens)
    documents = [job.document_tokens] * whole + [rest] * bool(rest)
    return flops_per_token(job.experiment.model, length, documents).total


def _message_s(job: Job) -> float:
    """Of the hidden states of a micro-batch, between neighbouring stages."""
    group = links.group_of("pp", job.ranks)
    size = job.tokens // job.ranks.tp * job.experiment.model.hidden_size * job.width
    return size / links.bytes_per_s("send", group, job.hardware) + links.call_s(group, job.hardware)


@dataclass(frozen=True)
class _Around:
    """What a pipeline rank does before and after its passes, in seconds, where nothing hides it."""

    gather: float
    reduce: float
    update: float


def _around_passes(job: Job, pipeline_rank: int, start: float, forward: list[float], backward: list[float]) -> _Around:
    """`start`: of the rank's first pass.

    Weights are gathered beside the forward passes of the first micro-batch, from bucket to bucket, and gradients
    reduced beside the backward passes of the last; the first bucket of weights, and the last of gradients, are waited
    for."""
    experiment, ranks, hardware = job.experiment, job.ranks, job.hardware
    model, parallel, precision = experiment.model, experiment.parallel, experiment.precision
    parts, tuning = (model, parallel, precision), experiment.tuning
    sent = communication_per_rank(*parts, job.stage, ranks.world_size, pipeline_rank, tuning=tuning)
    over = {"gather": 0.0, "reduce": 0.0}
    for axis in ("dp", "expert_dp"):
        for way, kinds in (("gather", ("all_gather",)), ("reduce", ("reduce_scatter", "all_reduce"))):
            mine = replace(sent, messages={key: found for key, found in sent.messages.items() if key[1] in kinds})
            over[way] += links.seconds(mine, axis, ranks, hardware)
    chunks = list(stages_of(model, parallel, pipeline_rank))
    buffers = [buffers_of_stage(*parts, ranks.world_size, chunk, tuning) for chunk in chunks]
    share = _share_of_last_buckets(buffers)
    overlap = overlaps(parallel, ranks.most_copies, experiment.runtime.cuda_graphs)
    if overlap.param_gather:
        beside = start + sum(forward[chunk] for chunk in chunks)
        over["gather"] = max(0.0, over["gather"] * share - start, over["gather"] - beside)
    if overlap.grad_reduce:
        over["reduce"] = max(over["reduce"] * share, over["reduce"] - sum(backward[chunk] for chunk in chunks))
    tied = links.seconds(sent, "embedding", ranks, hardware)
    update = _update_s(job, pipeline_rank, [buffer for chunk in buffers for buffer in chunk])
    return _Around(over["gather"], over["reduce"] + tied, update)


def _share_of_last_buckets(buffers: list[list[Buffer]]) -> float:
    """Elements in the last bucket of each buffer of the first chunk, over those in all buffers of all chunks. It holds
    the first weights: forward passes need them first, and backward passes complete them last."""
    last = sum(end - start for buffer in buffers[0] for start, end in buffer.buckets[-1:])
    return last / max(sum(buffer.size for chunk in buffers for buffer in chunk), 1)


def _update_s(job: Job, pipeline_rank: int, buffers: list[Buffer]) -> float:
    """Zeros, norm, clipping and AdamW; with the offloaded optimizer also the copies of gradients and new weights, but
    not the host's own time; in FP8 the quantised copies of the weights, once for all micro-batches."""
    experiment, hardware = job.experiment, job.hardware
    offloaded = 0
    if experiment.optimizer.cpu_offload_fraction:
        parts = experiment.model, experiment.parallel, experiment.precision, job.ranks.world_size, pipeline_rank
        of_ranks = memory_of_ranks(*parts, experiment.optimizer, experiment.tuning)
        offloaded = max(memory.host for memory in of_ranks) // host_bytes(experiment.optimizer)
    kept = sum(max(buffer.kept()) for buffer in buffers) - offloaded
    size = sum(buffer.size for buffer in buffers)
    seconds = optimizer_bytes(experiment.optimizer, job.gradient_bytes, size, kept) / hardware.copy_bytes_per_s
    seconds += offloaded * (4 + job.width) / hardware.host_copy_bytes_per_s
    if experiment.precision.fp8_recipe is not None:
        weights = sum(
            weight.size
            for buffer in buffers
            for weight in buffer.weights
            if weight.fp8_layer is not None
            and experiment.precision.is_fp8_layer(weight.fp8_layer, experiment.model.num_layers)
        )
        seconds += weights * (job.width + 2) / hardware.elementwise_bytes_per_s
    return seconds
