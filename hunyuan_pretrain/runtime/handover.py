"""Prepares tensors for code that reads memory by pointer and shape: NCCL and kernels of other libraries.

Such a reader ignores strides: a tensor with another layout than its shape implies is read wrongly, without an error. So
callers state here what the reader accepts, and get tensors that fit. torch's own operators respect strides and do not
need this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def handed_over(
    reader: str,
    *tensors: Tensor,
    dtype: torch.dtype | None = None,
    is_written: bool = False,
    knows_strides: bool = False,
    starts_memory: bool = False,
) -> tuple[Tensor, ...]:
    """The tensors in the form that `reader` accepts: contiguous, on one device, all of `dtype` (None: that of the
    first). A tensor is copied only if its layout does not fit.

    knows_strides: the reader accepts any strides, except that the last dim's must be 1. starts_memory: it infers the
    layout from offsets and strides, so tensors must start at offset 0 of their storage. is_written: the reader writes
    the tensors, so a copy cannot replace one whose layout does not fit, and it is refused. Raises ValueError, which
    names the reader and what does not fit.
    """
    dtype = dtype or tensors[0].dtype
    taken: list[Tensor] = []
    for number, tensor in enumerate(tensors):
        if tensor.dtype != dtype:
            raise ValueError(f"{reader}: tensor {number} is {tensor.dtype}, but must be {dtype}")
        if tensor.device != tensors[0].device:
            raise ValueError(f"{reader}: tensor {number} is on {tensor.device}, the first one on {tensors[0].device}")
        fits = (
            tensor.stride(-1) == 1 or tensor.shape[-1] == 1
            if knows_strides and tensor.dim()
            else tensor.is_contiguous()
        )
        if is_written and not fits:
            layout = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            raise ValueError(f"{reader}: tensor {number} is written in place, but is not contiguous: {layout}")
        fits = fits and not (starts_memory and tensor.storage_offset())
        tensor = tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
        # in a contiguous tensor a dim of size 1 may have any stride, and a reader that compares strides would see
        # another layout
        taken.append(tensor.flatten().view(tensor.shape) if starts_memory and 1 in tensor.shape else tensor)
    return tuple(taken)


_is_recording = False


@contextmanager
def recording() -> Iterator[None]:
    """Inside, operations are recorded for replays (train/recorded_step.py), and `to_device` refuses to copy: a replay
    would read the host memory again, where other values are by then."""
    global _is_recording
    _is_recording = True
    try:
        yield
    finally:
        _is_recording = False


def is_recording() -> bool:
    """Whether this is inside `recording`."""
    return _is_recording


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to `device`. To a GPU it goes through pinned memory, so the host does not wait for the copy.
    Raises RuntimeError while operations are recorded."""
    if _is_recording:
        raise RuntimeError(f"a recorded step would copy {tensor.numel()} numbers from memory that its replays lack")
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
