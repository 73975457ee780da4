"""Reading a corpus: files and folders of text and JSON lines, plain or compressed, as a stream of documents."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from hunyuan_pretrain.data.errors import DataFormatError

DEFAULT_EXTENSIONS = (".txt", ".md", ".py", ".jsonl")
_COMPRESSED = (".gz", ".zst")
_BLOCK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus and the number of the input, as the user gave it, that it belongs to."""

    path: Path
    input_number: int

    @property
    def is_json_lines(self) -> bool:
        """One document a line, instead of one in the whole file."""
        return _extension(self.path) == ".jsonl"


@dataclass(frozen=True)
class Chunk:
    """Bytes of one file: all of a text file, or some whole lines of JSON lines."""

    file: CorpusFile
    content: bytes
    first_line: int
    """Line of the file, from 1, that the content starts with."""
    bytes_on_disk: int
    """Part of the file's size on disk that was read for it, for progress."""


@dataclass(frozen=True)
class Document:
    """One text of the corpus."""

    text: str
    utf8_bytes: int
    record: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """All fields of its JSON line, the text too; empty for a text file."""


@dataclass(frozen=True)
class Reject:
    """Something that is not a document: where, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def find_files(inputs: Sequence[str | Path], extensions: Sequence[str] = DEFAULT_EXTENSIONS) -> list[CorpusFile]:
    """The files of all inputs in a fixed order. A folder stands for the files in it, at any depth and sorted by path, that end in one of
    `extensions`, compressed (.gz, .zst) or not; a file that is named itself is read whatever its extension.

    Raises DataFormatError for an input that does not exist or is given twice, and for a folder without such a file.
    """
    files: list[CorpusFile] = []
    seen: dict[Path, Path] = {}
    for number, given in enumerate(inputs):
        path = Path(given)
        if path.is_dir():
            found = [file for file in _walk(path) if _extension(file) in extensions]
            if not found:
                raise DataFormatError(
                    f"{path}: no file ends in {' '.join(extensions)} (or these with .gz or .zst); choose with --extension"
                )
        elif path.is_file():
            if _extension(path) == ".json":
                raise DataFormatError(f"{path}: a .json file is not read; write one JSON object a line, in a file named .jsonl")
            found = [path]
        else:
            raise DataFormatError(f"{path}: no such file or folder")
        for file in found:
            resolved = file.resolve()
            if resolved in seen:
                raise DataFormatError(f"{file}: given twice (also as {seen[resolved]}); its documents would count double")
            seen[resolved] = file
            files.append(CorpusFile(file, number))
    return files


def read_chunks(files: Iterable[CorpusFile]) -> Iterator[Chunk]:
    """The content of the files in order. Of JSON lines, about a megabyte is in memory at a time; a text file is read whole.

    Raises DataFormatError if a compressed file is damaged.
    """
    for file in files:
        with _open(file.path) as blocks:
            if file.is_json_lines:
                yield from _chunks_of_lines(file, blocks)
            else:
                content = b"".join(block for block, _ in blocks)
                yield Chunk(file, content.removeprefix(_BYTE_ORDER_MARK), 1, file.path.stat().st_size)


def documents_of(chunk: Chunk, text_field: str) -> Iterator[Document | Reject]:
    """The documents of a chunk; what is not one comes as a Reject in its place. Blank lines are passed over."""
    path = str(chunk.file.path)
    if not chunk.file.is_json_lines:
        nul = chunk.content.find(b"\x00")
        if nul >= 0:
            yield Reject(path, f"a binary file (NUL at byte {nul}); only UTF-8 text is read")
        else:
            yield _decoded(path, chunk.content)
        return
    for number, line in enumerate(chunk.content.split(b"\n"), start=chunk.first_line):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        decoded = _decoded(where, line)
        yield decoded if isinstance(decoded, Reject) else _from_json(where, decoded.text, text_field)


def read_documents(files: Iterable[CorpusFile], text_field: str, max_rejects: int = 0) -> Iterator[Document]:
    """All documents of the files. Raises DataFormatError at the first reject beyond `max_rejects`."""
    rejects: list[Reject] = []
    for chunk in read_chunks(files):
        for document in documents_of(chunk, text_field):
            if isinstance(document, Document):
                yield document
            else:
                rejects.append(document)
                check_rejects(rejects, max_rejects)


def check_rejects(rejects: Sequence[Reject], max_rejects: int) -> None:
    """Raise DataFormatError if there are more rejects than allowed, naming the first one too many."""
    if len(rejects) > max_rejects:
        allowed = f" (after {max_rejects} that --max-rejects allowed)" if max_rejects else ""
        raise DataFormatError(f"{rejects[max_rejects]}{allowed}; put it right, or let it pass with --max-rejects {max_rejects + 1} or more")


def _walk(folder: Path) -> list[Path]:
    return sorted(Path(parent) / name for parent, _, names in os.walk(folder) for name in names)


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def _open(path: Path) -> Iterator[Iterator[tuple[bytes, int]]]:
    """The decompressed blocks of a file, each with the position on disk that has been read up to."""
    with path.open("rb") as raw:
        try:
            if path.suffix.lower() == ".zst":
                yield _zstd_blocks(raw)
            else:
                stream = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
                yield _blocks(stream, raw)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise DataFormatError(f"{path}: damaged or cut short ({error}); compress it again") from None


def _blocks(stream: BinaryIO | gzip.GzipFile, raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    while block := stream.read(_BLOCK_BYTES):
        yield block, raw.tell()


def _zstd_blocks(raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    # zstandard's own stream reader takes a file that is cut short for one that ends.
    frame = None
    while block := raw.read(_BLOCK_BYTES // 8):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block), raw.tell()
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame has no end")


def _chunks_of_lines(file: CorpusFile, blocks: Iterator[tuple[bytes, int]]) -> Iterator[Chunk]:
    pending: list[bytes] = []
    line, disk_position, is_first = 1, 0, True
    for block, position in blocks:
        if is_first and block:
            block, is_first = block.removeprefix(_BYTE_ORDER_MARK), False
        head, newline, rest = block.rpartition(b"\n")
        if not newline:
            pending.append(block)
            continue
        content = b"".join([*pending, head, newline])
        pending = [rest]
        yield Chunk(file, content, line, position - disk_position)
        line += content.count(b"\n")
        disk_position = position
    yield Chunk(file, b"".join(pending), line, file.path.stat().st_size - disk_position)


def _decoded(where: str, content: bytes) -> Document | Reject:
    try:
        return Document(content.decode("utf-8"), len(content))
    except UnicodeDecodeError as error:
        return Reject(where, f"not UTF-8 (byte 0x{content[error.start]:02x} at position {error.start})")


def _from_json(where: str, line: str, text_field: str) -> Document | Reject:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return Reject(where, f"invalid JSON ({error.msg} at column {error.colno}); one JSON object a line is expected")
    except (ValueError, RecursionError) as error:
        return Reject(where, f"JSON that cannot be read ({error})")
    if not isinstance(record, dict):
        return Reject(where, f"a JSON object is expected, found {type(record).__name__}")
    if text_field not in record:
        fields = ", ".join(list(record)[:8]) or "none"
        return Reject(where, f"no field {text_field!r} (fields: {fields}); choose with --text-field")
    text = record[text_field]
    if not isinstance(text, str):
        return Reject(where, f"field {text_field!r} holds {type(text).__name__}, text is expected")
    try:
        return Document(text, len(text.encode("utf-8")), record)
    except UnicodeEncodeError as error:
        return Reject(where, f"half of a surrogate pair (character {error.start} of the text), which is no Unicode text")
