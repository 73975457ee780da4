"""Why a checkpoint cannot be used. Only one that is not as written is damaged, and may be replaced by an older one: an
error of the operating system says nothing about a file's content. Imports no torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hunyuan_pretrain.checkpoint import CheckpointError

NOT_NOW = "cannot be read now"
"""In the message of every UnreadableError."""
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors that say that a file is not there: damage."""


class UnreadableError(CheckpointError):
    """The operating system refused to read a file that is there, which says nothing about its content."""

    is_whole = True
    """All ranks are told these words, not only the system's reason (parallel.agreement.reason_of)."""


class NewerFormatError(CheckpointError):
    """A checkpoint of a newer version of this program."""


class Fault(NamedTuple):
    """Why a checkpoint cannot be used."""

    state: str
    """damaged, unreadable (it may be whole), or newer (of a newer version of this program)."""
    text: str

    def __str__(self) -> str:
        return self.text


def damage_to(name: str) -> str:
    """The message for a file that is not as written."""
    return f"{name} is missing or damaged: its size or sha256 is not the one in complete.json"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """For a file of a checkpoint. Raises CheckpointError if it is missing, UnreadableError for any other error of the
    operating system."""
    try:
        yield
    except MISSING:
        raise CheckpointError(damage_to(path.name)) from None
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """The error for a file or folder that cannot be read."""
    code = errno.errorcode.get(error.errno or 0, "no errno")
    return UnreadableError(f"{path.name} {NOT_NOW}: {error.strerror or error} ({code})")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Descriptor of a file of a checkpoint, for reading. Raises as `reading` does, also within the block."""
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def may_be_good(folder: Path, fault: Fault) -> CheckpointError:
    """The error for a checkpoint that cannot be used, though it may not be damaged."""
    hint = "no older one is used in its place"
    if fault.state == "unreadable":
        hint += "; make it readable and run the same command again, or move it away to go on without it"
    error = UnreadableError if fault.state == "unreadable" else NewerFormatError
    return error(f"{folder}: {fault}; {hint}")
