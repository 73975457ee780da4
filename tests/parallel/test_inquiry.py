"""A rank that hangs, or calls other collectives than the others, is named by each rank that waits for it."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import forking

LIMIT_S = 8
RANKS = 3


def in_a_job(scenario: Any) -> None:
    """Some collectives that all ranks call, then those of a scenario."""
    import torch
    import torch.distributed as dist

    from hunyuan_pretrain.parallel import whereabouts
    from hunyuan_pretrain.parallel.groups import initialize_distributed

    initialize_distributed("gloo", LIMIT_S)
    pair = dist.new_group([0, 1], group_desc="TENSOR_MODEL_PARALLEL_GROUP")
    whereabouts.phase("start of the step", 4)
    for layer in range(2):
        whereabouts.forward(layer)
        dist.all_reduce(torch.ones(2, 3))
    time.sleep(1.5)  # its place is noted
    scenario(dist.get_rank(), pair)


def stopped(rank: int, pair: Any) -> None:
    import torch
    import torch.distributed as dist

    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(5))


def skipping(rank: int, pair: Any) -> None:
    import torch
    import torch.distributed as dist

    from hunyuan_pretrain.parallel import whereabouts

    for layer in range(2, 4):
        whereabouts.forward(layer)
        if rank != 1 or layer != 2:
            dist.all_reduce(torch.ones(2, 3))
    if rank == 1:
        time.sleep(60)  # it believes to have done all


def rank_of(rank: int, port: int, scenario: Any, output: Path) -> None:
    os.dup2(os.open(output.with_suffix(f".{rank}"), os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    from hunyuan_pretrain.cli.ranks import leave, report_failure

    try:
        in_a_job(scenario)
    except Exception as error:
        report_failure(error)
        leave(1)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each rank prints in each scenario; the jobs run side by side, as they mostly wait."""
    from torch.distributed import TCPStore

    jobs = {}
    for scenario in (stopped, skipping):
        store, folder = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), tmp_path_factory.mktemp("job")
        ranks = [
            forking().Process(target=rank_of, args=(rank, store.port, scenario, folder / "stderr"))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        jobs[scenario.__name__] = store, ranks, folder
    try:
        for _, ranks, _ in jobs.values():
            for rank in (0, 2):
                ranks[rank].join(timeout=90)
                assert ranks[rank].exitcode == 1
    finally:
        for _, ranks, _ in jobs.values():
            for process in ranks:
                process.kill()
                process.join()
    return {
        name: [(folder / f"stderr.{rank}").read_text() for rank in range(RANKS)]
        for name, (_, _, folder) in jobs.items()
    }


@pytest.mark.parametrize("rank", [0, 2])
def test_a_stopped_rank_is_named_by_all_others_before_the_time_out(said, rank):
    text = said["stopped"][rank]
    lines = text.splitlines()
    assert lines[0].startswith(f"rank {rank} (")
    assert "has waited for more than 4 s in all_reduce [5] Float of default_pg; the limit is 8 s" in lines[0], text
    silent = (
        "  rank 1 does not answer: it is stopped or has ended, or its machine is gone; it was last seen in step 4, "
    )
    assert re.match(re.escape(silent) + r"forward of layer 1, at ..:..:.. UTC, on .+, process \d+$", lines[1]), text
    assert lines[2] == (
        "  ranks 0, 2 wait in all_reduce [5] Float, number 3 of default_pg (ranks 0 to 2), called in step 4, "
        "forward of layer 1"
    )
    assert lines[3] == "    rank 1 has not called it and does not answer"
    assert lines[4].startswith(f"rank {rank} of 3 ends: another rank has not answered within runtime.distributed"), text


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_skips_a_collective_is_named_with_the_collective(said, rank):
    text = said["skipping"][rank]
    assert "ranks 0, 2 wait in all_reduce [2, 3] Float, number 4 of default_pg (ranks 0 to 2)" in text
    assert re.search(r"rank 1 \(.+\) has not called it: it is in step 4, forward of layer 3", text), text
    assert (
        "the first that differs is number 3: ranks 0, 2: all_reduce [2, 3] Float in step 4, forward of layer 2; "
        "rank 1: all_reduce [2, 3] Float in step 4, forward of layer 3"
    ) in text
    assert re.search(r"\n  rank 1 \(.+\) waits for no rank: it is in step 4, forward of layer 3", text), text
