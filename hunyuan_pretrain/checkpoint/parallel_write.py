"""Writes one rank's part of a distributed checkpoint in the format of megatron-core (torch.distributed.checkpoint),
without communicating. joined_parts.py makes one checkpoint of the parts.

Core's own writer exchanges every rank's plan through rank 0, writes in forked processes, which may hang where there are
threads or CUDA, and leaves no digest, so that what was written would have to be read again. Here a file is hashed while
it is written, and a report on disk tells rank 0 what is in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

# isort: split
import torch
from torch import Tensor

from hunyuan_pretrain.data.folders import write_file
from hunyuan_pretrain.runtime.background import Background, leave_if_ending

FILES_PER_RANK = 2
"""Each is hashed and written by a thread of its own."""
CHUNK = 8 << 20
"""Bytes that are hashed, then written: the disk has work while the next ones are hashed."""
BUFFER = 1 << 20
"""Bytes of small writes that are collected."""
REPORTS = "ranks"
"""Folder of the reports, inside an unfinished checkpoint."""


class Shard(NamedTuple):
    """A rectangle of a whole tensor, in host memory."""

    key: str
    """Name of the whole tensor."""
    whole_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    """May be a view with gaps."""

    @property
    def num_bytes(self) -> int:
        return self.tensor.nbytes


class Blob(NamedTuple):
    """An object as bytes."""

    key: str
    content: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.content)


Item = Shard | Blob


class File(Protocol):
    """What is needed of a file to write it."""

    def write(self, data: Any, /) -> int: ...
    def flush(self) -> None: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


class HashedFile(io.RawIOBase):
    """A new file, whose sha256 is computed while it is written; flushed to disk when it is finished."""

    def __init__(self, path: Path) -> None:
        self._file: File = path.open("wb", buffering=BUFFER)
        self._digest, self._size = hashlib.sha256(), 0
        self.error: OSError | None = None
        """Of a write. torch wraps it in others, of which some do not name it."""

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            leave_if_ending()
            part = view[start : start + CHUNK]
            self._digest.update(part)
            try:
                self._file.write(part)
            except OSError as error:
                self.error = error
                raise
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing: torch calls it after each tensor."""

    def finish(self) -> dict[str, Any]:
        """Flush the file to disk and close it. Returns its size and digest, as complete.json has them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        if not self.closed:
            try:
                self._file.close()
            except OSError as error:  # what was in the buffer does not fit either
                self.error = self.error or error
        super().close()


def write_part(folder: Path, rank: int, items: Sequence[Item]) -> None:
    """Write a rank's items into the folder, and its report at last. Returns when both are on disk.

    Raises the operating system's error if there was one.
    """
    shares = [share for share in _shares(items) if share]
    files: dict[str, dict[str, Any]] = {}
    places: list[list[Any]] = []

    def write(name: str, share: Sequence[Item]) -> None:
        files[name], found = write_items(folder / name, share)
        places.extend(found)

    names = [f"__{rank}_{number}.distcp" for number in range(len(shares))]
    beside = [
        Background(lambda name=name, share=share: write(name, share), name)  # type: ignore[misc]
        for name, share in list(zip(names, shares, strict=True))[1:]
    ]
    try:
        if shares:
            write(names[0], shares[0])
    finally:  # nothing of this save may be at work when the next one begins
        for one in beside:
            one.wait()
    write_report(folder, rank, files, places)


def write_report(folder: Path, rank: int, files: dict[str, dict[str, Any]], places: list[list[Any]]) -> None:
    """Report what a rank has written: size and digest of each file, and what is where in them."""
    layout = json.dumps(sorted(places)).encode()
    write_file(folder / REPORTS / f"{rank}.layout.json", layout)
    report = {"files": files, "layout": hashlib.sha256(layout).hexdigest()}
    write_file(folder / REPORTS / f"{rank}.json", json.dumps(report).encode())


def _shares(items: Sequence[Item]) -> list[list[Item]]:
    """The items of each file: about the same number of bytes in each."""
    shares: list[list[Item]] = [[] for _ in range(FILES_PER_RANK)]
    sizes = [0] * FILES_PER_RANK
    for item in sorted(items, key=lambda item: item.num_bytes, reverse=True):
        least = sizes.index(min(sizes))
        shares[least].append(item)
        sizes[least] += item.num_bytes
    return shares


def write_items(path: Path, items: Sequence[Item]) -> tuple[dict[str, Any], list[list[Any]]]:
    """Write one file. Returns its size and digest; and for each item its key, the file's name, where it starts and how
    long it is and, of a tensor, dtype, whole shape, offset and shape."""
    places: list[list[Any]] = []
    with HashedFile(path) as file:
        try:
            for item in items:
                start, described = file.tell(), list[Any]()
                if isinstance(item, Blob):
                    file.write(item.content)
                else:
                    torch.save(_alone(item.tensor), cast(IO[bytes], file))  # which only writes and flushes
                    described = [str(item.tensor.dtype), item.whole_shape, item.offset, tuple(item.tensor.shape)]
                places.append([item.key, path.name, start, file.tell() - start, *described])
            return file.finish(), places
        except BaseException:
            if file.error is not None:
                raise file.error from None
            raise


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own size: torch.save writes the whole storage. Contiguous memory is not copied."""
    tensor = tensor.contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a dimension of length 1 may have any stride
    return torch.from_numpy(flat.view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)
