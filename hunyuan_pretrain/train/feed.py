"""Micro-batches on their way to the device, and what the model reads of them.

Shapes: T tokens of a micro-batch on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.data.loader import MicroBatch
from hunyuan_pretrain.model.dropout import NO_DROPOUT, Rates
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.model.preference import PairLoss, Pairs
from hunyuan_pretrain.model.routing import Routing
from hunyuan_pretrain.model.varlen_attention import Documents
from hunyuan_pretrain.parallel.context_parallel import ContextSlice, context_slice
from hunyuan_pretrain.runtime.transfers import Incoming
from hunyuan_pretrain.train.run import Run


@dataclass(frozen=True)
class SentBatch:
    """This context-parallel rank's share of a micro-batch, as it arrives on the run's device."""

    take: Callable[[], tuple[Tensor, ...]]
    """The tensors of `Share` on the device."""
    cu_seqlens: list[int] | Documents
    context: ContextSlice | None


class Share(NamedTuple):
    """This context-parallel rank's share of a micro-batch, on the CPU."""

    tensors: list[Tensor]
    """Tokens, positions, labels and loss mask (T,); the indices (n,) of the routing groups. They are numbered through
    the sequences of the global batch, so they do not depend on which rank holds a group. Of pairs also the answers (T,)
    and their reference log-probabilities (A,), see model.preference.Pairs."""
    cu_seqlens: list[int]
    context: ContextSlice | None


Feed = Callable[[], Iterator[SentBatch]]
"""The micro-batches of a step, in order; one iterator for each model chunk."""


Route = Callable[[Tensor, Tensor], Routing]
"""Makes the routing of a micro-batch from the indices (n,) of its routing groups and its tokens (T,)."""


def share_of(run: Run, batch: MicroBatch) -> Share:
    """This rank's share of `batch`."""
    experiment, cp, device = run.experiment, run.groups.cp, run.device
    group_tokens = experiment.model.moe_routing_group_tokens
    context, cu_seqlens = None, batch.cu_seqlens.tolist()
    rows_T = torch.arange(len(batch.tokens_T))
    if cp.size() > 1:
        method = experiment.parallel.context_parallel_method
        context = context_slice(cp, method, cu_seqlens, len(batch.sequence_ids), group_tokens, device)
        rows_T = torch.cat([torch.arange(start, end) for start, end in context.ranges])
    whole = (batch.tokens_T, batch.positions_T, batch.labels_T, batch.loss_mask_T)
    mine = whole if context is None else tuple(tensor[rows_T] for tensor in whole)
    per_sequence = len(batch.tokens_T) // len(batch.sequence_ids) // group_tokens
    group_n = rows_T[::group_tokens] // group_tokens  # of the micro-batch
    group_n = batch.sequence_ids[group_n // per_sequence] * per_sequence + group_n % per_sequence
    pairs = [] if batch.pairs is None else [batch.pairs.answer_T[rows_T], batch.pairs.reference_A]
    return Share([*mine, group_n, *pairs], cu_seqlens, context)


def send(run: Run, batch: MicroBatch) -> SentBatch:
    """Start the copy of this rank's share of `batch` to the run's device."""
    share = share_of(run, batch)
    return SentBatch(Incoming(share.tensors, run.device).take, share.cu_seqlens, share.context)


def sent_ahead(run: Run, batches: Iterable[MicroBatch]) -> Iterator[SentBatch]:
    """Yields every micro-batch; the next one is then already on its way."""
    ahead: SentBatch | None = None
    for batch in batches:
        sent = send(run, batch)
        if ahead is not None:
            yield ahead
        ahead = sent
    if ahead is not None:
        yield ahead


def model_inputs(
    batch: SentBatch,
    *,
    rope_alpha: float,
    loss_tokens: Tensor | float,
    route: Route,
    pair_loss: PairLoss | None = None,
    as_pairs: bool = False,
    dropout: Rates = NO_DROPOUT,
) -> ModelInputs:
    """What the model reads of a micro-batch.

    loss_tokens: divisor of the summed cross-entropy of the target tokens; infinity drops this loss. pair_loss: the loss
    of a batch of pairs; as_pairs: without one, their log-probabilities.
    """
    tokens_T, positions_T, labels_T, loss_mask_T, group_n, *pairs = batch.take()
    return ModelInputs(
        tokens_T=tokens_T,
        positions_T=positions_T,
        cu_seqlens=batch.cu_seqlens,
        rope_alpha=rope_alpha,
        labels_T=labels_T,
        loss_weight_T=loss_mask_T / loss_tokens,
        pairs=Pairs(pairs[0], pairs[1], pair_loss) if pair_loss is not None or as_pairs else None,
        routing=route(group_n, tokens_T),
        context=batch.context,
        dropout=dropout,
    )
