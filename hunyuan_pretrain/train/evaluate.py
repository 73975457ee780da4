"""Validation: mean loss over held-out packed sequences, routed without capacity, as the exported model will be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.data.loader import EvaluationLoader
from hunyuan_pretrain.model.routing import EvaluationRouting
from hunyuan_pretrain.parallel import whereabouts
from hunyuan_pretrain.train.metrics import routing_record
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step import SentBatch, model_inputs, run_schedule, sent_ahead, sum_over, sum_over_batch


class ValidationStoppedError(Exception):
    """Raised on all ranks if a stop is requested during a validation, which then has no result."""


ROUNDS_AT_A_TIME = 8
"""Micro-batches of each pipeline stage between two looks for a stop. Each look drains the pipeline once."""


@torch.no_grad()
def evaluate(
    run: Run, stage: StageConfig, loader: EvaluationLoader, is_stop_asked: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Validate on `loader` with `stage`'s RoPE alpha. Returns `loss` (mean cross-entropy, nats per target token),
    `target_tokens`, `expert_load` by layer, and `bits_per_byte` where the loader knows the byte count.

    is_stop_asked: gives all ranks the same answer; called now and then. Raises ValidationStoppedError once it is true.

    The load counts every token of the validation sequences and excludes padding sequences that only fill up
    micro-batches. Bits per byte is total nats / ln 2 / bytes of the text behind the target tokens.

    Communicates: all ranks (sums), plus the forward pass.
    """
    whereabouts.phase("validation")
    experiment, groups, device = run.experiment, run.groups, run.device
    statistics: list[Tensor] = []
    group_tokens = experiment.model.moe_routing_group_tokens

    def counted(group_n: Tensor) -> EvaluationRouting:
        is_counted_n = group_n // (loader.sequence_length // group_tokens) < loader.num_sequences
        return EvaluationRouting(is_counted_n.repeat_interleave(group_tokens))

    def forward(batches: Iterator[SentBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        inputs = model_inputs(next(batches), rope_alpha=stage.rope_alpha, loss_tokens=1.0, route=counted)
        output, statistics_LX = model(inputs)
        statistics.append(statistics_LX)
        mask_T = inputs.loss_weight_T
        assert mask_T is not None
        return output, lambda loss: (
            loss,
            torch.zeros((), dtype=torch.int, device=device),
            torch.stack((loss, mask_T.sum())),
        )

    for model in run.wrapped:
        model.eval()
    tokens = loader.sequence_length * experiment.evaluation.micro_batch_sequences
    sums: list[Tensor] = []
    at_a_time = ROUNDS_AT_A_TIME * groups.pp.size()
    try:
        for first in range(0, len(loader), at_a_time):
            if is_stop_asked():
                raise ValidationStoppedError()
            last = min(first + at_a_time, len(loader))
            feed = partial(_part, run, loader, first, last)
            sums += run_schedule(run, forward, feed, last - first, tokens, forward_only=True)
    finally:
        for model in run.wrapped:
            model.train()
    totals, routed = sum_over_batch(groups, sums, 2, statistics)
    nats, target_tokens = totals[0].item(), int(totals[1].item())
    found = {"loss": nats / target_tokens, "target_tokens": target_tokens}
    if loader.target_bytes is not None:
        # data-parallel ranks hold different sequences; all other ranks hold copies of theirs
        replicas = dist.get_world_size() // groups.dp.size()
        num_bytes = sum_over(dist.group.WORLD, torch.tensor(loader.target_bytes, device=device)).item() // replicas
        found |= {"bits_per_byte": nats / math.log(2) / num_bytes} if num_bytes else {}
    return {**found, "expert_load": routing_record(experiment.model, routed, None)["expert_load"]}


def _part(run: Run, loader: EvaluationLoader, first: int, last: int) -> Iterator[SentBatch]:
    return sent_ahead(run, islice(loader.micro_batches(first), last - first))
