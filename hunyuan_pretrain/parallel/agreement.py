"""Work that ranks do together and that may fail on any of them: all ranks learn of a failure, and none is left in a
collective that the others never enter."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException  # not an Exception, but a BaseException
from torch.distributed.distributed_c10d import _set_pg_timeout

from hunyuan_pretrain.parallel import groups
from hunyuan_pretrain.parallel.signs_of_life import signs_of_life

T = TypeVar("T")

SYSTEM_REASONS = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)]
"""Reasons for which a disk rejects a file, in the operating system's words; the best explanation if several ranks
fail."""

PATIENCE = timedelta(hours=12)
"""How long a rank waits for other ranks to read or write their share; enough for 4 TB at 100 MB/s."""


@contextmanager
def patience() -> Iterator[None]:
    """Within it, collectives of all ranks (the default group) wait up to PATIENCE, not runtime.distributed_timeout_s.

    For work on files, whose duration has nothing to do with the time-out of a training step. A lost rank is still
    noticed: on its own node at once, by the launcher, and on other nodes after the usual time-out (signs_of_life.py). A
    rank that is still working is waited for.
    """
    usual = groups.collective_timeout()
    if usual is None or usual >= PATIENCE:
        yield
        return
    alone = dist.get_world_size() == 1
    _set_pg_timeout(PATIENCE)
    try:
        with nullcontext() if alone else signs_of_life(usual.total_seconds()).watched():
            yield
    finally:
        _set_pg_timeout(usual)


class Failures:
    """Keeps the first error of several actions, so that a rank that failed still takes part in the collectives between
    them."""

    def __init__(self) -> None:
        self.first: BaseException | None = None

    def run(self, action: Callable[..., object], *arguments: Any) -> None:
        """Run `action`, unless an earlier one has failed."""
        if self.first is None:
            try:
                action(*arguments)
            except (Exception, CheckpointException) as error:
                self.first = error

    def raise_first(self) -> None:
        """Raise the first error, if there was one."""
        if self.first is not None:
            raise self.first


def first_error(action: Callable[[], object]) -> str | None:
    """Run `action` on every rank. Returns the same error message on all of them: the operating system's if there is
    one, else the first rank's; None if no rank failed.

    Communicates: all ranks, after the action.
    """
    try:
        action()
        mine = None
    except (
        Exception,
        CheckpointException,
    ) as error:  # every failure has to reach the other ranks, which would otherwise wait forever
        mine = reason_of(error)
        if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the collective below needs a little
    teller = _teller(mine)
    if teller is None:
        return None
    told: list[str | None] = [mine]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(told, src=teller)
    return told[0]


def _teller(error: str | None) -> int | None:
    """The rank whose error all ranks are told: the first with one of the operating system's, else the first with any;
    None if no rank has one. Communicates: all ranks, 8 bytes whatever their number."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:  # it may have lost its GPU, and still has a save to finish
        return None if error is None else 0
    urgency = 0 if error is None else ranks - rank + (ranks if error in SYSTEM_REASONS else 0)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    most = torch.tensor([urgency], dtype=torch.int64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    found = int(most.item())
    return None if found == 0 else (ranks - found) % ranks


def give_back(device: torch.device) -> None:
    """Free the memory of a trial that has ended: the next one, and collectives, need it.

    Raises torch.AcceleratorError if a kernel has used a wrong address. This process cannot use its GPU any more, and so
    cannot tell the others, which wait: it has to end with an error, upon which the launcher ends them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def error_of_rank_0(action: Callable[[], object]) -> str | None:
    """Run `action` on rank 0 only. Returns its error message on every rank, or None. Communicates: all ranks, after the
    action."""

    def run() -> None:  # the result may not be picklable
        action()

    return from_rank_0(run)[1]


def from_rank_0(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Run `action` on rank 0 only. Returns (result, None) or (None, error message) on every rank. Communicates: all
    ranks, after the action."""
    found: list[Any] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            found = [(action(), None)]
        except (Exception, CheckpointException) as error:
            found = [(None, reason_of(error))]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def reason_of(error: BaseException) -> str:
    """The part of an error that a person needs; torch wraps those of the operating system in several layers. An error
    whose `is_whole` is true is not shortened."""
    text = str(error)
    if getattr(error, "is_whole", False):
        return text
    for reason in SYSTEM_REASONS:
        if (isinstance(error, OSError) and error.strerror == reason) or reason in text:
            return reason
    if "unexpected pos" in text:  # how torch's writer reports a short write
        return os.strerror(errno.ENOSPC)
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[0] if isinstance(error, torch.AcceleratorError) else lines[-1]  # below that one's, hints on debugging
