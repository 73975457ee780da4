"""A checkpoint that holds weights and no training state, written part by part in one process.

It is a distributed checkpoint as training writes it, so it loads under every layout: `checkpoint.init_from` takes it. A
part is one routed expert of a parameter, or any other parameter as a whole; each has a file of its own, which the ranks
of a job share among them when they verify it, and no more than one part is in memory.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# isort: split
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from hunyuan_pretrain.checkpoint import CheckpointError, folders
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
    folder.mkdir(parents=True)
    needed, free = sum(spec.nbytes for spec in tensors.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"the weights take {needed / 1e9:.3g} GB, and only {free / 1e9:.3g} GB are free")
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, sync_files=True, thread_count=1)
    writer.fs = digesting = _DigestingFileSystem()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
            dcp.save({}, storage_writer=writer, planner=_Planner(tensors, read), no_dist=True)
    except CheckpointException as error:  # not an Exception, but a BaseException
        raise digesting.failure or error.failures[0][0] from None
    torch.save({}, folder / COMMON_STATE_FNAME)  # objects common to all ranks; there are none
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    files = {}
    for path in folders.data_files(folder):
        known = digesting.digests.get(path.name)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": known or folders.digest(path)}
    folders.write_marker(folder, {**marker, WEIGHTS_ONLY: True, "files": files})


class _Planner(dcp.SavePlanner):
    """Plans the parts from the shapes alone, and reads a part when it is to be written."""

    def __init__(self, tensors: Mapping[str, TensorSpec], read: Callable[[str, int], Tensor]) -> None:
        self._tensors, self._read = tensors, read

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([item for name, spec in self._tensors.items() for item in _items(name, spec)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        assert write_item.tensor_data is not None
        name, expert = write_item.index.fqn, write_item.index.index or 0
        tensor, shape = self._read(name, expert), write_item.tensor_data.chunk.sizes
        if tensor.shape != shape:
            raise CheckpointError(f"{name}: shape {tuple(tensor.shape)}, but this model has {tuple(shape)}")
        return tensor.to(write_item.tensor_data.properties.dtype).contiguous()


def _items(name: str, spec: TensorSpec) -> Iterator[WriteItem]:
    """The parts of a parameter."""
    parts, shape = (spec.shape[0], (1, *spec.shape[1:])) if len(spec.shape) == 3 else (1, spec.shape)
    for part in range(parts):
        offset = torch.Size((part, *(0 for _ in shape[1:])))
        yield WriteItem(
            MetadataIndex(name, offset, part),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(offset, torch.Size(shape)),
                TensorProperties(dtype=spec.dtype),
                torch.Size(spec.shape),
            ),
        )


class _DigestingFileSystem(FileSystem):
    """Digests files while they are written, so that they need not be read again."""

    def __init__(self) -> None:
        super().__init__()
        self.digests: dict[str, str] = {}
        """File name -> sha256."""
        self.failure: OSError | None = None
        """Why a file could not be written; torch's writer says only that it could not."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if mode != "wb" or not str(path).endswith(".distcp"):
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _Digesting(io.FileIO(path, "w")) as stream:
            try:
                yield stream
            finally:
                self.failure = self.failure or stream.failure
        self.digests[Path(path).name] = stream.sha256.hexdigest()


class _Digesting(io.BufferedWriter):
    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.sha256 = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise
