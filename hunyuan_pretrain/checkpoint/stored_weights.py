"""The weights of a training checkpoint, read parameter by parameter in one process, whatever layout wrote them.

A checkpoint in megatron's distributed format is a set of files. Each holds parts of tensors, one after the other, and
`.metadata` says which part of which tensor lies where. Core reads it with process groups, into a model that is already
there. Here a file is read only where a wanted part lies, so memory holds one parameter, or one expert of it, and the
optimizer's state is never read.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.folders import MARKER, verify_files
from hunyuan_pretrain.checkpoint.tensor_files import TensorSpec, bytes_of, read_into
from hunyuan_pretrain.checkpoint.workers import Say, default_processes, run_over

__all__ = ["METADATA", "Chunk", "OnDisk", "StoredWeights", "read_places", "rows_of", "shape_of", "verified_weights"]

METADATA = ".metadata"
OTHER_STATE = ("optimizer.", "fp8.")
"""Prefixes of tensors of a checkpoint that are not weights."""


class Chunk(NamedTuple):
    """One stored part of a tensor."""

    offsets: tuple[int, ...]
    """Of its first element in the whole tensor."""
    shape: tuple[int, ...]
    file: str
    begin: int
    """Bytes from the beginning of the file; what `torch.save` wrote begins there."""
    length: int


Places = dict[str, tuple[TensorSpec, tuple[Chunk, ...]]]
"""Name of a whole parameter -> its dtype and shape, and where its parts are."""


def read_places(folder: Path) -> Places:
    """Where the weights of a checkpoint are. Its files must have been verified. Raises CheckpointError."""
    try:
        metadata = FileSystemReader(folder).read_metadata()
        found: Places = {}
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata) or not entry.size or name.startswith(OTHER_STATE):
                continue
            chunks = []
            for chunk in entry.chunks:
                place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                if place.transform_descriptors:
                    raise ValueError(f"{name} is stored in the form {place.transform_descriptors}")
                chunks.append(
                    Chunk(tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length)
                )
            found[name] = TensorSpec(entry.properties.dtype, tuple(entry.size)), tuple(chunks)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder / METADATA}: cannot be read: {error!r}") from None
    for name, (spec, parts) in found.items():
        if sum(math.prod(part.shape) for part in parts) != math.prod(spec.shape):
            raise CheckpointError(f"{folder}: the parts of {name} do not make up its shape {spec.shape}")
    return found


class StoredWeights(Mapping[str, Tensor]):
    """Whole parameters by name, each read from disk when it is asked for. Can be pickled, for other processes."""

    def __init__(self, folder: Path) -> None:
        """Reads `.metadata` only. Raises CheckpointError."""
        self.folder = folder
        self._places = read_places(folder)

    def __getitem__(self, name: str) -> Tensor:
        """Raises KeyError, CheckpointError if a file is damaged."""
        return self.rows(name, 0, self.spec(name).shape[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape, without reading. Raises KeyError."""
        return self._places[name][0]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a parameter's first dimension. Raises as `__getitem__`."""
        spec, chunks = self._places[name]
        target = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        for chunk in chunks:
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.shape[0])
            if first < last:
                others = (slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.shape[1:], strict=True))
                region = target[(slice(first - start, last - start), *others)]
                part = (
                    region
                    if region.is_contiguous()
                    else torch.empty_like(region, memory_format=torch.contiguous_format)
                )
                self._read_chunk(name, chunk, spec.dtype, first - chunk.offsets[0], part)
                if part is not region:
                    region.copy_(part)
        return target

    def files(self) -> list[str]:
        """The names of the files that hold weights."""
        return sorted({chunk.file for _, chunks in self._places.values() for chunk in chunks})

    def _read_chunk(self, name: str, chunk: Chunk, dtype: torch.dtype, skipped_rows: int, target: Tensor) -> None:
        """Fill `target` (contiguous) with the rows of a chunk after the first skipped_rows."""
        path = self.folder / chunk.file
        row_bytes = math.prod(chunk.shape[1:]) * dtype.itemsize
        try:
            with path.open("rb", buffering=0) as file:
                begin = chunk.begin + _begin_of_data(_Slice(file, chunk.begin, chunk.length), chunk.shape, dtype)
                file.seek(begin + skipped_rows * row_bytes)
                complete = read_into(file, bytes_of(target))
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, zipfile.BadZipFile, pickle.PickleError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None
        if not complete:
            raise CheckpointError(f"{path}: ends in the middle of {name}")


def verified_weights(
    folder: Path, marker: Mapping[str, Any], processes: int | None = None, say: Say | None = None
) -> tuple[StoredWeights, int]:
    """The weights of a checkpoint whose files are as written, and the number of processes that verified them: by
    default as many as are worth it and fit into memory, also for a conversion of the weights.

    The digest of a file covers all of it, so the optimizer's state in it is read too, and not kept. Raises
    CheckpointError.
    """
    _verify(folder, marker, METADATA)
    weights = StoredWeights(folder)
    specs = [weights.spec(name) for name in weights]
    largest = max(spec.nbytes // (spec.shape[0] if len(spec.shape) == 3 else 1) for spec in specs)
    processes = processes or default_processes(sum(spec.nbytes for spec in specs), largest)
    files = [(name, marker["files"][name]["bytes"] if name in marker["files"] else 0) for name in weights.files()]
    run_over(processes, "verifying the checkpoint", partial(_verify, folder, marker), files, say)
    return weights, processes


def _verify(folder: Path, marker: Mapping[str, Any], name: str) -> None:
    if name not in marker["files"]:
        raise CheckpointError(f"{folder}: {MARKER} does not list {name}")
    try:
        verify_files(folder, marker, [name])
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


@runtime_checkable
class OnDisk(Protocol):
    """What a mapping of parameters offers if it reads them from disk: StoredWeights, and whatever joins other files."""

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape, without reading."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of the first dimension, read alone."""


def rows_of(weights: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Rows start to stop of a parameter; read alone if it comes from disk."""
    return weights.rows(name, start, stop) if isinstance(weights, OnDisk) else weights[name][start:stop]


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a parameter, which is not read if it comes from disk."""
    return weights.spec(name).shape if isinstance(weights, OnDisk) else tuple(weights[name].shape)


def _begin_of_data(saved: _Slice, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where in the output of `torch.save` the elements of its one tensor begin. It is a zip file whose members are not
    compressed. Raises ValueError if it is not a contiguous tensor of this shape and dtype."""
    # on the meta device nothing but the description is read
    tensor = torch.load(io.BufferedReader(saved), map_location="meta", weights_only=True)
    what = (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous(), tensor.storage_offset())
    if what != (shape, dtype, True, 0):
        raise ValueError(f"it is {what}, not a contiguous {dtype} tensor of shape {shape}")
    saved.seek(0)
    with zipfile.ZipFile(saved) as members:
        (data,) = (member for member in members.infolist() if member.filename.endswith("/data/0"))
        if data.compress_type != zipfile.ZIP_STORED or data.file_size < math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its {data.file_size} bytes are not those of shape {shape}")
    # a local header: 26 bytes, then the lengths of the name and of the extra field, both of which follow
    saved.seek(data.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", saved.read(4))
    return int(data.header_offset) + 30 + int(name_length) + int(extra_length)


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: io.FileIO, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # any buffer; the stub's type is private
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)]) or 0
        self._at += count
        return count
