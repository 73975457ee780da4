"""A module whose weights stay on disk: each part of it is read when it is called, and freed when its layer returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Streamed", "stream"]


class Streamed:
    """A model after `stream`."""

    def __init__(self, readers: dict[nn.Module, list[_Reader]]) -> None:
        """readers: of all that each outermost part holds."""
        self._readers = readers

    @contextmanager
    def held(self, part: nn.Module) -> Iterator[None]:
        """Within it, all that an outermost part holds stays in memory, for several calls."""
        for reader in self._readers[part]:
            reader.load()
            reader.is_held = True
        try:
            yield
        finally:
            for reader in self._readers[part]:
                reader.is_held = False
                reader.free()


def stream(
    model: nn.Module,
    dtype_of: Callable[[str], torch.dtype],
    read: Callable[[str], Tensor],
    parts: Iterable[nn.Module],
    device: str = "cpu",
) -> Streamed:
    """Give `model`, made on the meta device, weights that are read from disk while it computes.

    parts: submodules that are called and together hold every parameter; they may be nested. When a part is called, the
    parameters are read that it holds and no nested part does. When an outermost part returns, all that it holds is
    freed. So memory holds one outermost part at a time. Between calls a parameter is one element, expanded to the
    parameter's shape: code that asks for shape, dtype or device gets the right answer.

    dtype_of, read: of a parameter's name in the model; `read` returns memory of its own, on `device`. Hooks that must
    see the weights of a part that has returned are to be registered with prepend=True.
    """
    chosen = set(parts)
    prefixes = {f"{name}.": module for name, module in model.named_modules() if module in chosen}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if unread := [name for name in names if not name.startswith(tuple(prefixes))]:
        raise ValueError(f"no part holds {', '.join(unread[:3])}")
    if buffers := [name for name, _ in model.named_buffers()]:
        raise ValueError(f"buffers are not on disk: {', '.join(buffers[:3])}")
    _put_placeholders(model, dtype_of, device)
    readers, of_outermost = dict[str, _Reader](), dict[nn.Module, list[_Reader]]()
    for prefix, part in prefixes.items():
        nested = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        mine = part.named_parameters(prefix.removesuffix("."))
        readers[prefix] = _Reader({name: p for name, p in mine if not (nested and name.startswith(nested))}, read)
        part.register_forward_pre_hook(readers[prefix].load)
    for prefix, part in prefixes.items():
        if not any(other != prefix and prefix.startswith(other) for other in prefixes):
            inside = [reader for other, reader in readers.items() if other.startswith(prefix)]
            part.register_forward_hook(partial(_free, inside))
            of_outermost[part] = inside
    return Streamed(of_outermost)


def _put_placeholders(model: nn.Module, dtype_of: Callable[[str], torch.dtype], device: str) -> None:
    for prefix, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False)):
            empty = _placeholder(old.shape, dtype_of(f"{prefix}.{name}" if prefix else name), device)
            new = nn.Parameter(empty, requires_grad=False)
            new.__dict__.update(old.__dict__)  # marks that the training model's classes read
            module.register_parameter(name, new)


def _placeholder(shape: torch.Size, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


class _Reader:
    """Reads and frees the parameters of one part."""

    def __init__(self, parameters: dict[str, nn.Parameter], read: Callable[[str], Tensor]) -> None:
        self._parameters, self._read, self._is_read = parameters, read, False
        self.is_held = False
        """What was read is not to be freed."""

    def load(self, *_: Any) -> None:
        """A hook; what has been read stays as it is."""
        if not self._is_read:
            for name, parameter in self._parameters.items():
                parameter.data = self._read(name)
            self._is_read = True

    def free(self) -> None:
        """Forget what was read."""
        if self._is_read and not self.is_held:
            for parameter in self._parameters.values():
                parameter.data = _placeholder(parameter.shape, parameter.dtype, parameter.device)
            self._is_read = False


def _free(readers: list[_Reader], _part: nn.Module, _inputs: Any, output: Any) -> Any:
    """A hook. A part may return its weight, for its caller to use: the caller gets it, the parameter forgets it."""
    if isinstance(output, nn.Parameter):
        output = output.detach()
    for reader in readers:
        reader.free()
    return output
