"""A number over the steps of a run in bounded memory: smallest, mean and largest value of each stretch of steps.

Stretches begin one step long. When there would be more than MOST, each pair becomes one, so nothing that was read is
lost but its place within a stretch: a peak of one step in a million stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

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
        self._first = np.full(MOST, np.iinfo(np.int64).max)
        self._last = np.zeros(MOST, np.int64)
        self._count = np.zeros(MOST, np.int64)
        self._low, self._high = np.full(MOST, np.inf), np.full(MOST, -np.inf)
        self._total = np.zeros(MOST)
        self.num_missing = 0
        """Values that are no finite number."""
        self.last: float | None = None
        """The value that was added last."""

    def add(self, steps: Sequence[int], values: Sequence[float]) -> None:
        """More values, of as many steps."""
        at, found = np.asarray(steps, np.int64), np.asarray(values, np.float64)
        is_finite = np.isfinite(found)
        self.num_missing += int(len(found) - is_finite.sum())
        at, found = at[is_finite], found[is_finite]
        if not len(found):
            return
        while (at.max() - 1) // self._width >= MOST:
            self._halve()
        number = (at - 1) // self._width
        np.minimum.at(self._first, number, at)
        np.maximum.at(self._last, number, at)
        np.minimum.at(self._low, number, found)
        np.maximum.at(self._high, number, found)
        self._count += np.bincount(number, minlength=MOST)
        self._total += np.bincount(number, found, minlength=MOST)
        self.last = float(found[-1])

    def _halve(self) -> None:
        self._width *= 2
        for name, join, nothing in (
            ("_first", np.minimum, np.iinfo(np.int64).max),
            ("_last", np.maximum, 0),
            ("_count", np.add, 0),
            ("_low", np.minimum, np.inf),
            ("_high", np.maximum, -np.inf),
            ("_total", np.add, 0.0),
        ):
            before = getattr(self, name)
            before[: MOST // 2] = join(before[::2], before[1::2])
            before[MOST // 2 :] = nothing

    def __iter__(self) -> Iterator[Stretch]:
        (used,) = self._count.nonzero()
        means = self._total[used] / self._count[used]
        columns = (self._first[used], self._last[used], self._low[used], means, self._high[used])
        for row in zip(*(column.tolist() for column in columns), strict=True):
            yield Stretch(*row)

    @property
    def num_values(self) -> int:
        """Finite values that were added."""
        return int(self._count.sum())

    @property
    def mean(self) -> float | None:
        """Of all values; None without any."""
        return float(self._total.sum() / self._count.sum()) if self._count.any() else None
