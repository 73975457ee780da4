"""Packs documents into sequences of one length: pure functions on arrays.

`best_fit` cuts only documents that are longer than a sequence, into whole sequences and a remainder, and leaves little
padding (best-fit decreasing, see `best_fit`). `chop` concatenates documents in random order and cuts every
sequence_length tokens, for comparison. A piece is a run of tokens of one document.

Memory beside the lengths, which may be memory-mapped: 8 bytes per piece while working, 8 to 12 per piece for the
result, and 8 per sequence. The time is that of sorting n numbers twice: n log n, in practice nearly proportional to n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from hunyuan_pretrain.data.best_fit import best_fit_decreasing
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.permutation import shuffled

PackingMethod = Literal["best_fit", "chop"]

# Documents or pieces handled at a time, so that temporary arrays stay in the CPU cache.
_AT_A_TIME = 2**18
# A key has 64 bits: 32 bits to sort by, then the document. No two keys are equal, so any sort gives the same order.
_DOCUMENT_BITS = np.uint64(32)
_DOCUMENT = np.uint64(2**32 - 1)
MAX_DOCUMENTS = 2**32 - 1
"""Documents that can be packed together."""


@dataclass(frozen=True)
class Packing:
    """Which pieces make up each sequence. Sequence i holds pieces sequence_offsets[i] to sequence_offsets[i + 1], in
    this order."""

    sequence_length: int
    sequence_offsets: np.ndarray
    """(sequences + 1,) int64."""
    piece_document: np.ndarray
    """(pieces,) uint32, the document of each piece."""
    piece_start: np.ndarray
    """(pieces,) first token of the piece within its document; uint16 if no document is longer than 65,535 tokens, else
    int32."""
    piece_length: np.ndarray
    """(pieces,) tokens; uint16 up to sequences of 65,535 tokens, else int32."""
    cut_documents: int = 0
    """Documents that are not in one piece."""
    dropped_fragments: int = 0
    """Pieces of cut documents that were left out."""
    dropped_tokens: int = 0
    """Tokens in those pieces."""

    @property
    def num_sequences(self) -> int:
        """Packed sequences."""
        return len(self.sequence_offsets) - 1


def pack_documents(
    lengths: np.ndarray,
    sequence_length: int,
    seed: int,
    method: PackingMethod = "best_fit",
    min_fragment_tokens: int = 1,
) -> Packing:
    """Pack documents of the given `lengths` (documents,), in tokens, into sequences of `sequence_length` tokens.

    `seed` sets the order of the sequences and, with "chop", the order of the documents before they are cut; everything
    else follows from the lengths. A piece of a cut document with fewer than `min_fragment_tokens` tokens is left out
    and counted; a whole document never is, however short. With 1, every token is in exactly one piece. "best_fit"
    orders the pieces of a sequence by document. Documents without tokens are left out. Raises DataFormatError for an
    unknown method, a `min_fragment_tokens` that is not from 1 to sequence_length, or more documents than 32 bits can
    number.
    """
    check_options(sequence_length, method, min_fragment_tokens, len(lengths))
    pack = _best_fit if method == "best_fit" else _chop
    return pack(np.asarray(lengths), sequence_length, seed, min_fragment_tokens)


def check_options(
    sequence_length: int, method: PackingMethod, min_fragment_tokens: int, num_documents: int = 0
) -> None:
    """Raise DataFormatError for arguments that `pack_documents` refuses."""
    problems = []
    if method not in get_args(PackingMethod):
        problems.append(f"method={method!r}: must be one of {', '.join(get_args(PackingMethod))}")
    if not 1 <= min_fragment_tokens <= sequence_length:
        problems.append(
            f"min_fragment_tokens={min_fragment_tokens}: must be from 1 (drop nothing) to the sequence length, "
            f"{sequence_length}"
        )
    if num_documents > MAX_DOCUMENTS:
        problems.append(
            f"{num_documents:,} documents: at most {MAX_DOCUMENTS:,} can be packed together; pack them in parts, "
            "each as a separate source"
        )
    if problems:
        raise DataFormatError("; ".join(problems))


def _best_fit(lengths: np.ndarray, sequence_length: int, seed: int, min_fragment_tokens: int) -> Packing:
    cut = _cut(lengths, sequence_length, min_fragment_tokens)
    num_items, num_whole = int(cut.counts.sum()), int(cut.whole_pieces.sum())
    # Pieces to pack come first, whole sequences after them. Sorted longest first, as the packing needs them.
    keys = np.empty(num_items + num_whole, dtype=np.uint64)
    filled = 0
    for begin, part in _parts(lengths):
        remainder = _remainders(part, sequence_length, min_fragment_tokens)
        document = np.flatnonzero(remainder)
        keys[filled : filled + len(document)] = _keys(sequence_length - remainder[document], begin + document)
        filled += len(document)
    keys[:num_items].sort()
    sizes = np.flatnonzero(cut.counts)[::-1]
    fit = best_fit_decreasing(sizes, cut.counts[sizes], sequence_length)
    # Then sorted by sequence, and within a sequence by document.
    place = shuffled(fit.num_bins + num_whole, seed)
    for begin, bins in fit.parts(_AT_A_TIME):
        end = begin + len(bins)
        keys[begin:end] = _keys(place[bins], keys[begin:end] & _DOCUMENT)
    keys[num_items:] = _keys(place[fit.num_bins :], np.repeat(cut.long_documents, cut.whole_pieces))
    keys.sort()
    offsets = _count_by_sequence(keys, len(place))
    pieces = _remainders_as_pieces(keys, lengths, sequence_length, cut.longest)
    # Correct the whole sequences, which were written as if they were remainders.
    at = offsets[place[fit.num_bins :]]
    first_of_document = np.repeat(np.cumsum(cut.whole_pieces) - cut.whole_pieces, cut.whole_pieces)
    pieces[1][at] = (np.arange(num_whole) - first_of_document) * sequence_length
    pieces[2][at] = sequence_length
    return Packing(sequence_length, offsets, *pieces, cut.cut_documents, cut.dropped_fragments, cut.dropped_tokens)


@dataclass(frozen=True)
class _Cut:
    """The result of cutting documents into whole sequences and remainders."""

    counts: np.ndarray
    """(sequence_length,) int64, number of remainders and of documents shorter than a sequence, by length; [0] is 0."""
    long_documents: np.ndarray
    """(n,) the documents that fill at least one sequence."""
    whole_pieces: np.ndarray
    """(n,) how many sequences each of them fills."""
    longest: int
    cut_documents: int
    dropped_fragments: int
    dropped_tokens: int


def _cut(lengths: np.ndarray, sequence_length: int, min_fragment_tokens: int) -> _Cut:
    counts = np.zeros(sequence_length, dtype=np.int64)
    long_documents = []
    longest = 0
    for begin, part in _parts(lengths):
        assert part.min() >= 0, "a document of negative length"
        longest = max(longest, int(part.max()))
        counts += np.bincount(_remainders(part, sequence_length, min_fragment_tokens), minlength=sequence_length)
        long_documents.append(begin + np.flatnonzero(part >= sequence_length))
    counts[0] = 0
    documents = np.concatenate([np.zeros(0, dtype=np.int64), *long_documents])
    whole_pieces, remainder = np.divmod(lengths[documents], sequence_length)
    dropped = remainder[(remainder > 0) & (remainder < min_fragment_tokens)]
    cut_documents = int(np.count_nonzero(lengths[documents] > sequence_length))
    return _Cut(counts, documents, whole_pieces, longest, cut_documents, len(dropped), int(dropped.sum(dtype=np.int64)))


def _remainders(lengths: np.ndarray, sequence_length: int, min_fragment_tokens: int) -> np.ndarray:
    """Tokens to pack of each document: all of them, or the remainder of a longer one; 0 if that is nothing or too
    little."""
    remainder: np.ndarray = lengths % sequence_length
    if min_fragment_tokens > 1:
        remainder[(lengths > sequence_length) & (remainder < min_fragment_tokens)] = 0
    return remainder


def _keys(number: np.ndarray, document: np.ndarray) -> np.ndarray:
    return (number.astype(np.uint64) << _DOCUMENT_BITS) | document.astype(np.uint64)


def _count_by_sequence(keys: np.ndarray, num_sequences: int) -> np.ndarray:
    """The sequence_offsets for keys sorted by sequence: (num_sequences + 1,) int64."""
    offsets = np.zeros(num_sequences + 1, dtype=np.int64)
    for _, part in _parts(keys):
        sequence = (part >> _DOCUMENT_BITS).astype(np.int64)
        first, last = int(sequence[0]), int(sequence[-1])
        offsets[first + 1 : last + 2] += np.bincount(sequence - first)
    return np.cumsum(offsets, out=offsets)


def _remainders_as_pieces(
    keys: np.ndarray, lengths: np.ndarray, sequence_length: int, longest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of the last piece of the document of each key."""
    documents = np.empty(len(keys), dtype=np.uint32)
    starts = np.empty(len(keys), dtype=_smallest_dtype(longest))
    piece_lengths = np.empty(len(keys), dtype=_smallest_dtype(sequence_length))
    for begin, part in _parts(keys):
        document = (part & _DOCUMENT).astype(np.int64)
        length = lengths[document]
        remainder = length % sequence_length
        end = begin + len(part)
        documents[begin:end], starts[begin:end], piece_lengths[begin:end] = document, length - remainder, remainder
    return documents, starts, piece_lengths


def _chop(lengths: np.ndarray, sequence_length: int, seed: int, min_fragment_tokens: int) -> Packing:
    longest = int(lengths.max(initial=0))
    dtypes = (np.dtype(np.uint32), np.dtype(np.uint32), _smallest_dtype(longest), _smallest_dtype(sequence_length))
    parts: list[list[np.ndarray]] = [[np.zeros(0, dtype=dtype)] for dtype in dtypes]
    position, cut_documents, dropped_fragments, dropped_tokens = 0, 0, 0, 0
    for _, order in _parts(shuffled(len(lengths), seed)):
        order = order[lengths[order] > 0]
        length = lengths[order].astype(np.int64)
        ends = position + np.cumsum(length)
        begins = ends - length
        position = int(ends[-1]) if len(ends) else position
        # One piece for each sequence that a document reaches into.
        first, last = begins // sequence_length, (ends - 1) // sequence_length
        num_pieces = last - first + 1
        owner = np.repeat(np.arange(len(order)), num_pieces)
        sequence = np.arange(len(owner)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces) + first[owner]
        start = np.maximum(begins[owner], sequence * sequence_length) - begins[owner]
        piece_length = np.minimum(ends[owner], (sequence + 1) * sequence_length) - begins[owner] - start
        kept = (num_pieces[owner] == 1) | (piece_length >= min_fragment_tokens)
        cut_documents += int(np.count_nonzero(num_pieces > 1))
        dropped_fragments += int(np.count_nonzero(~kept))
        dropped_tokens += int(piece_length[~kept].sum())
        for column, dtype, values in zip(parts, dtypes, (sequence, order[owner], start, piece_length), strict=True):
            column.append(values[kept].astype(dtype))
    sequence, document, start, piece_length = (np.concatenate(column) for column in parts)
    # A sequence that would hold only dropped fragments does not exist.
    is_first = np.diff(sequence, prepend=-1) > 0
    offsets = np.append(np.flatnonzero(is_first), len(sequence))
    return Packing(
        sequence_length, offsets, document, start, piece_length, cut_documents, dropped_fragments, dropped_tokens
    )


def _smallest_dtype(maximum: int) -> np.dtype:
    return np.dtype(np.uint16 if maximum < 2**16 else np.int32)


def _parts(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first index, slice) of consecutive parts of an array."""
    for begin in range(0, len(array), _AT_A_TIME):
        yield begin, array[begin : begin + _AT_A_TIME]
