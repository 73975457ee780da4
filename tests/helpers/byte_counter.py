"""Counts the operations of a forward and a backward pass, and the bytes that they read and write.

How bytes are counted:
- an operation of torch reads each element of its inputs once and writes each element of its outputs once. Views cost
  nothing, nor do collectives. Operations that pick rows (gather, index_select, embedding) read only the rows they
  pick. Sorts and scans count one pass, so they are underestimated;
- a launch of a Triton kernel reads or writes each element of the tensors handed to it once, as the kernels' docstrings
  promise; nothing is computed on meta tensors. Memory that a kernel needs besides them is allocated by torch, and is
  among these tensors;
- products of linear layers, attention and the output layer are counted apart, because they are limited by arithmetic.
  In the router and the norms products are too thin for that: they count. In cross-entropy what a product writes counts,
  and so does a sum that it adds to.

A backward operation belongs to the part whose forward pass made its autograd node: nodes are numbered in order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LINEAR = {"qkv", "attention", "projection", "experts"}
"""Parts whose products are counted apart."""
SUMS = "gradient sums"
"""Autograd's own."""


MATMULS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv"}
FREE = {"_unsafe_view", "_local_scalar_dense", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
FREE |= {"lift_fresh", "is_same_size", "_assert_async"}
PICKS = {"index_select", "gather", "embedding", "index"}
OVERWRITES = {"copy_", "fill_", "zero_", "normal_"}
PUTS = {"index_put_", "_index_put_impl_", "scatter_", "scatter_add_", "index_add_"}


@dataclass
class Count:
    """Of one part and direction."""

    operations: int = 0
    bytes: int = 0
    product_bytes: int = 0


def size(tensor: Tensor) -> int:
    """Bytes of the tensor's distinct elements: those along a stride of 0 are one."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride or length == 0 else 1
    return elements * tensor.element_size()


@cache
def _schema(func: Any) -> tuple[str, bool, list[tuple[str, bool, bool]]]:
    """(name, whether it returns a view, [(argument, is written, is an out argument)])."""
    schema = func._schema
    is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns)
    arguments = [(x.name, x.alias_info is not None and x.alias_info.is_write, x.kwarg_only) for x in schema.arguments]
    return schema.name.removeprefix("aten::"), is_view, arguments


def moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[int, int]:
    """(bytes read, bytes written) by one operation."""
    name, is_view, arguments = _schema(func)
    if is_view or name in FREE or func.namespace == "c10d":
        return 0, 0
    given = dict(zip((argument[0] for argument in arguments), args, strict=False)) | kwargs
    read = written = 0
    inputs: dict[int, Tensor] = {}
    outputs = {id(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
    for argument, is_written, is_out in arguments:
        for leaf in tree_leaves(given.get(argument)):
            if not isinstance(leaf, Tensor):
                continue
            if is_written:
                outputs[id(leaf)] = leaf
            if not (is_written and (is_out or name in OVERWRITES)):
                inputs[id(leaf)] = leaf
    if name in PICKS:
        picked = sum(map(size, outputs.values()))
        return picked + sum(size(x) for x in list(inputs.values())[1:]), picked
    if name in PUTS:
        others = [x for key, x in inputs.items() if key not in outputs]
        number = max((x.numel() for x in others), default=0)
        put = number * next(iter(outputs.values())).element_size()
        adds = "add" in name or bool(given.get("accumulate"))
        return sum(map(size, others)) + (put if adds else 0), put
    for tensor in inputs.values():
        read += size(tensor)
    for tensor in outputs.values():
        written += size(tensor)
    return read, written


@dataclass
class StepBytes(TorchDispatchMode):
    """Counts while it is entered. `part` names what runs inside."""

    counts: dict[tuple[str, str], Count] = field(default_factory=lambda: defaultdict(Count))

    def __post_init__(self) -> None:
        super().__init__()
        self._parts = ["rest"]
        self._spans: list[tuple[int, int, str]] = []
        self._is_launching = False
        self._direction = "forward"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Forward operations in this context, and their backward ones, belong to `name`."""
        first = torch.autograd._get_sequence_nr()
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.pop()
            # inner parts are noted first, and found first
            self._spans.append((first, torch.autograd._get_sequence_nr(), name))

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted as `name`."""

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return counted

    def watch(self, output: Tensor) -> None:
        """Note which node of output's graph runs in the backward pass. What runs between nodes is autograd's own: sums,
        where a tensor was used twice."""
        seen, waiting = set(), [output.grad_fn]
        while waiting:
            node: Any = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            node.register_prehook(partial(self._enter, node._sequence_nr()))
            node.register_hook(self._leave)
        self._direction = "backward"

    def _enter(self, number: int, *gradients: Any) -> None:
        part = next((name for first, end, name in self._spans if first <= number < end), "rest")
        self._parts.append(part)

    def _leave(self, *gradients: Any) -> None:
        self._parts.pop()

    def _place(self) -> tuple[str, str]:
        if len(self._parts) == 1 and self._direction == "backward":
            return SUMS, "backward"
        return self._parts[-1], self._direction

    def add(self, read: int, written: int, is_product: bool = False, summand: int = 0) -> None:
        """One operation; `summand`: what a product adds to, in bytes."""
        part, direction = self._place()
        count = self.counts[part, direction]
        count.operations += 1
        if is_product and part == "cross-entropy":
            count.bytes += summand + written
            count.product_bytes += read - summand
        elif is_product and part in LINEAR:
            count.product_bytes += read + written
        else:
            count.bytes += read + written

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_launching:
            read, written = moved_bytes(func, args, kwargs or {}, result)
            if read or written:
                name = _schema(func)[0]
                is_product = name in MATMULS or name.startswith("_scaled_dot_product")
                self.add(read, written, is_product, size(args[0]) if name.startswith(("addmm", "baddbmm")) else 0)
        return result

    @contextmanager
    def launches(self) -> Iterator[None]:
        """Count launches of Triton kernels. On meta tensors nothing is launched."""
        from triton.runtime.jit import KernelInterface

        counter = self

        def getitem(kernel: Any, grid: Any) -> Callable[..., Any]:
            def launch(*args: Any, **kwargs: Any) -> Any:
                tensors = {id(x): x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
                counter.add(sum(map(size, tensors.values())), 0)
                if any(x.device.type == "meta" for x in tensors.values()):
                    return None
                counter._is_launching = True
                try:
                    return kernel.run(*args, grid=grid, warmup=False, **kwargs)
                finally:
                    counter._is_launching = False

            return launch

        with patch.object(KernelInterface, "__getitem__", getitem):
            yield
