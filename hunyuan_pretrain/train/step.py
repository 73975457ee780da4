"""One training step: micro-batches through megatron's schedule, losses, gradient reduction, optimizer.

The loss of a step is the mean cross-entropy over all target tokens of the global batch plus the router losses. Each
micro-batch contributes a sum already divided by the global number of target tokens. Gradients are therefore added over
micro-batches and ranks, and the result does not depend on how the batch is split.

Shapes: T tokens of a micro-batch on this rank, L layers, X numbers of packed router statistics
(model.routing.RouterStatistics).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.data.loader import MicroBatch
from hunyuan_pretrain.model.engines import training_step
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.model.recycle_routing import draw_keys
from hunyuan_pretrain.model.routing import RouterStatistics, Routing, TrainingRouting
from hunyuan_pretrain.model.varlen_attention import Documents
from hunyuan_pretrain.parallel.context_parallel import ContextSlice, context_slice
from hunyuan_pretrain.runtime.handover import handed_over, to_device
from hunyuan_pretrain.runtime.transfers import Incoming, Outgoing
from hunyuan_pretrain.train.optimizer import optimizer_step
from hunyuan_pretrain.train.run import Run


@dataclass(frozen=True)
class StepResult:
    """What one step measured; the same on every rank except data_wait_seconds."""

    loss: float  # mean cross-entropy of the target tokens, nats
    grad_norm: float  # global, before clipping
    num_target_tokens: int
    statistics: RouterStatistics  # of all layers, summed over the global batch, on the CPU
    data_wait_seconds: float = 0.0  # of this rank, for the batch
    noise: tuple[float, ...] = ()  # train.noise_scale.GradientNoise.squares over all ranks, if the step is measured


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose work is queued. Its numbers may still be on their way to the host, which waits only when it reads
    them."""

    step: int
    """Global, counted from 0."""
    numbers: Outgoing
    """fp64: loss, ranks asked to stop, progress of a save, noise, router statistics of all layers, gradient norm, and
    target tokens."""
    statistics_shape: torch.Size
    data_wait_seconds: float
    num_noise: int = 0

    def is_stop_asked(self) -> bool:
        """Whether any rank had been asked to stop when it launched the step; the same on all ranks."""
        return bool(self.numbers.read()[1] > 0)

    def save_progress(self) -> int:
        """How far the ranks' saves were when they launched the step (checkpoint.saving.Saver), summed; the same on all
        ranks."""
        return int(self.numbers.read()[2])

    def result(self) -> StepResult:
        """Wait for the step and return what it measured."""
        sizes = [3, self.num_noise, self.statistics_shape.numel(), 2]
        loss_stop_save, noise, statistics, norm_and_tokens = self.numbers.read().split(sizes)
        grad_norm, num_target_tokens = norm_and_tokens.tolist()
        return StepResult(
            loss_stop_save[0].item(),
            grad_norm,
            int(num_target_tokens),
            RouterStatistics.unpacked(statistics.view(self.statistics_shape)),
            self.data_wait_seconds,
            tuple(noise.tolist()),
        )


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
    the sequences of the global batch, so they do not depend on which rank holds a group."""
    cu_seqlens: list[int]
    context: ContextSlice | None


Feed = Callable[[], Iterator[SentBatch]]
"""The micro-batches of a step, in order; one iterator for each model chunk."""


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
    return Share([*mine, group_n], cu_seqlens, context)


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
    route: Callable[[Tensor], Routing],
) -> ModelInputs:
    """What the model reads of a micro-batch.

    loss_tokens: divisor of the summed cross-entropy of the target tokens; infinity drops this loss. route: makes the
    routing from the indices (n,) of the routing groups.
    """
    tokens_T, positions_T, labels_T, loss_mask_T, group_n = batch.take()
    return ModelInputs(
        tokens_T=tokens_T,
        positions_T=positions_T,
        cu_seqlens=batch.cu_seqlens,
        rope_alpha=rope_alpha,
        labels_T=labels_T,
        loss_weight_T=loss_mask_T / loss_tokens,
        routing=route(group_n),
        context=batch.context,
    )


@dataclass(frozen=True)
class Gradients:
    """Results of one pass over the global batch on this rank; the reduced gradients themselves are in the model's
    buffers."""

    losses: list[Tensor]  # of each micro-batch, on the last stage
    statistics: list[Tensor]  # packed router statistics (L, X) of each micro-batch
    num_target_tokens: Tensor  # fp64 (), on the device
    data_wait_seconds: float  # of this rank; batches are read while the previous step runs


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
    key_L = draw_keys(experiment.seed, step, experiment.model.num_layers)
    if run.recorded is not None and in_fp8:
        losses, statistics = run.recorded.forward_and_backward(run, stage, step, batches, num_target_tokens, key_L)
    else:
        route = partial(routing_of, run, stage, step, to_device(key_L, run.device))
        feed: Feed = partial(sent_ahead, run, batches)
        if run.noise is not None and run.noise.measures(step):
            feed = partial(run.noise.watched, feed)
        losses, statistics = forward_and_backward(
            run, stage, feed, len(batches), num_target_tokens, route, in_fp8=in_fp8
        )
    return Gradients(losses, statistics, num_target_tokens, data_wait_seconds)


def routing_of(run: Run, stage: StageConfig, step: int, key_L: Tensor, group_n: Tensor) -> Routing:
    """The routing of a micro-batch with these groups; `key_L` of the step, on the device."""
    num_global_groups = stage.global_batch_tokens // run.experiment.model.moe_routing_group_tokens
    return TrainingRouting(run.experiment.seed, step, group_n, num_global_groups, key_L)


def forward_and_backward(
    run: Run,
    stage: StageConfig,
    feed: Feed,
    num_micro_batches: int,
    num_target_tokens: Tensor,
    route: Callable[[Tensor], Routing],
    *,
    in_fp8: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The work of `compute_gradients` on the device; returns the loss of each micro-batch, on the last stage, and the
    packed router statistics of each.

    What differs between the steps of a stage reaches it in the memory of tensors, except for the row counts of experts
    without a capacity, and the boundaries of documents where they are Python lists.
    """
    statistics: list[Tensor] = []

    def forward(batches: Iterator[SentBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        inputs = model_inputs(
            next(batches), rope_alpha=stage.rope_alpha, loss_tokens=num_target_tokens.float(), route=route
        )
        output, statistics_LX = model(inputs)
        statistics.append(statistics_LX)
        return output, as_summed_loss

    for model in run.wrapped:
        model.zero_grad_buffer()
    tokens = stage.sequence_length * stage.micro_batch_sequences
    with training_step([model.module for model in run.wrapped], run.groups) if in_fp8 else nullcontext():
        losses = run_schedule(run, forward, feed, num_micro_batches, tokens, forward_only=False)
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
) -> LaunchedStep:
    """Launch one optimizer step over this rank's micro-batches of the global batch, at the current learning rates. The
    host does not wait for the device, except with an offloaded optimizer or without a capacity of the experts.

    before_update: called after gradients are reduced and before they are clipped. in_fp8: see `compute_gradients`.
    is_stop_asked, save_progress: of this rank; the result tells their sums to all.

    Communicates: as `compute_gradients`, all ranks (statistics), all groups of the optimizer.
    """
    run.optimizer.zero_grad()
    found = compute_gradients(run, stage, step, in_fp8=in_fp8)
    if before_update is not None:
        before_update()
    others = to_device(torch.tensor([float(is_stop_asked), float(save_progress)], dtype=torch.float64), run.device)
    if run.noise is not None and run.noise.measures(step):
        others = torch.cat([others, run.noise.squares()])  # before the update, which clips in place
    grad_norm = optimizer_step(run.optimizer)
    totals = _totals(run.groups, [loss.reshape(1) for loss in found.losses], 1, found.statistics, others)
    numbers = torch.cat([totals, torch.stack((grad_norm.to(run.device), found.num_target_tokens))])
    return LaunchedStep(step, Outgoing(numbers), found.statistics[0].shape, found.data_wait_seconds, len(others) - 2)


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
) -> list[Tensor]:
    """Pass the micro-batches of `feed`, each of `num_tokens` tokens (of all context-parallel ranks), through megatron's
    pipeline schedule.

    Returns what the loss function keeps of each micro-batch, on the last stage; an empty list on the others.
    """
    chunks = run.wrapped
    chunks[0].config.finalize_model_grads_func = partial(_finalize, groups=run.groups)
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[feed() for _ in chunks],
        model=list(chunks),
        num_microbatches=num_micro_batches,
        seq_length=num_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def as_summed_loss(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Core's form of a loss that it must not divide: the loss, a token count that it sums (unused), the value to
    keep."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach()


def _finalize(
    model: list[Any], num_tokens: Tensor | None = None, *, groups: ProcessGroupCollection, **kwargs: Any
) -> None:
    """Core's gradient reduction without the division by the token count: the loss is already divided."""
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
    loss_sum = (
        torch.stack(losses).double().sum(0) if losses and groups.tp.rank() == 0 else statistics_sum.new_zeros(width)
    )
    return sum_over(dist.group.WORLD, torch.cat([loss_sum, others, statistics_sum]))


def sum_over(group: dist.ProcessGroup | None, value: Tensor) -> Tensor:
    """Sum `value` over the ranks of `group`, in place, and return it."""
    if group is None or group.size() > 1:
        handed_over("all_reduce", value, is_written=True)
        dist.all_reduce(value, group=group)
    return value
