"""The runs below a folder: how far each is, and whether it goes on. Nothing is read but the ends of files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hunyuan_pretrain.checkpoint import folders
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.history import Segment, read_history, schedule_of
from hunyuan_pretrain.report.records import EVENTS, METRICS, Event, event_of, is_run
from hunyuan_pretrain.runtime.lock import holder_of

DEPTH = 4
"""Levels of folders that are looked into."""
TAIL_BYTES = 1 << 20
"""Of metrics.jsonl that is read: some records of the largest model."""
OVER = ("stopped", "finished", "failed")
"""Events after which a process trains no more."""


class State(NamedTuple):
    """Whether a run goes on."""

    word: str
    """running, finished, stopped, failed, ended (without a word: killed, or lost its machine), or not started."""
    reason: str = ""


class RunLine(NamedTuple):
    """A run on disk; None: not known."""

    folder: Path
    name: str
    stage: str | None
    step: int
    num_steps: int | None
    loss: float | None
    tokens_per_s: float | None
    checkpoint: int | None
    """Steps of the newest complete one."""
    saved_at: float | None
    """Seconds since 1970."""
    state: State
    job: str | None
    """Its id, of the newest submission."""

    def as_json(self) -> dict[str, Any]:
        state = {"state": self.state.word, "reason": self.state.reason}
        return {**self._asdict(), "folder": str(self.folder), **state}


def runs_below(folder: Path) -> list[RunLine]:
    """Every run in or below a folder, by path. Raises ConfigError if there is no such folder."""
    if not folder.is_dir():
        raise ConfigError("runs", [Problem("DIR", str(folder), "no such folder", "name the folder of your runs")])
    return [run_line(run_dir) for run_dir in _run_dirs(folder, DEPTH)]


def _run_dirs(folder: Path, depth: int) -> Iterator[Path]:
    """Folders of runs are not looked into: they may hold abandoned parts of the same run."""
    if is_run(folder) or (folder / "jobs").is_dir():
        yield folder
        return
    if depth == 0:
        return
    try:
        inside = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return  # not ours to read
    for path in inside:
        if not Path(path).name.startswith("."):
            yield from _run_dirs(Path(path), depth - 1)


def run_line(run_dir: Path) -> RunLine:
    """What a run directory says, whatever state its files are in."""
    try:
        segments = read_history(run_dir)
        schedule = schedule_of(segments) if segments else None
    except (ConfigError, OSError, ValueError):
        segments, schedule = [], None
    record = last_record(run_dir / METRICS)
    step = int(record.get("step", 0))
    events = [event_of(line) for line in _tail(run_dir / EVENTS)]
    saved, saved_at = _newest_checkpoint(run_dir)
    num_steps = schedule.num_steps if schedule is not None else None
    name = segments[-1].experiment.get("name") if segments else None
    stage = record.get("stage")
    return RunLine(
        run_dir,
        name if isinstance(name, str) else run_dir.resolve().name,
        stage if isinstance(stage, str) else None,
        max(step, saved or 0),
        num_steps,
        _float(record.get("loss")),
        _float(record.get("tokens_per_s")),
        saved,
        saved_at,
        state_of(run_dir, segments, events, saved, num_steps),
        _job(run_dir),
    )


def state_of(
    run_dir: Path, segments: Sequence[Segment], events: Sequence[Event], saved: int | None, num_steps: int | None
) -> State:
    """Whether a run goes on: by its lock, then by its last event, then by its newest checkpoint (`saved`)."""
    if (holder := holder_of(run_dir)) is not None:
        return State("running", holder.rstrip(","))
    if saved is not None and saved == num_steps:
        return State("finished")
    last = next((event for event in reversed(events) if event.kind in (*OVER, "started")), None)
    if last is not None and last.kind != "started":
        return State(last.kind, last.text)
    if last is not None or (segments and saved is not None):
        return State("ended", "it said nothing: killed, or its machine was lost")
    return State("not started") if not segments else State("ended", "before its first checkpoint")


def last_record(path: Path) -> dict[str, Any]:
    """The newest training record of metrics.jsonl; {} without one."""
    return next((line for line in reversed(_tail(path)) if "loss" in line and isinstance(line.get("step"), int)), {})


def _tail(path: Path) -> list[dict[str, Any]]:
    """The objects in the last complete lines of a file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL_BYTES, 0))
            text = file.read()
    except OSError:
        return []
    lines = text.split(b"\n")[:-1]
    found = []
    for line in lines[1 if size > TAIL_BYTES else 0 :]:
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict):
            found.append(parsed)
    return found


def _newest_checkpoint(run_dir: Path) -> tuple[int | None, float | None]:
    """(steps, time of saving) of the newest complete checkpoint."""
    try:
        for folder in reversed(folders.named_checkpoints(run_dir)):
            if folders.fault_of(folder) is None:
                return folders.step_of(folder), (folder / folders.MARKER).stat().st_mtime
    except OSError:
        pass
    return None, None


def _job(run_dir: Path) -> str | None:
    """The ids of the newest submission that was handed over."""
    try:
        submitted = sorted((run_dir / "jobs").glob("[0-9]*/submitted.json"), key=lambda path: path.parent.name)
        jobs = json.loads(submitted[-1].read_text(encoding="utf-8"))["jobs"] if submitted else []
        return " ".join(str(job) for job in jobs) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
