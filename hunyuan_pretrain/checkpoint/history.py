"""What a checkpoint records about its run: the segments up to it, and the piece of the schedule in which it was
taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.folders import read_marker
from hunyuan_pretrain.config.history import Segment, SourceFacts, read_history, segments_of
from hunyuan_pretrain.config.schedule import Piece, Schedule
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.mixture import source_path
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.sample_order import facts_of
from hunyuan_pretrain.data.tokenizer import Tokenizer


def history_of(folder: Path, marker: Mapping[str, Any], with_data: bool = True) -> list[Segment]:
    """The segments of a run up to a checkpoint. A checkpoint without recorded segments uses those of its run directory.

    with_data: for such a checkpoint, also open the data that the run has read, because its sizes were not recorded.
    Raises CheckpointError if the marker is damaged or nothing is recorded, DataFormatError if such data is missing.
    """
    if marker.get("history"):
        try:
            return segments_of(marker["history"])
        except ValueError as error:
            raise CheckpointError(f"{folder}: its history is damaged: {str(error).splitlines()[0]}") from None
    found = [
        segment for segment in read_history(folder.resolve().parent.parent) if segment.first_step < int(marker["step"])
    ]
    if not found:
        raise CheckpointError(
            f"{folder}: it has no history, and its run directory has no resolved.yaml, so what it was trained on "
            "is unknown; "
            "put resolved.yaml beside checkpoints/, or start another run with checkpoint.init_from"
        )
    if not with_data:
        return found
    return [
        segment if segment.sources else segment.model_copy(update={"sources": _undigested(segment.config)})
        for segment in found
    ]


def present_piece(schedule: Schedule, step: int, folder: Path) -> Piece:
    """The piece with the last step of a checkpoint. Raises CheckpointError if the schedule ends before that step."""
    try:
        return schedule.piece_of_step(max(step - 1, 0))
    except IndexError:
        raise CheckpointError(
            f"{folder}: it was taken after {step} steps, but the configuration beside it, resolved.yaml, ends "
            f"after {schedule.num_steps}: "
            "a shorter run has overwritten it; put the run's own configuration back"
        ) from None


def refuse_another_vocabulary(folder: Path, tokenizer: Path) -> None:
    """Raise CheckpointError if a checkpoint was trained with another tokenizer than the one in a folder,
    DataFormatError if there is none. A checkpoint that does not record its tokenizer passes."""
    trained_with = history_of(folder, read_marker(folder), with_data=False)[-1].tokenizer_digest
    found = Tokenizer.load(tokenizer).digest
    if trained_with not in (None, found):
        raise CheckpointError(
            f"{tokenizer}: its vocabulary is not the one that {folder} was trained with (digest {found[:12]}, not "
            f"{str(trained_with)[:12]}), so ids would stand for other text; put the run's own hy.tiktoken back"
        )


def sources_of(experiment: Experiment) -> dict[str, SourceFacts]:
    """The packed datasets of all stages, by path. Raises DataFormatError."""
    paths = dict.fromkeys(source_path(source.path) for stage in experiment.stages for source in stage.data)
    return {path: facts_of(PackedDataset(path)) for path in paths}


def _undigested(experiment: Experiment) -> dict[str, SourceFacts]:
    """What the paths of a configuration hold now, without digests: what they held when it was in force is unknown."""
    return {path: facts.model_copy(update={"digest": None}) for path, facts in sources_of(experiment).items()}
