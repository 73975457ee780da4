"""A run as the page of a report shows it."""

from __future__ import annotations

from collections.abc import Iterator

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.history import schedule_of
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.plan.charts import Html, element, number
from hunyuan_pretrain.plan.hardware import Hardware
from hunyuan_pretrain.report.drawings import Mark, short
from hunyuan_pretrain.report.planned import hardware_of, levels_of
from hunyuan_pretrain.report.records import RunFiles
from hunyuan_pretrain.report.runs import RunLine, run_line

MARKED = {
    "started": "sky",
    "stopped": "grey",
    "failed": "red",
    "save failed": "red",
    "alarm": "orange",
    "benchmarks failed": "orange",
    "skip": "violet",
    "rollback": "violet",
    "stop": "red",
    "branch": "violet",
}
"""Events that are marked in the chart of the loss."""
MOST_MARKS = 200


class Shown:
    """A run as the page shows it."""

    def __init__(self, files: RunFiles, colour: str, label: str, hardware: Hardware | None) -> None:
        self.files, self.colour, self.label = files, colour, label
        self.line: RunLine = run_line(files.run_dir)
        self.metrics, self.events = files.metrics, files.events
        self.problems = list(files.problems)
        self.schedule: Schedule | None = None
        try:
            self.schedule = schedule_of(files.segments) if files.segments else None
            self.levels, why = levels_of(
                files.segments, self.schedule, self.metrics.last_step, hardware or hardware_of(self.events)
            )
            self.without_plan = why
        except ConfigError as error:
            self.levels, self.without_plan = {}, "its history cannot be used"
            self.problems.append(str(error).splitlines()[-1].strip())

    def stage_marks(self) -> Iterator[Mark]:
        """The first step of each stage but the first."""
        for lane, first in self.schedule.first_steps.items() if self.schedule else ():
            if 0 < first < self.metrics.last_step:
                name = next(piece.stage.name for piece in self.schedule.pieces if piece.lane == lane)  # type: ignore[union-attr]
                yield Mark(f"stage {name} begins at step {first + 1:,}", first + 1, "waiting")

    def event_marks(self) -> list[Mark]:
        """Events that belong to a step that is shown."""
        found = [
            Mark(f"{event.kind} at step {event.step:,}: {event.text}", event.step, MARKED[event.kind])
            for event in self.events
            if event.kind in MARKED and event.step and event.step <= self.metrics.last_step
        ]
        return found[-MOST_MARKS:]


def swatch(colour: str) -> Html:
    """The colour of a run beside its name."""
    return element(
        "i", style=f"display:inline-block;width:.8em;height:.8em;margin-right:.4em;background:var(--{colour})"
    )


def cell(value: object, form: str = "") -> Html:
    """A number in a table, `form` says how; empty if it is none."""
    if not isinstance(value, (int, float)):
        return Html()
    return number(value, form.format(value) if form else short(value))
