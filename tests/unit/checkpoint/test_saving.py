"""Saves while training goes on, on one rank: what they hold, when they end, what the loop logs of them."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.checkpoint import CheckpointError, folders, host_memory, parallel_write, save_load, saving
from hunyuan_pretrain.checkpoint.host_memory import HostMemory, rounded
from hunyuan_pretrain.checkpoint.joined_parts import joined_metadata
from hunyuan_pretrain.checkpoint.optimizer_state import bytes_on_host
from hunyuan_pretrain.checkpoint.saving import Saver
from hunyuan_pretrain.diagnostics.parity import trace_steps
from hunyuan_pretrain.plan.saving import bytes_copied
from hunyuan_pretrain.runtime.background import Background
from hunyuan_pretrain.runtime.lock import RunLock
from hunyuan_pretrain.runtime.stop import StopRequest
from hunyuan_pretrain.train import TrainingError, loop, setup
from hunyuan_pretrain.train.run import Run
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import ROOT, experiment_fields


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run after one step."""
    folder = tmp_path_factory.mktemp("run")
    run = on_this_rank(experiment_fields(corpus, folder, 8, model__num_layers=2, precision={"dtype": "bf16"}))
    trace_steps(run, range(1))
    return run


class Gate:
    """Holds the writing of a save until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, write = threading.Event(), parallel_write.write_items

        def wait_and_write(path: Path, items: Any) -> Any:
            assert self.opened.wait(60)
            return write(path, items)

        monkeypatch.setattr(parallel_write, "write_items", wait_and_write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def digests(folder: Path) -> Any:
    return folders.read_marker(folder)["files"]


def test_a_save_holds_the_state_of_its_step_though_training_goes_on(corpus, tmp_path, gate):
    """Steps that change every weight and moment are made before a byte is written."""
    run = on_this_rank(experiment_fields(corpus, tmp_path / "run", 8, model__num_layers=2, precision={"dtype": "bf16"}))
    trace_steps(run, range(2))
    saver = Saver(run.chunks, run.optimizer)
    saver.begin(tmp_path / "late", 2, None)
    gate.opened.set()
    saver.finish()
    gate.opened.clear()
    saver.begin(tmp_path / "async", 2, None)
    trace_steps(run, range(2, 4))
    for parameter in run.chunks[0].parameters():
        parameter.data.zero_()
    torch.rand(1)
    assert not (tmp_path / "async/checkpoints/step_0000002").exists()
    gate.opened.set()
    saved = saver.finish()
    assert saved is not None
    assert digests(saved.folder) == digests(tmp_path / "late/checkpoints/step_0000002")


def test_the_end_of_a_save_is_seen_only_in_steps_that_were_launched_after_it(run, tmp_path, gate, monkeypatch):
    monkeypatch.setattr(saving, "LOOK_S", 60.0)
    saver = Saver(run.chunks, run.optimizer)
    assert (saver.progress, saver.after_step(5, 0), saver.finish()) == (0, False, None)
    saver.begin(tmp_path, 6, None)
    assert saver.progress == 0
    assert not saver.after_step(5, 2), "of the save before"
    assert not saver.after_step(6, 0)
    gate.opened.set()
    saver._flight._part.wait()
    assert saver.progress == 1, "rank 0 has not looked for the report"
    assert not saver.after_step(7, 1), "the parts are written; rank 0 makes one checkpoint of them"
    saver._flight._commit.wait()
    assert saver.progress == 2
    assert saver.after_step(8, 2)
    folder = saver.finish().folder
    assert folders.find_checkpoints(tmp_path) == [folder]
    assert saver.progress == 0


def test_the_same_memory_is_used_by_every_save_until_it_is_freed(run, tmp_path):
    saver = Saver(run.chunks, run.optimizer)
    blocks = []
    for step in (1, 2):
        saver.begin(tmp_path, step, None)
        blocks.append(saver._memory._block)
        saver.finish()
    assert blocks[0] is blocks[1]
    assert saver._memory.num_bytes == bytes_on_host(run.chunks) == bytes_copied(run.experiment, 1, 0)
    saver.free_memory()
    assert saver._memory.num_bytes == 0


def test_memory_that_was_prepared_is_that_of_the_first_copy(run, tmp_path):
    saver = Saver(run.chunks, run.optimizer)
    saver.prepare()
    saver._preparing.wait()
    block = saver._memory._block
    assert len(block) == bytes_on_host(run.chunks)
    saver.begin(tmp_path, 1, None)
    assert saver._memory._block is block
    saver.finish()


def test_memory_that_cannot_be_prepared_is_tried_again_by_the_save(run, tmp_path, monkeypatch):
    monkeypatch.setattr(HostMemory, "touch", lambda memory: (_ for _ in ()).throw(MemoryError("no memory")))
    saver = Saver(run.chunks, run.optimizer)
    saver.prepare()
    saver.begin(tmp_path, 1, None)
    assert saver.finish() is not None


def test_memory_that_cannot_be_had_fails_the_save_and_not_the_run(run, tmp_path, monkeypatch):
    saver = Saver(run.chunks, run.optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(HostMemory, "reserve", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(CheckpointError, match="could not be written: no memory"):
            saver.begin(tmp_path, 1, None)
    saver.begin(tmp_path, 2, None)
    assert saver.finish() is not None


@pytest.mark.parametrize("fails", [False, True])
def test_work_that_has_ended_keeps_nothing_alive(fails: bool):
    """Without a collection of circles: the host copy of a checkpoint is tens of gigabytes."""

    class Block:
        pass

    def work(block: Block) -> None:
        if fails:
            raise OSError("no space")

    block = Block()
    there, done = weakref.ref(block), Background(partial(work, block), "work")
    done.join()
    del block
    gc.disable()
    try:
        assert there() is None
    finally:
        gc.enable()
    if fails:
        with pytest.raises(OSError, match="no space"):
            done.wait()


def test_a_name_that_cannot_be_flushed_is_said_and_the_checkpoint_counts(run, tmp_path, monkeypatch):
    flush = folders.flush_to_disk

    def refused(path: Path) -> None:
        if path == tmp_path / "checkpoints":
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(path)

    monkeypatch.setattr(folders, "flush_to_disk", refused)
    saver = Saver(run.chunks, run.optimizer)
    saver.begin(tmp_path, 1, None)
    saved = saver.finish()
    assert "may lose its name if power fails now: " in " ".join(saved.notes)
    assert folders.find_checkpoints(tmp_path) == [saved.folder]


def test_memory_of_a_gpu_is_registered_once_and_until_another_block_takes_its_place(monkeypatch):
    """With a stand-in for CUDA's runtime."""
    calls: list[tuple[str, int]] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            calls.append(("register", size))
            return 0 if size < 5000 else 2

        def cudaHostUnregister(self, address: int) -> int:
            calls.append(("unregister", 0))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    devices: list[tuple[torch.device, bool]] = []
    is_main = threading.main_thread().ident
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: devices.append((device, threading.get_ident() == is_main))
    )
    memory = HostMemory(torch.device("cuda", 3))
    memory.reserve(1000)
    memory.reserve(500)
    assert calls == [("register", 1000)]
    assert devices == [(torch.device("cuda", 3), False)], "on its own GPU, and not in the thread that copies"
    memory.reserve(2000)
    assert calls[1:] == [("unregister", 0), ("register", 2000)]
    assert memory.note is None
    memory.reserve(6000)
    assert calls[3:] == [("unregister", 0), ("register", 6000)]
    assert "6,000 bytes of host memory for checkpoints cannot be pinned (CUDA error 2)" in str(memory.note)
    del memory
    assert len(calls) == 5, "there is nothing to unregister"


def test_tensors_of_a_block_have_storages_of_their_own():
    """torch.save writes whole storages."""
    memory = HostMemory(torch.device("cpu"))
    shapes = [((3, 5), torch.bfloat16), ((), torch.float32), ((7,), torch.int64)]
    memory.reserve(sum(rounded(torch.Size(shape).numel() * dtype.itemsize) for shape, dtype in shapes))
    for number, (shape, dtype) in enumerate(shapes):
        tensor = memory.empty(torch.Size(shape), dtype).fill_(number)
        assert (tensor.shape, tensor.dtype, tensor.untyped_storage().nbytes()) == (shape, dtype, tensor.nbytes)
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    for part in (whole[1:3], whole[:, 2:4], whole[0, ::3][1:], whole[0, 0]):
        alone = parallel_write._alone(part)
        assert torch.equal(alone, part)
        assert alone.untyped_storage().nbytes() == part.nbytes
    assert host_memory.rounded(1) == 256


@pytest.mark.parametrize("shape", [(), (3, 5), (0, 4), (1025, 1024)])
def test_new_memory_is_a_tensor_like_any_other(shape):
    """Of a huge page and more, too."""
    tensor = host_memory.new_memory(torch.Size(shape), torch.bfloat16).fill_(3)
    assert (tensor.shape, tensor.dtype, tensor.untyped_storage().nbytes()) == (shape, torch.bfloat16, tensor.nbytes)
    assert (tensor == 3).all()
    assert tensor.is_contiguous()


PARTS = [
    ["w", "a", 0, 10, "torch.float32", [4, 2], [0, 0], [2, 2]],
    ["w", "b", 0, 10, "torch.float32", [4, 2], [2, 0], [2, 2]],
    ["g", "a", 10, 3],
]
WRONG: dict[str, tuple[list[list[Any]], str]] = {
    "a part lacks": (PARTS[:1], "w: the parts that the ranks wrote do not make up the tensor [4, 2]"),
    "twice": ([*PARTS, PARTS[0]], "w: the part at [0, 0] was written twice"),
    "an object twice": ([*PARTS, PARTS[2]], "g: written twice"),
    "another dtype": (
        [PARTS[0], [*PARTS[1][:4], "torch.int64", *PARTS[1][5:]]],
        "w: ranks differ in its dtype or shape",
    ),
    "another shape": ([PARTS[0], [*PARTS[1][:5], [4, 3], *PARTS[1][6:]]], "w: ranks differ in its dtype or shape"),
    "overlap": (
        [PARTS[0], [*PARTS[1][:6], [1, 0], [2, 2]]],
        "w: the parts that the ranks wrote do not make up the tensor [4, 2]",
    ),
    "outside": (
        [PARTS[0], [*PARTS[1][:6], [4, 0], [2, 2]]],
        "w: the parts that the ranks wrote do not make up the tensor [4, 2]",
    ),
}


def test_the_parts_of_a_tensor_are_described_as_torch_reads_them():
    found = joined_metadata(iter([PARTS[:1], PARTS[1:]]))
    tensor = found.state_dict_metadata["w"]
    assert (tensor.size, tensor.properties.dtype) == (torch.Size([4, 2]), torch.float32)
    assert [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks] == [
        ((0, 0), (2, 2)),
        ((2, 0), (2, 2)),
    ]
    assert [(place.relative_path, place.offset, place.length) for place in found.storage_data.values()] == [
        ("a", 0, 10), ("b", 0, 10), ("a", 10, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(("items", "words"), WRONG.values(), ids=WRONG)
def test_parts_that_do_not_make_up_a_tensor_are_refused(items, words):
    with pytest.raises(CheckpointError) as caught:
        joined_metadata(iter([items]))
    assert str(caught.value) == words


def trained(corpus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **checkpoint: Any) -> list[str]:
    """Log lines of a run of 6 steps, saved after every second."""
    fields = experiment_fields(corpus, folder, 6, model__num_layers=2, checkpoint={"save_every_steps": 2, **checkpoint})
    fields["runtime"] |= {"probes": False}
    run, lines = on_this_rank(fields), []
    monkeypatch.setattr(run.log, "line", lines.append)
    assert loop._train(run, StopRequest()) == 0
    run.loader.close()
    return [line for line in lines if "checkpoints/step" in line]


def named(lines: list[str]) -> list[str]:
    return [line.split(":")[0] for line in lines]


@pytest.mark.parametrize("is_async", [True, False])
def test_the_loop_saves_every_checkpoint_and_waits_for_the_last(corpus, tmp_path, monkeypatch, is_async):
    lines = trained(corpus, tmp_path, monkeypatch, async_save=is_async, keep_last=2)
    assert named(lines) == [f"saved {tmp_path}/checkpoints/step_000000{step}" for step in (2, 4, 6)]
    assert [folder.name for folder in save_load.find_checkpoints(tmp_path)] == ["step_0000004", "step_0000006"]


def test_async_and_sync_checkpoints_are_the_same_bytes(corpus, tmp_path, monkeypatch):
    for is_async in (True, False):
        trained(corpus, tmp_path / str(is_async), monkeypatch, async_save=is_async)
    for name in ("step_0000002", "step_0000004", "step_0000006"):
        one, other = (tmp_path / str(is_async) / "checkpoints" / name for is_async in (True, False))
        assert digests(one) == digests(other)


def test_a_failed_save_is_logged_and_the_run_goes_on(corpus, tmp_path, monkeypatch):
    write, calls = saving.write_part, []

    def fail_once(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)

    monkeypatch.setattr(saving, "write_part", fail_once)
    lines = trained(corpus, tmp_path, monkeypatch)
    assert lines[0] == (
        f"WARNING: {tmp_path}/checkpoints/step_0000002: the checkpoint could not be written: No space left on device; "
        "older checkpoints are untouched"
    )
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_0000004", "step_0000006"]


def test_a_save_in_flight_is_finished_before_the_loss_is_reported_that_is_not_finite(
    corpus, tmp_path, monkeypatch, gate
):
    """It is the checkpoint to go back to."""
    fields = experiment_fields(corpus, tmp_path, 6, model__num_layers=2, checkpoint={"save_every_steps": 2})
    fields["runtime"] |= {"probes": False}
    run, launch = on_this_rank(fields), loop.launch_step

    def launch_bad(run: Any, stage: Any, step: int, **settings: Any) -> Any:
        launched = launch(run, stage, step, **settings)
        if step == 2:
            assert not save_load.find_checkpoints(tmp_path), "it is being written"
            launched.numbers.read()[0] = math.nan
            threading.Timer(0.2, gate.opened.set).start()
        return launched

    monkeypatch.setattr(loop, "launch_step", launch_bad)
    with pytest.raises(TrainingError, match=r"step 3: loss nan.*the newest checkpoint is .*step_0000002, after step 2"):
        loop._train(run, StopRequest())
    run.loader.close()


def test_a_save_in_flight_is_finished_before_one_rank_ends_with_an_error(corpus, tmp_path, monkeypatch, gate):
    fields = experiment_fields(corpus, tmp_path, 6, model__num_layers=2, checkpoint={"save_every_steps": 2})
    fields["runtime"] |= {"probes": False}
    run, launch = on_this_rank(fields), loop.launch_step

    def fail(run: Any, stage: Any, step: int, **settings: Any) -> Any:
        if step == 2:
            threading.Timer(0.2, gate.opened.set).start()
            raise ValueError("a damaged shard")
        return launch(run, stage, step, **settings)

    monkeypatch.setattr(loop, "launch_step", fail)
    with pytest.raises(ValueError, match="a damaged shard"):
        loop._train(run, StopRequest())
    run.loader.close()
    assert [folder.name for folder in save_load.find_checkpoints(tmp_path)] == ["step_0000002"]


def test_a_checkpoint_that_cannot_be_removed_does_not_fail_the_new_one(run, tmp_path, monkeypatch):
    def refuse(folder: Path) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    saver = Saver(run.chunks, run.optimizer)
    saver.begin(tmp_path, 1, None)
    saver.finish()
    monkeypatch.setattr(folders, "remove", refuse)
    saver.begin(tmp_path, 2, 1)
    saved = saver.finish()
    assert saved is not None
    assert saved.notes == ("WARNING: an older checkpoint cannot be removed: Permission denied",)
    assert len(folders.find_checkpoints(tmp_path)) == 2


def test_a_run_directory_that_another_process_has_taken_over_is_not_changed(run, tmp_path):
    lock = RunLock.take(tmp_path)
    saver = Saver(run.chunks, run.optimizer, lock)
    saver.begin(tmp_path, 1, None)
    saver.finish()
    content = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps(content | {"token": "of another"}))
    saver.begin(tmp_path, 2, 1)
    with pytest.raises(CheckpointError, match=r"lock.json says that .* is another process's by now; older checkpoints"):
        saver.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]
    lock.path.write_text(json.dumps(content))
    lock.release()


def test_the_lock_is_held_until_the_commit_has_ended(corpus, tmp_path, monkeypatch):
    """After an error, too: the process that takes the run over must not meet a save."""
    fields = experiment_fields(corpus, tmp_path, 6, model__num_layers=2, checkpoint={"save_every_steps": 2})
    fields["runtime"] |= {"probes": False}
    place, launch, held = folders.put_in_place, loop.launch_step, list[bool]()

    def slow_place(*arguments: Path) -> Any:
        time.sleep(0.5)
        held.append(run.lock.is_held())
        return place(*arguments)

    def fail(run: Any, stage: Any, step: int, **settings: Any) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return launch(run, stage, step, **settings)

    monkeypatch.setattr(folders, "put_in_place", slow_place)
    monkeypatch.setattr(loop, "launch_step", fail)
    run = on_this_rank(fields)
    run.lock = RunLock.take(tmp_path)
    with pytest.raises(KeyboardInterrupt), setup.left_at_the_end(run, lambda: None):
        loop._train(run, StopRequest())
    assert held == [True]
    assert [folder.name for folder in folders.find_checkpoints(tmp_path)] == ["step_0000002"]


PROGRAM = """
import sys, time
from pathlib import Path
from hunyuan_pretrain.checkpoint.parallel_write import HashedFile
from hunyuan_pretrain.runtime.background import Background

def write():
    with HashedFile(Path(sys.argv[1])) as file:
        while True:
            file.write(bytes(1 << 16))

work = Background(write, "endless")
time.sleep(0.2)
print("the main thread ends")
"""


def test_a_process_that_ends_with_an_error_does_not_wait_for_its_save(tmp_path):
    """And is not aborted by the thread that writes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the main thread ends\n", "")
