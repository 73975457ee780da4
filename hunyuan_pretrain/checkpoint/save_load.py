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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.runtime.seeding import generator_state, restore_generator_state

FORMAT_VERSION = 1
MARKER = "complete.json"
# the optimizer state in the shapes and under the names of the parameters, so that another layout can read it
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:07d}"


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Every file's size is checked here, its digest when it is read."""
    return sorted(folder for folder in (run_dir / "checkpoints").glob("step_*") if _is_complete(folder))


def save(run_dir: Path, step: int, model: HunyuanModel, optimizer: MegatronOptimizer, keep_last: int | None) -> Path:
    """Write the checkpoint after `step` steps and remove complete ones beyond the newest `keep_last`.

    Communicates: all ranks. Raises CheckpointError on every rank, with the first rank's reason, if any rank cannot write; nothing
    of the attempt stays and older checkpoints are untouched.
    """
    folder = checkpoint_folder(run_dir, step)
    partial = folder.with_name(folder.name + ".partial")
    error = _on_rank_0(lambda: _make_empty(partial))
    if error is None:
        error = _first_error(lambda: _write(partial, model, optimizer))
    if error is None:
        error = _on_rank_0(lambda: _commit(partial, folder, step, model.config.architecture))
    if error is not None:
        _on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise CheckpointError(f"{folder}: the checkpoint could not be written: {error}; older checkpoints are untouched")
    if keep_last is not None:
        _on_rank_0(lambda: _remove_all_but(run_dir, keep_last))
    return folder


def load(folder: Path, model: HunyuanModel, optimizer: MegatronOptimizer | None) -> int:
    """Read a checkpoint into the model, and with `optimizer` its state and this rank's generators too; returns the step it was taken after.

    Communicates: all ranks. Raises CheckpointError if the checkpoint is incomplete, damaged, or of another model.
    """
    marker = read_marker(folder)
    refuse_other_model(folder, marker, model.config.architecture)
    error = _first_error(lambda: _verify(folder, marker))
    if error is not None:
        raise CheckpointError(f"{folder}: {error}")
    model_part = model.sharded_state_dict()
    wanted: dict[str, Any] = {"model": model_part}
    optimizer_state: Any = None
    if optimizer is not None:
        _allocate_moments(optimizer)
        optimizer_state = optimizer.sharded_state_dict(model_part, is_loading=True, metadata=OPTIMIZER_METADATA)
        wanted["optimizer"] = _sharded_part(optimizer_state)
        if marker["world_size"] == dist.get_world_size():
            wanted["generators"] = _generator_object()
    loaded = dist_checkpointing.load(wanted, str(folder))
    model.load_state_dict(loaded["model"])
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])
        if "generators" in wanted:
            restore_generator_state(loaded["generators"])
    return int(marker["step"])


def read_marker(folder: Path) -> dict[str, Any]:
    """complete.json of a checkpoint; raises CheckpointError where there is none or it cannot be read."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8"))
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


def _write(partial: Path, model: HunyuanModel, optimizer: MegatronOptimizer) -> None:
    model_part = model.sharded_state_dict()
    state = {
        "model": model_part,
        "optimizer": _sharded_part(optimizer.sharded_state_dict(model_part, metadata=OPTIMIZER_METADATA)),
        "generators": _generator_object(),
    }
    dist_checkpointing.save(state, str(partial))


def _torch_adam_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers whose update is torch's own Adam, for which core's loading of `fully_reshardable` state is unfinished."""
    parts = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    return [part for part in parts if isinstance(part.optimizer, torch.optim.Adam)]


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Zeros for the state that is about to be read: core asks torch's Adam for its step even where it has not made one."""
    for part in _torch_adam_parts(optimizer):
        for parameter in (parameter for group in part.optimizer.param_groups for parameter in group["params"]):
            if not part.optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load the state; for torch's Adam, core would look for a `step` among the tensors of each parameter, where it is not stored."""
    parts = _torch_adam_parts(optimizer)
    for part in parts:
        part._set_main_param_and_optimizer_states = partial(_set_parameter_state, part)
    optimizer.load_state_dict(state)
    for part in parts:
        del part._set_main_param_and_optimizer_states
        for values in part.optimizer.state.values():
            values["step"] = values["step"].clone()  # core lets all parameters share one tensor, which each of them would count up


def _set_parameter_state(part: DistributedOptimizer, model_parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    group, place = part.model_param_group_index_map[model_parameter]
    parameter = part.optimizer.param_groups[group]["params"][place]
    parameter.copy_(tensors["param"])
    for name in ("exp_avg", "exp_avg_sq"):
        part.optimizer.state[parameter][name].copy_(tensors[name])


def _sharded_part(tree: Any) -> dict[Any, Any]:
    """The tensors of core's optimizer state, each in its place; lists become dicts.

    The rest, settings of parameter groups, is not saved: it is that of the running experiment, and core stores it in a form that another
    layout cannot read.
    """
    items = enumerate(tree) if isinstance(tree, list) else tree.items()
    parts = {key: value if isinstance(value, ShardedBase) else _sharded_part(value) for key, value in items if _may_hold_tensors(value)}
    return {key: part for key, part in parts.items() if isinstance(part, ShardedBase) or part}


def _may_hold_tensors(value: Any) -> bool:
    return isinstance(value, (ShardedBase, dict, list))


def _filled(tree: Any, loaded: Any) -> Any:
    """`tree` with its tensors replaced by what was loaded for `_sharded_part(tree)`."""
    if isinstance(tree, ShardedBase):
        return loaded
    if isinstance(tree, LocalNonpersistentObject):
        return tree.unwrap()
    if isinstance(tree, dict):
        return {key: _filled(value, (loaded or {}).get(key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_filled(value, (loaded or {}).get(index)) for index, value in enumerate(tree)]
    return tree


def _restore_optimizer(optimizer: MegatronOptimizer, state: Any, num_updates: int) -> None:
    """Give each of core's chained optimizers its state, and Adam the number of updates made: every step of a run makes one."""
    parts = optimizer.chained_optimizers
    for index, part in enumerate(parts):
        part_state = state[index] if len(parts) > 1 else state
        inner = part_state.get("optimizer", part_state)
        if isinstance(part, DistributedOptimizer):
            for group in inner["param_groups"]:
                group["step"] = float(num_updates)
        else:
            inner["state"]["common_step"] = torch.tensor(float(num_updates))
    optimizer.load_state_dict(state)
    for part in parts:
        for moments in part.optimizer.state.values():
            if "step" in moments:  # core gives all parameters the same tensor, to which the fused kernels would add once for each
                moments["step"] = moments["step"].clone()


def _generator_object() -> ShardedObject:
    rank, world = dist.get_rank(), dist.get_world_size()
    return ShardedObject("generators", generator_state(), (world,), (rank,), replica_id=0)


def _commit(partial: Path, folder: Path, step: int, model: ModelConfig) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in _data_files(partial)}
    content = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": dist.get_world_size(),
        "model": model.model_dump(),
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
    """Run `action` on every rank; the first rank's error message on all of them, or None."""
    try:
        action()
        mine = None
    except Exception as error:  # every failure has to reach the other ranks, which would wait for ever
        mine = _reason(error)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    return next((error for error in errors if error), None)


def _on_rank_0(action: Any) -> str | None:
    """Run `action` on rank 0 only; its error message on every rank, or None."""
    return _first_error(action if dist.get_rank() == 0 else lambda: None)


def _reason(error: BaseException) -> str:
    """What a person needs of an error; torch wraps the operating system's in several layers."""
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
        if (isinstance(error, OSError) and error.errno == code) or os.strerror(code) in text:
            return os.strerror(code)
    return text.strip().splitlines()[-1] if text.strip() else type(error).__name__
