"""A stop that was asked for: SIGTERM, Ctrl-C, or a terminal that closes, remembered until there is a place to stop.

Needs little more than the standard library, so that a command listens from its first moments, before torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from functools import partial
from types import FrameType

from hunyuan_pretrain.config.exit_status import EXIT_INTERRUPTED, STOPPED_BEFORE_FIRST_STEP

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StoppedBeforeFirstStepError(Exception):
    """Raised on all ranks where a stop was asked for and no step of this start has been made, so that there is nothing
    to save."""

    def __init__(self) -> None:
        super().__init__(STOPPED_BEFORE_FIRST_STEP)


class StopRequest:
    """Remembers the first stop; a second Ctrl-C ends the process at once with status 130, without saving."""

    def __init__(self) -> None:
        self.is_asked = False
        self._pid = os.getpid()
        self._interrupts = 0

    def _listen(self) -> None:
        # A thread reads the numbers of signals too, because Python runs handlers between two operations of the main
        # thread only: one that waits in a collective for a rank that is gone would never see the second Ctrl-C.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        threading.Thread(target=self._watch, args=(reader,), name="stop", daemon=True).start()
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # A terminal and torchrun send a signal to a rank and to all that it has forked, such as the writers of a
        # checkpoint. These have the same pipe, where one Ctrl-C during a save would be read as several. They write to
        # the end, as the rank does.
        os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background of a script
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True

    def _watch(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if number == signal.SIGINT and signal.getsignal(number) == self._ask:
                    self._interrupts += 1
                    if self._interrupts > 1:
                        os._exit(EXIT_INTERRUPTED)
                    if int(os.environ.get("RANK", "0")) == 0:
                        _say(
                            "\nCtrl-C: stopping after this step, which is saved; Ctrl-C again ends at once, "
                            "without saving\n"
                        )


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, text.encode())


def listen() -> StopRequest:
    """The stop request of this process, listening from now on; the main thread calls it first. Signals that are ignored
    stay so."""
    global _request
    if _request is None or _request._pid != os.getpid():
        _request = StopRequest()
        _request._listen()
    return _request


_request: StopRequest | None = None
