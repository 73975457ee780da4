"""How long a training step takes on a GPU, by part: matmuls by shape, attention, the kernels between them, messages,
the pipeline's waiting, the optimizer.

A part's time is its work over the speed that Hardware gives. What runs beside computation counts only where it takes
longer. Not modelled: slower computation beside messages, variation between GPUs and steps, the host's part of an
offloaded optimizer, saving and validation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hunyuan_pretrain.config.derived import Grid, grid, overlaps, pipeline_stages, stages_of
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.plan import links
from hunyuan_pretrain.plan.activations import offloaded_bytes
from hunyuan_pretrain.plan.buffers import Buffer, buffers_of_stage
from hunyuan_pretrain.plan.communication import communication_of_passes, communication_per_rank
from hunyuan_pretrain.plan.counts import HOST_BYTES_PER_ELEMENT, flops_per_token, memory_of_ranks, parameters
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.matmuls import (
    Matmul,
    attention_s,
    matmuls_of_layer,
    matmuls_of_output_layer,
)
from hunyuan_pretrain.plan.pipeline import Timeline, simulate
from hunyuan_pretrain.plan.traffic import Traffic, loss_bytes, optimizer_bytes, traffic

Parts = dict[str, float]
"""Part -> seconds."""


@dataclass(frozen=True)
class Assumptions:
    """What an experiment does not say."""

    document_tokens: int | None = None
    """Mean length of the documents in a packed sequence; None: one document fills it, the most attention there is."""
    imbalance: float = 1.0
    """Rows of the rank whose experts get the most over the mean, where there is no capacity."""
    traffic: Traffic | None = None
    """Of the functions between the matmuls; None: of this project's."""


@dataclass(frozen=True)
class Job:
    """What the time of a step depends on."""

    experiment: Experiment
    stage: StageConfig
    ranks: Grid
    hardware: Hardware
    assumptions: Assumptions

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on a rank in attention and in sharded matmuls."""
        return self.stage.sequence_length * self.stage.micro_batch_sequences // self.ranks.cp

    @property
    def document_tokens(self) -> int:
        """Mean length of a document, at most a sequence."""
        length = self.stage.sequence_length
        return min(self.assumptions.document_tokens or length, length)

    @property
    def micro_batches(self) -> int:
        """Of each rank in a step."""
        return self.stage.global_batch_sequences // (self.stage.micro_batch_sequences * self.ranks.dp)

    @property
    def width(self) -> int:
        """Bytes of a value."""
        return 2 if self.experiment.precision.dtype == "bf16" else 4

    @property
    def gradient_bytes(self) -> int:
        """Of an element of main_grad."""
        return 4 if self.experiment.precision.grad_reduce_in_fp32 else self.width

    @property
    def traffic(self) -> Traffic:
        return self.assumptions.traffic or traffic(self.experiment, self.assumptions.imbalance)


# --- one micro-batch in one pipeline stage ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """One micro-batch in a pipeline stage."""

    forward: Parts
    backward: Parts


def passes(job: Job, number: int) -> Passes:
    """Time of one micro-batch in pipeline stage `number`, by part, forward and backward."""
    model, parallel = job.experiment.model, job.experiment.parallel
    stages = pipeline_stages(model, parallel)
    found, launches = Passes({}, {}), [0.0, 0.0]
    for layer in stages[number]:
        _layer(job, layer, found, launches)
    if number == 0:
        for parts, moved in zip((found.forward, found.backward), job.traffic.embedding_bytes, strict=True):
            _add(parts, "elementwise", moved * job.tokens / job.ranks.tp / job.hardware.elementwise_bytes_per_s)
    if number == len(stages) - 1:
        _loss(job, found, launches)
    _messages(job, number, found)
    for parts, count in zip((found.forward, found.backward), launches, strict=True):
        _add(parts, "gaps between kernels", count * job.hardware.kernel_gap_s)
        # the device waits for the host where that launches more slowly than the kernels run
        _add(parts, "waiting for the host", max(0.0, count * job.hardware.host_launch_s - sum(parts.values())))
    _offload(job, number, found)
    return found


def _add(parts: Parts, part: str, seconds: float) -> None:
    if seconds:
        parts[part] = parts.get(part, 0.0) + seconds


def _layer(job: Job, layer: int, found: Passes, launches: list[float]) -> None:
    hardware, recomputed = job.hardware, job.experiment.parallel.recomputed_parts
    is_all_again, is_experts_again = "cla_group" in recomputed, "selective" in recomputed
    for matmul in matmuls_of_layer(job.experiment, job.stage, job.ranks, layer, job.assumptions.imbalance):
        seconds = matmul.seconds(hardware)
        _add(found.forward, matmul.part, seconds)
        is_again = is_all_again or (is_experts_again and matmul.part == "experts")
        _add(found.backward, matmul.part, seconds * is_again + _backward_s(job, matmul))
        _quantise(job, matmul, found, is_again)
        # in FP8 a kernel quantises each input, and each gradient of an output
        quantised = matmul.number_format != "bf16"
        launches[0] += matmul.groups * (1 + quantised)
        launches[1] += matmul.groups * (2 + quantised + is_again * (1 + quantised))
    forward, backward = attention_s(job.experiment.model, job.tokens, job.document_tokens, job.ranks, hardware)
    _add(found.forward, "attention", forward)
    _add(found.backward, "attention", backward + forward * is_all_again)
    moved, seconds_per_byte = job.traffic, job.tokens / job.ranks.tp / hardware.elementwise_bytes_per_s
    again = moved.layer_bytes[0] if is_all_again else 0.0
    if not is_all_again:
        again += moved.swiglu_bytes * bool(recomputed & {"swiglu", "selective"})
        again += moved.norm_bytes * ("norms" in recomputed)
    _add(found.forward, "elementwise", moved.layer_bytes[0] * seconds_per_byte)
    _add(found.backward, "elementwise", (moved.layer_bytes[1] + again) * seconds_per_byte)
    launches[0] += moved.layer_launches[0] + 1
    launches[1] += moved.layer_launches[1] + 3 + (moved.layer_launches[0] + 1) * is_all_again


def _backward_s(job: Job, matmul: Matmul) -> float:
    """Both gradients. The one of the weight is added to main_grad when a tile is done: read and written."""
    accumulated = 2 * job.gradient_bytes * matmul.weights / job.hardware.copy_bytes_per_s
    both = matmul.input_gradient.seconds(job.hardware) + matmul.weight_gradient.seconds(job.hardware)
    return both + accumulated


def _quantise(job: Job, matmul: Matmul, found: Passes, is_again: bool) -> None:
    """In FP8: each value of an input, and of an output's gradient, is read and written twice, for the two matmuls in
    which it is a factor."""
    if matmul.number_format == "bf16":
        return
    per_value = (job.width + 2) / job.hardware.elementwise_bytes_per_s
    rows = matmul.groups * matmul.rows
    _add(found.forward, "quantising", rows * matmul.inputs * per_value)
    _add(found.backward, "quantising", rows * (matmul.outputs + matmul.inputs * is_again) * per_value)


def _loss(job: Job, found: Passes, launches: list[float]) -> None:
    """The forward pass of the output layer computes its gradients too."""
    model, hardware = job.experiment.model, job.hardware
    for logits, times in matmuls_of_output_layer(model, job.tokens, job.ranks, job.width):
        for matmul in (logits, logits.input_gradient, logits.weight_gradient):
            _add(found.forward, "output layer", times * matmul.seconds(hardware))
        launches[0] += times * (3 + job.traffic.loss_launches)
    moved = loss_bytes(model, job.traffic.logit_bytes, job.tokens, job.ranks.tp, job.gradient_bytes)
    _add(found.forward, "elementwise", moved / hardware.elementwise_bytes_per_s)


def _messages(job: Job, number: int, found: Passes) -> None:
    """Messages within the layers.

    Tensor parallelism: of a layer's exchanges, the backward pass repeats one beside a matmul and hides another behind
    the weight's gradient; a third of its messages is waited for. Expert parallelism: with overlap_shared_expert beside
    the shared expert.
    """
    experiment, ranks, hardware = job.experiment, job.ranks, job.hardware
    model, parallel = experiment.model, experiment.parallel
    sent = communication_of_passes(model, parallel, experiment.precision, job.stage, ranks.world_size, number)
    is_all_again = "cla_group" in parallel.recomputed_parts
    for axis in ("tp", "cp", "ep", "expert_tp"):
        each = links.seconds(sent, axis, ranks, hardware) / job.micro_batches
        if axis in ("ep", "expert_tp") and model.moe_expert_capacity_factor is None:
            each *= job.assumptions.imbalance  # all wait for the rank that receives the most
        if axis == "tp":
            again = 2 * is_all_again + ("selective" in parallel.recomputed_parts)
            forward, hidden = each * 2 / (5 + again), each * 2 / (5 + again)
            hidden = min(hidden, sum(found.backward.get(part, 0.0) for part in ("attention projections", "experts")))
        else:
            forward, hidden = each / (2 + is_all_again), 0.0
        backward = each - forward - hidden
        if axis == "ep" and parallel.overlap_shared_expert:
            share = model.ffn_hidden_size / (model.ffn_hidden_size + model.moe_router_topk * model.expert_ffn_size)
            forward = max(0.0, forward - share * found.forward["experts"])
            backward = max(0.0, backward - share * found.backward["experts"])
        _add(found.forward, f"messages, {axis}", forward)
        _add(found.backward, f"messages, {axis}", backward)


def _offload(job: Job, number: int, found: Passes) -> None:
    """Copies of offloaded activations run beside the pass that makes or needs them."""
    moved = offloaded_bytes(job.experiment, job.stage, job.ranks.world_size, number)
    copy = moved / job.hardware.host_copy_bytes_per_s
    for parts in (found.forward, found.backward):
        _add(parts, "waiting for activations on the host", max(0.0, copy - sum(parts.values())) if moved else 0.0)


# --- a step -----------------------------------------------------------------------------------------------------------


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


def step_time(
    experiment: Experiment,
    stage: StageConfig,
    world_size: int,
    hardware: Hardware,
    assumptions: Assumptions | None = None,
) -> StepTime:
    """Time of one step with the batch of `stage` on `world_size` GPUs. Raises ConfigError if the hardware cannot
    compute in the experiment's formats, ValueError if layout or batch do not fit the number of ranks."""
    if experiment.precision.dtype != "bf16":
        rule = "the time of a step is planned in bf16 and FP8; hardware profiles give no speed of fp32 matmuls"
        raise ConfigError(experiment.name, [Problem("precision.dtype", experiment.precision.dtype, rule, "use bf16")])
    job = Job(experiment, stage, grid(experiment.parallel, world_size), hardware, assumptions or Assumptions())
    stages = [passes(job, number) for number in range(len(pipeline_stages(experiment.model, experiment.parallel)))]
    forward, backward = ([sum(parts.values()) for parts in way] for way in zip(*map(_both, stages), strict=True))
    timeline = simulate(forward, backward, job.ranks.pp, job.micro_batches, _message_s(job))
    around = [_around_passes(job, rank, timeline, forward, backward) for rank in range(job.ranks.pp)]
    gather = max(one.gather for one in around)
    reduced = max(end + one.reduce for end, one in zip(timeline.ends, around, strict=True))
    update = max(one.update for one in around)
    seconds = gather + reduced + update
    busiest = timeline.busy.index(max(timeline.busy))
    parts: Parts = {}
    for number in range(busiest, len(stages), job.ranks.pp):
        for way in _both(stages[number]):
            for part, each in way.items():
                _add(parts, part, each * job.micro_batches)
    _add(parts, "gathering weights", gather)
    _add(parts, "reducing gradients", around[busiest].reduce)
    _add(parts, "optimizer", update)
    _add(parts, "pipeline", max(0.0, seconds - sum(parts.values())) if job.ranks.pp > 1 else 0.0)
    tokens_per_s = stage.global_batch_tokens / seconds
    return StepTime(
        seconds,
        parts,
        timeline,
        tokens_per_s,
        model_flops(job) * tokens_per_s / world_size / hardware.peak_bf16_flops_per_s,
        6 * parameters(experiment.model).active * tokens_per_s / world_size / 1e12,
    )


def _both(stage: Passes) -> tuple[Parts, Parts]:
    return stage.forward, stage.backward


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


def _around_passes(
    job: Job, pipeline_rank: int, timeline: Timeline, forward: list[float], backward: list[float]
) -> _Around:
    """Weights are gathered beside the forward passes of the first micro-batch, from bucket to bucket, and gradients
    reduced beside the backward passes of the last; the first bucket of weights, and the last of gradients, are waited
    for."""
    experiment, ranks, hardware = job.experiment, job.ranks, job.hardware
    model, parallel, precision = experiment.model, experiment.parallel, experiment.precision
    sent = communication_per_rank(model, parallel, precision, job.stage, ranks.world_size, pipeline_rank)
    over = {"gather": 0.0, "reduce": 0.0}
    for axis in ("dp", "expert_dp"):
        for way, kinds in (("gather", ("all_gather",)), ("reduce", ("reduce_scatter", "all_reduce"))):
            mine = replace(sent, messages={key: found for key, found in sent.messages.items() if key[1] in kinds})
            over[way] += links.seconds(mine, axis, ranks, hardware)
    chunks = list(stages_of(model, parallel, pipeline_rank))
    buffers = [buffers_of_stage(model, parallel, precision, ranks.world_size, chunk) for chunk in chunks]
    share = _share_of_last_buckets(buffers)
    overlap = overlaps(parallel, ranks.dp_cp)
    if overlap.param_gather:
        start = timeline.slots[pipeline_rank][0].start
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
    return last / sum(buffer.size for chunk in buffers for buffer in chunk)


def _update_s(job: Job, pipeline_rank: int, buffers: list[Buffer]) -> float:
    """Zeros, norm, clipping and AdamW; with the offloaded optimizer also the copies of gradients and new weights, but
    not the host's own time; in FP8 the quantised copies of the weights, once for all micro-batches."""
    experiment, hardware = job.experiment, job.hardware
    parts = experiment.model, experiment.parallel, experiment.precision, job.ranks.world_size, pipeline_rank
    offloaded = max(memory.host for memory in memory_of_ranks(*parts, experiment.optimizer)) // HOST_BYTES_PER_ELEMENT
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


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageCost:
    """A training stage, or all of them."""

    step: StepTime | None
    """None for the whole run."""
    days: float
    gpu_hours: float
    kwh: float


def run_costs(
    experiment: Experiment, world_size: int, hardware: Hardware, assumptions: Assumptions | None = None
) -> list[StageCost]:
    """Of each stage, and last of the run; saving, validation and failures left out."""
    costs = []
    for stage in experiment.stages:
        step = step_time(experiment, stage, world_size, hardware, assumptions)
        hours = stage.num_steps * step.seconds / 3600
        gpu_hours = hours * world_size
        costs.append(StageCost(step, hours / 24, gpu_hours, gpu_hours * hardware.power_w / 1000))
    total = StageCost(None, *(sum(getattr(cost, name) for cost in costs) for name in ("days", "gpu_hours", "kwh")))
    return [*costs, total]
