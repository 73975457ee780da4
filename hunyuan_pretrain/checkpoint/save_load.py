"""Checkpoints in megatron's distributed format, committed in two phases and verified before anything of them is used.
folders.py describes the files.

A checkpoint is written into a folder of its attempt, *.partial (saving.py). Every rank digests its files while it
writes them, rank 0 writes complete.json, and only then is the folder renamed to its final name. A folder without its
final name, or without a matching complete.json, is never read.

If one rank fails between two collectives, all ranks are told (parallel/agreement.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# isort: split
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from hunyuan_pretrain.checkpoint import CheckpointError, folders
from hunyuan_pretrain.checkpoint.faults import NOT_NOW, Fault, UnreadableError, may_be_good
from hunyuan_pretrain.checkpoint.folders import (
    checkpoint_folder,
    find_checkpoints,
    read_marker,
    refuse_other_model,
    remove_partials,
)
from hunyuan_pretrain.checkpoint.inert_pickle import UNSAFE
from hunyuan_pretrain.checkpoint.optimizer_state import Stage, restore_state, wanted_state
from hunyuan_pretrain.checkpoint.parallel_read import Region, read_object, read_tensors
from hunyuan_pretrain.checkpoint.run_state import generator_object, scaling_recipe, sharded_scales
from hunyuan_pretrain.checkpoint.saving import save
from hunyuan_pretrain.model.engines import load_scaling_state
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel import whereabouts
from hunyuan_pretrain.parallel.agreement import first_error, from_rank_0, patience, reason_of
from hunyuan_pretrain.runtime.seeding import restore_generator_state

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
    """The files of a checkpoint are not as written."""


class Resumed(NamedTuple):
    """What `load_newest` has loaded."""

    folder: Path
    marker: dict[str, Any]
    notes: list[str]
    """Log lines: every newer checkpoint that could not be used, and why."""


def load(folder: Path, chunks: list[HunyuanModel], optimizer: MegatronOptimizer | None) -> int:
    """Read a checkpoint into this rank's model chunks and, with `optimizer`, into its state and this rank's generators.

    Returns the step after which it was taken. Generators are restored only if the number of ranks is the same.

    The scales of the delayed FP8 recipe are restored if the checkpoint has them for the same recipe; otherwise they
    start afresh, as in a run that changes its recipe.

    Communicates: all ranks. Raises CheckpointError if the checkpoint is incomplete, damaged, unreadable, or of another
    model.
    """
    with patience():
        marker, error = from_rank_0(lambda: read_marker(folder))
        if marker is None:
            raise CheckpointError(f"{error}")
        _refuse(folder, marker, chunks, optimizer)
        _load(folder, marker, chunks, optimizer)
    return int(marker["step"])


def load_newest(
    run_dir: Path,
    chunks: list[HunyuanModel],
    optimizer: MegatronOptimizer,
    accept: Callable[[Path, dict[str, Any]], None] | None = None,
    last_step: int | None = None,
) -> Resumed | None:
    """`load` the newest intact checkpoint of a run; returns None if the run has no checkpoint.

    Rank 0 looks for checkpoints; all ranks verify. A damaged one is set aside and the next older one is tried. `accept`
    is called on every rank with each candidate's folder and marker before its files are read, and raises if the
    candidate must not be used. With `last_step`, later checkpoints are ignored.

    Communicates: all ranks. Raises CheckpointError naming each checkpoint if none is intact; as `load` if the intact
    one is of another model; and if one cannot be read now, or is of a newer program, before an intact one was found.
    """
    whereabouts.phase("loading of a checkpoint")
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
                _load(folder, marker, chunks, optimizer)
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
    is_adapter, expects_one = folders.ADAPTER_OF in marker, chunks[0].config.tuning.lora is not None
    if is_adapter and not (expects_one and optimizer is not None):
        raise CheckpointError(
            f"{folder}: holds an adapter and no weights of a model; export it, then merge it with its base: merge-lora"
        )
    mine, theirs = str(chunks[0].config.params_dtype), marker.get("dtype")
    if optimizer is not None and theirs != mine:
        hint = "continue in that precision.dtype, or start a new run from its weights with checkpoint.init_from"
        raise CheckpointError(f"{folder}: its weights are {theirs}, those of this run {mine}; {hint}")


def _whole_marker(folder: Path) -> dict[str, Any]:
    def look() -> tuple[Fault | None, dict[str, Any]]:
        fault = folders.fault_of(folder)  # sizes first: they cost nothing
        return fault, {} if fault else read_marker(folder)

    found, error = from_rank_0(look)
    if found is None:
        raise CheckpointError(f"{folder}: {error}")
    fault, marker = found
    if fault is not None and fault.state != "damaged":
        raise may_be_good(folder, fault)
    if fault is not None:
        raise DamagedCheckpointError(f"{folder}: {fault}")
    return marker


def _error_of_reading(action: Callable[[], object]) -> str | None:
    """`first_error`, where only a CheckpointError may say that the checkpoint is damaged: a rank without memory, say,
    has seen none."""

    def act() -> None:
        try:
            action()
        except CheckpointError:
            raise
        except Exception as error:
            raise UnreadableError(f"{NOT_NOW}: {reason_of(error)}") from error

    return first_error(act)


def _unusable(folder: Path, error: str) -> CheckpointError:
    """The error for a checkpoint that a rank could not verify or read."""
    if UNSAFE in error:  # the digests match: no damage that an older checkpoint would mend
        return CheckpointError(f"{folder}: {error}")
    if NOT_NOW in error:
        return may_be_good(folder, Fault("unreadable", error))
    return DamagedCheckpointError(f"{folder}: {error}")


def _load(
    folder: Path, marker: dict[str, Any], chunks: list[HunyuanModel], optimizer: MegatronOptimizer | None
) -> None:
    """Read into host memory, verify, then distribute. If that fails before the last part, the model is as before.

    Each rank verifies its share of the files. With `optimizer` it needs most of what they hold, so it verifies what it
    reads while it reads it.
    """
    files = marker["files"]
    share = folders.share_to_verify(files, dist.get_rank(), dist.get_world_size())
    loaded: dict[str, Any] = {}

    def verify() -> None:
        folders.verify_files(folder, marker, share)

    def read() -> None:
        unverified = {} if optimizer is None else {name: files[name] for name in share}
        loaded.update(stage=Stage(chunks), **_read(folder, marker, chunks, optimizer, unverified))

    def hand_out() -> None:
        if "fp8" in loaded:  # before the weights: FP8 weights are quantised with them
            load_scaling_state(chunks, loaded["fp8"])
        # one update per step, except for skipped ones
        updates = int(marker.get("updates", marker["step"]))
        restore_state(chunks, optimizer, loaded["parameters"], updates, loaded["stage"])
        if "generators" in loaded:
            restore_generator_state(loaded["generators"])

    # first without an optimizer: then weights on a CPU are read in place
    error = _error_of_reading(verify) if optimizer is None else None
    if error is None and (error := _error_of_reading(read)) is not None and optimizer is not None:
        loaded.clear()
        error = _error_of_reading(verify) or error  # whatever cannot be read may be damaged, on another rank too
    if error is not None:
        raise _unusable(folder, error)
    if (error := first_error(hand_out)) is not None:
        raise CheckpointError(f"{folder}: {error}")


def _read(
    folder: Path,
    marker: dict[str, Any],
    chunks: list[HunyuanModel],
    optimizer: MegatronOptimizer | None,
    unverified: dict[str, Any],
) -> dict[str, Any]:
    """What this rank needs of a checkpoint, in host memory. unverified: size and digest of the files that it verifies
    on the way. Communicates nothing."""
    index = folders.index_of(folder, marker)
    found: dict[str, Any] = {}
    found["parameters"], regions = wanted_state(chunks, with_optimizer=optimizer is not None)
    if optimizer is not None and marker.get("fp8_scaling") == scaling_recipe(chunks[0]):
        found["fp8"] = {}
        for name, scales in sharded_scales(chunks).items():
            buffer = found["fp8"][name] = torch.empty(scales.data.shape, dtype=scales.data.dtype)
            regions.append(Region(scales.key, buffer, scales.global_shape, scales.global_offset))
    read_tensors(folder, index, regions, unverified)
    if optimizer is not None and marker["world_size"] == dist.get_world_size():
        found["generators"] = read_object(folder, index, generator_object().unique_key)
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
