"""Special cases when the command is one of several ranks: its environment, its errors, its exit."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hunyuan_pretrain.config.exit_status import LAUNCHER
from hunyuan_pretrain.runtime.stop import seconds_since_sigterm

JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets for each rank."""
IN_RANKS = ("train", "parity", "shadow", "evaluate", "long-context", "bits-per-byte")
"""Commands that a launcher may start as the ranks of a job. So are `plan --calibrate` and `doctor --cluster`."""

SECONDS_FOR_RANK_0 = 20
"""How long other ranks hold back an error, so that rank 0 can print the same one."""
SECONDS_TO_ASK = 2.0
"""How long a rank that has lost another one waits for the answers of the others."""


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
        if seconds_since_sigterm() < SECONDS_FOR_RANK_0:  # it has been
            signal.raise_signal(signal.SIGTERM)
        time.sleep(SECONDS_FOR_RANK_0)
        print(f"rank {rank}: {error}", file=sys.stderr)
    else:
        print(error, file=sys.stderr)


def report_failure(error: Exception) -> None:
    """Print the traceback of an error and the rank, and tell the other ranks, which then name this one. If the error is
    only that another rank has ended or has not answered, print that, and what the ranks find out about it."""
    text = "".join(traceback.format_exception(error))
    if "RANK" in os.environ:
        rank = f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}"
        text = f"{rank} ends: {lost}\n" if (lost := loss_of_a_rank(error)) else f"{rank} failed:\n{text}"
        if lost is None and (inquiry := _inquiry()) is not None:
            inquiry.failed(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300])
    print(text, end="", file=sys.stderr, flush=True)  # in one write, because several ranks share the output


def loss_of_a_rank(error: Exception) -> str | None:
    """A message that says where this rank noticed that another rank has ended or hangs, and which; None for any other
    error. Takes up to some seconds."""
    if "torch.distributed" not in sys.modules:
        return None
    from hunyuan_pretrain.parallel.signs_of_life import is_loss_of_a_rank, is_time_out

    if is_loss_of_a_rank(error):
        what = "another rank has ended"
    elif is_time_out(error):
        what = "another rank has not answered within runtime.distributed_timeout_s"
    else:
        return None
    package = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    place = ([frame for frame in frames if frame.filename.startswith(package)] or frames)[-1]
    inquiry = _inquiry()
    report = inquiry.ask(SECONDS_TO_ASK) if inquiry is not None else []
    head = (
        f"{what} ({place.name}, {Path(place.filename).name}:{place.lineno}, got no answer from it); "
        "the same command resumes from the newest checkpoint"
    )
    return "\n  ".join([head, *report])


def _inquiry() -> Any:
    """This rank's part in inquiries, if it has joined a job."""
    module = sys.modules.get("hunyuan_pretrain.parallel.inquiry")
    return module.current() if module is not None else None


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


def end_with_launcher() -> None:
    """Make the kernel kill this process, if it is one of several ranks, when the launcher that started it is gone
    (Linux only).

    A launcher that is killed by SIGKILL cannot end its ranks. They would train on, hold the GPUs and the lock of the
    run directory, and meet the ranks of the job that is started again. What they have not saved is lost, as with any
    kill.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if "LOCAL_RANK" not in os.environ or prctl is None:
        return
    PR_SET_PDEATHSIG = 1  # from sys/prctl.h
    prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    launcher = os.environ.get(LAUNCHER, "")
    if launcher and launcher != str(os.getppid()) and not Path("/proc", launcher).exists():  # it was gone before that
        os._exit(1)


def mistake_in_environment(arguments: Sequence[str]) -> str | None:
    """An error message if only some of the launcher's variables (JOB) are set; None if they are consistent. For
    commands that do not run as ranks, the variables are removed from the environment. `arguments`: of the program.

    A launcher sets all of JOB. If only some are set, they are left over from elsewhere, and guessing would mean waiting
    for ranks that never start, or training each rank as a separate run.
    """
    command = next(iter(arguments), None)
    option = {"plan": "--calibrate", "doctor": "--cluster"}.get(command or "")
    is_measured = any(text.partition("=")[0] == option for text in arguments)
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
