"""Checkpoints on one rank: what is restored, what is refused and with which message, what a failed save leaves."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_pretrain.checkpoint import CheckpointError, folders, optimizer_state, parallel_write, save_load
from hunyuan_pretrain.checkpoint.folders import find_checkpoints
from hunyuan_pretrain.checkpoint.host_memory import HostMemory
from hunyuan_pretrain.diagnostics.parity import trace_steps
from hunyuan_pretrain.parallel.sharding import sharded_tensor
from hunyuan_pretrain.plan.counts import checkpoint_bytes
from hunyuan_pretrain.runtime.seeding import generator_state
from hunyuan_pretrain.train import same_start, setup
from hunyuan_pretrain.train.run import Run
from tests.helpers.gpt_on_cpu import save_by_core
from tests.helpers.one_rank import moments, on_this_rank
from tests.helpers.runs import experiment_fields


def fields(corpus: Path, run_dir: Path, dtype: str = "fp32", **changes: Any) -> dict[str, Any]:
    return experiment_fields(corpus, run_dir, model__num_layers=2, precision={"dtype": dtype}, **changes)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run after one step."""
    run = on_this_rank(fields(corpus, tmp_path_factory.mktemp("run")))
    trace_steps(run, range(1))
    return run


@pytest.fixture(scope="module")
def saved(run: Run) -> Path:
    return save_load.save(run.run_dir, 1, run.chunks, run.optimizer, None)


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of a complete checkpoint, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def load_into(run: Run, folder: Path) -> int:
    return save_load.load(folder, run.chunks, run.optimizer)


LAYOUTS: dict[str, dict[str, Any]] = {
    "distributed optimizer": {},
    "plain optimizer": {"parallel": {"use_distributed_optimizer": False}},
    "overlapped": {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "half offloaded": {"optimizer__cpu_offload_fraction": 0.5},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_a_loaded_run_is_bitwise_identical_to_the_saved_one(corpus, tmp_path, dtype, changes):
    """Weights, both moments, the update count and each group's own rate: the next two steps are bitwise identical."""
    first = on_this_rank(fields(corpus, tmp_path, dtype, **changes))
    trace_steps(first, range(2))
    folder = save_load.save(tmp_path, 2, first.chunks, first.optimizer, None)
    at_save = moments(first)
    second = on_this_rank(fields(corpus, tmp_path, dtype, **changes))
    assert load_into(second, folder) == 2
    loaded = moments(second)
    assert at_save.keys() == loaded.keys()
    assert all(np.array_equal(at_save[name], loaded[name]) for name in at_save)
    for actual, expected in zip(trace_steps(second, range(2, 4)), trace_steps(first, range(2, 4)), strict=True):
        assert (actual.scalars, actual.shares) == (expected.scalars, expected.shares)
        for name, parameter in expected.parameters.items():
            assert np.array_equal(actual.parameters[name], parameter), name
    assert [group["lr"] for group in second.optimizer.param_groups] == [
        group["lr"] for group in first.optimizer.param_groups
    ]


def test_generators_are_restored(run, saved):
    before = torch.get_rng_state()
    torch.manual_seed(99)
    load_into(run, saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_hyperparameters_come_from_the_experiment_not_from_the_checkpoint(corpus, tmp_path, saved):
    changed = fields(corpus, tmp_path, optimizer={"lr": 1e-2, "weight_decay": 0.5, "adam_beta2": 0.9})
    run = on_this_rank(changed)
    load_into(run, saved)
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0, 0.5}
    assert {tuple(group["betas"]) for group in run.optimizer.param_groups} == {(0.9, 0.9)}


@pytest.mark.parametrize("offloaded", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_init_from_loads_only_the_weights(corpus, tmp_path, saved, run, dtype, offloaded):
    """And the optimizer's own copy of them, which the first step would otherwise write over the weights."""
    settings = {"init_from": str(saved)}
    fresh = on_this_rank(
        fields(corpus, tmp_path, dtype, checkpoint=settings, optimizer={"lr": 1e-4, "cpu_offload_fraction": offloaded})
    )
    met = same_start.meet(fresh.experiment)
    assert setup._load_or_init(fresh.experiment, fresh.chunks, fresh.optimizer, met).first_step == 0
    assert not any(value.any() for value in moments(fresh).values()), "moments are those of no step"
    loaded = dict(fresh.chunks[0].named_parameters())
    for name, parameter in run.chunks[0].named_parameters():
        assert torch.equal(loaded[name].detach().float(), parameter.detach().to(loaded[name].dtype).float()), name
    trace_steps(fresh, range(1))
    rounding = 2**-7 if dtype == "bf16" else 0.0
    for name, parameter in run.chunks[0].named_parameters():
        difference = (loaded[name].detach().float() - parameter.detach()).abs()
        assert difference.max() <= 3e-4 + rounding * parameter.abs().max(), (
            f"{name} is not the loaded weight after one small step"
        )


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)


def flip_a_bit(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lose_a_file(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def edit_marker(folder: Path, old: str, new: str) -> None:
    text = (folder / "complete.json").read_text()
    assert text.count(old) == 1
    (folder / "complete.json").write_text(text.replace(old, new))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    # damage: how, the message, whether it is found before the digests are compared
    "truncated": (
        truncate,
        r"\.distcp is missing or damaged: its size or sha256 is not the one in complete.json",
        False,
    ),
    "bit flipped": (
        flip_a_bit,
        r"\.distcp is missing or damaged: its size or sha256 is not the one in complete.json",
        True,
    ),
    "file lost": (lose_a_file, r"\.distcp is missing or damaged", False),
    "no marker": (
        lambda folder: (folder / "complete.json").unlink(),
        r"not a complete checkpoint \(no complete.json\)",
        False,
    ),
    "marker cut": (lambda folder: os.truncate(folder / "complete.json", 100), r"complete.json: damaged: ", False),
    "marker flipped": (
        lambda folder: edit_marker(folder, '"world_size": 1', '"world_size": 3'),
        "its content is not what was written",
        False,
    ),
    "marker empty": (
        lambda folder: (folder / "complete.json").write_text("{}"),
        "damaged: files, model, step, world_size missing",
        False,
    ),
}


@pytest.mark.parametrize(("damage", "words", "is_found"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_a_reason_and_leaves_the_model_unchanged(
    run, checkpoint, damage, words, is_found
):
    damage(checkpoint)
    assert find_checkpoints(checkpoint.parents[1]) == ([checkpoint] if is_found else [])
    before = [parameter.detach().clone() for parameter in run.chunks[0].parameters()]
    with pytest.raises(CheckpointError, match=words):
        load_into(run, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(before, run.chunks[0].parameters(), strict=True))


def test_an_unfinished_folder_is_never_found(checkpoint):
    checkpoint.rename(checkpoint.with_name(checkpoint.name + ".partial"))
    assert find_checkpoints(checkpoint.parents[1]) == []


def test_a_missing_checkpoint_is_reported_with_the_existing_ones(run, checkpoint):
    with pytest.raises(
        CheckpointError, match=r"step_0000009: not a complete checkpoint .*; complete ones there: step_0000001"
    ):
        load_into(run, checkpoint.with_name("step_0000009"))


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(corpus, tmp_path, saved):
    other = on_this_rank(fields(corpus, tmp_path, model__ffn_hidden_size=64, model__cla_share_factor=1))
    with pytest.raises(CheckpointError) as error:
        load_into(other, saved)
    assert str(error.value).splitlines() == [
        f"{saved}: a checkpoint of another model",
        "  model.ffn_hidden_size: 48 in the checkpoint, 64 in the config",
        "  model.cla_share_factor: 2 in the checkpoint, 1 in the config",
    ]


def test_keep_last_removes_older_checkpoints_after_the_newer_one_is_complete(run, tmp_path):
    for step in (1, 2, 3):
        save_load.save(tmp_path, step, run.chunks, run.optimizer, keep_last=2)
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["step_0000002", "step_0000003"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000002", "step_0000003"]


def test_a_save_suppresses_cores_warning_about_another_writer(run, tmp_path, caplog):
    """Core 0.19 has another writer, and says so."""
    save_load.save(tmp_path, 5, run.chunks, run.optimizer, None)
    logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").warning("MCore's async save is deprecated")
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]


def test_the_marker_describes_the_checkpoint(saved, run):
    marker = json.loads((saved / "complete.json").read_text())
    assert (marker["step"], marker["world_size"]) == (1, 1)
    assert marker["model"] == run.experiment.model.model_dump()
    assert marker["files"].keys() == {path.name for path in saved.iterdir()} - {"complete.json"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_plan_gives_the_bytes_of_a_checkpoint(corpus, tmp_path, dtype):
    """Of its tensors."""
    run = on_this_rank(fields(corpus, tmp_path, dtype))
    trace_steps(run, range(1))
    folder = save_load.save(tmp_path, 1, run.chunks, run.optimizer, None)
    tensors = [
        entry
        for entry in FileSystemReader(folder).read_metadata().state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    ]
    size = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)
    assert size == checkpoint_bytes(run.experiment)


def test_a_checkpoint_of_another_precision_is_refused(corpus, tmp_path, saved):
    words = (
        "its weights are torch.float32, those of this run torch.bfloat16; continue in that precision.dtype, or start "
        "a new run"
    )
    with pytest.raises(CheckpointError, match=words):
        load_into(on_this_rank(fields(corpus, tmp_path, "bf16")), saved)


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAILURES = {
    "disk full": (NO_SPACE, "No space left on device"),
    "wrapped by torch": (
        RuntimeError("writing failed\nOSError: [Errno 28] No space left on device\nin worker 3"),
        "No space left on device",
    ),
    "a BaseException of torch": (
        CheckpointException("write", {0: _wrap_exception(NO_SPACE)}),
        "No space left on device",
    ),
    "a short write": (
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        "No space left on device",
    ),
    "something else": (RuntimeError("first\nthe reason"), "the reason"),
}


@pytest.mark.parametrize(("error", "reason"), FAILURES.values(), ids=FAILURES)
def test_a_failed_save_leaves_nothing_and_keeps_older_checkpoints(run, tmp_path, monkeypatch, error, reason):
    older = save_load.save(tmp_path, 1, run.chunks, run.optimizer, None)

    def fail(path: Path, items: object) -> None:
        path.with_name("half").write_text("x")
        raise error

    monkeypatch.setattr(parallel_write, "write_items", fail)
    words = f"step_0000002: the checkpoint could not be written: {reason}; older checkpoints are untouched"
    with pytest.raises(CheckpointError, match=words):
        save_load.save(tmp_path, 2, run.chunks, run.optimizer, keep_last=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]
    monkeypatch.undo()
    assert load_into(run, older) == 1


def test_a_checkpoint_of_format_1_written_by_core_alone_still_loads(corpus, run, tmp_path):
    """As every checkpoint was written before ranks shared the writing: through core's own entry point, with other state
    groups, and a marker without the layout."""
    folder = tmp_path / "checkpoints" / "step_0000001"
    folder.mkdir(parents=True)
    state = {
        "model": {name: tensor for model in run.chunks for name, tensor in model.sharded_state_dict().items()},
        "optimizer": {
            name: {kind: sharded_tensor(f"optimizer.{kind}.", tensor, placement) for kind, tensor in tensors.items()}
            for name, tensors, placement in optimizer_state.full_moments(run.chunks, run.optimizer)
        },
        "generators": ShardedObject("generators", generator_state(), (1,), (0,), replica_id=0),
        "fp8": {},
    }
    save_by_core(state, folder)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    marker = {
        "format_version": 1,
        "step": 1,
        "world_size": 1,
        "model": run.experiment.model.model_dump(),
        "dtype": "torch.float32",
    }
    (folder / "complete.json").write_text(json.dumps(marker | {"fp8_scaling": None, "torch": "2.9.0", "files": files}))
    expected = moments(run)
    fresh = on_this_rank(fields(corpus, tmp_path / "fresh"))
    resumed = save_load.load_newest(tmp_path, fresh.chunks, fresh.optimizer)
    assert resumed is not None
    assert (resumed.folder, resumed.notes) == (folder, [])
    actual = moments(fresh)
    assert all(np.array_equal(actual[name], expected[name]) for name in expected)
    for theirs, mine in zip(run.chunks[0].parameters(), fresh.chunks[0].parameters(), strict=True):
        assert torch.equal(theirs, mine)


def test_a_checkpoint_of_a_newer_format_is_refused(run, checkpoint):
    marker = json.loads((checkpoint / "complete.json").read_text()) | {"format_version": 99}
    (checkpoint / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(
        CheckpointError, match="written by a newer program: format_version is 99, this program reads up to 1"
    ):
        load_into(run, checkpoint)


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, path: Path, code: int) -> None:
    """os.<name> fails for a path and what is below."""
    real = getattr(os, name)

    def call(place: Any = ".", *arguments: Any, **options: Any) -> Any:
        if not isinstance(place, int) and path in (Path(place), *Path(place).parents):
            raise OSError(code, os.strerror(code), str(place))
        return real(place, *arguments, **options)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["stat", "open"])
def test_no_older_checkpoint_is_used_in_place_of_one_that_cannot_be_read_now(run, tmp_path, monkeypatch, name, code):
    for step in (1, 2):
        save_load.save(tmp_path, step, run.chunks, run.optimizer, None)
    newest = folders.checkpoint_folder(tmp_path, 2)
    with monkeypatch.context() as patch:
        refuse(patch, name, newest / "__0_0.distcp", code)
        reason = rf"step_0000002: __0_0.distcp cannot be read now: .*\({errno.errorcode[code]}\); no older one is used"
        with pytest.raises(CheckpointError, match=reason):
            save_load.load_newest(tmp_path, run.chunks, run.optimizer)
        if name == "stat":
            with pytest.raises(CheckpointError, match=reason):
                find_checkpoints(tmp_path)
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["step_0000001", "step_0000002"]


def test_no_older_checkpoint_is_used_in_place_of_one_of_a_newer_program(run, tmp_path):
    for step in (1, 2):
        marker = save_load.save(tmp_path, step, run.chunks, run.optimizer, None) / "complete.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format_version": 99}))
    for use in (
        lambda: save_load.load_newest(tmp_path, run.chunks, run.optimizer),
        partial(find_checkpoints, tmp_path),
    ):
        with pytest.raises(CheckpointError, match=r"written by a newer program.*; no older one is used in its place"):
            use()
    assert marker.exists()
    save_load.save(tmp_path, 3, run.chunks, run.optimizer, None)
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["step_0000001", "step_0000003"]


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_an_empty_one(run, checkpoint, monkeypatch):
    refuse(monkeypatch, "listdir", checkpoint.parent, errno.EACCES)
    refuse(monkeypatch, "scandir", checkpoint.parent, errno.EACCES)
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be read now: Permission denied \(EACCES\)"):
        save_load.load_newest(checkpoint.parents[1], run.chunks, run.optimizer)


def test_a_marker_whose_step_differs_from_its_folder_is_refused(run, checkpoint):
    """Before markers had their own digest, a flipped bit in the step would have resumed from another step."""
    renamed = checkpoint.rename(checkpoint.with_name("step_0000009"))
    with pytest.raises(CheckpointError, match=r"step_0000009/complete.json: damaged: it belongs to step 1"):
        load_into(run, renamed)


def test_the_marker_holds_what_the_caller_records(run, tmp_path):
    folder = save_load.save(
        tmp_path, 1, run.chunks, run.optimizer, None, record={"position": {"tokens": 512}, "step": "not this"}
    )
    marker = save_load.read_marker(folder)
    assert (marker["position"], marker["step"]) == ({"tokens": 512}, 1)


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of live tensors created inside it, except those on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        from torch.utils._pytree import tree_leaves

        inputs = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((arguments, settings))
            if isinstance(leaf, torch.Tensor)
        }
        result = function(*arguments, **(settings or {}))
        for leaf in tree_leaves(result):
            if (
                isinstance(leaf, torch.Tensor)
                and leaf.device.type != "meta"
                and leaf.untyped_storage()._cdata not in inputs
            ):
                storage = leaf.untyped_storage()
                self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        self.known = {key: (storage, size) for key, (storage, size) in self.known.items() if not storage.expired()}
        return sum(size for _, size in self.known.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_saving_and_resuming_add_at_most_one_tensor_of_one_parameter_on_the_device(
    corpus, tmp_path, monkeypatch, dtype
):
    """In addition to the model and the optimizer. Host copies go to the meta device here, so that what remains is on
    the device."""
    run = on_this_rank(fields(corpus, tmp_path, dtype))
    trace_steps(run, range(1))
    largest = max(4 * parameter.numel() for parameter in run.chunks[0].parameters())
    scalars = 4 * 64 * len(list(run.chunks[0].parameters()))  # update counts
    on_host = {
        name: {kind: tensor.clone() for kind, tensor in tensors.items()}
        | {"weight": dict(run.chunks[0].named_parameters())[name].detach().clone()}
        for name, tensors, _ in optimizer_state.full_moments(run.chunks, run.optimizer)
    }
    with monkeypatch.context() as patch, LiveBytes() as saving:
        patch.setattr(optimizer_state, "_to_host", lambda tensor, memory: tensor.to("meta"))
        stage, memory = optimizer_state.Stage(run.chunks), HostMemory(torch.device("cpu"))
        memory.reserve(optimizer_state.bytes_on_host(run.chunks))
        state = optimizer_state.state_on_host(run.chunks, run.optimizer, stage, memory)
    assert len(state) == len(on_host) * (3 if dtype == "fp32" else 4) - (
        0 if dtype == "fp32" else sum(name.endswith("router.weight") for name in on_host)
    )
    assert 0 < saving.peak <= 2 * largest, "the state is there at once"
    expected = moments(run)
    with LiveBytes() as loading:
        optimizer_state.restore_state(run.chunks, run.optimizer, on_host, 1, optimizer_state.Stage(run.chunks))
    assert loading.peak <= loading.now + 2 * largest + scalars
    assert all(not tensors for tensors in on_host.values()), "what was read is freed on the way"
    assert all(np.array_equal(value, expected[name]) for name, value in moments(run).items())


def test_only_partial_saves_of_earlier_attempts_are_removed(checkpoint):
    run_dir = checkpoint.parents[1]
    for name in ("step_0000002.partial", "step_0000001.removed.partial", "step_0000003.damaged", "mine.partial"):
        (checkpoint.with_name(name)).mkdir()
        (checkpoint.with_name(name) / "file").write_text("x")
    (run_dir / "elsewhere").mkdir()
    checkpoint.with_name("step_0000004.partial").symlink_to(run_dir / "elsewhere")
    lines = save_load.remove_partials(run_dir)
    assert [line.split("checkpoints/")[-1] for line in lines] == [
        "step_0000001.removed.partial: what an ended attempt left of a save or of a removal",
        "step_0000002.partial: what an ended attempt left of a save or of a removal",
    ]
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == [
        "mine.partial",
        "step_0000001",
        "step_0000003.damaged",
        "step_0000004.partial",
    ]
    assert find_checkpoints(run_dir) == [checkpoint]


def test_keep_last_never_removes_the_newest_in_favour_of_checkpoints_of_an_earlier_attempt(run, tmp_path):
    """A run resumed from an older checkpoint, as with --from-step, meets later ones of the attempt before."""
    for step in (2, 9):
        save_load.save(tmp_path, step, run.chunks, run.optimizer, None)
    save_load.save(tmp_path, 3, run.chunks, run.optimizer, keep_last=1)
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["step_0000003", "step_0000009"]


def test_checkpoints_later_than_the_requested_one_are_kept(run, tmp_path):
    for step in (1, 2):
        save_load.save(tmp_path, step, run.chunks, run.optimizer, None)
    truncate(tmp_path / "checkpoints" / "step_0000002")
    resumed = save_load.load_newest(tmp_path, run.chunks, run.optimizer, last_step=1)
    assert resumed is not None
    assert (resumed.folder.name, resumed.notes) == ("step_0000001", [])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000001", "step_0000002"]


def test_a_save_leaves_no_process_and_no_thread_behind(run, tmp_path):
    """A process that outlives a rank that exits after an error keeps the job's output open, and its reader waits
    forever."""
    before = psutil.Process().children(recursive=True)
    threads = threading.active_count()
    save_load.save(tmp_path, 1, run.chunks, run.optimizer, None)
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []
    assert threading.active_count() == threads


def test_a_foreign_file_in_its_folder_fails_a_save(run, tmp_path, monkeypatch):
    """Two runs that save to the same folder would mix their files; only files that this run's ranks have written are
    committed."""
    real = parallel_write.write_items

    def with_stranger(path: Path, items: Any) -> Any:
        path.with_name("__7_0.distcp").write_text("x")
        return real(path, items)

    monkeypatch.setattr(parallel_write, "write_items", with_stranger)
    with pytest.raises(
        CheckpointError, match=r"__7_0.distcp: not what the ranks have written; is another run writing to this folder\?"
    ):
        save_load.save(tmp_path, 1, run.chunks, run.optimizer, None)
