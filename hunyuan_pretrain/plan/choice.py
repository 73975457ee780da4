"""The layout that trains an experiment fastest on given GPUs, of those whose memory fits, by the plan.

Few layouts are tried: tensor parallelism and experts within a server, whole CLA groups on each pipeline rank in one or
two model chunks, and of each layout the least recomputation that fits. If none fits, experts over two servers; then the
optimizer state on the host. plan.search looks at every layout: it takes longer, and keeps the experiment's batch and
optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.derived import grid
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.plan.counts import parameters
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.memory import TO_SPARE, Peak, host_missing, peaks
from hunyuan_pretrain.plan.timing import step_time

RECOMPUTE = ("none", "swiglu", "swiglu+norms", "selective+norms", "cla_group")
"""From the least to the most that is computed again."""
LONGEST_PIPELINE = 16
"""Ranks. A longer one leaves each rank too few layers to balance the output layer."""
CHUNKS = (1, 2)
"""Model chunks on each pipeline rank. Two halve the bubble, and hold the activations of more micro-batches."""
NARROW = 2048
"""Channels below which a sequence is too little work for a GPU, so that larger micro-batches are tried."""


def highest_peak(experiment: Experiment, gpus: int) -> Peak:
    """The memory peak of the rank that needs the most, over all training stages."""
    return max(
        (peak for stage in _shapes(experiment) for peak in peaks(experiment, stage, gpus)), key=lambda peak: peak.total
    )


def fits(experiment: Experiment, gpus: int, hardware: Hardware) -> bool:
    """Whether every GPU keeps the spare share free, and the host has enough memory."""
    available = (1 - TO_SPARE) * hardware.memory_bytes
    for stage in _shapes(experiment):
        found = peaks(experiment, stage, gpus)
        if max(peak.total for peak in found) > available or host_missing(found, hardware) > 0:
            return False
    return True


def _shapes(experiment: Experiment) -> list[StageConfig]:
    """One stage for each shape of batch."""
    shapes: dict[tuple[int, int, int], StageConfig] = {}
    for stage in experiment.stages:
        shapes.setdefault((stage.sequence_length, stage.micro_batch_sequences, stage.global_batch_sequences), stage)
    return list(shapes.values())


def fastest(experiment: Experiment, gpus: int, hardware: Hardware) -> Experiment | None:
    """The experiment with the layout, micro-batch and, if nothing else fits, the offloaded optimizer that train most
    tokens per second. Global batches become the nearest multiple that the ranks can share. None: nothing fits."""
    for level in _levels(experiment, gpus, hardware):
        found = list(_fitting(level, gpus, hardware))
        if found:
            return max(found, key=lambda one: step_time(one, one.stages[-1], gpus, hardware).tokens_per_s)
    return None


def _fitting(layouts: Iterator[Experiment], gpus: int, hardware: Hardware) -> Iterator[Experiment]:
    """Those that fit. Once one fits without recomputation, the same with a longer pipeline would only wait longer."""
    done = set()
    for layout in layouts:
        parallel = layout.parallel
        kind = (
            parallel.tensor_model_parallel_size,
            parallel.expert_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            _micro(layout),
        )
        if kind not in done and (found := _with_least_recompute(layout, gpus, hardware)) is not None:
            yield found
            if found.parallel.recompute == RECOMPUTE[0]:
                done.add(kind)


def _micro(experiment: Experiment) -> int:
    return experiment.stages[0].micro_batch_sequences


def smallest_cluster(experiment: Experiment, hardware: Hardware, most: int = 8192) -> int | None:
    """The fewest GPUs, in powers of two, on which something fits. None: not even `most`."""
    count = parameters(experiment.model)
    gpus = 1
    while gpus <= most:
        enough = gpus * hardware.memory_bytes > 4 * count.total  # bf16 weights and gradients
        levels = _levels(experiment, gpus, hardware) if enough else ()
        if any(True for level in levels for _ in _fitting(level, gpus, hardware)):
            return gpus
        gpus *= 2
    return None


def _levels(experiment: Experiment, gpus: int, hardware: Hardware) -> Iterator[Iterator[Experiment]]:
    """Groups of layouts to try, the preferred ones first."""
    experts = experiment.model.num_moe_experts
    within = math.gcd(experts, math.gcd(gpus, hardware.nvlink_domain_gpus))
    offloaded = experiment.model_copy(
        update={"optimizer": experiment.optimizer.model_copy(update={"cpu_offload_fraction": 1.0})}
    )
    yield _layouts(experiment, gpus, hardware, {1, within})
    if math.gcd(experts, gpus) > within:
        yield _layouts(experiment, gpus, hardware, {math.gcd(experts, gpus)})
    yield _layouts(offloaded, gpus, hardware, {within})


def _layouts(experiment: Experiment, gpus: int, hardware: Hardware, experts: set[int]) -> Iterator[Experiment]:
    """Legal layouts without recomputation whose weights and gradients alone do not fill a GPU."""
    model = experiment.model
    count, groups = parameters(model), model.num_layers // model.cla_share_factor
    tensor = [size for size in (1, 2, 4, 8) if size <= hardware.nvlink_domain_gpus]
    longest = min(groups, LONGEST_PIPELINE)
    pipeline = [size for size in range(1, longest + 1) if groups % size == 0 and gpus % size == 0]
    sequences = (1, 2, 4) if model.hidden_size < NARROW else (1,)
    per_weight = 2 + (4 if experiment.precision.grad_reduce_in_fp32 else 2)
    for tp, ep, micro, pp, chunks in product(tensor, sorted(experts), sequences, pipeline, CHUNKS):
        weights = count.routed_experts / (ep * pp) + count.dense / (tp * pp)
        if chunks > 1 and (pp == 1 or groups % (chunks * pp)):
            continue
        if gpus % (tp * pp) or gpus % (ep * pp) or per_weight * weights > hardware.memory_bytes:
            continue
        changes = {
            "world_size": gpus,
            "tensor_model_parallel_size": tp,
            "sequence_parallel": tp > 1,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": chunks,
            "expert_model_parallel_size": ep,
        }
        made = _with_batch(_with_parallel(experiment, changes), gpus, micro)
        if not rules.find_problems(made, gpus):
            yield made


def _with_parallel(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
    return experiment.model_copy(update={"parallel": experiment.parallel.model_copy(update=changes)})


def _with_batch(experiment: Experiment, gpus: int, micro: int) -> Experiment:
    """Micro-batches of `micro` sequences, and global batches that the data-parallel ranks can share."""
    unit = micro * grid(experiment.parallel, gpus).dp
    stages = tuple(
        stage.model_copy(
            update={
                "micro_batch_sequences": micro,
                "global_batch_sequences": max(1, round(stage.global_batch_sequences / unit)) * unit,
            }
        )
        for stage in experiment.stages
    )
    evaluation = experiment.evaluation.model_copy(update={"micro_batch_sequences": micro})
    return experiment.model_copy(update={"stages": stages, "evaluation": evaluation})


def _with_least_recompute(experiment: Experiment, gpus: int, hardware: Hardware) -> Experiment | None:
    choices = [_with_parallel(experiment, {"recompute": recompute}) for recompute in RECOMPUTE]
    if not fits(choices[-1], gpus, hardware):
        return None
    return next(choice for choice in choices if fits(choice, gpus, hardware))
