"""Spreads work on files over processes, with a line of progress now and then."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

import psutil
import torch

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.runtime.device import usable_cores, usable_memory_bytes

__all__ = ["Progress", "Say", "default_processes", "free_memory_bytes", "run_over", "to_stderr"]

Task = TypeVar("Task")
Result = TypeVar("Result")
Say = Callable[[str], None]

SECONDS_BETWEEN_LINES = 10.0
WORKER_BYTES = 700_000_000
"""Memory of a process before it reads anything: Python and torch."""
WORTH_A_PROCESS = 1_000_000_000
"""Bytes. Starting a process takes seconds, in which one alone converts about this much."""


def to_stderr(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def free_memory_bytes() -> int:
    """Memory that this process may still take."""
    return min(int(psutil.virtual_memory().available), usable_memory_bytes())


def default_processes(total_bytes: int, piece_bytes: int) -> int:
    """Processes that are worth starting for total_bytes of work, if each holds up to three times piece_bytes: not more
    than cores, nor than fit into half of the free memory."""
    fit = free_memory_bytes() // 2 // (WORKER_BYTES + 3 * piece_bytes)
    return max(1, min(usable_cores(), fit, total_bytes // WORTH_A_PROCESS))


def run_over(
    processes: int,
    what: str,
    function: Callable[[Task], Result],
    tasks: Sequence[tuple[Task, int]],
    say: Say | None = None,
) -> list[Result]:
    """function(task) for every task, in any order; returns the results in the order of the tasks.

    processes: 1 runs them here; more are started for this call. `function` and the tasks must then be picklable. tasks:
    each with its bytes, for the progress that `say` gets every 10 seconds. Raises what a task raises, after the others
    that have begun; and CheckpointError if a process is killed, as it is when memory is full.
    """
    progress = Progress(what, sum(size for _, size in tasks), say, "MB")
    if processes == 1 or len(tasks) < 2:
        found = []
        for task, size in tasks:
            found.append(function(task))
            progress.add(size)
        return found
    with ProcessPoolExecutor(min(processes, len(tasks)), get_context("spawn"), _start) as pool:
        futures = [pool.submit(function, task) for task, _ in tasks]
        size_of = dict(zip(futures, (size for _, size in tasks), strict=True))
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, SECONDS_BETWEEN_LINES, FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress.add(sum(size_of[future] for future in done))
        except BaseException as error:
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise CheckpointError(f"{what}: a process was killed; is memory full? Use fewer --processes") from None
            raise
        return [future.result() for future in futures]


def _start() -> None:
    torch.set_num_threads(1)  # the processes share the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the main process ends them


class Progress:
    """Says every 10 seconds how much is done."""

    def __init__(self, what: str, total: int, say: Say | None, unit: str = "") -> None:
        """unit: "MB" if the total is in bytes, for a rate; else none is told."""
        self._what, self._total, self._say, self._unit = what, max(total, 1), say, unit
        self._done, self._begin = 0, time.monotonic()
        self._last = self._begin

    def add(self, size: int) -> None:
        """That much more is done."""
        self._done += size
        now = time.monotonic()
        if self._say is not None and now - self._last > SECONDS_BETWEEN_LINES:
            self._last = now
            has_rate = self._unit == "MB" and self._done > 0
            rate = f", {self._done / (now - self._begin) / 1e6:,.0f} MB/s" if has_rate else ""
            self._say(f"{self._what}: {self._done / self._total:.0%}{rate}")
