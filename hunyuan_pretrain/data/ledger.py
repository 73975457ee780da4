"""What was in a batch: the documents of every sequence of a step, traced back to the corpus files.

Nothing is recorded during training. The data order is a pure function of the experiment and the step, so the ledger is
computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.sample_order import SampleOrder


@dataclass(frozen=True)
class LedgerPiece:
    """A run of tokens of one document in a sequence."""

    position: int
    """Position of its first token in the sequence."""
    tokens: int
    tokenized: str
    """Folder of `hunyuan-data tokenize`."""
    document: int
    """Number of the document in that folder."""
    first_token: int
    """Index of the piece's first token within the document."""
    file: str
    """File of the corpus."""
    place: int
    """Byte offset of the document's line in the file (before compression), its row, or 0."""


@dataclass(frozen=True)
class LedgerSequence:
    """One sequence of a global batch."""

    place: int
    """Position in the global batch."""
    packed: str
    """Folder of `hunyuan-data pack`."""
    sequence: int
    """Number of the sequence in that folder."""
    pieces: list[LedgerPiece]


def sequences_of_step(order: SampleOrder, step: int) -> Iterator[LedgerSequence]:
    """The sequences of a global step's batch, in order; steps count from 0. Raises IndexError if there is no such
    step."""
    places = np.arange(order.stage(step).global_batch_sequences)
    for place, (dataset, sequence) in zip(places.tolist(), order.sequences(step, places), strict=True):
        yield LedgerSequence(place, str(dataset.index.folder), sequence, pieces_of(dataset, sequence))


def pieces_of(dataset: PackedDataset, sequence: int) -> list[LedgerPiece]:
    """The documents of one packed sequence."""
    pieces, position = [], 0
    for document, first_token, tokens in dataset.documents(sequence):
        source, within = dataset.index.locate(document)
        origin = source.origin(within)
        folder = str(source.folder)
        pieces.append(LedgerPiece(position, tokens, folder, within, first_token, origin.path, origin.position))
        position += tokens
    return pieces
