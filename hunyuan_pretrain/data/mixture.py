"""The global order of training: which sequence of which packed dataset each position of each step takes. It is a pure
function of the seed.

Every answer is computed in closed form for the requested positions; nothing grows with the length of training. Within a
stage each source gets its share of the tokens, as exactly as whole sequences allow (by largest remainder), and evenly:
after any number of sequences it is within two of its share. A source is walked in a shuffled order, a different one
each epoch, and continues in a later stage where it stopped in an earlier one.

If a run continues with a changed configuration, what has been read stays as it was. The rest of the current stage keeps
its order too, truncated or extended if its end has moved. If its sources, weights or order have changed, the rest is
split anew, each source continuing from where it stopped. So no sequence is left out of an epoch or read twice in it.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from hunyuan_pretrain.config.decisions import Window
from hunyuan_pretrain.config.schedule import Piece, Schedule
from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.data.balance import balanced_rows
from hunyuan_pretrain.data.epochs import Reading, Selection, most_read, readings
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.permutation import mixed_key, permuted


@dataclass(frozen=True)
class SourceSize:
    """What a mixture needs to know about a packed dataset."""

    sequences: int
    tokens: int
    """Without padding."""
    cost_order: np.ndarray | None = None
    """(sequences,) its sequences from the cheapest to the most expensive; needed if a stage balances attention by
    groups."""
    documents: tuple[Selection, ...] = ()
    """Which documents it holds. If empty, it holds documents that no other source has."""
    holds: Callable[[Selection], bool] = lambda selection: True
    """Whether a part of `documents` contains any document. Called only if the answer matters."""


@dataclass(frozen=True)
class _Split:
    """A run of positions split between two parts, each a source or another split."""

    first: _Split | int
    second: _Split | int
    num_first: int
    num_all: int


@dataclass(frozen=True)
class DataSegment:
    """What a configuration, in force from `first_step` on, says about the order of the data."""

    first_step: int
    stages: Sequence[StageConfig]
    seed: int
    names: Mapping[str, str] = field(default_factory=dict)
    """Path -> name of the source, where an earlier segment had that data under another path, or other data under the
    path."""
    left_out: Sequence[Window] = ()
    """Data that roll-backs left out."""

    def name(self, path: str) -> str:
        """The name of a path's source throughout the run."""
        return self.names.get(source_path(path), source_path(path))


class Mixture:
    """The sample order of all stages. `source_sizes` maps each path that the stages name, or the name of its source, to
    its size.

    `sources` are the sources in order of first use. `segments`: the configurations of a run that has changed, the last
    one with `stages` and `seed`; a stage's number is then its `Piece.lane`. Raises DataFormatError if a source's weight
    gives it no sequence at all, or if at the end of a stage documents of a source would have been read more often than
    its max_epochs, counted over all sources; ConfigError as `Schedule.resumed`.
    """

    def __init__(
        self,
        stages: Sequence[StageConfig],
        source_sizes: Mapping[str, SourceSize],
        seed: int,
        segments: Sequence[DataSegment] | None = None,
    ) -> None:
        ran = self._segments = segments or [DataSegment(0, stages, seed)]
        self.schedule = Schedule.of_segments(
            [(one.first_step, one.stages) for one in ran], [one.left_out for one in ran]
        )
        names = (
            segment.name(source.path) for segment in self._segments for stage in segment.stages for source in stage.data
        )
        self.sources = list(dict.fromkeys(names))
        self.sizes = [source_sizes[name] for name in self.sources]
        lanes: dict[int, list[Piece]] = {}
        for piece in self.schedule.pieces:
            lanes.setdefault(piece.lane, []).append(piece)
        self.stages = [pieces[-1].stage for pieces in lanes.values()]
        self._names = [self._segments[pieces[-1].segment] for pieces in lanes.values()]
        self._parts: list[list[_Part]] = []
        taken = [0] * len(self.sources)
        for pieces in lanes.values():
            parts = self._parts_of(pieces)
            for number, part in enumerate(parts):
                parts[number] = replace(part, taken=tuple(taken))
                for source, count in part.counts.items():
                    taken[source] += count
            self._parts.append(parts)
        self.counts: list[dict[int, int]] = [_sum_of_counts(parts) for parts in self._parts]
        """Per stage: sequences of each source, by its index in `sources`, including those that make up for skipped
        steps."""
        self._check_epochs()

    def _parts_of(self, pieces: Sequence[Piece]) -> list[_Part]:
        """The data of a stage in parts that are split over the sources separately, with `taken` still empty."""
        parts: list[_Part] = []
        for piece in pieces:
            stage, size = piece.stage, sum(part.num_sequences for part in parts)
            segment = self._segments[piece.segment]
            walk = _Walk(tuple(sorted(self._weights(stage, segment).items())), segment.seed, _group_of(stage))
            if parts and parts[-1].walk != walk:
                size = min(size, piece.first_position)
            parts = _cut(parts, min(size, piece.end_position))
            # Its own data and, separately, what makes up for its skipped steps: a skip changes nothing before it.
            own = piece.num_planned_sequences if not parts else piece.end_position - size
            for total in (own, piece.end_position - size - own):
                if total > 0:
                    counts = self._share_out(stage, segment, total, is_whole_stage=not parts)
                    parts.append(_Part(total, _interleaving(counts), (), counts, walk))
        last = pieces[-1]
        if last.num_steps * last.stage.global_batch_sequences < last.num_planned_sequences:
            # a later segment ended the stage earlier and read nothing of it; the next stage starts with the unread part
            parts = _cut(parts, last.next_position(last.num_steps))
        return parts

    def counts_before(self, stage: int, position: int) -> dict[int, int]:
        """Sequences of each source, by its index in `sources`, at the first `position` positions of a stage's data."""
        return _sum_of_counts(_cut(self._parts[stage], position))

    def num_sequences(self, stage: int) -> int:
        """Sequences of a stage's data: (steps + skipped steps) x global batch."""
        return sum(self.counts[stage].values())

    def epochs(self, stage: int) -> dict[str, float]:
        """How often each source of a stage will have been walked by the end of the stage, including earlier stages."""
        before = self._parts[stage][0].taken
        return {
            self.sources[source]: (before[source] + count) / self.sizes[source].sequences
            for source, count in self.counts[stage].items()
        }

    def tokens(self, stage: int) -> dict[str, float]:
        """Tokens of each source in a stage, without padding. A partial epoch counts proportionally."""
        return {
            self.sources[source]: count * self.sizes[source].tokens / self.sizes[source].sequences
            for source, count in self.counts[stage].items()
        }

    def lookup(self, stage: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row) at the given positions of a stage's data, counted from 0: int64, same shape as `numbers`."""
        numbers = np.asarray(numbers, dtype=np.int64)
        assert numbers.size == 0 or (numbers.min() >= 0 and numbers.max() < self.num_sequences(stage)), (
            "outside the stage"
        )
        source = np.empty_like(numbers)
        row = np.empty_like(numbers)
        first = 0
        for part in self._parts[stage]:
            where = np.flatnonzero((numbers.ravel() >= first) & (numbers.ravel() < first + part.num_sequences))
            self._descend(
                part.tree, part.taken, where, numbers.ravel()[where] - first, source.reshape(-1), row.reshape(-1)
            )
            self._number_rows(part.walk, where, source.reshape(-1), row.reshape(-1))
            first += part.num_sequences
        return source, row

    def _descend(
        self,
        part: _Split | int,
        taken: Sequence[int],
        where: np.ndarray,
        rank: np.ndarray,
        source: np.ndarray,
        row: np.ndarray,
    ) -> None:
        """At `where`, the positions of a part, fill in `source`, and in `row` how many of its sequences came before,
        counted from `taken`."""
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

    def _number_rows(self, walk: _Walk, where: np.ndarray, source: np.ndarray, row: np.ndarray) -> None:
        """At `where`, replace the number of earlier sequences of the source by the row: each epoch walks in another
        order."""
        for number in np.unique(source[where]).tolist():
            size = self.sizes[number]
            of_source = where[source[where] == number]
            epochs, position = np.divmod(row[of_source], size.sequences)
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                key = mixed_key(walk.seed, number, epoch)
                if walk.group is not None:
                    if size.cost_order is None:
                        raise DataFormatError(
                            f"{self.sources[number]}: its data is no longer there, so its order by cost is not known"
                        )
                    group = min(walk.group, size.sequences)
                    rows = balanced_rows(position[chosen], size.cost_order, group, key)
                    if rows.max() >= size.sequences:
                        raise DataFormatError(
                            f"{self.sources[number]}/cost_order.npy: names sequence {rows.max()} of "
                            f"{size.sequences}; pack again"
                        )
                    row[of_source[chosen]] = rows
                else:
                    row[of_source[chosen]] = permuted(position[chosen], size.sequences, key)

    def _share_out(self, stage: StageConfig, segment: DataSegment, total: int, is_whole_stage: bool) -> dict[int, int]:
        """Split `total` sequences over a stage's sources so that their tokens are in proportion to the weights."""
        weights = self._weights(stage, segment)
        # a source with more padding has fewer tokens per sequence, so it gets more sequences
        per_token = {
            source: weight * Fraction(self.sizes[source].sequences, self.sizes[source].tokens)
            for source, weight in weights.items()
        }
        exact = {source: total * share / sum(per_token.values()) for source, share in per_token.items()}
        counts = {source: int(share) for source, share in exact.items()}
        by_remainder = sorted(exact, key=lambda source: (counts[source] - exact[source], source))
        for source in by_remainder[: total - sum(counts.values())]:
            counts[source] += 1
        for source, count in counts.items():
            if count == 0 and is_whole_stage:
                share = f"{float(weights[source]):g} of {float(sum(weights.values())):g}"
                raise DataFormatError(
                    f"stage {stage.name}: {self.sources[source]} has weight {share}, which gives it none of the "
                    f"stage's {total} sequences; "
                    f"remove it or give it a share of at least 1/{total}"
                )
        return {source: count for source, count in counts.items() if count}

    def _weights(self, stage: StageConfig, segment: DataSegment) -> dict[int, Fraction]:
        """Relative share of the stage's tokens by source; a source that is named twice gets the sum."""
        of_tier: dict[str | None, Fraction] = {}
        for entry in stage.data:
            of_tier[entry.tier] = of_tier.get(entry.tier, Fraction(0)) + Fraction(entry.weight)
        weights: dict[int, Fraction] = {}
        for entry in stage.data:
            weight = Fraction(entry.weight)
            if stage.tier_weights is not None:
                assert entry.tier is not None, "checked by the rules of the config"
                weight *= Fraction(stage.tier_weights[entry.tier]) / of_tier[entry.tier]
            source = self.sources.index(segment.name(entry.path))
            weights[source] = weights.get(source, Fraction(0)) + weight
        return weights

    def readings(self, stage: int, path: str) -> list[Reading]:
        """How often the documents of a source have been read by the end of the stage, in this and other sources; the
        most-read first."""
        taken = dict(enumerate(self._parts[stage][0].taken))
        for source, count in self.counts[stage].items():
            taken[source] += count
        epochs = {
            self.sources[source]: Fraction(count, self.sizes[source].sequences)
            for source, count in taken.items()
            if count
        }
        return readings(
            path, {name: size.documents for name, size in zip(self.sources, self.sizes, strict=True)}, epochs
        )

    def most_read(self, stage: int, path: str, above: float = -1.0) -> Reading | None:
        """The most-read documents of a source at the end of the stage, if read more than `above` times; else None."""
        return most_read(self.readings(stage, path), self.sizes[self.sources.index(path)].holds, above)

    def _check_epochs(self) -> None:
        problems = []
        for number, stage in enumerate(self.stages):
            if self._names[number] is not self._segments[-1]:
                continue  # the stage is over
            tokens = self.tokens(number)
            for entry in stage.data:
                path = self._names[number].name(entry.path)
                found = None if entry.max_epochs is None else self.most_read(number, path, entry.max_epochs)
                if entry.max_epochs is None or found is None:
                    continue
                size = self.sizes[self.sources.index(path)]
                left = max(entry.max_epochs * size.tokens - (found.epochs * size.tokens - tokens[path]), 0)
                together = f": {found.documents}" if len(found.by_pack) > 1 else ""
                problems.append(
                    f"stage {stage.name}: {path}{together} would have been read {found}, max_epochs is "
                    f"{entry.max_epochs:g}; "
                    f"{left:,.0f} tokens are left for the stage, which asks for {tokens[path]:,.0f}"
                )
        if problems:
            raise DataFormatError(
                "\n".join([*problems, "lower the weight or the stage's tokens, raise max_epochs, or give more data"])
            )


@dataclass(frozen=True)
class _Walk:
    """What determines the order of a part, besides its length."""

    weights: tuple[tuple[int, Fraction], ...]
    seed: int
    group: int | None
    """Sequences per group with balance_attention=group, else None."""


@dataclass(frozen=True)
class _Part:
    """A run of a stage's data that is split over the sources separately."""

    num_sequences: int
    """Fewer than in the tree if the part was cut off."""
    tree: _Split | int
    taken: tuple[int, ...]
    """Sequences of each source that came before."""
    counts: dict[int, int]
    walk: _Walk


def _cut(parts: Sequence[_Part], num_sequences: int) -> list[_Part]:
    """The first `num_sequences` sequences of consecutive parts."""
    kept = []
    for part in parts:
        if part.num_sequences <= num_sequences:
            kept.append(part)
        elif num_sequences > 0:
            counts = {source: count for source, count in _counts_before(part.tree, num_sequences).items() if count}
            kept.append(replace(part, num_sequences=num_sequences, counts=counts))
        num_sequences -= part.num_sequences
    return kept


def _counts_before(tree: _Split | int, rank: int) -> dict[int, int]:
    """How many of the first `rank` positions of a tree each source has."""
    if isinstance(tree, int):
        return {tree: rank}
    of_first = int(_num_first_before(tree, np.array(rank)))
    return _counts_before(tree.first, of_first) | _counts_before(tree.second, rank - of_first)


def _sum_of_counts(parts: Sequence[_Part]) -> dict[int, int]:
    """Sequences of each source in all parts."""
    counts: dict[int, int] = {}
    for part in parts:
        for source, count in part.counts.items():
            counts[source] = counts.get(source, 0) + count
    return counts


def _group_of(stage: StageConfig) -> int | None:
    return (
        (stage.balance_group_sequences or stage.global_batch_sequences) if stage.balance_attention == "group" else None
    )


def source_path(path: str) -> str:
    """The name of a source: the same for all spellings of a path."""
    return os.path.normpath(path)


def _interleaving(counts: Mapping[int, int]) -> _Split | int:
    """A tree over the sources, built by repeatedly joining the two smallest parts.

    A split keeps its first part within half a sequence of its share of the split. In such a tree, a part that is split
    again never has more than two thirds of its parent, because the other part was at least as large as each of its
    halves. So errors from the levels above shrink on the way down, and no source is ever off by two sequences.
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
    """How many of the first `rank` positions of a split belong to its first part: its share, rounded."""
    assert 2 * split.num_all * split.num_all < 2**63, "a stage of more than two billion sequences"
    return (2 * rank * split.num_first + split.num_all) // (2 * split.num_all)
