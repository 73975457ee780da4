"""Jobs are checked before anything is written, and what is handed over is what was asked for."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hunyuan_pretrain.cli.program import app
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.history import Segment, write_history
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import change_paths
from hunyuan_pretrain.jobs import kubernetes, ssh
from hunyuan_pretrain.jobs.grace import needed_s
from hunyuan_pretrain.plan.costs import costs
from hunyuan_pretrain.plan.hardware import PROFILES, load
from launch import slurm as in_job
from launch.node import MistakeError, program_of

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "configs/dev/demo_cpu.yaml"
LARGE = ROOT / "configs/pretrain/hunyuan_large_h100x512.yaml"


def submit(run_dir: Path, *options: str, config: Path = DEMO) -> tuple[int, str]:
    """(status, output or the error's message)"""
    done = CliRunner().invoke(app, ["submit", str(config), f"run_dir={run_dir}", *options])
    if isinstance(done.exception, ConfigError):
        return 2, str(done.exception)
    return done.exit_code, done.output


def folder_of(run_dir: Path) -> Path:
    (folder,) = (run_dir / "jobs").iterdir()
    return folder


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a program on PATH that records its arguments and runs a few lines of shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, shell: str) -> Path:
        calls = tmp_path / f"{name}.calls"
        text = f'#!/usr/bin/env bash\nprintf "%s\\n" "$(printf " %q" "$@")" >> {calls}\n{shell}\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
        return calls

    return make


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "PLACE: choose where the job runs (--local, --slurm, --ssh, --kubernetes)"),
        (["--local", "--slurm"], "--local --slurm: choose one place"),
        (["--slurm", "--nodes", "3"], "parallel.world_size=2: does not say how many ranks each of 3 nodes has"),
        (["--slurm", "--gpus-per-node", "3"], "the job has 3 ranks"),
        (["--local", "--time", "3"], "--time: has no effect with --local (only with --slurm)"),
        (["--local", "--nodes", "2"], "--nodes=2: this machine is one node (use --slurm or --ssh)"),
        (["--slurm", "--time", "tomorrow"], "--time=tomorrow: is no time limit"),
        (["--slurm", "--option", "--mem=0"], "--option=--mem=0: is no option of sbatch"),
        (["--slurm", "--option", "comment=a\n#SBATCH --uid=0"], "is no option of sbatch"),
        (["--slurm", "--partition", "a b"], "contains a space"),
        (["--slurm", "--mount", "/data"], "--mount: has no effect without --image"),
        (["--slurm", "--image", "x.sif", "--container-runtime", "docker"], "docker: is unknown (pyxis or apptainer)"),
        (["--ssh", "a,b", "--nodes", "1"], "--ssh=a,b: 2 hosts for 1 nodes (--nodes 2)"),
        (["--ssh", "a,-oProxyCommand=x"], "--ssh=-oProxyCommand=x: is no host"),
        (["--ssh", "./none"], "--ssh=./none: cannot be read"),
        (["--kubernetes", "cron", "--image", "x"], "--kubernetes=cron: is unknown (pytorchjob or jobset)"),
        (["--kubernetes", "jobset"], "--image: a pod needs an image"),
        (["--kubernetes", "jobset", "--image", "x", "--mount", "/data"], "--mount=/data: is no volume of Kubernetes"),
        (["--kubernetes", "jobset", "--image", "x", "--mount", "a=/data"], "tokenizer"),
        (["--local", "--container-runtime", "apptainer"], "--container-runtime: has no effect with --local"),
        (["--slurm", "--container-runtime", "apptainer"], "--container-runtime: has no effect without --image"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(tmp_path: Path, options: list[str], message: str) -> None:
    status, output = submit(tmp_path / "run", *options)
    assert status == 2
    assert message in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "command"),
    [(["--slurm"], "sbatch"), (["--ssh", "localhost"], "ssh"), (["--kubernetes", "jobset", "--image", "x"], "kubectl")],
)
def test_a_machine_that_cannot_hand_jobs_over_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], command: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = DEMO
    if command == "kubectl":
        config = on_volumes(tmp_path)
        options = [*options, "--nodes", "64", "--mount", "data=/data", "--mount", f"here={tmp_path}"]
    status, output = submit(tmp_path / "run", *options, config=config)
    assert (status, f"{command} is not on PATH" in output) == (2, True)
    assert not (tmp_path / "run").exists()
    assert submit(tmp_path / "run", *options, "--dry-run", config=config)[0] == 0


def test_a_job_that_does_not_fit_the_hardware_is_refused(tmp_path: Path) -> None:
    options = ["--slurm", "--nodes", "64", "--dry-run"]
    assert submit(tmp_path / "run", *options, "--hardware", "H100-80GB", config=LARGE)[0] == 0
    layout = ["parallel.pipeline_model_parallel_size=1", "parallel.expert_model_parallel_size=1"]
    status, output = submit(tmp_path / "other", *layout, *options, "--hardware", "H100-80GB", config=LARGE)
    assert status == 2
    assert "GiB more than H100-80GB has" in output
    assert not (tmp_path / "other").exists()

    options += ["--hardware", "H100-80GB", "--accept-memory"]
    assert submit(tmp_path / "other", *layout, *options, config=LARGE)[0] == 0


def test_a_job_is_given_the_time_that_the_plan_needs_to_save(tmp_path: Path) -> None:
    slow = tmp_path / "slow.yaml"
    slow.write_text(f"base: {PROFILES}/H100-80GB.yaml\nstorage_bytes_per_s: 1e8\n")
    options = ["--slurm", "--nodes", "64", "--dry-run", "--hardware", str(slow)]
    status, output = submit(tmp_path / "run", *options, config=LARGE)
    planned = costs(load_experiment(LARGE), 512, load(slow)).stages[0].beside
    assert planned is not None
    seconds = needed_s(planned.stop_s)
    assert (status, f"the job gets {seconds} s to stop, instead of 300 s" in output) == (0, True), output
    assert f"#SBATCH --signal=TERM@{seconds}" in (folder_of(tmp_path / "run") / "job.sbatch").read_text().splitlines()
    status, output = submit(tmp_path / "other", *options, "--option", "signal=TERM@300", config=LARGE)
    assert (
        status,
        f"warning: --option signal=TERM@300: by the plan, stopping and saving take up to "
        f"{planned.stop_s:.0f} s" in output,
    ) == (0, True), output
    assert "#SBATCH --signal=TERM@300" in (folder_of(tmp_path / "other") / "job.sbatch").read_text().splitlines()


def test_the_run_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    """A checkpoint of 5 steps is there, with the history of the run."""
    run_dir = tmp_path / "run"
    before = load_experiment(DEMO, [f"run_dir={run_dir}"])
    segment = Segment(first_step=0, experiment=before.model_dump(mode="json"), versions={"commit": "f" * 40})
    (run_dir / "checkpoints/step_0000005").mkdir(parents=True)
    (run_dir / "checkpoints/step_0000005/complete.json").write_text("{}")
    write_history(run_dir, [segment])
    status, output = submit(run_dir, "--slurm", "--dry-run")
    assert (status, "note: the run so far used commit ffffffffffff, this job uses " in output) == (0, True)
    for change, path in (("seed=99", "seed"), ("model.num_layers=2", "model.num_layers")):
        status, output = submit(run_dir, change, "--slurm", "--dry-run")
        assert (status, f"  {path}=" in output) == (2, True)
        assert f"the run in {run_dir} has" in output
        assert "choose another run_dir, or pass --accept-changes" in output
    assert submit(run_dir, "seed=99", "--slurm", "--dry-run", "--accept-changes", "seed")[0] == 0
    status, output = submit(run_dir, "checkpoint.resume=false", "--slurm", "--dry-run")
    assert (status, "holds a run of 5 steps, and checkpoint.resume is false" in output) == (2, True)
    assert len(list((run_dir / "jobs").iterdir())) == 2


def test_a_job_knows_its_number_of_ranks_where_it_runs(tmp_path: Path) -> None:
    options = ["parallel.world_size=null", "--slurm", "--nodes", "2", "--gpus-per-node", "1", "--dry-run"]
    assert submit(tmp_path / "run", *options)[0] == 0
    with pytest.raises(ConfigError, match="the job has 1 ranks"):
        load_experiment(folder_of(tmp_path / "run") / "experiment.yaml", [], 1)


def test_the_doctor_runs_where_training_would(tmp_path: Path) -> None:
    assert submit(tmp_path / "run", "--slurm", "--doctor", "--dry-run")[0] == 0
    assert "export HUNYUAN_PROGRAM=doctor" in (folder_of(tmp_path / "run") / "job.sbatch").read_text().splitlines()
    doctor = program_of(["x.yaml", "seed=1"], {"HUNYUAN_PROGRAM": "doctor"})
    assert doctor == ["doctor", "x.yaml", "seed=1", "--cluster"]
    assert program_of(["x.yaml"], {}) == ["train", "x.yaml"]
    with pytest.raises(MistakeError, match="HUNYUAN_PROGRAM=x: must be train or doctor"):
        program_of(["x.yaml"], {"HUNYUAN_PROGRAM": "x"})
    status, output = submit(tmp_path / "run", "--slurm", "--doctor", "--requeue", "--dry-run")
    assert (status, "--doctor: starts no training" in output) == (2, True)


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_the_job_consists_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    secret = secrets.token_hex()
    monkeypatch.setenv("WANDB_API_KEY", secret)
    status, output = submit(tmp_path / "run", "optimizer.lr=3e-4", "--slurm", "--dry-run")
    assert status == 0, output
    folder = folder_of(tmp_path / "run")
    assert folder.name == "001"
    written = load_experiment(folder / "experiment.yaml")
    assert written == load_experiment(DEMO, ["optimizer.lr=3e-4", f"run_dir={tmp_path / 'run'}"])
    about = json.loads((folder / "job.json").read_text())
    assert about["overrides"] == [f"run_dir={tmp_path / 'run'}", "optimizer.lr=3e-4"]
    assert (about["nodes"], about["ranks_per_node"]) == (1, 2)
    assert about["variables"]["NCCL_DEBUG"] == "WARN"
    assert "torch==" in (folder / "packages.txt").read_text()
    assert not any(secret in file.read_text() for file in folder.iterdir())
    assert not (folder / "submitted.json").exists()
    submit(tmp_path / "run", "--slurm", "--dry-run")
    assert sorted(path.name for path in (tmp_path / "run/jobs").iterdir()) == ["001", "002"]


def test_a_batch_script_says_everything_once(tmp_path: Path) -> None:
    options = ["--nodes", "64", "--time", "24:00:00", "--partition", "h100", "--account", "lab", "--requeue"]
    options += ["--option", "signal=TERM@900", "--option", "exclusive", "--from-step", "500"]
    assert submit(tmp_path / "run dir", "--slurm", *options, "--dry-run", config=LARGE)[0] == 0
    path = folder_of(tmp_path / "run dir") / "job.sbatch"
    assert path.stat().st_mode & stat.S_IXUSR
    lines = path.read_text().splitlines()
    told = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert len(told) == sum(line.startswith("#SBATCH") for line in lines)
    assert (told["nodes"], told["gpus-per-node"]) == ("64", "8")
    assert (told["time"], told["partition"], told["account"]) == ("24:00:00", "h100", "lab")
    assert (told["signal"], told["exclusive"]) == ("TERM@900", "")
    assert "requeue" in told
    assert "export HUNYUAN_REQUEUE=1" in lines
    assert "export NPROC_PER_NODE=8" in lines
    start = shlex.split(lines[-1])
    assert start[2:4] == ["-m", "launch.slurm"]
    assert Path(start[4]) == ROOT / "launch/train.sh"
    assert Path(start[5]) == path.parent / "experiment.yaml"
    assert start[6:] == ["--from-step=500"]
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_ranks_run_in_a_container(tmp_path: Path, runtime: str) -> None:
    """The variables of the script, as launch.slurm reads them."""
    options = ["--image", "hunyuan.sif", "--container-runtime", runtime, "--mount", str(tmp_path)]
    assert submit(tmp_path / "run", "--slurm", *options, "--dry-run")[0] == 0
    script = (folder_of(tmp_path / "run") / "job.sbatch").read_text()
    exported = dict(
        shlex.split(line)[1].split("=", 1) for line in script.splitlines() if line.startswith("export HUNYUAN")
    )
    srun, command = in_job.container_options(exported), in_job.node_command("launch/train.sh", exported)
    assert command[-3:] == ["python3", "-m", "launch.node"]
    if runtime == "pyxis":
        assert srun[0] == "--container-image=hunyuan.sif"
        assert f"{tmp_path}:{tmp_path}" in srun[-1]
        assert len(command) == 3
    else:
        assert srun == []
        assert command[:3] == ["apptainer", "exec", "--nv"]
        assert command[command.index(str(tmp_path)) - 1] == "--bind"
        assert command[-4] == "hunyuan.sif"
    assert in_job.node_command("launch/train.sh", {}) == ["launch/train.sh"]
    assert in_job.container_options({}) == []


# --- Slurm ------------------------------------------------------------------------------------------------------------


def test_a_chain_is_submitted_whole_or_not_at_all(tmp_path: Path, stand_in: Any) -> None:
    cancelled = stand_in("scancel", "")
    sbatch = stand_in(
        "sbatch",
        "[[ $* == *afterany:2* ]] && { echo 'sbatch: error: limit' >&2; exit 1; }\n"
        f"[[ $1 == --test-only ]] || wc -l < {tmp_path}/sbatch.calls | awk '{{print $1 - 1}}'",
    )
    status, output = submit(tmp_path / "run", "--slurm", "--chain", "2")
    assert (status, "submitted: 1, 2" in output.splitlines()) == (0, True)
    assert json.loads((folder_of(tmp_path / "run") / "submitted.json").read_text())["jobs"] == ["1", "2"]
    assert "--dependency=afterany:1" in sbatch.read_text()
    sbatch.unlink()
    status, output = submit(tmp_path / "other", "--slurm", "--chain", "3")
    assert (status, "Slurm refuses the job: limit" in output) == (2, True)
    assert cancelled.read_text().split() == ["1", "2"]
    assert not list((tmp_path / "other/jobs").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_submit_that_is_killed_leaves_no_job_without_a_record(
    tmp_path: Path, stand_in: Any, number: signal.Signals
) -> None:
    """The signal comes while Slurm takes the second job of three."""
    stand_in("scancel", "")
    stand_in(
        "sbatch",
        f"[[ $1 == --test-only ]] && exit; [[ $* == *afterany:2* ]] && kill -{number.value} $PPID\n"
        f"sleep 0.3; wc -l < {tmp_path}/sbatch.calls",
    )
    command = [sys.executable, "-m", "hunyuan_pretrain", "submit", str(DEMO), f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run([*command, "--slurm", "--chain", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (-signal.SIGTERM if number == signal.SIGTERM else 130), done.stderr
    folder = folder_of(tmp_path / "run")
    assert json.loads((folder / "submitted.json").read_text())["jobs"] == ["2", "3"]
    script = (folder / "job.sbatch").read_text()
    (line,) = [line for line in script.splitlines() if "starts.txt" in line]
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]", "PATH": os.environ["PATH"]}
    subprocess.run(["bash", "-euc", line], env=environment, check=True)
    assert (folder / "starts.txt").read_text().endswith(" job 7 restart 0 on n[0-1]\n"), "a job records itself too"


# --- ssh --------------------------------------------------------------------------------------------------------------


def test_each_host_runs_its_node(tmp_path: Path, stand_in: Any) -> None:
    """The stand-in does with its last argument what sshd does: gives it to a shell. The interpreter writes down how it
    was started."""
    python = tmp_path / "bin" / "python"
    calls = stand_in("ssh", 'exec bash -c "${@: -1}"')
    said = 'echo "$NODE_RANK/$NNODES $MASTER_ADDR $MASTER_PORT $NPROC_PER_NODE $*"'
    python.write_text(f'#!/bin/bash\n[[ $1 == -c ]] && exec {sys.executable} -c "$2"\n{said}\n')
    python.chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text("# the first one is where ranks meet\nme@a\n\nb # second\n")
    assert ssh.hosts_of(str(hosts)) == ("me@a", "b") == ssh.hosts_of("me@a,b")
    from hunyuan_pretrain.jobs.request import Request

    folder = tmp_path / "run" / "jobs" / "001"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text("")
    request = Request(DEMO, (), "ssh", 2, 4, hosts=("me@a", "b"), python=str(python))
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # by another test
            taken.bind(("", ssh.PORT))
            taken.listen()
        assert ssh.run(request, folder) == 0
    ports = set()
    for node in range(2):
        where, master, port, ranks, *command = (folder / f"node_{node}.log").read_text().split()
        assert (where, master, ranks) == (f"{node}/2", "a", "4")
        assert command == ["-m", "launch.node", f"{folder}/experiment.yaml"]
        ports.add(int(port))
    (port,) = ports
    assert ssh.PORT < port < ssh.PORT + ssh.PORTS, "the first one is taken"
    assert "BatchMode=yes" in calls.read_text()
    assert json.loads((folder / "submitted.json").read_text())["jobs"] == ["me@a: node_0.pid", "b: node_1.pid"]


def test_a_host_that_does_not_answer_or_share_the_folder_is_named(tmp_path: Path, stand_in: Any) -> None:
    stand_in("ssh", '[[ "$*" == *" a "* ]] && { echo "Permission denied (publickey)." >&2; exit 255; }; exit 90')
    status, output = submit(tmp_path / "run", "--ssh", "a,b")
    assert status == 2
    assert "--ssh=a: cannot be reached with a key: Permission denied (publickey)." in output
    assert "--ssh=b: does not see" in output
    assert not list((tmp_path / "run/jobs").iterdir())


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ('echo "clock $(($(date +%s) - 3600))"; echo port 29500', "--ssh=a: its clock is off by 360"),
        ('echo "clock $(date +%s)"; echo port 0', "--ssh=a: no port from 29500 to 29599 is free there"),
    ],
)
def test_a_host_with_a_wrong_clock_or_without_a_port_is_named(
    tmp_path: Path, stand_in: Any, answers: str, message: str
) -> None:
    stand_in("ssh", f'[[ "$*" == *" a "* ]] && {{ {answers}; exit; }}; echo "clock $(date +%s)"; echo port 29500')
    status, output = submit(tmp_path / "run", "--ssh", "a,b")
    assert (status, output.count("--ssh=")) == (2, 1)
    assert message in output
    assert not list((tmp_path / "run/jobs").iterdir())


@pytest.mark.parametrize(
    ("statuses", "expected"), [([0, 0], 0), ([75, 75], 75), ([0, 75], 75), ([2, 1], 2), ([0, 255], 1), ([-9, 75], 1)]
)
def test_the_status_of_a_job_on_hosts(statuses: list[int], expected: int) -> None:
    assert ssh.report(dict(zip(("a", "b"), statuses, strict=True))) == expected


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def on_volumes(folder: Path) -> Path:
    """The recipe with every path on a volume that is mounted at /data."""
    fields = change_paths(Experiment, load_experiment(LARGE).model_dump(mode="json"), lambda path: f"/data/{path}")
    config = folder / "large.yaml"
    config.write_text(yaml.safe_dump(fields))
    return config


@pytest.mark.parametrize("kind", kubernetes.KINDS)
def test_a_manifest_starts_the_nodes_of_one_world(tmp_path: Path, kind: str, stand_in: Any) -> None:
    stand_in("python3", "echo $NODE_RANK/$NNODES $MASTER_ADDR $NPROC_PER_NODE")
    config = on_volumes(tmp_path)
    options = ["--kubernetes", kind, "--nodes", "64", "--image", "registry/hunyuan:1", "--mount", "data=/data"]
    options += ["--mount", f"scratch={tmp_path}"]
    assert submit(tmp_path / "run", *options, "--dry-run", config=config)[0] == 0
    held, job = yaml.safe_load_all((folder_of(tmp_path / "run") / "job.yaml").read_text())
    again = tmp_path / "again.yaml"
    again.write_text(held["data"]["experiment.yaml"])
    assert load_experiment(again) == load_experiment(config, [f"run_dir={tmp_path / 'run'}"])
    assert held["metadata"]["name"] == f"{job['metadata']['name']}-experiment"
    if kind == "pytorchjob":
        replicas = job["spec"]["pytorchReplicaSpecs"]
        assert {name: one["replicas"] for name, one in replicas.items()} == {"Master": 1, "Worker": 63}
        pods = [one["template"]["spec"] for one in replicas.values()]
    else:
        (group,) = job["spec"]["replicatedJobs"]
        assert (group["template"]["spec"]["completions"], group["template"]["spec"]["parallelism"]) == (64, 64)
        pods = [group["template"]["spec"]["template"]["spec"]]
        (rule,) = job["spec"]["failurePolicy"]["rules"]
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    for pod in pods:
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert pod["terminationGracePeriodSeconds"] >= 300
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
        assert (mounts["claim-0"], mounts["claim-1"], mounts["shm"]) == ("/data", str(tmp_path), "/dev/shm")
        given = {"RANK": "3", "JOB_COMPLETION_INDEX": "3", "MASTER_ADDR": "first"}
        given["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        said = subprocess.run(container["command"], env=given, capture_output=True, text=True).stdout.split()
        address = "first" if kind == "pytorchjob" else "hunyuan-large-h100x512-001-node-0-0.hunyuan-large-h100x512-001"
        assert said == ["3/64", address, "8"]


def test_what_kubectl_refuses_leaves_nothing(tmp_path: Path, stand_in: Any) -> None:
    calls = stand_in("kubectl", '[[ $1 == delete ]] || { echo "the second one is refused" >&2; exit 1; }')
    options = ["--kubernetes", "jobset", "--nodes", "64", "--image", "x", "--mount", "data=/data"]
    config = on_volumes(tmp_path)
    status, output = submit(tmp_path / "run", *options, "--mount", f"here={tmp_path}", config=config)
    assert (status, "kubectl refuses the job: the second one is refused" in output) == (2, True)
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["create", "delete"]
    assert not list((tmp_path / "run/jobs").iterdir())
