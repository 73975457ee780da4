"""The folder of one submission, RUN_DIR/jobs/NNN: what was submitted, from which code and packages. It gets its name
only when it is complete; submitted.json is added as the job is handed over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from types import FrameType

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.load import dump_resolved
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.jobs.request import Request

EXPERIMENT, SUBMITTED = "experiment.yaml", "submitted.json"
SHOWN_VARIABLES = ("CUDA_", "NCCL_", "NVTE_", "OMP_", "PYTORCH_", "TORCH_", "UCX_", "HUNYUAN_", "SLURM_CONF")
"""Beginnings of the names of variables that are recorded. Others may hold secrets."""


def next_folder(run_dir: Path) -> Path:
    """The name of the next submission's folder."""
    taken = [int(path.name) for path in (run_dir / "jobs").glob("[0-9]*") if path.name.isdecimal()]
    return run_dir / "jobs" / f"{max(taken, default=0) + 1:03d}"


def write(folder: Path, request: Request, experiment: Experiment, files: Mapping[str, str]) -> None:
    """Write `files` (name -> text; a name that ends in .sh or .sbatch is executable) and what the job consists of.
    Raises ConfigError if the run directory cannot be written; nothing is then left."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for name, text in {**files, **_record(request, experiment)}.items():
            (partial / name).write_text(text, encoding="utf-8")
            if name.endswith((".sh", ".sbatch")):
                (partial / name).chmod(0o755)
        partial.rename(folder)
    except OSError as error:
        raise ConfigError("submit", [Problem("run_dir", experiment.run_dir, f"cannot be written: {error}")]) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def note_submitted(folder: Path, jobs: list[str]) -> None:
    """Record that the job has been handed over, under which ids."""
    content = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "jobs": jobs}
    temporary = folder / f".{SUBMITTED}"
    temporary.write_text(json.dumps(content) + "\n")
    temporary.rename(folder / SUBMITTED)


@contextmanager
def handed_over_whole() -> Iterator[None]:
    """Inside, a first SIGINT, SIGTERM or SIGHUP waits for the end of the block, so that a job which was taken is also
    recorded; a second one ends this process."""
    asked: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked:
            os.kill(os.getpid(), asked[0])


CODE = Path(__file__).parents[2]


def commit() -> str | None:
    """The commit of this code; None if it is not in git."""
    return _git(CODE, "rev-parse", "HEAD")


def _record(request: Request, experiment: Experiment) -> dict[str, str]:
    diff = _git(CODE, "diff", "HEAD", "--binary")
    packages = sorted({f"{found.name}=={found.version}" for found in distributions() if found.name}, key=str.lower)
    # elsewhere they do not reach the ranks
    is_passed_on = request.place in ("local", "slurm")
    secret = experiment.logging.webhook_url_env
    variables = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(SHOWN_VARIABLES) and name != secret
    }
    about = {
        "command": sys.argv[1:],
        "config": str(request.config),
        "overrides": list(request.overrides),
        "commit": commit(),
        "has_local_changes": bool(diff),
        "python": sys.version.split()[0],
        "interpreter": request.python,
        "folder": os.getcwd(),
        "nodes": request.nodes,
        "ranks_per_node": request.ranks_per_node,
        "variables": variables if is_passed_on else {},
    }
    files = {
        EXPERIMENT: dump_resolved(experiment),
        "job.json": json.dumps(about, indent=1, ensure_ascii=False) + "\n",
        "packages.txt": "\n".join(packages) + "\n",
    }
    return files | ({"code.diff": diff + "\n"} if diff else {})


def _git(folder: Path, *arguments: str) -> str | None:
    """None without git, and if the code is not in a repository of its own."""
    try:
        inside = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", "hunyuan_pretrain/jobs/job_folder.py"],
            capture_output=True,
        )
        if inside.returncode:
            return None
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace")
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
