"""torchrun, except that a stop that was asked for is told apart from a failure. Takes torchrun's arguments.

torchrun answers a SIGTERM by passing it on, killing what has not ended after 30 seconds, and ending with a traceback and status 1, as
after a crash. Here a SIGTERM, a Ctrl-C or the end of the terminal is passed on as SIGTERM and the ranks are given all the time that a
checkpoint takes; if they saved and left with status 75, so does this program. A second Ctrl-C kills the ranks and ends with 130. Every
other end is torchrun's own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

EXIT_STOPPED = 75
"""Status of a rank that was told to stop and has lost nothing (hunyuan_pretrain.runtime.stop.EXIT_STOPPED)."""
EXIT_INTERRUPTED = 130

LINGER_S = 10
STOPPED_BEFORE_START = "stopped before the first step; nothing to save: the same command starts again"


class Stop:
    """Passes on what asks for a stop. Listens before torch is imported, which takes seconds; until `children` is set there are no ranks."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.children: Callable[[], list[Any]] | None = None

    def listen(self) -> None:
        """From now on; signals that are ignored (nohup) stay so."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)
        ranks = self.children() if self.children else []
        if self.asked.count(signal.SIGINT) > 1:
            for rank in ranks:
                rank.kill()
            os._exit(EXIT_INTERRUPTED)
        if not ranks:
            if self.children:  # torchrun waits for other nodes
                print(STOPPED_BEFORE_START, flush=True)
                sys.exit(EXIT_STOPPED)
            return
        if number == signal.SIGINT:
            print("\nCtrl-C: the ranks stop after this step, which is saved; Ctrl-C again ends at once, without saving", file=sys.stderr)
        # torch would report the stop as a failure; a real one is still reported, by main.
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)


def main(arguments: list[str], stop: Stop) -> int:
    """Run the ranks; returns 0, or 75 if they were stopped and saved, or 1 if one failed, after torchrun's account of it."""
    import psutil
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    settings = run.parse_args(arguments)
    # torchrun's own handler would shut the ranks down instead of waiting for them.
    settings.signals_to_handle = "SIGQUIT"
    stop.children = psutil.Process().children
    if stop.asked:
        print(STOPPED_BEFORE_START, flush=True)
        return EXIT_STOPPED
    try:
        run.run(settings)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        if not was_stopped((failure.exitcode for failure in error.failures.values()), bool(stop.asked)):
            print(error, file=sys.stderr)
            return 1
        print("the ranks were told to stop and have lost nothing: the same command goes on from there", flush=True)
        if settings.nnodes != "1":
            # This node may hold the store that the other nodes' launchers ask for news until their own ranks have left; `error` keeps it.
            time.sleep(LINGER_S)
        return EXIT_STOPPED
    return 0


def was_stopped(statuses: Iterable[int], is_asked: bool = False) -> bool:
    """Whether the statuses of the ranks that did not end with 0 mean a stop: a rank leaves with 75 only after all ranks have saved.

    The others may still be on their way out when the first has left; torchrun then ends them, and their status is -15. All have that
    status if a stop that this launcher was asked for (`is_asked`) reached them before they were programs that listen.
    """
    found = set(statuses)
    return (EXIT_STOPPED in found or is_asked) and found <= {EXIT_STOPPED, -signal.SIGTERM}


if __name__ == "__main__":
    _stop = Stop()
    _stop.listen()
    sys.exit(main(sys.argv[1:], _stop))
