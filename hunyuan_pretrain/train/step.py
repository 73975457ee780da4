"""One training step: micro-batches through megatron's schedule, losses, gradient reduction, optimizer.

The loss of a step is the mean cross-entropy over all target tokens of the global batch plus the router losses. Each
micro-batch contributes a sum already divided by the global number of target tokens. Gradients are therefore added over
micro-batches and ranks, and the result does not depend on how the batch is split.

Shapes: T tokens of a micro-batch on this rank, L layers, X numbers of packed router statistics
(model.routing.RouterStatistics).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.data.loader import MicroBatch, by_conversation
from hunyuan_pretrain.model.dropout import rates_of
from hunyuan_pretrain.model.engines import kept_scales, training_step
from hunyuan_pretrain.model.preference import PairLoss, PairSums
from hunyuan_pretrain.model.recycle_routing import draw_keys
from hunyuan_pretrain.model.routing import RouterStatistics, Routing, TrainingRouting
from hunyuan_pretrain.parallel import whereabouts
from hunyuan_pretrain.runtime.handover import handed_over, to_device
from hunyuan_pretrain.runtime.transfers import Outgoing
from hunyuan_pretrain.train.feed import Feed, Route, SentBatch, model_inputs, sent_ahead
from hunyuan_pretrain.train.logged_numbers import HostSeconds
from hunyuan_pretrain.train.optimizer import optimizer_step, prepare, update
from hunyuan_pretrain.train.policies import Judge, Numbers, shared_numbers
from hunyuan_pretrain.train.rerun import OwnGradients, compute_twice, is_due, start_reductions, without_reductions
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step_result import LaunchedStep, StepResult
from hunyuan_pretrain.train.update_norm import update_norm


@dataclass(frozen=True)
class Gradients:
    """Results of one pass over the global batch on this rank; the reduced gradients themselves are in the model's
    buffers."""

    losses: list[Tensor]  # of each micro-batch, on the last stage
    statistics: list[Tensor]  # packed router statistics (L, X) of each micro-batch
    num_target_tokens: Tensor  # fp64 (), on the device
    data_wait_seconds: float  # of this rank; batches are read while the previous step runs
    target_bytes: int  # of this rank's batch


def compute_gradients(run: Run, stage: StageConfig, step: int, *, in_fp8: bool = True) -> Gradients:
    """Zero the gradients, run forward and backward over this rank's micro-batches of the global batch, and reduce the
    gradients.

    stage: the stage of global step `step`, counted from 0. in_fp8: False disables the experiment's FP8 recipe, if it
    has one. Communicates: data-parallel group (token count, gradients), the model and the schedule, and the recipe's
    scales.
    """
    experiment, groups, started = run.experiment, run.groups, time.perf_counter()
    batches = run.loader.micro_batches(step)
    data_wait_seconds = time.perf_counter() - started
    mine = torch.stack([batch.loss_mask_T.sum() for batch in batches]).sum().double()
    num_target_tokens = sum_over(groups.dp, to_device(mine, run.device))
    divisor = num_target_tokens
    if stage.loss_average == "conversations":
        weighted = [by_conversation(batch) for batch in batches]
        batches, mine = [batch for batch, _ in weighted], torch.tensor(sum(n for _, n in weighted)).double()
        divisor = sum_over(groups.dp, to_device(mine, run.device))
    pair_loss = pair_loss_of(run, stage, batches)
    key_L = draw_keys(experiment.seed, step, experiment.model.num_layers)
    if run.recorded is not None and in_fp8:
        losses, statistics = run.recorded.forward_and_backward(run, stage, step, batches, divisor, key_L)
    else:
        route = partial(routing_of, run, stage, step, to_device(key_L, run.device))
        feed: Feed = partial(sent_ahead, run, batches)
        if run.noise is not None and run.noise.measures(step):
            feed = partial(run.noise.watched, feed)

        def compute(own: OwnGradients | None = None) -> tuple[list[Tensor], list[Tensor]]:
            count = len(batches)
            return forward_and_backward(
                run, stage, feed, count, divisor, route, in_fp8=in_fp8, own=own, pairs=pair_loss
            )

        losses, statistics = compute_twice(run, step, compute) if is_due(run, step) else compute()
    target_bytes = sum(batch.target_bytes for batch in batches)
    return Gradients(losses, statistics, num_target_tokens, data_wait_seconds, target_bytes)


def pair_loss_of(run: Run, stage: StageConfig, batches: Sequence[MicroBatch]) -> PairLoss | None:
    """The loss of a step of pairs; None for another task. Communicates: data-parallel group."""
    found = [(len(batch.pairs.reference_A) / 2, batch.pairs.chosen_tokens) for batch in batches if batch.pairs]
    if stage.task != "dpo":
        return None
    counts_2 = torch.tensor(found, dtype=torch.float64).sum(0)
    return PairLoss(stage.dpo_beta, stage.dpo_sft_weight, sum_over(run.groups.dp, to_device(counts_2, run.device)))


def routing_of(run: Run, stage: StageConfig, step: int, key_L: Tensor, group_n: Tensor, tokens_T: Tensor) -> Routing:
    """The routing of a micro-batch with these groups; `key_L` of the step, on the device."""
    num_global_groups = stage.global_batch_tokens // run.experiment.model.moe_routing_group_tokens
    # no text has the pad id in it, nor has the layout of a conversation
    is_counted_T = tokens_T != run.loader.pad_id if stage.is_dropless else None
    return TrainingRouting(run.experiment.seed, step, group_n, num_global_groups, key_L, is_counted_T)


def forward_and_backward(
    run: Run,
    stage: StageConfig,
    feed: Feed,
    num_micro_batches: int,
    divisor: Tensor,
    route: Route,
    *,
    in_fp8: bool,
    own: OwnGradients | None = None,
    pairs: PairLoss | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The work of `compute_gradients` on the device; returns the loss of each micro-batch, on the last stage, and the
    packed router statistics of each. divisor: of the summed cross-entropies, fp64 () on the device; own: see
    `run_schedule`; pairs: the loss of a step of pairs, whose losses have the numbers of `Pairs.weights`.

    What differs between the steps of a stage reaches it in the memory of tensors, except for the row counts of experts
    without a capacity, and the boundaries of documents where they are Python lists.
    """
    statistics: list[Tensor] = []
    dropout = rates_of(run.experiment.tuning, stage)

    def forward(batches: Iterator[SentBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        inputs = model_inputs(
            next(batches),
            rope_alpha=stage.rope_alpha,
            loss_tokens=divisor.float() if pairs is None else 1.0,
            route=route,
            pair_loss=pairs,
            dropout=dropout,
        )
        output, statistics_LX = model(inputs)
        statistics.append(statistics_LX)
        return output, as_summed_loss if pairs is None else as_loss_of_pairs

    for model in run.wrapped:
        model.zero_grad_buffer()
    tokens = stage.sequence_length * stage.micro_batch_sequences
    with training_step([model.module for model in run.wrapped], run.groups) if in_fp8 else nullcontext():
        losses = run_schedule(run, forward, feed, num_micro_batches, tokens, forward_only=False, own=own)
    return losses, statistics


def launch_step(
    run: Run,
    stage: StageConfig,
    step: int,
    *,
    before_update: Callable[[], None] | None = None,
    in_fp8: bool = True,
    is_stop_asked: bool = False,
    save_progress: int = 0,
    is_logged: bool = False,
    launch_seconds: float = 0.0,
) -> LaunchedStep:
    """Launch one optimizer step over this rank's micro-batches of the global batch, at the current learning rates. The
    host does not wait for the device, except with an offloaded optimizer, without a capacity of the experts, or if the
    step is judged before its update (`Run.judge`); a step that is not updated leaves weights, moments and FP8 scales as
    they were.

    before_update: called after gradients are reduced and before they are clipped. in_fp8: see `compute_gradients`.
    is_stop_asked, save_progress: of this rank; the result tells their sums to all. is_logged: also measure
    `StepResult.logged`; launch_seconds: how long this rank took to launch the step before.

    Communicates: as `compute_gradients`, all ranks (statistics), all groups of the optimizer.
    """
    whereabouts.phase("start of the step", step + 1)
    run.optimizer.zero_grad()
    judge = run.judge
    put_back = kept_scales(run.chunks) if judge is not None else None
    found = compute_gradients(run, stage, step, in_fp8=in_fp8)
    if before_update is not None:
        before_update()
    others = to_device(torch.tensor([float(is_stop_asked), float(save_progress)], dtype=torch.float64), run.device)
    noise = judged = logged = others.new_empty(0)
    if run.noise is not None and run.noise.measures(step):
        noise = run.noise.squares()  # before the update, which clips in place
    if is_logged:  # before it too
        host = HostSeconds(found.data_wait_seconds, launch_seconds)
        logged = run.logging.numbers(found.target_bytes, host, run.device)
    whereabouts.phase("optimizer", step + 1)
    if judge is not None:
        grad_norm = prepare(run.optimizer)
        of_update = update_norm(run.optimizer, grad_norm) if judge.needs_update_norm else None
        judged = shared_numbers(grad_norm.to(run.device), of_update, dist.get_rank())
    else:
        grad_norm = optimizer_step(run.optimizer)
    whereabouts.phase("sums over all ranks", step + 1)
    losses, pairs = [loss.reshape(-1) for loss in found.losses], others.new_empty(0)
    if stage.task == "dpo":
        width = len(PairSums._fields)
        pairs = _on_one_rank(run.groups, [loss[1:] for loss in losses], pairs.new_zeros(width))
        losses = [loss[:1] for loss in losses]
    others = torch.cat([others, judged, noise, logged, pairs])
    totals = _totals(run.groups, losses, 1, found.statistics, others)
    numbers = torch.cat([totals, torch.stack((grad_norm.to(run.device), found.num_target_tokens))])
    shape, waited = found.statistics[0].shape, found.data_wait_seconds
    launched = LaunchedStep(step, Outgoing(numbers), shape, waited, len(noise), len(judged), len(logged), len(pairs))
    if judge is None or put_back is None:
        return launched
    launched = _judged(run, judge, replace(launched, has_update_norm=judge.needs_update_norm))
    if launched.verdict.kind == "update":
        update(run.optimizer, grad_norm)
    else:
        put_back()
    return launched


def _judged(run: Run, judge: Judge, launched: LaunchedStep) -> LaunchedStep:
    """A step with the verdict on it. The host waits for its numbers."""
    result, stage = launched.result(), run.schedule.stage_of_step(launched.step)[0]
    numbers = Numbers(result.loss, result.grad_norm, result.update_norm)
    return replace(launched, verdict=judge.judge(launched.step, stage, numbers))


def train_step(
    run: Run,
    stage: StageConfig,
    step: int,
    *,
    before_update: Callable[[], None] | None = None,
    in_fp8: bool = True,
) -> StepResult:
    """As `launch_step`, and wait for the result."""
    return launch_step(run, stage, step, before_update=before_update, in_fp8=in_fp8).result()


class Scheduled(Protocol):
    """What megatron's schedule needs of a run."""

    @property
    def wrapped(self) -> Sequence[Any]:
        """Model chunks of this rank."""

    @property
    def groups(self) -> ProcessGroupCollection:
        """Process groups."""


def run_schedule(
    run: Scheduled,
    forward: Any,
    feed: Callable[[], Iterator[Any]],
    num_micro_batches: int,
    num_tokens: int,
    forward_only: bool,
    own: OwnGradients | None = None,
) -> list[Tensor]:
    """Pass the micro-batches of `feed`, each of `num_tokens` tokens (of all context-parallel ranks), through megatron's
    pipeline schedule.

    own: called once this rank's own gradients are complete, before any is reduced. Returns what the loss function keeps
    of each micro-batch, on the last stage; an empty list on the others.
    """
    chunks = list(run.wrapped)
    chunks[0].config.finalize_model_grads_func = partial(_finalize, groups=run.groups, own=own)
    with nullcontext() if own is None else without_reductions(chunks):
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[feed() for _ in chunks],
            model=chunks,
            num_microbatches=num_micro_batches,
            seq_length=num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def as_summed_loss(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Core's form of a loss that it must not divide: the loss, a token count that it sums (unused), the value to
    keep."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach()


def as_loss_of_pairs(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of what the model makes of pairs; keeps `Pairs.weights`."""
    return output[0], torch.zeros((), dtype=torch.int, device=output.device), output[1:].detach()


def _finalize(
    model: list[Any],
    num_tokens: Tensor | None = None,
    *,
    groups: ProcessGroupCollection,
    own: OwnGradients | None = None,
    **kwargs: Any,
) -> None:
    """Core's gradient reduction without the division by the token count: the loss is already divided."""
    if own is not None:
        if not own():
            return
        start_reductions(model)
    kwargs["pg_collection"] = groups
    finalize_model_grads(model, None, **kwargs)


def sum_over_batch(
    groups: ProcessGroupCollection, losses: list[Tensor], width: int, statistics: list[Tensor]
) -> tuple[Tensor, RouterStatistics]:
    """float64 sums over the global batch, on the CPU: of `losses` (a vector of `width` numbers per micro-batch, on the
    last stage) and of the statistics of all layers.

    Every rank of a stage routes different tokens. The loss is the same on all tensor-parallel ranks, so only the first
    contributes it. Communicates: all ranks.
    """
    none = torch.zeros(0, dtype=torch.float64, device=statistics[0].device)
    totals = _totals(groups, losses, width, statistics, none).cpu()
    return totals[:width], RouterStatistics.unpacked(totals[width:].view(statistics[0].shape))


def _totals(
    groups: ProcessGroupCollection, losses: list[Tensor], width: int, statistics: list[Tensor], others: Tensor
) -> Tensor:
    """The sums of `losses`, of `others` (fp64, of this rank) and of the statistics, as one vector on the device."""
    statistics_sum = torch.stack(statistics).double().sum(0).flatten()
    loss_sum = _on_one_rank(groups, losses, statistics_sum.new_zeros(width))
    return sum_over(dist.group.WORLD, torch.cat([loss_sum, others, statistics_sum]))


def _on_one_rank(groups: ProcessGroupCollection, losses: list[Tensor], zeros: Tensor) -> Tensor:
    """The sum of `losses` on the first tensor-parallel rank of the last stage, fp64; zeros elsewhere."""
    return torch.stack(losses).double().sum(0) if losses and groups.tp.rank() == 0 else zeros


def sum_over(group: dist.ProcessGroup | None, value: Tensor) -> Tensor:
    """Sum `value` over the ranks of `group`, in place, and return it."""
    if group is None or group.size() > 1:
        handed_over("all_reduce", value, is_written=True)
        dist.all_reduce(value, group=group)
    return value
