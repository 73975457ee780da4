"""What the plan says of the steps that a run has trained: tokens per second, MFU and memory of rank 0."""

from __future__ import annotations

from collections.abc import Sequence

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.history import Segment
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.plan.hardware import Hardware, load, names
from hunyuan_pretrain.plan.memory import peaks
from hunyuan_pretrain.plan.timing import step_time
from hunyuan_pretrain.report.drawings import Level, short
from hunyuan_pretrain.report.records import Event


def hardware_of(events: Sequence[Event]) -> Hardware | None:
    """The profile of the GPUs that a run was started on last; None for others, and for a CPU."""
    started = next((event.text for event in reversed(events) if event.kind == "started"), "")
    words = started.replace(",", " ").split()
    if {"PCIe", "NVL"} & set(words):
        return None
    found = [name for name in names() if name.split("-")[0] in words]
    return load(found[0]) if len(found) == 1 else None


def levels_of(
    segments: Sequence[Segment], schedule: Schedule | None, last_step: int, hardware: Hardware | None
) -> tuple[dict[str, list[Level]], str]:
    """(name of a number -> what the plan says of it from step to step; why there is nothing)."""
    if schedule is None:
        return {}, "the run has no history"
    if hardware is None:
        return {}, f"no profile of its hardware; --hardware gives one: {', '.join(names())}, or a YAML file"
    found: dict[str, list[Level]] = {}
    for piece in schedule.pieces:
        segment = segments[piece.segment]
        if piece.first_step >= last_step or segment.world_size is None:
            continue
        try:
            step = step_time(segment.config, piece.stage, segment.world_size, hardware)
            peak = peaks(segment.config, piece.stage, segment.world_size)[0]
        except (ConfigError, ValueError) as error:
            return {}, f"not computed for stage {piece.stage.name}: {str(error).splitlines()[-1].strip()}"
        values = {
            "tokens_per_s": step.tokens_per_s,
            "mfu": step.mfu,
            "seconds": step.seconds,
            "device_peak_bytes": float(peak.kept + peak.transient + peak.beside_recorded),
        }
        for name, value in values.items():
            title = f"plan of stage {piece.stage.name} on {hardware.name}: {short(value)}"
            level = Level(title, piece.first_step + 1, min(piece.end_step, last_step), value)
            found.setdefault(name, []).append(level)
    return found, ""
