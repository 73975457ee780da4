"""One training step: micro-batches through megatron's schedule, losses, gradient reduction, optimizer.

The loss of a step is the mean cross-entropy over all target tokens of the global batch plus the router losses. Each
micro-batch contributes a sum already divided by the global number of target tokens, so gradients are added, over
micro-batches and over ranks, and the result does not depend on how the batch is divided.

Shapes: T tokens of a micro-batch on this rank, L layers, X numbers of packed router statistics
(model.routing.RouterStatistics).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.data.loader import MicroBatch
from hunyuan_pretrain.model.fp8 import training_step
from hunyuan_pretrain.model.routing import RouterStatistics, TrainingRouting
from hunyuan_pretrain.parallel.context_parallel import context_slice
from hunyuan_pretrain.runtime.handover import handed_over, to_device
from hunyuan_pretrain.train.optimizer import optimizer_step


@dataclass(frozen=True)
class StepResult:
    """What one step measured, the same on every rank."""

    loss: float  # mean cross-entropy of the target tokens, nats
    grad_norm: float  # global, before clipping
    num_target_tokens: int
    statistics: RouterStatistics  # of all layers, summed over the global batch, on the CPU


def micro_batch_inputs(
    batch: MicroBatch, groups: ProcessGroupCollection, experiment: Experiment, device: torch.device
) -> dict[str, Any]:
    """What HunyuanModel.forward takes of the data, and loss_mask_T, for this context-parallel rank's tokens.

    And group_n: which routing groups of the micro-batch these tokens are, counted from its first.
    """
    borders, group_tokens = batch.cu_seqlens.tolist(), experiment.model.moe_routing_group_tokens
    context = None
    rows_T = torch.arange(len(batch.tokens_T))
    if groups.cp.size() > 1:
        method = experiment.parallel.context_parallel_method
        context = context_slice(groups.cp, method, borders, len(batch.sequence_ids), group_tokens, device)
        rows_T = torch.cat([torch.arange(start, end) for start, end in context.ranges])
    tensors = {
        "tokens_T": batch.tokens_T,
        "positions_T": batch.positions_T,
        "label_T": batch.labels_T,
        "loss_mask_T": batch.loss_mask_T,
    }
    mine = tensors if context is None else {name: tensor[rows_T] for name, tensor in tensors.items()}
    inputs: dict[str, Any] = {name: to_device(tensor, device) for name, tensor in mine.items()}
    return inputs | {
        "borders": borders,
        "context": context,
        "group_n": to_device(rows_T[::group_tokens] // group_tokens, device),
    }


def training_routing(
    experiment: Experiment, stage: StageConfig, step: int, batch: MicroBatch, group_n: Tensor
) -> TrainingRouting:
    """Routing of these routing groups of the micro-batch: numbered through the global batch, whatever rank has them."""
    per_sequence = stage.sequence_length // experiment.model.moe_routing_group_tokens
    sequence_n = to_device(batch.sequence_ids, group_n.device)[group_n // per_sequence]
    return TrainingRouting(
        experiment.seed,
        step,
        sequence_n * per_sequence + group_n % per_sequence,
        stage.global_batch_sequences * per_sequence,
    )


@dataclass(frozen=True)
class Gradients:
    """What one pass over the global batch left on this rank; the gradients themselves are in the model's buffers,
    reduced."""

    losses: list[Tensor]  # of each micro-batch, on the last stage
    statistics: list[Tensor]  # packed router statistics (L, X) of each micro-batch
    num_target_tokens: int


def compute_gradients(
    experiment: Experiment,
    stage: StageConfig,
    step: int,
    chunks: list[DistributedDataParallel],
    batches: list[MicroBatch],
    groups: ProcessGroupCollection,
    device: torch.device,
    in_fp8: bool = True,
) -> Gradients:
    """Forward and backward over this rank's micro-batches of the global batch, and the reduction of the gradients, from
    zero.

    in_fp8: False leaves out the FP8 recipe, if the experiment has one. Communicates: data-parallel group (token count,
    gradients), what the model and the schedule do, and the recipe's scales.
    """
    mine = torch.stack([batch.loss_mask_T.sum() for batch in batches]).sum().double()
    num_target_tokens = sum_over(groups.dp, to_device(mine, device))
    statistics: list[Tensor] = []

    def forward(batches: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        batch = next(batches)
        inputs = micro_batch_inputs(batch, groups, experiment, device)
        loss_weight_T = inputs.pop("loss_mask_T") / num_target_tokens.float()
        routing = training_routing(experiment, stage, step, batch, inputs.pop("group_n"))
        output, statistics_LX = model(
            **inputs,
            loss_weight_T=loss_weight_T,
            rope_alpha=stage.rope_alpha,
            routing=routing,
        )
        statistics.append(statistics_LX)
        return output, as_summed_loss

    for model in chunks:
        model.zero_grad_buffer()
    tokens = stage.sequence_length * stage.micro_batch_sequences
    with training_step([model.module for model in chunks], groups) if in_fp8 else nullcontext():
        losses = run_schedule(forward, chunks, batches, tokens, groups, forward_only=False)
    return Gradients(losses, statistics, int(num_target_tokens.item()))


def train_step(
    experiment: Experiment,
    stage: StageConfig,
    step: int,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: list[MicroBatch],
    groups: ProcessGroupCollection,
    device: torch.device,
    before_update: Callable[[], None] | None = None,
    in_fp8: bool = True,
) -> StepResult:
    """Run one optimizer step over this rank's micro-batches of the global batch.

    before_update: called when all gradients are reduced, before they are clipped. in_fp8: as of `compute_gradients`.

    Communicates: what `compute_gradients` does, all ranks (statistics), all groups of the optimizer.
    """
    optimizer.zero_grad()
    found = compute_gradients(experiment, stage, step, chunks, batches, groups, device, in_fp8)
    if before_update is not None:
        before_update()
    grad_norm = optimizer_step(optimizer)
    losses, statistics = sum_over_batch(groups, [loss.reshape(1) for loss in found.losses], 1, found.statistics)
    return StepResult(losses[0].item(), grad_norm, found.num_target_tokens, statistics)


def run_schedule(
    forward: Any,
    chunks: list[DistributedDataParallel],
    batches: list[MicroBatch],
    num_tokens: int,
    groups: ProcessGroupCollection,
    forward_only: bool,
) -> list[Tensor]:
    """Pass micro-batches of `num_tokens` tokens (of all context-parallel ranks) through megatron's pipeline schedule.

    Returns what the loss function keeps of each, on the last stage; an empty list on the others.
    """
    chunks[0].config.finalize_model_grads_func = partial(_finalize, groups=groups)
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=num_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def as_summed_loss(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Core's three-part form of a loss that it must not divide: the loss, a token count it adds up (unused), what to
    keep."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach()


def _finalize(
    model: list[Any], num_tokens: Tensor | None = None, *, groups: ProcessGroupCollection, **kwargs: Any
) -> None:
    """Core's gradient reduction without its division by the token count, which the loss has already."""
    kwargs["pg_collection"] = groups
    finalize_model_grads(model, None, **kwargs)


def sum_over_batch(
    groups: ProcessGroupCollection, losses: list[Tensor], width: int, statistics: list[Tensor]
) -> tuple[Tensor, RouterStatistics]:
    """float64 sums over the global batch, on the CPU: those of `losses` (a vector of `width` numbers a micro-batch, on
    the last stage), and the statistics of all layers.

    Every rank of a stage has routed tokens that no other has; the loss is the same on all tensor-parallel ranks and
    counts on the first.
    Communicates: all ranks.
    """
    statistics_sum = torch.stack(statistics).double().sum(0).flatten()
    loss_sum = (
        torch.stack(losses).double().sum(0) if losses and groups.tp.rank() == 0 else statistics_sum.new_zeros(width)
    )
    totals = sum_over(dist.group.WORLD, torch.cat([loss_sum, statistics_sum])).cpu()
    return totals[:width], RouterStatistics.unpacked(totals[width:].view(statistics[0].shape))


def sum_over(group: dist.ProcessGroup | None, value: Tensor) -> Tensor:
    """Sum of `value` over the ranks of `group`; changes `value` in place."""
    if group is None or group.size() > 1:
        handed_over("all_reduce", value, is_written=True)
        dist.all_reduce(value, group=group)
    return value
