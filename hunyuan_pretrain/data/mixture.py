"""The global order of training: which sequence of which packed dataset each place of each step takes, a pure function of the seed.

Every answer is computed for the places asked for, in closed form; nothing grows with the length of training. Within a stage each source
gets its share of the tokens, as exactly as whole sequences can give it (by largest remainder), and evenly (after any number of sequences
within two of its share). A source is walked in a shuffled order, another one each epoch, and goes on in a later stage where it stopped in
an earlier one.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.data.balance import balanced_rows
from hunyuan_pretrain.data.epochs import Reading, Selection, most_read, readings
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.permutation import mixed_key, permuted


@dataclass(frozen=True)
class SourceSize:
    """A packed dataset, as far as a mixture has to know it."""

    sequences: int
    tokens: int
    """Without padding."""
    cost_order: np.ndarray | None = None
    """(sequences,) its sequences from the cheapest to the dearest; needed where a stage balances attention by groups."""
    documents: tuple[Selection, ...] = ()
    """Which documents it holds; without, documents that no other source has."""
    holds: Callable[[Selection], bool] = lambda selection: True
    """Whether there is a document in a part of `documents`; asked only where it decides."""


@dataclass(frozen=True)
class _Split:
    """A run of places shared out between two parts, each a source or a split of its own."""

    first: _Split | int
    second: _Split | int
    num_first: int
    num_all: int


class Mixture:
    """The sample order of all stages. `source_sizes` maps each path that the stages name to its size.

    `sources` are the paths in the order of their first use. Raises DataFormatError if a source's weight gives it no sequence at all, or if
    documents of a source would have been read more often than its max_epochs at the end of a stage, in whichever sources.
    """

    def __init__(self, stages: Sequence[StageConfig], source_sizes: Mapping[str, SourceSize], seed: int) -> None:
        self.seed = seed
        self.stages = stages
        self.sources = list(dict.fromkeys(source_path(source.path) for stage in stages for source in stage.data))
        self.sizes = [source_sizes[path] for path in self.sources]
        self.counts: list[dict[int, int]] = []
        """Sequences of each source, by its number in `sources`, in each stage, those that make up for skipped steps included."""
        # The data of a stage is its own part and one that makes up for its skipped steps, so that skipping changes nothing before it.
        self._parts: list[list[_Part]] = []
        taken = [0] * len(self.sources)
        for stage in stages:
            parts = []
            for steps in (stage.num_steps, num_skipped(stage)):
                if steps:
                    counts = self._share_out(stage, steps * stage.global_batch_sequences)
                    parts.append(_Part(steps * stage.global_batch_sequences, _interleaving(counts), tuple(taken), counts))
                    for source, count in counts.items():
                        taken[source] += count
            self._parts.append(parts)
            self.counts.append({source: sum(part.counts.get(source, 0) for part in parts) for source in parts[0].counts})
        self._check_epochs()

    def num_sequences(self, stage: int) -> int:
        """Sequences of a stage's data: (steps + skipped steps) x global batch."""
        return sum(self.counts[stage].values())

    def epochs(self, stage: int) -> dict[str, float]:
        """How often each source of a stage will have been walked when the stage ends, earlier stages included."""
        before = self._parts[stage][0].taken
        return {
            self.sources[source]: (before[source] + count) / self.sizes[source].sequences for source, count in self.counts[stage].items()
        }

    def tokens(self, stage: int) -> dict[str, float]:
        """Tokens of each source in a stage, without padding; of an epoch that is not whole, its share."""
        return {
            self.sources[source]: count * self.sizes[source].tokens / self.sizes[source].sequences
            for source, count in self.counts[stage].items()
        }

    def data_step(self, stage: int, step: int) -> int:
        """Which step of a stage's data a training step of the stage takes, both from 0: the step-th that is not skipped."""
        for first, last in self.stages[stage].skip_data_steps:
            if step >= first - 1:
                step += last - first + 1
        return step

    def lookup(self, stage: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row) of the given places of a stage's data: int64, same shape as `numbers`, which count its sequences from 0."""
        numbers = np.asarray(numbers, dtype=np.int64)
        assert numbers.size == 0 or (numbers.min() >= 0 and numbers.max() < self.num_sequences(stage)), "outside the stage"
        source = np.empty_like(numbers)
        row = np.empty_like(numbers)
        first = 0
        for part in self._parts[stage]:
            where = np.flatnonzero((numbers.ravel() >= first) & (numbers.ravel() < first + part.num_sequences))
            self._descend(part.tree, part.taken, where, numbers.ravel()[where] - first, source.reshape(-1), row.reshape(-1))
            first += part.num_sequences
        self._number_rows(self.stages[stage], source.reshape(-1), row.reshape(-1))
        return source, row

    def _descend(
        self, part: _Split | int, taken: Sequence[int], where: np.ndarray, rank: np.ndarray, source: np.ndarray, row: np.ndarray
    ) -> None:
        """Fill in `source`, and in `row` how many of its sequences went before, `taken` at the start, at `where`, the places of a part."""
        if not where.size:
            return
        if isinstance(part, int):
            source[where] = part
            row[where] = taken[part] + rank
            return
        before = _num_first_before(part, rank)
        is_first = _num_first_before(part, rank + 1) > before
        self._descend(part.first, taken, where[is_first], before[is_first], source, row)
        self._descend(part.second, taken, where[~is_first], (rank - before)[~is_first], source, row)

    def _number_rows(self, stage: StageConfig, source: np.ndarray, row: np.ndarray) -> None:
        """Turn how many sequences of a source went before into its row, in place: each epoch is a walk in another order."""
        for number in np.unique(source).tolist():
            size = self.sizes[number]
            of_source = np.flatnonzero(source == number)
            epochs, position = np.divmod(row[of_source], size.sequences)
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                key = mixed_key(self.seed, number, epoch)
                if stage.balance_attention == "group":
                    assert size.cost_order is not None, "a mixture that balances by groups is given the order of costs"
                    group = min(stage.balance_group_sequences or stage.global_batch_sequences, size.sequences)
                    rows = balanced_rows(position[chosen], size.cost_order, group, key)
                    if rows.max() >= size.sequences:
                        raise DataFormatError(
                            f"{self.sources[number]}/cost_order.npy: names sequence {rows.max()} of {size.sequences}; pack again"
                        )
                    row[of_source[chosen]] = rows
                else:
                    row[of_source[chosen]] = permuted(position[chosen], size.sequences, key)

    def _share_out(self, stage: StageConfig, total: int) -> dict[int, int]:
        """`total` sequences over the sources of a stage, so that their tokens are in the proportion of the weights."""
        weights = self._weights(stage)
        # a sequence of a source with more padding brings fewer tokens, so it takes more of them
        per_token = {
            source: weight * Fraction(self.sizes[source].sequences, self.sizes[source].tokens) for source, weight in weights.items()
        }
        exact = {source: total * share / sum(per_token.values()) for source, share in per_token.items()}
        counts = {source: int(share) for source, share in exact.items()}
        by_remainder = sorted(exact, key=lambda source: (counts[source] - exact[source], source))
        for source in by_remainder[: total - sum(counts.values())]:
            counts[source] += 1
        for source, count in counts.items():
            if count == 0 and total == stage.num_steps * stage.global_batch_sequences:
                share = f"{float(weights[source]):g} of {float(sum(weights.values())):g}"
                raise DataFormatError(
                    f"stage {stage.name}: {self.sources[source]} has weight {share}, which is none of the stage's {total} sequences; "
                    f"remove it or give it a share of at least 1/{total}"
                )
        return {source: count for source, count in counts.items() if count}

    def _weights(self, stage: StageConfig) -> dict[int, Fraction]:
        """Share of the stage's tokens by source, relative; a source that is named twice has the sum."""
        of_tier: dict[str | None, Fraction] = {}
        for entry in stage.data:
            of_tier[entry.tier] = of_tier.get(entry.tier, Fraction(0)) + Fraction(entry.weight)
        weights: dict[int, Fraction] = {}
        for entry in stage.data:
            weight = Fraction(entry.weight)
            if stage.tier_weights is not None:
                assert entry.tier is not None, "checked by the rules of the config"
                weight *= Fraction(stage.tier_weights[entry.tier]) / of_tier[entry.tier]
            source = self.sources.index(source_path(entry.path))
            weights[source] = weights.get(source, Fraction(0)) + weight
        return weights

    def readings(self, stage: int, path: str) -> list[Reading]:
        """How often the documents of a source have been read when the stage ends, in this and in other sources; most often first."""
        taken = dict(enumerate(self._parts[stage][0].taken))
        for source, count in self.counts[stage].items():
            taken[source] += count
        epochs = {self.sources[source]: Fraction(count, self.sizes[source].sequences) for source, count in taken.items() if count}
        return readings(path, {name: size.documents for name, size in zip(self.sources, self.sizes, strict=True)}, epochs)

    def most_read(self, stage: int, path: str, above: float = -1.0) -> Reading | None:
        """The documents of a source that have been read most often, more than `above` times, when the stage ends, or None."""
        return most_read(self.readings(stage, path), self.sizes[self.sources.index(path)].holds, above)

    def _check_epochs(self) -> None:
        problems = []
        for number, stage in enumerate(self.stages):
            tokens = self.tokens(number)
            for entry in stage.data:
                path = source_path(entry.path)
                found = None if entry.max_epochs is None else self.most_read(number, path, entry.max_epochs)
                if entry.max_epochs is None or found is None:
                    continue
                size = self.sizes[self.sources.index(path)]
                left = max(entry.max_epochs * size.tokens - (found.epochs * size.tokens - tokens[path]), 0)
                together = f": {found.documents}" if len(found.by_pack) > 1 else ""
                problems.append(
                    f"stage {stage.name}: {path}{together} would have been read {found}, max_epochs is {entry.max_epochs:g}; "
                    f"{left:,.0f} tokens are left for the stage, which asks for {tokens[path]:,.0f}"
                )
        if problems:
            raise DataFormatError("\n".join([*problems, "lower the weight or the stage's tokens, raise max_epochs, or give more data"]))


@dataclass(frozen=True)
class _Part:
    """A run of a stage's data that is shared out on its own."""

    num_sequences: int
    tree: _Split | int
    taken: tuple[int, ...]
    """Sequences of each source that went before."""
    counts: dict[int, int]


def num_skipped(stage: StageConfig) -> int:
    """Steps of a stage's data that are not trained on."""
    return sum(last - first + 1 for first, last in stage.skip_data_steps)


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
