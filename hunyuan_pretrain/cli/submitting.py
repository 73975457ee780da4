"""The command that hands a run to a cluster."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hunyuan_pretrain.cli.options import ConfigPath, Overrides

if TYPE_CHECKING:
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.jobs.request import Request


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes of the job; default: 1, or the hosts of --ssh.")
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option("--gpus-per-node", min=1, help="Ranks of a node; default: parallel.world_size / nodes."),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Run on this machine, in the foreground.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit to Slurm.")] = False,
    ssh: Annotated[
        str, typer.Option(metavar="HOST,HOST|FILE", help="Run on these hosts, reached by ssh with a key; waits.")
    ] = "",
    kubernetes: Annotated[
        str, typer.Option(metavar="pytorchjob|jobset", help="Write a manifest of this kind, and create it.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and write everything, start nothing.")] = False,
    time: Annotated[str, typer.Option(help="Slurm: time limit, such as 24:00:00.")] = "",
    partition: Annotated[str, typer.Option(help="Slurm: partition.")] = "",
    account: Annotated[str, typer.Option(help="Slurm: account.")] = "",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="Slurm: any option of sbatch; may be repeated.")
    ] = None,
    chain: Annotated[
        int, typer.Option(min=1, help="Slurm: jobs that follow each other, for a run beyond the time limit.")
    ] = 1,
    requeue: Annotated[
        bool, typer.Option("--requeue", help="Slurm: a job stopped at its time limit, or by a lost node, runs again.")
    ] = False,
    image: Annotated[str, typer.Option(help="Container image with this project (Slurm, Kubernetes).")] = "",
    container_runtime: Annotated[str, typer.Option(help="Slurm: pyxis (default) or apptainer.")] = "",
    mount: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH|CLAIM=PATH", help="Folder for the container, or a Kubernetes claim; repeatable."),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="GPUs of the nodes: refuse a job whose memory does not fit, and give it time to save.",
        ),
    ] = "",
    accept_memory: Annotated[
        bool, typer.Option("--accept-memory", help="Submit although the plan says that the memory does not fit.")
    ] = False,
    doctor: Annotated[
        bool, typer.Option("--doctor", help="Run `doctor --cluster` on the ranks of the job instead of training.")
    ] = False,
    accept_changes: Annotated[list[str] | None, typer.Option(metavar="KEY[,KEY]...", help="As in `train`.")] = None,
    from_step: Annotated[int | None, typer.Option(min=1, help="As in `train`.")] = None,
) -> None:
    """Check a run against its machines, record it in RUN_DIR/jobs/NNN, and start or submit it.

    The folder holds the resolved experiment, commit and local changes, package versions, and the job script. Exit code
    2: nothing was started.
    """
    from hunyuan_pretrain.config.errors import ConfigError, Problem
    from hunyuan_pretrain.jobs import job_folder, request
    from hunyuan_pretrain.jobs import ssh as by_ssh

    chosen = [name for name, value in zip(request.PLACES, (local, slurm, ssh, kubernetes), strict=True) if value]
    if len(chosen) != 1:
        rule = "choose where the job runs" if not chosen else "choose one place"
        names = ", ".join(f"--{name}" for name in request.PLACES)
        raise ConfigError(
            "submit", [Problem(" ".join(f"--{name}" for name in chosen) or "PLACE", Problem.NO_VALUE, rule, names)]
        )
    train_options = [f"--accept-changes={keys}" for keys in accept_changes or []]
    train_options += [f"--from-step={from_step}"] if from_step else []
    hosts = by_ssh.hosts_of(ssh) if ssh else ()
    count = nodes or len(hosts) or 1
    asked = request.Request(
        config,
        tuple(overrides or ()),
        chosen[0],
        count,
        request.ranks_per_node(config, overrides or [], count, gpus_per_node),
        train_options=tuple(train_options),
        is_doctor=doctor,
        hosts=hosts,
        time=time,
        partition=partition,
        account=account,
        options=tuple(option or ()),
        chain=chain,
        requeue=requeue,
        image=image,
        runtime=container_runtime,
        mounts=tuple(mount or ()),
    )
    experiment = request.check(asked)
    asked = _compared_with_the_plan(asked, experiment, hardware, accept_memory)
    if not doctor and from_step is None:
        _refuse_another_run(experiment, accept_changes or [])
    folder = job_folder.next_folder(Path(experiment.run_dir))
    files = _files(asked, experiment, folder, kubernetes)
    if not dry_run:
        check_available(asked.place)
    job_folder.write(folder, asked, experiment, files)
    print(f"{folder}: {asked.nodes} nodes x {asked.ranks_per_node} ranks", flush=True)
    if dry_run:
        print("nothing was started (--dry-run)")
        return
    try:
        status = _start(asked, folder)
    except ConfigError:  # nothing has begun
        shutil.rmtree(folder)
        raise
    raise typer.Exit(status)


COMMANDS = {"slurm": "sbatch", "ssh": "ssh", "kubernetes": "kubectl"}
"""What hands a job over."""


def check_available(place: str) -> None:
    """Raise ConfigError if the command that hands the job over is not there."""
    from hunyuan_pretrain.config.errors import ConfigError, Problem

    command = COMMANDS.get(place)
    if command and shutil.which(command) is None:
        rule = f"{command} is not on PATH, so this machine cannot start the job"
        hint = "go to a machine that has it, or write everything with --dry-run"
        raise ConfigError("submit", [Problem(f"--{place}", Problem.NO_VALUE, rule, hint)])


def _files(asked: Request, experiment: Experiment, folder: Path, kind: str) -> dict[str, str]:
    from hunyuan_pretrain.jobs import kubernetes, slurm

    if asked.place == "slurm":
        return {slurm.SCRIPT: slurm.script(asked, experiment, folder)}
    if asked.place == "kubernetes":
        return {kubernetes.MANIFEST: kubernetes.manifest(asked, experiment, kind, folder.name)}
    return {}


def _start(asked: Request, folder: Path) -> int:
    """Start the job, or hand it over; returns the exit status."""
    from hunyuan_pretrain.jobs import job_folder, kubernetes, slurm, ssh

    if asked.place == "slurm":
        jobs = slurm.submit(asked, folder)
    elif asked.place == "kubernetes":
        jobs = kubernetes.submit(folder)
    elif asked.place == "ssh":
        return ssh.run(asked, folder)
    else:
        command = [asked.python, "-m", "launch.node", str(folder / job_folder.EXPERIMENT), *asked.train_options]
        environment = os.environ | {"NNODES": "1", **asked.variables}
        sys.stdout.flush()
        os.execve(asked.python, command, environment)  # signals reach the launcher itself
    print(f"submitted: {', '.join(jobs)}")
    return 0


def _compared_with_the_plan(asked: Request, experiment: Experiment, hardware: str, accept_memory: bool) -> Request:
    """The request with its grace period. Raises ConfigError if the memory does not fit."""
    from hunyuan_pretrain.jobs import grace

    stop_s = None
    if hardware:
        stop_s = _refuse_what_does_not_fit(experiment, asked.ranks, hardware, accept_memory)
    elif experiment.runtime.device != "cpu" and asked.place != "local":
        beside = ", nor the time of a save with the grace period" if asked.place in grace.SHORTEST_S else ""
        print(f"note: without --hardware, memory is not compared with the nodes' GPUs{beside}", file=sys.stderr)
    grace_s, told = grace.settle(asked, stop_s)
    if told:
        print(told, file=sys.stderr)
    return replace(asked, grace_s=grace_s)


def _refuse_what_does_not_fit(experiment: Experiment, ranks: int, hardware: str, is_accepted: bool) -> float:
    """Returns how long the job takes to stop, in seconds, as planned."""
    from hunyuan_pretrain.config.errors import ConfigError, Problem
    from hunyuan_pretrain.plan import costs
    from hunyuan_pretrain.plan.hardware import load

    planned = costs.costs(experiment, ranks, load(hardware))
    found = costs.problems(planned)
    if is_accepted:
        for line in found:
            print(f"warning: {line} (--accept-memory)", file=sys.stderr)
    elif found:
        hint = "see `hunyuan-pretrain plan --search`, or pass --accept-memory"
        raise ConfigError(experiment.name, [Problem("--hardware", hardware, line, hint) for line in found])
    return max(stage.beside.stop_s for stage in planned.stages if stage.beside is not None)


def _refuse_another_run(experiment: Experiment, accept_changes: list[str]) -> None:
    from hunyuan_pretrain.jobs import job_folder, run_directory

    accepted = [key.strip() for keys in accept_changes for key in keys.split(",") if key.strip()]
    run_directory.refuse_another_run(experiment, accepted)
    before, now = run_directory.commit_so_far(Path(experiment.run_dir)), job_folder.commit()
    if before and now and before.rstrip("+") != now:
        print(f"note: the run so far used commit {before[:12]}, this job uses {now[:12]}", file=sys.stderr)
