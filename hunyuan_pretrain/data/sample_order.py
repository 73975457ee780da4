"""Which sequences a training step takes: the mixture over the packed datasets of the stages."""

from __future__ import annotations

import numpy as np

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.balance import deal
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.mixture import Mixture, SourceSize, source_path
from hunyuan_pretrain.data.packed_dataset import PackedDataset


class SampleOrder:
    """The global batch of every step, which the experiment's seed alone decides.

    Raises DataFormatError if a dataset of a stage is missing or damaged, is packed to another sequence length than the stage's, was
    tokenized with a tokenizer other than `tokenizer_digest` (None: not checked), has ids beyond the embedding, or cannot give what the
    mixture asks of it.
    """

    def __init__(self, experiment: Experiment, tokenizer_digest: str | None) -> None:
        self.experiment = experiment
        self.datasets: dict[str, PackedDataset] = {}
        for number, stage in enumerate(experiment.stages):
            for source in stage.data:
                path = source_path(source.path)
                if path not in self.datasets:
                    self.datasets[path] = open_packed(path, experiment.model.padded_vocab_size, tokenizer_digest)
                found = self.datasets[path].sequence_length
                if found != stage.sequence_length:
                    raise DataFormatError(
                        f"{path}: packed to sequences of {found} tokens, but stages[{number}] ({stage.name}) has "
                        f"sequence_length={stage.sequence_length}; set it to {found}, or run `hunyuan-data pack --sequence-length "
                        f"{stage.sequence_length}`"
                    )
        sizes = {}
        for path, dataset in self.datasets.items():
            index = dataset.index
            sizes[path] = SourceSize(len(dataset), index.num_tokens, index.cost_order, index.selections, index.holds)
        self.mixture = Mixture(experiment.stages, sizes, experiment.seed)
        self.first_steps = np.cumsum([0] + [stage.num_steps for stage in experiment.stages])
        self._by_number = [self.datasets[path] for path in self.mixture.sources]

    @property
    def num_steps(self) -> int:
        """Steps of all stages together."""
        return int(self.first_steps[-1])

    def stage_of_step(self, step: int) -> tuple[int, int]:
        """(stage, step within it) of a global step, both from 0."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        stage = int(np.searchsorted(self.first_steps, step, side="right")) - 1
        return stage, step - int(self.first_steps[stage])

    def sequences(self, step: int, places: np.ndarray) -> list[tuple[PackedDataset, int]]:
        """(dataset, sequence) of some places of the global batch of a global step, counted from 0."""
        stage, step_in_stage = self.stage_of_step(step)
        data_step = self.mixture.data_step(stage, step_in_stage)
        sources, rows = self.mixture.lookup(stage, data_step * self.experiment.stages[stage].global_batch_sequences + places)
        return [(self._by_number[source], row) for source, row in zip(sources.tolist(), rows.tolist(), strict=True)]

    def costs(self, step: int) -> np.ndarray:
        """(global batch,) sum of squared piece lengths of each sequence of a step, which is what they differ by in work."""
        stage = self.experiment.stages[self.stage_of_step(step)[0]]
        sequences = self.sequences(step, np.arange(stage.global_batch_sequences))
        return np.array([dataset.index.squared_lengths[row] for dataset, row in sequences], dtype=np.float64)


def places_of_rank(order: SampleOrder, step: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """Places in the global batch of a step that a data-parallel rank takes: (micro-batches, micro_batch_sequences) int64.

    All ranks find the same deal, without asking each other.
    """
    stage = order.experiment.stages[order.stage_of_step(step)[0]]
    if stage.balance_attention == "off":
        return np.arange(stage.global_batch_sequences).reshape(-1, dp_size, stage.micro_batch_sequences)[:, dp_rank]
    return deal(order.costs(step), dp_size, stage.micro_batch_sequences)[:, dp_rank]


def open_packed(path: str, padded_vocab_size: int, tokenizer_digest: str | None) -> PackedDataset:
    """A packed dataset whose ids all have a row in the embedding. Raises DataFormatError."""
    dataset = PackedDataset(path, tokenizer_digest)
    if dataset.index.vocab_size > padded_vocab_size:
        raise DataFormatError(
            f"{path}: tokenized with a vocabulary of {dataset.index.vocab_size} ids, but model.padded_vocab_size={padded_vocab_size}; "
            f"set it to at least {dataset.index.vocab_size}"
        )
    return dataset
