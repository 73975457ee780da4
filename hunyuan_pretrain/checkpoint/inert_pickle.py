"""Reads pickles without importing or calling anything that they name.

megatron's checkpoint format keeps its index, its small objects and the description of each tensor as pickles. A pickle
may name any function, and Python's own reader imports and calls it. Here each name has to be on a list; a listed one
still stands only for a record of what the pickle gives it, so that nothing of a library runs or changes either.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from typing import Any, ClassVar, NoReturn

from hunyuan_pretrain.checkpoint import CheckpointError

UNSAFE = "which no checkpoint needs; nothing of it has run"
"""In the message of every refusal. Errors travel between ranks as text, and this one is not damage."""


class UnsafePickleError(CheckpointError):
    """A pickle names something that is not on its list."""


class Inert:
    """Stands for an object of the class, or for a result of the function, that a pickle names. The pickle's names
    themselves are subclasses."""

    path: ClassVar[str] = ""
    """The name in the pickle, such as "torch.Size"."""
    values: tuple[Any, ...]
    """Arguments."""
    state: Any
    """What pickle would restore as the object's state; None if there is none."""

    def __new__(cls, *values: Any) -> Inert:
        self = super().__new__(cls)
        self.values, self.state = values, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """A field of an object that was stored as a mapping. Raises ValueError if it has none of that name."""
        if not isinstance(self.state, dict) or name not in self.state:
            raise ValueError(f"{self.path} without {name}")
        return self.state[name]


class Outside(tuple[Any, ...]):
    """What a pickle says about data that lies beside it: torch's description of a storage."""


class _Reader(pickle.Unpickler):
    def __init__(self, content: bytes, allowed: Collection[str]) -> None:
        super().__init__(io.BytesIO(content))
        self.allowed = allowed
        self.names: dict[str, type[Inert]] = {}  # new ones for each pickle, which can set attributes of classes

    def find_class(self, module: str, name: str) -> type[Inert]:
        path = f"{module}.{name}"
        if path not in self.allowed:
            raise UnsafePickleError(f"it names {path}, {UNSAFE}")
        if path not in self.names:
            self.names[path] = type("Inert", (Inert,), {"path": path})
        return self.names[path]

    def persistent_load(self, pid: Any) -> Outside:
        return Outside(pid)


def read_pickle(content: bytes, what: str, allowed: Collection[str]) -> Any:
    """The content of a pickle: plain values, and an `Inert` for each name in `allowed`, such as "torch.Size".

    `what` begins the message of an error. Raises UnsafePickleError naming the first name that is not in `allowed`, and
    CheckpointError if the content is not a pickle.
    """
    try:
        return _Reader(content, allowed).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{what}: refused: {error}") from None
    except Exception as error:  # whatever broken pickles raise: there is no list of it
        refuse(what, f"not a pickle of a checkpoint ({type(error).__name__})")


def refuse(what: str, why: str) -> NoReturn:
    """Raise CheckpointError."""
    raise CheckpointError(f"{what}: {why}") from None


def name_of(value: Any) -> str:
    """The name for which `value` stands, as an object or by itself; "" if it is something else."""
    if isinstance(value, Inert):
        return value.path
    return value.path if isinstance(value, type) and issubclass(value, Inert) else ""
