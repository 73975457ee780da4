"""A rank that fails exits with its traceback and does not leave the others waiting."""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import forking
from tests.helpers.runs import experiment_fields, write_experiment

SECONDS = 30
"""Far below distributed_timeout_s, which ends any wait."""


def fail_in_step_2(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a bug in mid-step")


def refuse_in_step_2(*arguments: Any, **options: Any) -> Any:
    from hunyuan_pretrain.train import TrainingError

    raise TrainingError("a mistake of the user's")


def hang_in_step_2(*arguments: Any, **options: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_the_others(*arguments: Any) -> None:
    """Behave like NCCL when a process group is destroyed during a collective: wait. Gloo tears the group down."""
    time.sleep(10 * SECONDS)


def command(rank: int, port: int, arguments: list[str], broken: Any, folder: Path) -> None:
    """Run `hunyuan-pretrain` as one of two ranks; rank 1 fails when it computes the gradient norm of its second
    step."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    from hunyuan_pretrain.cli import main, ranks
    from hunyuan_pretrain.train import optimizer, step

    ranks.SECONDS_FOR_RANK_0 = 1
    if rank == 1:
        import torch.distributed as dist

        dist.destroy_process_group = wait_for_the_others
        atexit.register(wait_for_the_others)
        steps = []

        def norm(*args: Any) -> float:
            steps.append(None)
            return broken() if len(steps) == 2 else right(*args)

        right, optimizer.gradient_norm = optimizer.gradient_norm, norm
        assert step.optimizer_step is optimizer.optimizer_step
    sys.argv = ["hunyuan-pretrain", *arguments]
    main()


def two_ranks(arguments: list[str], broken: Any, folder: Path, first: int = 1) -> tuple[list[int], list[str], float]:
    """Exit statuses, stderr of both ranks, and how long the slower rank ran after the other had ended. first: the rank
    that ends first; rank 0 if rank 1 never ends."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        forking().Process(target=command, args=(rank, store.port, arguments, broken, folder)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        processes[first].join(90)
        ended = time.monotonic()
        processes[0].join(SECONDS)
        waited = time.monotonic() - ended
        statuses = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return statuses, [(folder / f"stderr{rank}").read_text() for rank in range(2)], waited


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "status", "says"),
    [
        (fail_in_step_2, 1, "AssertionError: a bug in mid-step"),
        (refuse_in_step_2, 2, "rank 1: a mistake of the user's"),
    ],
    ids=["a bug", "a user's error"],
)
def test_a_failing_rank_exits_with_its_error_and_leaves_no_rank_waiting(corpus, tmp_path, broken, status, says):
    fields = experiment_fields(corpus, tmp_path / "run", model__num_layers=2)
    fields["runtime"]["probes"] = False
    statuses, said, waited = two_ranks(["train", str(write_experiment(tmp_path / "x.yaml", fields))], broken, tmp_path)
    assert statuses[1] == status, said[1]
    assert says in said[1]
    assert ("Traceback" in said[1]) == (status == 1)
    assert statuses[0] not in (None, 0), f"rank 0 waits; {said}"
    assert waited < SECONDS
    if status == 1:
        assert "\n  rank 1 has failed: AssertionError: a bug in mid-step, on " in said[0]


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_step_is_named_with_the_step(corpus, tmp_path):
    fields = experiment_fields(corpus, tmp_path / "run", model__num_layers=2, runtime__distributed_timeout_s=12)
    fields["runtime"]["probes"] = False
    config = write_experiment(tmp_path / "x.yaml", fields)
    statuses, (said, _), _ = two_ranks(["train", str(config)], hang_in_step_2, tmp_path, first=0)
    assert statuses == [1, None], said
    assert re.search(r"\n  rank 1 does not answer: .+; it was last seen in (step [12]|start), ", said), said
    assert re.search(r"\n  rank 0 waits in \w+ .+ of \w+ \(ranks 0, 1\), called in step 2, optimizer\n", said), said
    assert said.index("has waited for more than 6 s") < said.index("rank 0 of 2 ends: another rank has not answered")


@pytest.mark.slow
def test_parity_ends_when_a_rank_fails(corpus, tmp_path):
    fields = experiment_fields(corpus, tmp_path / "run", model__num_layers=2)
    path = write_experiment(tmp_path / "x.yaml", fields)
    statuses, said, _ = two_ranks(
        ["parity", str(path), "--layout", "dp=2", "--against", "tp=2"], fail_in_step_2, tmp_path
    )
    assert statuses[1] == 1
    assert "rank 1 of 2 failed:\nTraceback" in said[1]
    assert "a bug in mid-step" in said[1]
    assert statuses[0] not in (None, 0)
