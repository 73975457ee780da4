"""Work beside the current CUDA stream.

Autograd runs a backward operation on the stream of its forward operation, and orders streams wherever a gradient passes
from one to another. What it does not know is stated here: when the memory of a tensor may be used again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


class SideStream:
    """Runs a function beside what the current stream does next, until `join`."""

    def __init__(self, device: torch.device) -> None:
        self._main, self._side = torch.cuda.current_stream(device), _side_stream(device)

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor) -> Tensor:
        """function(x), on the side stream, after all that the current stream was given. `others`: tensors that it reads
        too. Only `join` may be given the result before `join` returns."""
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            output = function(x)
        # forward and backward: the allocator would give the memory to the current stream as soon as x is freed there
        for tensor in (x, *others):
            tensor.record_stream(self._side)
        return output

    def join(self, output: Tensor) -> None:
        """The current stream waits for the side stream, and may then use `output`."""
        self._main.wait_stream(self._side)
        output.record_stream(self._main)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    _expect_two_streams()
    return torch.cuda.Stream(device)


def _expect_two_streams() -> None:
    """torch (from 2.10) warns where the gradient of a weight comes from another stream than the one that adds it up,
    since one of them then waits. Here the wait is wanted: the reduction of the gradient is to start after it."""
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
