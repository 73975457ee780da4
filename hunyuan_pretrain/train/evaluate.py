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
from hunyuan_pretrain.model.router import CountedTokens
from hunyuan_pretrain.runtime.handover import to_device
from hunyuan_pretrain.train.metrics import routing_record
from hunyuan_pretrain.train.step import micro_batch_inputs, run_schedule, sum_over_batch


@torch.no_grad()
def evaluate(
    experiment: Experiment,
    stage: StageConfig,
    chunks: list[DistributedDataParallel],
    loader: EvaluationLoader,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> dict[str, Any]:
    """Mean cross-entropy (nats a target token), number of target tokens, and the load of each layer's experts; positions use `stage`'s
    RoPE alpha. The load counts every token of the validation's sequences, and none of those that only fill up the ranks' micro-batches.

    Communicates: all ranks (sums), and what the forward pass does.
    """
    statistics: list[Tensor] = []
    group_tokens = experiment.model.moe_routing_group_tokens

    def forward(batches: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        batch = next(batches)
        inputs = micro_batch_inputs(batch, groups, experiment, device)
        mask_T = inputs.pop("loss_mask_T")
        sequence_n = to_device(batch.sequence_ids, device)[inputs.pop("group_n") // (loader.sequence_length // group_tokens)]
        key = CountedTokens((sequence_n < loader.num_sequences).repeat_interleave(group_tokens))
        output, statistics_LX = model(**inputs, loss_weight_T=mask_T, rope_alpha=stage.rope_alpha, key=key)
        statistics.append(statistics_LX)
        return output, lambda loss: (loss, torch.zeros((), dtype=torch.int, device=device), torch.stack((loss, mask_T.sum())))

    for model in chunks:
        model.eval()
    tokens = loader.sequence_length * experiment.evaluation.micro_batch_sequences
    sums = run_schedule(forward, chunks, list(loader), tokens, groups, forward_only=True)
    for model in chunks:
        model.train()
    totals = sum_over_batch(groups, sums, 2, statistics)
    routing = routing_record(experiment.model, totals[2:].view(statistics[0].shape).cpu(), None)
    return {"loss": (totals[0] / totals[1]).item(), "target_tokens": int(totals[1].item()), "expert_load": routing["expert_load"]}
