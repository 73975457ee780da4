"""A number over the steps of a run in bounded memory: smallest, mean and largest value of each stretch of steps.

Stretches begin one step long. When there would be more than MOST, each pair becomes one, so nothing that was read is
lost but its place within a stretch: a peak of one step in a million stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

MOST = 512
"""Stretches of a series: after the first MOST steps between half of this and this."""


class Stretch(NamedTuple):
    """Values of consecutive steps."""

    first: int
    last: int
    """The first and last step with a value."""
    low: float
    mean: float
    high: float


class Series:
    """Values by step, counted from 1, in any order."""

    def __init__(self) -> None:
        self._width = 1
        self._stretches: dict[int, tuple[int, int, int, float, float, float]] = {}
        """number -> first step, last step, values, lowest, sum, highest."""
        self.num_missing = 0
        """Values that are no finite number."""
        self.last: float | None = None
        """The value that was added last."""

    def add(self, step: int, value: float | None) -> None:
        """One more value."""
        if value is None or not math.isfinite(value):
            self.num_missing += 1
            return
        while (step - 1) // self._width >= MOST:
            self._halve()
        self._put((step - 1) // self._width, (step, step, 1, value, value, value))
        self.last = value

    def _put(self, number: int, new: tuple[int, int, int, float, float, float]) -> None:
        if (old := self._stretches.get(number)) is None:
            self._stretches[number] = new
            return
        first, last, count, low, total, high = old
        self._stretches[number] = (
            min(first, new[0]),
            max(last, new[1]),
            count + new[2],
            min(low, new[3]),
            total + new[4],
            max(high, new[5]),
        )

    def _halve(self) -> None:
        before, self._stretches, self._width = self._stretches, {}, 2 * self._width
        for number, stretch in before.items():
            self._put(number // 2, stretch)

    def __iter__(self) -> Iterator[Stretch]:
        for _, (first, last, count, low, total, high) in sorted(self._stretches.items()):
            yield Stretch(first, last, low, total / count, high)

    def __len__(self) -> int:
        return len(self._stretches)

    @property
    def num_values(self) -> int:
        """Finite values that were added."""
        return sum(count for _, _, count, *_ in self._stretches.values())

    @property
    def mean(self) -> float | None:
        """Of all values; None without any."""
        return sum(total for *_, total, _ in self._stretches.values()) / self.num_values if self._stretches else None
