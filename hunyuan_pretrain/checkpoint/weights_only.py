"""A checkpoint that holds weights and no training state, written part by part in one process.

It is a distributed checkpoint as training writes it, so it loads under every layout: `checkpoint.init_from` takes it. A
part is one routed expert of a parameter, or any other parameter as a whole; each has a file of its own, which the ranks
of a job share among them when they verify it, and no more than one part is in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError, folders
from hunyuan_pretrain.checkpoint.joined_parts import JoinedParts
from hunyuan_pretrain.checkpoint.parallel_write import REPORTS, Shard, write_items, write_report
from hunyuan_pretrain.checkpoint.tensor_files import TensorSpec

__all__ = ["WEIGHTS_ONLY", "write_weights_only"]

WEIGHTS_ONLY = "weights_only"
"""Key of complete.json: the checkpoint has no training state, so no run can resume from it."""


def write_weights_only(
    folder: Path,
    tensors: Mapping[str, TensorSpec],
    read: Callable[[str, int], Tensor],
    marker: Mapping[str, Any],
) -> None:
    """Write a checkpoint into the new folder `folder`, which is complete when this returns.

    tensors: name of each whole parameter -> its dtype and shape; with three dimensions, the first is the experts.
    read(name, expert) returns the part (1, ...) of one expert, or with 0 any other parameter; it is called once for
    each, and its result is cast. marker: the content of complete.json besides the files. Raises CheckpointError if the
    disk has too little room, OSError, and what `read` raises.
    """
    (folder / REPORTS).mkdir(parents=True)
    needed, free = sum(spec.nbytes for spec in tensors.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"the weights take {needed / 1e9:.3g} GB, and only {free / 1e9:.3g} GB are free")
    files: dict[str, dict[str, Any]] = {}
    places: list[list[Any]] = []
    for number, shard in enumerate(_parts(tensors, read)):
        name = f"__{number}_0.distcp"
        files[name], found = write_items(folder / name, [shard])
        places += found
    write_report(folder, 0, files, places)
    files = JoinedParts().join(folder, 1)
    folders.write_marker(folder, {**marker, WEIGHTS_ONLY: True, "files": files})


def _parts(tensors: Mapping[str, TensorSpec], read: Callable[[str, int], Tensor]) -> Iterator[Shard]:
    """Each part of each parameter, read when it is asked for."""
    for name, spec in tensors.items():
        experts, shape = (spec.shape[0], (1, *spec.shape[1:])) if len(spec.shape) == 3 else (1, spec.shape)
        for expert in range(experts):
            tensor = read(name, expert)
            if tensor.shape != shape:
                raise CheckpointError(f"{name}: shape {tuple(tensor.shape)}, but this model has {shape}")
            yield Shard(name, spec.shape, (expert, *(0 for _ in shape[1:])), tensor.to(spec.dtype))
