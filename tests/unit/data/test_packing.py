"""Packing: nothing lost, nothing doubled, only long documents cut, almost no padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.data.packing import Packing, best_fit_decreasing, cut_into_pieces, pack_documents
from hunyuan_pretrain.data.permutation import mixed_key, permuted

LENGTHS = st.lists(st.integers(0, 100) | st.sampled_from([1, 15, 16, 17, 32, 33, 64]), max_size=80).map(
    lambda values: np.array(values, dtype=np.int32)
)


@given(lengths=LENGTHS, sequence_length=st.sampled_from([2, 16, 33, 128]))
@settings(max_examples=150, deadline=None)
def test_every_token_is_in_exactly_one_piece(lengths: np.ndarray, sequence_length: int) -> None:
    packing = pack_documents(lengths, sequence_length, seed=3)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for document, start, length in zip(packing.piece_document, packing.piece_start, packing.piece_length, strict=True):
        assert length > 0
        assert start + length <= lengths[document]
        seen[document][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)


@given(lengths=LENGTHS, sequence_length=st.sampled_from([2, 16, 33, 128]))
@settings(max_examples=150, deadline=None)
def test_no_sequence_is_too_long_or_empty_and_only_long_documents_are_cut(lengths: np.ndarray, sequence_length: int) -> None:
    packing = pack_documents(lengths, sequence_length, seed=3)
    assert packing.sequence_offsets[0] == 0
    assert packing.sequence_offsets[-1] == len(packing.piece_document)
    for begin, end in zip(packing.sequence_offsets, packing.sequence_offsets[1:], strict=False):
        assert 0 < packing.piece_length[begin:end].sum() <= sequence_length
        order = list(zip(packing.piece_document[begin:end], packing.piece_start[begin:end], strict=True))
        assert order == sorted(order)
    cut = packing.piece_document[packing.piece_start > 0]
    assert (lengths[cut] > sequence_length).all()


def best_fit_by_the_book(lengths: np.ndarray, capacity: int) -> list[int]:
    """Fill levels of best-fit decreasing, an item at a time."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(capacity - room for room in rooms)


@given(lengths=st.lists(st.integers(1, 40), max_size=120).map(lambda values: np.array(values, dtype=np.int32)))
@settings(max_examples=150, deadline=None)
def test_counting_by_length_is_best_fit_decreasing(lengths: np.ndarray) -> None:
    bins = best_fit_decreasing(lengths, 40)
    filled = np.bincount(bins, weights=lengths) if len(bins) else np.array([])
    assert sorted(filled.astype(int).tolist()) == best_fit_by_the_book(lengths, 40)


@pytest.mark.parametrize("sequence_length", [4096, 32768])
@pytest.mark.parametrize("seed", [0, 1])
def test_bins_reach_the_optimum_on_realistic_lengths(sequence_length: int, seed: int) -> None:
    lengths = np.maximum(3, np.random.default_rng(seed).lognormal(6.3, 1.4, 200_000)).astype(np.int32)
    optimum = math.ceil(lengths.sum(dtype=np.int64) / sequence_length)
    assert pack_documents(lengths, sequence_length, seed).num_sequences <= optimum * 1.0001 + 1


def same(a: Packing, b: Packing) -> bool:
    names = ("sequence_offsets", "piece_document", "piece_start", "piece_length")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def test_packing_is_deterministic_and_the_seed_only_orders_sequences() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    first, again, other = (pack_documents(lengths, 64, seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)

    def contents(packing: Packing) -> set:
        return {tuple(packing.piece_document[a:b]) for a, b in zip(packing.sequence_offsets, packing.sequence_offsets[1:], strict=False)}

    assert contents(first) == contents(other)


def test_a_long_document_is_whole_sequences_and_a_remainder() -> None:
    document, start, length = cut_into_pieces(np.array([5, 23, 20]), 10)
    assert document.tolist() == [0, 1, 1, 1, 2, 2]
    assert start.tolist() == [0, 0, 10, 20, 0, 10]
    assert length.tolist() == [5, 10, 10, 3, 10, 10]


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_permuted_is_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


def test_permutations_look_random() -> None:
    size = 10_000
    first, second = (permuted(np.arange(size), size, mixed_key(7, epoch)) for epoch in (0, 1))
    for left, right in ((first, np.arange(size)), (first, second), (first[1:], first[:-1])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.04
    assert 2 * size < 5 * np.count_nonzero(np.diff(first) > 0) < 3 * size
    # The same on every machine and with every numpy: these are part of the promise that a run can be repeated.
    assert permuted(np.arange(5), 100, mixed_key(1234, 0)).tolist() == [97, 46, 48, 70, 20]
