"""What a job takes: the rows of `hunyuan-pretrain plan` about memory peaks, time and energy, and the same as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hunyuan_pretrain.config.derived import routed_model
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.plan.hardware import Hardware, names
from hunyuan_pretrain.plan.memory import Peak, host_missing, missing, peaks
from hunyuan_pretrain.plan.overheads import Beside, Failures, beside_steps, failures, sequences_of
from hunyuan_pretrain.plan.passes import Assumptions
from hunyuan_pretrain.plan.summary import AXIS_NAMES, Row, gib, size_text
from hunyuan_pretrain.plan.timing import StepTime, job_of, step_time

SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class StageCost:
    """A training stage, or all of them."""

    step: StepTime | None
    """None for the whole run."""
    days: float
    gpu_hours: float
    kwh: float
    beside: Beside | None = None
    """None for the whole run."""

    @property
    def days_with_saving(self) -> float:
        """Training, validation, saving, and steps computed twice."""
        assert self.beside is not None
        return self.days * (1 + self.beside.share)


def run_costs(
    experiment: Experiment, world_size: int, hardware: Hardware, assumptions: Assumptions | None = None
) -> list[StageCost]:
    """Of each stage, and last of the run; days, GPU-hours and kWh without saving, validation and failures."""
    costs = []
    for stage in experiment.stages:
        step = step_time(experiment, stage, world_size, hardware, assumptions)
        hours = stage.num_steps * step.seconds / 3600
        gpu_hours = hours * world_size
        job = job_of(experiment, stage, world_size, hardware, assumptions)
        beside = beside_steps(job, step.seconds, step.timeline.seconds)
        costs.append(StageCost(step, hours / 24, gpu_hours, gpu_hours * hardware.power_w / 1000, beside))
    total = StageCost(None, *(sum(getattr(cost, name) for cost in costs) for name in ("days", "gpu_hours", "kwh")))
    return [*costs, total]


def failures_of_run(costs: list[StageCost], world_size: int, hardware: Hardware) -> Failures:
    """Of the run that `run_costs` describes. Each stage loses half of its own interval between checkpoints."""
    found = [
        failures(
            cost.days_with_saving * SECONDS_PER_DAY, cost.beside.interval_s, world_size, hardware, cost.beside.late_s
        )
        for cost in costs
        if cost.beside is not None
    ]
    count = sum(each.count for each in found)
    return Failures(count, sum(each.seconds for each in found) / count if count else 0.0)


@dataclass(frozen=True)
class Costs:
    """Of an experiment on a number of ranks."""

    experiment: Experiment
    ranks: int
    hardware: Hardware | None
    assumptions: Assumptions
    peaks: list[list[Peak]]
    """Of each training stage and pipeline rank."""
    stages: list[StageCost]
    """Of each training stage, and last of the run; empty without hardware."""


def costs(
    experiment: Experiment, ranks: int, hardware: Hardware | None = None, assumptions: Assumptions | None = None
) -> Costs:
    """Memory peaks, and with hardware time and energy. Raises ConfigError for an assumption that cannot take effect,
    and for a format that the hardware does not have."""
    assumed = assumptions or Assumptions()
    check_assumptions(experiment, hardware, assumed)
    return Costs(
        experiment,
        ranks,
        hardware,
        assumed,
        [peaks(experiment, stage, ranks, assumed.imbalance) for stage in experiment.stages],
        run_costs(experiment, ranks, hardware, assumed) if hardware else [],
    )


def check_assumptions(experiment: Experiment, hardware: Hardware | None, assumptions: Assumptions) -> None:
    """Raise ConfigError for an assumption that cannot take effect."""
    problems = []
    if assumptions.document_tokens is not None and hardware is None:
        rule = "the length of documents changes the time of a step only"
        problems.append(Problem("--document-tokens", assumptions.document_tokens, rule, "add --hardware"))
    models = [routed_model(experiment.model, stage) for stage in experiment.stages]
    if assumptions.imbalance != 1 and all(model.moe_expert_capacity_factor is not None for model in models):
        rule = "experts have a capacity (model.moe_expert_capacity_factor), so no rank computes more rows than others"
        problems.append(Problem("--imbalance", assumptions.imbalance, rule, "leave it out"))
    if problems:
        raise ConfigError(experiment.name, problems)


# --- rows -------------------------------------------------------------------------------------------------------------


def rows(found: Costs) -> list[Row]:
    """Once for each shape of batch; then the run."""
    result: list[Row] = []
    groups = by_shape(found.experiment.stages)
    for numbers in groups:
        where = "" if len(groups) == 1 else f", {', '.join(found.experiment.stages[number].name for number in numbers)}"
        result += _memory_rows(found, f"memory peak on a GPU{where}", found.peaks[numbers[0]])
        if found.hardware:
            result += _time_rows(found, f"time{where}", numbers[0])
            result += _beside_rows(found, f"time{where}", numbers[0])
    if not found.hardware:
        result.append(Row("run", "time", "with --hardware", f"{', '.join(names())}, or a YAML file"))
    for number, stage in enumerate(found.stages[:-1]):
        result.append(_days_row(f"days of {found.experiment.stages[number].name}", stage))
    if found.hardware:
        whole = found.stages[-1]
        result += [
            _days_row("days", whole),
            Row("run", "GPU-hours", f"{whole.gpu_hours:,.0f}", "without saving, validation and failures"),
            Row("run", "energy", f"{whole.kwh:,.0f} kWh", f"{found.hardware.power_w:,.0f} W for a GPU and its share"),
            *_interrupted_rows(found),
        ]
    return result


def by_shape(stages: tuple[StageConfig, ...]) -> list[list[int]]:
    """Numbers of the stages that have the same batch."""
    shapes: dict[tuple[int, int, int], list[int]] = {}
    for number, stage in enumerate(stages):
        shape = stage.sequence_length, stage.micro_batch_sequences, stage.global_batch_sequences
        shapes.setdefault(shape, []).append(number)
    return list(shapes.values())


def live(peak: Peak) -> dict[str, int]:
    """Part -> bytes at the peak; they add up to `peak.total`. The update has neither activations nor messages, unless
    these stay reserved (`Peak.beside_recorded`)."""
    is_recorded = peak.validation is not None
    is_update = peak.transient == peak.update and not is_recorded
    return {
        "weights": peak.weights,
        "gradients": peak.gradients,
        "optimizer": peak.optimizer,
        "FP8 weights": 0 if is_update else peak.fp8_weights,
        "activations": 0 if is_update else peak.activations,
        "at work": 0 if is_update else peak.working,
        "messages": 0 if is_update else peak.messages,
        "update": peak.update if is_update else 0,
        "update or validation": peak.beside_recorded,
        "allocator": peak.slack,
        "CUDA and NCCL": peak.outside,
    }


def _memory_rows(found: Costs, group: str, of_ranks: list[Peak]) -> Iterator[Row]:
    fullest = max(of_ranks, key=lambda peak: peak.total)
    note = ", ".join(f"{name} {gib(size)}" for name, size in live(fullest).items() if size)
    if len(of_ranks) > 1:
        yield Row(group, "by pipeline rank", _each(peak.total for peak in of_ranks))
        note = f"pipeline rank {of_ranks.index(fullest)}: {note}"
    yield Row(group, "fullest rank", gib(fullest.total), note)
    if fullest.validation is not None:
        note = "by the recorded step, for its passes; the update and a validation need their own"
        yield Row(group, "reserved between steps", gib(fullest.passes), note)
    host = max(peak.host for peak in of_ranks)
    copied = f"{gib(max(peak.saved for peak in of_ranks))} for the copy of the state that a save writes"
    if found.hardware is None:
        yield Row(group, "host memory per rank", gib(host), copied)
        return
    yield Row(group, f"on {found.hardware.name}", *_fits(missing(fullest, found.hardware), found.hardware.memory_bytes))
    value, note = _fits(host_missing(of_ranks, found.hardware), found.hardware.host_memory_bytes)
    yield Row(group, "host", value, f"{note}; {gib(host)} for each of {found.hardware.node_gpus} ranks, {copied}")


def _fits(lacking: int, available: float) -> tuple[str, str]:
    if lacking > 0:
        return f"does not fit, by {size_text(lacking)}", f"there are {size_text(round(available))}"
    return "fits", f"{size_text(-lacking)} of {size_text(round(available))} are left"


def _each(sizes: Iterable[int]) -> str:
    return ", ".join(gib(size).removesuffix(" GiB") for size in sizes) + " GiB"


def _time_rows(found: Costs, group: str, number: int) -> Iterator[Row]:
    step, hardware = found.stages[number].step, found.hardware
    assert step is not None
    assert hardware is not None
    parts = sorted(step.parts.items(), key=lambda part: -part[1])
    shares = ", ".join(
        f"{part_name(part)} {each / step.seconds:.1%}" for part, each in parts if each > step.seconds / 1e3
    )
    length = found.experiment.stages[number].sequence_length
    document = min(found.assumptions.document_tokens or length, length)
    yield Row(group, "step", f"{step.seconds:.3g} s", f"{shares}; documents of {document:,} tokens")
    if len(step.timeline.slots) > 1:
        idle = ", ".join(f"{share:.1%}" for share in step.timeline.idle)
        waiting = ", ".join(map(str, step.timeline.in_flight))
        busiest = f"the passes take {step.timeline.bubble:.1%} longer than the busiest rank computes"
        note = f"of the step, idle, mean over all ranks; {busiest}; idle by rank: {idle}; passes in flight: {waiting}"
        yield Row(group, "pipeline bubble", f"{step.mean_idle:.1%}", note)
    per_day = f"{step.tokens_per_s * SECONDS_PER_DAY:.4g} a day"
    yield Row(group, "tokens/s", f"{step.tokens_per_s:,.0f}", per_day)
    peak = f"of {hardware.peak_bf16_flops_per_s / 1e12:,.0f} TFLOP/s in bf16"
    yield Row(group, "MFU", f"{step.mfu:.1%}", f"{peak}; {step.tflops_per_gpu:.0f} TFLOP/s a GPU in 6 N D")


def _beside_rows(found: Costs, group: str, number: int) -> Iterator[Row]:
    experiment, beside = found.experiment, found.stages[number].beside
    assert beside is not None
    evaluation, sets = experiment.evaluation, sequences_of(experiment.evaluation)
    if beside.validation_s is None:
        yield Row(group, "validation", "not planned", "all sequences of the data; set evaluation.max_sequences")
    elif sets:
        note = (
            f"{sum(each or 0 for each in sets):,} sequences of {len(sets)} sets, every {evaluation.every_steps} steps"
        )
        yield Row(group, "validation", f"{beside.validation_s:.3g} s", f"{note}: {beside.validation_share:.1%} more")
    every = experiment.checkpoint.save_every_steps
    note = f"every {every} steps: {beside.save_share:.1%} more" if every else "at the end"
    if beside.late_s:
        note = f"training waits {beside.save_wait_s:.3g} s of it, {note}"
    yield Row(group, "saving", f"{beside.save_s:.3g} s", f"{size_text(beside.saved_bytes)}, {note}")
    note = "from a request to stop to a complete checkpoint, at the longest; schedulers have to grant it, with a margin"
    yield Row(group, "stopping", f"{beside.stop_s:.3g} s", note)
    if (rerun := experiment.resilience.rerun_every) is not None:
        note = f"forward and backward once more every {rerun} steps (resilience.rerun_every)"
        yield Row(group, "computing twice", f"{beside.rerun_share:.2%} more", note)


def _interrupted_rows(found: Costs) -> Iterator[Row]:
    """Of the run, with all that interrupts it."""
    assert found.hardware is not None
    days = sum(cost.days_with_saving for cost in found.stages[:-1])
    is_all = all(cost.beside is not None and cost.beside.validation_s is not None for cost in found.stages[:-1])
    yield Row("run", "days with saving", f"{days:.3g}", "and validation" if is_all else "without validation")
    lost = failures_of_run(found.stages, found.ranks, found.hardware)
    hours = found.hardware.gpu_hours_between_failures
    note = f"{lost.count:.3g} failures, one in {hours:,.0f} GPU-hours; each loses {lost.lost_s / 60:.3g} minutes"
    yield Row("run", "days with failures", f"{days + lost.seconds / SECONDS_PER_DAY:.3g}", note)


def part_name(part: str) -> str:
    """A part of StepTime.parts as people read it."""
    axis = part.removeprefix("messages, ")
    return part if axis == part else f"{AXIS_NAMES[axis]} messages"


def _days_row(name: str, cost: StageCost) -> Row:
    return Row("run", name, f"{cost.days:.3g}")


def problems(found: Costs) -> list[str]:
    """Where the job does not fit: one line for each shape of batch and kind of memory."""
    lines = []
    for numbers in by_shape(found.experiment.stages) if found.hardware else []:
        of_ranks, stage = found.peaks[numbers[0]], found.experiment.stages[numbers[0]]
        assert found.hardware is not None
        fullest = max(of_ranks, key=lambda peak: peak.total)
        for kind, lacking in (
            (f"pipeline rank {of_ranks.index(fullest)}", missing(fullest, found.hardware)),
            ("the host", host_missing(of_ranks, found.hardware)),
        ):
            if lacking > 0:
                lines.append(f"stage {stage.name}: {kind} needs {gib(lacking)} more than {found.hardware.name} has")
    return lines


# --- data -------------------------------------------------------------------------------------------------------------


def as_data(found: Costs) -> dict[str, Any]:
    """Plain data for JSON: bytes, seconds, FLOP/s; stages in the order of the experiment."""
    stages = []
    for number, stage in enumerate(found.experiment.stages):
        data: dict[str, Any] = {"name": stage.name, "memory": [_peak_data(peak) for peak in found.peaks[number]]}
        if found.hardware:
            data |= _cost_data(found.stages[number])
            for peak, of_rank in zip(found.peaks[number], data["memory"], strict=True):
                of_rank["missing"] = missing(peak, found.hardware)
        stages.append(data)
    assumed = {name: value for name, value in asdict(found.assumptions).items() if name != "traffic"}
    run = None
    if found.hardware:
        lost = failures_of_run(found.stages, found.ranks, found.hardware)
        run = _cost_data(found.stages[-1]) | {"failures": lost.count, "failure_s": lost.lost_s}
    hardware = found.hardware.name if found.hardware else None
    return {"ranks": found.ranks, "hardware": hardware, "assumptions": assumed, "stages": stages, "run": run}


def _peak_data(peak: Peak) -> dict[str, int]:
    return asdict(peak) | {"slack": peak.slack, "total": peak.total, "host": peak.host}


def _cost_data(cost: StageCost) -> dict[str, Any]:
    data: dict[str, Any] = {"days": cost.days, "gpu_hours": cost.gpu_hours, "kwh": cost.kwh}
    if cost.step is None or cost.beside is None:
        return data
    return data | {"step": _step_data(cost.step), "beside": asdict(cost.beside)}


def _step_data(step: StepTime) -> dict[str, Any]:
    data: dict[str, Any] = {
        name: getattr(step, name) for name in ("seconds", "parts", "tokens_per_s", "mfu", "tflops_per_gpu")
    }
    timeline = step.timeline
    return data | {
        "mean_idle": step.mean_idle,
        "bubble": timeline.bubble,
        "idle": timeline.idle,
        "in_flight": timeline.in_flight,
    }
