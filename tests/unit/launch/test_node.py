"""launch/node.py: the arguments that torchrun gets for a node's job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from launch import node
from launch.node import (
    Job,
    MistakeError,
    address_towards,
    count_ranks,
    prepare_environment,
    read_job,
    torchrun_arguments,
)
from launch.ranks import Stop
from tests.helpers.runs import ROOT

DEMO = str(ROOT / "configs/dev/demo_cpu.yaml")
SEVERAL = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "NPROC_PER_NODE": "3"}


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
    prepare_environment()
    assert not [name for name in os.environ if name.startswith("PET_")]
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_before_there_are_ranks_exits_at_once_even_if_exceptions_are_swallowed(number: signal.Signals) -> None:
    program = f"""
import os
from launch.ranks import Stop
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
    monkeypatch.setattr(node, "run_ranks", lambda arguments, stop: started.append(arguments) or 75)
    options = ("--from-step", "5", "--accept-changes=seed", "--accept-changes", "model.x,b")
    assert node.main([DEMO, *options, "seed=5"], Stop()) == 75
    given = [DEMO, "seed=5", "--from-step=5", "--accept-changes=seed", "--accept-changes=model.x,b"]
    assert started[0][-7:] == ["hunyuan_pretrain", "train", *given]
