"""The host memory into which a rank's state is copied before it is written, and into which it is read.

The former is one block, allocated by the first save and used again by the following ones: on most machines, touching
new memory takes longer than the copy. For a GPU it is pinned, so that copies are queued and run at the speed of the
bus. torch's own allocator of pinned memory would round the block up to a power of two.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from hunyuan_pretrain.runtime.transfers import ALIGNMENT

HUGE_BYTES = 2 << 20
"""Of a huge page, on most machines."""


class HostMemory:
    """Hands out host tensors of one block of memory, one after another."""

    def __init__(self, device: torch.device) -> None:
        """device: whose tensors are copied into it."""
        self.note: str | None = None
        """Why the memory is not pinned although the device is a GPU, for the log."""
        self._is_pinned_for = device if device.type == "cuda" else None
        self._block: mmap.mmap | None = None
        self._unpin: weakref.finalize[..., HostMemory] | None = None
        self._used = 0

    @property
    def num_bytes(self) -> int:
        """Of the block; 0 before the first `reserve`."""
        return 0 if self._block is None else len(self._block)

    def reserve(self, num_bytes: int) -> None:
        """Have room for `num_bytes` of tensors, each rounded up by `rounded`. What was handed out before is handed out
        again: nothing may still read it."""
        self._used = 0
        if num_bytes > self.num_bytes:
            if self._unpin is not None:
                self._unpin()
            self._block = None  # first: both blocks may not fit
            self._block = _new_block(num_bytes)
            if self._is_pinned_for is not None:
                self._pin(self._block)

    def touch(self) -> None:
        """Write to all of the block, so that the machine provides its pages now and not during the first copy."""
        if self._block is not None:
            torch.frombuffer(self._block, dtype=torch.uint8).zero_()

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until the next `reserve`."""
        assert self._block is not None, "reserve first"
        tensor = torch.frombuffer(self._block, dtype=dtype, count=shape.numel(), offset=self._used).view(shape)
        self._used += rounded(tensor.nbytes)
        return tensor

    def _pin(self, block: mmap.mmap) -> None:
        """Register the block with CUDA, until another takes its place."""
        address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()
        runtime, found = torch.cuda.cudart(), list[int]()

        def register() -> None:
            # a thread begins on GPU 0: registering there would make every rank of the machine a context on it
            torch.cuda.set_device(self._is_pinned_for)
            found.append(int(runtime.cudaHostRegister(address, len(block), 0)))

        # in a thread of its own: CUDA keeps an error for the next call of the same thread, which would be the copy's
        thread = threading.Thread(target=register, name="pinning")
        thread.start()
        thread.join()
        status = found[0] if found else "no device"
        if status != 0:
            self.note = (
                f"{len(block):,} bytes of host memory for checkpoints cannot be pinned (CUDA error {status}): "
                "copies from the GPU are slower; raise the limit of locked memory (ulimit -l)"
            )
        else:
            self._unpin = weakref.finalize(self, runtime.cudaHostUnregister, address)
            self._unpin.atexit = False  # the process's memory goes with it


def new_memory(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, in huge pages where the system has them: the first touch of new memory then
    takes a fraction of the time."""
    num_bytes = shape.numel() * dtype.itemsize
    if num_bytes < HUGE_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_new_block(num_bytes), dtype=dtype, count=shape.numel()).view(shape)


def _new_block(num_bytes: int) -> mmap.mmap:
    # private: huge pages of shared memory are off on most machines
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def rounded(num_bytes: int) -> int:
    """The room that a tensor of `num_bytes` takes in a block."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
