"""What a search found, as the rows of `hunyuan-pretrain plan --search`, as settings to paste, and as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.errors import ConfigError, Problem, show_value
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.plan.layouts import Legal, Pipeline, yaml_lines
from hunyuan_pretrain.plan.memory import TO_SPARE
from hunyuan_pretrain.plan.passes import Assumptions
from hunyuan_pretrain.plan.search import Choice, Count, Found, search
from hunyuan_pretrain.plan.summary import Row, gib, size_text


def searches(
    experiment: Experiment, gpus: int, hardware: Hardware, assumptions: Assumptions, shown: int = 5
) -> list[Found]:
    """The best layouts for each shape of batch, named by the first stage that has it; batches are searched without
    their micro-batch. Raises ConfigError if none fits."""
    shapes: dict[tuple[int, int], StageConfig] = {}
    for stage in experiment.stages:
        shapes.setdefault((stage.sequence_length, stage.global_batch_sequences), stage)
    found = [search(experiment, stage, gpus, hardware, assumptions, shown) for stage in shapes.values()]
    problems = [_nothing_fits(experiment, one, gpus, hardware) for one in found if not one.best]
    if problems:
        raise ConfigError(experiment.name, problems)
    return found


def _nothing_fits(experiment: Experiment, found: Found, gpus: int, hardware: Hardware) -> Problem:
    memory = [count for count in (found.peak, found.state, found.host) if count.nearest]
    if not memory:
        _, (_, first) = max(found.refused.combinations.items(), key=lambda item: item[1][0])
        fewer = next((size for size in range(gpus - 1, 0, -1) if any(Legal(experiment, found.stage, size))), None)
        rule = f"no layout is legal for stage {found.stage.name}; most often: {_setting(first.path)}: {first.rule}"
        return Problem("--gpus", gpus, rule, f"use {fewer} GPUs" if fewer else "")
    nearest = min(memory, key=lambda count: count.least)
    assert nearest.nearest is not None
    layout, recompute = nearest.nearest
    rule = (
        f"no layout fits into {hardware.name} for stage {found.stage.name}: the nearest, {layout}, recompute "
        f"{recompute}, lacks {size_text(round(nearest.least))}"
    )
    hint = "use more GPUs, optimizer.use_precision_aware_optimizer=true, precision.grad_reduce_in_fp32=false or "
    return Problem("--gpus", gpus, rule, hint + "optimizer.cpu_offload_fraction=1")


# --- rows -------------------------------------------------------------------------------------------------------------


def rows(found: Found, hardware: Hardware) -> list[Row]:
    """The best layouts, why the first one wins, and what was rejected."""
    group, best = f"layouts for {found.stage.name}", found.best
    result = [Row(group, f"{number}", f"{one.step.seconds:.4g} s", _text(one)) for number, one in enumerate(best, 1)]
    if len(best) > 1:
        gain = best[1].step.seconds - best[0].step.seconds
        result.append(Row(group, "1 against 2", f"{gain:.3g} s faster", _difference(best[0], best[1])))
    result += _rejected(found, hardware)
    return result


def _text(one: Choice) -> str:
    fullest = max(peak.total for peak in one.peaks)
    return f"{one.layout}, recompute {one.recompute}; MFU {one.step.mfu:.1%}, fullest rank {gib(fullest)}"


def _difference(winner: Choice, other: Choice) -> str:
    """Seconds of each part that differs by a hundredth of the step's difference or more, the largest first."""
    names = dict.fromkeys([*winner.step.parts, *other.step.parts])
    each = {name: winner.step.parts.get(name, 0.0) - other.step.parts.get(name, 0.0) for name in names}
    shown = sorted((item for item in each.items() if abs(item[1]) >= 5e-4), key=lambda item: -abs(item[1]))
    text = ", ".join(f"{name} {seconds:+.3g} s" for name, seconds in shown)
    return text or "no part differs by a millisecond: choose either"


def _rejected(found: Found, hardware: Hardware) -> Iterator[Row]:
    for setting, (values, problem) in found.refused.values.items():
        shown = ", ".join(_value(value) for value in values)
        yield Row("rejected values", setting, shown, problem.rule)
    group = "rejected layouts"
    for path, (number, problem) in found.refused.combinations.items():
        note = f"a rule, first for {show_value(problem.value)}: {problem.rule}"
        yield Row(group, _setting(path), f"{number:,}", note)
    room = f"{gib(round(hardware.memory_bytes))} less {TO_SPARE:.0%}"
    yield from _count(group, "state does not fit", found.state, f"weights, gradients and optimizer over {room}")
    yield from _count(group, "peak does not fit", found.peak, f"over {room}")
    yield from _count(group, "host does not fit", found.host, "host memory of a node")
    if found.slower.layouts:
        note = "than the best few: timed, by a lower bound, or with more recomputed than must be"
        yield Row(group, "slower", f"{found.slower.layouts:,}", note)


def _setting(path: str) -> str:
    """Of a rule's message, in which the stage is the only one."""
    return path.removeprefix("stages.0.")


def _value(value: Any) -> str:
    if not isinstance(value, Pipeline):
        return str(value)
    return f"{value.ranks}" + (f" x {value.chunks}" if value.chunks > 1 else "")


def _count(group: str, name: str, count: Count, what: str) -> Iterator[Row]:
    if count.nearest:
        layout, recompute = count.nearest
        note = f"{what}; the nearest by {size_text(round(count.least))}: {layout}, recompute {recompute}"
        yield Row(group, name, f"{count.layouts:,}", note)


# --- settings and data ------------------------------------------------------------------------------------------------


def settings(experiment: Experiment, found: Found, gpus: int) -> list[str]:
    """YAML lines of the best layout. A comment says so if other stages of the experiment refuse it."""
    winner = found.best[0]
    lines = yaml_lines(experiment, found.stage, winner.layout, winner.recompute)
    stages = [
        stage.model_copy(update={"micro_batch_sequences": winner.layout.micro}) if _same(stage, found.stage) else stage
        for stage in experiment.stages
    ]
    update = {"parallel": winner.experiment.parallel, "stages": tuple(stages)}
    problems = rules.find_problems(experiment.model_copy(update=update), gpus)
    return [*lines, *(f"# not for the whole experiment: {problem}" for problem in problems)]


def _same(stage: StageConfig, other: StageConfig) -> bool:
    return (stage.sequence_length, stage.global_batch_sequences) == (
        other.sequence_length,
        other.global_batch_sequences,
    )


def as_data(experiment: Experiment, found: Found, gpus: int) -> dict[str, Any]:
    """Plain data for JSON: seconds and bytes."""
    counts = {name: getattr(found, name).layouts for name in ("state", "peak", "host", "slower")}
    counts["rules"] = sum(number for number, _ in found.refused.combinations.values())
    layouts = [
        {
            "settings": one.layout.settings(one.recompute),
            "micro_batch_sequences": one.layout.micro,
            "seconds": one.step.seconds,
            "mfu": one.step.mfu,
            "parts": one.step.parts,
            "memory": [asdict(peak) | {"total": peak.total} for peak in one.peaks],
        }
        for one in found.best
    ]
    yaml = "\n".join(settings(experiment, found, gpus))
    return {"stage": found.stage.name, "layouts": layouts, "rejected": counts, "yaml": yaml}
