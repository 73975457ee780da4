"""Activations of CLA groups in host memory, from the end of the group's forward pass to its backward pass.

What a group's graph keeps is copied to pinned host memory on a stream beside the computation while the next group
computes, and its device memory is free once that group is done. In the backward pass a group's memory comes back while
the group after it, which is differentiated first, computes. So at most two groups are on the device for the copies'
sake. On a CPU the same code makes plain copies.

Whole memory blocks move, and tensors come back at the same place in them with the same strides: kernels get the same
operands. Blocks that something else holds are left alone (the stage's input, RoPE tables, FP8 copies of weights), and
so are small ones. With full recompute a group keeps only its input, and only that moves.

Transformer Engine's and core's offloading (get_cpu_offload_context, fine_grained_activation_offload) replace all
tensors that are saved in a context; see model/saved_tensors.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from hunyuan_pretrain.config.derived import SMALLEST_OFFLOADED_BYTES
from hunyuan_pretrain.model.saved_tensors import kept_by, nodes_between, replace


class Lanes:
    """The streams of the copies, one for each direction; on a CPU nothing has to be ordered."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams: dict[str, Any] = {}
        if device.type == "cuda":
            self._streams = {to: torch.cuda.Stream(device) for to in ("host", "device")}

    @contextmanager
    def copying(self, to: Literal["host", "device"]) -> Iterator[None]:
        """Inside, copies run beside the computation, after everything that it has been given so far."""
        if not self._streams:
            yield
            return
        self._streams[to].wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._streams[to]):
            yield

    def mark(self, to: Literal["host", "device"]) -> Any:
        """The end of the copies that this direction has been given so far."""
        return self._streams[to].record_event() if self._streams else None

    def wait(self, mark: Any) -> None:
        """The computation that follows waits for a mark; the host does not."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def host_memory(self, num_bytes: int) -> Tensor:
        """Uninitialised, pinned if there is a GPU."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=self.device.type == "cuda")


class _Block:
    """One block of memory that saved tensors of a group lie in. Freed with the last of them."""

    def __init__(self, group: _Group, memory: torch.UntypedStorage) -> None:
        self.group = group
        self.memory: torch.UntypedStorage | None = memory
        self.on_host: Tensor | None = None

    @property
    def is_held_elsewhere(self) -> bool:
        """Whether freeing it here would free nothing."""
        memory: Any = self.memory
        return torch._C._storage_Use_Count(memory._cdata) > 1

    def bytes(self) -> Tensor:
        """Its device memory as uint8."""
        assert self.memory is not None
        return torch.empty(0, dtype=torch.uint8, device=self.group.lanes.device).set_(self.memory)


class _Place(NamedTuple):
    """Where a saved tensor lies in a block."""

    block: _Block
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]


class _Group:
    """What one CLA group keeps of one micro-batch."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self._blocks: dict[int, _Block] = {}
        self._sent: Any = None
        self._returned: Any = None
        self._is_sending = False

    def keep(self, first: Any, result: Tensor, weights: set[int], smallest_bytes: int) -> None:
        """Take over what the nodes after `first` keep, except memory at the addresses of `weights`."""
        for node in nodes_between(first, result):
            for tensor, saved in kept_by(node):
                memory = tensor.untyped_storage()
                address = memory.data_ptr()
                if memory.nbytes() < smallest_bytes or address in weights or memory.device != self.lanes.device:
                    continue
                block = self._blocks.setdefault(address, _Block(self, memory))
                replace(saved, partial(_placed, block), _placed_back)

    def send(self) -> None:
        """Start to copy to the host. The device memory is still held."""
        self._is_sending = True
        with self.lanes.copying("host"):
            for block in self._blocks.values():
                if not block.is_held_elsewhere:
                    source = block.bytes()
                    block.on_host = self.lanes.host_memory(source.numel())
                    block.on_host.copy_(source, non_blocking=True)
        self._sent = self.lanes.mark("host")

    def finish_sending(self) -> None:
        """Free the device memory, for what is computed after the copies."""
        if self._is_sending:
            self.lanes.wait(self._sent)
            self._is_sending = False
            for block in self._blocks.values():
                if block.on_host is not None:
                    block.memory = None

    def bring_back(self) -> None:
        """Start to copy back to the device what is no longer there."""
        blocks, self._blocks = self._blocks, {}  # each block is now freed with the last tensor in it
        self._is_sending = False
        away = [block for block in blocks.values() if block.memory is None]
        for block in away:  # allocated for the computation, which frees it: not inside the other stream
            assert block.on_host is not None
            block.memory = torch.empty(
                block.on_host.numel(), dtype=torch.uint8, device=self.lanes.device
            ).untyped_storage()
        if away:
            with self.lanes.copying("device"):
                for block in away:
                    assert block.on_host is not None
                    block.bytes().copy_(block.on_host, non_blocking=True)
            self._returned = self.lanes.mark("device")
        for block in blocks.values():
            block.on_host = None

    def wait(self) -> None:
        """The computation that follows finds everything on the device."""
        if self._blocks:
            self.bring_back()
        self.lanes.wait(self._returned)
        self._returned = None


def _placed(block: _Block, tensor: Tensor) -> _Place:
    return _Place(block, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())


def _placed_back(place: _Place) -> Tensor:
    block = place.block
    block.group.wait()
    assert block.memory is not None
    empty = torch.empty(0, dtype=place.dtype, device=block.group.lanes.device)
    return empty.set_(block.memory, place.offset, place.shape, place.strides)


class Offload:
    """Offloading in one model chunk: of its first `num_groups` CLA groups."""

    def __init__(self, num_groups: int, smallest_bytes: int = SMALLEST_OFFLOADED_BYTES) -> None:
        self.num_groups, self.smallest_bytes = num_groups, smallest_bytes
        self._lanes: Lanes | None = None
        self._sending: _Group | None = None

    def after_group(
        self, number: int, first: Any, hidden_TD: Tensor, layers: Sequence[torch.nn.Module], before: _Group | None
    ) -> _Group | None:
        """Call after every CLA group, number 0 first, with the node that made the group's input, the group's output and
        layers, and what the call for the previous group returned."""
        if self.num_groups == 0 or first is None or hidden_TD.grad_fn is None:
            return None
        if self._lanes is None:
            self._lanes = Lanes(hidden_TD.device)
        if self._sending is not None:
            self._sending.finish_sending()
            self._sending = None
        group = None
        if number < self.num_groups:
            group = self._sending = _Group(self._lanes)
            weights = {
                weight.untyped_storage().data_ptr()
                for layer in layers
                for weight in layer.parameters()
                if not is_float8tensor(weight)
            }
            group.keep(first, hidden_TD, weights, self.smallest_bytes)
            group.send()
        coming = [one for one in (group, before) if one is not None]
        if coming:
            # called when the backward pass is about to enter this group
            hidden_TD.register_hook(partial(_bring_back, coming))
        return group


def _bring_back(groups: list[_Group], gradient: Tensor) -> None:
    for group in groups:
        group.bring_back()
