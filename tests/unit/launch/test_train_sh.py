"""launch/train.sh and launch/train.sbatch: help and refusals; launch/ranks.py: what counts as a stop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.ranks import was_stopped

ROOT = Path(__file__).parents[3]
BARE = Path(sys.base_prefix) / "bin/python3"
"""An interpreter without the project."""
DEMO = "configs/dev/demo_cpu.yaml"


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "RDZV_ID", "HUNYUAN_PYTHON")
    environment = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("SLURM")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["bash", script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=120)


def test_help() -> None:
    done = run("launch/train.sh", "--help")
    assert done.returncode == 0
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "75 stopped by SIGTERM or Ctrl-C after saving"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "no CONFIG; see --help"),
        (["--gpus"], {}, "--gpus: unknown option"),
        (["no.yaml"], {}, "no.yaml: no such file"),
        ([DEMO], {"NNODES": "2"}, "NNODES=2, but MASTER_ADDR does not name the first node"),
        ([DEMO], {"NNODES": "2", "MASTER_ADDR": "a"}, "neither NODE_RANK nor RDZV_ID says which node this is"),
        ([DEMO], {"NNODES": "two"}, "NNODES=two: must be a number of nodes"),
        ([DEMO], {"HUNYUAN_PYTHON": "/no/python"}, "/no/python: no such interpreter"),
        ([DEMO], {"HUNYUAN_PYTHON": str(BARE)}, "has not got the project, or not what it needs; install it there"),
        ([DEMO, "optimizer.lrr=1"], {}, "did you mean optimizer.lr?"),
    ],
)
def test_train_sh_refuses(arguments: list[str], variables: dict[str, str], message: str) -> None:
    done = run("launch/train.sh", *arguments, **variables)
    assert done.returncode == 2
    assert message in done.stderr


def test_sbatch_does_not_fall_back_to_this_host() -> None:
    done = run("launch/train.sbatch", DEMO)
    assert done.returncode == 2
    assert "not inside a Slurm job (no SLURM_JOB_NODELIST)" in done.stderr


def test_sbatch_refuses_a_world_that_does_not_fit_before_srun() -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[0-2]", "SLURM_JOB_NUM_NODES": "3", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = run("launch/train.sbatch", DEMO, **job)
    assert done.returncode == 2
    assert "parallel.world_size=2 does not divide over 3 nodes" in done.stderr
    done = run("launch/train.sbatch", DEMO, **job, NPROC_PER_NODE="1")
    assert done.returncode == 2
    assert "the job has 3 ranks" in done.stderr


@pytest.mark.parametrize(
    ("statuses", "expected"), [([75, 75], True), ([75, -15], True), ([75, 1], False), ([-15, -15], False), ([75, -9], False), ([1], False)]
)
def test_a_stop_is_told_from_a_failure(statuses: list[int], expected: bool) -> None:
    assert was_stopped(statuses) is expected


def test_ranks_that_were_told_to_stop_before_they_listened_have_not_failed() -> None:
    assert was_stopped([-15, -15], is_asked=True)
    assert not was_stopped([-15, 1], is_asked=True)
