"""Checks that a file of a data folder is as written, by its size and its SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hunyuan_pretrain.data.errors import DataFormatError

_BLOCK_BYTES = 8 << 20


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_digest(path: Path, expected: str | None) -> None:
    """Raise DataFormatError unless the file can be read and its SHA-256 is `expected`."""
    for _ in check_digest_in_steps(path, expected):
        pass


def check_digest_in_steps(path: Path, expected: str | None) -> Iterator[int]:
    """As `check_digest`, but yields the number of bytes read after each block."""
    if not path.is_file():
        raise DataFormatError(f"{path}: missing; write the folder again")
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                yield len(block)
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read ({error.strerror})") from None
    found = digest.hexdigest()
    if found != expected:
        raise DataFormatError(
            f"{path}: SHA-256 {found[:12]}..., the manifest says {str(expected)[:12]}...; the file changed after "
            "it was written"
        )


def check_size(path: Path, expected: int, described_by: str) -> None:
    """Raise DataFormatError unless a file exists and has `expected` bytes."""
    if not path.is_file():
        raise DataFormatError(f"{path}: missing; write the folder again")
    size = path.stat().st_size
    if size != expected:
        state = "cut short" if size < expected else "too long"
        raise DataFormatError(
            f"{path}: {state}, {size:,} bytes where {expected:,} are expected for {described_by}; write it again"
        )
