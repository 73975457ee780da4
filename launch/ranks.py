"""torchrun, except that a stop that was asked for is told apart from a failure. Takes torchrun's arguments.

torchrun answers a SIGTERM by passing it on, killing what has not ended after 30 seconds, and ending with a traceback and status 1, as
after a crash. Here a SIGTERM is passed on and the ranks are given all the time that a checkpoint takes; if they saved and left with
status 75, so does this program. Every other end is torchrun's own.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterable
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

EXIT_STOPPED = 75
"""Status of a rank that was told to stop and saved (hunyuan_pretrain.train.loop.EXIT_STOPPED)."""


LINGER_S = 10


def main(arguments: list[str]) -> int:
    """Run the ranks; returns 0, or 75 if they were stopped and saved. Raises torchrun's ChildFailedError if one failed."""
    settings = run.parse_args(arguments)
    # torchrun's own handler would shut the ranks down instead of waiting for them.
    settings.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    signal.signal(signal.SIGTERM, _pass_on)
    try:
        run.run(settings)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        if not was_stopped(failure.exitcode for failure in error.failures.values()):
            raise
        print("the ranks were told to stop and have saved: the same command goes on from there", flush=True)
        if settings.nnodes != "1":
            # This node may hold the store that the other nodes' launchers ask for news until their own ranks have left; `error` keeps it.
            time.sleep(LINGER_S)
        return EXIT_STOPPED
    return 0


def was_stopped(statuses: Iterable[int]) -> bool:
    """Whether the statuses of the ranks that did not end with 0 mean a stop: a rank leaves with 75 only after all ranks have saved.

    The others may still be on their way out when the first has left; torchrun then ends them, and their status is -15.
    """
    found = set(statuses)
    return EXIT_STOPPED in found and found <= {EXIT_STOPPED, -signal.SIGTERM}


def _pass_on(number: int, frame: FrameType | None) -> None:
    ranks = psutil.Process().children()
    if not ranks:
        sys.exit(128 + number)
    # torch would report the stop as a failure; a real one is still reported, by main.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    for rank in ranks:
        rank.send_signal(number)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
