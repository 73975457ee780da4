"""Compares a run with the plan of its experiment, after the first steps of a process.

Compared are the parameters of a rank and the tokens of a step, which must be equal; the bytes that the rank keeps
between steps; and on a GPU the peak of its tensors. Bytes sent are not: to count them, every operation has to be
watched (parallel/traffic.py, which `plan --dry-run` uses). Nothing here communicates, waits for the device or ends a
run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hunyuan_pretrain.config.derived import grid, stages_of
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.plan.buffers import weights_of_stage
from hunyuan_pretrain.plan.counts import RankMemory, memory_of_ranks
from hunyuan_pretrain.plan.memory import peaks
from hunyuan_pretrain.plan.summary import size_text
from hunyuan_pretrain.train.recorded_step import COMPUTED
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step_result import StepResult

FIRST_STEPS = COMPUTED + 1
"""Steps before the comparison: the first makes the optimizer's state, and with runtime.cuda_graphs the last of them is
recorded."""
TOLERANCE = 0.1
"""Of bytes."""


@dataclass(frozen=True)
class Figures:
    """Of one rank."""

    parameters: int
    tokens: int
    """Of a step, on all ranks."""
    kept: RankMemory
    peak: int | None
    """Bytes of tensors on its GPU; None on a CPU."""


def planned(
    experiment: Experiment, stages: Sequence[StageConfig], world_size: int, rank: int, is_on_gpu: bool
) -> Figures:
    """What the plan says of a rank in steps of these stages, the first of which is the one that is counted. Raises
    ValueError if the layout does not fit the number of ranks."""
    model, parallel = experiment.model, experiment.parallel
    pipeline_rank = grid(parallel, world_size).pipeline_rank(rank)
    parameters = sum(
        weight.size
        for number in stages_of(model, parallel, pipeline_rank)
        for weight in weights_of_stage(model, parallel, number, experiment.tuning)
    )
    parts = model, parallel, experiment.precision, world_size, pipeline_rank, experiment.optimizer
    of_ranks = memory_of_ranks(*parts, experiment.tuning)
    kept = of_ranks[rank % len(of_ranks)]
    peak = None
    if is_on_gpu:
        peak = kept.total + max(peaks(experiment, stage, world_size)[pipeline_rank].transient for stage in stages)
    return Figures(parameters, stages[0].global_batch_tokens, kept, peak)


# --- what is held -----------------------------------------------------------------------------------------------------


def parameters_of(run: Run) -> int:
    """Elements of this rank's parameters."""
    return sum(parameter.numel() for model in run.chunks for parameter in model.parameters())


def held(run: Run) -> RankMemory:
    """Bytes of the memory that core's buffers and the optimizer keep on this rank between steps, once a step has been
    launched. Padding counts; the optimizer's counters do not, nor gradients that are copied for an update."""
    buffers = [buffer for wrapped in run.wrapped for buffer in wrapped.buffers + wrapped.expert_parallel_buffers]
    weights = _storages(
        tensor for buffer in buffers for tensor in (buffer.params if buffer.param_data is None else [buffer.param_data])
    )
    weights |= _storages(
        parameter.data for model in run.chunks for parameter in model.parameters() if not parameter.requires_grad
    )
    gradients = _storages(buffer.grad_data for buffer in buffers)
    on_device: list[Any] = []
    on_host: list[Any] = []
    for part in run.optimizer.chained_optimizers:
        inner = part.optimizer
        is_offloaded = hasattr(inner, "cpu_optimizers")  # core's HybridDeviceOptimizer
        on_device += _state_of([inner.gpu_optimizer] if is_offloaded else [inner], with_gradients=is_offloaded)
        on_host += _state_of(inner.cpu_optimizers if is_offloaded else [], with_gradients=True)
    state, host = (
        sum(size for key, size in _storages(tensors).items() if key not in weights and key not in gradients)
        for tensors in (on_device, on_host)
    )
    return RankMemory(sum(weights.values()), sum(gradients.values()), state, host)


def _state_of(optimizers: Sequence[Any], with_gradients: bool) -> Iterator[Any]:
    """Tensors of torch optimizers: parameters and their state. An offloaded optimizer also keeps its gradients."""
    for optimizer in filter(None, optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        yield from parameters
        if with_gradients:
            yield from (parameter.grad for parameter in parameters if parameter.grad is not None)
        yield from (tensor for state in optimizer.state.values() for key, tensor in state.items() if key != "step")


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Address -> bytes of each block of memory that the tensors lie in."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


# --- comparison -------------------------------------------------------------------------------------------------------


class Causes(NamedTuple):
    """What of a run the plan does not know."""

    emulates_fp8: bool
    emulates_fp8_parameters: bool
    uses_kernels: bool
    has_capacity: bool

    @classmethod
    def of(cls, run: Run) -> Causes:
        config: Any = run.chunks[0].config
        precision, is_emulated = config.precision, not config.uses_transformer_engine
        return cls(
            precision.recipe is not None and is_emulated,
            precision.fp8_parameters and is_emulated,
            config.uses_kernels,
            config.model.moe_expert_capacity_factor is not None,
        )

    def of_kept(self, parts: str) -> str:
        """Of bytes kept between steps; `parts`: where they differ."""
        if self.emulates_fp8_parameters:
            return f"{parts}; FP8 is emulated here: weights that precision.fp8_parameters keeps in FP8 are in bf16"
        return f"{parts}; this version of megatron-core or the optimizer lays its memory out in another way"

    def of_peak(self, is_more: bool) -> str:
        """Of the peak on a GPU."""
        found = []
        if not self.has_capacity:
            found.append("without a capacity the rows of this rank's experts depend on the routing (plan --imbalance)")
        if self.emulates_fp8:
            found.append("FP8 is emulated here, and the plan counts Transformer Engine's kernels")
        if is_more and not self.uses_kernels:
            found.append("torch's functions between the matmuls keep more than the Triton kernels that the plan counts")
        if is_more:
            found.append("an attention backend that needs more, or a validation or save in these steps")
        return "; ".join(found or ["the plan adds up largest parts that need not meet"])


class Figure(NamedTuple):
    """One number, measured and planned."""

    name: str
    measured: int
    planned: int
    text: Callable[[int], str]
    tolerance: float
    cause: str

    @property
    def difference(self) -> float:
        """Over the planned number."""
        return self.measured / self.planned - 1

    @property
    def is_as_planned(self) -> bool:
        return abs(self.difference) <= self.tolerance

    def __str__(self) -> str:
        found = f"{self.name} {self.text(self.measured)}"
        if self.measured == self.planned:
            return found
        return f"{found} (planned {self.text(self.planned)}, {100 * self.difference:+.2g}%)"


def compare(measured: Figures, plan: Figures, causes: Causes) -> list[Figure]:
    """Every figure that both have."""
    parts = ", ".join(
        f"{name} {size_text(getattr(measured.kept, name))} of {size_text(getattr(plan.kept, name))}"
        for name in ("weights", "gradients", "optimizer", "host")
        if getattr(measured.kept, name) != getattr(plan.kept, name)
    )
    memory = "weights, gradients and optimizer state"
    other_model = "this code builds another model than the plan counts: its memory, traffic and FLOPs are not the run's"
    other_batch = "the loader or the router leaves tokens out, while tokens_per_s and MFU count the planned ones"
    found = [
        Figure("parameters of this rank", measured.parameters, plan.parameters, _number, 0.0, other_model),
        Figure("tokens a step", measured.tokens, plan.tokens, _number, 0.0, other_batch),
        Figure(memory, measured.kept.total, plan.kept.total, size_text, TOLERANCE, causes.of_kept(parts)),
    ]
    if plan.kept.host:
        host = measured.kept.host, plan.kept.host
        found.append(Figure("offloaded optimizer", *host, size_text, TOLERANCE, causes.of_kept(parts)))
    if measured.peak is not None and plan.peak is not None:
        cause = causes.of_peak(measured.peak > plan.peak)
        found.append(Figure("peak of tensors", measured.peak, plan.peak, size_text, TOLERANCE, cause))
    return found


def _number(count: int) -> str:
    return f"{count:,}"


def told(figures: Sequence[Figure]) -> tuple[str, list[str]]:
    """(the line of what is as planned, a warning for each figure that is not)."""
    agreeing = [str(figure) for figure in figures if figure.is_as_planned]
    if not any(figure.name == "peak of tensors" for figure in figures):
        agreeing.append("peak of memory: on GPUs only")
    agreeing.append("bytes sent: not counted while training")
    warnings = [f"not as planned: {figure}: {figure.cause}" for figure in figures if not figure.is_as_planned]
    return f"as planned: {'; '.join(agreeing)}", warnings


class AsPlanned:
    """Compares the first steps of this process with the plan, once.

    Rank 0 writes to the log. The first rank of each other pipeline rank prints its warnings. The other ranks are built
    as the first of their pipeline rank; only without a capacity their peaks differ from its.
    """

    def __init__(self, run: Run) -> None:
        """Before the first step: the plan, and a peak that starts from what is held now."""
        world_size, self._rank = dist.get_world_size(), dist.get_rank()
        self._run, self._tokens, self._peak = run, 0, 0
        self._last = min(run.first_step + FIRST_STEPS, run.loader.num_steps)
        self._is_on_gpu = run.device.type == "cuda"
        self._is_done = self._rank % (world_size // run.experiment.parallel.pipeline_model_parallel_size) != 0
        self._try(lambda: self._begin(world_size))

    def after(self, done: int, result: StepResult) -> None:
        """A step has been read; `done` counts it."""
        self._try(lambda: self._measure(done, result))

    def _try(self, work: Callable[[], None]) -> None:
        if self._is_done:
            return
        try:
            work()
        except Exception as error:  # whatever it is, it is no reason to end a run
            self._is_done = True
            self._tell(f"not compared with the plan: {type(error).__name__}: {error}")

    def _begin(self, world_size: int) -> None:
        run = self._run
        stages = {stage.name: stage for stage in map(run.schedule.stage, range(run.first_step, self._last))}
        self._planned = planned(run.experiment, list(stages.values()), world_size, self._rank, self._is_on_gpu)
        if self._is_on_gpu:
            torch.cuda.reset_peak_memory_stats(run.device)

    def _measure(self, done: int, result: StepResult) -> None:
        run = self._run
        if done == run.first_step + 1:
            tokens_L = result.statistics.tokens
            if run.schedule.stage(run.first_step).is_dropless and tokens_L.unique().numel() == 1:
                tokens_L = tokens_L.clamp(min=self._planned.tokens)  # padding is routed and not counted
            self._tokens = int(tokens_L[(tokens_L - self._planned.tokens).abs().argmax()])
        if self._is_on_gpu:
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(run.device))
        if done < self._last:
            return
        self._is_done = True
        measured = Figures(parameters_of(run), self._tokens, held(run), self._peak if self._is_on_gpu else None)
        line, warnings = told(compare(measured, self._planned, Causes.of(run)))
        if self._rank == 0:
            run.log.line(line)
        for warning in warnings:
            self._tell(f"warning: {warning}")

    def _tell(self, line: str) -> None:
        if self._rank == 0:
            self._run.log.line(line)
        else:
            print(f"rank {self._rank}: {line}", file=sys.stderr, flush=True)
