"""Counts, on the CPU, what would make the host wait for a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

LOOKS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "bincount",
    "masked_select",
    "_unique2",
    "unique_dim",
    "equal",
    "histc",
)
METHODS = ("tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
ADDS = ("index_add_", "index_add", "scatter_add_", "scatter_add", "index_select_backward", "embedding_dense_backward")


class Operations(TorchDispatchMode):
    """Counts what would make the host wait for a GPU (operators that read values, tensors made on a device from numbers
    of the host), and operators that add into rows."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: Counter[str] = Counter()
        self.adds: Counter[str] = Counter()
        self._methods = _Methods(self.looks)

    def __enter__(self) -> Operations:
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        of_unknown_size = name == "repeat_interleave" and not kwargs.get("output_size")
        if name in LOOKS or of_unknown_size or (name.startswith("index") and self._has_mask(args)):
            self.looks[name] += 1
        if name in ADDS or (name in ("index_put_", "_index_put_impl_") and len(args) > 3 and args[3]):
            self.adds[name] += 1
        return func(*args, **kwargs)

    @staticmethod
    def _has_mask(args: tuple[Any, ...]) -> bool:
        indices = [index for arg in args if isinstance(arg, (list, tuple)) for index in arg]
        return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)


class _Methods(TorchFunctionMode):
    def __init__(self, looks: Counter[str]) -> None:
        super().__init__()
        self.looks = looks

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in METHODS or (name in ("tensor", "as_tensor") and kwargs.get("device") is not None):
            self.looks[name] += 1
        return func(*args, **kwargs)
