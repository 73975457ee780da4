"""Where the tensors of a checkpoint lie in its files, read from bytes that may be hostile. Imports no torch.

.metadata       a pickle: which part of which tensor is where (`read_index`)
__R_N.distcp    what rank R has written: records one after another, each as torch.save writes a file: a zip archive
                of data.pkl, which describes the tensor, and data/0, its values (`tensor_record`)
common.pt       such an archive without tensors
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.inert_pickle import Inert, Outside, name_of, read_pickle, refuse

INDEX = ".metadata"
COMMON = "common.pt"

Shape = tuple[int, ...]

_STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.BFloat16Storage": "bfloat16",
    "torch.HalfStorage": "float16",
    "torch.DoubleStorage": "float64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
ITEM_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""dtype of a stored tensor, as torch names it -> bytes of an element."""

_REBUILD = "torch._utils._rebuild_tensor_v2"
TENSOR_NAMES = frozenset({_REBUILD, "collections.OrderedDict", *_STORAGES})
"""What the description of a tensor names."""

_DCP = "torch.distributed.checkpoint"
INDEX_NAMES = frozenset(
    {
        *(f"torch.{dtype}" for dtype in ITEM_BYTES),
        "torch.Size",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
        *(
            f"{_DCP}.metadata.{name}"
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "MetadataIndex",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        f"{_DCP}.filesystem._StorageInfo",
        f"{_DCP}.filesystem._StoragePrefix",
        # the plan of each rank, which core keeps beside the index; not used
        *(
            f"{_DCP}.planner.{name}"
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        ),
    }
)
"""What the index names."""


_MALFORMED = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile and the code here raise for bytes that are no archive, or none of torch's."""


class Section(NamedTuple):
    """A range of bytes of a file."""

    file: str
    """Name, within the checkpoint's folder."""
    start: int
    length: int


class Chunk(NamedTuple):
    """A stored rectangle of a tensor."""

    offsets: Shape
    sizes: Shape
    section: Section


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint, whole."""

    dtype: str
    shape: Shape
    chunks: list[Chunk]


class Index(NamedTuple):
    """Everything that a checkpoint holds, by name."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, Section]


class TensorRecord(NamedTuple):
    """Where the values of one stored chunk are, and how they are laid out."""

    dtype: str
    sizes: Shape
    strides: Shape
    first: int
    """Elements before the tensor's first one in `values`."""
    values: Section

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in order, without gaps."""
        expected, step = [], 1
        for size in reversed(self.sizes):
            expected.append(step)
            step *= size
        steps = zip(self.sizes, self.strides, reversed(expected), strict=True)
        return all(size == 1 or stride == wanted for size, stride, wanted in steps)


def read_index(content: bytes, file_bytes: Mapping[str, int]) -> Index:
    """The index of a checkpoint from the content of .metadata. `file_bytes`: the sizes of the checkpoint's files, whose
    digests have been compared.

    Raises UnsafePickleError if the pickle names what no index needs, CheckpointError if it is malformed or refers to
    bytes outside those files.
    """
    metadata = read_pickle(content, INDEX, INDEX_NAMES)
    try:
        places: dict[tuple[str, Shape | None], Section] = {}
        for key, place in metadata.field("storage_data").items():
            offset = key.state.get("offset")  # an object has none
            places[_text(key.field("fqn")), None if offset is None else _shape(offset)] = _section(place, file_bytes)
        tensors, objects = {}, {}
        for name, entry in metadata.field("state_dict_metadata").items():
            if name_of(entry) == f"{_DCP}.metadata.BytesStorageMetadata":
                objects[_text(name)] = places[name, None]
                continue
            chunks = []
            for chunk in entry.field("chunks"):
                offsets = _shape(chunk.field("offsets"))
                chunks.append(Chunk(offsets, _shape(chunk.field("sizes")), places[name, offsets]))
            dtype = name_of(entry.field("properties").state[0]).removeprefix("torch.")
            tensors[_text(name)] = StoredTensor(dtype, _shape(entry.field("size")), chunks)
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        refuse(INDEX, f"not the index of a checkpoint ({type(error).__name__}: {error})")
    return Index(tensors, objects)


def tensor_record(descriptor: int, section: Section) -> TensorRecord:
    """The record of a tensor in an open file. Raises UnsafePickleError, CheckpointError."""
    what = f"{section.file} at byte {section.start:,}"
    try:
        with _archive(descriptor, section, what) as archive:
            folder, rebuilt = _description(archive, what, TENSOR_NAMES)
            if name_of(rebuilt) != _REBUILD or not isinstance(rebuilt, Inert):
                raise ValueError("not a tensor")
            storage, first, sizes, strides = rebuilt.values[:4]
            if not isinstance(storage, Outside):
                raise ValueError("a tensor without values")
            _, kind, key, *_ = storage
            values = _values(descriptor, archive.getinfo(f"{folder}/data/{key}"), section)
            record = TensorRecord(_STORAGES[name_of(kind)], _whole(sizes), _whole(strides), _whole((first,))[0], values)
            if len(record.sizes) != len(record.strides):
                raise ValueError("sizes and strides differ in number")
            last = record.first + sum((n - 1) * step for n, step in zip(record.sizes, record.strides, strict=True))
            if prod(record.sizes) and (last + 1) * ITEM_BYTES[record.dtype] > values.length:
                raise ValueError("a tensor larger than its values")
            return record
    except CheckpointError:
        raise
    except _MALFORMED as error:
        refuse(what, f"not the record of a tensor ({type(error).__name__}: {error})")


def check_object(descriptor: int, section: Section) -> None:
    """Check that a stored object is of plain values and tensors. Raises UnsafePickleError naming what else it names,
    CheckpointError."""
    what = section.file if section.start == 0 else f"{section.file} at byte {section.start:,}"
    try:
        with _archive(descriptor, section, what) as archive:
            _description(archive, what, TENSOR_NAMES)
    except CheckpointError:
        raise
    except _MALFORMED as error:
        refuse(what, f"not a stored object ({type(error).__name__}: {error})")


def read_bytes(descriptor: int, section: Section, buffer: memoryview) -> None:
    """Fill `buffer` from the beginning of `section`. Does not move the file's position, so threads may share the file.
    Raises CheckpointError if the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], section.start + done)
        if count == 0:
            refuse(section.file, f"ends at byte {section.start + done:,}")
        done += count


class _Range(io.RawIOBase):
    """A section of an open file, as a file of its own."""

    def __init__(self, descriptor: int, section: Section) -> None:
        super().__init__()
        self._descriptor, self._section, self._at = descriptor, section, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._section.length}[whence]
        if start + offset < 0:
            raise ValueError("a position before the beginning")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._section.length - self._at, 0)]
        count = os.preadv(self._descriptor, [view], self._section.start + self._at) if len(view) else 0
        self._at += count
        return count


def _archive(descriptor: int, section: Section, what: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BufferedReader(_Range(descriptor, section)))
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        refuse(what, f"not a record of torch.save ({error})")


def _description(archive: zipfile.ZipFile, what: str, allowed: frozenset[str]) -> tuple[str, Any]:
    """(folder in the archive, content of its data.pkl)."""
    found = [info for info in archive.infolist() if info.filename.count("/") == 1 and "/data.pkl" in info.filename]
    if not found:
        raise ValueError("without data.pkl")
    info = found[0]
    folder = info.filename.split("/")[0]
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed")
    order = f"{folder}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("values of a machine with another byte order")
    return folder, read_pickle(archive.read(info), what, allowed)


def _values(descriptor: int, info: zipfile.ZipInfo, section: Section) -> Section:
    """Where a member of the archive in `section` is in the file. Its local header gives the length of two fields."""
    header = bytearray(30)
    read_bytes(descriptor, Section(section.file, section.start + info.header_offset, 30), memoryview(header))
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_bytes + extra_bytes
    if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > section.length:
        raise ValueError("values outside the record")
    return Section(section.file, section.start + start, info.file_size)


def _section(place: Any, file_bytes: Mapping[str, int]) -> Section:
    file = _text(place.field("relative_path"))
    start, length = _whole((place.field("offset"), place.field("length")))
    if file not in file_bytes or start + length > file_bytes[file]:
        refuse(INDEX, f"it refers to bytes {start:,} to {start + length:,} of {file}, which is not in complete.json")
    if place.state.get("transform_descriptors"):
        raise ValueError("transformed data")
    return Section(file, start, length)


def _shape(size: Any) -> Shape:
    if name_of(size) != "torch.Size":
        raise ValueError(f"{type(size).__name__} in place of a size")
    return _whole(size.values[0])


def _whole(values: Any) -> Shape:
    if not isinstance(values, (tuple, list)) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"not whole numbers: {values!r:.60}")
    return tuple(values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} in place of a name")
    return value
