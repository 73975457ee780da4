"""launch/train.sh and launch/train.sbatch: help and refusals; launch/ranks.py: what counts as a stop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.ranks import report, was_stopped

ROOT = Path(__file__).parents[3]
BARE = Path(sys.base_prefix) / "bin/python3"
"""An interpreter without the project."""
DEMO = "configs/dev/demo_cpu.yaml"


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    names = (
        "NNODES",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NPROC_PER_NODE",
        "RDZV_ID",
        "HUNYUAN_PYTHON",
        "LOCAL_ADDR",
    )
    environment = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("SLURM")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["bash", script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=120)


def test_help() -> None:
    done = run("launch/train.sh", "--help")
    assert done.returncode == 0
    for name in (
        "NPROC_PER_NODE",
        "NNODES",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "75 stopped by SIGTERM, SIGUSR1 or Ctrl-C after saving",
    ):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "no CONFIG; see --help"),
        (["--gpus"], {}, "--gpus: unknown option"),
        (["no.yaml"], {}, "no.yaml: no such file"),
        (["configs"], {}, "configs: not a file"),
        ([DEMO, "--from-step"], {}, "--from-step: no value; see --help"),
        ([DEMO, "--from-step", "0"], {}, "--from-step=0: must be a number of steps"),
        ([DEMO], {"NNODES": "2"}, "NNODES=2, but MASTER_ADDR does not name the first node"),
        ([DEMO], {"NNODES": "2", "MASTER_ADDR": "a"}, "neither NODE_RANK nor RDZV_ID says which node this is"),
        (
            [DEMO],
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "no.such.node.invalid", "NPROC_PER_NODE": "1"},
            "launch/train.sh: MASTER_ADDR=no.such.node.invalid: ",
        ),
        ([DEMO], {"NNODES": "two"}, "NNODES=two: must be a number of nodes"),
        ([DEMO], {"HUNYUAN_PYTHON": "/no/python"}, "/no/python: no such interpreter"),
        ([DEMO], {"HUNYUAN_PYTHON": str(BARE)}, "; install the project there"),
        ([DEMO, "optimizer.lrr=1"], {}, "did you mean optimizer.lr?"),
        ([DEMO, "optimizer.lrr=1"], {"NPROC_PER_NODE": "2"}, "did you mean optimizer.lr?"),
        ([DEMO], {"NPROC_PER_NODE": "3"}, "parallel.world_size=2: the job has 3 ranks"),
        ([DEMO], {"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE=gpu: must be a number of ranks"),
        ([DEMO, "--gpus"], {}, "--gpus: unknown option; settings are KEY=VALUE; see --help"),
        (
            [DEMO],
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"},
            "NODE_RANK=2: must be a number from 0 to 1, for NNODES=2",
        ),
        (
            [DEMO],
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"},
            "MASTER_PORT=x: must be a port, 1 to 65535",
        ),
    ],
)
def test_train_sh_refuses(arguments: list[str], variables: dict[str, str], message: str) -> None:
    done = run("launch/train.sh", *arguments, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert not {"Traceback", "torchrun", "elastic"} & set(done.stderr.split())


def test_help_after_config() -> None:
    assert run("launch/train.sh", DEMO, "--help").stdout == run("launch/train.sh", "--help").stdout


def test_a_mistake_found_by_the_ranks_is_one_message_and_status_2(tmp_path: Path) -> None:
    """Whatever variables of another launcher are in the environment."""
    stray = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "MASTER_PORT": "1",
        "MASTER_ADDR": "nowhere",
        "PET_STANDALONE": "0",
    }
    settings = (f"run_dir={tmp_path}/run", f"tokenizer={tmp_path}/none")
    done = run("launch/train.sh", DEMO, *settings, NPROC_PER_NODE="2", **stray)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{tmp_path}/none: no such file; a tokenizer is a folder with hy.tiktoken (`hunyuan-data train-tokenizer`)"
    ]


@pytest.mark.parametrize("meeting", [{"NODE_RANK": "0"}, {"NODE_RANK": "0", "RDZV_ID": "x"}])
def test_a_port_in_use_is_one_line(meeting: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = run(
            "launch/train.sh",
            DEMO,
            NNODES="2",
            NPROC_PER_NODE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            **meeting,
        )
    said = f"launch/train.sh: MASTER_PORT={port} is in use on this node: set it to a free port, the same on all nodes\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize(
    ("statuses", "code", "said"),
    [
        ({0: 2, 1: -15}, 2, []),
        ({0: 2, 1: 2}, 2, []),
        ({0: 1, 1: -15}, 1, ["rank 0 exited with status 1; see its output above"]),
        ({0: -15, 3: -9}, 1, ["rank 3 was killed by SIGKILL (out of memory?)"]),
        (
            {0: 2, 1: 1},
            1,
            ["rank 0 exited with status 2; see its output above", "rank 1 exited with status 1; see its output above"],
        ),
        ({1: -15}, 1, ["rank 1 was killed by SIGTERM; see its output above"]),
    ],
)
def test_the_launcher_names_the_ranks_that_failed(
    statuses: dict[int, int], code: int, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(statuses) == code
    assert capsys.readouterr().err.splitlines() == [f"launch/train.sh: {line}" for line in said]


def test_sbatch_does_not_fall_back_to_this_host() -> None:
    done = run("launch/train.sbatch", DEMO)
    assert done.returncode == 2
    assert "not inside a Slurm job (no SLURM_JOB_NODELIST)" in done.stderr


def test_sbatch_refuses_a_world_that_does_not_fit_before_srun() -> None:
    job = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n[0-2]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    done = run("launch/train.sbatch", DEMO, **job)
    assert done.returncode == 2
    assert "parallel.world_size=2 does not divide over 3 nodes" in done.stderr
    done = run("launch/train.sbatch", DEMO, "--accept-changes", "seed", "--from-step=4", **job, NPROC_PER_NODE="1")
    assert done.returncode == 2
    assert "the job has 3 ranks" in done.stderr
    done = run("launch/train.sbatch", DEMO, "--gpus", **job)
    assert done.returncode == 2
    assert "--gpus: unknown option" in done.stderr


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([75, 75], True), ([75, -15], True), ([75, 1], False), ([-15, -15], False), ([75, -9], False), ([1], False)],
)
def test_a_stop_is_distinguished_from_a_failure(statuses: list[int], expected: bool) -> None:
    assert was_stopped(statuses) is expected


def test_ranks_stopped_before_they_handle_signals_have_not_failed() -> None:
    assert was_stopped([-15, -15], is_asked=True)
    assert not was_stopped([-15, 1], is_asked=True)
