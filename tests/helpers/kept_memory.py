"""The memory that a forward pass leaves behind for its backward pass, measured on a CPU.

Every block of memory that an operation returns is noted by a weak reference; what is still alive after the forward pass
is kept. Copies that offloading makes count as host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hunyuan_pretrain.model.offload import Lanes


class KeptMemory(TorchDispatchMode):
    """Watches while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[int, tuple[StorageWeakRef, int, tuple[int, ...]]] = {}
        self._on_host: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                memory = leaf.untyped_storage()
                if memory._cdata not in old:
                    self._blocks[memory._cdata] = StorageWeakRef(memory), memory.nbytes(), tuple(leaf.shape)
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch, and tell host memory from the rest."""
        make = Lanes.host_memory

        def host_memory(lanes: Lanes, num_bytes: int) -> torch.Tensor:
            found = make(lanes, num_bytes)
            self._on_host.add(found.untyped_storage()._cdata)
            return found

        with patch.object(Lanes, "host_memory", host_memory), self:
            yield

    def blocks(self, on_host: bool = False) -> list[tuple[int, tuple[int, ...]]]:
        """(bytes, shape of the first tensor in it) of every block that is alive."""
        return [
            (size, shape)
            for address, (reference, size, shape) in self._blocks.items()
            if not reference.expired() and (address in self._on_host) == on_host
        ]

    def bytes(self, on_host: bool = False) -> int:
        """Their sum."""
        return sum(size for size, _ in self.blocks(on_host))
