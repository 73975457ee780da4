"""Finished runs as observations for scaling laws, read from their run directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hunyuan_pretrain.checkpoint.folders import find_checkpoints, read_marker
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.history import read_history, schedule_of
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.diagnostics.scaling_laws import Observation
from hunyuan_pretrain.plan.counts import parameters

LAST_SHARE = 0.05
"""Share of the steps, the last ones, over which a training loss is averaged."""


def steps_done(run_dir: Path) -> int:
    """Steps of the newest complete checkpoint; 0 without one."""
    found = find_checkpoints(run_dir)
    return int(read_marker(found[-1])["step"]) if found else 0


def expected(experiment: Experiment, name: str, loss: float = 0.0) -> Observation:
    """What a run of this experiment will be, without its loss. The batch is that of the stage with the most tokens."""
    schedule = Schedule.of(experiment.stages)
    longest = max(experiment.stages, key=lambda stage: stage.num_tokens)
    counts = parameters(experiment.model)
    embedding = counts.embedding + counts.output_head
    return Observation(
        name,
        counts.active - embedding,
        schedule.tokens_after(schedule.num_steps),
        loss,
        experiment.optimizer.lr,
        longest.global_batch_tokens,
        embedding,
    )


def recorded(run_dir: Path, name: str) -> Observation:
    """The same, of the configuration that a run recorded last."""
    return expected(read_history(run_dir)[-1].config, name)


def read_runs(run_dirs: Sequence[Path], loss: str = "auto") -> tuple[list[Observation], str]:
    """The finished runs in these directories, and the name of the loss that was read.

    `loss`: validation_loss (the last one), loss (the mean of the last 5% of the recorded steps), another
    validation/<name>/loss, or auto: validation_loss if every run has it, else loss. Raises ConfigError that names every
    directory that is not a finished run, or changed in a way that a law cannot use.
    """
    problems: list[Problem] = []
    found: list[tuple[str, Experiment, list[dict[str, Any]]]] = []
    seen: dict[Path, Path] = {}
    for run_dir in run_dirs:
        real = run_dir.resolve()
        if real in seen:
            problems.append(Problem(str(run_dir), Problem.NO_VALUE, f"the same run as {seen[real]}", "name it once"))
            continue
        seen[real] = run_dir
        try:
            found.append((str(run_dir), *_read(run_dir)))
        except ConfigError as error:
            problems += error.problems
    if not problems:
        if loss == "auto":
            loss = "validation_loss" if all(_has(records, "validation_loss") for _, _, records in found) else "loss"
        for name, _, records in found:
            if not _has(records, loss):
                problems.append(Problem(name, Problem.NO_VALUE, f"its metrics.jsonl has no {loss}", "choose another"))
    if problems:
        raise ConfigError("ladder", problems)
    return [expected(experiment, name, _loss(records, loss)) for name, experiment, records in found], loss


def _read(run_dir: Path) -> tuple[Experiment, list[dict[str, Any]]]:
    """The configuration and the records of a finished run. Raises ConfigError."""

    def refuse(rule: str, hint: str = "") -> ConfigError:
        return ConfigError("ladder", [Problem(str(run_dir), Problem.NO_VALUE, rule, hint)])

    history = read_history(run_dir)
    if not history:
        raise refuse("is no run directory", "a run directory has resolved.yaml and metrics.jsonl")
    schedule = schedule_of(history)
    done = steps_done(run_dir)
    if done < schedule.num_steps:
        raise refuse(f"is not finished: {done} of {schedule.num_steps} steps", "finish it, or leave it out")
    last = history[-1].config
    for segment in history[:-1]:
        if segment.config.stages != last.stages or segment.config.optimizer != last.optimizer:
            raise refuse(
                f"changed stages or optimizer at step {history[-1].first_step}, so no single setting led to its loss",
                "leave it out",
            )
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise refuse(f"metrics.jsonl cannot be read: {error}") from None
    return last, records


def _has(records: list[dict[str, Any]], key: str) -> bool:
    return any(key in record for record in records)


def _loss(records: list[dict[str, Any]], key: str) -> float:
    values = [(int(record["step"]), float(record[key])) for record in records if key in record]
    if key != "loss":
        return values[-1][1]
    first = values[-1][0] * (1 - LAST_SHARE)
    last = [value for step, value in values if step > first]
    return sum(last) / len(last)
