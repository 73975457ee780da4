"""What each rank of a large job writes to a checkpoint and reads of it, in a fake world, and what that costs beside the
tensors themselves.

Each rank of the job is asked by the code with which it saves and loads, on the meta device. The index and complete.json
are built as they are written, with the sizes that the files would have, and read and planned by the code of a load.
"""

from __future__ import annotations

import json
import pickle
import statistics
import time
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hunyuan_pretrain.checkpoint import optimizer_state, parallel_read
from hunyuan_pretrain.checkpoint.parallel_read import Region
from hunyuan_pretrain.checkpoint.stored import read_index
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.diagnostics.dry_run import _build, _Groups, on_meta
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel.fake_world import as_rank, replaced

RECORD_BYTES = 1_400
"""Of torch.save around the values of a tensor, about."""
GENERATORS_BYTES = 15_700
"""Of a rank's generators, about."""
FILES_PER_RANK = 2
SHA256 = "0" * 64


class Written(NamedTuple):
    """One record of a rank's files: a rectangle of a tensor."""

    key: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype


class Rank(NamedTuple):
    """What a rank writes and reads."""

    written: list[Written]
    regions: list[Region]


def ranks_of(experiment: Experiment, world_size: int) -> Iterator[Rank]:
    """Every rank of the job, in order."""
    parallel = experiment.parallel
    each = world_size // parallel.pipeline_model_parallel_size
    for first in range(0, world_size, each):  # the ranks of a pipeline rank have the same model
        with (
            as_rank(first, world_size, parallel, experiment.runtime.distributed_timeout_s) as (groups, membership),
            on_meta(experiment),
            replaced(optimizer_state, "_host_buffer", on_meta_too),
        ):
            chunks, _ = _build(experiment, groups)
            for rank in range(first, first + each):
                for model in chunks:
                    model.groups = _Groups(rank, groups, membership)  # type: ignore[assignment]
                yield Rank(list(written_by(chunks)), optimizer_state.wanted_state(chunks, with_optimizer=True)[1])


def on_meta_too(home: Any, kind: str) -> torch.Tensor:
    """In place of a buffer in host memory."""
    dtype = home.parameter.dtype if kind == optimizer_state.WEIGHT else torch.float32
    return torch.empty(home.parameter.shape, dtype=dtype, device="meta")


def written_by(chunks: list[HunyuanModel]) -> Iterator[Written]:
    for home in optimizer_state._homes(chunks):
        if not home.is_written_here:
            continue
        for kind in (optimizer_state.WEIGHT, *optimizer_state._kinds(home.parameter)):
            dtype = home.parameter.dtype if kind == optimizer_state.WEIGHT else torch.float32
            for part in home.placement.parts:
                offsets = tuple(one.start for one in part.whole)
                yield Written(
                    home.prefix(kind) + home.placement.name, home.placement.whole_shape, offsets, part.lengths, dtype
                )


class Checkpoint:
    """What a save writes beside the tensors."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.storage: dict[MetadataIndex, _StorageInfo] = {}
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, rank: int, world_size: int, written: list[Written]) -> None:
        """The records of a rank, dealt to its files."""
        names = [f"__{rank}_{number}.distcp" for number in range(FILES_PER_RANK)]
        ends = dict.fromkeys(names, 0)
        for number, one in enumerate(written):
            name = names[number % FILES_PER_RANK]
            length = prod(one.sizes) * one.dtype.itemsize + RECORD_BYTES
            tensor = self.state.setdefault(
                one.key, TensorStorageMetadata(TensorProperties(dtype=one.dtype), torch.Size(one.whole), [])
            )
            index = MetadataIndex(one.key, torch.Size(one.offsets), len(tensor.chunks))
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes)))
            assert index not in self.storage, f"{one.key} is written twice"
            self.storage[index] = _StorageInfo(name, ends[name], length)
            ends[name] += length
        generators = f"generators/shard_{rank}_{world_size}"
        self.state[generators] = BytesStorageMetadata()
        self.storage[MetadataIndex(generators)] = _StorageInfo(names[0], ends[names[0]], GENERATORS_BYTES)
        ends[names[0]] += GENERATORS_BYTES
        self.files |= {name: {"bytes": size, "sha256": SHA256} for name, size in ends.items() if size}

    def index(self) -> bytes:
        return pickle.dumps(Metadata(self.state, storage_data=self.storage))

    def marker(self) -> str:
        return json.dumps({"files": self.files}, indent=1)


def measure(experiment: Experiment, world_size: int) -> dict[str, Any]:
    """The row of one world size."""
    checkpoint, most_written, most_read, sample = Checkpoint(), 0, 0, []
    for rank, (written, regions) in enumerate(ranks_of(experiment, world_size)):
        checkpoint.add(rank, world_size, written)
        most_written, most_read = max(most_written, len(written) + 1), max(most_read, len(regions))
        if rank % max(world_size // 64, 1) == 0:
            sample.append((rank, regions))
    content, marker = checkpoint.index(), checkpoint.marker()
    sizes = {name: file["bytes"] for name, file in checkpoint.files.items()}
    began = time.process_time()
    index = read_index(content, sizes)
    parsed = time.process_time() - began
    planned, opened = [], []
    for _, regions in sample:
        began = time.process_time()
        reads = [read for region in regions for read in parallel_read._reads(index, region)]
        planned.append(time.process_time() - began)
        opened.append(len({read.chunk.section.file for read in reads}))
    records = sum(len(tensor.chunks) for tensor in index.tensors.values())
    return {
        "ranks": world_size,
        "records": records + len(index.objects),
        "most records of a rank": most_written,
        "index bytes": len(content),
        "complete.json bytes": len(marker),
        "files": len(checkpoint.files) + 3,
        "parse s": parsed,
        "plan s": statistics.median(planned),
        "most regions of a rank": most_read,
        "most files a rank reads tensors from": max(opened),
        "tensor bytes": sum(sizes.values()),
    }
