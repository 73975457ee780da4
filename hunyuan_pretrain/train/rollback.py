"""Decisions of the running process: they are written to the ledger, and a roll-back is carried out.

A roll-back is a restart without a start: weights, optimizer, generators, FP8 scales, noise scale and good steps come
from the checkpoint, the run gets a new segment that leaves data out, and what came after the checkpoint is moved to
<run_dir>/abandoned/NNN, so that no later start takes it for the newest. It is in the ledger before anything is moved: a
process that is killed in between is completed by the next start (train/branches.py).
"""

from __future__ import annotations

from dataclasses import replace

from hunyuan_pretrain.checkpoint import save_load
from hunyuan_pretrain.checkpoint.folders import named_checkpoints, step_of
from hunyuan_pretrain.config.decisions import Decision, append_decision, in_force, read_decisions
from hunyuan_pretrain.config.history import Segment, set_aside_later, write_history
from hunyuan_pretrain.data.loader import StepLoader
from hunyuan_pretrain.parallel.agreement import error_of_rank_0, from_rank_0
from hunyuan_pretrain.train import TrainingError
from hunyuan_pretrain.train.policies import Numbers, decision_on, left_out
from hunyuan_pretrain.train.resume import Start
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step_result import LaunchedStep


def numbers_of_step(step: LaunchedStep) -> Numbers:
    """What a step is judged by."""
    result = step.result()
    return Numbers(result.loss, result.grad_norm, result.update_norm)


def note_skip(run: Run, step: LaunchedStep) -> None:
    """Write to the ledger that a step was not updated. Raises TrainingError, on all ranks, if that fails. Communicates:
    all ranks."""
    verdict, numbers = step.verdict, numbers_of_step(step)
    assert verdict.cause is not None
    _append(run, decision_on(run.schedule, step.step, "skip", verdict.cause, numbers, thresholds=verdict.thresholds))
    run.log.event("alarm", f"{reason_of(step)}; the update of this step is left out", step.step + 1)


def roll_back(run: Run, step: LaunchedStep) -> None:
    """Go back to the newest good checkpoint at least resilience.rollback_steps before the end of a bad step, which was
    not updated. No save may be in flight.

    Raises TrainingError, on all ranks, if there was one roll-back too many, no such checkpoint, or the ledger cannot be
    written. Communicates: all ranks.
    """
    settings, done, start = run.experiment.resilience, step.step + 1, run.start
    assert start is not None
    taken, last = start.decisions.num_written, done - settings.rollback_steps
    if taken >= settings.max_rollbacks:
        stop_after(run, step)
        raise TrainingError(
            f"step {done}: {reason_of(step)}; resilience.max_rollbacks={settings.max_rollbacks} is reached: lower "
            "optimizer.lr or optimizer.clip_grad, or raise the limit, and start again"
        )
    resumed = save_load.load_newest(run.run_dir, run.chunks, run.optimizer, last_step=last)
    if resumed is None:
        stop_after(run, step)
        raise TrainingError(
            f"step {done}: {reason_of(step)}; there is no checkpoint after step {last} or before to roll back to "
            "(checkpoint.save_every_steps, resilience.rollback_steps)"
        )
    to_step = int(resumed.marker["step"])
    # roll-backs that this one takes back left data out too: it stays out
    before = [window for one in start.decisions.rollbacks if (one.to_step or 0) >= to_step for window in one.data]
    decision = decision_on(
        run.schedule,
        step.step,
        "rollback",
        step.verdict.cause,
        numbers_of_step(step),
        thresholds=step.verdict.thresholds,
        data=(*left_out(run.schedule, to_step, step.step, settings.rollback_margin_steps), *before),
        to_step=to_step,
        number=taken + 1,
    )
    history = _history_until(start, to_step)
    noise, judged = resumed.marker.get("noise_scale"), resumed.marker.get("judged")
    skipped = to_step - int(resumed.marker.get("updates", to_step))
    new = Start(history, to_step, True, (), noise=noise, judged=judged, num_skipped=skipped, base=start.base)
    new = replace(new, decisions=in_force([*_ledger(run), decision]))
    loader = _loader(run, new)
    _append(run, decision)
    text = f"{reason_of(step)}; rolls back to {resumed.folder.name}, and leaves out {_windows_text(decision)}"
    run.log.event("alarm", text, done)
    for note in resumed.notes:
        run.log.line(note)
    run.loader.close()
    run.go_on_from(new, loader)
    _leave_behind(run, to_step)


def stop_decision(run: Run, step: int, cause: str, numbers: Numbers, **more: object) -> None:
    """Write to the ledger that the run stops, on rank 0. A ledger that cannot be written does not hide the reason why
    the run stops, which is raised next. Communicates nothing."""
    if not run.log.is_writer:
        return
    try:
        append_decision(run.run_dir, decision_on(run.schedule, step, "stop", cause, numbers, **more))
    except OSError as error:
        run.log.line(f"WARNING: {run.run_dir}: the ledger cannot be written: {error.strerror}")


def stop_after(run: Run, step: LaunchedStep) -> None:
    """`stop_decision` on a step that was launched."""
    cause, thresholds = step.verdict.cause or "nonfinite", step.verdict.thresholds
    stop_decision(run, step.step, cause, numbers_of_step(step), thresholds=thresholds)


def _leave_behind(run: Run, to_step: int) -> None:
    """Move what came after the checkpoint, and begin the records anew from there."""

    def move() -> None:
        assert run.start is not None
        later = [folder for folder in named_checkpoints(run.run_dir) if (step_of(folder) or 0) > to_step]
        set_aside_later(run.run_dir, later, even_without=True)
        write_history(run.run_dir, run.start.segments)
        run.log.go_back(to_step)

    if (error := error_of_rank_0(move)) is not None:
        raise TrainingError(
            f"{run.run_dir}: cannot be written: {error}; the same command completes the roll-back to step {to_step}"
        )


def _history_until(start: Start, to_step: int) -> tuple[Segment, ...]:
    """The segments before a step; the last has the present configuration."""
    segments = start.segments
    past = [segment for segment in segments if segment.first_step < to_step] or [segments[0]]
    present = start.history[-1]
    if past[-1].experiment == present.experiment and past[-1].world_size == present.world_size:
        return tuple(past)
    # a branch that goes back to where it began is still that branch
    own = [one.resume_from for one in segments if one.first_step == to_step and one.resume_from is not None]
    resume_from = own[-1] if own else None
    changes = {"first_step": to_step, "left_out": past[-1].left_out, "resume_from": resume_from, "accepted": []}
    return *past, present.model_copy(update=changes)


def _loader(run: Run, start: Start) -> StepLoader:
    *past, last = start.segments
    old = run.loader
    place = past, last.first_step, last.left_out
    loader = StepLoader(run.experiment, old.dp_rank, old.dp_size, None, *place, old.token_bytes)
    for path, dataset in loader.order.datasets.items():
        dataset.reference = old.order.datasets[path].reference
    return loader


def _append(run: Run, decision: Decision) -> None:
    if (error := error_of_rank_0(lambda: append_decision(run.run_dir, decision))) is not None:
        raise TrainingError(
            f"step {decision.step}: {decision.kind} ({decision.cause}) cannot be written to the ledger in "
            f"{run.run_dir}: {error}"
        )
    assert run.start is not None
    if decision.kind == "skip":
        skips = run.start.decisions.skips | {decision.step}
        run.start = replace(run.start, decisions=replace(run.start.decisions, skips=skips))


def _ledger(run: Run) -> list[Decision]:
    found, error = from_rank_0(lambda: read_decisions(run.run_dir))
    if found is None:
        raise TrainingError(f"{run.run_dir}: the ledger cannot be read: {error}")
    return found


def reason_of(step: LaunchedStep) -> str:
    """What is wrong with a step, with its limits."""
    found = []
    names = {"loss": "loss", "grad_norm": "gradient norm", "update_norm": "update norm"}
    for name, value in numbers_of_step(step).known().items():
        limit = step.verdict.thresholds.get(name)
        is_above = step.verdict.cause == "spike" and limit is not None and value > limit
        found.append(f"{names[name]} {value}" + (f" (limit {limit:.6g})" if is_above else ""))
    return ", ".join(found)


def _windows_text(decision: Decision) -> str:
    return ", ".join(f"sequences {first:,} to {end - 1:,} of stage {stage}" for stage, first, end in decision.data)
