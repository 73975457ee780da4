"""Runs steps as datatrove tasks: on this machine, a Slurm cluster or a Ray cluster."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from pydantic import TypeAdapter, ValidationError

from data_tools.tokenization import default_workers
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import begun_folder, write_file

EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
Stage = tuple[str, PipelineStep, int]
"""Name, step, and number of tasks. A stage begins when all tasks of the one before it have succeeded."""


def run_stages(
    executor: str,
    output: str,
    stages: Sequence[Stage],
    *,
    workers: int | None,
    logs: str,
    options: Mapping[str, Any] | None,
) -> bool:
    """Run the stages that write `output`, or submit them all to Slurm. Whether they have been run.

    `workers`: tasks at the same time (default: all; for local, one per core). `logs`: absolute. `options`: those of
    `parse_options`, checked by `check_options`. datatrove's markers of finished tasks are ignored.
    """
    if executor == "local":
        workers = workers or default_workers()
    common = {"skip_completed": False, "workers": workers or -1, **(options or {})}
    if executor == "slurm":
        # a job whose dependency has failed must not stay in the queue; the jobs need this process's environment
        sbatch_args = {"kill-on-invalid-dep": "yes", **common.pop("sbatch_args", {})}
        common = {
            "qos": None,
            "env_command": f"export PATH={Path(sys.executable).parent}:$PATH",
            **common,
            "sbatch_args": sbatch_args,
        }
    elif executor == "ray":
        import ray

        if not ray.is_initialized():
            ray.init()
    build = EXECUTORS[executor]
    built = [
        build([step], tasks=tasks, logging_dir=f"{logs}/{name}", **_named(executor, name, common))
        for name, step, tasks in stages
    ]
    if executor == "slurm":
        for before, after in pairwise(built):
            after.depends = before
        built[-1].run()
        jobs = ", then ".join(f"job {stage.job_id}" for stage in built)
        print(f"{output}: submitted {jobs}; logs: {logs}; after a failure the same command resumes", file=sys.stderr)
        return False
    for stage in built:
        stage.run()
    return True


def parse_options(executor: str, given: Sequence[str]) -> dict[str, Any]:
    """Parse `--executor-option NAME=VALUE` options, each as the type that datatrove's executor class declares. Raises
    DataFormatError."""
    parameters = inspect.signature(EXECUTORS[executor]).parameters
    options: dict[str, Any] = {}
    for option in given:
        name, equals, value = option.partition("=")
        if not (name and equals):
            raise DataFormatError(f"--executor-option {option}: must be NAME=VALUE, such as partition=cpu")
        if name in options:
            raise DataFormatError(f"--executor-option {option}: {name} is given twice; give it once")
        kind = (
            parameters[name].annotation if name in parameters else "str"
        )  # `check_options` refuses unknown names with a list of the known ones
        options[name] = _value_of(
            option, value, kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        )
    return options


def _value_of(option: str, value: str, kind: str) -> Any:
    """`value` as the type in datatrove's annotation `kind`. A string is kept as written, so 00:30 and 1e3 are not
    numbers."""
    expected = next((known for known in ("dict", "bool", "int", "str") if re.search(rf"\b{known}\b", kind)), "str")
    if expected == "str":
        return value
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if type(found).__name__ != expected:
        such = {"dict": 'a JSON object, such as {"mem": "8G"}', "bool": "true or false", "int": "a whole number"}[
            expected
        ]
        raise DataFormatError(f"--executor-option {option}: must be {such}")
    return found


def check_options(executor: str, options: Mapping[str, Any]) -> None:
    """Raise DataFormatError for options that the executor does not have, or if it cannot run here."""
    problems = []
    given_here = {"pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed"}
    known = set(inspect.signature(EXECUTORS[executor]).parameters) - given_here
    for name in options:
        if name not in known:
            problems.append(
                f"{name}: not an option of datatrove's {executor} executor; its options are {', '.join(sorted(known))}"
            )
    if executor == "slurm":
        problems += [
            f"{name}: required for Slurm; give {name}=..." for name in ("partition", "time") if name not in options
        ]
        if shutil.which("sbatch") is None:
            problems.append("sbatch is not on the PATH; submit from a machine of the Slurm cluster")
    if problems:
        raise DataFormatError("--executor-option: " + "; ".join(problems))


def _named(executor: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"job_name": f"hunyuan-{name}", **options} if executor == "slurm" else options


def exhaust(data: DocumentsPipeline) -> None:
    """Let the earlier steps of a pipeline do their work."""
    for _ in data or ():
        pass


# --- the plan in an unfinished folder, by which tasks communicate -----------------------------------------------------

PLAN = ".plan"
P = TypeVar("P")


def write_plan(folder: Path, plan: Any) -> None:
    """Leave a plan, a dataclass, for the tasks."""
    write_file(folder / PLAN, TypeAdapter(type(plan)).dump_json(plan))


def open_plan(
    stack: ExitStack, output: str, kind: type[P], identity_of: Callable[[P], str], *, alone: bool = False
) -> tuple[Path, P]:
    """Lock the unfinished folder; returns it and its plan. Raises DataFormatError without a plan for the job that the
    folder belongs to."""
    folder, identity = stack.enter_context(begun_folder(output, alone=alone))
    try:
        plan = TypeAdapter(kind).validate_json((folder / PLAN).read_bytes())
    except FileNotFoundError:
        raise DataFormatError(
            f"{output}: started without --executor; run the command that started it, or plan again"
        ) from None
    except ValidationError:
        plan = None
    if plan is None or identity_of(plan) != identity:
        raise DataFormatError(
            f"{folder / PLAN}: not a plan of this version and job; run the command that started it again"
        )
    return folder, plan
