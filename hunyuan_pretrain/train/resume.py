"""How a run resumes: what its checkpoint holds, what has changed since, whether the changes are allowed, and the new
history."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.folders import refuse_other_model
from hunyuan_pretrain.checkpoint.history import history_of, present_piece, sources_of
from hunyuan_pretrain.checkpoint.weights_only import WEIGHTS_ONLY
from hunyuan_pretrain.config.acceptance import check_accepted, is_accepted, refusal, refusal_text
from hunyuan_pretrain.config.changes import (
    Difference,
    Kind,
    all_differences,
    attention_differences,
    model_differences,
)
from hunyuan_pretrain.config.decisions import Decision, InForce
from hunyuan_pretrain.config.derived import data_parallel_size
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.history import Segment, schedule_of
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.parallel.agreement import from_rank_0

T = TypeVar("T")


OWES_VALIDATION, OWES_TASKS = "owes_validation", "owes_tasks"
"""Keys of complete.json: a stop cut the validation, or the benchmarks, after this step short."""


@dataclass(frozen=True)
class Start:
    """Where a run starts or resumes."""

    history: tuple[Segment, ...]
    """All segments; the last one is current."""
    first_step: int
    """Number of steps done."""
    is_new_segment: bool
    lines: tuple[str, ...]
    """For the log: what was read and what has changed."""
    leaves: tuple[Path, ...] = ()
    """Later checkpoints in run_dir, which a branch leaves behind."""
    owes: frozenset[str] = frozenset()
    """What a stop after `first_step` has left undone, such as OWES_VALIDATION."""
    noise: Mapping[str, Any] | None = None
    """The measured noise scale of the checkpoint (train.noise_scale.NoiseScale.state)."""
    judged: Mapping[str, Any] | None = None
    """What the checkpoint knows of good steps (train.policies.Judge.state)."""
    decisions: InForce = field(default_factory=InForce)
    """Of the run's ledger."""
    num_skipped: int = 0
    """How many of the steps before updated nothing."""
    base: Mapping[str, Any] | None = None
    """With LoRA, the weights that the adapters belong to (train.base_weights.Base.record)."""

    def after(self, lines: Sequence[str]) -> Start:
        """A copy with `lines` before its own log lines."""
        return replace(self, lines=(*lines, *self.lines))

    @property
    def past(self) -> tuple[Segment, ...]:
        """The segments before the last."""
        return self.history[:-1]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """`history`, and after it the segments that begin with a roll-back of the ledger at this step or later."""
        found = [*self.history]
        for rollback in self.decisions.rollbacks:
            assert rollback.to_step is not None
            if rollback.to_step >= self.first_step:
                found.append(_rolled_back(found, rollback))
        return tuple(found)


def begin(
    experiment: Experiment, met: Mapping[str, Any], lines: tuple[str, ...] = (), changes: tuple[str, ...] = ()
) -> Start:
    """The start of a run without a checkpoint. `met`: from `what_is_met`."""
    segment = _segment(experiment, met, 0, Schedule.of(experiment.stages).position(0), changes)
    return Start((segment,), 0, True, lines)


def go_on(
    experiment: Experiment,
    met: Mapping[str, Any],
    folder: Path,
    marker: Mapping[str, Any],
    accepted: Collection[str] = (),
) -> Start:
    """The start of a run that resumes from a checkpoint; `marker` is the content of its complete.json.

    `accepted`: keys of changes that the user accepts. Raises CheckpointError, which names every difference that is not
    allowed, and ConfigError if a stage would end before the point already trained.
    """
    check_accepted(accepted)
    if marker.get(WEIGHTS_ONLY):
        raise CheckpointError(
            f"{folder}: an imported model: it has weights and no training state, so no run resumes from it; set "
            f"checkpoint.init_from={folder.parent.parent}, with another run_dir"
        )
    step = int(marker["step"])
    past = history_of(folder, marker)
    schedule = schedule_of(past)
    present = present_piece(schedule, step, folder)
    new = _segment(experiment, met, step, {}, ()).model_copy(update={"left_out": past[-1].left_out})
    found = all_differences(past[-1], new, present)
    _refuse(folder, found, accepted, schedule, step, experiment)
    recorded = marker.get("position")
    if recorded is not None and recorded != schedule.position(step):
        raise CheckpointError(
            f"{folder}: its position {recorded} contradicts its history, which gives {schedule.position(step)}"
        )
    lines = [f"resumes from {folder}: {_where(schedule, step)}, saved by {_layout_of(past[-1], marker)}"]
    lines += _changes_lines(found, accepted)
    start = Start(tuple(past), step, False, tuple(lines))
    skipped = step - int(marker.get("updates", step))
    start = replace(start, noise=marker.get("noise_scale"), judged=marker.get("judged"), num_skipped=skipped)
    if not found:
        return start
    new = new.model_copy(
        update={
            "position": schedule.position(step),
            "changes": [str(one) for one in found],
            "accepted": [one.key for one in found if one.kind == Kind.refused and is_accepted(one.key, accepted)],
        }
    )
    return replace(start, history=(*past, new), is_new_segment=True)


def _rolled_back(history: Sequence[Segment], rollback: Decision) -> Segment:
    """The segment that begins with a roll-back."""
    last, step = history[-1], rollback.to_step
    assert step is not None
    ranges = ", ".join(f"sequences {first:,} to {end - 1:,} of {stage}" for stage, first, end in rollback.data)
    changes = {
        "first_step": step,
        "position": schedule_of(history).position(step),
        "changes": [f"rolled back from step {rollback.step} ({rollback.cause}), leaving out {ranges}"],
        "accepted": [],
        "resume_from": None,
        "left_out": (*last.left_out, *rollback.data),
    }
    return last.model_copy(update=changes)


def is_of_branch(
    experiment: Experiment, met: Mapping[str, Any], folder: Path, marker: Mapping[str, Any], resume_from: str
) -> bool:
    """Whether a checkpoint already belongs to the branch that `resume_from` asks for, with no change since then that
    would make it a different branch.

    Layout, ranks and versions may change, so that a restarted job continues its branch instead of starting it again.
    """
    if not marker.get("history"):
        return False
    past = history_of(folder, marker)
    branches = [segment.resume_from for segment in past if segment.resume_from is not None]
    if not branches or branches[-1] != resume_from:
        return False
    schedule = schedule_of(past)
    new = _segment(experiment, met, int(marker["step"]), {}, ())
    found = all_differences(past[-1], new, present_piece(schedule, int(marker["step"]), folder))
    return all(
        one.kind == Kind.harmless or one.key.startswith(("parallel.", "world_size", "versions.")) for one in found
    )


def branched(start: Start, resume_from: str, later: Sequence[Path]) -> Start:
    """`start` turned into the start of a branch, which leaves the `later` checkpoints behind."""
    step, last = start.first_step, start.history[-1]
    what = f"branches off after step {step}" + (
        f", leaving {', '.join(folder.name for folder in later)}" if later else ""
    )
    position = schedule_of(start.history).position(step)
    fresh = {"first_step": step, "changes": [], "accepted": [], "position": position}
    new = last if start.is_new_segment else last.model_copy(update=fresh)
    new = new.model_copy(update={"resume_from": resume_from, "changes": [what, *new.changes]})
    past = start.past if start.is_new_segment else start.history
    return replace(
        start, history=(*past, new), is_new_segment=True, leaves=tuple(later), lines=(*start.lines, f"  {what}")
    )


def attention_so_far(start: Start) -> dict[str, str]:
    """The attention backends of the run before this start; {} if none are recorded."""
    return (start.past[-1] if start.is_new_segment and start.past else start.history[-1]).attention


def with_attention(start: Start, chosen: Mapping[str, str], lines: Sequence[str]) -> Start:
    """`start` with its attention backends recorded: in a new segment if the run so far has others, or has not recorded
    any."""
    last, is_fresh = start.history[-1], start.is_new_segment and not start.past
    found = [] if is_fresh else attention_differences(attention_so_far(start), chosen)
    new, past, changes = last, start.past, [str(one) for one in found]
    if found and not start.is_new_segment:
        position = schedule_of(start.history).position(start.first_step)
        fresh = {"first_step": start.first_step, "changes": [], "accepted": [], "position": position}
        new, past = last.model_copy(update=fresh | {"resume_from": None}), start.history
    new = new.model_copy(update={"attention": dict(chosen), "changes": [*new.changes, *changes]})
    return replace(
        start,
        history=(*past, new),
        is_new_segment=start.is_new_segment or bool(found),
        lines=(*start.lines, *_changes_lines(found, ()), *(f"  {line}" for line in lines)),
    )


def weights_from(experiment: Experiment, folder: Path, marker: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(lines for the log, changes to record) for a run that starts from the weights of a checkpoint.

    Raises CheckpointError if they belong to another model.
    """
    refuse_other_model(folder, marker, experiment.model)
    found = model_differences(marker["model"], experiment.model)
    lines = [
        f"starts from the weights of {folder}, after step {marker['step']} of its run; optimizer, data and step "
        "start fresh"
    ]
    return lines + _changes_lines(found, ()), [
        f"checkpoint.init_from: {folder}, step {marker['step']}",
        *map(str, found),
    ]


def what_is_met(
    experiment: Experiment, tokenizer_digest: str, versions: Mapping[str, str | None], world_size: int | None = None
) -> dict[str, Any]:
    """What a start depends on besides its configuration, as fields of Segment. `world_size` defaults to this job's.

    Raises DataFormatError if a dataset cannot be opened.
    """
    world = world_size or dist.get_world_size()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "world_size": world,
        "layout": layout(experiment, world),
        "sources": sources_of(experiment),
        "tokenizer_digest": tokenizer_digest,
        "versions": dict(versions),
    }


def on_rank_0(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank. Raises CheckpointError, on every rank, if it fails.
    Communicates: all ranks."""
    found, error = from_rank_0(action)
    if error is not None:
        raise CheckpointError(error)
    return cast(T, found)


def layout(experiment: Experiment, world_size: int) -> str:
    """The parallel layout, in the notation of `parity --layout`."""
    parallel = experiment.parallel
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.virtual_pipeline_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "dp": data_parallel_size(experiment, world_size),
        "ep": parallel.expert_model_parallel_size,
        "etp": parallel.expert_tensor_parallel_size,
    }
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or name == "dp")


def _segment(
    experiment: Experiment,
    met: Mapping[str, Any],
    first_step: int,
    position: dict[str, int | str],
    changes: tuple[str, ...],
) -> Segment:
    return Segment(
        first_step=first_step,
        experiment=experiment.model_dump(mode="json"),
        position=position,
        changes=list(changes),
        **met,
    )


def _refuse(
    folder: Path,
    found: list[Difference],
    accepted: Collection[str],
    schedule: Schedule,
    step: int,
    experiment: Experiment,
) -> None:
    stopping = refusal(found, accepted)
    problem: ConfigError | None = None
    try:
        schedule.resumed(step, experiment.stages, segment=0)
    except ConfigError as error:
        problem = error
    if stopping:
        text = refusal_text(str(folder), stopping)
        raise CheckpointError(text if problem is None else "\n".join([text, *(f"  {one}" for one in problem.problems)]))
    if problem is not None:
        raise problem


def _where(schedule: Schedule, step: int) -> str:
    position = schedule.position(step)
    return f"step {step} of {schedule.num_steps}, {position['tokens']:,} tokens, stage {position['stage']}"


def _layout_of(segment: Segment, marker: Mapping[str, Any]) -> str:
    ranks = int(marker["world_size"])
    text = layout(segment.config, ranks)
    return f"{ranks} rank{'s' if ranks > 1 else ''} ({text})"


def _changes_lines(found: list[Difference], accepted: Collection[str]) -> list[str]:
    """One line per difference."""
    lines = []
    for kind, title in (
        (Kind.refused, "accepted by hand"),
        (Kind.recorded, "changed, and recorded"),
        (Kind.harmless, "changed, harmless"),
    ):
        lines += [f"  {title}: {one}" for one in found if one.kind == kind]
    idle = [
        key for key in accepted if not any(one.kind == Kind.refused and is_accepted(one.key, [key]) for one in found)
    ]
    return lines + [f"  --accept-changes {key}: there is nothing to accept" for key in idle]
