"""A stand-in for torch.cuda.CUDAGraph on the CPU: records the operators of a function, then runs exactly these again on
the same memory.

As under a CUDA graph, no Python runs in a replay. Whatever the function took from Python at capture (a number, a list,
a choice) stays as it was; only what is in memory may change. Results land where they were at capture. Reading a value
on the host is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hunyuan_pretrain.runtime.handover import recording
from tests.helpers.host_waits import LOOKS, METHODS

UNWRITTEN = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided")


class HostReadError(RuntimeError):
    """The host read a value during a capture."""


class Recording(TorchDispatchMode):
    """Use as a context for the capture, then call `replay`. What is recorded is also executed."""

    def __init__(self) -> None:
        super().__init__()
        self._methods = _RefuseReads()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[tuple[int, Tensor]]]] = []

    def __enter__(self) -> Recording:
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name.removeprefix("aten::") in LOOKS:
            raise HostReadError(name)
        with torch._C.DisableTorchFunction():  # operators of tests that are written in Python may read values
            result = func(*args, **kwargs)
        if name in UNWRITTEN:
            self._keep_alive(result)
            return result
        inputs = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        outputs = [
            (number, leaf.detach())
            for number, leaf in enumerate(tree_leaves(result))
            if isinstance(leaf, Tensor) and _memory(leaf) not in inputs
        ]
        if outputs or func._schema.is_mutable or name.startswith("c10d::"):
            args, kwargs = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))
            self._calls.append((func, args, kwargs, outputs))
        else:
            self._keep_alive(result)  # a view
        return result

    def _keep_alive(self, result: Any) -> None:
        self._calls.append((None, (result,), {}, []))

    def replay(self) -> None:
        """Run the recorded operators again."""
        with torch.no_grad():
            for func, args, kwargs, outputs in self._calls:
                if func is None:
                    continue
                results = tree_leaves(func(*args, **kwargs))
                for number, output in outputs:
                    output.copy_(results[number])

    def __len__(self) -> int:
        return sum(func is not None for func, *_ in self._calls)


class StandIn:
    """train.recorded_step.Graph on the CPU. Recording computes already, so the replay that follows it does nothing."""

    def __init__(self) -> None:
        self.recording, self.num_replays = Recording(), 0

    def record(self, work: Callable[[], Any]) -> Any:
        with self.recording:
            return work()

    def replay(self) -> None:
        if self.num_replays:
            self.recording.replay()
        self.num_replays += 1


class Rerun:
    """The same, for stand-ins of kernels that read values: a replay calls the work again, and Python decides as it
    does while work is recorded."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, work: Callable[[], Any]) -> Any:
        self.work, self.results = work, work()
        return self.results

    def replay(self) -> None:
        if self.num_replays:
            with recording():
                for result, new in zip(tree_leaves(self.results), tree_leaves(self.work()), strict=True):
                    result.copy_(new)
        self.num_replays += 1


class _RefuseReads(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            raise HostReadError(func.__name__)
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
