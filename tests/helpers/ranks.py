"""Run a function on several gloo ranks and collect what each returned."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.context import BaseContext, ForkServerContext
from typing import Any


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """Call function(*arguments) in `world_size` fresh interpreters with torchrun's environment; returns the results in
    rank order.

    `function` must be importable from its module. An exception on any rank fails the test with that rank's traceback.
    """
    return _run(multiprocessing.get_context("spawn"), world_size, function, arguments, timeout_s)


def fork_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """Like `run_ranks`, but in forks of a process that has only imported torch, megatron-core and this project.

    Importing them takes longer than most tests. A fork is as good as a fresh interpreter, because nothing has been
    computed in its parent. Use `run_ranks` only for what must happen before megatron is imported, such as installing a
    stand-in for a package that megatron looks for. The output of a fork is shown with a failed test, but pytest's capfd
    does not capture it: the parent keeps the output of the test that first needed it.
    """
    return _run(forking(), world_size, function, arguments, timeout_s)


def forking() -> ForkServerContext:
    """The multiprocessing context whose processes are such forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.imported"])
    return context


def store() -> Any:
    """Where the ranks of a job find each other. It is kept open by who starts them, as by torchrun's agent: a port that
    is only looked up may be taken by the time rank 0 starts."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def of_torchrun(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives a rank on one node; `port` is that of the `store`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


def _run(
    context: BaseContext, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float
) -> list[Any]:
    meeting = store()
    queue = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, meeting.port, queue, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, ok, value = queue.get(timeout=timeout_s)
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = value
    finally:
        for process in processes:
            if len(results) < world_size:
                process.kill()
            process.join()
    return [results[rank] for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, port: int, queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= of_torchrun(rank, world_size, port)
    try:
        queue.put((rank, True, function(*arguments)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
