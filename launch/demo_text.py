"""The text of the demo: the standard library's own Python sources, or the user's files, as JSON lines.

Everything is read and judged before anything is written.
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
"""About what the demo can learn from in a few minutes; more only makes tokenizing longer."""
MIN_BYTES = 200_000
"""A vocabulary of 4,096 needs about this much text, and held-out documents need some besides."""
MANY_FILES = 100
"""With fewer files than this, long ones become several documents, so that one large file has held-out documents too.
Otherwise a document is a whole file, so that a held-out one has no other part in the training text."""
LONGEST_DOCUMENT = 32_000
"""Characters of such a part."""

NOT_OURS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "ensurepip"}
LEFT_OUT_OF_LIBRARY = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
"""Tests, of which some are not UTF-8 on purpose, and tables of characters and of help texts, which are no code."""


class DemoError(Exception):
    """Something that the user of the demo can put right; the message says how."""


@dataclass(frozen=True)
class Text:
    """What the demo trains on."""

    origin: str
    documents: list[str]
    utf8_bytes: int


def read_text(given: str | None) -> Text:
    """The documents of a file or a folder (by default the standard library), evenly sampled down to about MAX_BYTES.

    Raises DemoError if there is no such file, no text in it, too little of it, or something that is not UTF-8 text.
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
    """Every nth file, so that what is read is not much more than MAX_BYTES."""
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
    """Whole lines up to about LONGEST_DOCUMENT characters; a longer line is cut."""
    begin = 0
    while begin < len(text):
        end = begin + LONGEST_DOCUMENT
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


def _cap(documents: list[str]) -> list[str]:
    """An even sample of the documents of about MAX_BYTES."""
    total = sum(len(document.encode()) for document in documents)
    if total <= MAX_BYTES:
        return documents
    count = max(1, len(documents) * MAX_BYTES // total)
    return [documents[i * len(documents) // count] for i in range(count)]
