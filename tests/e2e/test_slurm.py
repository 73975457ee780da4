"""Training and tokenizing on a running Slurm cluster of two nodes or more that have this checkout; one CPU rank per
node.

Every job must be able to read and write pytest's folder: on a real cluster, pass --basetemp on a shared file system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import experiment_fields, write_experiment

ROOT = Path(__file__).parents[2]


def idle_nodes() -> int:
    if shutil.which("sinfo") is None:
        return 0
    done = subprocess.run(["sinfo", "--noheader", "--states=idle", "--format=%D"], capture_output=True, text=True)
    return sum(int(line) for line in done.stdout.split() if line.isdecimal()) if done.returncode == 0 else 0


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(idle_nodes() < 2, reason="no Slurm cluster with two idle nodes"),
]


def submit(tmp_path: Path, config: Path, *options: str, **variables: str) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | variables
    command = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--time=10",
        f"--output={tmp_path}/%j.out",
        *options,
        "launch/train.sbatch",
        str(config),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def state(job: str) -> tuple[str, str]:
    """(state, exit code as status:signal) of a job."""
    shown = subprocess.run(
        ["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=True
    ).stdout
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    return fields["JobState"], fields["ExitCode"]


def wait_for(condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1)


def test_two_nodes_are_one_world_and_a_stop_is_status_75(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    config = write_experiment(
        tmp_path / "x.yaml", experiment_fields(corpus, run_dir, steps=4000, parallel__world_size=2)
    )
    job = submit(tmp_path, config)
    metrics = run_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    assert "2 ranks on CPU" in (run_dir / "log.txt").read_text()
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    wait_for(lambda: state(job)[0] not in ("RUNNING", "COMPLETING"))
    assert state(job) == ("FAILED", "75:0")
    assert "stopped after saving (status 75)" in (tmp_path / f"{job}.out").read_text()
    assert list(run_dir.glob("checkpoints/step_*/complete.json"))
    for node in range(2):
        assert "the ranks were told to stop and have saved" in (run_dir / f"slurm/{job}.{node}.log").read_text()


def test_a_world_that_does_not_fit_ends_before_srun(tmp_path: Path, corpus: Path) -> None:
    config = write_experiment(tmp_path / "x.yaml", experiment_fields(corpus, tmp_path / "run", parallel__world_size=2))
    job = submit(tmp_path, config, NPROC_PER_NODE="3")
    wait_for(lambda: state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"))
    assert state(job) == ("FAILED", "2:0")
    assert "the job has 6 ranks" in (tmp_path / f"{job}.out").read_text()


def submit_tokenizing(corpus: Path, out: Path, **sbatch_args: str) -> list[str]:
    """Submit the jobs that tokenize and join; returns their ids."""
    command = [
        sys.executable,
        "-m",
        "data_tools.cli",
        "tokenize",
        str(corpus / "texts"),
        "--tokenizer",
        str(corpus / "tokenizer"),
    ]
    command += ["--extension", ".txt", "--output", str(out), "--executor", "slurm", "--tasks", "4"]
    options = {"partition": default_partition(), "time": "00:10:00", "sbatch_args": json.dumps(sbatch_args)}
    command += [f"--executor-option={name}={value}" for name, value in options.items()]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return re.findall(r"job (\d+)", done.stderr.rpartition("submitted")[2])


def default_partition() -> str:
    shown = subprocess.run(
        ["sinfo", "--noheader", "--format=%P"], check=True, capture_output=True, text=True
    ).stdout.split()
    return next((name.removesuffix("*") for name in shown if name.endswith("*")), shown[0])


def test_tokenizing_resumes_after_a_killed_task_and_gives_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'hunyuan-pretrain[cluster]'")
    from data_tools import corpus as corpus_files
    from data_tools.tokenization import tokenize

    small = tmp_path / "corpus"
    shutil.copytree(corpus / "texts", small / "texts")
    shutil.copytree(corpus / "tokenizer", small / "tokenizer")
    plain, out = tmp_path / "plain", tmp_path / "out"
    for text in (small / "texts").iterdir():  # several shards
        text.write_text(text.read_text() * (5_000_000 // text.stat().st_size))
    assert len(corpus_files.split_evenly(corpus_files.find_files([small / "texts"], [".txt"]))) >= 4
    tasks, join = submit_tokenizing(small, out, hold="")
    subprocess.run(["scancel", f"{tasks}_1"], check=True)
    subprocess.run(["scontrol", "release", tasks], check=True)
    wait_for(lambda: not subprocess.run(["squeue", "-h", "-j", join], capture_output=True, text=True).stdout)
    assert not out.exists()
    finished = {path.name for path in tmp_path.glob(".out.partial/shard_*.json")}
    assert finished
    assert "shard_00001.json" not in finished
    _, join = submit_tokenizing(small, out)
    wait_for(out.exists)
    nodes = subprocess.run(["scontrol", "show", "job", "--oneliner"], check=True, capture_output=True, text=True).stdout
    assert len(set(re.findall(rf"ArrayJobId={tasks} .* NodeList=(\S+)", nodes))) > 1
    tokenize([str(small / "texts")], str(small / "tokenizer"), str(plain), extensions=[".txt"])
    assert {path.name: path.read_bytes() for path in out.glob("[!.]*")} == {
        path.name: path.read_bytes() for path in plain.iterdir()
    }
