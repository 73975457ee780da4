"""Saving and resuming on two ranks when one is slow, out of memory, on a full disk, reads a damaged file, or ends with
an error: what both ranks do."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

SHORT_S, LONG_S = 1.0, 3.0
"""A timeout of collectives, and how long a rank works on its files."""


def ranks(corpus: Path, folder: Path) -> dict[str, Any]:
    """What happened on this rank in each case."""
    import torch
    import torch.distributed as dist

    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.diagnostics.parity import trace_steps
    from hunyuan_pretrain.train import setup

    torch.set_num_threads(1)
    fields = experiment_fields(
        corpus, folder / "run", model__num_layers=2, precision={"dtype": "bf16"}, runtime__probes=False,
        checkpoint={"save_every_steps": 2},
    )  # fmt: skip
    run = setup.prepare(Experiment.model_validate(fields))
    trace_steps(run, range(1))
    cases = Cases(run, folder, dist.get_rank())
    found = {}
    for case in (
        cases.slow,
        cases.shares,
        cases.out_of_memory,
        cases.full_disk,
        cases.plans,
        cases.fall_back,
        cases.unreadable,
        cases.all_bad,
        cases.notes,
        cases.report_missing,
        cases.older_attempt,
        cases.all_raise,
    ):
        found[case.__name__] = case()
        dist.barrier()
    setup.leave(run)
    return found


class Cases:
    """One run on two ranks, saved and loaded repeatedly."""

    def __init__(self, run: Any, folder: Path, rank: int) -> None:
        self.run, self.folder, self.rank = run, folder, rank
        self.read_again: list[str] = []
        self.digested: list[str] = []

    def save(self, case: str, step: int) -> str:
        """Save; the error's text, or ""."""
        from hunyuan_pretrain.checkpoint import CheckpointError, save_load

        try:
            save_load.save(self.folder / case, step, self.run.chunks, self.run.optimizer, None)
            return ""
        except CheckpointError as error:
            return str(error)

    def resume(self, case: str) -> Any:
        """Resume; (folder name, notes, layout) of the loaded checkpoint, or the error's text."""
        from hunyuan_pretrain.checkpoint import CheckpointError, save_load

        try:
            found = save_load.load_newest(self.folder / case, self.run.chunks, self.run.optimizer)
            return None if found is None else (found.folder.name, found.notes, found.marker["layout"])
        except CheckpointError as error:
            return str(error)

    def complete(self, case: str) -> list[str]:
        """Names of the complete checkpoint folders, before any rank continues."""
        import torch.distributed as dist

        found = sorted(path.name for path in (self.folder / case / "checkpoints").iterdir())
        dist.barrier()
        return found

    def slow(self) -> Any:
        """Rank 1 writes, rank 0 joins, and both read, for longer than the timeout of a collective."""
        from hunyuan_pretrain.checkpoint import folders, parallel_read, saving
        from hunyuan_pretrain.checkpoint.joined_parts import JoinedParts

        digest, verify, write, join = (
            folders.digest,
            parallel_read._read_and_verify,
            saving.write_part,
            JoinedParts.join,
        )

        def recorded(path: Path) -> str:
            self.read_again.append(path.name)
            return digest(path)

        def recorded_verify(path: Path, *arguments: Any) -> None:
            self.digested.append(path.name)
            verify(path, *arguments)

        def slow_write(*arguments: Any) -> None:
            if self.rank == 1:
                time.sleep(LONG_S)
            write(*arguments)

        def slow_join(*arguments: Any) -> Any:
            time.sleep(LONG_S)
            return join(*arguments)

        with mock.patch.object(folders, "digest", recorded):
            with (
                mock.patch.object(saving, "write_part", slow_write),
                mock.patch.object(JoinedParts, "join", slow_join),
                short_time_out(),
            ):
                saved = self.save("slow", 1)
            slowly = slow(LONG_S, recorded_verify)
            with mock.patch.object(parallel_read, "_read_and_verify", slowly), short_time_out():
                return saved, self.resume("slow")

    def shares(self) -> Any:
        """(files read again after writing, files digested while reading, bytes of this rank's files), from `slow`."""
        own = (self.folder / "slow/checkpoints/step_0000001").glob(f"__{self.rank}_*")
        return sorted(self.read_again), sorted(self.digested), sum(path.stat().st_size for path in own)

    def out_of_memory(self) -> Any:
        """Rank 1 runs out of memory between two collectives: while copying the state, and while applying what was
        read."""
        import torch

        from hunyuan_pretrain.checkpoint import optimizer_state

        kept = self.save("memory", 1)
        with self.failing(optimizer_state, "_to_host", torch.OutOfMemoryError("CUDA out of memory"), rank=1):
            saving = self.save("memory", 2)
        with self.failing(optimizer_state, "_take", torch.OutOfMemoryError("CUDA out of memory"), rank=1):
            loading = self.resume("memory")
        return kept, saving, loading, self.complete("memory"), self.save("memory", 2)

    def full_disk(self) -> Any:
        """The disk is full for the small files that only rank 0 writes."""
        from hunyuan_pretrain.checkpoint import folders, joined_parts

        full, found = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), []
        for place, name in ((joined_parts, "save_config"), (joined_parts, "write_file"), (folders, "write_marker")):
            with self.failing(place, name, full, rank=0, after=0):
                found.append((name, self.save("disk", 1)))
        return found, self.complete("disk"), self.save("disk", 1), self.resume("disk")

    def plans(self) -> Any:
        """For each of four saves: its error, how often it was worked out which tensor is where, the object collectives
        that grow with the number of ranks, and the bytes of the others; and whether the last can be read."""
        import pickle

        import torch.distributed as dist

        from hunyuan_pretrain.checkpoint import joined_parts
        from hunyuan_pretrain.checkpoint.saving import Saver

        describe, broadcast = joined_parts.joined_metadata, dist.broadcast_object_list
        counts = {"described": 0, "growing": 0, "bytes": 0}

        def counted_describe(layouts: Any) -> Any:
            counts["described"] += 1
            return describe(layouts)

        def counted_broadcast(objects: list[Any], **settings: Any) -> None:
            counts["bytes"] += len(pickle.dumps(objects))
            broadcast(objects, **settings)

        def growing(*arguments: Any, **settings: Any) -> None:
            counts["growing"] += 1

        found = []
        saver = Saver(self.run.chunks, self.run.optimizer)
        with (
            mock.patch.object(joined_parts, "joined_metadata", counted_describe),
            mock.patch.object(dist, "broadcast_object_list", counted_broadcast),
            mock.patch.object(dist, "gather_object", growing),
            mock.patch.object(dist, "all_gather_object", growing),
            mock.patch.object(dist, "scatter_object_list", growing),
        ):
            for step in range(1, 5):
                counts.update(described=0, growing=0, bytes=0)
                saver.begin(self.folder / "plans", step, None)
                assert saver.finish() is not None
                found.append((counts["described"], counts["growing"], counts["bytes"] < 200))
        before = self.values()
        for value in self.run.optimizer.param_groups[0]["params"]:
            value.data.zero_()
        resumed = self.resume("plans")
        return found, resumed[0], [name for name, value in self.values().items() if not (before[name] == value).all()]

    def values(self) -> dict[str, Any]:
        """Weights, moments and main weights of this rank."""
        from hunyuan_pretrain.checkpoint.optimizer_state import full_moments

        weights = {
            name: value.detach().clone() for chunk in self.run.chunks for name, value in chunk.named_parameters()
        }
        state = {
            f"{kind} {name}": t
            for name, tensors, _ in full_moments(self.run.chunks, self.run.optimizer)
            for kind, t in tensors.items()
        }
        return weights | state

    def copy(self, case: str, *steps: int) -> Path:
        """Copy some checkpoints of `plans` to another run."""
        import torch.distributed as dist

        folder = self.folder / case / "checkpoints"
        for step in steps if self.rank == 0 else ():
            shutil.copytree(self.folder / f"plans/checkpoints/step_{step:07d}", folder / f"step_{step:07d}")
        dist.barrier()
        return folder

    def fall_back(self) -> Any:
        """The newest checkpoint has a flipped bit; the one before is truncated."""
        folder = self.copy("damage", 1, 2, 3)
        if self.rank == 0:
            short, flipped = (folder / name / "__1_0.distcp" for name in ("step_0000002", "step_0000003"))
            os.truncate(short, short.stat().st_size - 1)
            data = bytearray(flipped.read_bytes())
            data[len(data) // 2] ^= 1
            flipped.write_bytes(data)
        return self.resume("damage"), self.complete("damage"), self.save("damage", 3), self.resume("damage")

    def unreadable(self) -> Any:
        """The newest checkpoint is whole, but on rank 1 the file system fails: for the digests, then for the tensors,
        then not any more."""
        from hunyuan_pretrain.checkpoint import parallel_read

        self.copy("unreadable", 1, 2)
        refused, place = OSError(errno.EACCES, os.strerror(errno.EACCES)), parallel_read._HashedFile
        with self.failing(place, "is_as_written", refused, rank=1, after=0):
            verifying = self.resume("unreadable")
        with self.failing(parallel_read, "read_bytes", OSError(errno.EIO, os.strerror(errno.EIO)), rank=1, after=0):
            reading = self.resume("unreadable")
        with self.failing(parallel_read, "_fill", MemoryError("no memory"), rank=1, after=0):
            without_memory = self.resume("unreadable")
        return verifying, reading, without_memory, self.complete("unreadable"), self.resume("unreadable")[:2]

    def all_bad(self) -> Any:
        folder = self.copy("bad", 1, 2)
        if self.rank == 0:
            (folder / "step_0000001/complete.json").unlink()
            os.truncate(folder / "step_0000002/__0_0.distcp", 10)
        return self.resume("bad"), self.complete("bad")

    def notes(self) -> Any:
        """What rank 0 logs when rank 1 cannot pin its memory."""
        from hunyuan_pretrain.train.saves import Saves

        lines, saves = list[str](), Saves(self.run)
        if self.rank == 1:
            saves._saver._memory.note = "cannot be pinned"
        with mock.patch.object(self.run.log, "line", lines.append):
            for step in (1, 2):
                saves.save(step, must_succeed=True)
        return [line for line in lines if "pinned" in line]

    def report_missing(self) -> Any:
        """All ranks end with an error, and the part of rank 1 cannot be written; rank 0 waits for it in vain."""
        import torch.distributed as dist

        from hunyuan_pretrain.checkpoint import CheckpointError, saving

        saver = saving.Saver(self.run.chunks, self.run.optimizer)
        error = ""
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with (
            self.failing(saving, "write_part", full, rank=1, after=0),
            mock.patch.object(saving, "LEAST_WAIT_S", 0.1),
            mock.patch.object(saving, "LOOK_S", 0.1),
        ):
            saver.begin(self.folder / "missing", 1, None)
            with without_communication():
                try:
                    assert saver.rescue() is None
                except CheckpointError as caught:
                    error = str(caught)
        dist.barrier()  # rank 1 has not waited for the end: there is nothing that it could lose
        return error, self.complete("missing")

    def older_attempt(self) -> Any:
        """Rank 1 of an attempt that was given up goes on to write while a later one of the same step is complete."""
        from hunyuan_pretrain.checkpoint import folders, saving

        opened, write = threading.Event(), saving.write_part

        def held(*arguments: Any) -> None:
            assert opened.wait(60)
            write(*arguments)

        old = saving.Saver(self.run.chunks, self.run.optimizer)
        with mock.patch.object(saving, "write_part", held if self.rank == 1 else write):
            old.begin(self.folder / "older", 1, None)
        left_over = old._flight
        if self.rank == 0:
            left_over._part.join()
            folders.remove_partials(self.folder / "older")  # as the start of the next attempt does
        saved = self.save("older", 1)
        opened.set()
        left_over._part.join()
        left_over._is_given_up = True
        left_over.parts_have_ended()
        return saved, type(left_over._part.error).__name__, self.complete("older"), self.resume("older")[:2]

    def all_raise(self) -> Any:
        """All ranks of a run meet an error in step 3, while rank 1 still writes the checkpoint of step 2."""
        import torch.distributed as dist

        from hunyuan_pretrain.checkpoint import folders, saving
        from hunyuan_pretrain.runtime.stop import StopRequest
        from hunyuan_pretrain.train import loop

        if self.rank == 0:
            shutil.rmtree(self.run.run_dir / "checkpoints")
        dist.barrier()
        launch, write, lines, without = loop.launch_step, saving.write_part, list[str](), ExitStack()

        def failing(run: Any, stage: Any, step: int, **settings: Any) -> Any:
            if step == 2:
                without.enter_context(without_communication())
                raise ValueError("a damaged shard")
            return launch(run, stage, step, **settings)

        def slow_write(*arguments: Any) -> None:
            time.sleep(1.5 * self.rank)
            write(*arguments)

        with (
            mock.patch.object(saving, "write_part", slow_write),
            mock.patch.object(loop, "launch_step", failing),
            mock.patch.object(self.run.log, "line", lines.append),
        ):
            try:
                loop._train(self.run, StopRequest())
            except ValueError as error:
                lines.append(str(error))
        there = [folder.name for folder in folders.find_checkpoints(self.run.run_dir)]  # without waiting for rank 0
        without.close()
        return there, [line.split(": copied")[0] for line in lines[-2:]]

    @contextmanager
    def failing(
        self, place: Any, name: str, error: BaseException, rank: int, after: int = 1, once: bool = False
    ) -> Iterator[None]:
        """Patch a function so that it raises on one rank after `after` calls."""
        original, calls = getattr(place, name), [0]

        def fail(*arguments: Any, **settings: Any) -> Any:
            calls[0] += 1
            if calls[0] > after and self.rank == rank and not (once and calls[0] > after + 1):
                raise error
            return original(*arguments, **settings)

        with mock.patch.object(place, name, fail):
            yield


@contextmanager
def without_communication() -> Iterator[None]:
    """Inside, every collective fails."""
    import torch.distributed as dist

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective of ranks of which some may be elsewhere")

    with ExitStack() as patches:
        for name in ("all_reduce", "broadcast_object_list", "broadcast", "barrier", "all_gather_object"):
            patches.enter_context(mock.patch.object(dist, name, refused))
        yield


def slow(seconds: float, function: Any) -> Any:
    """`function`, after a while for the first file of rank 0."""

    def call(path: Path, *arguments: Any) -> Any:
        if path.name.startswith("__0_0"):
            time.sleep(seconds)
        return function(path, *arguments)

    return call


@contextmanager
def short_time_out() -> Iterator[None]:
    """Set the timeout of collectives to SHORT_S; all ranks enter together."""
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from hunyuan_pretrain.parallel import groups

    dist.barrier()
    with mock.patch.object(groups, "_timeout", timedelta(seconds=SHORT_S)):
        _set_pg_timeout(timedelta(seconds=SHORT_S))
        try:
            yield
        finally:
            _set_pg_timeout(timedelta(seconds=120))


@pytest.fixture(scope="module")
def found(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return fork_ranks(2, ranks, corpus, tmp_path_factory.mktemp("runs"))


def same_on_both(found: list[dict[str, Any]], case: str) -> Any:
    assert found[0][case] == found[1][case], "the ranks do not agree"
    return found[0][case]


def test_file_work_may_outlast_the_collective_timeout(found):
    saved, resumed = same_on_both(found, "slow")
    assert saved == ""
    assert resumed == ("step_0000001", [], "dp=2")


def test_data_parallel_ranks_split_the_writing_and_each_digests_what_it_wrote(found):
    (again_0, read_0, bytes_0), (again_1, read_1, bytes_1) = (rank["shares"] for rank in found)
    assert again_0 == [".metadata", "common.pt", "metadata.json"], "the rest is digested while it is written"
    assert again_1 == []
    files = {f"__{rank}_{number}.distcp" for rank in range(2) for number in range(2)}
    assert set(read_0) | set(read_1) == {*again_0, *files}
    assert not set(read_0) & set(read_1)
    assert 0.8 < bytes_0 / bytes_1 < 1.25, "of everything that both have"


def test_a_rank_out_of_memory_fails_the_save_on_all_ranks_and_none_hangs(found):
    kept, saving, loading, complete, later = same_on_both(found, "out_of_memory")
    assert kept == ""
    assert saving.endswith(
        "step_0000002: the checkpoint could not be written: CUDA out of memory; older checkpoints are untouched"
    )
    assert loading.endswith("step_0000001: CUDA out of memory")
    assert complete == ["step_0000001"]
    assert later == "", "the next save works"


def test_a_full_disk_on_rank_0_fails_the_save_on_all_ranks_and_none_hangs(found):
    failed, complete, later, resumed = same_on_both(found, "full_disk")
    assert [name for name, _ in failed] == ["save_config", "write_file", "write_marker"]
    for name, words in failed:
        assert words.endswith("could not be written: No space left on device; older checkpoints are untouched"), name
    assert complete == []
    assert later == ""
    assert resumed[0] == "step_0000001"


def test_no_message_of_a_save_grows_with_the_ranks_and_where_tensors_are_is_worked_out_once(found):
    for rank, first in ((0, 1), (1, 0)):
        saves, resumed, different = found[rank]["plans"]
        assert saves == [(first, 0, True), (0, 0, True), (0, 0, True), (0, 0, True)], "reports are files"
        assert (resumed, different) == ("step_0000004", [])


def test_the_newest_good_checkpoint_is_loaded_and_every_bad_one_is_named(found):
    first, complete, again, second = same_on_both(found, "fall_back")
    damaged = "__1_0.distcp is missing or damaged: its size or sha256 is not the one in complete.json"
    assert first[0] == "step_0000001"
    assert [line.split("checkpoints/")[-1] for line in first[1]] == [
        f"step_0000003 is not used: {damaged}; it is now step_0000003.damaged",
        f"step_0000002 is not used: {damaged}; it is now step_0000002.damaged",
    ]
    assert complete == ["step_0000001", "step_0000002.damaged", "step_0000003.damaged"]
    assert again == ""
    assert second[:2] == ("step_0000003", [])


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(found):
    verifying, reading, without_memory, there, later = same_on_both(found, "unreadable")
    hint = (
        "; no older one is used in its place; make it readable and run the same command again, or move it away to go "
        "on without it"
    )
    place = "checkpoints/step_0000002: "
    assert verifying.split(place)[1] == f"__1_0.distcp cannot be read now: Permission denied (EACCES){hint}"
    assert reading.split(place)[1] == f"__1_0.distcp cannot be read now: Input/output error (EIO){hint}"
    assert without_memory.split(place)[1] == f"cannot be read now: no memory{hint}"
    assert there == ["step_0000001", "step_0000002"]
    assert later == ("step_0000002", [])


def test_a_run_whose_checkpoints_are_all_bad_does_not_start_over(found):
    words, complete = same_on_both(found, "all_bad")
    lines = words.splitlines()
    assert (
        "checkpoints: no usable checkpoint (repair or remove them; with none left the run starts from the beginning)"
        in lines[0]
    )
    assert lines[1].startswith("  step_0000002: __0_0.distcp is missing or damaged")
    assert lines[2].startswith("  step_0000001: not a complete checkpoint (no complete.json)")
    assert complete == ["step_0000001", "step_0000002"]


def test_memory_that_another_rank_cannot_pin_is_known_to_the_log(found):
    assert found[0]["notes"] == ["warning: rank 1: cannot be pinned"]


def test_a_save_is_given_up_and_said_so_when_a_rank_that_ends_has_not_written_its_part(found):
    assert [rank["report_missing"][1] for rank in found] == [[], []]
    words, of_other = (rank["report_missing"][0] for rank in found)
    assert words.endswith(
        "step_0000001: the checkpoint could not be written: no report of rank 1 when the run ended; older checkpoints "
        "are untouched"
    )
    assert of_other == "", "rank 0 says it"


def test_a_rank_of_an_older_attempt_cannot_write_into_a_later_one(found):
    assert found[0]["older_attempt"][1] == "NoneType"
    assert found[1]["older_attempt"][1] == "FileNotFoundError"
    for saved, _, complete, resumed in (rank["older_attempt"] for rank in found):
        assert (saved, complete) == ("", ["step_0000001"])
        assert resumed == ("step_0000001", [])


def test_an_error_of_all_ranks_does_not_lose_the_save_in_flight(found):
    folders = [rank["all_raise"][0] for rank in found]
    assert folders == [["step_0000002"]] * 2, "each rank stays until the checkpoint is complete"
    said, error = found[0]["all_raise"][1]
    assert said.startswith("saved ")
    assert said.endswith("checkpoints/step_0000002")
    assert error == "a damaged shard"
