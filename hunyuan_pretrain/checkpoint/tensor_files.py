"""Folders of safetensors shards, written and read one tensor at a time, so that memory does not grow with the model.

The library's `save_file` wants all tensors of a file at once, and what `safe_open` returns are views of a mapped file,
whose pages count as the process's memory. The format is simple: 8 bytes with the length of a JSON header, the header
(name -> dtype, shape, and begin and end of the data), then the data (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError

__all__ = ["INDEX", "SINGLE", "ShardWriter", "StoredTensors", "TensorSpec", "bytes_of", "read_into"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}

ALIGNMENT = 64
"""Bytes at a multiple of which the data of a file begins. Readers map the file and compute with it in place: a matrix
product is slower from elsewhere, and may have other last bits. The format asks for 8."""

_HEADER_LIMIT = 100_000_000
"""Bytes, as in the library: a damaged length must not allocate terabytes."""


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Place(NamedTuple):
    file: Path
    offset: int
    """Bytes from the beginning of the file."""
    spec: TensorSpec


# --- writing ----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """The shards of one model folder. All sizes follow from `tensors`, so `create` makes the files with their headers,
    and then each tensor is written into its place, in any order, also from other processes with an equal writer."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorSpec], max_shard_bytes: int = 5_000_000_000) -> None:
        """tensors: name -> dtype and shape, in the order in which they are to be divided into shards of at most
        max_shard_bytes of data. A larger tensor has a shard of its own."""
        self.folder = folder
        self.total_bytes = sum(spec.nbytes for spec in tensors.values())
        self._shards = _divide(tensors, max_shard_bytes)
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self._headers = dict(zip((folder / name for name in names), map(_header, self._shards), strict=True))
        self._places = {
            name: _Place(file, offset, spec)
            for (file, header), shard in zip(self._headers.items(), self._shards, strict=True)
            for name, offset, spec in _offsets(shard, len(header))
        }
        self._missing = set(self._places)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of an announced tensor. Raises KeyError."""
        return self._places[name].spec

    def create(self) -> None:
        """Make the files, with headers and without data, and the index if there are several. Raises OSError, and
        CheckpointError if the disk has too little room."""
        self.refuse_full_disk()
        for (path, header), shard in zip(self._headers.items(), self._shards, strict=True):
            with path.open("xb") as file:
                file.write(header)
                file.truncate(len(header) + sum(spec.nbytes for spec in shard.values()))
        if len(self._headers) > 1:
            content = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {name: place.file.name for name, place in self._places.items()},
            }
            (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")

    def refuse_full_disk(self) -> None:
        """Raise CheckpointError if the disk has too little room; the folder need not exist yet."""
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        if free < self.total_bytes:
            raise CheckpointError(
                f"{self.folder.parent}: the tensors take {self.total_bytes / 1e9:.3g} GB, and only {free / 1e9:.3g} GB "
                "are free"
            )

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, from any device, cast to the announced dtype. Raises CheckpointError if it was not announced
        or has another shape, OSError."""
        place = self._places.get(name)
        if place is None or tuple(tensor.shape) != place.spec.shape:
            expected = place.spec.shape if place else "no such tensor"
            raise CheckpointError(f"{name}: shape {tuple(tensor.shape)}, but the folder has {expected}")
        data = bytes_of(tensor.detach().to("cpu", place.spec.dtype).contiguous())
        handle = os.open(place.file, os.O_WRONLY)
        try:
            written = 0
            while written < len(data):  # the kernel takes at most 2 GiB at once
                written += os.pwrite(handle, data[written:], place.offset + written)
        finally:
            os.close(handle)
        self._missing.discard(name)

    def finish(self, written_elsewhere: set[str] | frozenset[str] = frozenset()) -> None:
        """Put everything on the disk. Raises CheckpointError if a tensor was written neither by this writer nor, as
        the caller says, by another process; OSError."""
        if missing := sorted(self._missing - written_elsewhere):
            raise CheckpointError(f"{self.folder}: {len(missing)} tensors were never written, among them {missing[:3]}")
        for path in self._headers:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _divide(tensors: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in tensors.items():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    # wide elements first: readers map the file and need each tensor at a multiple of its element size
    return [dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)) for shard in shards]


def _header(shard: Mapping[str, TensorSpec]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, begin, spec in _offsets(shard, 0):
        content[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _offsets(shard: Mapping[str, TensorSpec], begin: int) -> Iterator[tuple[str, int, TensorSpec]]:
    for name, spec in shard.items():
        yield name, begin, spec
        begin += spec.nbytes


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type] # a stub without buffers


def read_into(file: io.FileIO, data: memoryview) -> bool:
    """Fill `data` from the file's position on; False if the file ends before."""
    done = 0
    while done < len(data):
        if not (count := file.readinto(data[done:])):
            return False
        done += count
    return True


# --- reading ----------------------------------------------------------------------------------------------------------


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a model folder, each read from disk when it is asked for, into memory of its own.

    Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    """

    def __init__(self, folder: Path, file: str | None = None) -> None:
        """Reads all headers. file: of this name only. Raises CheckpointError: no such files, a shard that is missing or
        damaged, an index that does not fit its shards."""
        self.folder = folder
        if file is None and (folder / INDEX).is_file():
            self._places = _indexed(folder)
        elif (folder / (file or SINGLE)).is_file():
            self._places = _places_in(folder / (file or SINGLE))
        else:
            missing = f"no {file}" if file else f"neither {SINGLE} nor {INDEX}"
            raise CheckpointError(f"{folder}: {missing} is there")

    def __getitem__(self, name: str) -> Tensor:
        """Raises KeyError, CheckpointError if the file is shorter than its header says."""
        place = self._places[name]
        tensor = torch.empty(place.spec.shape, dtype=place.spec.dtype)
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.offset)
            if not read_into(file, bytes_of(tensor)):
                raise CheckpointError(f"{place.file}: ends in the middle of {name}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows begin to end of a tensor's first dimension; only they are read. Raises KeyError, CheckpointError."""
        file, offset, (dtype, shape) = self._places[name]
        row = TensorSpec(dtype, shape[1:])
        part = copy(self)
        part._places = {name: _Place(file, offset + begin * row.nbytes, TensorSpec(dtype, (end - begin, *row.shape)))}
        return part[name]

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape, without reading. Raises KeyError."""
        return self._places[name].spec


def _indexed(folder: Path) -> dict[str, _Place]:
    try:
        file_of = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(set(file_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX}: not an index of shards: {error!r}") from None
    found: dict[str, _Place] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX}: names {name!r}, which is no file of this folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name}, which the index names, is missing")
        found |= _places_in(folder / name)
    wrong = sorted(name for name in file_of if name not in found or found[name].file.name != file_of[name])
    wrong += sorted(found.keys() - file_of.keys())
    if wrong:
        raise CheckpointError(f"{folder}: the index and the shards disagree about {', '.join(wrong[:3])}")
    return {name: found[name] for name in file_of}


def _places_in(path: Path) -> dict[str, _Place]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 0 < length <= min(_HEADER_LIMIT, size - 8):
            raise CheckpointError(f"{path}: damaged or no safetensors file: a header of {length:,} bytes of {size:,}")
        text = file.read(length)
    begin = 8 + length
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        places = {}
        for name, entry in entries.items():
            spec = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            first, last = entry["data_offsets"]
            if min((*spec.shape, first)) < 0 or last - first != spec.nbytes:
                raise ValueError(f"{name} has {last - first} bytes at {first}, its shape needs {spec.nbytes}")
            places[name] = _Place(path, begin + first, spec)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged header: {error!r}") from None
    end = max((place.offset + place.spec.nbytes for place in places.values()), default=begin)
    if end != size:
        raise CheckpointError(f"{path}: has {size:,} bytes, its header describes {end:,}; the file was cut or changed")
    return places
