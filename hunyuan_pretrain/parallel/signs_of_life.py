"""Signs of life: how ranks that wait long for each other learn that one is gone.

Whoever started the ranks of a node notices a process that ends, and ends the others of that node. Nobody tells the
other nodes: NCCL waits for a rank that is gone until a collective's time-out, and torchrun only looks after its own
processes. So where that time-out is long because the work is, each rank counts in the store at which they all met, and
watches others do so: rank 0 all of them, they rank 0.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

EXIT_ALONE = 1
GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
    "remote process exited",
)
"""What gloo, NCCL and the store say where the rank at the other end of a connection has ended."""

SECONDS_BETWEEN = 10.0
LEAST_SECONDS = 10.0
"""A process may have so long no turn on a machine that has too much to do."""


class SignsOfLife:
    """Those of this rank, given from now on until its process ends, and those of others, watched inside `watched()`.

    They come from a thread: a rank that reads or writes for hours gives them too.
    """

    def __init__(self, store: dist.Store, limit_s: float) -> None:
        """A rank without a sign of life for more than `limit_s` seconds, or LEAST_SECONDS, is gone."""
        limit_s = max(limit_s, LEAST_SECONDS)
        # a connection of its own: the other may be waiting for a key
        self._store = dist.PrefixStore("signs_of_life", store.clone())  # type: ignore[attr-defined]  # missing in the stubs
        self._rank, self._limit_s, self._every_s = dist.get_rank(), limit_s, min(SECONDS_BETWEEN, limit_s / 10)
        self._counts = dict.fromkeys(range(1, dist.get_world_size()) if self._rank == 0 else [0], 0)
        self._is_watching, self._end = False, threading.Event()
        # two, because a store whose machine is gone may never answer
        self._threads = [
            threading.Thread(target=work, name="signs of life", daemon=True) for work in (self._count, self._watch)
        ]
        for thread in self._threads:
            thread.start()
        # a thread that comes back from the store into a Python that is ending would abort the process
        atexit.register(self.end)

    def end(self) -> None:
        """Give none any more, and watch no others."""
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=1.0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End this process, with a message, if another one is gone."""
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False

    def _count(self) -> None:
        try:
            while not self._end.wait(self._every_s):
                self._store.add(str(self._rank), 1)
                for rank in self._counts if self._is_watching else ():  # rank 0 of thousands has better to do in a step
                    self._counts[rank] = self._store.add(str(rank), 0)
        except RuntimeError:
            return  # the store has ended with the job, or with a part of it, which will be missed

    def _watch(self) -> None:
        before, silent_s = dict(self._counts), dict.fromkeys(self._counts, 0.0)
        while not self._end.wait(self._every_s):
            for rank, count in self._counts.items():
                # turns are added up, not looked up on a clock: a job that was suspended as a whole has lost nobody
                silent_s[rank] = silent_s[rank] + self._every_s if self._is_watching and count == before[rank] else 0.0
                before[rank] = count
            if gone := [rank for rank, seconds in silent_s.items() if seconds > self._limit_s]:
                named = ", ".join(map(str, gone[:8])) + (f" and {len(gone) - 8} more" if len(gone) > 8 else "")
                text = (
                    f"rank {self._rank} ends: no sign of life of rank {named} for {self._limit_s:g} s "
                    "(runtime.distributed_timeout_s)\n"
                )
                os.write(2, text.encode())
                os._exit(EXIT_ALONE)  # the main thread is in a collective that never ends


def signs_of_life(limit_s: float) -> SignsOfLife:
    """Those of this process in its present job."""
    global _signs
    store = _get_default_store()
    if _signs is None or _signs[0] is not store:
        if _signs is not None:
            _signs[1].end()
        _signs = store, SignsOfLife(store, limit_s)
    return _signs[1]


_signs: tuple[dist.Store, SignsOfLife] | None = None


def is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether an error says no more than that another rank has ended: a connection of a collective or of the store that
    broke."""
    is_from_torch = isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo's are plain RuntimeErrors
    return isinstance(error, RuntimeError) and is_from_torch and any(words in str(error) for words in GONE)
