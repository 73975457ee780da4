"""Saving and resuming on two ranks when one is slow, out of memory, on a full disk, or reads a damaged file: what both
ranks do."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
        corpus, folder / "run", model__num_layers=2, precision={"dtype": "bf16"}, runtime__probes=False
    )
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
        from hunyuan_pretrain.checkpoint import folders, saving
        from hunyuan_pretrain.checkpoint.joined_parts import JoinedParts

        digest, write, join = folders.digest, saving.write_part, JoinedParts.join

        def recorded(path: Path) -> str:
            self.digested.append(path.name)
            return digest(path)

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
            self.read_again, self.digested = self.digested, []
            with mock.patch.object(folders, "digest", slow(LONG_S, recorded)), short_time_out():
                return saved, self.resume("slow")

    def shares(self) -> Any:
        """(files read again after writing, files digested before reading, bytes of this rank's files), from `slow`."""
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
        """The digests are correct, but reading fails."""
        from hunyuan_pretrain.checkpoint import save_load

        self.copy("unreadable", 1, 2)
        with self.failing(
            save_load, "read_tensors", OSError(errno.EIO, "Input/output error"), rank=1, after=0, once=True
        ):
            return self.resume("unreadable")

    def all_bad(self) -> Any:
        folder = self.copy("bad", 1, 2)
        if self.rank == 0:
            (folder / "step_0000001/complete.json").unlink()
            os.truncate(folder / "step_0000002/__0_0.distcp", 10)
        return self.resume("bad"), self.complete("bad")

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


def slow(seconds: float, function: Any) -> Any:
    """`function`, after a while for the first file of rank 0."""

    def call(path: Path) -> Any:
        if path.name.startswith("__0_0"):
            time.sleep(seconds)
        return function(path)

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


def test_an_unreadable_checkpoint_is_skipped_too(found):
    folder, notes, _ = same_on_both(found, "unreadable")
    assert folder == "step_0000001"
    assert "step_0000002 is not used: cannot be read: [Errno 5] Input/output error" in notes[0]


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
