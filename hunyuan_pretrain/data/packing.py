"""Best-fit decreasing packing of documents into sequences of one length: pure functions on arrays.

Documents longer than a sequence are cut into whole sequences and a remainder; only those are cut. A piece is a run of tokens of one
document. Equal lengths are handled together, so the work grows with the number of different lengths, not with documents x sequences.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from hunyuan_pretrain.data.permutation import permuted


@dataclass(frozen=True)
class Packing:
    """Which pieces make each sequence. Sequence i holds the pieces sequence_offsets[i] to sequence_offsets[i + 1], in this order."""

    sequence_length: int
    sequence_offsets: np.ndarray
    """(sequences + 1,) int64."""
    piece_document: np.ndarray
    """(pieces,) the document of each piece."""
    piece_start: np.ndarray
    """(pieces,) int32, first token of the piece within its document."""
    piece_length: np.ndarray
    """(pieces,) int32, tokens."""

    @property
    def num_sequences(self) -> int:
        """Packed sequences."""
        return len(self.sequence_offsets) - 1


def pack_documents(lengths: np.ndarray, sequence_length: int, seed: int) -> Packing:
    """Pack documents of the given `lengths` (documents,), in tokens, into sequences of `sequence_length` tokens, in an order set by `seed`.

    Every token is in exactly one piece; within a sequence, pieces are in the order of their documents. Documents without tokens are left
    out.
    """
    document, start, length = cut_into_pieces(lengths, sequence_length)
    sequence = best_fit_decreasing(length, sequence_length)
    num_sequences = int(sequence.max(initial=-1)) + 1
    place = permuted(np.arange(num_sequences), num_sequences, seed)
    sequence = place[sequence]
    order = np.argsort(sequence, kind="stable")
    offsets = np.zeros(num_sequences + 1, dtype=np.int64)
    np.cumsum(np.bincount(sequence, minlength=num_sequences), out=offsets[1:])
    return Packing(sequence_length, offsets, document[order], start[order], length[order])


def cut_into_pieces(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of each piece, in the order of the text: whole sequences, then what is left of a document."""
    lengths = np.asarray(lengths)
    num_pieces = -(-lengths.astype(np.int64) // sequence_length)
    document_dtype = np.uint32 if len(lengths) < 2**32 else np.int64
    document = np.repeat(np.arange(len(lengths), dtype=document_dtype), num_pieces)
    first_piece = np.cumsum(num_pieces) - num_pieces
    start = (np.arange(len(document)) - np.repeat(first_piece, num_pieces)) * sequence_length
    length = np.minimum(np.repeat(lengths, num_pieces) - start, sequence_length)
    return document, start.astype(np.int32), length.astype(np.int32)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item, (items,) int64: longest first, each into the fullest bin that still has room for it.

    Bins with equal room are interchangeable, and the fullest bin that takes an item of some length keeps taking items of that length
    until it has no room for another; so all items of a length go into all bins of an equal room in one step.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    bin_of_item = np.empty(len(lengths), dtype=np.int64)
    # Bins by the room they have left, as arrays of bin numbers, and those rooms in order.
    bins_with_room: dict[int, list[np.ndarray]] = {}
    rooms: list[int] = []
    num_bins = 0
    placed = 0

    def put_back(room: int, bins: np.ndarray) -> None:
        if room == 0 or not bins.size:
            return
        if room not in bins_with_room:
            bins_with_room[room] = []
            insort(rooms, room)
        bins_with_room[room].append(bins)

    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            position = bisect_left(rooms, length)
            if position == len(rooms):
                room = capacity
                bins = np.arange(num_bins, num_bins + -(-count // (capacity // length)))
                num_bins += len(bins)
            else:
                room = rooms[position]
                bins = bins_with_room[room].pop()
                if not bins_with_room[room]:
                    del bins_with_room[room], rooms[position]
            each = room // length
            full = min(count // each, len(bins))
            bin_of_item[order[placed : placed + full * each]] = np.repeat(bins[:full], each)
            put_back(room - each * length, bins[:full])
            placed, count = placed + full * each, count - full * each
            if full < len(bins):
                # The last items fill one bin in part; the bins after it stay as they were.
                bin_of_item[order[placed : placed + count]] = bins[full]
                put_back(room - count * length, bins[full : full + 1])
                put_back(room, bins[full + 1 :])
                placed, count = placed + count, 0
    return bin_of_item
