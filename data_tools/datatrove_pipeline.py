"""Tokenizing on many machines: the step `tokenize` as a pipeline of datatrove, by its local, Slurm and Ray executors;
the same bytes.

Three steps: PlanTokenizing (one task) deals the inputs out, TokenizeShards (any number of tasks) writes the shards,
JoinShards (one task) joins them and gives the output its name. They meet in the unfinished folder of the output, on a
file system that all machines see and that keeps locks (NFS, Lustre mounted with `flock`), and need nothing else of one
another:

- A task carries no job but reads the plan that lies in the folder, so a task that was submitted for an older job cannot
  mix in its shards.
- Tasks share a lock that planning, joining and the plain command must have alone, and wait for one another where they
  are at one shard.
- A shard is finished when its report is there. datatrove's own marks of finished tasks are not believed: after a kill,
  with another number of tasks or another output they may say something else. A task with nothing left to do takes
  seconds.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from pydantic import TypeAdapter, ValidationError

from data_tools.encoding import DocumentEncoder
from data_tools.tokenization import (
    TOKENIZED_FILES,
    checked_outputs,
    default_workers,
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
    write_file,
)
from hunyuan_pretrain.data.indexed import TOKENIZED_FORMAT, TOKENIZED_VERSION

EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
_PLAN = ".plan"


@dataclass(frozen=True)
class Plan:
    """What the tasks read of the one that planned."""

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
    """Plan as `tokenize` does, leave the plan in the unfinished folder, and return the numbers of the shards that are
    not finished.

    `planning` is what `plan_job` takes.
    """
    job = plan_job(inputs, tokenizer_path, **planning)
    outputs = checked_outputs(output, job.holdout_every, holdout_output)
    with ExitStack() as stack:

        def open_folder(path: str) -> Path:
            return stack.enter_context(
                unfinished_folder(path, files=TOKENIZED_FILES, identity=job.identity, overwrite=overwrite)
            )

        folder = open_folder(output)
        write_file(folder / _PLAN, TypeAdapter(Plan).dump_json(Plan(job, outputs)))
        if (folder / MANIFEST).is_file():
            return []
        folders = [folder, *(open_folder(other) for other in outputs[1:])]
        return [number for number in range(len(job.shards)) if not is_finished(folders, number)]


class PlanTokenizing(PipelineStep):
    """Deals the inputs out, in one task, for the two steps below. Takes what `begin` takes. Inputs may be what earlier
    steps wrote."""

    type = "🔢 - TOKENIZER"
    name = "Hunyuan: plan"

    def __init__(self, inputs: Sequence[str], tokenizer_path: str, output: str, **settings: Any) -> None:
        super().__init__()
        # a wrong name is an error here, not in the task
        planning = (
            inspect.signature(begin).bind(inputs, tokenizer_path, output, **settings).arguments.get("planning", {})
        )
        inspect.signature(plan_job).bind(inputs, tokenizer_path, **planning)
        self.inputs, self.tokenizer_path, self.output, self.settings = list(inputs), tokenizer_path, output, settings
        self.working_folder = os.getcwd()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Runs in the first task, whatever their number."""
        _exhaust(data)
        if rank == 0:
            with chdir(self.working_folder):
                begin(self.inputs, self.tokenizer_path, self.output, **self.settings)


class TokenizeShards(PipelineStep):
    """Task r of n writes those of the shards r, r + n, r + 2n... that are not finished."""

    type = "🔢 - TOKENIZER"
    name = "Hunyuan: tokenize"

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self.working_folder = os.getcwd()  # paths of the inputs may be relative to it

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Raises DataFormatError for damaged files, too many rejects, or where nothing has been planned."""
        _exhaust(data)
        with chdir(self.working_folder), ExitStack() as stack:
            folder, plan = _open(stack, self.output)
            if (folder / MANIFEST).is_file():
                return
            folders = [folder, *(stack.enter_context(begun_folder(other))[0] for other in plan.outputs[1:])]
            encoder: DocumentEncoder | None = None
            for number in range(rank, len(plan.job.shards), world_size):
                # a requeued task can meet the process that it replaces
                with waiting_for(folder / f".{shard_name(number)}.lock"):
                    if is_finished(folders, number):
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
    """Joins the shards to whole folders and gives them their names, in one task."""

    type = "🔢 - TOKENIZER"
    name = "Hunyuan: join"

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self.working_folder = os.getcwd()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Raises DataFormatError if shards are missing, there are too many rejects, or a task is still at work."""
        _exhaust(data)
        if rank > 0:
            return
        with chdir(self.working_folder), ExitStack() as stack:
            folder, plan = _open(stack, self.output, alone=True)
            if not (folder / MANIFEST).is_file():
                folders = [
                    folder,
                    *(stack.enter_context(begun_folder(other, alone=True))[0] for other in plan.outputs[1:]),
                ]
                left = [number for number in range(len(plan.job.shards)) if not is_finished(folders, number)]
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
    """As `tokenize`, by at most `tasks` tasks of datatrove; `settings` are those of `begin`.

    `executor` is local, slurm or ray; `options` go to datatrove's class of that name. `workers` tasks run at a time
    (default: all, on this machine one a core). `logs` is datatrove's folder (default: beside the output). Planning is
    done here, so mistakes in the inputs show at once. Returns the manifests; of Slurm None, as soon as the jobs are
    submitted.
    """
    _check(executor, options or {})
    left = begin(inputs, tokenizer_path, output, **settings)
    logs = str(Path(logs or f"{output}.logs").absolute())
    if executor == "local":
        workers = workers or default_workers()
    common = {"skip_completed": False, "workers": workers or -1, **(options or {})}
    if executor == "slurm":
        # a job whose turn cannot come any more shall not stay in the queue; ours needs the environment that this
        # process has
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
    stages = [
        build(
            [TokenizeShards(output)],
            tasks=min(tasks, len(left)),
            logging_dir=f"{logs}/tokenize",
            **_named(executor, "tokenize", common),
        )
        for _ in left[:1]
    ]
    stages.append(build([JoinShards(output)], tasks=1, logging_dir=f"{logs}/join", **_named(executor, "join", common)))
    if executor == "slurm":
        stages[-1].depends = stages[0] if left else None
        stages[-1].run()
        jobs = ", then ".join(f"job {stage.job_id}" for stage in stages)
        print(f"{output}: submitted {jobs}; logs: {logs}; after a failure the same command goes on", file=sys.stderr)
        return None
    for stage in stages:
        stage.run()
    outputs = checked_outputs(output, settings.get("holdout_every"), settings.get("holdout_output"))
    with ExitStack() as stack:
        try:
            _open(stack, output)
        except DataFormatError:  # it has its name
            return [
                read_manifest(each, TOKENIZED_FORMAT, TOKENIZED_VERSION, "hunyuan-data tokenize") for each in outputs
            ]
    raise DataFormatError(f"{output}: not finished; {logs}/*/logs say why, and the same command goes on")


def parse_options(executor: str, given: Sequence[str]) -> dict[str, Any]:
    """`--executor-option NAME=VALUE` options, each read as the type that datatrove's class of the executor says. Raises
    DataFormatError."""
    parameters = inspect.signature(EXECUTORS[executor]).parameters
    options: dict[str, Any] = {}
    for option in given:
        name, equals, value = option.partition("=")
        if not (name and equals):
            raise DataFormatError(f"--executor-option {option}: write it as NAME=VALUE, such as partition=cpu")
        if name in options:
            raise DataFormatError(f"--executor-option {option}: {name} is given twice; give it once")
        kind = (
            parameters[name].annotation if name in parameters else "str"
        )  # what is not known is refused with the list of what is
        options[name] = _value_of(
            option, value, kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        )
    return options


def _value_of(option: str, value: str, kind: str) -> Any:
    """`value` as datatrove's annotation `kind` says: a string stays as it is written, so 00:30 and 1e3 are no
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
        raise DataFormatError(f"--executor-option {option}: {such} is expected")
    return found


def _check(executor: str, options: Mapping[str, Any]) -> None:
    problems = []
    given_here = {"pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed"}
    known = set(inspect.signature(EXECUTORS[executor]).parameters) - given_here
    for name in options:
        if name not in known:
            problems.append(
                f"{name}: no option of datatrove's {executor} executor; its options are {', '.join(sorted(known))}"
            )
    if executor == "slurm":
        problems += [
            f"{name}: missing, Slurm needs it; give {name}=..." for name in ("partition", "time") if name not in options
        ]
        if shutil.which("sbatch") is None:
            problems.append("sbatch is not on the PATH; submit from a machine of the Slurm cluster")
    if problems:
        raise DataFormatError("--executor-option: " + "; ".join(problems))


def _named(executor: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"job_name": f"hunyuan-{name}", **options} if executor == "slurm" else options


def _open(stack: ExitStack, output: str, *, alone: bool = False) -> tuple[Path, Plan]:
    """The unfinished folder, locked, and its plan."""
    folder, identity = stack.enter_context(begun_folder(output, alone=alone))
    try:
        plan = TypeAdapter(Plan).validate_json((folder / _PLAN).read_bytes())
    except FileNotFoundError:
        raise DataFormatError(f"{output}: begun without tasks; run the command that began it, or plan again") from None
    except ValidationError:
        plan = None
    if plan is None or plan.job.identity != identity:
        raise DataFormatError(
            f"{folder / _PLAN}: not a plan of this version and job; run the command that began it again"
        )
    return folder, plan


def _exhaust(data: DocumentsPipeline) -> None:
    for _ in data or ():
        pass
