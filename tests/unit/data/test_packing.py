"""Packing: nothing lost, nothing duplicated, only long documents cut, almost no padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.data import packing as packing_module
from hunyuan_pretrain.data.best_fit import best_fit_decreasing
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.packing import Packing, PackingMethod, pack_documents
from hunyuan_pretrain.data.permutation import mixed_key, permuted, shuffled

LENGTHS = st.lists(st.integers(0, 100) | st.sampled_from([1, 15, 16, 17, 32, 33, 64]), max_size=80).map(
    lambda values: np.array(values, dtype=np.int32)
)
METHODS = st.sampled_from(["best_fit", "chop"])


@pytest.fixture(scope="module", autouse=True)
def _small_parts() -> Iterator[None]:
    """Use parts of a few documents, so that small examples cross part boundaries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "_AT_A_TIME", 7)
        yield


def sequences(packing: Packing) -> list[list[tuple[int, int, int]]]:
    """(document, start, length) of the pieces of each sequence."""
    pieces = list(
        zip(packing.piece_document.tolist(), packing.piece_start.tolist(), packing.piece_length.tolist(), strict=True)
    )
    bounds = packing.sequence_offsets.tolist()
    assert (bounds[0], bounds[-1]) == (0, len(pieces))
    return [pieces[begin:end] for begin, end in itertools.pairwise(bounds)]


@given(
    lengths=LENGTHS,
    sequence_length=st.sampled_from([2, 16, 33, 128]),
    method=METHODS,
    min_fragment=st.integers(1, 128),
    seed=st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_every_token_is_in_exactly_one_piece_or_in_a_counted_fragment(
    lengths: np.ndarray, sequence_length: int, method: PackingMethod, min_fragment: int, seed: int
) -> None:
    min_fragment = min(min_fragment, sequence_length)
    packing = pack_documents(lengths, sequence_length, seed, method, min_fragment)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for document, start, length in itertools.chain(*sequences(packing)):
        assert length > 0
        assert start + length <= lengths[document]
        assert length >= min(min_fragment, lengths[document])
        seen[document][start : start + length] += 1
    assert all((counts <= 1).all() for counts in seen)
    missing = [np.flatnonzero(counts == 0) for counts in seen]
    assert sum(map(len, missing)) == packing.dropped_tokens
    # A run of missing tokens is one fragment, unless two fragments were neighbours in one document.
    runs = sum(np.count_nonzero(np.diff(gap, prepend=-2) > 1) for gap in missing)
    assert runs <= packing.dropped_fragments <= packing.dropped_tokens
    assert packing.dropped_tokens <= packing.dropped_fragments * (min_fragment - 1)


@given(
    lengths=LENGTHS,
    sequence_length=st.sampled_from([2, 16, 33, 128]),
    method=METHODS,
    min_fragment=st.sampled_from([1, 2]),
)
@settings(max_examples=200, deadline=None)
def test_no_sequence_is_too_long_or_empty(
    lengths: np.ndarray, sequence_length: int, method: PackingMethod, min_fragment: int
) -> None:
    for pieces in sequences(pack_documents(lengths, sequence_length, 3, method, min_fragment)):
        assert 0 < sum(length for _, _, length in pieces) <= sequence_length


@given(lengths=LENGTHS, sequence_length=st.sampled_from([2, 16, 33, 128]))
@settings(max_examples=150, deadline=None)
def test_best_fit_cuts_only_documents_longer_than_a_sequence(lengths: np.ndarray, sequence_length: int) -> None:
    packing = pack_documents(lengths, sequence_length, seed=3)
    for pieces in sequences(packing):
        assert pieces == sorted(pieces)
        for document, start, length in pieces:
            assert start % sequence_length == 0
            assert length == min(lengths[document] - start, sequence_length)
    assert packing.cut_documents == np.count_nonzero(lengths > sequence_length)


@given(lengths=LENGTHS, sequence_length=st.sampled_from([2, 16, 33, 128]))
@settings(max_examples=150, deadline=None)
def test_chopping_leaves_padding_only_in_the_last_sequence(lengths: np.ndarray, sequence_length: int) -> None:
    packing = pack_documents(lengths, sequence_length, 3, "chop")
    filled = [sum(length for _, _, length in pieces) for pieces in sequences(packing)]
    assert all(tokens == sequence_length for tokens in filled[:-1])
    # A document continues where it was cut, at the start of the next sequence.
    text = [piece for pieces in sequences(packing) for piece in pieces]
    ends = {document: 0 for document, _, _ in text}
    for i, (document, start, length) in enumerate(text):
        assert start == ends[document]
        assert start == 0 or text[i - 1][0] == document
        ends[document] += length
    assert packing.cut_documents == len({document for document, start, _ in text if start})


@pytest.mark.parametrize("method", ["best_fit", "chop"])
def test_a_short_fragment_is_dropped_and_a_short_document_is_not(method: PackingMethod) -> None:
    packing = pack_documents(np.array([103, 3, 110, 100]), 100, 0, method, min_fragment_tokens=10)
    pieces = sorted(itertools.chain(*sequences(packing)))
    assert (1, 0, 3) in pieces
    if method == "best_fit":
        assert pieces == [(0, 0, 100), (1, 0, 3), (2, 0, 100), (2, 100, 10), (3, 0, 100)]
        assert (packing.cut_documents, packing.dropped_fragments, packing.dropped_tokens) == (2, 1, 3)


def test_invalid_settings_are_refused_together() -> None:
    with pytest.raises(DataFormatError) as error:
        pack_documents(np.array([1, 2]), 16, 0, "best", min_fragment_tokens=17)  # type: ignore[arg-type]
    assert str(error.value) == (
        "method='best': must be one of best_fit, chop; min_fragment_tokens=17: must be from 1 (drop nothing) to "
        "the sequence length, 16"
    )


@pytest.mark.parametrize(
    ("longest", "sequence_length", "start", "length"),
    [
        (65535, 65535, "uint16", "uint16"),
        (65536, 65535, "int32", "uint16"),
        (9, 65536, "uint16", "int32"),
        (200_000, 65536, "int32", "int32"),
    ],
)
@pytest.mark.parametrize("method", ["best_fit", "chop"])
def test_arrays_use_the_smallest_safe_dtype(
    longest: int, sequence_length: int, start: str, length: str, method: PackingMethod
) -> None:
    packing = pack_documents(np.array([longest, 5, longest], dtype=np.int64), sequence_length, 0, method)
    assert (packing.piece_document.dtype, packing.piece_start.dtype, packing.piece_length.dtype) == (
        np.uint32,
        start,
        length,
    )
    ends = packing.piece_start.astype(np.int64) + packing.piece_length
    assert ends.max() == longest
    assert packing.piece_length.sum(dtype=np.int64) == 2 * longest + 5


def best_fit_by_the_book(lengths: np.ndarray, capacity: int) -> list[int]:
    """Fill levels of best-fit decreasing, one item at a time."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(capacity - room for room in rooms)


@given(
    lengths=st.lists(st.integers(1, 40) | st.sampled_from([3, 7, 13]), max_size=150).map(
        lambda values: np.array(values, dtype=np.int32)
    ),
    capacity=st.sampled_from([40, 41, 100]),
    part=st.integers(1, 50),
)
@settings(max_examples=300, deadline=None)
def test_steps_are_best_fit_decreasing(lengths: np.ndarray, capacity: int, part: int) -> None:
    values, counts = np.unique(lengths, return_counts=True)
    fit = best_fit_decreasing(values[::-1], counts[::-1], capacity)
    parts = list(fit.parts(part))
    assert [first for first, _ in parts] == list(range(0, len(lengths), part))
    bins = np.concatenate([np.zeros(0, dtype=np.int64), *(bins for _, bins in parts)])
    filled = np.bincount(bins, weights=np.sort(lengths)[::-1], minlength=fit.num_bins).astype(int)
    assert sorted(filled.tolist()) == best_fit_by_the_book(lengths, capacity)


@pytest.mark.parametrize("sequence_length", [4096, 32768, 262144])
def test_steps_grow_with_the_number_of_lengths_not_of_documents(sequence_length: int) -> None:
    counts = np.bincount(np.minimum(realistic_lengths(0), sequence_length - 1), minlength=sequence_length)
    sizes = np.flatnonzero(counts)[::-1]
    few, many = (len(best_fit_decreasing(sizes, counts[sizes] * times, sequence_length).per_bin) for times in (1, 1000))
    assert many < 6 * len(sizes)
    assert few < 6 * len(sizes)


def realistic_lengths(seed: int) -> np.ndarray:
    return np.maximum(3, np.random.default_rng(seed).lognormal(6.3, 1.4, 200_000)).astype(np.int32)


@pytest.mark.parametrize("sequence_length", [4096, 32768, 262144])
@pytest.mark.parametrize("seed", [0, 1])
def test_bins_reach_the_optimum_on_realistic_lengths(
    sequence_length: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "_AT_A_TIME", 2**16)
    lengths = realistic_lengths(seed)
    optimum = math.ceil(lengths.sum(dtype=np.int64) / sequence_length)
    assert optimum <= pack_documents(lengths, sequence_length, seed).num_sequences <= optimum * 1.0001 + 1


def same(a: Packing, b: Packing) -> bool:
    names = ("sequence_offsets", "piece_document", "piece_start", "piece_length")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def test_packing_is_deterministic_and_the_seed_only_orders_sequences() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    first, again, other = (pack_documents(lengths, 64, seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)

    # The same with every numpy version: packing again must give the same dataset.
    packed = sequences(pack_documents(np.array([5, 9, 9, 2, 25, 10, 1]), 10, 7))
    assert packed[:4] == [[(0, 0, 5), (4, 20, 5)], [(5, 0, 10)], [(4, 10, 10)], [(3, 0, 2)]]
    assert packed[4:] == [[(4, 0, 10)], [(2, 0, 9)], [(1, 0, 9), (6, 0, 1)]]

    def contents(packing: Packing) -> set:
        return {
            tuple(packing.piece_document[a:b])
            for a, b in zip(packing.sequence_offsets, packing.sequence_offsets[1:], strict=False)
        }

    assert contents(first) == contents(other)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_permuted_is_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))
    assert np.array_equal(np.sort(shuffled(size, key)), np.arange(size))


def test_permutations_look_random() -> None:
    size = 10_000
    first, second = (permuted(np.arange(size), size, mixed_key(7, epoch)) for epoch in (0, 1))
    all_at_once = shuffled(size, 7)
    pairs = [
        (first, np.arange(size)),
        (first, second),
        (first[1:], first[:-1]),
        (all_at_once, first),
        (all_at_once, np.arange(size)),
    ]
    for left, right in [*pairs, (all_at_once[1:], all_at_once[:-1]), (all_at_once, shuffled(size, 8))]:
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.04
    assert 2 * size < 5 * np.count_nonzero(np.diff(first) > 0) < 3 * size
    # The same on every machine and numpy version: reproducible runs depend on these values.
    assert permuted(np.arange(5), 100, mixed_key(1234, 0)).tolist() == [97, 46, 48, 70, 20]
    assert shuffled(5, 1234).tolist() == [3, 0, 4, 1, 2]
