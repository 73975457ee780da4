"""Signs of life: how ranks that wait a long time for each other learn that one is gone.

The launcher of a node's ranks notices a process that ends, and ends the others of that node. Nobody tells the other
nodes: NCCL waits for a lost rank until a collective's time-out, and torchrun only watches its own processes. So where
that time-out is long because the work is, each rank increments a counter in the store of the rendezvous and watches
other counters: rank 0 those of all ranks, the others that of rank 0.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from hunyuan_pretrain.parallel.inquiry import current

EXIT_ALONE = 1
GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
    "remote process exited",
)
"""What gloo, NCCL and the store say when the rank at the other end of a connection has ended."""
SILENT = ("Timed out waiting", "wait timeout after")
"""What gloo and the store say when a rank has not answered in time."""

SECONDS_BETWEEN = 10.0
LEAST_SECONDS = 10.0
"""On an overloaded machine a process may not be scheduled for this long."""


class SignsOfLife:
    """Gives this rank's signs of life from now on until its process ends, and watches those of others inside
    `watched()`.

    Both run in threads, so a rank that reads or writes for hours gives signs of life too.
    """

    def __init__(self, store: dist.Store, limit_s: float) -> None:
        """A rank without a sign of life for more than `limit_s` seconds (at least LEAST_SECONDS) is gone."""
        limit_s = max(limit_s, LEAST_SECONDS)
        # a separate connection: the original may be waiting for a key
        self._store = dist.PrefixStore("signs_of_life", store.clone())  # type: ignore[attr-defined]  # missing in the stubs
        self._rank, self._limit_s, self._every_s = dist.get_rank(), limit_s, min(SECONDS_BETWEEN, limit_s / 10)
        self._counts = dict.fromkeys(range(1, dist.get_world_size()) if self._rank == 0 else [0], 0)
        self._is_watching, self._end = False, threading.Event()
        # two, because a store on a lost machine may never answer
        self._threads = [
            threading.Thread(target=work, name="signs of life", daemon=True) for work in (self._count, self._watch)
        ]
        for thread in self._threads:
            thread.start()
        # a thread that returns from the store during interpreter shutdown would abort the process
        atexit.register(self.end)

    def end(self) -> None:
        """Stop giving signs of life and watching others."""
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=1.0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, end this process with a message if a watched rank is gone."""
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False

    def _count(self) -> None:
        try:
            while not self._end.wait(self._every_s):
                self._store.add(str(self._rank), 1)
                for rank in self._counts if self._is_watching else ():  # spares rank 0 of thousands in a step
                    self._counts[rank] = self._store.add(str(rank), 0)
        except RuntimeError:
            return  # the store has ended: with the job, or with a rank that the watchers will miss

    def _watch(self) -> None:
        before, silent_s = dict(self._counts), dict.fromkeys(self._counts, 0.0)
        while not self._end.wait(self._every_s):
            for rank, count in self._counts.items():
                # adds up intervals instead of reading a clock: a job that was suspended as a whole has lost no rank
                silent_s[rank] = silent_s[rank] + self._every_s if self._is_watching and count == before[rank] else 0.0
                before[rank] = count
            if gone := [rank for rank, seconds in silent_s.items() if seconds > self._limit_s]:
                named = ", ".join(map(str, gone[:8])) + (f" and {len(gone) - 8} more" if len(gone) > 8 else "")
                text = (
                    f"rank {self._rank} ends: no sign of life of rank {named} for {self._limit_s:g} s "
                    "(runtime.distributed_timeout_s)\n"
                )
                if (inquiry := current()) is not None:
                    text += "".join(f"  {line}\n" for line in inquiry.last_seen(gone[:8]))
                os.write(2, text.encode())
                os._exit(EXIT_ALONE)  # the main thread is in a collective that never ends


def signs_of_life(limit_s: float) -> SignsOfLife:
    """The `SignsOfLife` of this process in its current job, created at the first call."""
    global _signs
    store = _get_default_store()
    if _signs is None or _signs[0] is not store:
        if _signs is not None:
            _signs[1].end()
        _signs = store, SignsOfLife(store, limit_s)
    return _signs[1]


_signs: tuple[dist.Store, SignsOfLife] | None = None


def is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether an error only says that another rank has ended: a broken connection of a collective or of the store."""
    return _says(error, GONE)


def is_time_out(error: BaseException) -> bool:
    """Whether an error only says that another rank has not answered within the time-out."""
    return _says(error, SILENT)


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    is_from_torch = isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo's are plain RuntimeErrors
    return isinstance(error, RuntimeError) and is_from_torch and any(one in str(error) for one in words)
