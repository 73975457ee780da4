"""Processes that die in the middle of their work."""

from __future__ import annotations

import os
from collections.abc import Callable


def killed_at(count: int, job: Callable[[], object]) -> bool:
    """Run `job` in a process that dies as by kill -9 at its `count`-th flush, rename or removal; False if it finished
    before."""
    child = os.fork()
    if child == 0:
        left = count

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        for name in ("fsync", "rename", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            job()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
