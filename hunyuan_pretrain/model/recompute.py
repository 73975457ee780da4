"""Recompute by part: the output of a cheap function is freed in the forward pass and computed again in the backward
pass, from an input that is kept anyway.

`torch.utils.checkpoint` around a function cannot do that: the output would still be kept by the matmul that reads it.
Core's CheckpointWithoutOutput empties the output's memory and refills it with a copy. Here the matmul's saved tensor is
replaced by a note how to compute it, which moves no further bytes, saves and restores no generator (none of these
functions draws), and composes with offloading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.model.saved_tensors import kept_by, memory_of, nodes_between, replace


def free_until_backward(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, result: Tensor) -> None:
    """Call after `result` was computed from y = function(x). What the functions from y to `result` keep of y is freed;
    the backward pass computes function(x) again, once for all of them.

    `function` must give the same bits again, and its node must keep x; RuntimeError if it does not. Without a graph
    nothing is kept, and nothing happens. A reader that keeps a copy of y, such as a quantised one, still keeps it.
    """
    if y.grad_fn is None or result.grad_fn is None:
        return
    recomputed = _Recomputed(function, x, y)
    memory = memory_of(y)
    for node in nodes_between(y.grad_fn, result):
        for tensor, saved in kept_by(node):
            if memory_of(tensor) == memory and tensor.dtype == y.dtype:
                replace(saved, recomputed.pack, recomputed.unpack)


def keep_input_as_given(linear: Any) -> None:
    """Make a linear layer keep its input, which the caller frees, instead of an FP8 copy of it. Transformer Engine then
    quantises the input once more in the backward pass; layers of other engines keep their input anyway."""
    if hasattr(linear, "save_original_input"):
        linear.save_original_input = True


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether both are all elements from one place in memory."""
    return memory_of(a) == memory_of(b) and a.storage_offset() == b.storage_offset() and a.numel() == b.numel()


class _Recomputed:
    """y = function(x), from the x that y's node keeps."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        self._function, self._node, self._offset = function, y.grad_fn, y.storage_offset()
        self._index = self._index_of(x)
        self._readers = self._waiting = 0
        self._y: Tensor | None = None

    def _index_of(self, x: Tensor) -> int:
        node: Any = self._node
        for index, tensor in enumerate(getattr(node, "saved_tensors", ())):
            if tensor is not None and _is_same(tensor, x):
                return index
        raise RuntimeError(f"{node.name()} does not keep its input, so its output cannot be recomputed from it")

    def pack(self, tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
        self._readers += 1
        self._waiting += 1
        return tensor.shape, tensor.stride(), int(tensor.storage_offset() - self._offset)

    def unpack(self, place: tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        node: Any = self._node
        if self._y is None:
            with torch.no_grad():
                self._y = self._function(node.saved_tensors[self._index])
        y, (shape, stride, offset) = self._y, place
        self._waiting -= 1
        if self._waiting == 0:
            self._y, self._waiting = None, self._readers
        return y.as_strided(shape, stride, y.storage_offset() + offset)
