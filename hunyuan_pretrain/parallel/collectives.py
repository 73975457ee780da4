"""Collectives on whole tensors. Each states and checks which tensors it accepts (runtime/handover.py).

NCCL moves bytes from one pointer to another. It is given one dtype and one number of elements, taken from the input or
the output, depending on the call.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from hunyuan_pretrain.runtime.handover import handed_over


def all_gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(R, ...) of each rank -> (R * ranks, ...), contiguous, in rank order. Communicates: `group`, one all-gather."""
    (x,) = handed_over("all_gather", x)
    rows = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(rows, x, group=group)
    return rows


def reduce_scatter_rows(x: Tensor, group: dist.ProcessGroup, out: Tensor | None = None) -> Tensor:
    """(R * ranks, ...) -> (R, ...), contiguous: this rank's rows, summed over all ranks in x's dtype; written into
    `out` if given.

    Communicates: `group`, one reduce-scatter. Raises ValueError if the rows do not divide evenly, or `out` does not
    fit.
    """
    size = group.size()
    shape = (x.shape[0] // size, *x.shape[1:])
    if out is None:
        out = x.new_empty(shape)
    if x.shape[0] % size or out.shape != shape:
        raise ValueError(f"reduce_scatter: {tuple(x.shape)} over {size} ranks does not give {tuple(out.shape)}")
    (x,) = handed_over("reduce_scatter", x)
    handed_over("reduce_scatter, output", out, x, dtype=x.dtype, is_written=True)
    dist.reduce_scatter_tensor(out, x, group=group)
    return out


def exchange_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(R * ranks, ...) -> the same shape, contiguous: the n-th part of the rows goes to rank n. Communicates: `group`,
    one all-to-all.

    Raises ValueError if the rows do not divide evenly.
    """
    if x.shape[0] % group.size():
        raise ValueError(f"all_to_all: {x.shape[0]} rows do not divide over {group.size()} ranks")
    (x,) = handed_over("all_to_all", x)
    received = x.new_empty(x.shape)
    dist.all_to_all_single(received, x, group=group)
    return received
