"""Makes one checkpoint of what the ranks have written: rank 0 reads their reports and writes which tensor is where.

Reports are files, not messages: no rank holds or sends what grows with the number of ranks, except for rank 0, which
reads in a thread while training goes on. Where tensors are differs only between the first saves of a job; what was made
of the same reports is kept.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# isort: split
import numpy as np
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hunyuan_pretrain.checkpoint import CheckpointError, folders
from hunyuan_pretrain.checkpoint.parallel_write import REPORTS
from hunyuan_pretrain.checkpoint.stored import COMMON, INDEX
from hunyuan_pretrain.data.folders import write_file
from hunyuan_pretrain.runtime.background import leave_if_ending


class JoinedParts:
    """Joins the parts of a run's saves, on rank 0."""

    def __init__(self) -> None:
        self._layouts: list[str] = []
        self._metadata = b""
        """Made of reports with these digests."""

    def join(self, folder: Path, ranks: int) -> dict[str, dict[str, Any]]:
        """Write into an unfinished checkpoint what belongs to no rank alone. Returns size and sha256 of every file, and
        removes the reports.

        Raises CheckpointError if a rank has not reported, if a file is there that no rank has written, or if the parts
        of a tensor do not make up the whole.
        """
        files, layouts = dict[str, dict[str, Any]](), list[str]()
        for report in _reports(folder, ranks, "json"):
            files |= report["files"]
            layouts.append(report["layout"])
        if layouts != self._layouts:
            self._metadata = pickle.dumps(joined_metadata(_reports(folder, ranks, "layout.json")))
            self._layouts = layouts
        common = io.BytesIO()
        torch.save({}, common)  # objects common to all ranks; there are none
        write_file(folder / COMMON, common.getvalue())
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        write_file(folder / INDEX, self._metadata)
        shutil.rmtree(folder / REPORTS)
        for name in (COMMON, "metadata.json", INDEX):
            path = folder / name
            files[name] = {"bytes": path.stat().st_size, "sha256": folders.digest(path)}
        if strangers := {path.name for path in folders.data_files(folder)} ^ files.keys():
            raise CheckpointError(
                f"{', '.join(sorted(strangers))}: not what the ranks have written; is another run writing to "
                "this folder?"
            )
        short = [name for name, file in files.items() if (folder / name).stat().st_size != file["bytes"]]
        if short:
            raise CheckpointError(f"{', '.join(sorted(short))}: not the size that was written")
        return dict(sorted(files.items()))


def joined_metadata(layouts: Iterator[Sequence[Sequence[Any]]]) -> Metadata:
    """torch's description of a checkpoint from each rank's list of items, as parallel_write.py writes it. Raises
    CheckpointError if the parts of a tensor do not make up the whole."""
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    same: dict[Any, Any] = {}  # equal names and sizes are one object: smaller, and pickle writes it once
    for layout in layouts:
        for name, file, start, length, *described in layout:
            key, place = same.setdefault(name, name), _StorageInfo(same.setdefault(file, file), start, length)
            if not described:
                if key in state:
                    raise CheckpointError(f"{key}: written twice")
                state[key] = BytesStorageMetadata()
                storage[MetadataIndex(key)] = place
                continue
            dtype, whole, offset, shape = described
            tensor = state.get(key)
            if tensor is None:
                properties = TensorProperties(dtype=getattr(torch, dtype.removeprefix("torch.")))
                tensor = state[key] = TensorStorageMetadata(properties, torch.Size(whole), [])
            if not isinstance(tensor, TensorStorageMetadata) or (
                (str(tensor.properties.dtype), list(tensor.size)) != (dtype, whole)
            ):
                raise CheckpointError(f"{key}: ranks differ in its dtype or shape")
            size, begin, others = torch.Size(shape), torch.Size(offset), len(storage)
            storage[MetadataIndex(key, begin, len(tensor.chunks))] = place
            if len(storage) == others:
                raise CheckpointError(f"{key}: the part at {offset} was written twice")
            tensor.chunks.append(ChunkStorageMetadata(begin, same.setdefault(size, size)))
    for key, tensor in state.items():
        if isinstance(tensor, TensorStorageMetadata):
            _check_whole(key, tensor)
    return Metadata(state, storage_data=storage)


def _check_whole(key: str, tensor: TensorStorageMetadata) -> None:
    """Raise CheckpointError unless the parts, each at another place, are the cells of a grid over the whole tensor."""
    shape = tensor.chunks[0].sizes
    is_grid = all(chunk.sizes == shape for chunk in tensor.chunks)
    if is_grid:
        starts_CR = np.array([chunk.offsets for chunk in tensor.chunks], dtype=np.int64)  # C chunks, R dimensions
        is_grid = not (starts_CR % np.maximum(shape, 1)).any() and bool((starts_CR < tensor.size).all())
    if not is_grid or len(tensor.chunks) * math.prod(shape) != math.prod(tensor.size):
        raise CheckpointError(f"{key}: the parts that the ranks wrote do not make up the tensor {list(tensor.size)}")


def _reports(folder: Path, ranks: int, suffix: str) -> Iterator[Any]:
    for rank in range(ranks):
        leave_if_ending()
        try:
            yield json.loads((folder / REPORTS / f"{rank}.{suffix}").read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"rank {rank} has not written its part") from None
