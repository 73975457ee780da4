"""Where this rank is: step, phase, layer, and the collectives that it has called; for reports about ranks that hang.

The training thread only appends to a bounded list of marks (`phase`, `forward`, `backward`). torch's Flight Recorder
keeps the last collectives of every group, over NCCL and over gloo, with the time of each call; other threads find the
mark of that time. So nothing is added to a collective, and no collective is wrapped.

The Flight Recorder is on unless TORCH_FR_BUFFER_SIZE is 0; it keeps 2,000 calls. It is read as JSON, never as the
pickles that torch writes on an NCCL time-out. Over gloo it has no messages between pipeline stages; there the stack of
the main thread says that it waits for one.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from bisect import bisect_right
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_PACKAGE = str(Path(__file__).parents[1])


class Mark(NamedTuple):
    """From `time_ns` (since the epoch) until the next mark."""

    time_ns: int
    step: int | None
    """Counted from 1, as in the log."""
    phase: str
    layer: int | None = None
    """Counted from 0 over the whole model."""

    def __str__(self) -> str:
        step = "" if self.step is None else f"step {self.step}, "
        return step + self.phase + ("" if self.layer is None else f" of layer {self.layer}")


_marks: deque[Mark] = deque([Mark(0, None, "start")], maxlen=4096)
"""A step of 100 layers and 16 micro-batches leaves 3,200."""
_step: int | None = None


def phase(name: str, step: int | None = None) -> None:
    """This rank begins `name`, in step `step` or in none."""
    global _step
    _step = step
    _marks.append(Mark(time.time_ns(), step, name))


def forward(layer: int) -> None:
    """This rank begins the forward pass of a layer."""
    _marks.append(Mark(time.time_ns(), _step, "forward", layer))


def backward(layer: int, gradient: object = None) -> None:
    """This rank begins the backward pass of a layer. As a hook of the layer's output, it gets the gradient."""
    _marks.append(Mark(time.time_ns(), _step, "backward", layer))


def place() -> Mark:
    """Where the training thread is."""
    return _marks[-1]


class Call(NamedTuple):
    """A collective that this rank has called, or a message between two ranks (number 0)."""

    group: str
    """Unique in the job."""
    description: str
    number: int
    """Counted in the group, from 1: the same collective has the same number on all its ranks."""
    operation: str
    """Such as all_reduce [8, 4] Float."""
    time_ns: int
    timeout_s: float
    is_waiting: bool


def calls() -> list[Call]:
    """The last calls, oldest first; [] if torch records none."""
    record = _flight_record()
    return [_call(entry) for entry in json.loads(record)["entries"]] if record else []


def _flight_record() -> bytes | None:
    """torch's record as JSON, of format 2.x. The one over NCCL exists in builds with CUDA only."""
    if not dist.is_initialized():
        return None
    name = "_dump_nccl_trace_json" if dist.get_backend() == "nccl" else "_dump_fr_trace_json"
    dump = getattr(torch._C._distributed_c10d, name, None)
    return None if dump is None else dump()


def _call(entry: dict[str, Any]) -> Call:
    name = str(entry["profiling_name"])
    library, _, operation = name.rpartition(":")
    sizes = " ".join(map(str, entry["input_sizes"])) + (" " + entry["input_dtypes"][0] if entry["input_dtypes"] else "")
    # over gloo, which has no events, a call that has ended is only marked as retired; over NCCL one that has timed out
    # is retired too
    is_done = entry["state"] == "completed" or (entry["retired"] and library == "gloo")
    return Call(
        entry["process_group"][0],
        entry["process_group"][1],
        0 if entry["is_p2p"] else entry["collective_seq_id"],
        f"{operation} {sizes}".strip(),
        entry["time_created_ns"],
        entry["timeout_ms"] / 1000,
        not is_done,
    )


def is_quiet(limit_s: float) -> bool:
    """Whether the training thread has left no mark for half of a time-out."""
    return time.time_ns() - place().time_ns > limit_s / 2 * 1e9


def waits() -> str | None:
    """What this rank has waited for during more than half of the time-out of the call; None if it does not wait. Call
    it only if `is_quiet`: it takes a tenth of a second."""
    now = time.time_ns()
    for call in calls():
        if call.is_waiting and now - call.time_ns > call.timeout_s / 2 * 1e9:
            return f"{call.operation} of {call.description}"
    return "a message of another pipeline stage" if _is_in_exchange() else None


def account() -> dict[str, Any]:
    """What this rank tells about itself, as JSON: `place`, `at` (the function of this project that runs), `waits` for a
    message of another stage, and for each group its last calls, with the group's ranks where it waits."""
    marks = _marks.copy()
    times, groups = [mark.time_ns for mark in marks], dict[str, dict[str, Any]]()
    for call in calls():
        group = groups.setdefault(call.group, {"description": call.description, "calls": []})
        where = str(marks[max(bisect_right(times, call.time_ns) - 1, 0)])
        group["calls"] = [*group["calls"][1 - LAST_CALLS :], [call.number, call.operation, where, call.is_waiting]]
    names = distributed_c10d._world.pg_names  # of the groups that this rank belongs to
    members = {str(names[group]): [*ranks] for group, ranks in _ranks_of_groups() if group in names}
    for name, group in groups.items():
        if any(is_waiting for *_, is_waiting in group["calls"]):
            group["ranks"] = sorted(members.get(name, ()))
    return {"place": str(place()), "at": _function(), "is_in_exchange": _is_in_exchange(), "groups": groups}


LAST_CALLS = 16
"""Of each group in an account: some kilobytes per rank of a job of thousands."""


def _ranks_of_groups() -> list[tuple[dist.ProcessGroup, dict[int, int]]]:
    return list(distributed_c10d._world.pg_group_ranks.items())


def _is_in_exchange() -> bool:
    """Whether the main thread is in core's messages between pipeline stages."""
    return any(name.endswith("p2p_communication.py") for name, _, _ in _stack())


def _function() -> str:
    """The innermost function of this project in which the main thread is."""
    for file, line, function in _stack():
        if file.startswith(_PACKAGE):
            return f"{function}, {Path(file).name}:{line}"
    return ""


def _stack() -> list[tuple[str, int, str]]:
    """(file, line, function) of the main thread, innermost first."""
    frame, found = sys._current_frames().get(threading.main_thread().ident or 0), []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found
