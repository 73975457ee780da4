"""Special cases when the command is one of several ranks: its environment, its errors, its exit."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets for each rank."""
IN_RANKS = ("train", "parity", "shadow", "evaluate", "long-context", "bits-per-byte")
"""Commands that a launcher may start as the ranks of a job. `plan --calibrate` is one too."""

SECONDS_FOR_RANK_0 = 20
"""How long other ranks hold back an error, so that rank 0 can print the same one."""


def is_first_rank() -> bool:
    """Whether this process is rank 0, or no rank."""
    return int(os.environ.get("RANK", "0")) == 0


def report_error(error: Exception | str) -> None:
    """Print a user's error, once per job: nearly every such error occurs on all ranks.

    A launcher stops the whole job as soon as one rank fails, so the other ranks give rank 0 time to print. A rank that
    is still running after that has an error that rank 0 does not have, such as a file missing on its node, and prints
    it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # sent by the launcher as soon as rank 0 has exited
        time.sleep(SECONDS_FOR_RANK_0)
        print(f"rank {rank}: {error}", file=sys.stderr)
    else:
        print(error, file=sys.stderr)


def report_failure(error: Exception) -> None:
    """Print the traceback of an error and the rank. If the error is only that another rank has ended, print one line:
    the cause is in that rank's output."""
    text = "".join(traceback.format_exception(error))
    if "RANK" in os.environ:
        rank = f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}"
        text = f"{rank} ends: {lost}\n" if (lost := loss_of_a_rank(error)) else f"{rank} failed:\n{text}"
    print(text, end="", file=sys.stderr, flush=True)  # in one write, because several ranks share the output


def loss_of_a_rank(error: Exception) -> str | None:
    """A message that says where this rank noticed that another rank has ended; None for any other error."""
    if "torch.distributed" not in sys.modules:
        return None
    from hunyuan_pretrain.parallel.signs_of_life import is_loss_of_a_rank

    if not is_loss_of_a_rank(error):
        return None
    package = str(Path(__file__).parents[1])
    place = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)][-1]
    return (
        f"another rank has ended ({place.name}, {Path(place.filename).name}:{place.lineno}, got no answer from it); "
        "the same command resumes from the newest checkpoint"
    )


def leave(status: int) -> NoReturn:
    """End this process, immediately if it is one of several ranks.

    A normal Python exit would shut down the process groups and wait for the other ranks, which may be waiting for this
    one in a collective.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def mistake_in_environment(arguments: Sequence[str]) -> str | None:
    """An error message if only some of the launcher's variables (JOB) are set; None if they are consistent. For
    commands that do not run as ranks, the variables are removed from the environment. `arguments`: of the program.

    A launcher sets all of JOB. If only some are set, they are left over from elsewhere, and guessing would mean waiting
    for ranks that never start, or training each rank as a separate run.
    """
    command = next(iter(arguments), None)
    is_measured = command == "plan" and any(text.partition("=")[0] == "--calibrate" for text in arguments)
    if command not in IN_RANKS and not is_measured:
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
        f"start ranks with launch/train.sh or torchrun, or unset {' '.join(there)}"
    )
