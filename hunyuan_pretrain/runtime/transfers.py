"""Copies between the host and a GPU for which neither side waits until the values are used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes; where kernels and the allocator expect a tensor to start."""


class Incoming:
    """CPU tensors on their way to a device: packed into pinned memory and sent in one copy, on a stream of its own, so
    it runs beside the kernels that the device already has to do. On the CPU they are the tensors themselves."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._is_copied = device.type == "cuda"
        self._tensors = tuple(tensors if self._is_copied else (tensor.to(device) for tensor in tensors))
        if self._is_copied:
            packed = packed_bytes(tensors, pin_memory=True)
            with torch.cuda.stream(_copy_stream(device)):
                self._bytes = packed.to(device, non_blocking=True)
                self._copied = torch.cuda.current_stream(device).record_event()

    def take(self) -> tuple[Tensor, ...]:
        """The tensors on the device, for the current stream: it waits for the copy, the host does not."""
        if not self._is_copied:
            return self._tensors
        stream = torch.cuda.current_stream(self._bytes.device)
        stream.wait_event(self._copied)
        self._bytes.record_stream(stream)  # the allocator knows only the stream of the copy
        return unpacked(self._bytes, self._tensors)


class Resident:
    """Memory of a device at fixed addresses, for tensors that a recorded step reads in each replay."""

    def __init__(self, like: Sequence[Tensor], device: torch.device) -> None:
        """like: CPU tensors of the shapes and dtypes."""
        self._bytes = torch.empty(sum(map(_aligned, like)), dtype=torch.uint8, device=device)
        self.tensors = unpacked(self._bytes, like)
        """On the device."""

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Copy CPU tensors, in one copy. It is queued behind what the current stream has to do, so a replay that still
        runs reads the values before."""
        shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        assert shapes == [(memory.shape, memory.dtype) for memory in self.tensors], "a recorded step has fixed shapes"
        self._bytes.copy_(packed_bytes(tensors, pin_memory=self._bytes.is_cuda), non_blocking=True)


class Outgoing:
    """A tensor on its way to the host. The copy is queued behind the kernels that compute it."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._copied = tensor.detach(), None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._copied = torch.cuda.current_stream(tensor.device).record_event()

    @property
    def is_here(self) -> bool:
        """Whether reading never waits: the tensor was computed on the CPU."""
        return self._copied is None

    def read(self) -> Tensor:
        """The values, on the CPU. The host waits for them here."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


def packed_bytes(tensors: Sequence[Tensor], pin_memory: bool = False) -> Tensor:
    """(bytes,) uint8: the CPU tensors one after another, each at a multiple of ALIGNMENT."""
    packed = torch.empty(sum(_aligned(tensor) for tensor in tensors), dtype=torch.uint8, pin_memory=pin_memory)
    for part, tensor in zip(unpacked(packed, tensors), tensors, strict=True):
        part.copy_(tensor)
    return packed


def unpacked(packed: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of what `packed_bytes(like)` holds, with the shapes and dtypes of `like`."""
    views, start = [], 0
    for tensor in like:
        views.append(packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _aligned(tensor)
    return tuple(views)


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
