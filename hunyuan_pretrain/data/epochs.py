"""How often documents are read, counted over all packed datasets that hold them.

Packs of several lengths over one tokenized folder hold the same documents, so a cap on how often a document is read
counts all packs. A pack holds the documents of a tokenized folder whose lengths lie in a range; a folder is identified
by the digest of its shards. So the documents of a pack fall into a few length ranges, each read by the same packs, and
no single document needs to be examined. Only if the resulting bound would be refused are the lengths read, to see
whether a range holds any document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

NO_LIMIT = 2**31 - 1
"""The longest document that a tokenized folder can hold."""


@dataclass(frozen=True)
class Selection:
    """The documents of one tokenized folder that a packed dataset holds: those of `shortest` to `longest` tokens."""

    corpus: str
    """Digest of the tokenized folder."""
    folder: str
    """Its path, for messages."""
    shortest: int
    longest: int

    def __str__(self) -> str:
        if self.longest < NO_LIMIT:
            return f"documents of {self.shortest:,} to {self.longest:,} tokens of {self.folder}"
        return (
            f"documents of {self.shortest:,} tokens or more of {self.folder}"
            if self.shortest > 1
            else f"documents of {self.folder}"
        )


@dataclass(frozen=True)
class Reading:
    """How often some documents are read, and by which packed datasets."""

    documents: Selection
    by_pack: dict[str, Fraction]
    """Epochs of each packed dataset that holds them."""

    @property
    def epochs(self) -> float:
        """How often a document is read on average; which documents a partial epoch draws is random."""
        return float(sum(self.by_pack.values()))

    @property
    def at_most(self) -> int:
        """How often any one of them can be read at most, whatever is drawn."""
        return sum(math.ceil(epochs) for epochs in self.by_pack.values())

    def __str__(self) -> str:
        packs = " + ".join(f"{float(epochs):.3g} in {pack}" for pack, epochs in self.by_pack.items())
        return f"{self.epochs:.3g} times ({packs})" if len(self.by_pack) > 1 else f"{self.epochs:.3g} times"


def readings(pack: str, selections: Mapping[str, Sequence[Selection]], epochs: Mapping[str, Fraction]) -> list[Reading]:
    """The documents of `pack`, in ranges that the same packs read, the most-read first.

    `selections`: what each pack holds. `epochs`: how often each pack is walked. A pack without selections holds
    documents that no other pack has.
    """
    own = selections.get(pack) or (Selection(pack, pack, 1, NO_LIMIT),)
    found = [reading for selection in own for reading in _of_selection(selection, {**selections, pack: own}, epochs)]
    return sorted(found, key=lambda reading: -sum(reading.by_pack.values()))


def _of_selection(
    selection: Selection, selections: Mapping[str, Sequence[Selection]], epochs: Mapping[str, Fraction]
) -> Iterator[Reading]:
    others = [
        (pack, other) for pack in epochs for other in selections.get(pack, ()) if other.corpus == selection.corpus
    ]
    bounds = {selection.shortest, selection.longest + 1}
    for _, other in others:
        bounds |= {
            bound for bound in (other.shortest, other.longest + 1) if selection.shortest < bound <= selection.longest
        }
    ordered = sorted(bounds)
    for shortest, end in pairwise(ordered):
        by_pack: dict[str, Fraction] = {}
        for pack, other in others:
            if other.shortest <= shortest and end - 1 <= other.longest and epochs[pack]:
                # a pack of two copies of a folder holds its documents twice
                by_pack[pack] = by_pack.get(pack, Fraction(0)) + epochs[pack]
        yield Reading(Selection(selection.corpus, selection.folder, shortest, end - 1), by_pack)


def most_read(found: Sequence[Reading], holds: Callable[[Selection], bool], above: float = -1.0) -> Reading | None:
    """The first of `found`, from `readings`, that is read more than `above` times and holds a document; else None."""
    return next((reading for reading in found if reading.epochs > above and holds(reading.documents)), None)
