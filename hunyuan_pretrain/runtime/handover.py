"""What is handed to code that reads memory by a pointer and a shape: kernels of other libraries, and NCCL.

Such a reader asks for no strides: a tensor that lies otherwise than its shape says is read wrongly, without an error.
So whoever hands one over says here what the reader takes, and gets it. Tensors of torch's own operators need none of
this; they know their strides.
"""

from __future__ import annotations

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
    """The tensors as `reader` takes them: contiguous, on one device, of `dtype` (None: all of one); copied only if they
    lie otherwise.

    knows_strides: the reader takes any strides but that of the last dim, which is 1. starts_memory: it guesses the
    layout from offsets and strides, and takes tensors with nothing before them in their memory. is_written: the reader
    writes them, so that no copy can stand for one: one that lies otherwise is refused. Raises ValueError that names the
    reader and what does not fit.
    """
    dtype = dtype or tensors[0].dtype
    taken: list[Tensor] = []
    for number, tensor in enumerate(tensors):
        if tensor.dtype != dtype:
            raise ValueError(f"{reader}: tensor {number} is {tensor.dtype}, and {dtype} is read")
        if tensor.device != tensors[0].device:
            raise ValueError(f"{reader}: tensor {number} is on {tensor.device}, the first one on {tensors[0].device}")
        fits = (
            tensor.stride(-1) == 1 or tensor.shape[-1] == 1
            if knows_strides and tensor.dim()
            else tensor.is_contiguous()
        )
        if is_written and not fits:
            layout = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            raise ValueError(f"{reader}: tensor {number} is taken in place, and is not contiguous: {layout}")
        fits = fits and not (starts_memory and tensor.storage_offset())
        tensor = tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
        # a dim of size 1 may have any stride in a contiguous tensor, and whoever compares strides finds another layout
        taken.append(tensor.flatten().view(tensor.shape) if starts_memory and 1 in tensor.shape else tensor)
    return tuple(taken)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on `device`; on a GPU from pinned memory, so that the host does not wait until the copy is
    made."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
