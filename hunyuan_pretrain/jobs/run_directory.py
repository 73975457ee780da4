"""Whether a run directory is that of the experiment that is submitted. `train` finds out too, after the job has waited
for its nodes."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from hunyuan_pretrain.config.acceptance import check_accepted, refusal
from hunyuan_pretrain.config.changes import differences
from hunyuan_pretrain.config.errors import ConfigError, Problem, show_value
from hunyuan_pretrain.config.history import read_history
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import Experiment


def refuse_another_run(experiment: Experiment, accepted: Collection[str] = ()) -> None:
    """Raise ConfigError if the run in run_dir cannot continue with this experiment. `accepted`: keys of changes that
    the user accepts.

    Compares settings with those of the newest checkpoint; data and tokenizer are compared where the job runs.
    """
    check_accepted(accepted)
    run_dir = Path(experiment.run_dir)
    step = newest_step(run_dir)
    if step is None or experiment.checkpoint.resume_from is not None:
        return
    if not experiment.checkpoint.resume:
        rule = f"holds a run of {step} steps, and checkpoint.resume is false"
        raise ConfigError("submit", [Problem("run_dir", experiment.run_dir, rule, "choose another run_dir")])
    past = [segment for segment in read_history(run_dir) if segment.first_step < max(step, 1)]
    if not past:
        return
    schedule = Schedule.of_segments([(segment.first_step, segment.config.stages) for segment in past])
    try:
        present = schedule.piece_of_step(max(step - 1, 0))
    except IndexError:  # left to `train`, which reads the checkpoint's own history
        return
    stopping = refusal(differences(past[-1].config, experiment, present), accepted)
    if stopping:
        hint = "restore it, choose another run_dir, or pass --accept-changes as `train` takes it"
        problems = [
            Problem(one.key, one.new, f"the run in {run_dir} has {show_value(one.old)}: {one.reason}", hint)
            for one in stopping
        ]
        raise ConfigError("submit", problems)


def commit_so_far(run_dir: Path) -> str | None:
    """The commit with which the run was last started; None if there is no run, or no commit is recorded."""
    history = read_history(run_dir) if newest_step(run_dir) is not None else []
    return history[-1].versions.get("commit") if history else None


def newest_step(run_dir: Path) -> int | None:
    """Steps of the newest complete checkpoint; None if there is none."""
    names = (path.parent.name for path in run_dir.glob("checkpoints/step_*/complete.json"))
    return max((int(found[1]) for name in names if (found := re.fullmatch(r"step_(\d+)", name))), default=None)
