"""Every rank reads its parts of the tensors of a checkpoint, under any layout, straight into their memory.

Core's own entry point unpickles the index and the small objects with Python's reader, which runs whatever they name;
gathers every rank's list of tensors on every rank; and reads a whole stored tensor for any part of it. Here nothing of
a checkpoint is unpickled, except plain values by torch's own restricted reader; ranks exchange nothing; and of a tensor
that is needed in part, only the rows that contain it are read. A file whose digest is to be compared is read once, from
beginning to end: its bytes are hashed where they are wanted.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

# isort: split
import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.faults import damage_to, opened
from hunyuan_pretrain.checkpoint.stored import (
    ITEM_BYTES,
    Chunk,
    Index,
    Section,
    StoredTensor,
    TensorRecord,
    check_object,
    read_bytes,
    tensor_record,
)

READERS = 8
"""Threads of a rank that read; one alone does not keep a network file system busy, nor does it hash fast enough."""
BLOCK_BYTES = 32 << 20
"""What a thread reads at once of a tensor that it cannot read in place."""
PIECE_BYTES = 1 << 20
"""What is hashed at once: it is still in the processor's cache when it has been read."""


class Region(NamedTuple):
    """A rectangle of a stored tensor, and the memory that it is read into."""

    key: str
    """Name of the stored tensor."""
    tensor: Tensor
    """Of the rectangle's shape, in any dtype, on any device."""
    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    """Of the rectangle in the whole tensor."""


class _Read(NamedTuple):
    """The part of a region that lies in one chunk."""

    chunk: Chunk
    dtype: str
    source: tuple[slice, ...]
    """Within the chunk."""
    target: Tensor

    @property
    def place(self) -> tuple[Section, tuple[int, ...]]:
        """By which reads are sorted: as their bytes lie."""
        return self.chunk.section, tuple(part.start for part in self.source)


class _File:
    """An open file of a checkpoint."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def record(self, section: Section) -> TensorRecord:
        """The description of a stored tensor. Raises as `tensor_record`."""
        return tensor_record(self._descriptor, section)

    def fill(self, section: Section, buffer: memoryview) -> None:
        """Raises as `read_bytes`."""
        read_bytes(self._descriptor, section, buffer)


class _HashedFile(_File):
    """A file that is read from beginning to end, and hashed on the way."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor)
        self._name, self._done, self._digest = path.name, 0, hashlib.sha256()
        self._scratch = memoryview(bytearray(PIECE_BYTES))

    def fill(self, section: Section, buffer: memoryview) -> None:
        if section.start < self._done:  # two regions want it; it has been hashed
            super().fill(section, buffer)
        else:
            self._pass_to(section.start)
            self._hash_into(buffer)

    def is_as_written(self, size: int, sha256: str) -> bool:
        """Whether the whole file has this size and digest; its rest is read."""
        if os.fstat(self._descriptor).st_size != size:
            return False
        self._pass_to(size)
        return self._digest.hexdigest() == sha256

    def _pass_to(self, place: int) -> None:
        while self._done < place:
            self._hash_into(self._scratch[: place - self._done])

    def _hash_into(self, buffer: memoryview) -> None:
        for start in range(0, len(buffer), PIECE_BYTES):
            piece = buffer[start : start + PIECE_BYTES]
            read_bytes(self._descriptor, Section(self._name, self._done, len(piece)), piece)
            self._digest.update(piece)
            self._done += len(piece)


def read_tensors(
    folder: Path, index: Index, regions: Iterable[Region], verify: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Fill the tensors of `regions` from a checkpoint.

    verify: name of a file -> its "bytes" and "sha256" in complete.json, for the files whose digests have not been
    compared and are this rank's to compare. They are read whole, and each byte once.

    Raises CheckpointError naming the first tensor that the checkpoint does not hold in that shape, or not wholly, or a
    file that is not as written; and UnreadableError. Then the tensors may be filled in part, with anything.
    """
    reads = sorted((read for region in regions for read in _reads(index, region)), key=lambda read: read.place)
    verify = verify or {}
    apart = [read for read in reads if read.chunk.section.file not in verify]
    of_file: dict[str, list[_Read]] = {name: [] for name in verify}
    for read in reads:
        if read.chunk.section.file in verify:
            of_file[read.chunk.section.file].append(read)
    # the largest pieces of work first
    jobs = [partial(_read_and_verify, folder / name, verify[name], of_file[name]) for name in verify]
    jobs += [partial(_read_batch, folder, batch) for batch in _batches(apart)]
    with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint") as pool:
        for _ in pool.map(lambda job: job(), jobs):
            pass


def read_object(folder: Path, index: Index, key: str) -> Any:
    """A stored object: plain values and tensors. Raises CheckpointError if it is missing or of anything else."""
    if key not in index.objects:
        raise CheckpointError(f"{key} is not in the checkpoint")
    section = index.objects[key]
    content = bytearray(section.length)
    with opened(folder / section.file) as descriptor:
        check_object(descriptor, section)  # torch would refuse too, in a paragraph that advises to trust the file
        read_bytes(descriptor, section, memoryview(content))
    loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return loaded[0]  # core stores a list of the parts that a rank holds: one


def _reads(index: Index, region: Region) -> Iterator[_Read]:
    stored = index.tensors.get(region.key)
    if stored is None:
        raise CheckpointError(f"{region.key} is not in the checkpoint")
    if stored.shape != tuple(region.whole_shape):
        raise CheckpointError(f"{region.key} has shape {stored.shape} in the checkpoint, {region.whole_shape} here")
    found = 0
    for chunk in stored.chunks:
        read = _overlap(chunk, stored, region)
        if read is not None:
            found += read.target.numel()
            yield read
    if found != region.tensor.numel():
        raise CheckpointError(f"{region.key}: the checkpoint holds {found:,} of {region.tensor.numel():,} elements")


def _overlap(chunk: Chunk, stored: StoredTensor, region: Region) -> _Read | None:
    source, target = [], []
    for theirs, size, mine, length in zip(chunk.offsets, chunk.sizes, region.offsets, region.tensor.shape, strict=True):
        first, last = max(theirs, mine), min(theirs + size, mine + length)
        if first >= last:
            return None
        source.append(slice(first - theirs, last - theirs))
        target.append(slice(first - mine, last - mine))
    return _Read(chunk, stored.dtype, tuple(source), region.tensor.detach()[tuple(target)])


def _batches(reads: list[_Read]) -> Iterator[list[_Read]]:
    """Consecutive reads of one file, of about the bytes that keep READERS threads equally busy."""
    per_batch = max(sum(read.chunk.section.length for read in reads) // (4 * READERS), 1)
    for _, of_file in groupby(reads, key=lambda read: read.chunk.section.file):
        batch: list[_Read] = []
        size = 0
        for read in of_file:
            batch.append(read)
            size += read.chunk.section.length
            if size >= per_batch:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _read_batch(folder: Path, reads: list[_Read]) -> None:
    with opened(folder / reads[0].chunk.section.file) as descriptor:
        for read in reads:
            _read(_File(descriptor), read)


def _read_and_verify(path: Path, written: Mapping[str, Any], reads: list[_Read]) -> None:
    with opened(path) as descriptor:
        file = _HashedFile(descriptor, path)
        for read in reads:
            _read(file, read)
        if not file.is_as_written(written["bytes"], written["sha256"]):
            raise CheckpointError(damage_to(path.name))


@torch.no_grad()
def _read(file: _File, read: _Read) -> None:
    record = file.record(read.chunk.section)
    if (record.dtype, record.sizes) != (read.dtype, read.chunk.sizes):
        place = f"{read.chunk.section.file} at byte {read.chunk.section.start:,}"
        raise CheckpointError(f"{place}: {record.dtype} {record.sizes}, not {read.dtype} {read.chunk.sizes}")
    if not record.is_contiguous:
        values = torch.empty(record.values.length // ITEM_BYTES[record.dtype], dtype=getattr(torch, record.dtype))
        _fill(file, record.values, values)
        read.target.copy_(values.as_strided(record.sizes, record.strides, record.first)[read.source])
        return
    if not record.sizes:
        _read_rows(file, record, 0, read.target.view(1), ())
        return
    rows, *rest = read.source
    row_bytes = max(prod(record.sizes[1:]) * ITEM_BYTES[record.dtype], 1)
    step = max(BLOCK_BYTES // row_bytes, 1)
    if _is_in_place(record, read):
        step = rows.stop - rows.start
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        _read_rows(file, record, start, read.target[start - rows.start : stop - rows.start], tuple(rest))


def _is_in_place(record: TensorRecord, read: _Read) -> bool:
    """Whether the bytes on disk are those of the target's memory, in the same order."""
    target = read.target
    is_whole_rows = tuple(target.shape[1:]) == record.sizes[1:]
    return is_whole_rows and _is_like(target, record.dtype)


def _is_like(target: Tensor, dtype: str) -> bool:
    return target.device.type == "cpu" and target.is_contiguous() and target.dtype == getattr(torch, dtype)


def _read_rows(file: _File, record: TensorRecord, first: int, target: Tensor, rest: tuple[slice, ...]) -> None:
    """Fill `target` with rows of a contiguous record, from row `first` on, and of each the part `rest`."""
    row_shape = record.sizes[1:]
    width = ITEM_BYTES[record.dtype]
    start = record.values.start + (record.first + first * prod(row_shape)) * width
    section = Section(record.values.file, start, target.shape[0] * prod(row_shape) * width)
    if tuple(target.shape[1:]) == row_shape and _is_like(target, record.dtype):
        _fill(file, section, target)
        return
    values = torch.empty((target.shape[0], *row_shape), dtype=getattr(torch, record.dtype))
    _fill(file, section, values)
    target.copy_(values[(slice(None), *rest)])


def _fill(file: _File, section: Section, tensor: Tensor) -> None:
    """Read a contiguous tensor on the CPU."""
    if tensor.numel():
        elements = tensor.as_strided((tensor.numel(),), (1,))  # a dimension of length 1 may have any stride
        file.fill(section, elements.view(torch.uint8).numpy().data)
