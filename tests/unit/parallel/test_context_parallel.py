"""Which rows the context-parallel ranks hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hunyuan_pretrain.parallel.context_parallel import EVEN_ENOUGH, Ranges, imbalance, rows_of_ranks


@st.composite
def micro_batches(draw) -> tuple[list[int], int, int, int]:
    """(cu_seqlens, sequences, cp_size, unit_tokens) of random packs."""
    sequences, cp_size, unit = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from((1, 2, 3, 4, 8))),
        draw(st.sampled_from((1, 4, 16))),
    )
    tokens = cp_size * unit * draw(st.integers(1, 12))
    inner = draw(st.sets(st.integers(1, sequences * tokens - 1), max_size=30)) if sequences * tokens > 1 else set()
    return sorted(inner | {tokens * number for number in range(sequences + 1)}), sequences, cp_size, unit


def contiguous(tokens: int, sequences: int, cp_size: int) -> list[Ranges]:
    """Each sequence cut into cp_size equal runs."""
    run = tokens // cp_size
    return [
        [(s * tokens + rank * run, s * tokens + (rank + 1) * run) for s in range(sequences)] for rank in range(cp_size)
    ]


@given(micro_batches())
def test_every_row_is_on_one_rank_in_whole_units(batch):
    cu_seqlens, sequences, cp_size, unit = batch
    ranks = rows_of_ranks(*batch)
    tokens = cu_seqlens[-1] // sequences
    assert len(ranks) == cp_size
    assert sorted(row for ranges in ranks for start, end in ranges for row in range(start, end)) == list(
        range(cu_seqlens[-1])
    )
    for ranges in ranks:
        assert all(start % unit == 0 and end % unit == 0 for start, end in ranges)
        assert all(before[1] < after[0] for before, after in pairwise(ranges)), "ascending, and merged where adjacent"
        rows = [row // tokens for start, end in ranges for row in range(start, end)]
        assert [rows.count(sequence) for sequence in range(sequences)] == [tokens // cp_size] * sequences


@given(micro_batches())
@example(([0, 14, 19, 32, 46, 51, 64, 96], 3, 2, 16))
def test_packs_are_at_least_as_balanced_as_contiguous_runs(batch):
    cu_seqlens, sequences, cp_size, _ = batch
    runs = imbalance(cu_seqlens, contiguous(cu_seqlens[-1] // sequences, sequences, cp_size))
    assert imbalance(cu_seqlens, rows_of_ranks(*batch)) <= max(runs, EVEN_ENOUGH)


@pytest.mark.parametrize("cp_size", [2, 4, 8])
@pytest.mark.parametrize("units", [2, 4, 5, 8, 11])
def test_one_long_document_is_balanced(cp_size, units):
    cu_seqlens = [0, cp_size * units * 64]
    assert imbalance(cu_seqlens, contiguous(cu_seqlens[1], 1, cp_size)) == pytest.approx(2 - 1 / cp_size, rel=0.01)
    assert imbalance(cu_seqlens, rows_of_ranks(cu_seqlens, 1, cp_size, 64)) < EVEN_ENOUGH


def test_one_long_document_is_split_as_a_zigzag():
    assert rows_of_ranks([0, 64], 1, 4, 8) == [
        [(0, 8), (56, 64)],
        [(8, 16), (48, 56)],
        [(16, 24), (40, 48)],
        [(24, 40)],
    ]


def test_one_unit_per_rank_is_split_as_well_as_possible():
    ranks = rows_of_ranks([0, 32], 1, 4, 8)
    assert sorted(ranks) == [[(0, 8)], [(8, 16)], [(16, 24)], [(24, 32)]]


def test_short_documents_are_not_split_if_they_are_already_balanced():
    """As many pairs in each quarter: one run a rank."""
    ranks = rows_of_ranks(list(range(0, 257, 16)), 1, 4, 8)
    assert sorted(ranks) == [[(0, 64)], [(64, 128)], [(128, 192)], [(192, 256)]]


def test_a_rank_that_had_more_of_one_sequence_gets_less_of_the_next():
    """One unit a rank: only the next sequence can make up for it."""
    cu_seqlens = [0, 64, 128]
    assert rows_of_ranks(cu_seqlens, 2, 2, 32) == [[(32, 96)], [(0, 32), (96, 128)]]
    assert imbalance(cu_seqlens, rows_of_ranks(cu_seqlens, 2, 2, 32)) == 1


@pytest.mark.parametrize(("cu_seqlens", "sequences"), [([0, 60], 1), ([0, 16], 1), ([0, 64, 97], 2)])
def test_sequences_that_cannot_be_split_over_the_ranks_are_refused(cu_seqlens, sequences):
    with pytest.raises(ValueError, match="every rank needs the same whole number of units of each sequence"):
        rows_of_ranks(cu_seqlens, sequences, 2, 16)
