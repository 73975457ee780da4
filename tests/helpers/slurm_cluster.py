"""A real Slurm cluster of two nodes on this machine, from Debian's packages slurm-wlm and munge; needs root.

    python -m tests.helpers.slurm_cluster COMMAND...

runs a command with the cluster and stops it afterwards. Everything lies in one new folder; all daemons listen on
127.0.0.1.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

NODES = ("n0", "n1")
DAEMONS = ("munged", "slurmctld", "slurmd")
START_S = 60

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# no cgroups, no other privileges of the machine
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
MpiDefault=none
KillWait=5
# a node that does not answer for so long is lost, and its jobs are requeued
SlurmdTimeout=10
MinJobAge=3600
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def obstacle() -> str | None:
    """Why no cluster can be started here; None if it can."""
    missing = [name for name in (*DAEMONS, "sbatch") if _path_of(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons need root here"


class Cluster:
    """A running cluster."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        """Variables that its commands need."""
        self._folder, self._stack = folder, stack
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._nodes[node] = self._stack.enter_context(
            _daemon(self._folder, ["slurmd", "-D", "-N", node], self.environment)
        )

    def kill_node(self, node: str) -> None:
        """SIGKILL the daemon of a node: it is lost, with no word to the others. Its tasks go on."""
        self._nodes[node].kill()
        self._nodes[node].wait()


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start the cluster. Raises RuntimeError with the logs if it does not start."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        started = Cluster(folder, stack)
        stack.callback(_kill_jobs, started.environment)  # of a test that has failed
        _start_munge(folder, stack)
        (folder / "state").mkdir()
        text = CONFIG.format(host=socket.gethostname(), folder=folder, ports=_free_ports(3))
        (folder / "slurm.conf").write_text(text)
        stack.enter_context(_daemon(folder, ["slurmctld", "-D"], started.environment))
        for node in NODES:
            started.start_node(node)
        _wait_for_nodes(folder, started.environment)
        yield started


def _kill_jobs(environment: dict[str, str]) -> None:
    """Kill what the cluster has started and what outlives its daemons."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found = process.environ()
            if environment.items() <= found.items() and (process.name() == "slurmstepd" or "SLURM_JOB_ID" in found):
                process.kill()


def _start_munge(folder: Path, stack: ExitStack) -> None:
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
    command = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
    stack.enter_context(_daemon(folder, command, {}))
    deadline = time.monotonic() + START_S
    while not (folder / "munge.socket").exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"munged does not start:\n{_logs(folder)}")
        time.sleep(0.1)


@contextmanager
def _daemon(folder: Path, command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    path = _path_of(command[0])
    assert path is not None
    with (folder / f"{command[0]}.{command[-1]}.out".replace("/", "_")[-80:]).open("ab") as out:
        process = subprocess.Popen(
            [path, *command[1:]], env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_nodes(folder: Path, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        idle = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True).stdout.split()
        if set(idle) == set(NODES):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the nodes do not become idle:\n{_logs(folder)}")
        time.sleep(0.5)


def _logs(folder: Path) -> str:
    files = sorted([*folder.glob("*.log"), *folder.glob("*.out")])
    return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-2000:]}" for file in files)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _path_of(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def main(command: list[str]) -> int:
    """Run a command with the cluster; returns its exit status."""
    if reason := obstacle():
        print(f"no Slurm cluster: {reason}", file=sys.stderr)
        return 2
    with cluster() as started:
        return subprocess.run(command, env=os.environ | started.environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
