"""torchrun, but with a requested stop distinguished from a failure.

On SIGTERM, torchrun forwards the signal, kills the ranks that are still alive after 30 seconds, and exits with a
traceback and status 1, as after a crash; SIGUSR1 kills it. Here a SIGTERM, a SIGUSR1, a Ctrl-C or a hangup of the
terminal is forwarded as SIGTERM, and the ranks get all the time that a checkpoint takes. If they save and exit with
status 75, so does this program. A second Ctrl-C kills the ranks and exits with 130.

For any other failure the ranks have already printed the reason. This program only adds a line per failed rank, instead
of torchrun's report, and adds nothing after a user's mistake (status 2).
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from hunyuan_pretrain.config.exit_status import (
    EXIT_INTERRUPTED,
    EXIT_MISTAKE,
    EXIT_STOPPED,
    STOP_SIGNALS,
    STOPPED_BEFORE_FIRST_STEP,
)

LINGER_S = 10


class Stop:
    """Forwards requests to stop to the ranks. It listens before torch is imported, which takes seconds; until
    `children` is set there are no ranks."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.children: Callable[[], list[Any]] | None = None

    def listen(self) -> None:
        """Install the signal handlers; ignored signals (nohup) stay ignored."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)
        if self.children is None:
            print(STOPPED_BEFORE_FIRST_STEP, flush=True)
            os._exit(EXIT_STOPPED)  # an import in progress could swallow an exception
        ranks = self.children()
        if self.asked.count(signal.SIGINT) > 1:
            for rank in ranks:
                rank.kill()
            os._exit(EXIT_INTERRUPTED)
        if not ranks:  # torchrun waits for other nodes
            print(STOPPED_BEFORE_FIRST_STEP, flush=True)
            sys.exit(EXIT_STOPPED)
        if number == signal.SIGINT:
            print(
                "\nCtrl-C: the ranks save after this step and stop; Ctrl-C again kills them at once, without saving",
                file=sys.stderr,
            )
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)


def run_ranks(arguments: list[str], stop: Stop, restarts: int = 0) -> int:
    """Run the ranks described by torchrun's arguments. Returns 0, 75 if they were stopped and saved, 2 after a user's
    mistake, 1 if a rank failed, or 128 + N if torchrun itself got signal N.

    Ranks that failed are started again up to `restarts` times, and resume from the newest good checkpoint. torchrun's
    own --max-restarts would do so after a stop and after a mistake too.
    """
    for done in range(restarts + 1):
        status = _run_once(arguments, stop)
        if status != 1 or stop.asked or done == restarts:
            break
        print(f"launch/train.sh: starts the ranks again ({done + 1} of at most {restarts})", file=sys.stderr)
    return status


def _run_once(arguments: list[str], stop: Stop) -> int:
    import psutil
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    settings = run.parse_args(arguments)
    # torchrun's own handlers would shut the ranks down instead of waiting for them
    settings.signals_to_handle = "SIGQUIT"
    stop.children = psutil.Process().children
    if (port := meeting_port(settings)) is not None and is_taken(port):
        print(
            f"launch/train.sh: MASTER_PORT={port} is in use on this node: set it to a free port, the same on all nodes",
            file=sys.stderr,
        )
        return EXIT_MISTAKE
    # `report` prints how the ranks ended
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.run(settings)
    except SignalException as error:
        return 128 + int(error.sigval)
    except (DistError, RendezvousError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        place = settings.rdzv_endpoint or f"{settings.master_addr}:{settings.master_port}"
        print(
            f"launch/train.sh: no rendezvous with the other nodes at {place} (MASTER_ADDR, MASTER_PORT): {reason}",
            file=sys.stderr,
        )
        return 1
    except ChildFailedError as error:
        if not was_stopped((failure.exitcode for failure in error.failures.values()), bool(stop.asked)):
            return report({rank: failure.exitcode for rank, failure in error.failures.items()})
        print("the ranks were told to stop and have lost nothing: the same command resumes from there", flush=True)
        if settings.nnodes != "1":
            # This node may host the store that the other nodes' launchers poll until their own ranks have exited;
            # `error` keeps it alive.
            time.sleep(LINGER_S)
        return EXIT_STOPPED
    return 0


def report(statuses: dict[int, int]) -> int:
    """Print how each failed rank ended; returns this program's exit status."""
    # torchrun terminated the ranks with SIGTERM after another one had failed
    own = {rank: status for rank, status in statuses.items() if status != -signal.SIGTERM} or statuses
    if set(own.values()) == {EXIT_MISTAKE}:
        return EXIT_MISTAKE
    for rank, status in sorted(own.items()):
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        hint = " (out of memory?)" if status == -signal.SIGKILL else "; see its output above"
        print(f"launch/train.sh: rank {rank} {how}{hint}", file=sys.stderr)
    return 1


def meeting_port(settings: Any) -> int | None:
    """The port on which this node waits for the others; None if another node hosts the rendezvous, and for a single
    node, which takes any free port."""
    if settings.standalone:
        return None
    if settings.rdzv_backend == "static":
        return int(settings.master_port) if int(settings.node_rank) == 0 else None
    return int(settings.rdzv_endpoint.rpartition(":")[2]) if "is_host=true" in settings.rdzv_conf else None


def is_taken(port: int) -> bool:
    """Whether a program on this machine listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def was_stopped(statuses: Iterable[int], is_asked: bool = False) -> bool:
    """Whether the nonzero exit statuses of the ranks mean a stop: a rank exits with 75 only after all ranks have saved.

    Other ranks may still be shutting down when the first has exited; torchrun then terminates them, with status -15.
    All have that status, or another signal's that Slurm sends to every process of a step, if a requested stop
    (`is_asked`) reached them before they had installed their handlers.
    """
    found, early = set(statuses), STOP_SIGNALS if is_asked else (signal.SIGTERM,)
    return (EXIT_STOPPED in found or is_asked) and found <= {EXIT_STOPPED, *(-number for number in early)}
