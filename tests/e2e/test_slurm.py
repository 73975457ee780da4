"""Jobs on a Slurm cluster of two nodes, one CPU rank per node: a running one, or one that the tests start from Debian's
packages (tests/helpers/slurm_cluster.py).

Every job must be able to read and write pytest's folder: on a real cluster, pass --basetemp on a shared file system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers import slurm_cluster
from tests.helpers.runs import experiment_fields, write_experiment

ROOT = Path(__file__).parents[2]


def idle_nodes() -> int:
    if shutil.which("sinfo") is None:
        return 0
    done = subprocess.run(["sinfo", "--noheader", "--states=idle", "--format=%D"], capture_output=True, text=True)
    return sum(int(line) for line in done.stdout.split() if line.isdecimal()) if done.returncode == 0 else 0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[slurm_cluster.Cluster | None]:
    """A cluster for the commands of this module; None: one that was there already."""
    if idle_nodes() >= 2:
        yield None
        return
    if reason := slurm_cluster.obstacle():
        pytest.skip(f"no Slurm cluster with two idle nodes, and none can be started: {reason}")
    with ExitStack() as stack:
        try:
            started = stack.enter_context(slurm_cluster.cluster())
        except RuntimeError as error:
            pytest.skip(f"no Slurm cluster with two idle nodes, and Debian's does not start here: {error}")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def submit(config: Path, *options: str, status: int = 0) -> list[str]:
    """Job ids of `hunyuan-pretrain submit --slurm`, or its message if it is expected to fail."""
    command = [sys.executable, "-m", "hunyuan_pretrain", "submit", str(config), "--slurm", "--time=20"]
    command += [] if "--nodes" in options else ["--nodes", "2"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout.rpartition("submitted: ")[2].strip().split(", ") if status == 0 else [done.stderr]


def fields_of(job: str) -> dict[str, str]:
    shown = subprocess.run(
        ["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=True
    ).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def state(job: str) -> tuple[str, str]:
    """(state, exit code as status:signal) of a job."""
    return fields_of(job)["JobState"], fields_of(job)["ExitCode"]


def has_ended(job: str) -> bool:
    return state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")


def wait_for(condition: Callable[[], Any], seconds: float = 900, every_s: float = 0.2) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every_s)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of each step, the last attempt's."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted({line["step"]: line["loss"] for line in lines if "loss" in line}.items())


def steps_done(run_dir: Path) -> int:
    return len(losses(run_dir))


def output(run_dir: Path, job: str) -> str:
    return (run_dir / "jobs" / "001" / f"{job}.out").read_text()


STEPS = 60


def experiment(corpus: Path, folder: Path) -> Path:
    fields = experiment_fields(corpus, folder / "run", STEPS, parallel__world_size=2, checkpoint__save_every_steps=20)
    return write_experiment(folder / "x.yaml", fields)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """Losses of the same run on two ranks of this machine, without a scheduler."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "hunyuan_pretrain", "submit", str(experiment(corpus, folder)), "--local"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder / "run")


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The processes that train in a run directory."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "train" in command and any(str(run_dir) in word for word in command):
            found.append(process)
    return found


@contextmanager
def frozen(run_dir: Path) -> Iterator[list[psutil.Process]]:
    """The ranks of a run, stopped (SIGSTOP), so that a short run does not end before what happens to it."""
    ranks = ranks_of(run_dir)
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    try:
        yield ranks
    finally:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.resume()


def has_pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a stopped process has been sent a signal, or is gone: Slurm may also wake it (SIGCONT)."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    masks = re.findall(r"^(?:Sig|Shd)Pnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def wait_for_steps(run_dir: Path, beyond: int = 0) -> None:
    wait_for(lambda: steps_done(run_dir) > beyond + 3, every_s=0.05)


def test_a_chain_goes_on_after_a_stop_and_a_cancelled_job_and_ends_as_an_undisturbed_run(
    tmp_path: Path, corpus: Path, undisturbed: list[tuple[int, float]]
) -> None:
    run_dir = tmp_path / "run"
    jobs = submit(experiment(corpus, tmp_path), "--chain", "3")
    assert len(jobs) == 3
    wait_for_steps(run_dir)
    with frozen(run_dir) as ranks:
        subprocess.run(["scancel", "--signal=TERM", jobs[0]], check=True)
        wait_for(lambda: all(has_pending(rank, signal.SIGTERM) for rank in ranks))
    wait_for(lambda: has_ended(jobs[0]))
    assert state(jobs[0]) == ("FAILED", "75:0")
    assert "2 ranks on CPU" in (run_dir / "log.txt").read_text()
    assert "stopped after saving (status 75)" in output(run_dir, jobs[0])
    for node in range(2):
        said = (run_dir / f"slurm/{jobs[0]}.{node}.log").read_text()
        assert "the ranks were told to stop and have lost nothing" in said
    stopped_after = steps_done(run_dir)
    assert list(run_dir.glob("checkpoints/step_*/complete.json"))

    wait_for_steps(run_dir, stopped_after)
    with frozen(run_dir):
        subprocess.run(["scancel", jobs[1]], check=True)
    wait_for(lambda: has_ended(jobs[1]))
    assert state(jobs[1])[0] == "CANCELLED"
    for folder in run_dir.glob("checkpoints/step_*"):
        assert (folder / "complete.json").exists() or folder.name.endswith(".partial")

    wait_for(lambda: has_ended(jobs[2]))
    assert state(jobs[2]) == ("COMPLETED", "0:0")
    assert losses(run_dir) == undisturbed
    wait_for(lambda: not ranks_of(run_dir))
    started = (run_dir / "jobs/001/starts.txt").read_text().splitlines()
    assert [line.split()[2] for line in started] == jobs


def test_a_time_limit_and_a_lost_node_requeue_the_job_which_ends_as_an_undisturbed_run(
    tmp_path: Path, corpus: Path, undisturbed: list[tuple[int, float]], cluster: slurm_cluster.Cluster | None
) -> None:
    """Slurm's own signal: the limit is moved to less than the seconds before it at which the signal comes; Slurm looks
    every 30 seconds. Then a node's slurmd and all its tasks are killed (on a cluster that is not the tests' own, the
    tasks only)."""
    run_dir = tmp_path / "run"
    (job,) = submit(experiment(corpus, tmp_path), "--requeue", "--option=signal=TERM@200")
    wait_for_steps(run_dir)
    with frozen(run_dir) as ranks:
        hours, minutes, _ = fields_of(job)["RunTime"].split(":")
        limit = 60 * int(hours) + int(minutes) + 3  # at least two minutes are left for saving
        subprocess.run(["scontrol", "update", f"jobid={job}", f"timelimit={limit}"], check=True)
        wait_for(lambda: all(has_pending(rank, signal.SIGTERM) for rank in ranks))
    wait_for(lambda: fields_of(job)["Restarts"] == "1")
    subprocess.run(["scontrol", "update", f"jobid={job}", "timelimit=30"], check=True)
    assert "stopped after saving (status 75)" in output(run_dir, job)
    stopped_after = steps_done(run_dir)
    assert 3 < stopped_after < STEPS

    wait_for_steps(run_dir, stopped_after)
    with frozen(run_dir):
        if cluster is not None:
            cluster.kill_node("n1")
        kill_tasks_of(job, "n1", with_daemons=cluster is not None)
        if cluster is None:
            subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for(lambda: fields_of(job)["Restarts"] == "2")
    if cluster is not None:
        cluster.start_node("n1")
    wait_for(lambda: has_ended(job))
    assert state(job) == ("COMPLETED", "0:0")
    assert losses(run_dir) == undisturbed


def kill_tasks_of(job: str, node: str, with_daemons: bool) -> None:
    """SIGKILL the launcher of a node and its ranks; first their slurmstepd, which would report how they ended."""
    wanted = {"SLURM_JOB_ID": job, "SLURMD_NODENAME": node, "SLURM_STEP_ID": "0"}
    tasks = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if wanted.items() <= process.environ().items():
                tasks.append(process)
    assert len(tasks) > 1
    daemons = {parent for task in tasks for parent in task.parents() if parent.name() == "slurmstepd"}
    assert daemons
    for process in [*(daemons if with_daemons else ()), *tasks]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def test_the_doctor_compares_and_measures_both_nodes(tmp_path: Path, corpus: Path) -> None:
    (job,) = submit(experiment(corpus, tmp_path), "--doctor")
    wait_for(lambda: has_ended(job))
    said = "".join(path.read_text() for path in (tmp_path / "run/slurm").glob(f"{job}.*.log"))
    assert "2 on 2 nodes" in said
    assert "between nodes" in said
    assert "node n0 and node n1" in said
    assert "differs: " not in said


def test_what_does_not_fit_or_slurm_refuses_leaves_nothing(tmp_path: Path, corpus: Path) -> None:
    """A world that does not fit, more nodes than there are, an unknown partition; and launch/train.sbatch by hand."""
    config = experiment(corpus, tmp_path)
    (message,) = submit(config, "--gpus-per-node", "3", status=2)
    assert "the job has 6 ranks" in message
    assert not (tmp_path / "run").exists()
    (message,) = submit(config, "--partition", "none", status=2)
    assert "--slurm: Slurm refuses the job: invalid partition specified: none" in message
    (message,) = submit(config, "parallel.world_size=null", "--nodes", "4", "--gpus-per-node", "1", status=2)
    assert "--slurm: Slurm refuses the job: " in message
    assert "ode c" in message  # "Node count specification invalid", "More processors requested than permitted"
    assert not list(tmp_path.glob("run/jobs/*"))

    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["sbatch", "--parsable", "--nodes=2", "--time=10", f"--output={tmp_path}/%j.out"]
    command += ["launch/train.sbatch", str(config)]
    environment["NPROC_PER_NODE"] = "3"
    job = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    wait_for(lambda: has_ended(job))
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


def test_packing_gives_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    """Groups of several tokenized folders, packed by tasks."""
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'hunyuan-pretrain[cluster]'")
    from data_tools.packed_output import pack
    from data_tools.tokenization import tokenize

    tokens = []
    for text in sorted((corpus / "texts").glob("*.txt")):
        tokens.append(str(tmp_path / f"tokens {text.stem}"))
        tokenize([str(text)], str(corpus / "tokenizer"), tokens[-1])
    pack(tokens, 128, str(tmp_path / "plain"), group_tokens=20_000, seed=1234)
    manifest = json.loads((tmp_path / "plain/manifest.json").read_text())
    assert len(manifest["groups"]) > 2
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "data_tools.cli",
        "pack",
        *tokens,
        "--sequence-length",
        "128",
        "--output",
        str(out),
    ]
    command += [
        "--seed",
        "1234",
        "--group-tokens",
        "20000",
        "--executor",
        "slurm",
        "--tasks",
        "2",
        "--logs",
        str(tmp_path / "logs"),
    ]
    options = {"partition": default_partition(), "time": "00:10:00"}
    command += [f"--executor-option={name}={value}" for name, value in options.items()]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    wait_for(out.exists)
    assert {path.name: path.read_bytes() for path in out.glob("[!.]*")} == {
        path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()
    }
