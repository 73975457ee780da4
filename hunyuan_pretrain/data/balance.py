"""Equal work for ranks that wait for each other: pure functions on arrays.

Packed sequences have the same number of tokens, but attention within a document of n tokens costs about n * n. A
sequence that is one long document takes longer than one of short documents. All ranks wait for the slowest at the end
of a step, or in every layer if experts are sharded over the ranks. There are two remedies, each useful alone:

- `deal` decides which rank takes which sequence of a step's batch. The batch stays the same, so training is unaffected.
- `balanced_rows` builds batches from groups of sequences with nearly equal cost. A group is as random as a sequence
  was, but its sequences are alike, so a batch has fewer independent members and its gradient more noise (figures in
  docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hunyuan_pretrain.data.packing import Packing
from hunyuan_pretrain.data.permutation import mixed_key, permuted

_AT_A_TIME = 2**18


def squared_lengths(packing: Packing) -> np.ndarray:
    """Sum of n * n over the pieces of each sequence, with the tail padding as one more piece: (sequences,) int64.

    Sequences of the same length differ in cost only by this, so ordering them by cost needs no cost model.
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
    """Cost of each sequence, as the number of tokens that cost the same without attention scores: float64, same shape
    as `squares`.

    `squares`: from `squared_lengths`. `attention_cost_tokens`: the document length at which attention scores and values
    cost as much as everything else. It is a property of the model: about 125,000 tokens for Hunyuan-Large by FLOPs.
    """
    costs: np.ndarray = sequence_length + squares / attention_cost_tokens
    return costs


def cost_order(costs: np.ndarray) -> np.ndarray:
    """Sequences from the cheapest to the most expensive, ties by number: (sequences,) uint32."""
    assert len(costs) <= 2**32, "numbers of 32 bits"
    return np.argsort(costs, kind="stable").astype(np.uint32)


def balanced_rows(position: np.ndarray, order: np.ndarray, group_sequences: int, key: int) -> np.ndarray:
    """The rows at the given positions, 0 to sequences - 1, of a walk over all sequences: int64, same shape.

    Each run of `group_sequences` positions takes neighbours in `order` (see `cost_order`), cheapest first. Groups come
    in a shuffled order given by `key`. The sequences that do not fill a group come last; which part of `order` they are
    taken from depends on the key. Only the requested rows are computed. `group_sequences` should be a multiple of
    data-parallel size x micro-batch and a divisor of the batch. It determines the batches, so it must not change during
    a run, even if the data-parallel size does.
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
    """Assign the sequences of a step's batch: (micro-batches, num_ranks, micro_batch_sequences) int64, sequence
    numbers.

    `costs` (batch,), where batch is a multiple of num_ranks * micro_batch_sequences. Each sequence is assigned once.
    All micro-batches have similar costs, those with the same index the most similar, because the ranks run them at the
    same time. The ranks' totals are similar too. The result depends on the costs alone, with ties going to the lower
    number, so all ranks compute the same. Micro-batches run from the most expensive to the cheapest.
    """
    num_rows, remainder = divmod(len(costs), num_ranks * micro_batch_sequences)
    assert not remainder, f"{len(costs)} sequences for {num_ranks} ranks with micro-batches of {micro_batch_sequences}"
    # Most expensive first, in rounds: each micro-batch gets one sequence per round, the cheapest one the most
    # expensive.
    members = np.argsort(-costs, kind="stable").reshape(micro_batch_sequences, -1)
    totals = np.zeros(members.shape[1])
    for round_number, members_of_round in enumerate(members):
        cheapest_first = np.argsort(totals, kind="stable")
        members[round_number, cheapest_first] = members_of_round.copy()
        totals += costs[members[round_number]]
    # Neighbours in cost run at the same time, the most expensive on the rank with the least so far.
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
    """How unequal the work of a step is; 1 means that it is equal everywhere."""

    by_micro_batch: np.ndarray
    """(micro-batches,) cost of the most expensive rank / mean over ranks, per micro-batch index."""
    step: float
    """The same for the totals of the ranks: the slow-down if ranks synchronise only at the end of a step."""
    slowdown: float
    """Sum over micro-batches of the most expensive rank / sum of the means: the slow-down if ranks synchronise in every
    micro-batch, as with expert parallelism."""


def imbalance(costs_by_position: np.ndarray) -> Imbalance:
    """The imbalance of a step, from the costs of its micro-batches (micro-batches, ranks)."""
    dearest, mean, totals = costs_by_position.max(axis=1), costs_by_position.mean(axis=1), costs_by_position.sum(axis=0)
    return Imbalance(dearest / mean, float(totals.max() / totals.mean()), float(dearest.sum() / mean.sum()))
