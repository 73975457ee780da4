"""The global order of training: which sequence of which packed dataset each place of each step takes, a pure function of the seed.

Every answer is computed for the places asked for, in closed form; nothing grows with the length of training. Within a stage each source
gets its share of the sequences exactly (by largest remainder) and evenly (after any number of sequences within two of its share). A
source is walked in a shuffled order, another one each epoch, and goes on in a later stage where it stopped in an earlier one.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.permutation import mixed_key, permuted


@dataclass(frozen=True)
class _Split:
    """A run of places shared out between two parts, each a source or a split of its own."""

    first: _Split | int
    second: _Split | int
    num_first: int
    num_all: int


class Mixture:
    """The sample order of all stages. `source_sizes` maps each path that the stages name to its number of sequences.

    `sources` are the paths in the order of their first use. Raises DataFormatError if a source's weight gives it no sequence at all.
    """

    def __init__(self, stages: Sequence[StageConfig], source_sizes: Mapping[str, int], seed: int) -> None:
        self.seed = seed
        self.sources = list(dict.fromkeys(source_path(source.path) for stage in stages for source in stage.data))
        self.sizes = [source_sizes[path] for path in self.sources]
        self.counts: list[dict[int, int]] = []
        """Sequences of each source, by its number in `sources`, in each stage."""
        self._trees: list[_Split | int] = []
        # Sequences that the stages before took from each source.
        self._taken: list[list[int]] = []
        taken = [0] * len(self.sources)
        for stage in stages:
            counts = self._share_out(stage)
            self.counts.append(counts)
            self._trees.append(_interleaving(counts))
            self._taken.append(list(taken))
            for source, count in counts.items():
                taken[source] += count

    def num_sequences(self, stage: int) -> int:
        """Sequences of a stage: steps x global batch."""
        return sum(self.counts[stage].values())

    def epochs(self, stage: int) -> dict[str, float]:
        """How often each source of a stage will have been walked when the stage ends, earlier stages included."""
        return {
            self.sources[source]: (self._taken[stage][source] + count) / self.sizes[source] for source, count in self.counts[stage].items()
        }

    def lookup(self, stage: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row) of the given places of a stage: int64, same shape as `numbers`, which count the stage's sequences from 0."""
        numbers = np.asarray(numbers, dtype=np.int64)
        assert numbers.size == 0 or (numbers.min() >= 0 and numbers.max() < self.num_sequences(stage)), "outside the stage"
        source = np.empty_like(numbers)
        row = np.empty_like(numbers)
        self._descend(self._trees[stage], stage, np.arange(numbers.size), numbers.ravel(), source.reshape(-1), row.reshape(-1))
        return source, row

    def _descend(self, part: _Split | int, stage: int, where: np.ndarray, rank: np.ndarray, source: np.ndarray, row: np.ndarray) -> None:
        """Fill in `source` and `row` at `where`, whose places are the `rank`-th ones of this part."""
        if not where.size:
            return
        if isinstance(part, int):
            source[where] = part
            row[where] = self._rows(part, self._taken[stage][part] + rank)
            return
        before = _num_first_before(part, rank)
        is_first = _num_first_before(part, rank + 1) > before
        self._descend(part.first, stage, where[is_first], before[is_first], source, row)
        self._descend(part.second, stage, where[~is_first], (rank - before)[~is_first], source, row)

    def _rows(self, source: int, occurrence: np.ndarray) -> np.ndarray:
        size = self.sizes[source]
        epochs = occurrence // size
        rows = np.empty_like(occurrence)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            rows[chosen] = permuted(occurrence[chosen] % size, size, mixed_key(self.seed, source, epoch))
        return rows

    def _share_out(self, stage: StageConfig) -> dict[int, int]:
        total = stage.num_steps * stage.global_batch_sequences
        weights: dict[int, Fraction] = {}
        for entry in stage.data:
            source = self.sources.index(source_path(entry.path))
            weights[source] = weights.get(source, Fraction(0)) + Fraction(entry.weight)
        exact = {source: total * weight / sum(weights.values()) for source, weight in weights.items()}
        counts = {source: int(share) for source, share in exact.items()}
        by_remainder = sorted(exact, key=lambda source: (counts[source] - exact[source], source))
        for source in by_remainder[: total - sum(counts.values())]:
            counts[source] += 1
        for source, count in counts.items():
            if count == 0:
                share = f"{float(weights[source]):g} of {float(sum(weights.values())):g}"
                raise DataFormatError(
                    f"stage {stage.name}: {self.sources[source]} has weight {share}, which is none of the stage's {total} sequences; "
                    f"remove it or give it a share of at least 1/{total}"
                )
        return counts


def source_path(path: str) -> str:
    """The name under which a source is known: one for all spellings of a path."""
    return os.path.normpath(path)


def _interleaving(counts: Mapping[int, int]) -> _Split | int:
    """A tree over the sources that joins the two smallest parts again and again.

    A split keeps its first part within half a sequence of its share of the split. In such a tree a part that is split again never has more
    than two thirds of its parent (the other part was at least as large as each of its halves), so what the levels above are off by shrinks
    on its way down, and no source is ever two sequences off.
    """
    heap: list[tuple[int, int, _Split | int]] = [(count, source, source) for source, count in counts.items()]
    heapq.heapify(heap)
    tie_break = max(counts) + 1
    while len(heap) > 1:
        (num_first, _, first), (num_second, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        num_all = num_first + num_second
        heapq.heappush(heap, (num_all, tie_break, _Split(first, second, num_first, num_all)))
        tie_break += 1
    return heap[0][2]


def _num_first_before(split: _Split, rank: np.ndarray) -> np.ndarray:
    """How many of the first `rank` places of a split belong to its first part: its share, rounded."""
    assert 2 * split.num_all * split.num_all < 2**63, "a stage of more than two thousand million sequences"
    return (2 * rank * split.num_first + split.num_all) // (2 * split.num_all)
