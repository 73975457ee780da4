"""What an evaluation asks of a model: the probability of given tokens, and the likeliest token, at given positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

READ_ROWS = 512
"""Rows whose logits are in memory at a time."""


class Item(NamedTuple):
    """One text and what is read of it."""

    tokens: list[int]
    """What the model sees, from the first token of the text."""
    positions: list[int]
    """Where the prediction of the next token is read, any number of times at each."""
    targets: list[int]
    """The token whose probability is wanted, for each position."""


class Read(NamedTuple):
    """The answer to an item, a number for each of its positions, on the CPU."""

    logprob_n: Tensor
    """fp64, nats: of the target, after softmax over the whole padded vocabulary."""
    best_n: Tensor
    """int64: the likeliest token, the first of several."""


class Scorer(Protocol):
    """A model that answers items."""

    @property
    def max_length(self) -> int:
        """Positions of the model."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def score(self, items: Sequence[Item], num_ids: int | None = None) -> list[Read]:
        """The answers, in the order of the items. num_ids: `best_n` is the likeliest of the ids below; None: of
        all."""


class Pack(NamedTuple):
    """Items that go through the model together, one after the other in one sequence, each for itself."""

    members: list[int]
    """Numbers of the items."""
    num_tokens: int


def pack(lengths: Sequence[int], budget: int) -> list[Pack]:
    """Spread items over packs, the longest first; a pack has at most `budget` tokens, or one item."""
    packs: list[Pack] = []
    members: list[int] = []
    filled = 0
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        if members and filled + lengths[item] > budget:
            packs.append(Pack(members, filled))
            members, filled = [], 0
        members.append(item)
        filled += lengths[item]
    return [*packs, Pack(members, filled)] if members else packs


def sequence_item(tokens: Sequence[int], first: int) -> Item:
    """The item that reads the tokens from `first` (at least 1) on, each after all tokens before it."""
    return Item(list(tokens[:-1]), list(range(first - 1, len(tokens) - 1)), list(tokens[first:]))


Reduce = Callable[[Tensor, str], Tensor]
"""(tensor, "max", "min" or "sum") -> the same, reduced over the ranks that hold parts of the vocabulary; it may
be overwritten."""


def read_rows(
    hidden_nD: Tensor, weight_VD: Tensor, target_n: Tensor, first_id: int, num_ids: int | None, reduce: Reduce
) -> Tensor:
    """(n, 2) fp64: the log-probability of each target, and the likeliest id. The weight has the rows of the ids from
    first_id on. Raises nothing; with no rows it returns (0, 2)."""
    parts = [
        _read_chunk(hidden_nD[rows], weight_VD, target_n[rows], first_id, num_ids, reduce)
        for rows in _chunks(len(target_n))
    ]
    return torch.cat(parts) if parts else hidden_nD.new_zeros(0, 2, dtype=torch.float64)


def _chunks(rows: int) -> Iterator[slice]:
    yield from (slice(start, start + READ_ROWS) for start in range(0, rows, READ_ROWS))


def _read_chunk(
    hidden_cD: Tensor, weight_VD: Tensor, target_c: Tensor, first_id: int, num_ids: int | None, reduce: Reduce
) -> Tensor:
    logits_cV = torch.nn.functional.linear(hidden_cD, weight_VD).float()
    max_c = reduce(logits_cV.amax(1), "max")
    shifted_cV = logits_cV - max_c[:, None]
    sum_c = reduce(shifted_cV.exp().sum(1), "sum")
    mine_c = target_c - first_id
    is_here_c = (mine_c >= 0) & (mine_c < logits_cV.shape[1])
    label_c = shifted_cV.gather(1, mine_c.where(is_here_c, 0)[:, None])[:, 0] * is_here_c
    logprob_c = reduce(label_c, "sum") - sum_c.log()
    if num_ids is not None:
        logits_cV[:, max(num_ids - first_id, 0) :] = -math.inf
    value_c, place_c = logits_cV.max(1)
    best_c = reduce(value_c.clone(), "max")
    id_c = (place_c + first_id).where(value_c == best_c, torch.iinfo(torch.int64).max)
    return torch.stack((logprob_c.double(), reduce(id_c, "min").double()), dim=1)
