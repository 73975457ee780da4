"""The rows of the release's published tables: task, shots, metric, and the published number. Read from tables.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TABLES = Path(__file__).parent / "tasks" / "tables.yaml"


@dataclass(frozen=True)
class Row:
    """A row of a table, or a task that is in none."""

    task: str
    """Name in lm-eval, of this project's own tasks too."""
    row: str | None = None
    shots: int | None = None
    """None: as the task says."""
    metric: str | None = None
    """Such as acc, or with the filter of its answers exact_match,strict-match. None: all metrics of the task."""
    folders: tuple[str, ...] = ()
    """Folders of lm-eval's tasks that define it."""
    published: dict[str, float] = field(default_factory=dict, compare=False)
    """Percent, by table: base, instruct."""
    judged: str | None = None
    """For answers that another model judges: how they are written (judged.py)."""

    @property
    def name(self) -> str:
        """As the published table calls it."""
        return self.row or self.task

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of tasks that it belongs to."""
        return tuple(f"hunyuan-{name}" for name in self.published)


GROUPS = ("hunyuan-base", "hunyuan-instruct")
"""The rows of the two published tables."""


@cache
def known_rows() -> tuple[Row, ...]:
    """All rows of both tables, in their order."""
    entries: list[dict[str, Any]] = yaml.safe_load(TABLES.read_text(encoding="utf-8"))["rows"]
    return tuple(Row(**(entry | {"folders": tuple(entry.get("folders", ()))})) for entry in entries)


def rows_of(name: str) -> tuple[Row, ...]:
    """The rows of a group, or the one with this task or name; () if there is none."""
    if name in GROUPS:
        return tuple(row for row in known_rows() if name in row.groups)
    return tuple(row for row in known_rows() if name in (row.task, row.row))
