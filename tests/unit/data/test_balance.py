"""Balance: every sequence is assigned once, assignment leaves the batches unchanged, and work side by side is nearly
equal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.data.balance import balanced_rows, cost_order, deal, imbalance, sequence_costs, squared_lengths
from hunyuan_pretrain.data.packing import pack_documents
from hunyuan_pretrain.data.permutation import mixed_key


def test_squared_lengths_count_pieces_and_padding() -> None:
    packing = pack_documents(np.array([10, 7, 25, 2]), 10, seed=0)
    found = {}
    for number, squares in enumerate(squared_lengths(packing).tolist()):
        pieces = packing.piece_length[packing.sequence_offsets[number] : packing.sequence_offsets[number + 1]]
        found[tuple(sorted(pieces.tolist()))] = squares
    assert found == {(10,): 100, (2, 7): 4 + 49 + 1, (5,): 25 + 25}
    assert squared_lengths(pack_documents(np.array([], dtype=np.int32), 10, seed=0)).tolist() == []


def test_a_document_of_attention_cost_tokens_costs_twice_its_tokens() -> None:
    squares = squared_lengths(pack_documents(np.full(10, 4096), 4096, seed=0))
    assert sequence_costs(squares, 4096, attention_cost_tokens=4096.0).tolist() == [2 * 4096] * 10


@given(
    num_sequences=st.integers(1, 300),
    group_sequences=st.integers(1, 40),
    key=st.integers(0, 2**64 - 1),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_balanced_rows_take_every_row_once_in_groups_of_neighbours(
    num_sequences: int, group_sequences: int, key: int, seed: int
) -> None:
    order = cost_order(np.random.default_rng(seed).integers(0, 50, num_sequences))
    rows = balanced_rows(np.arange(num_sequences), order, group_sequences, key)
    assert np.array_equal(np.sort(rows), np.arange(num_sequences))
    position = np.argsort(order, kind="stable")[rows]
    for begin in range(0, num_sequences, group_sequences):
        assert (np.diff(position[begin : begin + group_sequences]) == 1).all()
    # Computed only for the requested positions.
    some = np.random.default_rng(seed).integers(0, num_sequences, (2, 3))
    assert np.array_equal(balanced_rows(some, order, group_sequences, key), rows[some])


def test_balanced_groups_change_order_and_boundaries_in_each_epoch() -> None:
    order = cost_order(np.arange(1030))
    epochs = [balanced_rows(np.arange(1030), order, 100, mixed_key(5, epoch)) for epoch in range(4)]
    first_of_groups = [rows[:1000:100].tolist() for rows in epochs]
    assert len({tuple(firsts) for firsts in first_of_groups}) == 4
    assert len({frozenset(firsts) for firsts in first_of_groups}) > 1
    assert all(sorted(firsts) != firsts for firsts in first_of_groups)


BATCH = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda sizes: st.tuples(
        st.just(sizes),
        st.lists(st.integers(1, 40), min_size=int(np.prod(sizes)), max_size=int(np.prod(sizes))).map(np.array),
    )
)


@given(batch=BATCH)
@settings(max_examples=200, deadline=None)
def test_assignment_by_cost_keeps_the_batch(batch: tuple) -> None:
    (num_rows, num_ranks, micro_batch), costs = batch
    positions = deal(costs, num_ranks, micro_batch)
    assert positions.shape == (num_rows, num_ranks, micro_batch)
    assert sorted(positions.ravel().tolist()) == list(range(len(costs)))
    assert np.array_equal(positions, deal(costs.astype(np.float64), num_ranks, micro_batch))


@given(batch=BATCH)
@settings(max_examples=200, deadline=None)
def test_assignment_by_cost_is_no_worse_than_any_shuffle_for_single_sequence_micro_batches(batch: tuple) -> None:
    (num_rows, num_ranks, micro_batch), costs = batch
    num_rows *= micro_batch
    dealt = imbalance(costs[deal(costs, num_ranks, 1)].sum(axis=2))
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(costs).reshape(num_rows, num_ranks)
        assert dealt.slowdown <= imbalance(shuffled).slowdown + 1e-9


@pytest.mark.parametrize(("num_ranks", "micro_batch"), [(8, 1), (8, 2), (64, 1), (16, 4)])
def test_assigned_micro_batches_and_rank_totals_are_nearly_equal(num_ranks: int, micro_batch: int) -> None:
    random = np.random.default_rng(0)
    costs = 1 + random.choice([0.05, 0.1, 0.4, 3.0], 1024, p=[0.4, 0.3, 0.2, 0.1]) * random.uniform(0.8, 1.2, 1024)
    dealt = imbalance(costs[deal(costs, num_ranks, micro_batch)].sum(axis=2))
    dealt_in_turn = imbalance(costs.reshape(-1, num_ranks, micro_batch).sum(axis=2))
    assert dealt.slowdown < 1.1 < 1.3 < dealt_in_turn.slowdown
    assert dealt.step < 1.04 < 1.05 < dealt_in_turn.step


def test_batches_of_neighbours_in_cost_leave_no_rank_waiting() -> None:
    costs = (
        1 + 3 * np.random.default_rng(1).random(64 * 50) ** 4
    )  # attention costs from nothing to three times all else, mostly little
    rows = balanced_rows(np.arange(len(costs)), cost_order(costs), 64, mixed_key(3, 0))
    for batch in costs[rows][:3072].reshape(-1, 256):
        assert imbalance(batch[deal(batch, 64, 1)].sum(axis=2)).slowdown < 1.05


def test_imbalance_by_hand() -> None:
    found = imbalance(np.array([[1.0, 3.0], [4.0, 4.0]]))
    assert found.by_micro_batch.tolist() == [1.5, 1.0]
    assert found.step == 7 / 6
    assert found.slowdown == 7 / 6


def test_micro_batches_of_similar_cost_run_side_by_side() -> None:
    costs = np.array([10, 9, 9, 8, 5, 4, 1, 1])
    by_rank = costs[deal(costs, 2, 2)].sum(axis=2)
    assert by_rank.tolist() == [[13, 13], [11, 10]]
