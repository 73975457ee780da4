"""What an autograd graph keeps for the backward pass, tensor by tensor, and how one of these tensors is replaced.

torch's `saved_tensors_hooks` context replaces everything that is saved inside it, weights included: a linear layer
would then get a copy of its weight in the backward pass, without core's `main_grad` and without its mark that a
gradient is already there. So this module walks the finished graph instead, and registers hooks on single saved tensors.
Only nodes of Python functions are seen; all large tensors of a layer are saved by such nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_is_looking = False


def nodes_between(first: Any, result: Tensor) -> Iterator[Any]:
    """The nodes of `result`'s graph that were made after node `first`."""
    start, seen, waiting = first._sequence_nr(), set(), [result.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen or node._sequence_nr() <= start:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        yield node


def kept_by(node: Any) -> Iterator[tuple[Tensor, Any]]:
    """(tensor, its torch SavedTensor) of everything that a node keeps and that has not been replaced.

    Tensors that are made of several, such as Transformer Engine's quantised weights, are left out: they have no memory
    of their own. Of a quantised input its linear layer keeps the parts.
    """
    global _is_looking
    if not hasattr(node, "_raw_saved_tensors"):
        return
    _is_looking = True
    try:
        tensors: tuple[Tensor | None, ...] = node.saved_tensors
    finally:
        _is_looking = False
    for tensor, saved in zip(tensors, node._raw_saved_tensors, strict=True):
        if tensor is not None and type(tensor) in (Tensor, torch.nn.Parameter) and tensor.numel():
            yield tensor, saved


def memory_of(tensor: Tensor) -> int:
    """Identifies the memory that a tensor lies in, by more than its address: meta tensors have none."""
    return tensor.untyped_storage()._cdata


def replace(saved: Any, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
    """Keep pack(tensor) instead of a saved tensor; the backward pass gets unpack of it."""

    def unpacked(kept: Any) -> Tensor:
        return torch.empty(0) if _is_looking else unpack(kept)

    saved.register_hooks(pack, unpacked)
