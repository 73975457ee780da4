"""Checkpoints on disk: megatron's distributed format, committed in two phases, verified before it is read.

    <run_dir>/checkpoints/step_0000100/     one checkpoint
        complete.json                       written last: step, model, size and sha256 of every other file
        common.pt, __0_0.distcp, ...        megatron's distributed checkpoint

A checkpoint is written into step_NNNNNNN.partial, its files are digested and synced, complete.json is written, and only then
does the folder get its name. A folder without its name or without a complete.json that matches is never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hunyuan_pretrain.model  # noqa: F401  makes megatron importable

# isort: split
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException  # not an Exception, but a BaseException

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.optimizer_state import (
    Moments,
    full_moments,
    restore_optimizer_state,
    sharded_optimizer_state,
    wanted_optimizer_state,
)
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.model.fp8 import Recipe, load_scaling_state, scaling_state
from hunyuan_pretrain.model.fp8_parameters import write
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel.sharding import sharded_tensor
from hunyuan_pretrain.runtime.seeding import generator_state, restore_generator_state

FORMAT_VERSION = 1
MARKER = "complete.json"
SYSTEM_REASONS = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)]
"""Why a disk does not take a file, in the operating system's words; the best explanation where several ranks fail."""

FULL_DISK_BYTES = 1 << 20
"""A disk with less free space than this after a failed write is full; a writer may leave the rest of a block."""


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:07d}"


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Every file's size is checked here, its digest when it is read."""
    return sorted(folder for folder in (run_dir / "checkpoints").glob("step_*") if _is_complete(folder))


def save(run_dir: Path, step: int, chunks: list[HunyuanModel], optimizer: MegatronOptimizer, keep_last: int | None) -> Path:
    """Write the checkpoint after `step` steps and remove complete ones beyond the newest `keep_last`.

    Communicates: all ranks. Raises CheckpointError on every rank, with the first rank's reason, if any rank cannot write; nothing
    of the attempt stays and older checkpoints are untouched.
    """
    folder = checkpoint_folder(run_dir, step)
    partial = folder.with_name(folder.name + ".partial")
    error = _on_rank_0(lambda: _make_empty(partial))
    if error is None:
        error = _first_error(lambda: _write(partial, chunks, optimizer))
    if error is None:
        error = _on_rank_0(lambda: _commit(partial, folder, step, chunks[0]))
    if error is not None:
        _on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise CheckpointError(f"{folder}: the checkpoint could not be written: {error}; older checkpoints are untouched")
    if keep_last is not None:
        _on_rank_0(lambda: _remove_all_but(run_dir, keep_last))
    return folder


def load(folder: Path, chunks: list[HunyuanModel], optimizer: MegatronOptimizer | None) -> int:
    """Read a checkpoint into the model chunks of this rank, and with `optimizer` its state and this rank's generators too.

    Returns the step that it was taken after.

    The scales of the delayed FP8 recipe are read where the checkpoint has them of the same recipe; otherwise they begin anew, as in a run
    that changes its recipe.

    Communicates: all ranks. Raises CheckpointError if the checkpoint is incomplete, damaged, or of another model.
    """
    marker = read_marker(folder)
    refuse_other_model(folder, marker, chunks[0].config.architecture)
    mine, theirs = str(chunks[0].config.params_dtype), marker.get("dtype")
    if optimizer is not None and theirs != mine:
        hint = "go on in that precision.dtype, or start a new run from its weights with checkpoint.init_from"
        raise CheckpointError(f"{folder}: its weights are {theirs}, those of this run {mine}; {hint}")
    error = _first_error(lambda: _verify(folder, marker))
    if error is not None:
        raise CheckpointError(f"{folder}: {error}")
    wanted: dict[str, Any] = {"model": _sharded_weights(chunks)}
    if optimizer is not None:
        wanted["optimizer"] = wanted_optimizer_state(chunks)
        if marker["world_size"] == dist.get_world_size():
            wanted["generators"] = _generator_object()
        if marker.get("fp8_scaling") == scaling_recipe(chunks[0]):
            wanted["fp8"] = _sharded_scales(chunks)
    loaded = dist_checkpointing.load(wanted, str(folder))
    if "fp8" in wanted:  # before the weights, which they quantise where those are in FP8
        load_scaling_state(chunks, loaded["fp8"])
    for name, parameter in ((name, parameter) for model in chunks for name, parameter in model.named_parameters()):
        write(parameter, loaded["model"][name].view(parameter.shape))
    if optimizer is not None:
        restore_optimizer_state(chunks, optimizer, loaded["optimizer"], num_updates=int(marker["step"]))  # every step makes one
        if "generators" in wanted:
            restore_generator_state(loaded["generators"])
    return int(marker["step"])


def read_marker(folder: Path) -> dict[str, Any]:
    """complete.json of a checkpoint; raises CheckpointError where there is none or it cannot be read."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        missing = {"step", "world_size", "model", "files"} - marker.keys()
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        return marker
    except FileNotFoundError:
        near = ", ".join(path.name for path in find_checkpoints(folder.parent.parent)) or "none"
        raise CheckpointError(f"{folder}: not a complete checkpoint (no {MARKER}); complete ones there: {near}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / MARKER}: damaged: {error}") from None


def refuse_other_model(folder: Path, marker: dict[str, Any], model: ModelConfig) -> None:
    """Raise CheckpointError naming every architecture field in which the checkpoint differs from `model`."""
    mine, theirs = model.model_dump(), marker["model"]
    differences = [
        f"  model.{key}: {theirs.get(key)} in the checkpoint, {mine[key]} in the config" for key in mine if mine[key] != theirs.get(key)
    ]
    if differences:
        raise CheckpointError(f"{folder}: a checkpoint of another model\n" + "\n".join(differences))


def _write(partial: Path, chunks: list[HunyuanModel], optimizer: MegatronOptimizer) -> None:
    moments = list(full_moments(chunks, optimizer))
    state = {
        "model": _sharded_weights(chunks) | _unquantised_weights(chunks, moments),
        "optimizer": sharded_optimizer_state(moments),
        "generators": _generator_object(),
        "fp8": _sharded_scales(chunks),
    }
    try:
        dist_checkpointing.save(state, str(partial))
    except (Exception, CheckpointException) as error:
        # megatron-core 0.19's writer processes do not hand on why they failed; the full disk is still there to be seen
        if _reason(error) not in SYSTEM_REASONS and shutil.disk_usage(partial).free < FULL_DISK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def scaling_recipe(model: HunyuanModel) -> list[Any] | None:
    """What must be equal for the scales of a checkpoint to be those of a run; None where a run has none that outlive a step."""
    formats = model.config.number_formats
    if formats.fp8_recipe != "delayed":
        return None
    recipe = Recipe.of(formats)
    return [recipe.margin, recipe.history_steps, recipe.takes_max, str(recipe.backward_dtype), *formats.layers_in_bf16]


def _sharded_scales(chunks: list[HunyuanModel]) -> dict[str, ShardedTensor]:
    """The state of the delayed recipe: the same on all ranks that share a tensor, and that of each expert where the expert is."""
    groups, found = chunks[0].groups, {}
    for name, tensor in scaling_state(chunks).items():
        is_expert = ".experts." in name
        offsets = [(tensor.dim() - 1, groups.ep.rank(), groups.ep.size())] if is_expert else []
        replica = (0, groups.expt_tp.rank(), groups.expt_dp.rank()) if is_expert else (0, groups.tp.rank(), groups.dp_cp.rank())
        found[name] = ShardedTensor.from_rank_offsets(f"fp8.{name}", tensor, *offsets, replica_id=replica)
    return found


def _sharded_weights(chunks: list[HunyuanModel]) -> dict[str, Any]:
    return {name: tensor for model in chunks for name, tensor in model.sharded_state_dict().items()}


def _unquantised_weights(chunks: list[HunyuanModel], moments: list[Moments]) -> dict[str, Any]:
    """Weights that the model has in FP8 only, as they are in checkpoints of other runs: main weights, rounded to the dtype of the run."""
    in_fp8 = {name: p.dtype for model in chunks for name, p in model.named_parameters() if is_float8tensor(p)}
    return {name: sharded_tensor("", state["main"].to(in_fp8[name]), place) for name, state, place in moments if name in in_fp8}


def _generator_object() -> ShardedObject:
    rank, world = dist.get_rank(), dist.get_world_size()
    return ShardedObject("generators", generator_state(), (world,), (rank,), replica_id=0)


def _commit(partial: Path, folder: Path, step: int, model: HunyuanModel) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in _data_files(partial)}
    content = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": dist.get_world_size(),
        "model": model.config.architecture.model_dump(),
        "dtype": str(model.config.params_dtype),
        "fp8_scaling": scaling_recipe(model),
        "torch": torch.__version__,
        "files": files,
    }
    with (partial / MARKER).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if folder.exists():  # the same step of an earlier attempt at this run
        shutil.rmtree(folder)
    partial.rename(folder)
    _sync_folder(folder.parent)


def _verify(folder: Path, marker: dict[str, Any]) -> None:
    """Compare this rank's share of the files with the marker's digests."""
    names = sorted(marker["files"])
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        path, expected = folder / name, marker["files"][name]
        if not path.exists() or path.stat().st_size != expected["bytes"] or _digest(path) != expected["sha256"]:
            raise CheckpointError(f"{name} is missing or damaged: its size or sha256 is not the one in {MARKER}")


def _is_complete(folder: Path) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return not folder.name.endswith(".partial") and all(
            (folder / name).stat().st_size == file["bytes"] for name, file in marker["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _data_files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.iterdir() if path.name != MARKER)


def _digest(path: Path) -> str:
    """sha256 of a file that is on disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _remove_all_but(run_dir: Path, keep_last: int) -> None:
    for folder in find_checkpoints(run_dir)[:-keep_last]:
        shutil.rmtree(folder)


def _first_error(action: Any) -> str | None:
    """Run `action` on every rank; on all of them one error message, the operating system's or else the first rank's, or None."""
    try:
        action()
        mine = None
    except (Exception, CheckpointException) as error:  # every failure has to reach the other ranks, which would wait for ever
        mine = _reason(error)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    told = [error for error in errors if error]
    return next((error for error in told if error in SYSTEM_REASONS), told[0] if told else None)


def _on_rank_0(action: Any) -> str | None:
    """Run `action` on rank 0 only; its error message on every rank, or None."""
    return _first_error(action if dist.get_rank() == 0 else lambda: None)


def _reason(error: BaseException) -> str:
    """What a person needs of an error; torch wraps the operating system's in several layers."""
    text = str(error)
    for reason in SYSTEM_REASONS:
        if (isinstance(error, OSError) and error.strerror == reason) or reason in text:
            return reason
    if "unexpected pos" in text:  # what torch's writer says of a write that was cut short
        return os.strerror(errno.ENOSPC)
    return text.strip().splitlines()[-1] if text.strip() else type(error).__name__
