"""launch/node.py: the arguments that torchrun gets for a node's job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hunyuan_pretrain.config.exit_status import COMMAND, LAUNCHER, STOP_SIGNALS
from launch import node, ranks
from launch.node import (
    Job,
    MistakeError,
    address_towards,
    command_line,
    count_ranks,
    prepare_environment,
    read_job,
    torchrun_arguments,
)
from launch.ranks import Stop, run_ranks
from tests.helpers.runs import ROOT

DEMO = str(ROOT / "configs/dev/demo_cpu.yaml")
SEVERAL = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "NPROC_PER_NODE": "3"}


@pytest.fixture(autouse=True)
def environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher sets for its ranks is not left to other tests."""
    for name in (COMMAND, LAUNCHER, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def job(**variables: str) -> Job:
    return read_job(variables)


def test_one_node_takes_any_free_port() -> None:
    assert torchrun_arguments(job(), 4) == ["--nnodes", "1", "--nproc-per-node", "4", "--standalone"]
    assert job(NNODES="", MASTER_PORT="") == job()


def test_numbered_nodes_meet_at_the_first() -> None:
    told = torchrun_arguments(job(**SEVERAL, NODE_RANK="1", MASTER_PORT="40000"), 3)
    place = ["--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", "40000"]
    assert told[4:] == ["--local-addr", "127.0.0.1", *place]


@pytest.mark.parametrize(
    ("place", "host"),
    [
        ({}, []),
        ({"SLURM_NODEID": "0"}, ["--rdzv-conf", "is_host=true"]),
        ({"SLURM_NODEID": "0", "NODE_RANK": "1"}, ["--rdzv-conf", "is_host=false"]),
    ],
)
def test_nodes_of_a_job_with_an_id_agree_on_their_numbers(place: dict[str, str], host: list[str]) -> None:
    told = torchrun_arguments(job(**SEVERAL, RDZV_ID="x", **place), 3)
    assert told[6:] == ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:29500", "--rdzv-id", "x", *host]


@pytest.mark.parametrize(
    "variables", [{"RDZV_ID": "job", "SLURM_NODEID": "0"}, {"NODE_RANK": "0"}], ids=["meeting", "numbered"]
)
def test_torchrun_gets_the_nodes_address_because_its_name_may_not_resolve(variables: dict[str, str]) -> None:
    assert torchrun_arguments(job(**SEVERAL, **variables), 1)[4:6] == ["--local-addr", "127.0.0.1"]
    given = job(**SEVERAL, **variables, LOCAL_ADDR="10.9.8.7")
    assert torchrun_arguments(given, 1)[4:6] == ["--local-addr", "10.9.8.7"]
    with pytest.raises(MistakeError, match=r"MASTER_ADDR=no\.such\.node\.invalid: .*; give an address that this node"):
        address_towards("no.such.node.invalid")


@pytest.mark.parametrize("port", ["0", "65536", "080", "x", "-1"])
def test_an_invalid_port_is_refused(port: str) -> None:
    with pytest.raises(MistakeError, match=f"MASTER_PORT={port}: must be a port, 1 to 65535"):
        job(**SEVERAL, NODE_RANK="0", MASTER_PORT=port)


@pytest.mark.parametrize(
    ("gpus", "overrides", "variables", "ranks"),
    [
        (0, [], {}, 2),
        (0, ["parallel.world_size=null", "parallel.expert_model_parallel_size=1"], {}, 1),
        (0, [], {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "0"}, 1),
        (2, ["parallel.world_size=null"], {}, 2),
        (4, ["runtime.device=cpu"], {}, 2),
        (4, [], {"NPROC_PER_NODE": "2"}, 2),
    ],
)
def test_ranks_of_a_node(
    gpus: int, overrides: list[str], variables: dict[str, str], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert count_ranks(DEMO, overrides, job(**variables)) == ranks


def test_a_world_that_does_not_divide_over_the_nodes_is_refused() -> None:
    three = job(NNODES="3", MASTER_ADDR="a", NODE_RANK="0")
    with pytest.raises(ValueError, match=r"demo_cpu\.yaml: parallel\.world_size=2 does not divide over 3 nodes"):
        count_ranks(DEMO, ["runtime.device=cpu"], three)


def test_defaults_of_another_torchrun_do_not_reach_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PET_STANDALONE": "0", "PET_NNODES": "7", "OMP_NUM_THREADS": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(COMMAND, raising=False)
    prepare_environment(["my.yaml", "x=[1, 2]"])
    assert os.environ[COMMAND] == f"{sys.executable} -m launch.node my.yaml 'x=[1, 2]'"
    assert not [name for name in os.environ if name.startswith("PET_")]
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv(COMMAND, "sbatch job.sbatch")
    prepare_environment([])
    assert (os.environ["OMP_NUM_THREADS"], os.environ[COMMAND]) == ("3", "sbatch job.sbatch")


def test_the_command_that_resumes_has_what_describes_the_job() -> None:
    environment = {"HUNYUAN_LAUNCHER": "launch/train.sh", "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "X": "y"}
    found = command_line(["my.yaml", "--from-step=3"], environment)
    assert found == "NNODES=2 NODE_RANK=0 MASTER_ADDR=a launch/train.sh my.yaml --from-step=3"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_before_there_are_ranks_exits_at_once_even_if_exceptions_are_swallowed(number: signal.Signals) -> None:
    program = f"""
import os
from launch.ranks import Stop, run_ranks
Stop().listen()
try:
    os.kill(os.getpid(), {int(number)})
except BaseException:
    pass
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    said = "stopped before the first step; nothing to save: the same command starts again\n"
    assert (done.returncode, done.stdout, done.stderr) == (75, said, "")


def test_options_of_train_reach_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message that refuses a change names --accept-changes, so the option must work where runs are started."""
    for name in ("NNODES", "RDZV_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    started = []
    monkeypatch.setattr(node, "run_ranks", lambda arguments, stop, restarts: started.append(arguments) or 75)
    options = ("--from-step", "5", "--accept-changes=seed", "--accept-changes", "model.x,b")
    assert node.main([DEMO, *options, "seed=5"], Stop()) == 75
    given = [DEMO, "seed=5", "--from-step=5", "--accept-changes=seed", "--accept-changes=model.x,b"]
    assert started[0][-7:] == ["hunyuan_pretrain", "train", *given]


def test_restarts_are_counted_and_for_one_node() -> None:
    assert (job().restarts, job(MAX_RESTARTS="3").restarts) == (0, 3)
    with pytest.raises(MistakeError, match=r"^MAX_RESTARTS=-1: must be a number$"):
        job(MAX_RESTARTS="-1")
    with pytest.raises(
        MistakeError, match=r"^MAX_RESTARTS=1: is for one node; on several, the job is started again as"
    ):
        job(MAX_RESTARTS="1", **SEVERAL, NODE_RANK="0")


@pytest.mark.parametrize(
    ("statuses", "restarts", "status", "starts"),
    [([1, 1, 0], 3, 0, 3), ([1, 1, 1], 1, 1, 2), ([2], 3, 2, 1), ([75], 3, 75, 1), ([1], 0, 1, 1)],
    ids=["until it works", "a bound", "a mistake", "a stop", "none"],
)
def test_ranks_that_failed_are_started_again(monkeypatch, statuses, restarts, status, starts) -> None:
    started = []
    monkeypatch.setattr(ranks, "_run_once", lambda arguments, stop: started.append(1) or statuses[len(started) - 1])
    assert (run_ranks([], Stop(), restarts), len(started)) == (status, starts)


def test_ranks_that_failed_while_told_to_stop_are_not_started_again(monkeypatch) -> None:
    stop = Stop()
    monkeypatch.setattr(ranks, "_run_once", lambda arguments, told: told.asked.append(signal.SIGTERM) or 1)
    assert run_ranks([], stop, 5) == 1
    assert len(stop.asked) == 1
