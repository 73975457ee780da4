"""What is special where the command is one of several ranks: its place in the job, its errors, its end."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each rank in its environment."""
IN_RANKS = ("train", "parity", "shadow")
"""Commands that a launcher may start as the ranks of a job."""

SECONDS_FOR_RANK_0 = 20
"""How long another rank waits with its error for rank 0 to print the same."""


def report_error(error: Exception | str) -> None:
    """Print a user's error, once in a job: nearly every such error is found by every rank.

    A launcher stops the whole job as soon as one rank has failed, so the other ranks leave rank 0 the time to print.
    One that is still there after that met an error of its own (a file that only its node lacks, say), and prints it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's, as soon as rank 0 has ended
        time.sleep(SECONDS_FOR_RANK_0)
        print(f"rank {rank}: {error}", file=sys.stderr)
    else:
        print(error, file=sys.stderr)


def report_failure(error: Exception) -> None:
    """Print the traceback of an error, and of which rank it is; one line where all that happened is that another rank
    has ended, for what matters is said there."""
    text = "".join(traceback.format_exception(error))
    if "RANK" in os.environ:
        rank = f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}"
        text = f"{rank} ends: {lost}\n" if (lost := loss_of_a_rank(error)) else f"{rank} failed:\n{text}"
    print(text, end="", file=sys.stderr, flush=True)  # in one piece, for several ranks write to the same place


def loss_of_a_rank(error: Exception) -> str | None:
    """Where this rank was when it noticed that another one has ended; None for any other error."""
    if "torch.distributed" not in sys.modules:
        return None
    from hunyuan_pretrain.parallel.signs_of_life import is_loss_of_a_rank

    if not is_loss_of_a_rank(error):
        return None
    package = str(Path(__file__).parents[1])
    place = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)][-1]
    return (
        f"another rank has ended ({place.name}, {Path(place.filename).name}:{place.lineno}, got no answer from it); "
        "the same command goes on from the newest checkpoint"
    )


def leave(status: int) -> NoReturn:
    """End this process; at once where it is one of several ranks.

    The others may be waiting for it in a collective, and Python's own way out would leave its process groups in order:
    wait for them.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def mistake_in_environment(command: str | None) -> str | None:
    """What is wrong with the names that say which rank of a job this is; for commands that run alone they are
    forgotten.

    A launcher sets all of JOB. Some of them are left over from elsewhere, and to guess would be to wait for ranks that
    never come, or to take each rank for a run of its own.
    """
    if command not in IN_RANKS:
        for name in (*JOB[:2], "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return None
    there = [name for name in (*JOB, "LOCAL_RANK") if name in os.environ]
    missing = [name for name in JOB if name not in os.environ]
    if not missing or not {*JOB[:2], "LOCAL_RANK"} & set(there):
        return None
    found = ", ".join(f"{name}={os.environ[name]}" for name in there)
    return (
        f"the environment has {found}, but not {', '.join(missing)}: a launcher sets all of them for each rank; "
        f"start ranks with launch/train.sh, or unset {' '.join(there)}"
    )
