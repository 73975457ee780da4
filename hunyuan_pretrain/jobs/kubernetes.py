"""A job for Kubernetes: a manifest for Kubeflow's training operator (PyTorchJob), or for JobSet. Rendered; no cluster
has run it.

Pods are unprivileged. Each runs launch.node, which starts the ranks of its node and meets the others at the first pod.
The experiment travels in a ConfigMap; run_dir and data are on persistent volumes that all pods mount.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import yaml

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.exit_status import EXIT_MISTAKE, EXIT_STOPPED
from hunyuan_pretrain.config.load import dump_resolved
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import change_paths
from hunyuan_pretrain.jobs.job_folder import EXPERIMENT, handed_over_whole, note_submitted
from hunyuan_pretrain.jobs.request import Request

KINDS = ("pytorchjob", "jobset")
MANIFEST = "job.yaml"
CONFIG_FOLDER = "/etc/hunyuan"
PORT = 29500
RESTARTS = 20


def manifest(request: Request, experiment: Experiment, kind: str, number: str) -> str:
    """The YAML documents. number: of the submission, in the names of all objects. Raises ConfigError for an unknown
    kind, a malformed mount, and paths that are on no mounted volume."""
    if kind not in KINDS:
        raise ConfigError("submit", [Problem("--kubernetes", kind, "is unknown", " or ".join(KINDS))])
    _refuse_unmounted(request, experiment)
    name = re.sub(r"[^a-z0-9-]+", "-", experiment.name.lower()).strip("-")[:40] or "run"
    name = f"{name}-{number}"
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-experiment"},
        "data": {EXPERIMENT: dump_resolved(experiment)},
    }
    job = (_pytorchjob if kind == "pytorchjob" else _jobset)(name, request, experiment)
    return yaml.safe_dump_all([config, job], sort_keys=False, width=140)


def _refuse_unmounted(request: Request, experiment: Experiment) -> None:
    """What a pod reads and writes outside of its volumes is lost with it, or was never there."""
    paths: dict[str, None] = {}
    change_paths(Experiment, experiment.model_dump(mode="json"), lambda path: str(paths.setdefault(path, None) or path))
    mounted = [Path(_claim(mount)[1]) for mount in request.mounts]
    outside = [path for path in paths if not any(Path(path).is_relative_to(mount) for mount in mounted)]
    if outside:
        rule = f"{', '.join(outside[:5])}: on no volume of the pods"
        hint = "absolute paths in the experiment, below a --mount CLAIM=/PATH"
        raise ConfigError("submit", [Problem("--mount", Problem.NO_VALUE, rule, hint)])


def submit(folder: Path) -> list[str]:
    """Hand the manifest to kubectl; returns what it says was made. Raises ConfigError; nothing then stays."""
    file = str(folder / MANIFEST)
    command = ["kubectl", "create", "--output=name", "--filename", file]
    with handed_over_whole():
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
        if done.returncode == 0:
            note_submitted(folder, done.stdout.split())
    if done.returncode:
        # of several objects, the first ones may have been made
        subprocess.run(["kubectl", "delete", "--ignore-not-found", "--filename", file], capture_output=True)
        said = " ".join(done.stderr.split())
        raise ConfigError("submit", [Problem("--kubernetes", Problem.NO_VALUE, f"kubectl refuses the job: {said}")])
    return done.stdout.split()


def _pytorchjob(name: str, request: Request, experiment: Experiment) -> dict[str, Any]:
    # the operator gives each pod MASTER_ADDR, and RANK: of the pod
    pod = _pod(name, request, experiment, {"NODE_RANK": "$RANK", "MASTER_ADDR": "$MASTER_ADDR"})
    replicas: dict[str, Any] = {"Master": _replica(1, pod)}
    if request.nodes > 1:
        replicas["Worker"] = _replica(request.nodes - 1, pod)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": RESTARTS}, "pytorchReplicaSpecs": replicas},
    }


def _replica(count: int, pod: dict[str, Any]) -> dict[str, Any]:
    return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}


def _jobset(name: str, request: Request, experiment: Experiment) -> dict[str, Any]:
    # an indexed job gives each pod its index, and JobSet a name in the domain of the set
    where = {"NODE_RANK": "$JOB_COMPLETION_INDEX", "MASTER_ADDR": f"{name}-node-0-0.{name}"}
    pod = _pod(name, request, experiment, where) | {"restartPolicy": "Never", "subdomain": name}
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "pytorch", "operator": "In", "values": [EXIT_MISTAKE]}},
        {"action": "Ignore", "onExitCodes": {"containerName": "pytorch", "operator": "In", "values": [EXIT_STOPPED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    spec = {
        "completionMode": "Indexed",
        "completions": request.nodes,
        "parallelism": request.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            # one pod that fails restarts all, because the ranks are one world; but a mistake stays one
            "failurePolicy": {
                "maxRestarts": RESTARTS,
                "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": spec}}],
        },
    }


def _pod(name: str, request: Request, experiment: Experiment, where: dict[str, str]) -> dict[str, Any]:
    variables = {"NNODES": str(request.nodes), **request.variables}
    if request.nodes > 1:
        variables |= where | {"MASTER_PORT": str(PORT), "RDZV_ID": name}
    settings = " ".join(f'{key}="{value}"' for key, value in variables.items())
    train = shlex.join(["python3", "-m", "launch.node", f"{CONFIG_FOLDER}/{EXPERIMENT}", *request.train_options])
    claims = [_claim(mount) for mount in request.mounts]
    volumes: list[dict[str, Any]] = [
        {"name": "experiment", "configMap": {"name": f"{name}-experiment"}},
        # NCCL and data loaders share memory between processes; the default is 64 MiB
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        *({"name": f"claim-{n}", "persistentVolumeClaim": {"claimName": claim}} for n, (claim, _) in enumerate(claims)),
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "experiment", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        *({"name": f"claim-{n}", "mountPath": path} for n, (_, path) in enumerate(claims)),
    ]
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": request.image,
        "command": ["bash", "-c", f"{settings} exec {train}"],
        "ports": [{"name": "pytorchjob-port", "containerPort": PORT}],
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if experiment.runtime.device != "cpu":
        container["resources"] = {"limits": {"nvidia.com/gpu": request.ranks_per_node}}
    return {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": request.grace_s}


def _claim(mount: str) -> tuple[str, str]:
    claim, _, path = mount.partition("=")
    if not (re.fullmatch("[a-z0-9][a-z0-9.-]*", claim) and path.startswith("/")):
        rule = "is no volume of Kubernetes"
        raise ConfigError("submit", [Problem("--mount", mount, rule, "CLAIM=/PATH, CLAIM a PersistentVolumeClaim")])
    return claim, path
