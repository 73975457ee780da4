"""Validation: mean loss over held-out packed sequences, routed without capacity, as the exported model will be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.data.loader import EvaluationLoader, MicroBatch
from hunyuan_pretrain.train.metrics import routing_record
from hunyuan_pretrain.train.step import micro_batch_inputs, run_schedule, sum_over


@torch.no_grad()
def evaluate(
    experiment: Experiment,
    stage: StageConfig,
    model: DistributedDataParallel,
    loader: EvaluationLoader,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> dict[str, Any]:
    """Mean cross-entropy (nats a target token), number of target tokens, and routing shares; positions use `stage`'s RoPE alpha.

    Communicates: data-parallel group (sums), expert-parallel group (tokens).
    """
    statistics: list[Tensor] = []

    def forward(batches: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        batch = next(batches)
        mask_T = batch.loss_mask_T.to(device)
        loss_sum, statistics_LX = model(**micro_batch_inputs(batch, device), loss_weight_T=mask_T, rope_alpha=stage.rope_alpha, key=None)
        statistics.append(statistics_LX)
        sums = torch.stack((loss_sum, mask_T.sum()))
        return loss_sum, lambda loss: (loss, torch.zeros((), dtype=torch.int, device=device), sums)

    model.eval()
    sums = run_schedule(forward, model, list(loader), stage, groups, forward_only=True)
    model.train()
    totals = torch.cat([torch.stack(sums).double().sum(0), torch.stack(statistics).double().sum(0).flatten()])
    totals = sum_over(groups.dp_cp, totals)
    routing = routing_record(experiment.model, totals[2:].view(statistics[0].shape).cpu(), None)
    return {"loss": (totals[0] / totals[1]).item(), "target_tokens": int(totals[1].item()), "expert_load": routing["expert_load"]}
