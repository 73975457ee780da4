"""Equal work for ranks that wait for each other: pure functions on arrays.

Packed sequences have the same number of tokens, but attention inside a document of n tokens costs about n * n, so a
sequence that is one long document takes longer than one of short documents, and at the end of a step, or in every layer
where experts are spread over the ranks, all wait for the slowest. Two remedies, each useful alone:

- `deal` decides who takes which sequence of a step's batch. The batch stays what it is, so this changes nothing about
  training.
- `balanced_rows` makes batches of groups of sequences with nearly equal cost. A group is as random as a sequence was,
  but the sequences in it are of a kind, so a batch has fewer independent members and its gradient more noise (figures
  in docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hunyuan_pretrain.data.packing import Packing
from hunyuan_pretrain.data.permutation import mixed_key, permuted

_AT_A_TIME = 2**18


def squared_lengths(packing: Packing) -> np.ndarray:
    """Sum of n * n over the pieces of each sequence, the tail padding being one more: (sequences,) int64.

    That is what sequences of one length differ by in cost, so their order by cost needs no model.
    """
    offsets, size = packing.sequence_offsets, packing.sequence_length
    squares = np.empty(packing.num_sequences, dtype=np.int64)
    for begin in range(0, len(squares), _AT_A_TIME):
        part = offsets[begin : begin + _AT_A_TIME + 1]
        lengths = packing.piece_length[part[0] : part[-1]].astype(np.int64)
        padding = size - np.add.reduceat(lengths, part[:-1] - part[0])
        squares[begin : begin + len(padding)] = (
            np.add.reduceat(lengths * lengths, part[:-1] - part[0]) + padding * padding
        )
    return squares


def sequence_costs(squares: np.ndarray, sequence_length: int, attention_cost_tokens: float) -> np.ndarray:
    """Cost of each sequence, as the number of tokens that cost as much without any attention scores: float64, same
    shape as `squares`.

    `squares`: from `squared_lengths`. `attention_cost_tokens`: the length of a document in which the attention scores
    and values cost as much as all else, a property of the model; about 125,000 tokens for Hunyuan-Large by FLOPs.
    """
    costs: np.ndarray = sequence_length + squares / attention_cost_tokens
    return costs


def cost_order(costs: np.ndarray) -> np.ndarray:
    """Sequences from the cheapest to the dearest, of equal ones the first first: (sequences,) uint32."""
    assert len(costs) <= 2**32, "numbers of 32 bits"
    return np.argsort(costs, kind="stable").astype(np.uint32)


def balanced_rows(position: np.ndarray, order: np.ndarray, group_sequences: int, key: int) -> np.ndarray:
    """The rows at the given positions of a walk over all sequences, which count from 0 to sequences - 1: int64, same
    shape.

    Each `group_sequences` positions in a row take neighbours in `order` (see `cost_order`), from the cheapest to the
    dearest; groups come in a shuffled order that belongs to `key`. What does not fill a group comes last, taken from
    another place of the order with each key. Only the rows asked for are computed. `group_sequences` should be a
    multiple of data-parallel size x micro-batch and a divisor of the batch. It decides on the batches, so it must stay
    the same while a run lasts, also where the data-parallel size changes.
    """
    num_groups, rest = divmod(len(order), group_sequences)
    # Sorted, the sequences are: `gap` groups, the rest, all other groups.
    gap = mixed_key(key, 1) % (num_groups + 1)
    group, within = np.divmod(np.asarray(position, dtype=np.int64), group_sequences)
    is_rest = group == num_groups
    group = np.where(is_rest, gap, permuted(np.where(is_rest, 0, group), num_groups, key))
    slot = group * group_sequences + within + np.where(~is_rest & (group >= gap), rest, 0)
    rows: np.ndarray = order[slot].astype(np.int64)
    return rows


def deal(costs: np.ndarray, num_ranks: int, micro_batch_sequences: int) -> np.ndarray:
    """Deal the sequences of a step's batch out: (micro-batches, num_ranks, micro_batch_sequences) int64, numbers of
    sequences.

    `costs` (batch,), a multiple of num_ranks * micro_batch_sequences. Each sequence is dealt once. The costs of all
    micro-batches are near each other, nearest those of one index, which run side by side, and so are the totals of the
    ranks. Follows from the costs alone, the lower number first where they are equal, so that every rank finds the same.
    Micro-batches run from the dearest to the cheapest.
    """
    num_rows, remainder = divmod(len(costs), num_ranks * micro_batch_sequences)
    assert not remainder, f"{len(costs)} sequences for {num_ranks} ranks with micro-batches of {micro_batch_sequences}"
    # Dearest first, in rounds: each micro-batch gets one sequence a round, the dearer the less there is in it.
    members = np.argsort(-costs, kind="stable").reshape(micro_batch_sequences, -1)
    totals = np.zeros(members.shape[1])
    for round_number, members_of_round in enumerate(members):
        cheapest_first = np.argsort(totals, kind="stable")
        members[round_number, cheapest_first] = members_of_round.copy()
        totals += costs[members[round_number]]
    # Neighbours in cost run side by side, the dearest on the rank that has had the least.
    rows = np.argsort(-totals, kind="stable").reshape(num_rows, num_ranks)
    rank_totals = np.zeros(num_ranks)
    positions = np.empty((num_rows, num_ranks, micro_batch_sequences), dtype=np.int64)
    for row, micro_batches in enumerate(rows):
        ranks = np.argsort(rank_totals, kind="stable")
        positions[row, ranks] = members.T[micro_batches]
        rank_totals[ranks] += totals[micro_batches]
    return positions


@dataclass(frozen=True)
class Imbalance:
    """How unequal the work of a step is; 1 is equal everywhere."""

    by_micro_batch: np.ndarray
    """(micro-batches,) dearest rank / mean rank, for each micro-batch index."""
    step: float
    """The same for the totals of the ranks: the slow-down where ranks meet at the end of a step only."""
    slowdown: float
    """Sum over micro-batches of the dearest rank / sum of the mean ranks: the slow-down where ranks meet in every
    micro-batch, as they do with expert parallelism."""


def imbalance(costs_by_position: np.ndarray) -> Imbalance:
    """The imbalance of a step from the costs of its micro-batches: (micro-batches, ranks)."""
    dearest, mean, totals = costs_by_position.max(axis=1), costs_by_position.mean(axis=1), costs_by_position.sum(axis=0)
    return Imbalance(dearest / mean, float(totals.max() / totals.mean()), float(dearest.sum() / mean.sum()))
