"""Reads what a run has written, also while it goes on: metrics.jsonl, events.jsonl, decisions.jsonl, segments.json.

A line that is not complete yet is read the next time, one that is no record is counted. metrics.jsonl is read once from
start to end, and later from where the reading stopped; after a resume has removed lines of it, from the start again.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.history import INDEX, RESOLVED, Segment, read_history
from hunyuan_pretrain.report.series import Series

METRICS, EVENTS, DECISIONS = "metrics.jsonl", "events.jsonl", "decisions.jsonl"
LISTS = ("expert_load", "overflow_share", "recycled_share", "dropped_share", "router_entropy")
"""Values of a record by layer. They are most of a line, and parsed only where they are kept."""
_LISTS_OF_LINE = re.compile(rb', "(?:' + "|".join(LISTS).encode() + rb')": \[(?:[^][]++|\[[^][]*+\])*+\]')
HEAT_COLUMNS = 48
"""Records whose values by layer are kept, evenly over the run: twice as many at most."""
OF_STAGE = ("loss", "bits_per_byte", "tokens_per_s", "mfu")
"""Numbers that are also kept by stage."""
AT_ONCE = 4096
"""Records whose numbers are put into their series together."""
MOST_NAMES = 400
"""Different numbers of a run that are kept."""


class Sample(NamedTuple):
    """The values by layer of one record."""

    step: int
    lists: dict[str, Any]


class Metrics:
    """metrics.jsonl of a run, reduced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._restart()

    def _restart(self) -> None:
        self.series: dict[str, Series] = {}
        self.by_stage: dict[str, dict[str, Series]] = {}
        """Stage -> the same for its steps only; in the order of the run."""
        self.samples: list[Sample] = []
        self._sample_every, self.num_records, self.num_bad, self.last_step = 1, 0, 0, 0
        self.last: dict[str, Any] = {}
        """The newest training record, without values by layer."""
        self._waiting: dict[tuple[str | None, str], tuple[list[int], list[float]]] = {}
        """(stage, or None for the whole run, name) -> steps and values that are not in their series yet."""
        self._offset, self._identity = 0, (0, 0)

    def read(self) -> None:
        """Read what is new. Raises OSError."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._restart()
            return
        with file:
            state = os.fstat(file.fileno())
            if (state.st_dev, state.st_ino) != self._identity or state.st_size < self._offset:
                self._restart()
                self._identity = (state.st_dev, state.st_ino)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._offset += len(line)
                self._add(line)
                if self.num_records % AT_ONCE == 0:
                    self._settle()
        self._settle()

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(_LISTS_OF_LINE.sub(b"", line))
            step = record.pop("step")
            if not isinstance(step, int) or isinstance(step, bool) or step < 1:
                raise ValueError("no step")
        except (ValueError, KeyError, TypeError, AttributeError):
            self.num_bad += 1
            return
        self.num_records, self.last_step = self.num_records + 1, max(self.last_step, step)
        self._keep(None, step, record)
        if isinstance(stage := record.get("stage"), str):
            self._keep(stage, step, {name: record[name] for name in OF_STAGE if name in record})
        if "loss" in record:
            self.last = {"step": step, **record}
            self._sample(step, line)

    def _keep(self, stage: str | None, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            kind = type(value)
            if kind is not float and kind is not int and value is not None:
                continue
            if (waiting := self._waiting.get((stage, name))) is None:
                waiting = self._waiting[stage, name] = [], []
            waiting[0].append(step)
            waiting[1].append(math.nan if value is None else value)

    def _settle(self) -> None:
        """Put what waits into its series."""
        for (stage, name), (steps, values) in self._waiting.items():
            place = self.series if stage is None else self.by_stage.setdefault(stage, {})
            if name in place or len(place) < MOST_NAMES:
                place.setdefault(name, Series()).add(steps, values)
        self._waiting = {}

    def _sample(self, step: int, line: bytes) -> None:
        if step % self._sample_every and self.samples:
            return
        try:
            record = json.loads(line)
        except ValueError:
            return
        self.samples.append(Sample(step, {name: record[name] for name in LISTS if _is_by_layer(record.get(name))}))
        if len(self.samples) > 2 * HEAT_COLUMNS:
            self._sample_every *= 2
            first, *others = self.samples
            self.samples = [first, *(sample for sample in others if sample.step % self._sample_every == 0)]


def _is_by_layer(value: Any) -> bool:
    """Whether it is a list of numbers, or of lists of numbers of one length."""
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(one, list) for one in value):
        lengths = {len(one) for one in value}
        return len(lengths) == 1 and 0 not in lengths and all(map(_are_numbers, value))
    return _are_numbers(value)


def _are_numbers(value: list[Any]) -> bool:
    return all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in value)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; lines that are none are left out, and a missing file has no lines."""
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                if isinstance(found, dict):
                    yield found
    except OSError:
        return


class Event(NamedTuple):
    """What happened to a run."""

    time: str
    kind: str
    step: int | None
    text: str


def events_of(run_dir: Path) -> list[Event]:
    """Events and decisions of a run, by time."""
    found = [event_of(line) for line in lines_of(run_dir / EVENTS)]
    found += [event_of({**line, "text": _decision_text(line)}) for line in lines_of(run_dir / DECISIONS)]
    return sorted(found, key=lambda event: event.time)


def event_of(line: Mapping[str, Any]) -> Event:
    step = line.get("step")
    return Event(
        str(line.get("time", "")),
        str(line.get("kind", "?")),
        step if isinstance(step, int) and not isinstance(step, bool) else None,
        str(line.get("text", "")),
    )


def _decision_text(line: Mapping[str, Any]) -> str:
    parts = [str(line.get("cause", ""))]
    for name in ("values", "thresholds"):
        if isinstance(line.get(name), dict) and line[name]:
            parts.append(f"{name} " + ", ".join(f"{key} {value}" for key, value in line[name].items()))
    if line.get("to_step") is not None:
        parts.append(f"back to step {line['to_step']}")
    if line.get("data"):
        parts.append(f"data {json.dumps(line['data'])}")
    return "; ".join(part for part in parts if part)


class RunFiles:
    """A run directory, read again by `read`."""

    def __init__(self, run_dir: Path) -> None:
        """Raises ConfigError if it is no run directory."""
        if not is_run(run_dir):
            what = "no such folder" if not run_dir.is_dir() else f"no run: it has neither {RESOLVED} nor {METRICS}"
            raise ConfigError("report", [Problem("RUN", str(run_dir), what, "name the run_dir of a run")])
        self.run_dir = run_dir
        self.metrics = Metrics(run_dir / METRICS)
        self.events: list[Event] = []
        self.segments: list[Segment] = []
        self.problems: list[str] = []
        """What could not be read."""

    def read(self) -> None:
        """Read what is new."""
        self.problems = []
        try:
            self.metrics.read()
        except OSError as error:
            self.problems.append(f"{METRICS}: {error.strerror}")
        if self.metrics.num_bad:
            self.problems.append(f"{METRICS}: {self.metrics.num_bad:,} lines are no records and are left out")
        self.events = events_of(self.run_dir)
        try:
            self.segments = read_history(self.run_dir)
        except (ConfigError, OSError, ValueError) as error:
            self.segments = []
            self.problems.append(f"its history cannot be read: {str(error).splitlines()[-1].strip()}")

    @property
    def name(self) -> str:
        """Of the experiment."""
        found = self.segments[-1].experiment.get("name") if self.segments else None
        return found if isinstance(found, str) and found else self.run_dir.resolve().name


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return any((folder / name).is_file() for name in (RESOLVED, INDEX, METRICS))
