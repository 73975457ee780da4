"""Progress of long work on stderr: a bar on a terminal, otherwise a plain line at most every 10 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressReport:
    """Shows how many of `total` units are done; a context manager."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            title_column, note_column = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
            self._bar = Progress(
                title_column, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), note_column, console=console
            )
            self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> ProgressReport:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, units: int, note: str) -> None:
        """Add `units` to what is done; `note` is shown beside the percentage."""
        self._done += units
        if self._bar:
            self._bar.update(self._task, completed=self._done, note=note)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self._title}: {self._done / max(self._total, 1):.0%}, {note}", file=sys.stderr, flush=True)


_SHOWN_REASONS = 8


def describe_skipped(skipped: Mapping[str, int], examples: Mapping[str, str] | None = None) -> str:
    """One line about what was not read, most frequent reason first; "" if everything was."""
    by_number = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    if not by_number:
        return ""
    shown = [
        f"{count:,} {reason}" + (f" (such as {examples[reason]!r})" if examples and reason in examples else "")
        for reason, count in by_number[:_SHOWN_REASONS]
    ]
    if len(by_number) > _SHOWN_REASONS:
        shown.append(
            f"{sum(count for _, count in by_number[_SHOWN_REASONS:]):,} for {len(by_number) - _SHOWN_REASONS} "
            "other reasons"
        )
    return f"not read: {', '.join(shown)}"
