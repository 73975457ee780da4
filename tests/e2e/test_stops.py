"""A run that is told to stop, by SIGTERM or Ctrl-C, at any moment: what it leaves, and its exit status."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import ROOT, experiment_fields, kill_all, metrics, start, write_experiment

pytestmark = pytest.mark.slow
BEFORE_FIRST_STEP = "stopped before the first step; nothing to save: the same command starts again"


def listens(process: subprocess.Popen[str]) -> bool:
    """Whether SIGTERM no longer ends the process."""
    caught = next(
        line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt")
    )
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def stopped(process: subprocess.Popen[str], *numbers: int) -> tuple[int, str, str]:
    """Exit status, stdout and stderr after these signals."""
    try:
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.05)
        out, err = process.communicate(timeout=120)
    finally:
        kill_all(process)
    return process.returncode, out, err


def until(process: subprocess.Popen[str], condition: object) -> None:
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_stop_while_torch_is_imported_ends_with_75_and_writes_nothing(corpus, tmp_path):
    config = write_experiment(tmp_path / "x.yaml", experiment_fields(corpus, tmp_path / "run"))
    process = start("train", config)
    until(process, lambda: listens(process))
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(), "long before torch is there"
    code, out, err = stopped(process, signal.SIGTERM)
    assert (code, out) == (75, BEFORE_FIRST_STEP + "\n"), err
    assert not (tmp_path / "run").exists()


def test_a_stop_of_the_launcher_while_its_ranks_start_ends_with_75(corpus, tmp_path):
    fields = experiment_fields(corpus, tmp_path / "run", parallel={"world_size": 2})
    config = write_experiment(tmp_path / "x.yaml", fields)
    command = ["bash", "launch/train.sh", str(config)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for seconds in (0.0, 6.0):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PATH": path},
        )
        until(process, lambda process=process: listens(process))
        time.sleep(seconds)
        code, out, err = stopped(process, signal.SIGTERM)
        assert code == 75, out + err
        assert "Traceback" not in err


def test_ctrl_c_saves_and_a_second_one_ends_at_once(corpus, tmp_path):
    run_dir = tmp_path / "run"
    config = write_experiment(tmp_path / "x.yaml", experiment_fields(corpus, run_dir, 400))
    process = start("train", config)
    until(process, lambda: metrics(run_dir))
    code, out, err = stopped(process, signal.SIGINT)
    steps = metrics(run_dir)[-1]["step"]
    assert code == 75, err
    assert f"told to stop: saved after step {steps}; the same command resumes from there" in out
    assert err.strip() == "Ctrl-C: stopping after a step that is saved; Ctrl-C again ends at once, without saving"
    process = start("train", config)
    until(process, lambda: len(metrics(run_dir)) > steps)
    code, out, _ = stopped(process, signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert "told to stop" not in out


def test_ranks_are_started_again_and_none_outlives_its_launcher(corpus, tmp_path):
    """A rank is killed: its launcher starts all of them again, and they go on from the newest checkpoint. Then the
    launcher is killed, which can tell them nothing."""
    run_dir = tmp_path / "run"
    fields = experiment_fields(corpus, run_dir, 4000, parallel={"world_size": 2}, checkpoint={"save_every_steps": 2})
    config = write_experiment(tmp_path / "x.yaml", fields | {"runtime": fields["runtime"] | {"probes": False}})
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command, piped = ["bash", "launch/train.sh", str(config)], subprocess.PIPE
    variables = os.environ | {"PATH": path, "MAX_RESTARTS": "2"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=piped, stderr=piped, text=True, env=variables)
    try:
        until(process, lambda: len(metrics(run_dir)) > 4)
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)}
        ranks["1"].kill()
        until(process, lambda: (run_dir / "log.txt").read_text().count("tiny: 2 ranks on CPU") == 2)
        steps = len(metrics(run_dir))
        until(process, lambda: len(metrics(run_dir)) > steps + 2)
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)}
        process.kill()
        psutil.wait_procs([ranks["0"], ranks["1"]], timeout=10)
        assert not [one for one in ranks.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    finally:
        kill_all(process)
    assert "resumes from" in (run_dir / "log.txt").read_text()
    assert "launch/train.sh: starts the ranks again (1 of at most 2)\n" in process.communicate()[1]


def test_plain_torchrun_starts_ranks_again(corpus, tmp_path):
    """torchrun keeps its store over all starts, with the addresses of the ranks of the first."""
    run_dir = tmp_path / "run"
    fields = experiment_fields(corpus, run_dir, 12, parallel={"world_size": 2}, checkpoint={"save_every_steps": 3})
    config = write_experiment(tmp_path / "x.yaml", fields | {"runtime": fields["runtime"] | {"probes": False}})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "-m", "hunyuan_pretrain", "train", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(process, lambda: (run_dir / "checkpoints" / "step_0000003").exists())
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)}
        ranks["1"].kill()
        said, _ = process.communicate(timeout=120)
    finally:
        kill_all(process)
    assert process.returncode == 0, said
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 13))
    assert "resumes from" in (run_dir / "log.txt").read_text()


def test_when_a_rank_is_killed_the_others_exit_with_one_line_each(corpus, tmp_path):
    run_dir = tmp_path / "run"
    fields = experiment_fields(corpus, run_dir, 4000, parallel={"world_size": 2}, checkpoint={"save_every_steps": 2})
    config = write_experiment(tmp_path / "x.yaml", fields)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command, piped = ["bash", "launch/train.sh", str(config)], subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=piped, stderr=piped, text=True, env=os.environ | {"PATH": path}
    )
    until(process, lambda: len(metrics(run_dir)) > 4)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)}
    ranks["1"].kill()
    code, _, err = stopped(process)
    assert code == 1
    lines = err.strip().splitlines()
    assert re.fullmatch(
        r"rank 0 of 2 ends: another rank has ended \(\w+, \w+\.py:\d+, got no answer from it\); the same command "
        r"resumes from the newest checkpoint",
        lines[0],
    ), err
    assert lines[1].startswith("  rank 1 does not answer: it is stopped or has ended"), err
    assert lines[-2:] == [
        "launch/train.sh: rank 0 exited with status 1; see its output above",
        "launch/train.sh: rank 1 was killed by SIGKILL (out of memory?)",
    ]
