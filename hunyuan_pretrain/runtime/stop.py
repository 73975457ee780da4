"""Stop requests: SIGTERM, SIGUSR1, Ctrl-C, or a closing terminal, remembered until the run can stop.

Imports little more than the standard library, so that a command can listen from its start, before torch is imported.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import sys
import threading
import time
from functools import partial
from types import FrameType

from hunyuan_pretrain.config.exit_status import COMMAND, EXIT_INTERRUPTED, STOP_SIGNALS, STOPPED_BEFORE_FIRST_STEP


class StoppedBeforeFirstStepError(Exception):
    """Raised on all ranks if a stop is requested before the first step since the start, when there is nothing to
    save."""

    def __init__(self) -> None:
        super().__init__(STOPPED_BEFORE_FIRST_STEP)


class StopRequest:
    """Remembers a stop request. A second Ctrl-C ends the process at once with status 130, without saving."""

    def __init__(self) -> None:
        self.is_asked = False
        self.terminated_at = -math.inf
        """When SIGTERM came (time.monotonic)."""
        self._pid = os.getpid()
        self._interrupts = 0

    def _listen(self) -> None:
        # A thread also reads the signal numbers, because Python runs handlers only between bytecodes of the main
        # thread: if that waits in a collective for a dead rank, it would never see the second Ctrl-C.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        threading.Thread(target=self._watch, args=(reader,), name="stop", daemon=True).start()
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # A terminal and a launcher send signals to a rank and to everything that it has forked, such as the workers of
        # a tool or a compiler. Those inherit the pipe, so one Ctrl-C would be read as several.
        os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a background job of a script
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        if number == signal.SIGTERM:
            self.terminated_at = time.monotonic()

    def _watch(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if number == signal.SIGINT and signal.getsignal(number) == self._ask:
                    self._interrupts += 1
                    if self._interrupts > 1:
                        os._exit(EXIT_INTERRUPTED)
                    if int(os.environ.get("RANK", "0")) == 0:
                        _say(
                            "\nCtrl-C: stopping after a step that is saved; Ctrl-C again ends at once, without saving\n"
                        )


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(2, text.encode())


def listen() -> StopRequest:
    """The stop request of this process, which listens from the first call on. The first call must come from the main
    thread. Ignored signals stay ignored."""
    global _request
    if _request is None or _request._pid != os.getpid():
        _request = StopRequest()
        _request._listen()
    return _request


_request: StopRequest | None = None


def seconds_since_sigterm() -> float:
    """How long ago this process was sent SIGTERM; infinity if it was not, or does not listen."""
    return math.inf if _request is None else time.monotonic() - _request.terminated_at


def resume_command() -> str:
    """The command that continues this run: what the launcher says, else how this process was started."""
    if told := os.environ.get(COMMAND):
        return told
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "the same torchrun command"
    if os.path.basename(sys.argv[0]) in ("hunyuan-pretrain", "__main__.py"):
        return shlex.join(["hunyuan-pretrain", *sys.argv[1:]])
    return shlex.join(sys.orig_argv)
