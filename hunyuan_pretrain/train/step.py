"""One training step: micro-batches through megatron's schedule, losses, gradient reduction, optimizer.

The loss of a step is the mean cross-entropy over all target tokens of the global batch plus the router losses. Each micro-batch
contributes a sum already divided by the global number of target tokens, so gradients are added, over micro-batches and over ranks,
and the result does not depend on how the batch is divided.

Shapes: T tokens of a micro-batch on this rank, L layers, X router statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from hunyuan_pretrain.model.router import RoutingKey
from hunyuan_pretrain.train.optimizer import optimizer_step


@dataclass(frozen=True)
class StepResult:
    """What one step measured, the same on every rank."""

    loss: float  # mean cross-entropy of the target tokens, nats
    grad_norm: float  # global, before clipping
    num_target_tokens: int
    statistics_LX: Tensor  # router statistics summed over the global batch, see model.router.STATISTICS


def micro_batch_inputs(batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    """Arguments of HunyuanModel.forward that come from the data."""
    return {
        "tokens_T": batch.tokens_T.to(device, non_blocking=True),
        "positions_T": batch.positions_T.to(device, non_blocking=True),
        "borders": batch.cu_seqlens.tolist(),
        "label_T": batch.labels_T.to(device, non_blocking=True),
    }


def routing_key(experiment: Experiment, stage: StageConfig, step: int, batch: MicroBatch, device: torch.device) -> RoutingKey:
    """Key of the micro-batch's routing groups: numbered through the global batch, whatever rank holds them."""
    per_sequence = stage.sequence_length // experiment.model.moe_routing_group_tokens
    group_n = (batch.sequence_ids[:, None] * per_sequence + torch.arange(per_sequence)).reshape(-1)
    return RoutingKey(experiment.seed, step, group_n.to(device), stage.global_batch_sequences * per_sequence)


def train_step(
    experiment: Experiment,
    stage: StageConfig,
    step: int,
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    batches: list[MicroBatch],
    groups: ProcessGroupCollection,
    device: torch.device,
) -> StepResult:
    """Run one optimizer step over this rank's micro-batches of the global batch.

    Communicates: data-parallel group (token count, gradients, statistics), expert-parallel group (tokens), all groups of the optimizer.
    """
    num_target_tokens = sum_over(groups.dp_cp, torch.stack([batch.loss_mask_T.sum() for batch in batches]).sum().double().to(device))
    statistics: list[Tensor] = []

    def forward(batches: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        batch = next(batches)
        loss, statistics_LX = model(
            **micro_batch_inputs(batch, device),
            loss_weight_T=batch.loss_mask_T.to(device) / num_target_tokens.float(),
            rope_alpha=stage.rope_alpha,
            key=routing_key(experiment, stage, step, batch, device),
        )
        statistics.append(statistics_LX)
        return loss, _as_summed_loss

    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses = run_schedule(forward, model, batches, stage, groups, forward_only=False)
    grad_norm = optimizer_step(optimizer)
    totals = torch.cat([torch.stack(losses).sum().reshape(1).double(), torch.stack(statistics).sum(0).double().flatten()])
    totals = sum_over(groups.dp_cp, totals)
    return StepResult(
        loss=totals[0].item(),
        grad_norm=grad_norm,
        num_target_tokens=int(num_target_tokens.item()),
        statistics_LX=totals[1:].view(statistics[0].shape).cpu(),
    )


def run_schedule(
    forward: Any,
    model: DistributedDataParallel,
    batches: list[MicroBatch],
    stage: StageConfig,
    groups: ProcessGroupCollection,
    forward_only: bool,
) -> list[Tensor]:
    """Pass micro-batches through megatron's pipeline schedule; returns the detached loss of each."""
    model.config.finalize_model_grads_func = partial(_finalize, groups=groups)
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=stage.sequence_length * stage.micro_batch_sequences,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _as_summed_loss(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Core's three-part form of a loss that it must not divide: the loss, a token count it adds up (unused), what to keep."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach()


def _finalize(model: list[Any], num_tokens: Tensor | None = None, *, groups: ProcessGroupCollection, **kwargs: Any) -> None:
    """Core's gradient reduction without its division by the token count, which the loss has already."""
    kwargs["pg_collection"] = groups
    finalize_model_grads(model, None, **kwargs)


def sum_over(group: dist.ProcessGroup, value: Tensor) -> Tensor:
    """Sum of `value` over the ranks of `group`; changes `value` in place."""
    if group.size() > 1:
        dist.all_reduce(value, group=group)
    return value
