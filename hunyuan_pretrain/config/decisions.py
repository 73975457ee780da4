"""The run's ledger, <run_dir>/decisions.jsonl: what was decided about bad steps, one JSON object per line.

Rank 0 appends each decision and flushes it to disk before it has any effect; nothing is ever removed. The file decides
when the run resumes, and when it is trained again: a run in a folder with a ledger and without a checkpoint takes the
decisions of the ledger at the same steps, whatever these steps compute this time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from hunyuan_pretrain.config.errors import ConfigError, Problem

LEDGER = "decisions.jsonl"

Window = tuple[str, int, int]
"""(stage, first, end): sequences [first, end) of the stage's data, counted from 0."""


class Decision(BaseModel):
    """One line of the ledger. Numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity"."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    time: str
    """UTC."""
    kind: Literal["skip", "rollback", "stop", "branch"]
    """branch: the user branched off after `step` steps, so later decisions before this line no longer apply."""
    cause: Literal["nonfinite", "spike", "rerun", "user"]
    step: int
    """Of the bad step, counted from 1 as in metrics.jsonl; branch: number of steps done."""
    tokens: int = 0
    """Of the run, trained before that step."""
    stage: str = ""
    values: dict[str, float] = {}
    """loss, grad_norm and, if it is measured, update_norm of the step."""
    thresholds: dict[str, float] = {}
    """The limit of each number that has one at this step."""
    data: tuple[Window, ...] = ()
    """Of the step; rollback: what is left out from now on."""
    to_step: int | None = None
    """rollback: number of steps done at the checkpoint to which the run went back."""
    number: int | None = None
    """rollback: counted from 1 over the whole ledger."""
    ranks: tuple[tuple[int, str, str], ...] = ()
    """rerun: (rank, host, device) of those whose two results differ."""


@dataclass(frozen=True)
class InForce:
    """The decisions that still apply: those of abandoned branches do not."""

    skips: frozenset[int] = frozenset()
    """Steps, counted from 1, whose update is left out."""
    rollbacks: tuple[Decision, ...] = ()
    """In the order of their `to_step`."""
    num_written: int = 0
    """Roll-backs in the ledger, in force or not."""

    @property
    def number(self) -> int:
        """Of the last roll-back in force; 0: there is none."""
        return self.rollbacks[-1].number or 0 if self.rollbacks else 0

    def num_skipped(self, steps: int) -> int:
        """How many of the first `steps` steps updated nothing."""
        return sum(step <= steps for step in self.skips)


def read_decisions(run_dir: Path) -> list[Decision]:
    """The ledger of a run, oldest first; [] if it has none. A last line that a kill has cut off is not a decision: it
    had no effect.

    Raises ConfigError if another line is damaged, OSError if the file cannot be read.
    """
    path = run_dir / LEDGER
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            found.append(Decision.model_validate_json(line))
        except ValueError as error:
            rule = f"line {number} is damaged: {str(error).splitlines()[0]}"
            hint = "restore the file from a copy; without it, earlier decisions of the run would be forgotten"
            raise ConfigError(str(path), [Problem("decisions", Problem.NO_VALUE, rule, hint)]) from None
    return found


def append_decision(run_dir: Path, decision: Decision) -> None:
    """Append a line and flush it to disk. Raises OSError; nothing of the line then remains."""
    path = run_dir / LEDGER
    line = decision.model_dump_json() + "\n"
    with path.open("ab") as file:
        end = _end_of_whole_lines(path)
        file.truncate(end)
        try:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def in_force(decisions: Sequence[Decision]) -> InForce:
    """The decisions that apply to the run as it is now."""
    skips: set[int] = set()
    rollbacks: list[Decision] = []
    num_written = 0
    for one in decisions:
        match one.kind:
            case "skip":
                skips.add(one.step)
            case "rollback":
                assert one.to_step is not None
                num_written += 1
                skips = {step for step in skips if step <= one.to_step}
                # what an abandoned roll-back left out is in the data of this one
                rollbacks = [before for before in rollbacks if _goes_back_to(before) < one.to_step] + [one]
            case "branch":
                skips = {step for step in skips if step <= one.step}
                rollbacks = [before for before in rollbacks if _goes_back_to(before) < one.step]
            case "stop":
                pass
    return InForce(frozenset(skips), tuple(rollbacks), num_written)


def _goes_back_to(rollback: Decision) -> int:
    assert rollback.to_step is not None
    return rollback.to_step


def _end_of_whole_lines(path: Path) -> int:
    """Length of the file without a last line that lacks its newline."""
    return path.read_bytes().rfind(b"\n") + 1
