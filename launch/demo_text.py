"""The text of the demo: the Python sources of the standard library, or the user's files, as JSON lines.

Everything is read and checked before anything is written.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXTENSIONS = (".txt", ".md", ".rst", ".py")
MAX_BYTES = 12_000_000
"""About as much as the demo can train on in a few minutes; more text only makes tokenizing slower."""
MIN_BYTES = 200_000
"""A vocabulary of 4,096 ids needs about this much text, including some for held-out documents."""
MANY_FILES = 100
"""With fewer files than this, long files are split into several documents, so that even one large file yields held-out
documents. Otherwise each file is one document, so that no part of a held-out file is trained on."""
LONGEST_DOCUMENT = 32_000
"""Maximum number of characters of each part of a split file."""

NOT_OURS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "ensurepip"}
LEFT_OUT_OF_LIBRARY = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
"""Tests, some of which are deliberately not UTF-8, and tables of characters and help texts, which are not code."""


class DemoError(Exception):
    """Something that the user can fix; the message says how."""


@dataclass(frozen=True)
class Text:
    """What the demo trains on."""

    origin: str
    documents: list[str]
    utf8_bytes: int


def read_text(given: str | None) -> Text:
    """The documents of a file or folder (default: the standard library), evenly sampled down to about MAX_BYTES.

    Raises DemoError if the path does not exist, a file is not UTF-8 text, or there is no text or too little.
    """
    root = Path(given) if given else Path(sysconfig.get_paths()["stdlib"])
    files = [root] if root.is_file() else sorted(_text_files(root, is_library=given is None)) if root.is_dir() else None
    if files is None:
        raise DemoError(f"{root}: no such file or folder")
    if not files:
        raise DemoError(f"{root}: no file in it ends in {' '.join(EXTENSIONS)}")
    texts = [_read(path) for path in _sample(files)]
    documents = [
        document
        for text in texts
        for document in (_split(text) if len(files) < MANY_FILES else [text])
        if document.strip()
    ]
    documents = _cap(documents)
    size = sum(len(document.encode()) for document in documents)
    if size < MIN_BYTES:
        raise DemoError(f"{root}: {size:,} bytes of text; the demo needs at least {MIN_BYTES:,}")
    return Text(str(root), documents, size)


def write_text(text: Text, path: Path) -> None:
    """Write the documents as JSON lines with the field `text`."""
    path.write_text(
        "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in text.documents),
        encoding="utf-8",
    )


def _text_files(root: Path, is_library: bool) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        skipped = {name for name in folders if name.startswith((".", "config-"))} | NOT_OURS
        folders[:] = [
            name for name in folders if name not in (skipped | LEFT_OUT_OF_LIBRARY if is_library else skipped)
        ]
        yield from (Path(parent) / name for name in names if name.endswith(".py" if is_library else EXTENSIONS))


def _sample(files: list[Path]) -> list[Path]:
    """Every nth file, so that at most a few times MAX_BYTES are read."""
    total = sum(path.stat().st_size for path in files)
    return files[:: max(1, total // (2 * MAX_BYTES))]


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DemoError(f"{path}: {error.strerror}") from None
    if b"\x00" in content:
        raise DemoError(f"{path}: a binary file; the demo trains on UTF-8 text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DemoError(
            f"{path}: not UTF-8 text (byte 0x{content[error.start]:02x} at position {error.start})"
        ) from None


def _split(text: str) -> Iterator[str]:
    """Split a text at line ends into parts of at most LONGEST_DOCUMENT characters; a longer line is cut."""
    begin = 0
    while begin < len(text):
        end = begin + LONGEST_DOCUMENT
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


def _cap(documents: list[str]) -> list[str]:
    """An evenly spaced sample of the documents, about MAX_BYTES in total."""
    total = sum(len(document.encode()) for document in documents)
    if total <= MAX_BYTES:
        return documents
    count = max(1, len(documents) * MAX_BYTES // total)
    return [documents[i * len(documents) // count] for i in range(count)]
