"""A job on a list of hosts that this one reaches by ssh with a key, on a file system that all of them share."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE
from types import FrameType

from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.exit_status import COMMAND, EXIT_DONE, EXIT_MISTAKE, EXIT_STOPPED
from hunyuan_pretrain.jobs.job_folder import EXPERIMENT, note_submitted
from hunyuan_pretrain.jobs.request import Request

SSH = (
    "ssh",
    "-o",
    "BatchMode=yes",  # keys only: never asks for a password
    "-o",
    "StrictHostKeyChecking=yes",
    "-o",
    "ConnectTimeout=15",
    "-o",
    "ServerAliveInterval=30",
)
PORT, PORTS = 29500, 100
"""The first port that is tried on the first host, and how many are."""
MOST_CLOCK_SKEW_S = 10.0
"""As between ranks (train/same_start.py)."""
LOOK = f"""
import socket, time
def is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port)); probe.listen()
        except OSError:
            return False
    return True
print("clock", time.time())
print("port", next(filter(is_free, range({PORT}, {PORT + PORTS})), 0))
"""
"""What each host is asked: its time, and a port on which it can meet the others."""


def hosts_of(text: str) -> tuple[str, ...]:
    """Hosts from `a,b` or from a file with one in each line; empty lines and comments are skipped. Raises
    ConfigError."""
    path = Path(text)
    if "," in text or not (path.is_file() or "/" in text):
        return tuple(host for host in text.split(",") if host)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("submit", [Problem("--ssh", text, f"cannot be read: {error}")]) from None
    return tuple(host for line in lines if (host := line.partition("#")[0].strip()))


def node_command(request: Request, folder: Path, node: int, job: str, port: int = PORT) -> str:
    """What a host runs, in a shell. It leaves its process id in the folder, so that a stop can reach it."""
    variables = {
        "NNODES": str(request.nodes),
        **request.variables,
        "NODE_RANK": str(node),
        "HUNYUAN_PYTHON": request.python,
        COMMAND: shlex.join(["hunyuan-pretrain", *sys.argv[1:]]),
    }
    if request.nodes > 1:
        master = request.hosts[0].rpartition("@")[2]
        variables |= {"MASTER_ADDR": master, "MASTER_PORT": str(port), "RDZV_ID": job}
    settings = [f"{name}={value}" for name, value in variables.items()]
    train = ["env", *settings, request.python, "-m", "launch.node", str((folder / EXPERIMENT).resolve())]
    pid = shlex.quote(str(pid_file(folder, node)))
    return f"cd {shlex.quote(os.getcwd())} && echo $$ > {pid} && exec {shlex.join([*train, *request.train_options])}"


def pid_file(folder: Path, node: int) -> Path:
    """Where a node's launcher leaves its process id."""
    return folder.resolve() / f"node_{node}.pid"


def run(request: Request, folder: Path) -> int:
    """Run the job and wait for it; the output of each node is in FOLDER/node_N.log. Ctrl-C and SIGTERM stop it: the
    ranks save. Returns 0, 75 if it was stopped, 2 after a user's mistake, else 1. Raises ConfigError: a host that
    cannot be reached, does not see the folder, or has no such interpreter."""
    port = _check_hosts(request, folder)
    job, nodes = secrets.token_hex(6), []
    for node, host in enumerate(request.hosts):
        with (folder / f"node_{node}.log").open("ab") as log:
            command = [*SSH, host, node_command(request, folder, node, job, port)]
            # a session of its own: a Ctrl-C would end ssh, not the ranks
            nodes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            )
        print(f"node {node}: {host}, log in {folder}/node_{node}.log", flush=True)
    note_submitted(folder, [f"{host}: node_{node}.pid" for node, host in enumerate(request.hosts)])
    with _Forwarding(request, folder):
        statuses = _wait(nodes)
    return report(dict(zip(request.hosts, statuses, strict=True)))


def _check_hosts(request: Request, folder: Path) -> int:
    """All hosts at once: they answer, see the folder, have the interpreter and the time. Returns a port that is free
    on the first one."""
    seen, python = (shlex.quote(str(path)) for path in ((folder / EXPERIMENT).resolve(), request.python))
    test = f"test -f {seen} || exit 90; {python} -c {shlex.quote(LOOK)} || exit 91"
    asked = time.time()
    checks = {
        host: subprocess.Popen([*SSH, host, test], stdin=subprocess.DEVNULL, stdout=PIPE, stderr=PIPE, text=True)
        for host in dict.fromkeys(request.hosts)
    }
    problems, ports = [], []
    for host, check in checks.items():
        out, said = check.communicate()
        answers = dict(line.split() for line in out.splitlines() if line.startswith(("clock ", "port ")))
        reasons = {
            90: f"does not see {folder}: run_dir and this folder must be on a file system that all hosts share",
            91: f"has no interpreter {request.python}",
        }
        if check.returncode:
            reason = reasons.get(check.returncode, f"cannot be reached with a key: {' '.join(said.split())}")
            problems.append(Problem("--ssh", host, reason))
            continue
        ports.append(int(answers["port"]))
        # it looked at its clock after it was asked and before now
        off = max(asked - float(answers["clock"]), float(answers["clock"]) - time.time())
        if off > MOST_CLOCK_SKEW_S:
            problems.append(Problem("--ssh", host, f"its clock is off by {off:.0f} s", "start a time service there"))
    if ports and not ports[0]:
        rule = f"no port from {PORT} to {PORT + PORTS - 1} is free there"
        problems.append(Problem("--ssh", request.hosts[0], rule, "name another host first"))
    if problems:
        raise ConfigError("submit", problems)
    return ports[0]


def _wait(nodes: list[subprocess.Popen[bytes]]) -> list[int]:
    while any(node.poll() is None for node in nodes):
        time.sleep(0.2)
    return [int(node.returncode) for node in nodes]


class _Forwarding:
    """While it lasts, a SIGTERM, a Ctrl-C or a hangup becomes a SIGTERM to the launcher of each node."""

    def __init__(self, request: Request, folder: Path) -> None:
        self.request, self.folder = request, folder
        self.before: dict[int, object] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.before[number] = signal.signal(number, self._pass_on)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        print("stopping: the ranks save after this step", file=sys.stderr, flush=True)
        for node, host in enumerate(self.request.hosts):
            try:
                process = int(pid_file(self.folder, node).read_text())
            except (OSError, ValueError):
                continue  # it has not begun
            subprocess.Popen([*SSH, host, f"kill -TERM {process}"], stdin=subprocess.DEVNULL, start_new_session=True)


def report(statuses: Mapping[str, int]) -> int:
    """Print how the nodes ended; returns the job's status."""
    if set(statuses.values()) == {EXIT_DONE}:
        print("done")
        return EXIT_DONE
    if set(statuses.values()) <= {EXIT_DONE, EXIT_STOPPED}:
        print("stopped after saving (status 75): the same command resumes from there")
        return EXIT_STOPPED
    for host, status in statuses.items():
        if status not in (EXIT_DONE, EXIT_STOPPED):
            print(f"{host}: status {status}; see its log", file=sys.stderr)
    return EXIT_MISTAKE if EXIT_MISTAKE in statuses.values() else 1
