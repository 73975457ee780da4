"""The gradient noise scale B_noise = tr(Sigma) / |G|^2, measured while training
(optimizer.measure_noise_scale_every_steps).

Sigma is the covariance of the gradient of one token, G the gradient of the whole distribution. A gradient over b tokens
has E|G_b|^2 = |G|^2 + tr(Sigma) / b, so gradients over two sizes give both (arXiv 1812.06162, appendix A.1):

    |G|^2     = (B |G_B|^2 - b |G_b|^2) / (B - b)
    tr(Sigma) = (|G_b|^2 - |G_B|^2) / (1/b - 1/B)

B is the global batch. b is the first micro-batch of each data-parallel rank: after its backward pass `main_grad` holds
exactly its gradient, not yet reduced, so the cost is reading the gradients once more. It needs no memory, works beside
overlapped reduction, which waits for the last micro-batch, and with one data-parallel rank. |G_b|^2 is averaged over
the ranks. The gradient of the first micro-batch is a sum divided by the tokens of the global batch; where micro-batches
differ in target tokens, with a coefficient of variation v, |G_b|^2 is too large by v^2 |G|^2. Sources are interleaved:
a batch holds each in its share, a micro-batch does not. If this adds s / b to |G_b|^2 and nothing to |G_B|^2, |G|^2 is
estimated too small by s / (B - b), so that the noise scale is an upper bound.

Measured are the matrices of attention and of the experts. Other weights (embedding, routers, norms) are left out: under
tensor or pipeline parallelism a rank holds only a part of the sum that is their gradient until the reduction.

Routed experts are reduced over fewer ranks: with EP ranks sharing experts, one rank's gradient is over the first
micro-batches of EP ranks. Their b is larger accordingly. All noise scales are in tokens of the global batch. A routed
expert sees p = top-k / E of them. If B_own is its noise scale in tokens that it sees, the value here is (B_own + 1 - p)
/ p: a token that goes elsewhere has the gradient 0, which is noise too. The formula of the experts' learning rate
divides the batch by E / top-k itself, so it takes the value of the dense matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from hunyuan_pretrain.config.derived import LEAST_MEASUREMENTS, Grid
from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.train.optimizer import sum_of_squares

T = TypeVar("T")

KINDS = ("dense", "experts")
"""Matrices of attention and shared experts; of routed experts."""
NUMBERS = 2 * len(KINDS)
"""Per measurement."""
DECAY = 0.99
"""Of the running sums, per measurement: an average over about the last 100. One estimate of |G|^2 is mostly noise while
the batch is below the noise scale."""


class Estimate(NamedTuple):
    """Unbiased, and so possibly negative."""

    trace: float
    """tr(Sigma), for a batch of one token."""
    signal: float
    """|G|^2."""


def estimate(small: float, big: float, small_tokens: float, big_tokens: float) -> Estimate:
    """From the squared norms of the mean gradient over `small_tokens` and over `big_tokens`."""
    trace = (small - big) / (1 / small_tokens - 1 / big_tokens)
    return Estimate(trace, (big_tokens * big - small_tokens * small) / (big_tokens - small_tokens))


class NoiseScale:
    """Running estimates of a run, the same on all ranks. Numerators and denominators are smoothed separately: a mean of
    ratios would be biased."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """state: from `state`, of a checkpoint."""
        state = state or {}
        self._sums = {kind: Estimate(*state.get("sums", {}).get(kind, (0.0, 0.0))) for kind in KINDS}
        self._next_step = int(state.get("next_step", 0))
        self.count = int(state.get("count", 0))
        """Measurements so far; of a checkpoint that did not count them, those since."""
        self.in_use: float | None = state.get("in_use")
        """Value for expert_lr_noise_scale_tokens=measured, fixed for the current stage: that of the dense matrices.
        None: nothing was measured before it."""

    def add(self, step: int, found: Mapping[str, Estimate]) -> None:
        """Add the estimates of a step; a step that was added before is ignored."""
        if step < self._next_step:
            return
        self._next_step = step + 1
        self.count += 1
        for kind, new in found.items():
            old = self._sums[kind]
            self._sums[kind] = Estimate(DECAY * old.trace + new.trace, DECAY * old.signal + new.signal)

    def tokens(self, *kinds: str) -> float | None:
        """tr(Sigma) / |G|^2 of these kinds together; None while an estimate is not positive."""
        trace = sum(self._sums[kind].trace for kind in kinds)
        signal = sum(self._sums[kind].signal for kind in kinds)
        return trace / signal if trace > 0 and signal > 0 else None

    def begin_stage(self) -> None:
        """Use what was measured so far for the whole stage that begins; if that is nothing, or fewer measurements than
        LEAST_MEASUREMENTS, keep the value in use."""
        if self.count >= LEAST_MEASUREMENTS:
            self.in_use = self.tokens("dense") or self.in_use

    def fields(self) -> dict[str, float]:
        """For the record of a step; without those that are not known."""
        named = {"noise_scale_tokens": KINDS} | {f"noise_scale_tokens_{kind}": (kind,) for kind in KINDS}
        return {name: value for name, kinds in named.items() if (value := self.tokens(*kinds)) is not None}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; floats come back as they were."""
        return {"sums": dict(self._sums), "next_step": self._next_step, "count": self.count, "in_use": self.in_use}


class GradientNoise(NoiseScale):
    """Measures on this rank what `NoiseScale` smooths."""

    def __init__(
        self,
        every_steps: int,
        grid: Grid,
        pipeline_rank: int,
        wrapped: Sequence[DistributedDataParallel],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(state)
        self._every_steps, self._wrapped = every_steps, wrapped
        self._kinds: dict[Any, str] = {weight: kind for model in wrapped for weight, kind in _kinds_of(model.module)}
        self._replicas = {"dense": grid.dp, "experts": grid.expert_dp}
        self._data_parallel = grid.dp
        # 1F1B runs this many forward passes before its first backward pass
        self._warmup = grid.pp - pipeline_rank - 1
        self._small: Tensor | None = None

    def measures(self, step: int) -> bool:
        """Whether global step `step`, counted from 0, is measured."""
        return (step + 1) % self._every_steps == 0

    def watched(self, feed: Callable[[], Iterator[T]]) -> Iterator[T]:
        """The micro-batches of `feed`. Measures the gradients when the schedule asks for the one with which the second
        backward pass is paired: then the first one has ended and the second has not begun."""
        for number, batch in enumerate(feed()):
            if number == self._warmup + 1:
                self._small = self._squares((weight, weight.main_grad) for weight in self._kinds)
            yield batch

    def squares(self) -> Tensor:
        """fp64 (NUMBERS,) on the device, to be called after the reduction: this rank's share of the squared norms over
        the first micro-batch (mean over ranks with the same weights) and over the batch. Summed over all ranks they
        are whole."""
        assert self._small is not None, "config.noise_rules refuses a stage with so few micro-batches"
        small, self._small = self._small, None
        big = self._squares(reduced_gradients(self._wrapped))
        is_sharded = self._wrapped[0].ddp_config.use_distributed_optimizer
        # numbers of the host, one by one: a tensor made of them would be copied to the device, and the host would wait
        copies = [self._replicas[kind] for kind in KINDS]
        found = [square / count for square, count in zip(small, copies, strict=True)]
        found += [square / (1 if is_sharded else count) for square, count in zip(big, copies, strict=True)]
        return torch.stack(found)

    def add_numbers(self, step: int, stage: StageConfig, numbers: Sequence[float]) -> None:
        """`add` what `squares` gave, summed over all ranks; of any other step, nothing."""
        if not numbers:
            return
        found, batch = {}, stage.global_batch_tokens
        micro_batches = stage.global_batch_sequences // (stage.micro_batch_sequences * self._data_parallel)
        for kind, small, big in zip(KINDS, numbers[: len(KINDS)], numbers[len(KINDS) :], strict=True):
            parts = self._replicas[kind] * micro_batches
            found[kind] = estimate(small * parts**2, big, batch / parts, batch)
        self.add(step, found)

    def _squares(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """fp64 (2,), by kind, of (weight, gradient or part of it)."""
        found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        device = torch.device("cpu")
        for weight, gradient in gradients:
            device = gradient.device
            if gradient.numel() and weight in self._kinds:
                found[self._kinds[weight]].append(gradient)
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack([sum_of_squares(found[kind]) if found[kind] else nothing for kind in KINDS])


def _kinds_of(model: torch.nn.Module) -> Iterator[tuple[Tensor, str]]:
    """The weights that are measured, each with its kind: those sharded over tensor-parallel ranks, except the
    vocabulary's."""
    for name, weight in model.named_parameters():
        if getattr(weight, "is_routed_expert", False):
            yield weight, "experts"
        elif getattr(weight, "tensor_model_parallel", False) and not name.startswith(("embedding.", "output_layer.")):
            yield weight, "dense"


def reduced_gradients(wrapped: Sequence[DistributedDataParallel]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight with the part of its reduced gradient that this rank holds; flat."""
    for model in wrapped:
        is_sharded = model.ddp_config.use_distributed_optimizer
        for buffer in model.buffers + model.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                length = bucket.grad_data.numel() // (group.size() if is_sharded else 1)
                first = length * group.rank() if is_sharded else 0
                for weight in bucket.params_list:
                    start, end = (place - bucket.offset for place in buffer.param_index_map[weight][:2])
                    low, high = max(start, first), min(end, first + length)
                    yield weight, bucket.grad_data[low : max(low, high)]
