"""What a step measured, and a step whose numbers are still on their way to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hunyuan_pretrain.model.preference import PairSums
from hunyuan_pretrain.model.routing import RouterStatistics
from hunyuan_pretrain.runtime.transfers import Outgoing
from hunyuan_pretrain.train.logged_numbers import LoggedNumbers
from hunyuan_pretrain.train.logged_numbers import read as read_logged
from hunyuan_pretrain.train.policies import UPDATED, Verdict, numbers_of


@dataclass(frozen=True)
class StepResult:
    """What one step measured; the same on every rank except data_wait_seconds."""

    loss: float  # mean cross-entropy of the target tokens, nats; with task=dpo the loss over pairs
    grad_norm: float  # global, before clipping
    num_target_tokens: int
    statistics: RouterStatistics  # of all layers, summed over the global batch, on the CPU
    data_wait_seconds: float = 0.0  # of this rank, for the batch
    update_norm: float | None = None  # train.update_norm, if the step was judged by it
    noise: tuple[float, ...] = ()  # train.noise_scale.GradientNoise.squares over all ranks, if the step is measured
    logged: LoggedNumbers | None = None  # of a step that is logged
    pairs: PairSums | None = None  # of a step with task=dpo


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose work is queued. Its numbers may still be on their way to the host, which waits only when it reads
    them."""

    step: int
    """Global, counted from 0."""
    numbers: Outgoing
    """fp64: loss, ranks asked to stop, progress of a save, what the step was judged by (policies.shared_numbers),
    noise, numbers of a logged step, sums over pairs, router statistics of all layers, gradient norm, and target
    tokens."""
    statistics_shape: torch.Size
    data_wait_seconds: float
    num_noise: int = 0
    num_judged: int = 0
    num_logged: int = 0
    num_of_pairs: int = 0
    has_update_norm: bool = False
    verdict: Verdict = UPDATED

    def is_stop_asked(self) -> bool:
        """Whether any rank had been asked to stop when it launched the step; the same on all ranks."""
        return bool(self.numbers.read()[1] > 0)

    def save_progress(self) -> int:
        """How far the ranks' saves were when they launched the step (checkpoint.saving.Saver), summed; the same on all
        ranks."""
        return int(self.numbers.read()[2])

    def result(self) -> StepResult:
        """Wait for the step and return what it measured."""
        sizes = [3, self.num_judged, self.num_noise, self.num_logged, self.num_of_pairs]
        sizes += [self.statistics_shape.numel(), 2]
        loss_stop_save, judged, noise, logged, pairs, statistics, norm_and_tokens = self.numbers.read().split(sizes)
        loss, (grad_norm, num_target_tokens) = loss_stop_save[0].item(), norm_and_tokens.tolist()
        update_norm: float | None = None
        if self.num_judged:
            _, grad_norm, update_norm = numbers_of(loss, judged, self.has_update_norm)
        return StepResult(
            loss,
            grad_norm,
            int(num_target_tokens),
            RouterStatistics.unpacked(statistics.view(self.statistics_shape)),
            self.data_wait_seconds,
            update_norm,
            tuple(noise.tolist()),
            read_logged(logged.tolist()) if self.num_logged else None,
            PairSums(*pairs.tolist()) if self.num_of_pairs else None,
        )
