"""The history of a run: its segments. Each has a configuration, the step from which it applies, and the data,
tokenizer, ranks and versions that it ran with.

The history is in every checkpoint's complete.json, so a copied checkpoint has it too. For the whole run it is in
<run_dir>/segments.json, with the configuration of each segment in <run_dir>/segments/NNNN.yaml. Code that reads a run
uses the segment that applied at the time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hunyuan_pretrain.config.decisions import LEDGER, Window
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.load import dump_resolved, load_experiment
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import section_of

INDEX = "segments.json"
FOLDER = "segments"
ABANDONED = "abandoned"
RESOLVED = "resolved.yaml"


class SourceFacts(BaseModel):
    """A packed dataset as it was when a segment started."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    digest: str | None = None
    """Of its content, independent of its path; None if it was not recorded."""
    sequences: int
    tokens: int
    """Without padding."""
    sequence_length: int
    documents: tuple[tuple[str, str, int, int], ...] = ()
    """The documents in it: digest and name of a tokenized folder, and shortest and longest length in tokens."""
    system_prompt: str | None = None
    """Of conversations without a system message, "" for none; None for texts, and if it was not recorded."""


class Segment(BaseModel):
    """A configuration, the step from which it applies, and what it ran with."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    first_step: int
    """Number of steps trained before it."""
    experiment: dict[str, Any]
    """The resolved configuration."""
    position: dict[str, int | str] = {}
    """Where the run was, as returned by `Schedule.position`."""
    started: str = ""
    """UTC."""
    world_size: int | None = None
    layout: str = ""
    sources: dict[str, SourceFacts] = {}
    """By path."""
    tokenizer_digest: str | None = None
    versions: dict[str, str | None] = {}
    """Of Python, the packages and the code; `commit` ends in + if files differ from it."""
    attention: dict[str, str] = {}
    """Kind of micro-batch -> the attention backend that computes it (config/attention.py); empty on a CPU, and if it
    was not recorded."""
    changes: list[str] = []
    """Differences from the previous segment, one line each."""
    accepted: list[str] = []
    """Keys of changes that were accepted with --accept-changes."""
    resume_from: str | None = None
    """The value of checkpoint.resume_from, if this segment branched off."""
    left_out: tuple[Window, ...] = ()
    """Data that roll-backs up to this segment left out."""

    @cached_property
    def config(self) -> Experiment:
        """The configuration, without settings that this version does not know. Raises ConfigError if it is invalid."""
        return experiment_of(self.experiment, "the history of the run")


def schedule_of(segments: Sequence[Segment]) -> Schedule:
    """The schedule of a run with these segments, of which there is at least one."""
    return Schedule.of_segments(
        [(segment.first_step, segment.config.stages) for segment in segments],
        [segment.left_out for segment in segments],
    )


def experiment_of(fields: Mapping[str, Any], source: str) -> Experiment:
    """A recorded configuration, without settings that this version does not know. Raises ConfigError if it is
    invalid."""
    try:
        return Experiment.model_validate(_known(fields, Experiment))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise ConfigError(
            source, [Problem(path, first.get("input"), f"recorded by another version: {first['msg']}")]
        ) from None


def read_history(run_dir: Path) -> list[Segment]:
    """The segments of a run, oldest first; [] if none has started. For runs from before segments were recorded,
    resolved.yaml is the only segment.

    Raises ConfigError if segments.json is damaged.
    """
    index = run_dir / INDEX
    if index.exists():
        try:
            return segments_of(json.loads(index.read_text(encoding="utf-8"))["segments"])
        except (ValueError, KeyError, TypeError) as error:
            rule = f"damaged: {str(error).splitlines()[0]}"
            hint = (
                f"remove it: the newest checkpoint also has the history, and the next start of the run rewrites {INDEX}"
            )
            raise ConfigError(str(index), [Problem("segments", Problem.NO_VALUE, rule, hint)]) from None
    if (run_dir / RESOLVED).exists():
        return [Segment(first_step=0, experiment=load_experiment(run_dir / RESOLVED).model_dump(mode="json"))]
    return []


def segments_of(entries: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Segments from parsed JSON. Raises ValueError if an entry is invalid."""
    return [Segment.model_validate(entry) for entry in entries]


def set_aside_later(run_dir: Path, folders: Sequence[Path], *, even_without: bool = False) -> Path | None:
    """Move checkpoints (`folders`) that a branch leaves behind to the next <run_dir>/abandoned/NNN, with copies of the
    run's records.

    Returns that folder, which is itself a run directory; None if there is nothing to move, unless `even_without`.
    Raises OSError.
    """
    if not folders and not even_without:
        return None
    numbers = [int(path.name) for path in (run_dir / ABANDONED).glob("[0-9][0-9][0-9]")]
    place = run_dir / ABANDONED / f"{max(numbers, default=0) + 1:03d}"
    (place / "checkpoints").mkdir(parents=True)
    for name in (RESOLVED, INDEX, LEDGER, "metrics.jsonl"):
        if (run_dir / name).exists():
            shutil.copy2(run_dir / name, place / name)
    if (run_dir / FOLDER).exists():
        shutil.copytree(run_dir / FOLDER, place / FOLDER)
    if (run_dir / "tokenizer").exists():
        (place / "tokenizer").symlink_to(Path("../../tokenizer"))
    for folder in folders:
        folder.rename(place / "checkpoints" / folder.name)
    return place


def write_history(run_dir: Path, segments: Sequence[Segment]) -> None:
    """Write segments.json, and the configuration of each segment to segments/. Raises OSError."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{number:04d}.yaml": segment for number, segment in enumerate(segments, start=1)}
    for path, segment in files.items():
        write_whole(path, dump_resolved(segment.config))
    for path in set(folder.glob("[0-9]*.yaml")) - files.keys():  # of an abandoned branch
        path.unlink()
    write_whole(
        run_dir / INDEX,
        json.dumps({"segments": [segment.model_dump(mode="json") for segment in segments]}, indent=1) + "\n",
    )


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: a reader finds the old or the new content, never a part. Raises OSError."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _known(value: Any, section: Any) -> Any:
    """A recorded section without the settings that this version does not know."""
    if isinstance(value, (list, tuple)):
        return [_known(item, section) for item in value]
    if not isinstance(value, Mapping) or section is None:
        return value
    fields = section.model_fields
    return {name: _known(item, section_of(fields[name].annotation)) for name, item in value.items() if name in fields}
