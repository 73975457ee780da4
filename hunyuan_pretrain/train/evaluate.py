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
from hunyuan_pretrain.data.loader import EvaluationLoader, by_conversation
from hunyuan_pretrain.model.routing import EvaluationRouting, RouterStatistics
from hunyuan_pretrain.parallel import whereabouts
from hunyuan_pretrain.train.feed import SentBatch, model_inputs, sent_ahead
from hunyuan_pretrain.train.metrics import routing_record
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step import run_schedule, sum_over, sum_over_batch


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
    micro-batches. Bits per byte is total nats / ln 2 / bytes of the text behind the target tokens. Of
    conversations also `conversation_loss`, the mean over conversations of the mean over each one's target tokens, and
    `conversations`, their number; this takes a second pass over the data.

    Communicates: all ranks (sums), plus the forward pass.
    """
    whereabouts.phase("validation")
    experiment, groups, device = run.experiment, run.groups, run.device
    totals, routed = _sums(run, stage, loader, is_stop_asked)
    nats, target_tokens = totals[0].item(), int(totals[1].item())
    found = {"loss": nats / target_tokens, "target_tokens": target_tokens}
    if loader.is_chat:
        of_conversations, _ = _sums(run, stage, loader, is_stop_asked, of_conversations=True)
        conversations = round(of_conversations[1].item())  # each has weights that add up to 1, rounded in fp32
        found |= {"conversation_loss": of_conversations[0].item() / conversations, "conversations": conversations}
    if loader.target_bytes is not None:
        # data-parallel ranks hold different sequences; all other ranks hold copies of theirs
        replicas = dist.get_world_size() // groups.dp.size()
        num_bytes = sum_over(dist.group.WORLD, torch.tensor(loader.target_bytes, device=device)).item() // replicas
        found |= {"bits_per_byte": nats / math.log(2) / num_bytes} if num_bytes else {}
    return {**found, "expert_load": routing_record(experiment.model, routed, None)["expert_load"]}


def _sums(
    run: Run,
    stage: StageConfig,
    loader: EvaluationLoader,
    is_stop_asked: Callable[[], bool],
    *,
    of_conversations: bool = False,
) -> tuple[Tensor, RouterStatistics]:
    """((2,) float64: weighted sum of cross-entropies, sum of the weights; router statistics), over all ranks.

    of_conversations: with weights for which each conversation counts the same. Raises and communicates as `evaluate`.
    """
    experiment, device = run.experiment, run.device
    statistics: list[Tensor] = []
    group_tokens = experiment.model.moe_routing_group_tokens

    def counted(group_n: Tensor, _: Tensor) -> EvaluationRouting:
        is_counted_n = group_n // (loader.sequence_length // group_tokens) < loader.num_sequences
        return EvaluationRouting(is_counted_n.repeat_interleave(group_tokens))

    def forward(sent: Iterator[SentBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        inputs = model_inputs(next(sent), rope_alpha=stage.rope_alpha, loss_tokens=1.0, route=counted)
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
    at_a_time = ROUNDS_AT_A_TIME * run.groups.pp.size()
    try:
        for first in range(0, len(loader), at_a_time):
            if is_stop_asked():
                raise ValidationStoppedError()
            last = min(first + at_a_time, len(loader))
            feed = partial(_part, run, loader, first, last, of_conversations)
            sums += run_schedule(run, forward, feed, last - first, tokens, forward_only=True)
    finally:
        for model in run.wrapped:
            model.train()
    return sum_over_batch(run.groups, sums, 2, statistics)


def _part(run: Run, loader: EvaluationLoader, first: int, last: int, of_conversations: bool) -> Iterator[SentBatch]:
    batches = islice(loader.micro_batches(first), last - first)
    return sent_ahead(run, (by_conversation(batch)[0] for batch in batches) if of_conversations else batches)
