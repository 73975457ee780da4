"""Saves checkpoints while training goes on.

Training waits for the copy of the state to host memory only (`Saver.begin`). Then a thread on each rank writes that
rank's part and a report, and once all reports are there a thread on rank 0 makes one checkpoint of them: it writes
complete.json last, and gives the folder its final name, if the run directory is still this run's.

The threads do not communicate, so a checkpoint becomes complete also where the ranks' main threads end with an error,
or wait for one that did (`Saver.rescue`). Each step sums over all ranks how far they are (`Saver.progress`,
`Saver.after_step`), in a message that it sends anyway, so all ranks take the same decision after the same step, and a
rank that dies is noticed as in any step. To save and wait is the same, with the wait at once (`save`).
"""

from __future__ import annotations

import io
import math
import os
import shutil
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

# isort: split
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.optimizer import MegatronOptimizer

from hunyuan_pretrain.checkpoint import CheckpointError, folders
from hunyuan_pretrain.checkpoint.folders import checkpoint_folder
from hunyuan_pretrain.checkpoint.host_memory import HostMemory
from hunyuan_pretrain.checkpoint.joined_parts import JoinedParts
from hunyuan_pretrain.checkpoint.optimizer_state import Stage, bytes_on_host, state_on_host
from hunyuan_pretrain.checkpoint.parallel_write import REPORTS, Blob, Item, Shard, write_part
from hunyuan_pretrain.checkpoint.retention import remove_old
from hunyuan_pretrain.checkpoint.run_state import generator_object, scaling_recipe, sharded_scales
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel import groups, whereabouts
from hunyuan_pretrain.parallel.agreement import error_of_rank_0, first_error, from_rank_0, patience, reason_of
from hunyuan_pretrain.runtime.background import Background, leave_if_ending
from hunyuan_pretrain.runtime.lock import RunLock

LOOK_S = 1.0
"""Seconds between two looks for the reports of other ranks."""
LEAST_WAIT_S = 30.0
"""What a rank that ends gives the others at least to write their parts."""


class Saved(NamedTuple):
    """A checkpoint that is complete."""

    folder: Path
    copy_seconds: float
    """How long `begin` took."""
    seconds: float
    """From its beginning until it was complete on this rank."""
    notes: tuple[str, ...]
    """Log lines of rank 0."""


def save(
    run_dir: Path,
    step: int,
    chunks: list[HunyuanModel],
    optimizer: MegatronOptimizer,
    keep_last: int | None,
    record: Mapping[str, Any] | None = None,
    keep_every_steps: int | None = None,
) -> Path:
    """`Saver.begin`, and wait for the checkpoint."""
    saver = Saver(chunks, optimizer)
    saver.begin(run_dir, step, keep_last, record, keep_every_steps)
    saved = saver.finish()
    assert saved is not None
    return saved.folder


class Saver:
    """The saves of a run, of which at most one is in flight."""

    def __init__(self, chunks: list[HunyuanModel], optimizer: MegatronOptimizer, lock: RunLock | None = None) -> None:
        """lock: on rank 0, that of the run directory; only a process that holds it makes a checkpoint complete."""
        self._chunks, self._optimizer, self._lock = chunks, optimizer, lock
        self._memory = HostMemory(next(chunks[0].parameters()).device)
        self._joined = JoinedParts()
        self._flight: _Flight | None = None
        self._preparing: Background | None = None

    def prepare(self) -> None:
        """Allocate the host memory in a thread: during the first copy it would take longer than the copy."""
        num_bytes = bytes_on_host(self._chunks)

        def allocate() -> None:
            self._memory.reserve(num_bytes)
            self._memory.touch()

        self._preparing = Background(allocate, "checkpoint memory")

    def begin(
        self,
        run_dir: Path,
        step: int,
        keep_last: int | None,
        record: Mapping[str, Any] | None = None,
        keep_every_steps: int | None = None,
    ) -> None:
        """Copy the state after `step` steps to host memory, and start to write it. No other save may be in flight.

        record: a JSON object that complete.json holds beside what this module needs. keep_last, keep_every_steps: which
        of the complete checkpoints up to this one are kept once it is complete (`retention.to_remove`).

        Communicates: all ranks. Raises CheckpointError on every rank, with the first failing rank's reason, if any rank
        cannot copy. Nothing of the attempt then remains, and older checkpoints are untouched.
        """
        assert self._flight is None, "finish the save before"
        whereabouts.phase("copy for a checkpoint", step)
        kept = keep_last, keep_every_steps
        content = {**(record or {}), **_description(step, self._chunks[0])}
        flight = _Flight(run_dir, step, kept, content, self._lock)
        made: dict[str, Stage] = {}
        with patience():
            error = (
                flight.make_folder()
                # before the first collective of the copy: a rank that is out of memory fails here
                or first_error(lambda: made.update(stage=self._room()))
                or first_error(lambda: flight.items.extend(self._copy(made["stage"])))
            )
            if error is not None:
                raise flight.failed(error)
        flight.start(self._joined)
        self._flight = flight

    def note(self) -> str | None:
        """For the log: on which rank, the first if there are several, copies to host memory are slower than they could
        be, and why; None if on none. Communicates: all ranks."""

        def say() -> None:
            if self._memory.note is not None:
                raise CheckpointError(f"rank {dist.get_rank()}: {self._memory.note}")

        return first_error(say)

    @property
    def progress(self) -> int:
        """What this rank adds to the number that all ranks sum in the next step: 1 once its part is written or has
        failed, and on rank 0 the number of ranks once the checkpoint is complete or has failed."""
        return 0 if self._flight is None else self._flight.progress

    def after_step(self, step: int, total: int) -> bool:
        """Whether the save in flight has ended, so that `finish` does not wait.

        total: the sum of all ranks' `progress` when they launched step `step` (counted from 0). All ranks call this
        with the same numbers, and are given the same answer.
        """
        flight, ranks = self._flight, dist.get_world_size()
        if flight is None or step < flight.step:  # of an earlier save
            return False
        if total >= ranks:  # all parts have ended
            flight.parts_have_ended()
        return total == 2 * ranks

    def finish(self) -> Saved | None:
        """Wait for the save in flight. None: there is none.

        Communicates: all ranks, if there is one. Raises CheckpointError on every rank, with the first failing rank's
        reason, if any rank could not write. Nothing of the attempt then remains, and older checkpoints are untouched.
        """
        flight = self._flight
        if flight is None:
            return None
        whereabouts.phase("wait for a checkpoint to be written", flight.step)
        with patience():
            error = first_error(flight.wait_for_part) or error_of_rank_0(flight.wait_for_commit)
            self._flight = None  # not before: if the ranks could not agree, it can still be rescued
            if error is not None:
                raise flight.failed(error)
        return flight.saved()

    def rescue(self) -> Saved | None:
        """End the save in flight without communication, because the run ends with an error. None: there is none, or
        this is not rank 0.

        Each rank writes its part to the end and then waits until the checkpoint is complete, since a launcher ends the
        other ranks soon after the first one. Rank 0 gives the save up if a report is missing for as long as it took to
        write its own part (LEAST_WAIT_S at least), and raises CheckpointError. What was written is then removed.
        """
        flight, self._flight = self._flight, None
        return None if flight is None else flight.end_alone()

    def free_memory(self) -> None:
        """Free the host memory; the next save allocates it again."""
        assert self._flight is None, "the save in flight still reads it"
        self._memory = HostMemory(next(self._chunks[0].parameters()).device)

    def _room(self) -> Stage:
        """Host memory, if it is being prepared, and device memory for the copy."""
        preparing, self._preparing = self._preparing, None
        if preparing is not None:
            preparing.join()  # if it has failed, the copy tries again
        self._memory.reserve(bytes_on_host(self._chunks))
        return Stage(self._chunks)

    def _copy(self, stage: Stage) -> list[Item]:
        """What this rank writes, in host memory."""
        items: list[Item] = []
        for key, tensor, placement, _ in state_on_host(self._chunks, self._optimizer, stage, self._memory):
            whole = tensor.view(placement.local_shape)
            for part in placement.parts:
                offset = tuple(slice_.start for slice_ in part.whole)
                items.append(Shard(key, placement.whole_shape, offset, whole[part.local]))
        for scale in sharded_scales(self._chunks).values():
            if is_main_replica(scale.replica_id):
                assert scale.data is not None
                on_host = scale.data.detach().to("cpu", copy=True)
                items.append(Shard(scale.key, tuple(scale.global_shape), tuple(scale.global_offset), on_host))
        generators, content = generator_object(), io.BytesIO()
        torch.save([generators.data], content)  # a list, as core reads it
        return [*items, Blob(generators.unique_key, content.getvalue())]


class _Flight:
    """One save, from its beginning until it is complete or has failed."""

    def __init__(
        self,
        run_dir: Path,
        step: int,
        kept: tuple[int | None, int | None],
        content: dict[str, Any],
        lock: RunLock | None,
    ) -> None:
        self.step, self.items = step, list[Item]()
        self._run_dir, self._kept, self._content, self._lock = run_dir, kept, content, lock
        self._folder = checkpoint_folder(run_dir, step)
        self._partial = folders.partial_folder(self._folder)  # rank 0's, once it is made
        self._part: Background | None = None
        self._commit: Background | None = None
        self._parts_have_ended, self._is_given_up, self._give_up_at = threading.Event(), False, math.inf
        self._notes: list[str] = []
        self._began, self._copied, self._written_in = time.perf_counter(), 0.0, 0.0

    def make_folder(self) -> str | None:
        """Make the folder of this attempt. Returns why it cannot be made. Communicates: all ranks."""

        def make() -> str:
            (self._partial / REPORTS).mkdir(parents=True)
            return self._partial.name

        name, error = from_rank_0(make)
        self._partial = self._folder.with_name(name or self._partial.name)
        return error

    def start(self, joined: JoinedParts) -> None:
        """Write this rank's part, in a thread; on rank 0, another makes the checkpoint complete."""
        rank, ranks, items, self.items = dist.get_rank(), dist.get_world_size(), self.items, []
        self._joined, self._copied = joined, time.perf_counter() - self._began
        began = time.perf_counter()

        def write() -> None:
            write_part(self._partial, rank, items)
            self._written_in = time.perf_counter() - began

        self._part = Background(write, "checkpoint")
        if rank == 0:
            self._commit = Background(lambda: self._make_complete(ranks), "checkpoint commit")

    @property
    def progress(self) -> int:
        part, commit = self._part, self._commit
        is_written = part is not None and part.is_done
        return int(is_written) + (dist.get_world_size() if commit is not None and commit.is_done else 0)

    def parts_have_ended(self) -> None:
        """The parts of all ranks are written, or have failed: nobody need wait for a report."""
        self._parts_have_ended.set()

    def wait_for_part(self) -> None:
        assert self._part is not None
        self._part.wait()

    def wait_for_commit(self) -> None:
        """Only on rank 0, after the parts of all ranks."""
        self.parts_have_ended()
        assert self._commit is not None
        self._commit.wait()

    def failed(self, error: str) -> CheckpointError:
        """Remove what was written. Communicates: all ranks, whose parts have ended."""
        error_of_rank_0(self._remove)
        return self._error(error)

    def end_alone(self) -> Saved | None:
        """See `Saver.rescue`."""
        assert self._part is not None
        timeout = groups.collective_timeout() or timedelta(seconds=LEAST_WAIT_S)
        end = time.monotonic() + timeout.total_seconds()
        self._part.join(timeout.total_seconds())
        if self._commit is None:
            while self._part.is_good and os.path.exists(self._partial) and time.monotonic() < end:
                time.sleep(LOOK_S)
            return None
        others_take = max(self._written_in, LEAST_WAIT_S) if self._part.is_good else 0.0
        self._give_up_at = time.monotonic() + others_take
        self._commit.join()
        if self._commit.is_good:
            return self.saved()
        error = self._part.error or self._commit.error
        assert error is not None
        self._remove()
        raise self._error(reason_of(error))

    def _remove(self) -> None:
        self._is_given_up = True
        if self._commit is not None:
            self.parts_have_ended()
            self._commit.join()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folder}: the checkpoint could not be written: {reason}; older checkpoints are untouched"
        )

    def saved(self) -> Saved:
        return Saved(self._folder, self._copied, time.perf_counter() - self._began, tuple(self._notes))

    def _make_complete(self, ranks: int) -> None:
        self._wait_for_reports(ranks)
        files = self._joined.join(self._partial, ranks)
        folders.write_marker(self._partial, {**self._content, "files": files})
        self._refuse_to_change_the_run()
        # from here on this checkpoint is there, whatever fails
        if (unflushed := folders.put_in_place(self._partial, self._folder)) is not None:
            self._notes.append(f"WARNING: {self._folder} may lose its name if power fails now: {reason_of(unflushed)}")
        try:
            self._refuse_to_change_the_run()
            remove_old(self._run_dir, self.step, *self._kept)
        except (OSError, CheckpointError) as error:
            self._notes.append(f"WARNING: an older checkpoint cannot be removed: {reason_of(error)}")

    def _refuse_to_change_the_run(self) -> None:
        """Raise CheckpointError if this attempt was given up, or if another process has the run directory."""
        if self._is_given_up:
            raise CheckpointError("the save was given up")
        if self._lock is not None and not self._lock.is_held():
            raise CheckpointError(f"{self._lock.path} says that {self._run_dir} is another process's by now")

    def _wait_for_reports(self, ranks: int) -> None:
        """Until all are there, or it is known that the parts have ended. Raises CheckpointError if it is given up."""
        while not self._parts_have_ended.wait(LOOK_S):
            leave_if_ending()
            try:
                there = set(os.listdir(self._partial / REPORTS))
            except OSError:
                there = set()  # the next look may be answered
            missing = [rank for rank in range(ranks) if f"{rank}.json" not in there]
            if not missing:
                return
            if time.monotonic() > self._give_up_at:
                others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise CheckpointError(f"no report of rank {missing[0]}{others} when the run ended")


def _description(step: int, model: HunyuanModel) -> dict[str, Any]:
    return {
        "step": step,
        "world_size": dist.get_world_size(),
        "layout": _layout(model),
        "model": model.config.model.model_dump(),
        "dtype": str(model.config.params_dtype),
        "fp8_scaling": scaling_recipe(model),
        "torch": torch.__version__,
    }


def _layout(model: HunyuanModel) -> str:
    """The layout as `parity --layout` spells it: the sizes that are not 1, or dp=1 if all are."""
    groups = model.groups
    sizes = {"tp": groups.tp, "pp": groups.pp, "cp": groups.cp, "dp": groups.dp, "ep": groups.ep}
    return ",".join(f"{axis}={group.size()}" for axis, group in sizes.items() if group.size() > 1) or "dp=1"
