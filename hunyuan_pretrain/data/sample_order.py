"""Which sequences a training step takes: the mixture over the packed datasets of the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hunyuan_pretrain.config.decisions import Window
from hunyuan_pretrain.config.history import Segment, SourceFacts
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.data.balance import deal
from hunyuan_pretrain.data.digests import digest_of
from hunyuan_pretrain.data.epochs import Selection
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.mixture import DataSegment, Mixture, SourceSize, source_path
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.packed_format import ARRAYS

_SHOWN = 8
"""Sources of which `SampleOrder.passes` has a line."""


class SampleOrder:
    """The global batch of every step. It depends only on the experiment with its seed and on the run's earlier
    segments, if any.

    `past`: the segments of the run before `first_step`, where `experiment` takes over, without the data `left_out` by
    roll-backs. If empty, `experiment` is the whole run.

    Raises DataFormatError if a dataset of a stage is missing or damaged, is packed to a sequence length
    other than the stage's, was tokenized with a tokenizer other than `tokenizer_digest` (None: not checked), has ids
    beyond the embedding, or cannot supply what the mixture asks of it; ConfigError as `Schedule.resumed`.
    """

    def __init__(
        self,
        experiment: Experiment,
        tokenizer_digest: str | None,
        past: Sequence[Segment] = (),
        first_step: int = 0,
        left_out: Sequence[Window] = (),
    ) -> None:
        self.experiment = experiment
        self.datasets: dict[str, PackedDataset] = {}
        """Packed dataset of each path of `experiment`."""
        for number, stage in enumerate(experiment.stages):
            for source in stage.data:
                path = source_path(source.path)
                if path not in self.datasets:
                    self.datasets[path] = open_packed(path, experiment.model.padded_vocab_size, tokenizer_digest)
                found = self.datasets[path].sequence_length
                if found != stage.sequence_length:
                    raise DataFormatError(
                        f"{path}: packed to sequences of {found} tokens, but stages[{number}] ({stage.name}) has "
                        f"sequence_length={stage.sequence_length}; set it to {found}, or run `hunyuan-data pack "
                        "--sequence-length "
                        f"{stage.sequence_length}`"
                    )
        self._check_tasks()
        self.facts = {path: facts_of(dataset) for path, dataset in self.datasets.items()}
        segments = data_segments(
            [(s.first_step, s.config, s.sources, s.left_out) for s in past]
            + [(first_step, experiment, self.facts, left_out)]
        )
        pairs = zip(segments[:-1], past, strict=True)
        self._past = {segment.name(path): (path, facts) for segment, s in pairs for path, facts in s.sources.items()}
        sizes = {
            name: SourceSize(
                facts.sequences, facts.tokens, documents=tuple(Selection(*entry) for entry in facts.documents)
            )
            for name, (_, facts) in self._past.items()
        }
        for path, dataset in self.datasets.items():
            index = dataset.index
            sizes[segments[-1].name(path)] = SourceSize(
                len(dataset), index.num_tokens, index.cost_order, index.selections, index.holds
            )
        self._open = {segments[-1].name(path): dataset for path, dataset in self.datasets.items()}
        self.mixture = Mixture(experiment.stages, sizes, experiment.seed, segments)
        self.schedule = self.mixture.schedule

    def _check_tasks(self) -> None:
        """Raise DataFormatError unless conversations are read by stages that train on answers, and these read some."""
        for number, stage in enumerate(self.experiment.stages):
            indexes = {one.path: self.datasets[source_path(one.path)].index for one in stage.data}
            if odd := [path for path, index in indexes.items() if index.is_pairs != (stage.task == "dpo")]:
                found = "pairs" if indexes[odd[0]].is_pairs else "no pairs"
                raise DataFormatError(
                    f"{odd[0]}: holds {found}, but stages[{number}] ({stage.name}) has task={stage.task}; pairs are "
                    "written by `hunyuan-data tokenize --pairs`, and read by stages with task: dpo only"
                )
            chats = [one.path for one in stage.data if self.datasets[source_path(one.path)].index.is_chat]
            if chats and stage.task == "pretrain":
                raise DataFormatError(
                    f"{chats[0]}: holds conversations, of which only answers are trained on, but stages[{number}] "
                    f"({stage.name}) has task=pretrain; set task: sft"
                )
            if not chats and stage.task == "sft":
                raise DataFormatError(
                    f"stages[{number}] ({stage.name}): task=sft, but none of its data holds conversations; tokenize "
                    "them with `hunyuan-data tokenize --chat`, or set task: pretrain"
                )

    @property
    def num_steps(self) -> int:
        """Steps of all stages together."""
        return self.schedule.num_steps

    def passes(self) -> list[str]:
        """How often each source is read by the end of the run, a line each: what the rounding to whole steps reads once
        more, or leaves out. Skipped sequences count as read."""
        read = dict.fromkeys(range(len(self.mixture.sources)), 0)
        for counts in self.mixture.counts:
            for source, count in counts.items():
                read[source] += count
        lines = []
        for source, count in read.items():
            size = self.mixture.sizes[source].sequences
            times, more = divmod(count, size)
            again = f", and {more:,} of them once more" if more else ""
            text = f"each read {times:,} times{again}" if times else f"of which {more:,} are read"
            lines.append(f"{self.mixture.sources[source]}: {size:,} sequences, {text}")
        return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], "more sources: `hunyuan-data mix` shows them"]

    def stage(self, step: int) -> StageConfig:
        """The stage of a global step, counted from 0. Raises IndexError if there is no such step."""
        return self.schedule.stage(step)

    def positions_of_stage(self, step: int, positions: np.ndarray) -> np.ndarray:
        """Positions in the stage's data of the given positions in the global batch of a step. Both count from 0."""
        piece = self.schedule.piece_of_step(step)
        found: np.ndarray = piece.position_of(
            (step - piece.first_step) * piece.stage.global_batch_sequences + positions
        )
        return found

    def sequences(self, step: int, positions: np.ndarray) -> list[tuple[PackedDataset, int]]:
        """(dataset, sequence) at the given positions in the global batch of a global step, counted from 0."""
        piece = self.schedule.piece_of_step(step)
        sources, rows = self.mixture.lookup(piece.lane, self.positions_of_stage(step, positions))
        return [(self._dataset(source), row) for source, row in zip(sources.tolist(), rows.tolist(), strict=True)]

    def costs(self, step: int) -> np.ndarray:
        """(global batch,) float64, sum of squared piece lengths of each sequence of a step: their only difference in
        cost."""
        sequences = self.sequences(step, np.arange(self.stage(step).global_batch_sequences))
        return np.array([dataset.index.squared_lengths[row] for dataset, row in sequences], dtype=np.float64)

    def most_documents(self, step: int) -> int:
        """At least as many documents as any micro-batch of the step's stage has, tail padding included. It depends on
        the data of the stage only, so it is the same on all ranks and when a run resumes."""
        stage = self.stage(step)
        pieces = max(self.datasets[source_path(source.path)].index.most_pieces for source in stage.data)
        return (pieces + 1) * stage.micro_batch_sequences

    def _dataset(self, source: int) -> PackedDataset:
        """The dataset of a source by number. One of an earlier segment is opened on first use. Raises DataFormatError
        if it has been packed again since."""
        name = self.mixture.sources[source]
        if name not in self._open:
            path, facts = self._past[name]
            dataset = PackedDataset(path)
            if facts.digest not in (None, facts_of(dataset).digest):
                raise DataFormatError(
                    f"{path}: packed again since the run read it, so its sequences are no longer known"
                )
            self._open[name] = dataset
        return self._open[name]


def facts_of(dataset: PackedDataset) -> SourceFacts:
    """What identifies a packed dataset: which documents it has in which sequences, whatever its path."""
    manifest = dataset.index.manifest
    arrays = {name: manifest.get("sha256", {}).get(f"{name}.npy") for name in ARRAYS}
    identity = [
        dataset.sequence_length,
        dataset.index.tokenizer_digest,
        arrays,
        [source["digest"] for source in manifest["sources"]],
    ]
    return SourceFacts(
        digest=digest_of(identity),
        sequences=len(dataset),
        tokens=dataset.index.num_tokens,
        sequence_length=dataset.sequence_length,
        documents=tuple((one.corpus, one.folder, one.shortest, one.longest) for one in dataset.index.selections),
        system_prompt=dataset.index.system_prompt,
    )


def data_segments(
    segments: Sequence[tuple[int, Experiment, Mapping[str, SourceFacts], Sequence[Window]]],
) -> list[DataSegment]:
    """The segments of a run for its mixture: first step, configuration, data, and data left out by roll-backs.

    A source is identified by its contents, so it may move. If it was packed again, it is a different source.
    """
    found: list[DataSegment] = []
    known: dict[str, str | None] = {}
    for first_step, experiment, sources, left_out in segments:
        before, names = dict(known), {}
        for path, facts in sources.items():
            is_same = path in before and (before[path] == facts.digest or None in (before[path], facts.digest))
            moved = [
                name for name, digest in before.items() if digest == facts.digest is not None and name not in sources
            ]
            if is_same or (path not in before and not moved):
                names[path] = path
            else:
                names[path] = moved[0] if moved else f"{path} (step {first_step + 1})"
            known[names[path]] = facts.digest
        found.append(DataSegment(first_step, experiment.stages, experiment.seed, names, left_out))
    return found


def positions_of_rank(order: SampleOrder, step: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """Positions in the global batch of a step that a data-parallel rank takes: (micro-batches, micro_batch_sequences)
    int64.

    All ranks compute the same assignment without communicating.
    """
    stage = order.stage(step)
    if stage.balance_attention == "off":
        return np.arange(stage.global_batch_sequences).reshape(-1, dp_size, stage.micro_batch_sequences)[:, dp_rank]
    return deal(order.costs(step), dp_size, stage.micro_batch_sequences)[:, dp_rank]


def open_packed(path: str, padded_vocab_size: int, tokenizer_digest: str | None) -> PackedDataset:
    """Open a packed dataset. Raises DataFormatError if that fails or an id of its vocabulary has no row in the
    embedding."""
    dataset = PackedDataset(path, tokenizer_digest)
    if dataset.index.vocab_size > padded_vocab_size:
        raise DataFormatError(
            f"{path}: tokenized with a vocabulary of {dataset.index.vocab_size} ids, but "
            f"model.padded_vocab_size={padded_vocab_size}; "
            f"set it to at least {dataset.index.vocab_size}"
        )
    return dataset
