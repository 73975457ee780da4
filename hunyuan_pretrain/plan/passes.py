"""How long one micro-batch takes in a pipeline stage on a GPU, forward and backward, by part: matmuls by shape,
attention, the kernels between them, messages within the layers.

A part's time is its work over the speed that Hardware gives. What runs beside computation counts only where it takes
longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from hunyuan_pretrain.config.derived import Grid, pipeline_stages
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.plan import links
from hunyuan_pretrain.plan.activations import offloaded_bytes
from hunyuan_pretrain.plan.communication import communication_of_passes
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.matmuls import Matmul, attention_s, matmuls_of_layer, matmuls_of_output_layer
from hunyuan_pretrain.plan.traffic import Traffic, loss_bytes, traffic

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

    @property
    def both(self) -> tuple[Parts, Parts]:
        """Forward, backward."""
        return self.forward, self.backward


def passes(job: Job, number: int) -> Passes:
    """Time of one micro-batch in pipeline stage `number`, by part, forward and backward."""
    model, parallel = job.experiment.model, job.experiment.parallel
    stages = pipeline_stages(model, parallel)
    found, launches = Passes({}, {}), [0.0, 0.0]
    share, precision = job.experiment.model.cla_share_factor, job.experiment.precision
    kinds: dict[tuple[bool, bool], list[int]] = {}  # owner of keys and values, in FP8: the same work in each
    for layer in stages[number]:
        kind = layer % share == 0, precision.is_fp8_layer(layer, job.experiment.model.num_layers)
        kinds.setdefault(kind, []).append(layer)
    for layers in kinds.values():
        _layers(job, layers, found, launches)
    if number == 0:
        for parts, moved in zip((found.forward, found.backward), job.traffic.embedding_bytes, strict=True):
            add(parts, "elementwise", moved * job.tokens / job.ranks.tp / job.hardware.elementwise_bytes_per_s)
    if number == len(stages) - 1:
        _loss(job, found, launches)
    _messages(job, number, found)
    launch_s = 0.0 if job.experiment.runtime.cuda_graphs else job.hardware.host_launch_s
    for parts, count in zip((found.forward, found.backward), launches, strict=True):
        add(parts, "gaps between kernels", count * job.hardware.kernel_gap_s)
        # the device waits for the host where that launches more slowly than the kernels run
        add(parts, "waiting for the host", max(0.0, count * launch_s - sum(parts.values())))
    _offload(job, number, found)
    return found


def passes_of_stages(job: Job) -> list[Passes]:
    """Of each pipeline stage; those between the first and the last that have the same layers are computed once."""
    model, precision = job.experiment.model, job.experiment.precision
    stages = pipeline_stages(model, job.experiment.parallel)
    alike: dict[tuple[object, ...], Passes] = {}
    found = []
    for number, layers in enumerate(stages):
        formats = tuple(precision.is_fp8_layer(layer, model.num_layers) for layer in layers)
        kind = number == 0, number == len(stages) - 1, formats
        if kind not in alike:
            alike[kind] = passes(job, number)
        found.append(alike[kind])
    return found


def add(parts: Parts, part: str, seconds: float) -> None:
    """Add to a part; a part without time has no entry."""
    if seconds:
        parts[part] = parts.get(part, 0.0) + seconds


def _layers(job: Job, layers: list[int], found: Passes, launches: list[float]) -> None:
    """Layers with the same work."""
    one, launched = Passes({}, {}), [0.0, 0.0]
    _layer(job, layers[0], one, launched)
    for way, parts in zip(found.both, one.both, strict=True):
        for part, seconds in parts.items():
            add(way, part, len(layers) * seconds)
    launches[:] = [before + len(layers) * each for before, each in zip(launches, launched, strict=True)]


def _layer(job: Job, layer: int, found: Passes, launches: list[float]) -> None:
    hardware, recomputed = job.hardware, job.experiment.parallel.recomputed_parts
    is_all_again, is_experts_again = "cla_group" in recomputed, "selective" in recomputed
    for matmul in matmuls_of_layer(job.experiment, job.stage, job.ranks, layer, job.assumptions.imbalance):
        seconds = matmul.seconds(hardware)
        add(found.forward, matmul.part, seconds)
        is_again = is_all_again or (is_experts_again and matmul.part == "experts")
        add(found.backward, matmul.part, seconds * is_again + _backward_s(job, matmul))
        _quantise(job, matmul, found, is_again)
        # in FP8 a kernel quantises each input, and each gradient of an output
        quantised = matmul.number_format != "bf16"
        launches[0] += matmul.groups * (1 + quantised)
        launches[1] += matmul.groups * (2 + quantised + is_again * (1 + quantised))
    forward, backward = attention_s(job.experiment.model, job.tokens, job.document_tokens, job.ranks, hardware)
    add(found.forward, "attention", forward)
    add(found.backward, "attention", backward + forward * is_all_again)
    moved, seconds_per_byte = job.traffic, job.tokens / job.ranks.tp / hardware.elementwise_bytes_per_s
    again = moved.layer_bytes[0] if is_all_again else 0.0
    if not is_all_again:
        again += moved.swiglu_bytes * bool(recomputed & {"swiglu", "selective"})
        again += moved.norm_bytes * ("norms" in recomputed)
    add(found.forward, "elementwise", moved.layer_bytes[0] * seconds_per_byte)
    add(found.backward, "elementwise", (moved.layer_bytes[1] + again) * seconds_per_byte)
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
    add(found.forward, "quantising", rows * matmul.inputs * per_value)
    add(found.backward, "quantising", rows * (matmul.outputs + matmul.inputs * is_again) * per_value)


def _loss(job: Job, found: Passes, launches: list[float]) -> None:
    """The forward pass of the output layer computes its gradients too. With task=dpo the logits come twice."""
    model, hardware = job.experiment.model, job.hardware
    again = 1 if job.stage.task == "dpo" else 0
    for logits, times in matmuls_of_output_layer(model, job.tokens, job.ranks, job.width):
        for matmul in (*[logits] * (1 + again), logits.input_gradient, logits.weight_gradient):
            add(found.forward, "output layer", times * matmul.seconds(hardware))
        launches[0] += times * (3 + job.traffic.loss_launches) * (1 + again)
    moved = loss_bytes(model, job.traffic.logit_bytes, job.tokens, job.ranks.tp, job.gradient_bytes)
    add(found.forward, "elementwise", moved / hardware.elementwise_bytes_per_s)


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
        add(found.forward, f"messages, {axis}", forward)
        add(found.backward, f"messages, {axis}", backward)


def _offload(job: Job, number: int, found: Passes) -> None:
    """Copies of offloaded activations run beside the pass that makes or needs them."""
    moved = offloaded_bytes(job.experiment, job.stage, job.ranks.world_size, number)
    copy = moved / job.hardware.host_copy_bytes_per_s
    for parts in (found.forward, found.backward):
        add(parts, "waiting for activations on the host", max(0.0, copy - sum(parts.values())) if moved else 0.0)
