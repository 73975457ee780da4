"""launch/slurm.py, with substitutes for Slurm's programs that record their arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.node import MistakeError
from launch.slurm import count_ranks
from tests.helpers.runs import ROOT

DEMO = "configs/dev/demo_cpu.yaml"
SCONTROL = """#!/bin/sh
echo "$@" >> FOLDER/scontrol
case "$2" in
hostnames) printf 'n1\\nn2\\n' ;;
node) echo "NodeName=$3 Arch=x86_64 NodeAddr=10.0.0.$3 NodeHostName=$3" ;;
esac
"""
SRUN = """#!PYTHON
import json, os, sys
names = ("NNODES", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID")
json.dump([sys.argv[1:], {name: os.environ[name] for name in names}], open("FOLDER/srun", "w"))
sys.exit(int(os.environ["STATUS"]))
"""


def submit(folder: Path, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run launch/train.sbatch in a job of two nodes whose srun exits with `status`."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (folder / name).write_text(text.replace("FOLDER", str(folder / "said")).replace("PYTHON", sys.executable))
        (folder / name).chmod(0o755)
    (folder / "said").mkdir(exist_ok=True)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "STATUS": str(status), "PATH": path}
    command = ["bash", "launch/train.sbatch", DEMO, f"run_dir={folder}/run"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | job | variables, capture_output=True, text=True)


def test_every_node_gets_the_same_job(tmp_path: Path) -> None:
    done = submit(tmp_path)
    assert done.returncode == 0, done.stderr
    logs = f"{tmp_path}/run/slurm"
    line = f"job 20007: 2 nodes x 1 ranks, rendezvous at 10.0.0.n1:20007; logs: {logs}/20007.*.log"
    assert done.stdout.splitlines()[-2:] == [line, "done"]
    assert "15,804,928" in done.stdout, "the plan"
    arguments, variables = json.loads((tmp_path / "said/srun").read_text())
    assert arguments == [
        *("--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=0", "--open-mode", "append"),
        *("--output", f"{logs}/%j.%n.log", f"{ROOT}/launch/train.sh", DEMO, f"run_dir={tmp_path}/run"),
    ]
    meeting = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "10.0.0.n1", "MASTER_PORT": "20007"}
    assert variables == meeting | {"RDZV_ID": "20007.0"}
    assert Path(logs).is_dir()


@pytest.mark.parametrize("requeue", ["0", "1"])
def test_a_stopped_job_is_requeued_if_that_was_requested(tmp_path: Path, requeue: str) -> None:
    done = submit(tmp_path, 75, HUNYUAN_REQUEUE=requeue)
    assert done.returncode == 75
    assert done.stdout.endswith("stopped after saving (status 75): the same job resumes from there\n")
    assert ("requeue 20007\n" in (tmp_path / "said/scontrol").read_text()) == (requeue == "1")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_stop_of_the_batch_script_alone_reaches_the_nodes(number: signal.Signals) -> None:
    """As by sbatch --signal=B:USR1@300."""
    nodes = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print(flush=True); "
    program = f"""
import os, sys
from launch.slurm import run_nodes
sys.exit(run_nodes([sys.executable, "-c", {nodes + "time.sleep(60)"!r}], os.environ))
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the nodes run
        process.send_signal(number)
        assert process.wait(timeout=30) == 75


def test_a_failure_names_the_logs(tmp_path: Path) -> None:
    done = submit(tmp_path, 1)
    assert done.returncode == 1
    assert done.stderr.endswith(f"failed with status 1; see {tmp_path}/run/slurm/20007.*.log\n")


def test_a_world_that_does_not_fit_starts_no_node(tmp_path: Path) -> None:
    done = submit(tmp_path, NPROC_PER_NODE="3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the job has 6 ranks" in done.stderr
    assert not (tmp_path / "said/srun").exists()
    assert not (tmp_path / "run").exists()


def test_ranks_of_a_node() -> None:
    job = {"SLURM_JOB_NUM_NODES": "2"}
    assert count_ranks("x.yaml", 16, job) == 8
    assert count_ranks("x.yaml", 16, job | {"SLURM_GPUS_ON_NODE": "4"}) == 4
    assert count_ranks("x.yaml", 16, job | {"SLURM_GPUS_ON_NODE": "4", "NPROC_PER_NODE": "2"}) == 2
    with pytest.raises(MistakeError, match=r"no GPUs on this node and no parallel\.world_size in x\.yaml"):
        count_ranks("x.yaml", None, job)
    with pytest.raises(MistakeError, match=r"parallel\.world_size=15 does not divide over 2 nodes"):
        count_ranks("x.yaml", 15, job)
    with pytest.raises(MistakeError, match="NPROC_PER_NODE=gpu: must be a number of ranks"):
        count_ranks("x.yaml", 16, job | {"NPROC_PER_NODE": "gpu"})
