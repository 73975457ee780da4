"""Packed sequences as a model trains on them.

Shapes: S is the sequence length. A piece of n tokens takes n positions. The label of its last position is the next token of the same
document if the document goes on beyond the piece; otherwise nothing is predicted there. So no document is ever predicted from another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.packed_format import PackedIndex


@dataclass(frozen=True)
class PackedSequence:
    """One packed sequence."""

    tokens: np.ndarray
    """(S,) int32; the tail padding holds the pad id."""
    labels: np.ndarray
    """(S,) int32, the token to predict at each position; the pad id where nothing is predicted."""
    loss_mask: np.ndarray
    """(S,) bool, whether the label counts."""
    positions: np.ndarray
    """(S,) int32, from 0 in each piece and in the tail padding."""
    cu_seqlens: np.ndarray
    """(pieces + 1,) int32, or (pieces + 2,) with tail padding: the borders between which attention stays; from 0 to S."""


class PackedDataset:
    """The sequences of a packed folder by number; nothing is read before a sequence is asked for.

    Raises DataFormatError if the folder cannot be opened (see `PackedIndex`), or if `expected_tokenizer_digest` is given and is not that
    of the data.
    """

    def __init__(self, path: str | Path, expected_tokenizer_digest: str | None = None) -> None:
        self.index = PackedIndex(path)
        self.sequence_length = self.index.sequence_length
        if expected_tokenizer_digest not in (None, self.index.tokenizer_digest):
            found, expected = self.index.tokenizer_digest[:12], str(expected_tokenizer_digest)[:12]
            raise DataFormatError(
                f"{path}: tokenized with tokenizer {found}..., but this run has {expected}...; tokenize the data with the tokenizer of "
                "the run, or point the run at the tokenizer of the data"
            )
        self._ramp = np.arange(self.sequence_length, dtype=np.int32)

    def __len__(self) -> int:
        return self.index.num_sequences

    def __getitem__(self, number: int) -> PackedSequence:
        index, size = self.index, self.sequence_length
        if not 0 <= number < len(self):
            raise IndexError(f"sequence {number} of {len(self)}")
        pieces = self._pieces(number)
        lengths = index.piece_length[pieces]
        filled = int(lengths.sum())
        if filled > size:
            raise DataFormatError(f"{index.folder}: sequence {number} holds {filled} tokens, more than {size}; pack again")
        cu_seqlens = np.zeros(len(lengths) + 1 + (filled < size), dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens[1 : len(lengths) + 1])
        cu_seqlens[-1] = size

        # 32 bits are enough for any id, and half the bytes to write: at 256K this function is as fast as memory
        tokens, labels, positions = (np.empty(size, dtype=np.int32) for _ in range(3))
        loss_mask = np.ones(size, dtype=np.bool_)
        tokens[filled:] = labels[filled:] = index.pad_id
        positions[filled:] = self._ramp[: size - filled]
        loss_mask[filled:] = False
        if index.is_materialized:
            self._read_stretch(number, pieces, cu_seqlens[: len(lengths) + 1], tokens, labels, loss_mask, positions)
        else:
            self._read_pieces(pieces, tokens, labels, loss_mask, positions)
        return PackedSequence(tokens, labels, loss_mask, positions, cu_seqlens)

    def _read_pieces(self, pieces: slice, tokens: np.ndarray, labels: np.ndarray, loss_mask: np.ndarray, positions: np.ndarray) -> None:
        """Fill in what the pieces of a sequence take, from their documents."""
        index = self.index
        documents = index.piece_document[pieces].astype(np.int64)
        shard_numbers = np.searchsorted(index.first_documents, documents, side="right") - 1
        documents -= index.first_documents[shard_numbers]
        columns = (shard_numbers, documents, index.piece_start[pieces], index.piece_length[pieces])
        end = 0
        for shard_number, document, start, length in zip(*(column.tolist() for column in columns), strict=True):
            shard = index.shards[shard_number]
            begin, end = end, end + length
            first = shard.start(document) + start
            stream = shard.tokens[first : first + length + 1]
            tokens[begin:end] = stream[:length]
            positions[begin:end] = self._ramp[:length]
            if start + length < shard.lengths[document]:
                labels[begin:end] = stream[1:]
            else:
                labels[begin : end - 1] = stream[1:length]
                labels[end - 1], loss_mask[end - 1] = index.pad_id, False

    def _read_stretch(
        self,
        number: int,
        pieces: slice,
        borders: np.ndarray,
        tokens: np.ndarray,
        labels: np.ndarray,
        loss_mask: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        """Fill in what the pieces of a sequence take, from its copy; `borders` (pieces + 1,) are where they begin and end."""
        index, filled = self.index, int(borders[-1])
        start = int(index.sequence_starts[number])
        tokens[:filled] = index.tokens[start : start + filled]
        labels[: filled - 1] = tokens[1:filled]
        positions[:filled] = self._ramp[:filled] - np.repeat(borders[:-1], np.diff(borders))
        following = index.next_tokens[pieces]
        ends = borders[1:] - 1
        loss_mask[ends] = following >= 0
        labels[ends] = np.where(following >= 0, following, index.pad_id)

    def documents(self, number: int) -> list[tuple[int, int, int]]:
        """(document, first token within it, tokens) of each piece of a sequence; documents are numbered over all sources."""
        pieces = self._pieces(number)
        columns = (self.index.piece_document[pieces], self.index.piece_start[pieces], self.index.piece_length[pieces])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _pieces(self, number: int) -> slice:
        return slice(int(self.index.sequence_offsets[number]), int(self.index.sequence_offsets[number + 1]))
