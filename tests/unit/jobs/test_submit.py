"""Jobs are checked before anything is written, and what is handed over is what was asked for."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hunyuan_pretrain.cli.program import app
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import change_paths
from hunyuan_pretrain.jobs import kubernetes, ssh
from launch import slurm as in_job

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


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_the_job_consists_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
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
    assert not any("secret" in file.read_text() for file in folder.iterdir())
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
    assert (status, output.splitlines()[-1]) == (0, "submitted: 1, 2")
    assert json.loads((folder_of(tmp_path / "run") / "submitted.json").read_text())["jobs"] == ["1", "2"]
    assert "--dependency=afterany:1" in sbatch.read_text()
    sbatch.unlink()
    status, output = submit(tmp_path / "other", "--slurm", "--chain", "3")
    assert (status, "Slurm refuses the job: limit" in output) == (2, True)
    assert cancelled.read_text().split() == ["1", "2"]
    assert not list((tmp_path / "other/jobs").iterdir())


# --- ssh --------------------------------------------------------------------------------------------------------------


def test_each_host_runs_its_node(tmp_path: Path, stand_in: Any) -> None:
    """The stand-in does with its last argument what sshd does: gives it to a shell. The interpreter writes down how it
    was started."""
    python = tmp_path / "bin" / "python"
    calls = stand_in("ssh", 'exec bash -c "${@: -1}"')
    python.write_text('#!/bin/bash\n[[ $1 == -c ]] || echo "$NODE_RANK/$NNODES $MASTER_ADDR $NPROC_PER_NODE $*"\n')
    python.chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text("# the first one is where ranks meet\nme@a\n\nb # second\n")
    assert ssh.hosts_of(str(hosts)) == ("me@a", "b") == ssh.hosts_of("me@a,b")
    from hunyuan_pretrain.jobs.request import Request

    folder = tmp_path / "run" / "jobs" / "001"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text("")
    request = Request(DEMO, (), "ssh", 2, 4, hosts=("me@a", "b"), python=str(python))
    assert ssh.run(request, folder) == 0
    for node in range(2):
        said = (folder / f"node_{node}.log").read_text()
        assert said == f"{node}/2 a 4 -m launch.node {folder}/experiment.yaml\n"
    assert "BatchMode=yes" in calls.read_text()


def test_a_host_that_does_not_answer_or_share_the_folder_is_named(tmp_path: Path, stand_in: Any) -> None:
    stand_in("ssh", '[[ "$*" == *" a "* ]] && { echo "Permission denied (publickey)." >&2; exit 255; }; exit 90')
    status, output = submit(tmp_path / "run", "--ssh", "a,b")
    assert status == 2
    assert "--ssh=a: cannot be reached with a key: Permission denied (publickey)." in output
    assert "--ssh=b: does not see" in output
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
