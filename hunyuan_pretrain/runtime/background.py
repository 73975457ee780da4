"""Work in a thread beside the main one.

Threads, not processes: a forked child of a process that uses CUDA or has threads may hang, and a new interpreter takes
seconds and hundreds of megabytes. What the work here does, writing and hashing, releases Python's lock.
"""

from __future__ import annotations

import atexit
import threading
import traceback
import weakref
from collections.abc import Callable


class EndingError(RuntimeError):
    """The process ends, and with it the work."""


class Background:
    """A function that runs in a thread of its own; its error is kept for the one who waits."""

    def __init__(self, action: Callable[[], object], name: str) -> None:
        self._action = action
        self._error: BaseException | None = None
        # a daemon: the interpreter would wait for any other, although the process is to end after an error
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        _running.add(self)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns or raises at once."""
        return not self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """Of the work, if that has ended with one."""
        return self._error

    @property
    def is_good(self) -> bool:
        """Whether the work has ended without an error."""
        return self.is_done and self._error is None

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the end of the work, at most `timeout_s` seconds."""
        self._thread.join(timeout_s)

    def wait(self) -> None:
        """Wait for the end of the work. Raises its error."""
        self.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:  # torch's CheckpointException is not an Exception
            # without the frames' variables, which would keep alive what the action held
            self._error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
            traceback.clear_frames(error.__traceback__)
        finally:
            del self._action  # the same


def leave_if_ending() -> None:
    """Raise EndingError if the process is about to end. Long work calls it from time to time."""
    if _is_ending.is_set():
        raise EndingError("the process ends")


def _end() -> None:
    """A thread that is at work when the interpreter is taken down would abort the process."""
    _is_ending.set()
    for work in list(_running):
        work.join()


_running: weakref.WeakSet[Background] = weakref.WeakSet()
_is_ending = threading.Event()
atexit.register(_end)
