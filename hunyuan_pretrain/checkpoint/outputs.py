"""Folders that a command writes whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.data.folders import flush_to_disk

__all__ = ["new_folder", "refuse_existing"]

CANNOT_WRITE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
)
"""Errors caused by the disk or the folder, not by this program."""
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LOCK = ".lock"
"""End of the name of the file beside an unfinished folder that the process which writes it holds locked."""


def refuse_existing(output: Path, *sources: Path) -> None:
    """Raise CheckpointError if `output` is there and not an empty folder, or lies in one of the folders that are
    read."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty folder; remove it or choose another name")
    for source in sources:
        if source.resolve() in (output.resolve(), *output.resolve().parents):
            raise CheckpointError(f"{output}: lies in {source}, which is only read; choose another place")


def _make_parent(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(output.parent)) from None


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A new sibling of `output`, which takes that name when the block ends and is removed if it raises.

    SIGTERM, Ctrl-C and a hangup end the block too; then SIGTERM and a hangup end the process. What a killed process
    left of the same output is removed at the beginning. Raises CheckpointError if the disk is full or not writable.
    """
    folder = output.parent / f".{output.name}.unfinished-{secrets.token_hex(4)}"
    with _stops_raised(output):
        try:
            _make_parent(output)
            _remove_leftovers(output)
            with _locked(folder):
                folder.mkdir()
                yield folder
                for path in sorted(folder.rglob("*")):
                    flush_to_disk(path)
                folder.rename(output)  # over an empty folder too
                flush_to_disk(output.parent)
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            raise CheckpointError(f"{output}: cannot be written: {error}; nothing was left behind") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within it, others see that a process writes `folder`, which is removed afterwards if it has that name still."""
    path = folder.with_name(folder.name + LOCK)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        with suppress(OSError):  # a file system without locks: a killed process's folder then stays
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # the cleanup runs to its end
        try:
            shutil.rmtree(folder, ignore_errors=True)
            path.unlink(missing_ok=True)
            os.close(descriptor)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remove_leftovers(output: Path) -> None:
    """Remove the unfinished folders of `output` that no process on any machine writes any more."""
    for path in output.parent.glob(f".{glob.escape(output.name)}.unfinished-*{LOCK}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.with_name(path.name.removesuffix(LOCK)), ignore_errors=True)
                path.unlink()
            finally:
                os.close(descriptor)


class _StoppedError(BaseException):
    """SIGTERM or a hangup, raised in the main thread."""


@contextmanager
def _stops_raised(output: Path) -> Iterator[None]:
    """Within it, SIGTERM and a hangup raise, as Ctrl-C does; afterwards they end the process as they would have."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in replaced:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else _StoppedError(number)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    replaced = {number: handler for number in STOPS if (handler := signal.getsignal(number)) in usual}
    for number in replaced:
        signal.signal(number, stop)
    stopped: _StoppedError | None = None
    try:
        yield
    except _StoppedError as error:
        stopped = error
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
    if stopped is not None:
        print(f"{output}: stopped; nothing was left behind", file=sys.stderr, flush=True)
        os.kill(os.getpid(), stopped.args[0])
