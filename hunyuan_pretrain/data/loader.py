"""The batches of one data-parallel rank.

The global batch of a step is fixed by the seed alone. Micro-batch m of rank r takes micro_batch_sequences of its
sequences, starting at (m * dp_size + r) * micro_batch_sequences, or as balance_attention assigns them. Ranks and
micro-batches only split the same sequences among themselves, so a run continues exactly with another number of ranks.
There is no state to save: the step and the run's segments are the state.

Shapes: T = micro_batch_sequences * S tokens, the sequences concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from hunyuan_pretrain.config.decisions import Window
from hunyuan_pretrain.config.history import Segment
from hunyuan_pretrain.config.schema import EvaluationSet, Experiment
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.packed_dataset import PackedDataset, PackedSequence
from hunyuan_pretrain.data.packed_format import PackedIndex
from hunyuan_pretrain.data.sample_order import SampleOrder, open_packed, positions_of_rank


@dataclass(frozen=True)
class PairedAnswers:
    """The answers of the P pairs of a micro-batch: 2 n is the chosen one of pair n, 2 n + 1 the rejected one."""

    answer_T: torch.Tensor
    """int64, the answer whose conversation a token belongs to; -1 for padding."""
    reference_A: torch.Tensor
    """float64 (2 P,), log-probabilities under the reference model; NaN before a run has asked it."""
    chosen_tokens: int
    """Target tokens of the chosen answers."""


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass on one rank. Tensors are on the CPU."""

    tokens_T: torch.Tensor
    """int64."""
    labels_T: torch.Tensor
    """int64, the token to predict at each position."""
    loss_mask_T: torch.Tensor
    """float32, 1 where the label counts and 0 elsewhere; after `by_conversation` weights."""
    positions_T: torch.Tensor
    """int64, from 0 in each piece of a document."""
    cu_seqlens: torch.Tensor
    """(pieces + 1,) int32, boundaries of the pieces over all of T; every end of a sequence is one."""
    max_seqlen: int
    """Tokens of the longest piece."""
    sequence_ids: torch.Tensor
    """(micro_batch_sequences,) int64, the position of each sequence in the global batch of the step."""
    target_bytes: int = 0
    """Bytes of text that the target tokens stand for, where the loader knows the bytes of a token."""
    pairs: PairedAnswers | None = None
    """Of a stage with task=dpo."""


def by_conversation(batch: MicroBatch) -> tuple[MicroBatch, int]:
    """(the batch with loss weights that add up to 1 in each document with a label, the number of these documents)."""
    lengths = batch.cu_seqlens.diff().long()
    piece_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    targets_n = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, piece_T, batch.loss_mask_T.double())
    weight_T = batch.loss_mask_T / targets_n.clamp(min=1)[piece_T]
    return replace(batch, loss_mask_T=weight_T.float()), int((targets_n > 0).sum())


class StepLoader:
    """Micro-batches of one rank by global step, counted from 0 over all stages. The next step is read while the model
    works on this one.

    Raises DataFormatError if a stage's global batch is not a multiple of dp_size x micro_batch_sequences, or if a
    dataset of a stage is missing or damaged, is packed to a sequence length other than the stage's, was tokenized with
    a tokenizer other than `tokenizer_digest` (None: not checked), or has ids beyond the embedding.
    """

    def __init__(
        self,
        experiment: Experiment,
        dp_rank: int,
        dp_size: int,
        tokenizer_digest: str | None,
        past: Sequence[Segment] = (),
        first_step: int = 0,
        left_out: Sequence[Window] = (),
        token_bytes: np.ndarray | None = None,
    ) -> None:
        """past, first_step, left_out: as for SampleOrder. token_bytes: (V,) bytes of text per id, for
        `target_bytes`."""
        assert 0 <= dp_rank < dp_size
        for number, stage in enumerate(experiment.stages):
            if stage.global_batch_sequences % (dp_size * stage.micro_batch_sequences):
                raise DataFormatError(
                    f"stages[{number}] ({stage.name}): global_batch_sequences={stage.global_batch_sequences} is "
                    "not a multiple of "
                    f"data-parallel size {dp_size} x micro_batch_sequences {stage.micro_batch_sequences} = "
                    f"{dp_size * stage.micro_batch_sequences}"
                )
        self.experiment, self.dp_rank, self.dp_size = experiment, dp_rank, dp_size
        self.token_bytes = token_bytes
        self.order = SampleOrder(experiment, tokenizer_digest, past, first_step, left_out)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    @property
    def pad_id(self) -> int:
        """Id of <|pad|>: the same in all data, which one tokenizer has tokenized."""
        return self.indexes[0].pad_id

    @property
    def num_steps(self) -> int:
        """Steps of all stages together."""
        return self.order.num_steps

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a global step, in execution order. Raises IndexError if there is no such
        step."""
        self.order.stage(step)
        prefetched, self._next = self._next, None
        batches = prefetched[1].result() if prefetched and prefetched[0] == step else self._read(step)
        if step + 1 < self.num_steps:
            self._next = (step + 1, self._thread.submit(self._read, step + 1))
        return batches

    @property
    def indexes(self) -> list[PackedIndex]:
        """The packed folders that it reads."""
        return [dataset.index for dataset in self.order.datasets.values()]

    def close(self) -> None:
        """Stop the reader thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> list[MicroBatch]:
        stage = self.order.stage(step)
        positions = positions_of_rank(self.order, step, self.dp_rank, self.dp_size)
        sequences = self.order.sequences(step, positions.ravel())
        width = stage.micro_batch_sequences
        return [
            _micro_batch(sequences[m * width : (m + 1) * width], positions[m], self.token_bytes)
            for m in range(len(positions))
        ]

    def forget(self) -> None:
        """Read the next step again: reference log-probabilities have come."""
        self._next = None


class EvaluationLoader:
    """The first sequences of the validation data in a fixed order, split over the ranks. Every rank has the same number
    of micro-batches.

    Fully masked sequences fill the last ones; their `sequence_ids` are `num_sequences` and above. Raises
    DataFormatError if the data is missing, damaged, or does not fit the tokenizer or the embedding.
    """

    def __init__(
        self,
        experiment: Experiment,
        dp_rank: int,
        dp_size: int,
        tokenizer_digest: str | None,
        micro_batch_multiple: int = 1,
        named: EvaluationSet | None = None,
        token_bytes: np.ndarray | None = None,
    ) -> None:
        """micro_batch_multiple: each rank's number of micro-batches is a multiple of this. named: one of
        evaluation.sets; None: evaluation.data.

        token_bytes: (V,) bytes of text per id, for `target_bytes`.
        """
        assert 0 <= dp_rank < dp_size
        evaluation = experiment.evaluation
        path = named.path if named else evaluation.data
        assert path is not None, "evaluation.data is null"
        self._dataset = open_packed(path, experiment.model.padded_vocab_size, tokenizer_digest)
        if self._dataset.index.is_pairs:
            raise DataFormatError(f"{path}: holds pairs, which a validation cannot read; give conversations or texts")
        self.sequence_length = self._dataset.sequence_length
        limit = (named.max_sequences if named else None) or evaluation.max_sequences
        self.num_sequences = min(len(self._dataset), limit or len(self._dataset))
        self.token_bytes = token_bytes
        at_a_time = dp_size * evaluation.micro_batch_sequences * micro_batch_multiple
        self._positions = _positions_of_rank(
            -(-self.num_sequences // at_a_time) * at_a_time, evaluation.micro_batch_sequences, dp_rank, dp_size
        )

    @property
    def is_chat(self) -> bool:
        """Whether it holds conversations."""
        return self._dataset.index.is_chat

    @property
    def indexes(self) -> list[PackedIndex]:
        """The packed folder that it reads."""
        return [self._dataset.index]

    @cached_property
    def target_bytes(self) -> int | None:
        """Bytes of text that this rank's target tokens stand for; None if unknown."""
        if self.token_bytes is None:
            return None
        sequences = [
            self._sequence(position) for position in self._positions.ravel().tolist() if position < self.num_sequences
        ]
        return target_bytes_of(sequences, self.token_bytes)

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.micro_batches()

    def micro_batches(self, first: int = 0) -> Iterator[MicroBatch]:
        """From number `first` on."""
        for positions in self._positions[first:]:
            yield _collate([self._sequence(position) for position in positions.tolist()], positions)

    def _sequence(self, position: int) -> PackedSequence:
        if position < self.num_sequences:
            return self._dataset[position]
        size = self.sequence_length
        padding = np.full(size, self._dataset.index.pad_id, dtype=np.int32)
        cu_seqlens = np.array([0, size], dtype=np.int32)
        return PackedSequence(
            padding, padding, np.zeros(size, dtype=np.bool_), np.arange(size, dtype=np.int32), cu_seqlens
        )


def _positions_of_rank(global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """Positions of a rank's sequences in the global batch: (micro-batches, micro_batch) int64."""
    return np.arange(global_batch).reshape(-1, dp_size, micro_batch)[:, dp_rank]


def target_bytes_of(sequences: Sequence[PackedSequence], token_bytes: np.ndarray) -> int:
    """Bytes of text that the target tokens stand for. <|endoftext|> is a target of 0 bytes."""
    return sum(int(token_bytes[sequence.labels[sequence.loss_mask]].sum()) for sequence in sequences)


def _collate(
    sequences: list[PackedSequence], positions: np.ndarray, token_bytes: np.ndarray | None = None
) -> MicroBatch:
    size = len(sequences[0].tokens)
    # The end of each sequence is the start of the next, so it is written once.
    parts = [np.zeros(1, dtype=np.int32)] + [
        sequence.cu_seqlens[1:] + np.int32(i * size) for i, sequence in enumerate(sequences)
    ]
    return MicroBatch(
        tokens_T=_joined([sequence.tokens for sequence in sequences], torch.int64),
        labels_T=_joined([sequence.labels for sequence in sequences], torch.int64),
        loss_mask_T=_joined([sequence.loss_mask for sequence in sequences], torch.float32),
        positions_T=_joined([sequence.positions for sequence in sequences], torch.int64),
        cu_seqlens=torch.from_numpy(np.concatenate(parts)),
        max_seqlen=max(int(np.diff(sequence.cu_seqlens).max()) for sequence in sequences),
        sequence_ids=torch.from_numpy(positions.copy()),
        target_bytes=0 if token_bytes is None else target_bytes_of(sequences, token_bytes),
    )


def _micro_batch(
    sequences: list[tuple[PackedDataset, int]], positions: np.ndarray, token_bytes: np.ndarray | None = None
) -> MicroBatch:
    batch = _collate([dataset[row] for dataset, row in sequences], positions, token_bytes)
    return replace(batch, pairs=_paired(batch, sequences)) if sequences[0][0].index.is_pairs else batch


def _paired(batch: MicroBatch, sequences: list[tuple[PackedDataset, int]]) -> PairedAnswers:
    references, answers, size = [], [], len(batch.tokens_T) // len(sequences)
    bounds, first = batch.cu_seqlens.numpy(), 0
    for number, (dataset, row) in enumerate(sequences):
        place = dataset.answers(row)
        count = place.stop - place.start
        references.append(np.full(count, np.nan) if dataset.reference is None else dataset.reference[place])
        pieces = np.searchsorted(bounds, (number + 1) * size) - np.searchsorted(bounds, number * size)
        answers += [*range(first, first + count), *[-1] * (int(pieces) - count)]
        first += count
    answer_T = np.repeat(np.array(answers, dtype=np.int64), np.diff(bounds))
    is_chosen = (answer_T >= 0) & (answer_T % 2 == 0)
    chosen_tokens = int(batch.loss_mask_T.numpy()[is_chosen].sum())
    return PairedAnswers(torch.from_numpy(answer_T), torch.from_numpy(np.concatenate(references)), chosen_tokens)


class PairLoader:
    """Every sequence of a folder of pairs, split over the data-parallel ranks. All ranks have the same number of
    micro-batches, which the last sequence fills up."""

    def __init__(
        self, dataset: PackedDataset, micro_batch: int, dp_rank: int, dp_size: int, micro_batch_multiple: int
    ) -> None:
        self.dataset = dataset
        at_a_time = dp_size * micro_batch * micro_batch_multiple
        rows = _positions_of_rank(-(-len(dataset) // at_a_time) * at_a_time, micro_batch, dp_rank, dp_size)
        self._is_extra = rows >= len(dataset)
        self.rows = np.minimum(rows, len(dataset) - 1)
        """(micro-batches, micro_batch)."""

    def micro_batches(self, first: int, last: int) -> Iterator[MicroBatch]:
        """From number `first` up to `last`."""
        for rows in self.rows[first:last]:
            yield _micro_batch([(self.dataset, row) for row in rows.tolist()], rows)

    def put(self, found: np.ndarray, number: int, of_answers: np.ndarray) -> None:
        """Write the numbers of the answers of micro-batch `number` where `PackedDataset.reference` has them."""
        first = 0
        for row, is_extra in zip(self.rows[number].tolist(), self._is_extra[number].tolist(), strict=True):
            place = self.dataset.answers(row)
            count = place.stop - place.start
            if not is_extra:
                found[place] = of_answers[first : first + count]
            first += count


def _joined(parts: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    """The parts concatenated, copied once."""
    joined = torch.empty(sum(len(part) for part in parts), dtype=dtype)
    np.concatenate(parts, out=joined.numpy(), casting="unsafe")
    return joined
