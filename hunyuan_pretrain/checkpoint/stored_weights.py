"""The weights of a training checkpoint, read parameter by parameter in one process, whatever layout wrote them.

`stored` says how a checkpoint lies on disk. A file is read only where a wanted part lies, so memory holds one
parameter, or one expert of it. Of the optimizer's state at most the moving average of the weights is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.folders import MARKER, verify_files
from hunyuan_pretrain.checkpoint.parallel_read import Region, read_tensors
from hunyuan_pretrain.checkpoint.stored import INDEX, Index, read_index
from hunyuan_pretrain.checkpoint.tensor_files import TensorSpec
from hunyuan_pretrain.checkpoint.workers import Say, default_processes, run_over

__all__ = [
    "EMA",
    "OnDisk",
    "StoredWeights",
    "WhichWeights",
    "has_average",
    "rows_of",
    "shape_of",
    "state_prefix",
    "verified_weights",
]

OTHER_STATE = ("optimizer.", "fp8.")
"""Prefixes of tensors of a checkpoint that are not weights."""


EMA = "ema"
"""Key of the moving average of a weight, fp32, in an optimizer's state and in `state_prefix`."""

WhichWeights = Literal["trained", "ema"]
"""Of a checkpoint: the weights that training computes with, or their moving average (optimizer.ema_decay), where frozen
weights are themselves."""


class StoredWeights(Mapping[str, Tensor]):
    """Whole parameters by name, each read from disk when it is asked for. Can be pickled, for other processes."""

    def __init__(self, folder: Path, file_bytes: Mapping[str, int], which: WhichWeights = "trained") -> None:
        """Reads the index only. file_bytes: sizes of the checkpoint's files. Raises CheckpointError, also if there is
        no average where it is wanted."""
        self.folder = folder
        try:
            index = read_index((folder / INDEX).read_bytes(), file_bytes)
        except OSError as error:
            raise CheckpointError(f"{folder / INDEX}: cannot be read: {error.strerror}") from None
        except CheckpointError as error:
            raise type(error)(f"{folder}: {error}") from None
        tensors = {name: tensor for name, tensor in index.tensors.items() if not name.startswith(OTHER_STATE)}
        if which == "ema":
            if not has_average(index):
                raise CheckpointError(
                    f"{folder}: it has no moving average of the weights: optimizer.ema_decay was null when it was "
                    "saved; use --weights trained"
                )
            start = state_prefix(EMA)
            tensors |= {name.removeprefix(start): x for name, x in index.tensors.items() if name.startswith(start)}
        self._index = Index(tensors, {})

    def __getitem__(self, name: str) -> Tensor:
        """Raises KeyError, CheckpointError if a file is damaged."""
        return self.rows(name, 0, self.spec(name).shape[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.tensors)

    def __len__(self) -> int:
        return len(self._index.tensors)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape, without reading. Raises KeyError."""
        stored = self._index.tensors[name]
        return TensorSpec(getattr(torch, stored.dtype), stored.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a parameter's first dimension, read alone. Raises as `__getitem__`."""
        dtype, shape = self.spec(name)
        target = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        region = Region(name, target, shape, (start, *(0 for _ in shape[1:])))
        try:
            read_tensors(self.folder, self._index, [region])
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error}") from None
        return target

    def files(self) -> list[str]:
        """The names of the files that hold weights."""
        return sorted({chunk.section.file for tensor in self._index.tensors.values() for chunk in tensor.chunks})


def state_prefix(kind: str) -> str:
    """What a checkpoint puts before a parameter's name for a tensor of its optimizer's state."""
    return f"optimizer.{kind}."


def has_average(index: Index) -> bool:
    """Whether a checkpoint holds the moving average of its trained weights."""
    return any(name.startswith(state_prefix(EMA)) for name in index.tensors)


def verified_weights(
    folder: Path,
    marker: Mapping[str, Any],
    processes: int | None = None,
    say: Say | None = None,
    which: WhichWeights = "trained",
) -> tuple[StoredWeights, int]:
    """The weights of a checkpoint whose files are as written, and the number of processes that verified them: by
    default as many as are worth it and fit into memory, also for a conversion of the weights.

    The digest of a file covers all of it, so the optimizer's state in it is read too, and not kept. Raises
    CheckpointError.
    """
    _verify(folder, marker, INDEX)
    weights = StoredWeights(folder, {name: file["bytes"] for name, file in marker["files"].items()}, which)
    specs = [weights.spec(name) for name in weights]
    largest = max(spec.nbytes // (spec.shape[0] if len(spec.shape) == 3 else 1) for spec in specs)
    processes = processes or default_processes(sum(spec.nbytes for spec in specs), largest)
    files = [(name, marker["files"][name]["bytes"] if name in marker["files"] else 0) for name in weights.files()]
    run_over(processes, "verifying the checkpoint", partial(_verify, folder, marker), files, say)
    return weights, processes


def _verify(folder: Path, marker: Mapping[str, Any], name: str) -> None:
    if name not in marker["files"]:
        raise CheckpointError(f"{folder}: {MARKER} does not list {name}")
    try:
        verify_files(folder, marker, [name])
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


@runtime_checkable
class OnDisk(Protocol):
    """What a mapping of parameters offers if it reads them from disk: StoredWeights, and whatever joins other files."""

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape, without reading."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of the first dimension, read alone."""


def rows_of(weights: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Rows start to stop of a parameter; read alone if it comes from disk."""
    return weights.rows(name, start, stop) if isinstance(weights, OnDisk) else weights[name][start:stop]


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a parameter, which is not read if it comes from disk."""
    return weights.spec(name).shape if isinstance(weights, OnDisk) else tuple(weights[name].shape)
