"""Folders that a command writes whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.hf_export import CANNOT_WRITE
from hunyuan_pretrain.data.folders import flush_to_disk

__all__ = ["new_folder", "refuse_existing"]


def refuse_existing(output: Path, *sources: Path) -> None:
    """Raise CheckpointError if `output` is there and not an empty folder, or lies in one of the folders that are
    read."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty folder; remove it or choose another name")
    for source in sources:
        if source.resolve() in (output.resolve(), *output.resolve().parents):
            raise CheckpointError(f"{output}: lies in {source}, which is only read; choose another place")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A new sibling of `output`, which takes that name when the block ends and is removed if it raises. Raises
    CheckpointError if the disk is full or not writable."""
    folder = output.parent / f".{output.name}.unfinished-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        yield folder
        for path in sorted(folder.rglob("*")):
            flush_to_disk(path)
        folder.rename(output)  # over an empty folder too
        flush_to_disk(output.parent)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise CheckpointError(f"{output}: cannot be written: {error}; nothing was left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
