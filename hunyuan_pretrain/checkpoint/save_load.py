"""Checkpoints: megatron's distributed format, committed in two phases, verified before it is read; see folders.py for
what is on disk.

A checkpoint is written into step_NNNNNNN.partial. Every rank digests and syncs the files that it wrote, rank 0 writes
complete.json, and only then does the folder get its name. A folder without its name or without a complete.json that
matches is never read.

Between two collectives that all ranks enter, a failure on one of them is told to all (parallel/agreement.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hunyuan_pretrain.model  # noqa: F401  makes megatron importable

# isort: split
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
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
from hunyuan_pretrain.checkpoint.optimizer_state import Stage, restore_state, state_on_host, wanted_state
from hunyuan_pretrain.checkpoint.parallel_write import forget_plan, write_state
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
    """The files of a checkpoint are not what was written, or cannot be read."""


class Resumed(NamedTuple):
    """What `load_newest` has read."""

    folder: Path
    marker: dict[str, Any]
    notes: list[str]
    """Lines for the log: every newer checkpoint that could not be used, and why."""


def save(
    run_dir: Path,
    step: int,
    chunks: list[HunyuanModel],
    optimizer: MegatronOptimizer,
    keep_last: int | None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint after `step` steps and remove complete ones beyond the newest `keep_last`.

    `record` is what complete.json shall hold beside what this module needs: a JSON object.

    Communicates: all ranks. Raises CheckpointError on every rank, with the first rank's reason, if any rank cannot
    write; nothing of the attempt stays and older checkpoints are untouched.
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
            error_of_rank_0(lambda: _remove_all_but(run_dir, step, keep_last))
    return folder


def load(folder: Path, chunks: list[HunyuanModel], optimizer: MegatronOptimizer | None) -> int:
    """Read a checkpoint into the model chunks of this rank, and with `optimizer` its state and this rank's generators
    too.

    Returns the step that it was taken after.

    The scales of the delayed FP8 recipe are read where the checkpoint has them of the same recipe; otherwise they begin
    anew, as in a run that changes its recipe.

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
    """`load` the newest checkpoint of a run that is as it was written; None if the run has no checkpoint.

    Rank 0 looks, all ranks verify. One that is damaged or cannot be read is set aside and the next older one is tried.
    `accept` gets each candidate's folder and marker on every rank before its files are read, to raise what speaks
    against it. With `last_step` later checkpoints are not looked at.

    Communicates: all ranks. Raises CheckpointError that names each checkpoint if none of them is good, and as `load` if
    the good one is of another model.
    """
    with patience():
        names, error = from_rank_0(lambda: [folder.name for folder in folders.named_checkpoints(run_dir)])
        if names is None:
            raise CheckpointError(f"{run_dir}: {error}")
        found = [run_dir / "checkpoints" / name for name in names]  # the same files may lie elsewhere on another node
        faults: dict[Path, str] = {}
        for folder in reversed(found):
            if last_step is not None and (folders.step_of(folder) or 0) > last_step:
                continue
            try:
                marker = _whole_marker(folder)
                if accept is not None:  # it has more to say than that the model is another one
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
        hint = "go on in that precision.dtype, or start a new run from its weights with checkpoint.init_from"
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
    """Every rank its share of the files."""
    mine = sorted(marker["files"])[dist.get_rank() :: dist.get_world_size()]
    if error := first_error(lambda: folders.verify_files(folder, marker, mine)):
        raise DamagedCheckpointError(f"{folder}: {error}")


def _load_verified(
    folder: Path, marker: dict[str, Any], chunks: list[HunyuanModel], optimizer: MegatronOptimizer | None
) -> None:
    """Read into host memory, then hand out; a failure while reading leaves weights and optimizer of a model on a GPU as
    they are."""
    loaded: dict[str, Any] = {}

    def prepare() -> None:
        loaded.update(wanted=_wanted(marker, chunks, optimizer), stage=Stage(chunks))
        dist_checkpointing.load_common_state_dict(str(folder))  # what core reads first, before it meets the other ranks

    def hand_out() -> None:
        if "fp8" in loaded:  # before the weights, which they quantise where those are in FP8
            load_scaling_state(chunks, loaded["fp8"])
        # every step makes one update
        restore_state(chunks, optimizer, loaded["parameters"], int(marker["step"]), loaded["stage"])
        if "generators" in loaded:
            restore_generator_state(loaded["generators"])

    error = first_error(prepare) or first_error(
        lambda: loaded.update(dist_checkpointing.load(loaded.pop("wanted"), str(folder)))
    )
    if error is not None:
        raise DamagedCheckpointError(f"{folder}: cannot be read: {error}")
    error = first_error(hand_out)
    if error is not None:
        raise CheckpointError(f"{folder}: {error}")


def _wanted(marker: dict[str, Any], chunks: list[HunyuanModel], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    wanted: dict[str, Any] = {"parameters": wanted_state(chunks, with_optimizer=optimizer is not None)}
    if optimizer is not None:
        if marker["world_size"] == dist.get_world_size():
            wanted["generators"] = _generator_object()
        if marker.get("fp8_scaling") == scaling_recipe(chunks[0]):
            wanted["fp8"] = _sharded_scales(chunks)
    return wanted


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
    """Digest every rank's files, mark the checkpoint as complete and give it its name; the error of any rank.
    Communicates: all ranks."""
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
                f"{', '.join(sorted(strangers))}: not what the ranks have written; does another run write to "
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
    """As `parity --layout` spells it: the sizes that are not 1, and the number of ranks."""
    groups = model.groups
    sizes = {"tp": groups.tp, "pp": groups.pp, "cp": groups.cp, "dp": groups.dp, "ep": groups.ep}
    return ",".join(f"{axis}={group.size()}" for axis, group in sizes.items() if group.size() > 1) or "dp=1"


def scaling_recipe(model: HunyuanModel) -> list[Any] | None:
    """What must be equal for the scales of a checkpoint to be those of a run; None where a run has none that outlive a
    step."""
    formats = model.config.precision
    recipe = formats.recipe
    if recipe is None or not recipe.is_delayed:
        return None
    backward_dtype = str(dtype_of(recipe, "dy"))
    return [recipe.margin, recipe.history_steps, recipe.takes_max, backward_dtype, *formats.layers_in_bf16]


def _sharded_scales(chunks: list[HunyuanModel]) -> dict[str, ShardedTensor]:
    """The state of the delayed recipe: the same on all ranks that share a tensor, and that of each expert where the
    expert is."""
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


def _remove_all_but(run_dir: Path, step: int, keep_last: int) -> None:
    """Of the checkpoints up to `step`; what an earlier attempt has left of later steps is no reason to remove this
    one's."""
    for folder in [folder for folder in find_checkpoints(run_dir) if (folders.step_of(folder) or 0) <= step][
        :-keep_last
    ]:
        folders.remove(folder)
