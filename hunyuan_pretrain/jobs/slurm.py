"""A Slurm job: its batch script, checked by Slurm, submitted, and followed by others that begin when it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.exit_status import COMMAND
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.jobs.job_folder import EXPERIMENT, handed_over_whole, note_submitted
from hunyuan_pretrain.jobs.request import Request

SCRIPT = "job.sbatch"
STARTS = "starts.txt"
STARTED = 'echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"'
"""The job itself records that it runs: `submit` may have been killed before it could."""


def script(request: Request, experiment: Experiment, folder: Path) -> str:
    """The batch script. It starts launch.slurm, which checks the number of ranks again, where the job runs."""
    own = [option.partition("=")[0] for option in request.options]
    lines = {
        "job-name": _word(experiment.name),
        "nodes": str(request.nodes),
        "ntasks-per-node": "1",
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
        "signal": f"TERM@{request.grace_s}",
        "open-mode": "append",
        "output": f"{folder.resolve()}/%j.out",
        "chdir": os.getcwd(),
    }
    if experiment.runtime.device != "cpu":
        lines["gpus-per-node"] = str(request.ranks_per_node)
    head = [f"#SBATCH --{name}={value}" for name, value in lines.items() if value and name not in own]
    head += [f"#SBATCH --{option}" for option in request.options]
    if not {"requeue", "no-requeue"} & set(own):
        head.append(f"#SBATCH --{'requeue' if request.requeue else 'no-requeue'}")
    # of this host; a container has its own
    variables = {"HUNYUAN_PYTHON": request.python, **request.variables}
    variables[COMMAND] = shlex.join(["sbatch", str(folder.resolve() / SCRIPT)])
    if request.requeue:
        variables["HUNYUAN_REQUEUE"] = "1"
    variables |= container(request)
    launcher = Path(str(_launch_folder())) / "train.sh"
    command = [request.python, "-m", "launch.slurm", str(launcher)]
    command += [str((folder / EXPERIMENT).resolve()), *request.train_options]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *head,
            "set -euo pipefail",
            f"{STARTED} >> {shlex.quote(str(folder.resolve() / STARTS))}",
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            f"exec {shlex.join(command)}",
            "",
        ]
    )


def container(request: Request) -> dict[str, str]:
    """Variables with which launch.slurm starts the launcher of a node in a container."""
    if not request.image:
        return {}
    mounts = [str(Path(mount).resolve()) for mount in (os.getcwd(), *request.mounts)]
    if request.runtime in ("", "pyxis"):
        options = [f"--container-image={request.image}", f"--container-workdir={os.getcwd()}"]
        options.append("--container-mounts=" + ",".join(f"{mount}:{mount}" for mount in mounts))
        return {"HUNYUAN_SRUN_OPTIONS": json.dumps(options), "HUNYUAN_RUN_IN": "[]"}
    inside = ["apptainer", "exec", "--nv", "--pwd", os.getcwd()]
    for mount in mounts:
        inside += ["--bind", mount]
    return {"HUNYUAN_RUN_IN": json.dumps([*inside, request.image])}


def submit(request: Request, folder: Path) -> list[str]:
    """Hand the job over; returns the ids of the job and of those that follow it, each recorded as soon as it is known.
    Raises ConfigError: no sbatch, or Slurm refuses the job."""
    path = folder / SCRIPT
    _sbatch(["--test-only", str(path)])
    jobs: list[str] = []
    for _ in range(request.chain):
        # any end: a job that was stopped for its time limit has status 75, and a finished run ends at once
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        try:
            with handed_over_whole():
                jobs.append(_sbatch(["--parsable", *after, str(path)]).split(";")[0])
                note_submitted(folder, jobs)
        except ConfigError:
            if jobs:  # all or none
                subprocess.run(["scancel", *jobs], check=False)
            raise
    return jobs


def _sbatch(arguments: list[str]) -> str:
    # a session of its own: a Ctrl-C would end sbatch after Slurm has taken the job and before it says which
    done = subprocess.run(["sbatch", *arguments], capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        said = " ".join(done.stderr.split()).removeprefix("sbatch: error: ").removeprefix("allocation failure: ")
        raise ConfigError("submit", [Problem("--slurm", Problem.NO_VALUE, f"Slurm refuses the job: {said}")])
    return done.stdout.strip()


def _launch_folder() -> Path:
    spec = find_spec("launch")
    assert spec is not None, "the package launch is installed beside this one"
    return Path(next(iter(spec.submodule_search_locations or []))).resolve()


def _word(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)
