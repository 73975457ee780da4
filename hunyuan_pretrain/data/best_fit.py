"""Best-fit decreasing bin packing for very many items: longest first, each into the fullest bin that has room for it.

Neither items nor bins are handled one at a time. Items of one length are interchangeable, and so are bins with equal
room. So the items of one length fill a row of neighbouring bins with equal room in one step. The fullest bin takes
items of successive lengths in one step, until it is full or a fuller bin can take the next. The result is a list of
such steps. For d different lengths there are O(d log capacity) of them, whatever the number of items: a step either
exhausts a length or leaves a whole row of bins with less than half of their room.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np


@dataclass(frozen=True)
class BestFit:
    """The bin of each item, items numbered from the longest to the shortest.

    Step i places items first_item[i] to first_item[i + 1]: the first per_bin[i] of them in bin first_bin[i], the next
    per_bin[i] in the bin after it, and so on.
    """

    num_bins: int
    first_item: np.ndarray
    """(steps + 1,) int64."""
    first_bin: np.ndarray
    """(steps,) int64."""
    per_bin: np.ndarray
    """(steps,) int64, at least 1."""

    def parts(self, items_at_a_time: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first item, int64 bins of the items from there on), in consecutive parts that cover all
        items."""
        num_items = int(self.first_item[-1])
        # (item - first item of its step) // per bin + first bin = (item + shift) // per bin. Dividing in float64 is
        # many times faster than in int64 and, rounded down, exact below 2**52, which the total capacity never reaches.
        shift, per_bin = self.first_bin * self.per_bin - self.first_item[:-1], self.per_bin.astype(np.float64)
        for begin in range(0, num_items, items_at_a_time):
            end = min(begin + items_at_a_time, num_items)
            # The steps that these items belong to; the first and the last may extend beyond them.
            low = int(np.searchsorted(self.first_item, begin, side="right")) - 1
            high = int(np.searchsorted(self.first_item, end, side="left"))
            step = np.repeat(np.arange(low, high), np.diff(np.clip(self.first_item[low : high + 1], begin, end)))
            yield begin, ((np.arange(begin, end) + shift[step]) / per_bin[step]).astype(np.int64)


def best_fit_decreasing(lengths: np.ndarray, counts: np.ndarray, capacity: int) -> BestFit:
    """Pack counts[i] items of lengths[i] each into bins of `capacity`.

    `lengths` (lengths,): from the longest to the shortest, no two equal, from 1 to capacity; `counts` (lengths,): at
    least 1.
    """
    assert not len(lengths) or (capacity >= lengths[0] and lengths[-1] > 0 and (np.diff(lengths) < 0).all()), (
        "lengths must fall"
    )
    steps = _Steps(lengths.astype(np.int64), counts.astype(np.int64), capacity)
    # Two items longer than half a bin never share one.
    group = steps.place_alone(int(np.searchsorted(-lengths, -(capacity // 2))))
    left = steps.count_of[group]
    while group < len(lengths):
        room = steps.tightest_room(group, left)
        left = steps.fill_row(group, left, room)
        if left and steps.rows[room]:
            group = steps.fill_bin(group, left, room)
            left = steps.count_of[group]
        elif not left:
            group += 1
            left = steps.count_of[group]
        steps.forget_if_empty(room)
    return steps.result()


class _Steps:
    """The state of a packing. A group is the items of one length. A row is (first bin, number) of neighbouring bins
    with equal room.

    Uses lists of Python integers, because numpy scalars are slow in a loop.
    """

    def __init__(self, lengths: np.ndarray, counts: np.ndarray, capacity: int) -> None:
        self.capacity = capacity
        self.length_of, self.count_of, self.rising = lengths.tolist(), [*counts.tolist(), 0], (-lengths).tolist()
        self.items_before = [0, *np.cumsum(counts).tolist()]
        self.tokens_before = [0, *np.cumsum(counts * lengths).tolist()]
        self.num_bins = 0
        self.rows: dict[int, list[tuple[int, int]]] = {}
        """Rows by the room they have left."""
        # Each room in `rows`, once. Rooms too small for the current length wait in a heap, negated so that the largest
        # comes first; the others form a stack. As lengths fall, rooms move from the heap to the stack, and no room that
        # moves is larger than the top of the stack.
        self.waiting: list[int] = []
        self.fitting: list[int] = []
        self.steps: list[int] = []
        """For each step in turn: items, first bin, items per bin."""

    def place_alone(self, num_groups: int) -> int:
        """Open a bin for each item of the first `num_groups` groups. Returns the next group."""
        if num_groups:
            self.num_bins = self.items_before[num_groups]
            self.steps += (self.num_bins, 0, 1)
            rooms = [self.capacity - length for length in self.length_of[:num_groups]]
            self.rows = {
                room: [row]
                for room, row in zip(rooms, zip(self.items_before, self.count_of, strict=False), strict=False)
                if room
            }
            # Largest first, so already a heap.
            self.waiting = [-room for room in reversed(self.rows)]
        return num_groups

    def tightest_room(self, group: int, left: int) -> int:
        """The smallest room that an item of the group fits in. If there is none, adds bins for the `left` items of the
        group."""
        length, waiting, fitting = self.length_of[group], self.waiting, self.fitting
        while waiting and -waiting[0] >= length:
            fitting.append(-heappop(waiting))
        if not fitting:
            number = -(-left // (self.capacity // length))
            self.rows[self.capacity] = [(self.num_bins, number)]
            self.num_bins += number
            fitting.append(self.capacity)
        return fitting[-1]

    def fill_row(self, group: int, left: int, room: int) -> int:
        """Fill bins that have `room` with as many items of the group as they hold, while items last. Returns the number
        left."""
        length, rows = self.length_of[group], self.rows[room]
        each = room // length
        filled = []
        while rows and left >= each:
            first, number = rows.pop()
            if left < each * number:
                rows.append((first + left // each, number - left // each))
                number = left // each
            self.steps += (each * number, first, each)
            filled.append((first, number))
            left -= each * number
        if filled:
            self.put_back(room - each * length, filled)
        return left

    def fill_bin(self, group: int, left: int, room: int) -> int:
        """Put the `left` items of the group, too few to fill a bin, into one bin that has `room`. Add the following
        groups while they fit whole and no fuller bin can take them. Returns the next group."""
        rows, waiting, after = self.rows[room], self.waiting, group + 1
        first, number = rows.pop()
        if number > 1:
            rows.append((first + 1, number - 1))
        tokens_begin = self.tokens_before[after] - left * self.length_of[group]
        end = bisect_right(self.tokens_before, tokens_begin + room, after) - 1
        if waiting and end > after and self.rising[end - 1] >= waiting[0]:
            end = bisect_left(self.rising, waiting[0], after, end)
        items = self.items_before[end] - self.items_before[after] + left
        self.steps += (items, first, items)
        self.put_back(room - (self.tokens_before[end] - tokens_begin), [(first, 1)])
        return end

    def put_back(self, room: int, rows: list[tuple[int, int]]) -> None:
        """Keep rows whose bins have `room` left, less than any bin that fits the current length."""
        if room in self.rows:
            self.rows[room] += rows
        elif room:
            self.rows[room] = rows
            heappush(self.waiting, -room)

    def forget_if_empty(self, room: int) -> None:
        """Drop the room on top of the stack if no bin has that room any more."""
        if not self.rows[room]:
            del self.rows[room]
            self.fitting.pop()

    def result(self) -> BestFit:
        """The steps as arrays."""
        items, first_bin, per_bin = np.array(self.steps, dtype=np.int64).reshape(-1, 3).T
        return BestFit(self.num_bins, np.concatenate([[0], np.cumsum(items)]), first_bin, per_bin)
