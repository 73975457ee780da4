"""Checkpoints in megatron's distributed format, committed in two phases and verified before they are read. folders.py
describes the files.

A checkpoint is written into step_NNNNNNN.partial. Every rank digests and syncs the files that it wrote, rank 0 writes
complete.json, and only then is the folder renamed to its final name. A folder without its final name, or without a
matching complete.json, is never read.

If one rank fails between two collectives, all ranks are told (parallel/agreement.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# isort: split
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer import MegatronOptimizer

from hunyuan_pretrain.checkpoint import CheckpointError, folders
from hunyuan_pretrain.checkpoint.folders import (
    checkpoint_folder,
    find_checkpoints,
    read_marker,
    refuse_other_model,
    remove_partials,
)
from hunyuan_pretrain.checkpoint.inert_pickle import UNSAFE
from hunyuan_pretrain.checkpoint.optimizer_state import Stage, restore_state, state_on_host, wanted_state
from hunyuan_pretrain.checkpoint.parallel_read import Region, read_object, read_tensors
from hunyuan_pretrain.checkpoint.parallel_write import forget_plan, write_state
from hunyuan_pretrain.checkpoint.retention import remove_old
from hunyuan_pretrain.model.engines import load_scaling_state, scaling_state
from hunyuan_pretrain.model.fp8.quantise import dtype_of
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel.agreement import error_of_rank_0, first_error, from_rank_0, patience
from hunyuan_pretrain.runtime.seeding import generator_state, restore_generator_state

__all__ = [
    "Resumed",
    "checkpoint_folder",
    "find_checkpoints",
    "load",
    "load_newest",
    "read_marker",
    "refuse_other_model",
    "remove_partials",
    "save",
    "scaling_recipe",
]


class DamagedCheckpointError(CheckpointError):
    """The files of a checkpoint are not as written, or cannot be read."""


class Resumed(NamedTuple):
    """What `load_newest` has loaded."""

    folder: Path
    marker: dict[str, Any]
    notes: list[str]
    """Log lines: every newer checkpoint that could not be used, and why."""


def save(
    run_dir: Path,
    step: int,
    chunks: list[HunyuanModel],
    optimizer: MegatronOptimizer,
    keep_last: int | None,
    record: Mapping[str, Any] | None = None,
    keep_every_steps: int | None = None,
) -> Path:
    """Write the checkpoint after `step` steps. Of the complete ones up to it, keep the newest `keep_last` (None: all),
    every one after a multiple of `keep_every_steps`, and the named ones (`retention.to_remove`).

    `record` is a JSON object that complete.json holds beside what this module needs.

    Communicates: all ranks. Raises CheckpointError on every rank, with the first failing rank's reason, if any rank
    cannot write. Nothing of the attempt then remains, and older checkpoints are untouched.
    """
    folder = checkpoint_folder(run_dir, step)
    partial = folder.with_name(f"{folder.name}{folders.PARTIAL}")
    with patience():
        error = error_of_rank_0(lambda: folders.make_empty(partial))
        made: dict[str, Stage] = {}
        if error is None:
            error = first_error(lambda: made.update(stage=Stage(chunks)))
        if error is None:
            error = write_state(partial, chunks[0], lambda: _state(chunks, optimizer, made["stage"]))
        if error is None:
            error = _commit(partial, folder, {**(record or {}), **_description(step, chunks[0])})
        if error is not None:
            forget_plan(chunks[0])
            error_of_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise CheckpointError(
                f"{folder}: the checkpoint could not be written: {error}; older checkpoints are untouched"
            )
        if keep_last is not None:
            error_of_rank_0(lambda: remove_old(run_dir, step, keep_last, keep_every_steps))
    return folder


def load(folder: Path, chunks: list[HunyuanModel], optimizer: MegatronOptimizer | None) -> int:
    """Read a checkpoint into this rank's model chunks and, with `optimizer`, into its state and this rank's generators.

    Returns the step after which it was taken. Generators are restored only if the number of ranks is the same.

    The scales of the delayed FP8 recipe are restored if the checkpoint has them for the same recipe; otherwise they
    start afresh, as in a run that changes its recipe.

    Communicates: all ranks. Raises CheckpointError if the checkpoint is incomplete, damaged, or of another model.
    """
    with patience():
        marker, error = from_rank_0(lambda: read_marker(folder))
        if marker is None:
            raise CheckpointError(f"{error}")
        _refuse(folder, marker, chunks, optimizer)
        _verify(folder, marker)
        _load_verified(folder, marker, chunks, optimizer)
    return int(marker["step"])


def load_newest(
    run_dir: Path,
    chunks: list[HunyuanModel],
    optimizer: MegatronOptimizer,
    accept: Callable[[Path, dict[str, Any]], None] | None = None,
    last_step: int | None = None,
) -> Resumed | None:
    """`load` the newest intact checkpoint of a run; returns None if the run has no checkpoint.

    Rank 0 looks for checkpoints; all ranks verify. A damaged or unreadable one is set aside and the next older one is
    tried. `accept` is called on every rank with each candidate's folder and marker before its files are read, and
    raises if the candidate must not be used. With `last_step`, later checkpoints are ignored.

    Communicates: all ranks. Raises CheckpointError naming each checkpoint if none is intact, and as `load` if the
    intact one is of another model.
    """
    with patience():
        names, error = from_rank_0(lambda: [folder.name for folder in folders.named_checkpoints(run_dir)])
        if names is None:
            raise CheckpointError(f"{run_dir}: {error}")
        found = [run_dir / "checkpoints" / name for name in names]  # the path may differ between nodes
        faults: dict[Path, str] = {}
        for folder in reversed(found):
            if last_step is not None and (folders.step_of(folder) or 0) > last_step:
                continue
            try:
                marker = _whole_marker(folder)
                if accept is not None:  # first: its message says more than that the model differs
                    accept(folder, marker)
                _refuse(folder, marker, chunks, optimizer)
                _verify(folder, marker)
                _load_verified(folder, marker, chunks, optimizer)
            except DamagedCheckpointError as fault:
                faults[folder] = str(fault).removeprefix(f"{folder}: ")
                continue
            return Resumed(folder, marker, _set_aside(faults))
    if not faults:
        return None
    raise folders.none_is_good(run_dir, faults, folders.WITHOUT_ANY)


def _refuse(
    folder: Path, marker: dict[str, Any], chunks: list[HunyuanModel], optimizer: MegatronOptimizer | None
) -> None:
    refuse_other_model(folder, marker, chunks[0].config.model)
    mine, theirs = str(chunks[0].config.params_dtype), marker.get("dtype")
    if optimizer is not None and theirs != mine:
        hint = "continue in that precision.dtype, or start a new run from its weights with checkpoint.init_from"
        raise CheckpointError(f"{folder}: its weights are {theirs}, those of this run {mine}; {hint}")


def _whole_marker(folder: Path) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        if fault := folders.fault_of(folder):  # sizes first: they cost nothing
            raise DamagedCheckpointError(fault)
        return read_marker(folder)

    marker, error = from_rank_0(look)
    if marker is None:
        raise DamagedCheckpointError(f"{folder}: {error}")
    return marker


def _verify(folder: Path, marker: dict[str, Any]) -> None:
    """Verify the checkpoint's files, each rank its share. Raises DamagedCheckpointError."""
    mine = folders.share_to_verify(marker["files"], dist.get_rank(), dist.get_world_size())
    if error := first_error(lambda: folders.verify_files(folder, marker, mine)):
        raise DamagedCheckpointError(f"{folder}: {error}")


def _load_verified(
    folder: Path, marker: dict[str, Any], chunks: list[HunyuanModel], optimizer: MegatronOptimizer | None
) -> None:
    """Read into host memory, then distribute. If reading fails, the weights and optimizer of a model on a GPU are
    unchanged."""
    loaded: dict[str, Any] = {}

    def read() -> None:
        loaded.update(stage=Stage(chunks), **_read(folder, marker, chunks, optimizer))

    def hand_out() -> None:
        if "fp8" in loaded:  # before the weights: FP8 weights are quantised with them
            load_scaling_state(chunks, loaded["fp8"])
        # one update per step
        restore_state(chunks, optimizer, loaded["parameters"], int(marker["step"]), loaded["stage"])
        if "generators" in loaded:
            restore_generator_state(loaded["generators"])

    error = first_error(read)
    if error is not None and UNSAFE in error:  # the digests match: no damage that an older checkpoint would mend
        raise CheckpointError(f"{folder}: {error}")
    if error is not None:
        raise DamagedCheckpointError(f"{folder}: cannot be read: {error}")
    error = first_error(hand_out)
    if error is not None:
        raise CheckpointError(f"{folder}: {error}")


def _read(
    folder: Path, marker: dict[str, Any], chunks: list[HunyuanModel], optimizer: MegatronOptimizer | None
) -> dict[str, Any]:
    """What this rank needs of a checkpoint, in host memory. Communicates nothing."""
    index = folders.index_of(folder, marker)
    found: dict[str, Any] = {}
    found["parameters"], regions = wanted_state(chunks, with_optimizer=optimizer is not None)
    if optimizer is not None and marker.get("fp8_scaling") == scaling_recipe(chunks[0]):
        found["fp8"] = {}
        for name, scales in _sharded_scales(chunks).items():
            buffer = found["fp8"][name] = torch.empty_like(scales.data)
            regions.append(Region(scales.key, buffer, scales.global_shape, scales.global_offset))
    read_tensors(folder, index, regions)
    if optimizer is not None and marker["world_size"] == dist.get_world_size():
        found["generators"] = read_object(folder, index, _generator_object().unique_key)
    return found


def _set_aside(faults: Mapping[Path, str]) -> list[str]:
    def rename() -> list[str]:
        return [
            f"WARNING: {folder} is not used: {fault}; it is now {folders.set_aside(folder).name}"
            for folder, fault in faults.items()
        ]

    lines, error = from_rank_0(rename)
    if lines is None:
        raise CheckpointError(f"a damaged checkpoint cannot be set aside: {error}: " + ", ".join(map(str, faults)))
    return lines


def _commit(partial: Path, folder: Path, content: dict[str, Any]) -> str | None:
    """Digest every rank's files, mark the checkpoint as complete and give it its name. Returns the error of any rank,
    or None. Communicates: all ranks."""
    mine: dict[str, dict[str, Any]] = {}

    def digest_mine() -> None:
        for path in folders.files_of_rank(partial, dist.get_rank()):
            mine[path.name] = {"bytes": path.stat().st_size, "sha256": folders.digest(path)}

    if error := first_error(digest_mine):
        return error
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, found, dst=0)

    def commit() -> None:
        files = {name: file for of_rank in found or [] for name, file in of_rank.items()}
        strangers = {path.name for path in folders.data_files(partial)} ^ files.keys()
        if strangers:
            raise CheckpointError(
                f"{', '.join(sorted(strangers))}: not what the ranks have written; is another run writing to "
                "this folder?"
            )
        folders.write_marker(partial, {**content, "files": dict(sorted(files.items()))})
        folders.put_in_place(partial, folder)

    return error_of_rank_0(commit)


def _state(chunks: list[HunyuanModel], optimizer: MegatronOptimizer, stage: Stage) -> dict[str, Any]:
    state = {"parameters": state_on_host(chunks, optimizer, stage)}
    return state | {"generators": _generator_object(), "fp8": _sharded_scales(chunks)}


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


def scaling_recipe(model: HunyuanModel) -> list[Any] | None:
    """What must be equal for a run to use a checkpoint's scales; None if the run has no scales that outlive a step."""
    formats = model.config.precision
    recipe = formats.recipe
    if recipe is None or not recipe.is_delayed:
        return None
    backward_dtype = str(dtype_of(recipe, "dy"))
    return [recipe.margin, recipe.history_steps, recipe.takes_max, backward_dtype, *formats.layers_in_bf16]


def _sharded_scales(chunks: list[HunyuanModel]) -> dict[str, ShardedTensor]:
    """The state of the delayed recipe. All ranks that share a tensor hold the same state; an expert's state is on the
    expert's ranks."""
    groups, found = chunks[0].groups, {}
    for name, tensor in scaling_state(chunks).items():
        is_expert = ".experts." in name
        offsets = [(tensor.dim() - 1, groups.ep.rank(), groups.ep.size())] if is_expert else []
        replica = (
            (0, groups.expt_tp.rank(), groups.expt_dp.rank())
            if is_expert
            else (0, groups.tp.rank(), groups.dp_cp.rank())
        )
        found[name] = ShardedTensor.from_rank_offsets(f"fp8.{name}", tensor, *offsets, replica_id=replica)
    return found


def _generator_object() -> ShardedObject:
    rank, world = dist.get_rank(), dist.get_world_size()
    return ShardedObject("generators", generator_state(), (world,), (rank,), replica_id=0)
