"""Packed sequences as a model trains on them.

Shapes: S is the sequence length. A piece of n tokens takes n positions. The label of its last position is the next
token of the same document if the document continues beyond the piece; otherwise nothing is predicted there. So no
document is ever predicted from another. A piece of a folder of pairs is two documents here, the chosen and the rejected
conversation: every even boundary begins a pair.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from hunyuan_pretrain.data.arrays import IS_TARGET, OF_REJECTED
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.indexed import TokenizedShard
from hunyuan_pretrain.data.packed_format import PackedIndex

__all__ = ["PackedDataset", "PackedSequence"]


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
    """(pieces + 1,) int32, or (pieces + 2,) with tail padding: the boundaries that attention does not cross, from 0 to
    S."""


class PackedDataset:
    """The sequences of a packed folder by number. A sequence is read only when it is asked for.

    Raises DataFormatError if the folder cannot be opened (see `PackedIndex`), or if `expected_tokenizer_digest` is
    given and differs from the data's.
    """

    def __init__(self, path: str | Path, expected_tokenizer_digest: str | None = None) -> None:
        self.index = PackedIndex(path)
        self.sequence_length = self.index.sequence_length
        if expected_tokenizer_digest not in (None, self.index.tokenizer_digest):
            found, expected = self.index.tokenizer_digest[:12], str(expected_tokenizer_digest)[:12]
            raise DataFormatError(
                f"{path}: tokenized with tokenizer {found}..., but this run has {expected}...; tokenize the data "
                "with the tokenizer of "
                "the run, or point the run at the tokenizer of the data"
            )
        self._ramp = np.arange(self.sequence_length, dtype=np.int32)
        self.reference: np.ndarray | None = None
        """(2 * pieces,) float64, of pairs: what the reference model says of each answer, if a run has asked it."""

    def __len__(self) -> int:
        return self.index.num_sequences

    def __getitem__(self, number: int) -> PackedSequence:
        index, size = self.index, self.sequence_length
        if not 0 <= number < len(self):
            raise IndexError(f"sequence {number} of {len(self)}")
        pieces = self._pieces(number)
        # lists, because most sequences have few pieces, for which numpy's call overhead is larger than the work
        lengths = index.piece_length[pieces].tolist()
        bounds = list(accumulate(lengths, initial=0))
        if bounds[-1] > size:
            raise DataFormatError(
                f"{index.folder}: sequence {number} holds {bounds[-1]} tokens, more than {size}; pack again"
            )
        if min(lengths, default=0) < 1:
            raise DataFormatError(f"{index.folder}: sequence {number} has no piece, or one without a token; pack again")
        try:
            return self._read(number, pieces, bounds)
        except (IndexError, ValueError) as error:  # from numpy: offsets are not as written
            raise DataFormatError(
                f"{index.folder}: sequence {number} cannot be read ({error}); a file changed after it was written, "
                f"`hunyuan-data verify {index.folder}` says which"
            ) from None

    def _read(self, number: int, pieces: slice, bounds: list[int]) -> PackedSequence:
        index, size, filled = self.index, self.sequence_length, bounds[-1]
        # int32 holds any id in half the bytes of int64: at 256K this function is bound by memory bandwidth
        tokens, labels, positions = (np.empty(size, dtype=np.int32) for _ in range(3))
        loss_mask = np.ones(size, dtype=np.bool_)
        if filled < size:
            tokens[filled:] = labels[filled:] = index.pad_id
            positions[filled:] = self._ramp[: size - filled]
            loss_mask[filled:] = False
        cu_seqlens = np.array(bounds if filled == size else [*bounds, size], dtype=np.int32)
        sequence = PackedSequence(tokens, labels, loss_mask, positions, cu_seqlens)
        if index.is_materialized:
            self._read_stretch(sequence, number, pieces, cu_seqlens[: len(bounds)])
        else:
            self._read_pieces(sequence, pieces, bounds)
        return self._with_pairs_apart(sequence, number, pieces, bounds) if index.is_pairs else sequence

    def _with_pairs_apart(
        self, sequence: PackedSequence, number: int, pieces: slice, bounds: list[int]
    ) -> PackedSequence:
        """Every piece as the two conversations that it is."""
        index, filled = self.index, bounds[-1]
        if index.is_materialized:
            assert index.targets is not None, "opened with the folder"
            start = int(index.sequence_starts[number])
            targets = index.targets[start : start + filled]
        else:
            targets = np.concatenate([self._targets_of_piece(*one) for one in self.documents(number)])
        is_rejected = np.concatenate([(targets & OF_REJECTED) != 0, [False]])
        seconds = np.flatnonzero(is_rejected[1:] & ~is_rejected[:-1]) + 1
        # one within each piece, which it ends
        starts, ends = np.array(bounds[:-1]), np.array(bounds[1:])
        is_whole = len(seconds) == len(starts) and bool(((starts < seconds) & (seconds < ends)).all())
        if not is_whole or is_rejected[starts].any() or not is_rejected[ends - 1].all():
            raise DataFormatError(
                f"{index.folder}: sequence {number} holds a piece that is no pair; a file changed after it was "
                f"written, `hunyuan-data verify {index.folder}` says which"
            )
        sequence.labels[seconds - 1], sequence.loss_mask[seconds - 1] = index.pad_id, False
        cu_seqlens = np.sort(np.concatenate([sequence.cu_seqlens, seconds])).astype(np.int32)
        positions = self._ramp - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        return replace(sequence, positions=positions, cu_seqlens=cu_seqlens)

    def _targets_of_piece(self, document: int, start: int, length: int) -> np.ndarray:
        number = bisect_right(self._first_documents, document) - 1
        shard = self.index.shards[number]
        first = shard.start(document - self._first_documents[number]) + start
        return self._targets_of(shard)[first : first + length]

    def answers(self, number: int) -> slice:
        """Of a folder of pairs: where the answers of a sequence are in `reference`."""
        pieces = self._pieces(number)
        return slice(2 * pieces.start, 2 * pieces.stop)

    def _read_pieces(self, sequence: PackedSequence, pieces: slice, bounds: list[int]) -> None:
        """Fill in the pieces of a sequence from their documents."""
        index, first_documents = self.index, self._first_documents
        tokens, labels, loss_mask, positions = sequence.tokens, sequence.labels, sequence.loss_mask, sequence.positions
        columns = (index.piece_document[pieces].tolist(), index.piece_start[pieces].tolist(), bounds, bounds[1:])
        for document, start, begin, end in zip(*columns, strict=False):
            number = bisect_right(first_documents, document) - 1
            shard, within, length = index.shards[number], document - first_documents[number], end - begin
            first = shard.start(within) + start
            stream = shard.tokens[first : first + length + 1]
            tokens[begin:end] = stream[:length]
            positions[begin:end] = self._ramp[:length]
            if start + length < shard.lengths[within]:
                labels[begin:end] = stream[1:]
            else:
                labels[begin : end - 1] = stream[1:length]
                labels[end - 1], loss_mask[end - 1] = index.pad_id, False
            if index.is_chat:
                targets = self._targets_of(shard)
                loss_mask[begin : end - 1] = targets[first + 1 : first + length] & IS_TARGET
                loss_mask[end - 1] = False

    def _read_stretch(self, sequence: PackedSequence, number: int, pieces: slice, bounds: np.ndarray) -> None:
        """Fill in the pieces of a sequence from its materialized copy. `bounds` (pieces + 1,): where pieces begin and
        end."""
        index, filled = self.index, int(bounds[-1])
        start = int(index.sequence_starts[number])
        sequence.tokens[:filled] = index.tokens[start : start + filled]
        sequence.labels[: filled - 1] = sequence.tokens[1:filled]
        sequence.positions[:filled] = self._ramp[:filled] - np.repeat(bounds[:-1], np.diff(bounds))
        following = index.next_tokens[pieces]
        ends = bounds[1:] - 1
        sequence.loss_mask[ends] = following >= 0
        sequence.labels[ends] = np.where(following >= 0, following, index.pad_id)
        if index.is_chat:
            assert index.targets is not None, "opened with the folder"
            sequence.loss_mask[: filled - 1] = index.targets[start + 1 : start + filled] & IS_TARGET
            sequence.loss_mask[ends] = False

    @staticmethod
    def _targets_of(shard: TokenizedShard) -> np.ndarray:
        targets = shard.targets
        if targets is None:
            raise DataFormatError(f"{shard.folder}: shard {shard.name} has no mask of conversations; tokenize again")
        return targets

    @cached_property
    def _first_documents(self) -> list[int]:
        """Number of each shard's first document, over all sources."""
        return list(map(int, self.index.first_documents))

    def documents(self, number: int) -> list[tuple[int, int, int]]:
        """(document, first token within it, tokens) of each piece of a sequence; documents are numbered over all
        sources."""
        pieces = self._pieces(number)
        columns = (self.index.piece_document[pieces], self.index.piece_start[pieces], self.index.piece_length[pieces])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _pieces(self, number: int) -> slice:
        return slice(int(self.index.sequence_offsets[number]), int(self.index.sequence_offsets[number + 1]))
