"""Which of its checkpoints a run starts from, where that is not simply the newest: branches of the user, and roll-backs
in the run's ledger."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hunyuan_pretrain.checkpoint import CheckpointError, save_load
from hunyuan_pretrain.checkpoint.folders import checkpoint_folder, step_of
from hunyuan_pretrain.config.decisions import Decision, InForce, append_decision, in_force, read_decisions
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.history import read_history
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.train.resume import Start, on_rank_0


def branch_folder(experiment: Experiment, found: Sequence[Path]) -> Path:
    """The checkpoint that checkpoint.resume_from refers to. Raises ConfigError if it lies outside run_dir while run_dir
    has checkpoints (`found`)."""
    wanted, run_dir = str(experiment.checkpoint.resume_from), Path(experiment.run_dir)
    folder = checkpoint_folder(run_dir, int(wanted)) if wanted.isdecimal() else Path(wanted)
    is_own = folder.absolute().parent == (run_dir / "checkpoints").absolute()
    if found and not is_own:
        rule = f"{run_dir} has its own checkpoints, such as {found[-1].name}"
        raise ConfigError(
            experiment.name,
            [Problem("checkpoint.resume_from", wanted, rule, "choose another run_dir, or one of these checkpoints")],
        )
    return folder


def other_run_error(checkpoint: Path) -> CheckpointError:
    """The error for a run that has a checkpoint but is configured not to resume."""
    return CheckpointError(
        f"checkpoint.resume=false, but {checkpoint} exists, and a later resume would mix the two runs: "
        "choose another run_dir, or remove the checkpoints"
    )


# --- the ledger -------------------------------------------------------------------------------------------------------


def last_usable_step(run_dir: Path) -> int | None:
    """Number of steps after which no checkpoint may be used, because a roll-back has left it behind; None: all may."""
    decided = in_force(read_decisions(run_dir))
    return decided.rollbacks[-1].to_step if left_behind(run_dir, decided) else None


def left_behind(run_dir: Path, decisions: InForce) -> list[Path]:
    """Checkpoints that a roll-back left behind but, ended by a kill, did not move. Raises CheckpointError."""
    if not decisions.rollbacks:
        return []
    to_step = decisions.rollbacks[-1].to_step or 0
    return [
        folder
        for folder in save_load.find_checkpoints(run_dir)
        if (step_of(folder) or 0) > to_step and int(save_load.read_marker(folder).get("rollback", 0)) < decisions.number
    ]


def with_ledger(start: Start, run_dir: Path) -> Start:
    """`start` with the decisions of the run's ledger. Communicates: all ranks. Raises CheckpointError if the ledger is
    damaged."""

    def read() -> tuple[list[Decision], list[Path], bool]:
        found = read_decisions(run_dir)
        return found, left_behind(run_dir, in_force(found)), is_new_branch(start, run_dir)

    decisions, behind, is_new = on_rank_0(read)
    if is_new:
        decided = in_force([*decisions, _branch_decision(start)])
    else:
        decided, start = in_force(decisions), replace(start, leaves=tuple(dict.fromkeys((*start.leaves, *behind))))
    lines = [
        f"  the ledger: from step {(one.to_step or 0) + 1} on without "
        + ", ".join(f"sequences {first:,} to {end - 1:,} of stage {stage}" for stage, first, end in one.data)
        for one in decided.rollbacks
        if (one.to_step or 0) >= start.first_step
    ]
    lines += [f"  the ledger: step {step} updates nothing" for step in sorted(decided.skips) if step > start.first_step]
    return replace(start, decisions=decided, lines=(*start.lines, *lines))


def is_new_branch(start: Start, run_dir: Path) -> bool:
    """Whether a branch of the user begins with this start. One that ended before it saved a checkpoint begins again,
    and is not new: what the ledger says since then still applies."""
    last = start.history[-1]
    if not start.is_new_segment or last.first_step != start.first_step or last.resume_from is None:
        return False
    written = read_history(run_dir)
    before = written[-1] if written else None
    return before is None or (before.first_step, before.resume_from, before.experiment) != (
        last.first_step,
        last.resume_from,
        last.experiment,
    )


def note_branch(run_dir: Path, start: Start) -> None:
    """If a branch begins in a run with a ledger, write there which decisions no longer apply. Call on rank 0 only.
    Raises OSError."""
    if is_new_branch(start, run_dir) and read_decisions(run_dir):
        append_decision(run_dir, _branch_decision(start))


def _branch_decision(start: Start) -> Decision:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Decision(time=now, kind="branch", cause="user", step=start.first_step)
