"""The training loop."""

from __future__ import annotations

import calendar
import math
import os
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hunyuan_pretrain.checkpoint import CheckpointError, save_load
from hunyuan_pretrain.config.derived import expert_lr_ratio, routed_model
from hunyuan_pretrain.config.exit_status import EXIT_DONE, EXIT_STOPPED, STOPPED_BEFORE_FIRST_STEP
from hunyuan_pretrain.config.rules import find_warnings
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.model.engines import scaling_state
from hunyuan_pretrain.parallel.groups import destroy_groups
from hunyuan_pretrain.parallel.signs_of_life import is_loss_of_a_rank, is_time_out
from hunyuan_pretrain.plan.peaks import peak_flops_per_s
from hunyuan_pretrain.runtime.device import probe as probe_machine
from hunyuan_pretrain.runtime.policy import what_is_used
from hunyuan_pretrain.runtime.stop import StoppedBeforeFirstStepError, StopRequest, listen, resume_command
from hunyuan_pretrain.train import TrainingError, setup
from hunyuan_pretrain.train.alarms import Alarms
from hunyuan_pretrain.train.as_planned import AsPlanned
from hunyuan_pretrain.train.benchmarks import Benchmarks, measure
from hunyuan_pretrain.train.evaluate import ValidationStoppedError, evaluate
from hunyuan_pretrain.train.lr_schedule import apply_learning_rate, measured_ratio_line
from hunyuan_pretrain.train.metrics import Meter, StepClock, step_line, step_record
from hunyuan_pretrain.train.optimizer import describe_groups
from hunyuan_pretrain.train.policies import Numbers
from hunyuan_pretrain.train.probes import probe
from hunyuan_pretrain.train.reference import check_first_step
from hunyuan_pretrain.train.rerun import DifferingRanksError
from hunyuan_pretrain.train.resume import OWES_TASKS, OWES_VALIDATION
from hunyuan_pretrain.train.rollback import note_skip, reason_of, roll_back, stop_after, stop_decision
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.saves import Saves
from hunyuan_pretrain.train.step import launch_step
from hunyuan_pretrain.train.step_result import LaunchedStep


def train(experiment: Experiment, accepted: Collection[str] = (), benchmarks: Benchmarks | None = None) -> int:
    """Train `experiment` from its newest checkpoint to the end; `benchmarks` evaluates evaluation.tasks. Returns
    EXIT_DONE, or EXIT_STOPPED after SIGTERM, SIGUSR1 or Ctrl-C."""
    stop = listen()
    try:
        run = setup.prepare(experiment, stop, accepted, benchmarks)
    except StoppedBeforeFirstStepError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(error, flush=True)
        destroy_groups()
        return EXIT_STOPPED
    with setup.left_at_the_end(run, destroy_groups):
        try:
            return _train(run, stop)
        except Exception as error:
            run.log.event("failed", f"{type(error).__name__}: {error}".partition("\n")[0])
            raise


def _train(run: Run, stop: StopRequest) -> int:
    num_steps = run.loader.num_steps
    _announce(run, num_steps)
    if run.first_step < num_steps and setup.is_stop_asked(stop, run.device):
        run.log.line(STOPPED_BEFORE_FIRST_STEP)
        run.log.event("stopped", STOPPED_BEFORE_FIRST_STEP, run.first_step)
        return EXIT_STOPPED
    if run.first_step == num_steps and not run.owes:
        run.log.line(
            f"nothing to do: the run is finished ({num_steps} steps); to continue, lengthen a stage or add another"
        )
        run.log.event("finished", "there was nothing to do", num_steps)
        return EXIT_DONE
    saves = Saves(run)
    records = _Records(run, saves)
    try:
        return _train_steps(run, stop, records, saves)
    except BaseException as error:
        records.is_alone = True
        saves.rescue()
        if not (isinstance(error, torch.AcceleratorError) or is_loss_of_a_rank(error) or is_time_out(error)):
            records.read()  # of the step before: its record, or a loss that is the reason of this error
        raise


def _train_steps(run: Run, stop: StopRequest, records: _Records, saves: Saves) -> int:
    num_steps = run.loader.num_steps
    before: LaunchedStep | None = None
    launch_seconds = 0.0
    if run.owes and not _measure_owed(run, stop, saves):
        return EXIT_STOPPED
    step = run.first_step - 1
    while (step := step + 1) < num_steps:
        stage = run.schedule.stage(step)
        _settle_noise_scale(run, step, records)
        rates = apply_learning_rate(run, step)
        if routed_model(run.experiment.model, stage).moe_expert_capacity_factor is None:
            # weights that are NaN send all tokens to the same experts; without a capacity that rank would run out of
            # memory before the reason is read
            records.read()
        done, began = step + 1, time.perf_counter()
        is_logged, due, is_saved = _what_follows(run, done)
        launched = _launch(run, stage, step, stop, saves, launch_seconds if is_logged else None)
        launch_seconds = time.perf_counter() - began
        records.read()  # the device has this step to work on, so it does not idle while the host reads the one before
        records.add(_Unread(launched, stage, rates, is_logged))
        if launched.verdict.kind == "rollback":
            records.read()
            saves.make_room()
            roll_back(run, launched)
            records.start_again()
            step, before, num_steps = run.first_step - 1, None, run.loader.num_steps
            continue
        is_bad = launched.verdict.kind != "update"
        is_waited_for = bool(due) or is_saved or is_bad or launched.numbers.is_here
        if is_waited_for:
            records.read()
        is_saved = is_saved and not _save_first(run, done, stop, saves, due)
        owes = _measure(run, stage, done, stop, due)
        if is_waited_for:
            is_stopping = setup.is_stop_asked(stop, run.device)
        else:  # the answer that does not make the host wait for this step
            is_stopping = before is not None and before.is_stop_asked()
        told = launched if is_waited_for else before
        if told is not None:
            saves.after_step(told)
        if is_saved or is_stopping:
            records.read()
            saves.save(done, done == num_steps or is_stopping, owes)
        if is_saved and not is_stopping and setup.is_stop_asked(stop, run.device):
            saves.finish()  # asked during the save: one more step and one more checkpoint may take longer than is left
            is_stopping = saves.newest == done
        if is_stopping and (done < num_steps or owes):
            run.log.line(
                f"told to stop: saved after step {done}; the same command resumes from there: {resume_command()}"
            )
            run.log.event("stopped", f"told to stop: saved after step {done}", done)
            return EXIT_STOPPED
        if due or is_saved:
            records.restart_clock()
        before = launched
    run.log.line(f"done: {num_steps} steps, run directory {run.run_dir}")
    run.log.event("finished", f"{num_steps} steps", num_steps)
    return EXIT_DONE


def _save_first(run: Run, done: int, stop: StopRequest, saves: Saves, due: frozenset[str]) -> bool:
    """Save before benchmarks, which may take hours or end the run with an error. False: none are due, or told to
    stop."""
    is_first = OWES_TASKS in due and not setup.is_stop_asked(stop, run.device)
    if is_first:
        saves.save(done, done == run.loader.num_steps)
    return is_first


def _measure_owed(run: Run, stop: StopRequest, saves: Saves) -> bool:
    """Do after the step of the checkpoint what a stop kept from it; False: told to stop again."""
    if _measure(run, run.schedule.stage(run.first_step - 1), run.first_step, stop, run.owes):
        run.log.event("stopped", "told to stop during a validation or benchmarks; nothing to save", run.first_step)
        return False
    if run.first_step == run.loader.num_steps:  # no later checkpoint will say that it is done
        saves.save(run.first_step, must_succeed=True)
    return True


def _launch(
    run: Run, stage: StageConfig, step: int, stop: StopRequest, saves: Saves, launch_seconds: float | None
) -> LaunchedStep:
    """`launch_step`, logged if `launch_seconds` is given; what is decided about the step is in the ledger."""
    try:
        launched = launch_step(
            run,
            stage,
            step,
            is_stop_asked=stop.is_asked,
            save_progress=saves.progress,
            is_logged=launch_seconds is not None,
            launch_seconds=launch_seconds or 0.0,
        )
    except DifferingRanksError as error:
        stop_decision(run, step, "rerun", Numbers.unknown(), ranks=tuple(error.ranks))
        raise
    if launched.verdict.kind == "skip" and not launched.verdict.is_in_ledger:
        note_skip(run, launched)
    return launched


def _what_follows(run: Run, done: int) -> tuple[bool, frozenset[str], bool]:
    """What the schedule has after this number of steps: whether a record; OWES_VALIDATION, OWES_TASKS; whether a
    checkpoint."""
    experiment = run.experiment
    is_last, save_every = done == run.loader.num_steps, experiment.checkpoint.save_every_steps
    settings, due = experiment.evaluation, set[str]()
    if run.validations and (is_last or done % settings.every_steps == 0):
        due.add(OWES_VALIDATION)
    if run.benchmarks is not None and (
        is_last or (settings.tasks_every_steps and done % settings.tasks_every_steps == 0)
    ):
        due.add(OWES_TASKS)
    return (
        is_last or done % experiment.logging.log_every_steps == 0,
        frozenset(due),
        is_last or (save_every is not None and done % save_every == 0),
    )


class _Unread(NamedTuple):
    """A launched step, and what its record needs."""

    launched: LaunchedStep
    stage: StageConfig
    rates: tuple[float, float]
    is_logged: bool


class _Records:
    """Reads the steps that were launched, in order: checks each, and writes the records that are due."""

    def __init__(self, run: Run, saves: Saves) -> None:
        self._run, self._meter, self._as_planned, self._clock = run, _meter(run), AsPlanned(run), StepClock()
        self._saves, self.is_alone = saves, False
        """is_alone: other ranks may be elsewhere, so there must be no communication any more."""
        self._unread: _Unread | None = None
        self._alarms = Alarms(run.experiment.logging.alarms, run.experiment.model.num_moe_experts, run.log)

    def add(self, step: _Unread) -> None:
        """The next step; the one before has been read."""
        self._unread = step

    def read(self) -> None:
        """Wait for the launched step and write its record, unless that is done.

        Every step is read: before it is saved, before a validation, and before the step after the next one is launched.
        Raises TrainingError, on all ranks, if its loss or norm is not finite.
        """
        if self._unread is None:
            return
        (launched, stage, rates, is_logged), self._unread = self._unread, None
        result, run, done = launched.result(), self._run, launched.step + 1
        if run.noise is not None and launched.verdict.kind == "update":
            run.noise.add_numbers(launched.step, stage, result.noise)
        is_finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        if (verdict := launched.verdict).kind == "stop" or (verdict.kind == "update" and not is_finite):
            stop_after(run, launched)
            if not self.is_alone:
                self._saves.finish()  # it may be the checkpoint to go back to
            raise TrainingError(f"step {done}: {reason_of(launched)}; {_way_back(run)}")
        if result.pairs is not None and launched.step == 0:
            dtype = run.experiment.precision.dtype
            check_first_step(result.pairs, result.num_target_tokens, stage.dpo_beta, dtype)
        self._clock.ended(result.data_wait_seconds)
        self._as_planned.after(done, result)
        if not is_logged:
            return
        seconds, data_wait_seconds = self._clock.means()
        result = replace(result, data_wait_seconds=data_wait_seconds)
        record = step_record(run.experiment.model, stage, launched.step, result, *rates, seconds)
        record |= self._meter.fields(done, record)
        if result.update_norm is not None:
            record["update_norm"] = result.update_norm
        if launched.verdict.kind != "update":
            record["skipped"] = 1
        if run.noise is not None:
            record |= run.noise.fields()
        run.log.metrics(record)
        if not run.log.progress(done, f"loss {result.loss:.4f}  {record['tokens_per_s']:,.0f} tokens/s"):
            run.log.line(step_line(record, run.loader.num_steps))
        if run.log.is_writer:
            self._alarms.after(record)

    def start_again(self) -> None:
        """After a roll-back."""
        self._meter = _meter(self._run)
        self._clock.restart()
        self._alarms.go_back(self._run.first_step)

    def restart_clock(self) -> None:
        """Leave out what was done since the last step."""
        self._clock.restart()


def _settle_noise_scale(run: Run, step: int, records: _Records) -> None:
    """At the first step of a stage, fix the noise scale that the stage uses: that of all steps before it. So learning
    rates do not depend on when the host reads a step, nor on where a run was interrupted."""
    if run.noise is None or run.schedule.stage_of_step(step)[1] > 0:
        return
    records.read()
    run.noise.begin_stage()
    if run.experiment.optimizer.expert_lr_noise_scale_tokens == "measured":
        stage = run.schedule.stage(step)
        run.log.line(f"stage {stage.name}: {measured_ratio_line(run.experiment, stage.global_batch_tokens, run.noise)}")


def _announce(run: Run, num_steps: int) -> None:
    experiment = run.experiment
    next_stage = run.schedule.stage(min(run.first_step, num_steps - 1))
    peak, ratio = (
        experiment.optimizer.lr,
        expert_lr_ratio(
            experiment.model,
            experiment.optimizer,
            next_stage.global_batch_tokens,
            run.noise.in_use if run.noise is not None else None,
        ),
    )
    device = str(run.device) if run.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads per rank"
    todo = f"; steps {run.first_step + 1} to {num_steps}" if run.first_step < num_steps else ""
    run.log.line(f"{experiment.name}: {dist.get_world_size()} ranks on {device}{todo}")
    on = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    run.log.event("started", f"{dist.get_world_size()} ranks on {on}", run.first_step)
    for line in run.start.lines if run.start else ():
        run.log.line(line)
    used = dict(what_is_used(probe_machine(), experiment))
    for name in ("linear layers", "steps", "FP8"):
        if name in used:
            run.log.line(f"  {name}: {used[name]}")
    histories = [tensor for name, tensor in scaling_state(run.chunks).items() if name.endswith(".history")]
    if run.first_step and histories and not any(history.any() for history in histories):
        run.log.line("  FP8: the checkpoint has no scales for this recipe; they start from 1 in the first step")
    for line in describe_groups(run.optimizer, peak, ratio):
        run.log.line("  " + line)
    for line in run.loader.order.passes():
        run.log.line("  " + line)
    for warning in find_warnings(experiment):
        run.log.line(f"warning: {warning}")
    for line in probe(run) if experiment.runtime.probes else ["probes: off"]:
        run.log.line("  " + line)
    run.log.start_progress(num_steps, run.first_step)


def _meter(run: Run) -> Meter:
    experiment, began = run.experiment, None
    if run.start and run.start.history and (text := run.start.history[0].started):
        began = calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))
    peak = experiment.logging.peak_flops_per_s
    if peak is None and run.device.type == "cuda":
        peak = peak_flops_per_s(torch.cuda.get_device_name(run.device))
    return Meter(run.schedule, began, peak and peak * dist.get_world_size(), run.device)


def _measure(run: Run, stage: StageConfig, done: int, stop: StopRequest, due: frozenset[str]) -> frozenset[str]:
    """Validate, then run benchmarks, if `due` has them. Returns those that a stop has left undone."""
    if OWES_VALIDATION in due and not _evaluate(run, stage, done, stop):
        return due
    if OWES_TASKS in due and not measure(run, stage, done, lambda: setup.is_stop_asked(stop, run.device)):
        return frozenset({OWES_TASKS})
    return frozenset()


def _evaluate(run: Run, stage: StageConfig, done: int, stop: StopRequest) -> bool:
    """Validate on every set and write one record: validation_* for evaluation.data, validation/<name>/* for each of
    evaluation.sets. Returns False, without a record, if told to stop."""
    record: dict[str, Any] = {"step": done}
    for prefix, loader in run.validations.items():
        try:
            found = evaluate(run, stage, loader, lambda: setup.is_stop_asked(stop, run.device))
        except ValidationStoppedError:
            run.log.line(f"step {done}: told to stop; the next start repeats this validation")
            return False
        record |= {f"{prefix}{key}": value for key, value in found.items()}
        bits = f", {found['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in found else ""
        name = "" if prefix == "validation_" else f" {prefix.split('/')[1]}"
        run.log.line(
            f"step {done}: validation{name} loss {found['loss']:.4f} over {found['target_tokens']:,} tokens{bits}"
        )
        if "conversation_loss" in found:
            run.log.line(f"  by conversation {found['conversation_loss']:.4f} over {found['conversations']:,}")
    run.log.metrics(record)
    return True


def _way_back(run: Run) -> str:
    """For a run whose loss or norm is no longer finite: the newest checkpoint and the possible remedies."""
    cure = "lower optimizer.lr or optimizer.clip_grad, or leave the data of this step out (stages.N.skip_data_steps)"
    try:
        found = save_load.find_checkpoints(run.run_dir)
    except CheckpointError as error:
        return f"the newest checkpoint: {error}; {cure}"
    if not found:
        when = run.experiment.checkpoint.save_every_steps
        saves = (
            "only the end of the run is saved" if when is None else f"the first would have been saved after step {when}"
        )
        return (
            f"there is no checkpoint of this run to go back to ({saves}, checkpoint.save_every_steps): {cure}, and "
            "start again"
        )
    step = save_load.read_marker(found[-1])["step"]
    return (
        f"the newest checkpoint is {found[-1]}, after step {step}; the same command resumes from it and gets the same "
        f"numbers: first {cure}"
    )
