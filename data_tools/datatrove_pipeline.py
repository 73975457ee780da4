"""Tokenizes on many machines: `tokenize` as a datatrove pipeline, for its local, Slurm and Ray executors. The output is
identical.

There are three steps. PlanTokenizing (one task) divides the inputs into shards, TokenizeShards (any number of tasks)
writes the shards, and JoinShards (one task) joins them and gives the output its final name. The steps communicate only
through the unfinished output folder, which must be on a shared file system that supports locks (NFS, or Lustre mounted
with `flock`):

- A task does not carry its job. It reads the plan in the folder, so a task submitted for an older job cannot mix in its
  shards.
- Tasks hold a shared lock; planning, joining and the plain command need it exclusively. A task waits while another one
  writes the same shard.
- A shard is finished when its report exists. datatrove's own markers of finished tasks are not trusted: after a kill,
  or with another number of tasks or another output, they may be wrong. A task with nothing to do takes seconds.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_tools.encoding import DocumentEncoder
from data_tools.executors import Stage, check_options, exhaust, open_plan, run_stages, write_plan
from data_tools.tokenization import (
    TOKENIZED_FILES,
    checked_outputs,
    finish,
    name_outputs,
    plan_job,
    remove_shards,
)
from data_tools.tokenized_shard import TokenizeJob, is_finished, shard_name, write_shard
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import (
    MANIFEST,
    begun_folder,
    read_manifest,
    unfinished_folder,
    waiting_for,
)
from hunyuan_pretrain.data.indexed import TOKENIZED_FORMAT, TOKENIZED_VERSION


@dataclass(frozen=True)
class Plan:
    """The plan that the planning task leaves for the others."""

    job: TokenizeJob
    outputs: list[str]


def begin(
    inputs: Sequence[str],
    tokenizer_path: str,
    output: str,
    *,
    holdout_output: str | None = None,
    overwrite: bool = False,
    **planning: Any,
) -> list[int]:
    """Plan as `tokenize` does and write the plan to the unfinished folder; returns the numbers of the unfinished
    shards.

    `planning` are arguments of `plan_job`.
    """
    job = plan_job(inputs, tokenizer_path, **planning)
    outputs = checked_outputs(output, job.holdout_every, holdout_output)
    with ExitStack() as stack:

        def open_folder(path: str) -> Path:
            return stack.enter_context(
                unfinished_folder(path, files=TOKENIZED_FILES, identity=job.identity, overwrite=overwrite)
            )

        folder = open_folder(output)
        write_plan(folder, Plan(job, outputs))
        if (folder / MANIFEST).is_file():
            return []
        folders = [folder, *(open_folder(other) for other in outputs[1:])]
        return [number for number in range(len(job.shards)) if not is_finished(job, folders, number)]


class PlanTokenizing(PipelineStep):
    """Divides the inputs into shards, in one task, for the two steps below. Takes the arguments of `begin`. Inputs may
    be the output of earlier steps."""

    type = "🔢 - TOKENIZER"
    name = "Hunyuan: plan"

    def __init__(self, inputs: Sequence[str], tokenizer_path: str, output: str, **settings: Any) -> None:
        super().__init__()
        # a wrong argument name fails here, not later in the task
        planning = (
            inspect.signature(begin).bind(inputs, tokenizer_path, output, **settings).arguments.get("planning", {})
        )
        inspect.signature(plan_job).bind(inputs, tokenizer_path, **planning)
        self.inputs, self.tokenizer_path, self.output, self.settings = list(inputs), tokenizer_path, output, settings
        self.working_folder = os.getcwd()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Plan in the first task; other tasks do nothing."""
        exhaust(data)
        if rank == 0:
            with chdir(self.working_folder):
                begin(self.inputs, self.tokenizer_path, self.output, **self.settings)


class TokenizeShards(PipelineStep):
    """Task r of n writes the unfinished ones of the shards r, r + n, r + 2n..."""

    type = "🔢 - TOKENIZER"
    name = "Hunyuan: tokenize"

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self.working_folder = os.getcwd()  # paths of the inputs may be relative to it

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write this task's shards. Raises DataFormatError for damaged files, too many rejects, or a missing plan."""
        exhaust(data)
        with chdir(self.working_folder), ExitStack() as stack:
            folder, plan = _open(stack, self.output)
            if (folder / MANIFEST).is_file():
                return
            folders = [folder, *(stack.enter_context(begun_folder(other))[0] for other in plan.outputs[1:])]
            encoder: DocumentEncoder | None = None
            for number in range(rank, len(plan.job.shards), world_size):
                # the process that a requeued task replaces may still be running
                with waiting_for(folder / f".{shard_name(number)}.lock"):
                    if is_finished(plan.job, folders, number):
                        continue
                    encoder = encoder or DocumentEncoder(plan.job.encoder)
                    try:
                        with self.track_time("shard"):
                            report = write_shard(plan.job, number, folders, encoder)
                    except BaseException:
                        remove_shards(folders, [number])
                        raise
                for output in report.outputs:
                    self.stat_update("documents", value=output.entry["documents"], unit="shard")
                    self.stat_update("tokens", value=output.entry["tokens"], unit="shard")


class JoinShards(PipelineStep):
    """Joins the shards into complete folders and gives them their final names, in one task."""

    type = "🔢 - TOKENIZER"
    name = "Hunyuan: join"

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self.working_folder = os.getcwd()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Join the shards in the first task. Raises DataFormatError if shards are missing, there are too many rejects,
        or a task is still running."""
        exhaust(data)
        if rank > 0:
            return
        with chdir(self.working_folder), ExitStack() as stack:
            folder, plan = _open(stack, self.output, alone=True)
            if not (folder / MANIFEST).is_file():
                folders = [
                    folder,
                    *(stack.enter_context(begun_folder(other, alone=True))[0] for other in plan.outputs[1:]),
                ]
                numbers = range(len(plan.job.shards))
                left = [number for number in numbers if not is_finished(plan.job, folders, number)]
                if left:
                    raise DataFormatError(
                        f"{self.output}: {len(left)} of {len(plan.job.shards)} shards are not finished; tokenize again"
                    )
                finish(plan.job, folders)
            name_outputs(plan.outputs, folder, len(plan.job.shards))


def tokenize_on(
    executor: str,
    inputs: Sequence[str],
    tokenizer_path: str,
    output: str,
    *,
    tasks: int,
    workers: int | None = None,
    logs: str | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[dict[str, Any]] | None:
    """Like `tokenize`, but with at most `tasks` datatrove tasks; `settings` are arguments of `begin`.

    `executor` is local, slurm or ray; `options` go to the matching datatrove class. `workers` tasks run concurrently
    (default: all; for local, one per core). `logs` is datatrove's log folder (default: beside the output). Planning
    happens in this process, so mistakes in the inputs show at once. Returns the manifests; with Slurm returns None as
    soon as the jobs are submitted. Raises DataFormatError.
    """
    check_options(executor, options or {})
    left = begin(inputs, tokenizer_path, output, **settings)
    stages: list[Stage] = [("tokenize", TokenizeShards(output), min(tasks, len(left)))] if left else []
    stages.append(("join", JoinShards(output), 1))
    logs = str(Path(logs or f"{output}.logs").absolute())
    if not run_stages(executor, output, stages, workers=workers, logs=logs, options=options):
        return None
    outputs = checked_outputs(output, settings.get("holdout_every"), settings.get("holdout_output"))
    with ExitStack() as stack:
        try:
            _open(stack, output)
        except DataFormatError:  # finished: the output has its final name
            return [
                read_manifest(each, TOKENIZED_FORMAT, TOKENIZED_VERSION, "hunyuan-data tokenize") for each in outputs
            ]
    raise DataFormatError(f"{output}: not finished; {logs}/*/logs say why, and the same command resumes")


def _open(stack: ExitStack, output: str, *, alone: bool = False) -> tuple[Path, Plan]:
    """`open_plan` of this job. Raises DataFormatError."""
    return open_plan(stack, output, Plan, lambda plan: plan.job.identity, alone=alone)
