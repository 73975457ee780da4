"""Processes that die, or whose disk is full, in the middle of their work."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


class Points:
    """Everything that this process does to files below a folder, from now on: each write that reaches the operating
    system, flush to disk, rename, removal and new folder, of all threads. For a process that is thrown away: nothing is
    put back."""

    NAMES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")

    def __init__(self, folder: Path, at: int | None = None, is_full: bool = False) -> None:
        """At point number `at`, counted from 1, the process dies as by kill -9, a write half done; with `is_full`, the
        disk has no space left instead, from there on."""
        self.seen: list[str] = []
        self._folder, self._at, self._is_full, self._lock = str(folder), at, is_full, threading.RLock()
        for name in self.NAMES:
            setattr(os, name, self._watched(name, getattr(os, name)))
        real_open = io.open

        def watched_open(file: Any, mode: str = "r", buffering: int = -1, *others: Any, **options: Any) -> Any:
            if not (isinstance(file, (str, os.PathLike)) and "w" in mode and str(file).startswith(self._folder)):
                return real_open(file, mode, buffering, *others, **options)
            raw = _WatchedFile(file, self)
            buffered = io.BufferedWriter(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

        builtins.open = io.open = watched_open  # type: ignore[assignment]

    def reached(self, what: str, half: Callable[[], object] | None = None) -> None:
        """One point. Raises OSError if the disk is full."""
        with self._lock:
            self.seen.append(what)
            if self._at is None or len(self.seen) < self._at or (self._is_full and what != "write"):
                return
            if half is not None:
                half()
            if not self._is_full:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.reached(name)
            return function(*arguments, **options)

        return call


class _WatchedFile(io.FileIO):
    def __init__(self, path: Any, points: Points) -> None:
        super().__init__(path, "w")
        self._points = points

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._points.reached("write", lambda: io.FileIO.write(self, view[: len(view) // 2]))
        return super().write(view)
