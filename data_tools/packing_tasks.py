"""Packs on many machines: `pack` as datatrove tasks, for its local, Slurm and Ray executors. The output is identical.

The plan is made in the process that starts the tasks. PackGroups (any number of tasks) packs the groups, and
JoinGroups (one task) joins them and gives the output its final name. They communicate only through the unfinished
output folder, by the rules of `datatrove_pipeline`: a task reads the plan in the folder, holds a shared lock on it,
waits while another one packs the same group, and takes a group for finished only if its report exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, chdir
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_tools.executors import Stage, check_options, exhaust, open_plan, run_stages, write_plan
from data_tools.packed_output import OpenJob, PackJob, name_output, plan_pack, unfinished_groups
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import (
    MANIFEST,
    read_manifest,
    unfinished_folder,
    waiting_for,
)
from hunyuan_pretrain.data.packed_format import PACKED_FILES, PACKED_FORMAT, PACKED_VERSION
from hunyuan_pretrain.data.packed_groups import report_file


def begin(
    tokenized: Sequence[str], sequence_length: int, output: str, *, overwrite: bool = False, **planning: Any
) -> list[int]:
    """Plan as `pack` does and write the plan to the unfinished folder; returns the unfinished groups.

    `planning` are arguments of `plan_pack`.
    """
    job = plan_pack(tokenized, sequence_length, **planning)
    with unfinished_folder(output, files=PACKED_FILES, identity=job.identity, overwrite=overwrite) as folder:
        write_plan(folder, job)
        return [] if (folder / MANIFEST).is_file() else unfinished_groups(job, folder)


class PackGroups(PipelineStep):
    """Task r of n packs the unfinished ones of the groups r, r + n, r + 2n..."""

    type = "📦 - PACKER"
    name = "Hunyuan: pack"

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self.working_folder = os.getcwd()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Pack this task's groups. Raises DataFormatError for damaged folders or a missing plan."""
        exhaust(data)
        with chdir(self.working_folder), ExitStack() as stack:
            folder, job = _open(stack, self.output)
            if (folder / MANIFEST).is_file():
                return
            opened: OpenJob | None = None
            for number in range(rank, job.num_groups, world_size):
                # the process that a requeued task replaces may still be running
                with waiting_for(folder / f".group_{number:05}.lock"):
                    if report_file(folder, number).is_file():
                        continue
                    opened = opened or job.open()
                    with self.track_time("group"):
                        opened.write_group(folder, number)
                self.stat_update("tokens", value=opened.tokens_of_groups[number], unit="group")


class JoinGroups(PipelineStep):
    """Joins the groups into a packed folder and gives it its final name, in one task."""

    type = "📦 - PACKER"
    name = "Hunyuan: join groups"

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self.working_folder = os.getcwd()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Join the groups in the first task. Raises DataFormatError if groups are missing or a task is still
        running."""
        exhaust(data)
        if rank > 0:
            return
        with chdir(self.working_folder), ExitStack() as stack:
            folder, job = _open(stack, self.output, alone=True)
            if not (folder / MANIFEST).is_file():
                if left := unfinished_groups(job, folder):
                    raise DataFormatError(
                        f"{self.output}: {len(left)} of {job.num_groups} groups are not finished; pack again"
                    )
                job.open().finish(folder)
            name_output(self.output, folder, job.num_groups)


def pack_on(
    executor: str,
    tokenized: Sequence[str],
    sequence_length: int,
    output: str,
    *,
    tasks: int,
    workers: int | None = None,
    logs: str | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any] | None:
    """Like `pack`, but with at most `tasks` datatrove tasks; `settings` are arguments of `begin`.

    `executor`, `options`, `workers`, `logs`: as for `tokenize_on`. Planning happens in this process, so mistakes in the
    inputs show at once. Returns the manifest; with Slurm returns None as soon as the jobs are submitted. Raises
    DataFormatError.
    """
    check_options(executor, options or {})
    left = begin(tokenized, sequence_length, output, **settings)
    stages: list[Stage] = [("pack", PackGroups(output), min(tasks, len(left)))] if left else []
    stages.append(("join", JoinGroups(output), 1))
    logs = str(Path(logs or f"{output}.logs").absolute())
    if not run_stages(executor, output, stages, workers=workers, logs=logs, options=options):
        return None
    with ExitStack() as stack:
        try:
            _open(stack, output)
        except DataFormatError:  # finished: the output has its final name
            return read_manifest(output, PACKED_FORMAT, PACKED_VERSION, "hunyuan-data pack")
    raise DataFormatError(f"{output}: not finished; {logs}/*/logs say why, and the same command resumes")


def _open(stack: ExitStack, output: str, *, alone: bool = False) -> tuple[Path, PackJob]:
    """`open_plan` of this job. Raises DataFormatError."""
    return open_plan(stack, output, PackJob, lambda job: job.identity, alone=alone)
