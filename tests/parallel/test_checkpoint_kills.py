"""kill -9 of a rank at every write, flush, rename and removal of a save, and a disk that is full from any write on.

The ranks of a layout train for real, and copy their state for real. Then each case forks every rank: the forks write
the checkpoint as `Saver` does, and speak through a store, since connections of a process group do not survive a fork.
What is on disk afterwards is compared, byte for byte, with the checkpoint before and with one that was saved in peace.
At last both are loaded and trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.kills import Points
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "dp=2": (2, {}),
    "tp=2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp=2": (2, {"pipeline_model_parallel_size": 2}),
    "ep=2": (2, {"expert_model_parallel_size": 2}),
}
SMALL_BUFFER = 1 << 14
"""Bytes that reach the operating system at once: more writes, and so more points, than with the real one."""
BEFORE, SAVED, LAST = 1, 2, 3
"""Steps: of the checkpoint before, of the one that is disturbed, and of the comparison."""


class Case:
    """One disturbed save on one layout."""

    def __init__(self, number: int, is_async: bool, victim: int, at: int, is_full: bool) -> None:
        self.number, self.is_async, self.victim, self.at, self.is_full = number, is_async, victim, at, is_full

    def __repr__(self) -> str:
        what = "full disk" if self.is_full else "kill -9"
        return f"{'async' if self.is_async else 'sync'}, {what} on rank {self.victim} at point {self.at}"


class Told:
    """What ranks tell each other through a store, in place of collectives."""

    def __init__(self, port: int, case: Case, rank: int, world: int) -> None:
        import torch.distributed as dist

        self._store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        self._case, self._rank, self._world, self._count = case.number, rank, world, 0

    def gathered(self, value: Any) -> list[Any]:
        self._count += 1
        key = f"{self._case}/{self._count}"
        self._store.set(f"{key}/{self._rank}", pickle.dumps(value))
        return [pickle.loads(self._store.get(f"{key}/{rank}")) for rank in range(self._world)]

    def first_error(self, action: Callable[[], object]) -> str | None:
        return next((error for error in self.gathered(self._error_of(action)) if error is not None), None)

    def error_of_rank_0(self, action: Callable[[], object]) -> str | None:
        return self.gathered(self._error_of(action) if self._rank == 0 else None)[0]

    def from_rank_0(self, action: Callable[[], Any]) -> tuple[Any, str | None]:
        found: list[Any] = []
        error = self.error_of_rank_0(lambda: found.append(action()))
        return self.gathered(found)[0][0] if error is None else None, error

    @staticmethod
    def _error_of(action: Callable[[], object]) -> str | None:
        from hunyuan_pretrain.parallel.agreement import reason_of

        try:
            action()
        except Exception as error:
            return reason_of(error)
        return None

    def say_dead(self) -> None:
        self._store.set(f"{self._case}/dead", b"1")

    def is_dead(self) -> bool:
        return bool(self._store.check([f"{self._case}/dead"]))


class Ranks:
    """This rank of a layout, and the cases that it goes through."""

    def __init__(self, corpus: Path, folder: Path, parallel: dict[str, Any], port: int) -> None:
        import torch
        import torch.distributed as dist

        from hunyuan_pretrain.checkpoint import parallel_write, save_load
        from hunyuan_pretrain.checkpoint.saving import Saver
        from hunyuan_pretrain.config.schema import Experiment
        from hunyuan_pretrain.diagnostics.parity import trace_steps
        from hunyuan_pretrain.train import setup

        torch.set_num_threads(1)
        self.folder, self.port = folder, port
        fields = experiment_fields(
            corpus, folder / "run", model__num_layers=4, precision={"dtype": "bf16"}, runtime__probes=False
        )
        self.run = setup.prepare(Experiment.model_validate(fields | {"parallel": parallel}))
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        parallel_write.BUFFER = SMALL_BUFFER
        trace_steps(self.run, range(BEFORE))
        save_load.save(folder / "before", BEFORE, self.run.chunks, self.run.optimizer, None)
        self.traces = trace_steps(self.run, range(BEFORE, SAVED))
        save_load.save(folder / "in_peace", SAVED, self.run.chunks, self.run.optimizer, None)
        self.saver = Saver(self.run.chunks, self.run.optimizer)
        self.items = self.saver._copy(self.saver._room())
        self.traces += trace_steps(self.run, range(SAVED, LAST))
        self.good = {contents(folder / "before", BEFORE), contents(folder / "in_peace", SAVED)}
        dist.barrier()

    def go_through(self, kinds: list[tuple[bool, bool]], stride: int) -> list[str]:
        """All cases of these kinds (asynchronous, full disk), every `stride`-th point of each rank. Returns what was
        done at the points."""
        import torch.distributed as dist

        done, number = [], 0
        for is_async, is_full in kinds:
            for victim in range(self.world):
                at = 1 + number % stride
                while True:
                    number += 1
                    case = Case(number, is_async, victim, at, is_full)
                    found = [self.go_through_one(case) if self.rank == victim else self.stand_by(case)]
                    dist.broadcast_object_list(found, src=victim)
                    self.check(case, found[0])
                    if found[0] is None:
                        break
                    done.append(found[0])
                    at += stride
        return done

    def stand_by(self, case: Case) -> None:
        """The other rank of a case: it is ended by the launcher if the victim dies."""
        import torch.distributed as dist

        child, told = self.fork(case), Told(self.port, case, self.rank, self.world)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if told.is_dead():
                time.sleep(0.03 * (case.at % 2))  # it is not ended at once
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.002)
        dist.barrier()

    def go_through_one(self, case: Case) -> str | None:
        """The victim's rank. Returns what it was about to do, or None if it got through without reaching the point."""
        import torch.distributed as dist

        told = Told(self.port, case, self.rank, self.world)
        status = os.waitstatus_to_exitcode(os.waitpid(self.fork(case), 0)[1])
        if status == -signal.SIGKILL:
            told.say_dead()
        dist.barrier()
        last = (self.folder / "points").read_text().split()[-1]
        assert status in ((0, FAILED) if case.is_full else (0, -signal.SIGKILL)), (case, status)
        return None if status == 0 else last

    def fork(self, case: Case) -> int:
        import torch.distributed as dist

        if self.rank == 0:
            shutil.rmtree(self.folder / "run" / "checkpoints", ignore_errors=True)
            shutil.copytree(self.folder / "before" / "checkpoints", self.folder / "run" / "checkpoints")
        dist.barrier()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = self.save(case)
            finally:
                os._exit(status)
        return child

    def save(self, case: Case) -> int:
        """In a fork: 0, or FAILED if the save failed and all ranks were told."""
        from hunyuan_pretrain.checkpoint import CheckpointError, saving

        told, run_dir = Told(self.port, case, self.rank, self.world), self.folder / "run"
        saving.first_error, saving.error_of_rank_0 = told.first_error, told.error_of_rank_0
        saving.from_rank_0 = told.from_rank_0
        saving.patience = nullcontext
        self.saver._copy = lambda stage: list(self.items)
        if self.rank == case.victim:
            Recorded(self.folder / "points", run_dir, case)
        try:
            self.saver.begin(run_dir, SAVED, keep_last=1)
            while case.is_async and not self.saver.after_step(SAVED, sum(told.gathered(self.saver.progress))):
                time.sleep(0.001)
            self.saver.finish()
        except CheckpointError as error:
            is_as_expected = str(error).endswith("No space left on device; older checkpoints are untouched")
            return FAILED if is_as_expected else 1
        return 0

    def check(self, case: Case, point: str | None) -> None:
        """What is on disk after a case, once a new start has tidied up."""
        import torch.distributed as dist

        from hunyuan_pretrain.checkpoint import folders

        if self.rank == 0:
            run_dir = self.folder / "run"
            left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
            folders.remove_partials(run_dir)
            found = folders.named_checkpoints(run_dir)
            assert found, (case, point, left)
            assert found == folders.find_checkpoints(run_dir), (case, point)
            assert sorted((run_dir / "checkpoints").iterdir()) == found, (case, point)
            for folder in found:
                assert contents(run_dir, folders.step_of(folder) or 0) in self.good, (case, point, folder.name)
            names = [folder.name for folder in found]
            if point is None:
                assert names == [f"step_{SAVED:07d}"], case
            elif case.is_full:
                assert left == names == [f"step_{BEFORE:07d}"], (case, point, left)
        dist.barrier()

    def train_on(self) -> list[bool]:
        """Whether training goes on bitwise as without an interruption, from the checkpoint before and the new one."""
        from hunyuan_pretrain.checkpoint import save_load
        from hunyuan_pretrain.diagnostics.parity import trace_steps

        found = []
        for name, step in (("before", BEFORE), ("in_peace", SAVED)):
            assert save_load.load_newest(self.folder / name, self.run.chunks, self.run.optimizer) is not None
            found.append(all(map(is_same, trace_steps(self.run, range(step, LAST)), self.traces[step - BEFORE :])))
        return found

    def is_as_planned(self) -> bool:
        """Whether `plan` states the bytes of the copy of the rank of each pipeline rank that writes the most."""
        import torch.distributed as dist

        from hunyuan_pretrain.checkpoint.optimizer_state import bytes_on_host
        from hunyuan_pretrain.config.derived import grid
        from hunyuan_pretrain.plan.saving import bytes_copied

        sizes: list[Any] = [None] * self.world
        dist.all_gather_object(sizes, bytes_on_host(self.run.chunks))
        shape = grid(self.run.experiment.parallel, self.world)
        of_ranks: dict[int, list[int]] = {}
        for rank, size in enumerate(sizes):
            of_ranks.setdefault(shape.pipeline_rank(rank), []).append(size)
        return {rank: max(found) for rank, found in of_ranks.items()} == {
            rank: bytes_copied(self.run.experiment, self.world, rank) for rank in range(shape.pp)
        }


FAILED = 3
"""Exit status of a fork whose save has failed."""


class Recorded(Points):
    """Writes what is done at each point to a file that outlives the process."""

    def __init__(self, record: Path, folder: Path, case: Case) -> None:
        self._record = os.open(record, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.write(self._record, b"nothing\n")
        super().__init__(folder, case.at, case.is_full)

    def reached(self, what: str, half: Callable[[], object] | None = None) -> None:
        os.write(self._record, f"{what}\n".encode())
        super().reached(what, half)


def contents(run_dir: Path, step: int) -> str:
    """A digest of all files of a checkpoint and their names."""
    folder = run_dir / "checkpoints" / f"step_{step:07d}"
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    return f"{step} {hashlib.sha256(json.dumps(files).encode()).hexdigest()}"


def is_same(one: Any, other: Any) -> bool:
    import numpy as np

    same = (one.scalars, one.shares) == (other.scalars, other.shares)
    return same and all(np.array_equal(value, other.parameters[name]) for name, value in one.parameters.items())


def ranks(
    corpus: Path, folder: Path, parallel: dict[str, Any], port: int, kinds: list[tuple[bool, bool]], stride: int
) -> tuple[list[str], list[bool], bool]:
    from hunyuan_pretrain.train import setup

    one = Ranks(corpus, folder, parallel, port)
    found = one.go_through(kinds, stride), one.train_on(), one.is_as_planned()
    setup.leave(one.run)
    return found


def disturbed(corpus: Path, folder: Path, layout: str, kinds: list[tuple[bool, bool]], stride: int) -> int:
    """Go through the cases of a layout; returns the number of points."""
    from torch.distributed import TCPStore

    world, parallel = LAYOUTS[layout]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = fork_ranks(world, ranks, corpus, folder, parallel, store.port, kinds, stride, timeout_s=1800)
    points, same, is_planned = results[0]
    assert same == [True, True], "both checkpoints continue bitwise"
    assert is_planned, "the host memory of the copy"
    if kinds == [(is_async, False) for is_async in (False, True)] and stride == 1:
        assert {"write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"} <= set(points)
    return len(points)


KILLS = [(False, False), (True, False)]
FULL = [(False, True), (True, True)]


@pytest.mark.parametrize("kinds", [KILLS, FULL], ids=["kill -9", "full disk"])
def test_a_disturbed_save_leaves_the_checkpoint_before_or_a_whole_new_one(corpus, tmp_path, kinds):
    """Some points of two ranks; hundreds of them below."""
    assert disturbed(corpus, tmp_path, "dp=2", kinds, stride=17) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "stride"), [("one rank", 1), ("dp=2", 1), ("tp=2", 3), ("pp=2", 3), ("ep=2", 3)], ids=str
)
def test_a_save_killed_at_any_point(corpus, tmp_path, layout, stride):
    assert disturbed(corpus, tmp_path, layout, KILLS, stride) >= 100
