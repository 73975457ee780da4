"""Reads the documents of a split: text, JSON lines, JSON values or parquet, plain or compressed. A very long document
comes in parts."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.corpus import CorpusFile, Split, open_file, open_parquet
from data_tools.formats import BYTE_ORDER_MARK, other_encoding, plain_blocks
from data_tools.formats import DamagedError as DamagedError
from data_tools.json_values import json_values
from data_tools.long_json import InvalidJson, stream_fields
from data_tools.parquet import read_rows
from data_tools.records import RecordForm, Reject
from hunyuan_pretrain.data.errors import DataFormatError

LONG_BYTES = 32 << 20
"""Lines and text files longer than this are read in parts, so that memory is bounded for documents of any length."""

_BLOCK_BYTES = 1 << 20
_SHOWN_CHARACTERS = 200


class RejectedError(ValueError):
    """A record turned out not to be a document while its parts were read."""


@dataclass(frozen=True)
class Document:
    """One text of the corpus: `text`, or `parts` if it is very long. The parts must be read before the next document is
    requested."""

    position: int
    """Byte offset of its line or JSON value (before compression), parquet row, or 0 for a text file."""
    text: str = ""
    parts: Iterator[str] | None = None
    """May raise RejectedError, or DamagedError."""
    record: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """All fields of a JSON object, or the fields read from a parquet row; empty for a text file or a very long line."""

    @property
    def utf8_bytes(self) -> int:
        """UTF-8 bytes of `text`."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


def read_split(
    split: Split,
    form: RecordForm,
    advance: Callable[[int], None] = lambda size: None,
    pass_over: Callable[[], None] = lambda: None,
) -> Iterator[Document | Reject]:
    """Yield the documents of a split in order, with a Reject in place of each invalid record. Blank lines are skipped.

    `advance` is called with the number of bytes read from disk, `pass_over` once for each record that `form.where`
    leaves out. Raises DamagedError if a file is damaged.
    """
    if split.file.kind == "parquet":
        yield from _rows(split, form, advance, pass_over)
        return
    left = split.end - split.start

    def advance_within(size: int) -> None:
        nonlocal left
        # the last line may extend beyond the split
        advance(min(size, left))
        left -= min(size, left)

    with open_file(split.file) as raw:
        raw.seek(max(split.start - 1, 0))
        blocks = plain_blocks(split.file.path, raw, split.file.compression, advance_within, _BLOCK_BYTES)
        if split.file.kind == "jsonl":
            yield from _documents_of_lines(split, blocks, form, pass_over)
        elif split.file.kind == "json":
            yield from _documents_of_values(split, blocks, form, pass_over)
        elif form.where:
            pass_over()  # a text file has no fields to match
        else:
            yield from _text_document(split.file, blocks)


def read_documents(
    files: Sequence[CorpusFile], form: RecordForm, max_rejects: int = 0, count_reject: Callable[[], None] = lambda: None
) -> Iterator[Document]:
    """Yield all documents of the files, in order; a very long one comes as several, cut anywhere.

    `count_reject` is called for each reject. Raises DataFormatError at the first reject beyond `max_rejects`.
    """
    rejects: list[Reject] = []
    for number, file in enumerate(files):
        whole = Split(file, number, 0, file.size, 0)
        if file.kind == "parquet":
            with open_parquet(file) as parquet:
                whole = Split(file, number, 0, parquet.num_row_groups, 0)
        for document in read_split(whole, form):
            rejected = document if isinstance(document, Reject) else None
            if isinstance(document, Document) and document.parts is None:
                yield document
            elif isinstance(document, Document) and document.parts is not None:
                try:
                    for part in document.parts:
                        yield Document(document.position, part)
                except RejectedError as error:
                    rejected = Reject(file.path, str(error))
            if rejected is not None:
                rejects.append(rejected)
                count_reject()
                check_rejects(rejects, max_rejects)


def check_rejects(rejects: Sequence[Reject], max_rejects: int) -> None:
    """Raise DataFormatError if there are more rejects than allowed; it names the first one beyond the limit."""
    if len(rejects) > max_rejects:
        allowed = f" (after {max_rejects} that --max-rejects allowed)" if max_rejects else ""
        raise DataFormatError(
            f"{rejects[max_rejects]}{allowed}; fix it, or allow it with --max-rejects {max_rejects + 1} or more"
        )


# --- JSON values ------------------------------------------------------------------------------------------------------


def _documents_of_values(
    split: Split, blocks: Iterator[bytes], form: RecordForm, pass_over: Callable[[], None]
) -> Iterator[Document | Reject]:
    for number, (position, value, begin) in enumerate(json_values(split.file.path, blocks), start=1):
        where = f"{split.file.path}: record {number}"
        found = Reject(where, str(value)) if isinstance(value, Exception) else _from_value(where, value, form)
        if isinstance(found, Reject):
            found = Reject(found.where, found.reason, begin.encode("utf-8", "replace").decode())
        yield from _of_record(position, found, pass_over)


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _documents_of_lines(
    split: Split, blocks: Iterator[bytes], form: RecordForm, pass_over: Callable[[], None]
) -> Iterator[Document | Reject]:
    for number, (position, line) in enumerate(_lines(split, blocks), start=1):
        # a split in the middle of a file does not know its line numbers
        where = f"{split.file.path}: line {number}" if split.start == 0 else f"{split.file.path}: byte {position:,}"
        if not isinstance(line, bytes) and form.needs_whole_record:
            line = b"".join(line)  # several fields are needed, in any order, so the whole line is parsed
        if not isinstance(line, bytes):
            yield Document(position, parts=_long_text(line, form))
        elif line.strip():
            yield from _of_record(position, _text_of_line(where, line, form), pass_over)


def _lines(split: Split, blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes | Iterator[bytes]]]:
    """Yield (offset, line) for each line that begins in the split. A line longer than LONG_BYTES comes as an iterator
    of blocks, which must be read before the next line is requested."""
    limit = split.end if not split.file.is_compressed else None
    position, pending = max(split.start - 1, 0), b""
    if split.start == 0:
        pending = next(blocks, b"")
        if pending.startswith(BYTE_ORDER_MARK):
            position, pending = len(BYTE_ORDER_MARK), pending[len(BYTE_ORDER_MARK) :]
    else:
        # A line that began earlier belongs to the previous split. Reading starts one byte early, so that a line that
        # begins exactly with the split is found after its newline.
        while True:
            block = next(blocks, None)
            if block is None:
                return
            found = block.find(b"\n")
            if found >= 0:
                position, pending = position + found + 1, block[found + 1 :]
                break
            position += len(block)
    chunks = [pending]
    size = len(pending)
    while True:
        head, newline, rest = chunks[-1].rpartition(b"\n")
        if newline:
            for line in b"".join([*chunks[:-1], head]).split(b"\n"):
                if limit is not None and position >= limit:
                    return
                yield position, line
                position += len(line) + 1
            chunks, size = [rest], len(rest)
        if limit is not None and position >= limit:
            return
        if size > LONG_BYTES:
            long = _LongLine(chunks, blocks)
            yield position, iter(long)
            assert long.is_read, "a long line was left unread"
            position += long.size
            chunks, size = [long.rest], len(long.rest)
            continue
        block = next(blocks, None)
        if block is None:
            last = b"".join(chunks)
            if last:
                yield position, last
            return
        chunks.append(block)
        size += len(block)


class _LongLine:
    """The blocks of one line; `size` counts its bytes with the newline, `rest` holds bytes read of the next lines."""

    def __init__(self, begun: list[bytes], blocks: Iterator[bytes]) -> None:
        self._begun, self._blocks = begun, blocks
        self.size, self.rest, self.is_read = 0, b"", False

    def __iter__(self) -> Iterator[bytes]:
        for source in (self._begun, self._blocks):
            for block in source:
                line, newline, self.rest = block.partition(b"\n")
                self.size += len(line) + len(newline)
                yield line
                if newline:
                    self.is_read = True
                    return
        self.is_read = True


def _long_text(blocks: Iterator[bytes], form: RecordForm) -> Iterator[str]:
    """Yield the text of a record in parts. Raises RejectedError for an invalid record, after reading all its blocks."""
    try:
        yield from stream_fields(blocks, form.text_field)
    except InvalidJson as error:
        for _ in blocks:
            pass
        raise RejectedError(str(error)) from None


def _of_record(
    position: int, found: tuple[str, Mapping[str, Any]] | Reject | None, pass_over: Callable[[], None]
) -> Iterator[Document | Reject]:
    if isinstance(found, Reject):
        yield found
    elif found is not None:
        yield Document(position, found[0], record=found[1])
    else:
        pass_over()


def _text_of_line(where: str, line: bytes, form: RecordForm) -> tuple[str, Mapping[str, Any]] | Reject | None:
    found = _from_json(where, line, form)
    return (
        Reject(found.where, found.reason, line[:_SHOWN_CHARACTERS].decode("utf-8", "replace"))
        if isinstance(found, Reject)
        else found
    )


def _from_json(where: str, line: bytes, form: RecordForm) -> tuple[str, Mapping[str, Any]] | Reject | None:
    try:
        record = json.loads(
            line.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
        )  # concatenated files have byte order marks inside
    except UnicodeDecodeError as error:
        return Reject(where, f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start})")
    except json.JSONDecodeError as error:
        return Reject(where, f"invalid JSON ({error.msg} at column {error.colno}); expected one JSON object per line")
    except (ValueError, RecursionError) as error:
        return Reject(where, f"JSON that cannot be read ({error})")
    return _from_value(where, record, form)


def _from_value(where: str, record: Any, form: RecordForm) -> tuple[str, Mapping[str, Any]] | Reject | None:
    if not isinstance(record, dict):
        return Reject(where, f"a JSON object is expected, found {type(record).__name__}")
    text = form.text_of(where, record)
    checked = _checked(where, text) if isinstance(text, str) else text
    return (checked, record) if isinstance(checked, str) else checked


def _checked(where: str, text: str) -> str | Reject:
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Reject(where, f"an unpaired surrogate (character {error.start} of the text), which is not valid Unicode")
    return text


# --- text -------------------------------------------------------------------------------------------------------------


def _text_document(file: CorpusFile, blocks: Iterator[bytes]) -> Iterator[Document | Reject]:
    content, size = [], 0
    for block in blocks:
        content.append(block)
        size += len(block)
        if size > LONG_BYTES:
            yield Document(0, parts=_decoded_parts([*content], blocks))
            return
    whole = b"".join(content).removeprefix(BYTE_ORDER_MARK)
    try:
        yield Document(0, "".join(_decoded_parts([whole], iter(()))))
    except RejectedError as error:
        yield Reject(file.path, str(error), whole[:_SHOWN_CHARACTERS].decode("utf-8", "replace"))


def _decoded_parts(begun: list[bytes], blocks: Iterator[bytes]) -> Iterator[str]:
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    if encoding := other_encoding(begun[0]):
        raise RejectedError(f"{encoding}, but only UTF-8 is supported; convert it: iconv -f {encoding} -t UTF-8")
    begun[0] = begun[0].removeprefix(BYTE_ORDER_MARK)
    for source in (begun, blocks):
        for block in source:
            nul = block.find(b"\x00")
            if nul >= 0:
                raise RejectedError(f"a binary file (NUL at byte {position + nul}); only UTF-8 text is supported")
            yield _decode(decoder, block, position, final=False)
            position += len(block)
    yield _decode(decoder, b"", position, final=True)


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, position: int, *, final: bool) -> str:
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        at = position - waiting + error.start
        raise RejectedError(f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {at})") from None


def cut_between_words(parts: Iterable[str], part_characters: int) -> Iterator[str]:
    """Yield the same text in parts of about `part_characters`, cut only where the split pattern always ends a token and
    NFC composes nothing.

    Such a position lies between a letter or digit and an ASCII character that is neither. A token ends there whatever
    follows, the rest is split the same way whatever came before, and no ASCII character composes with its predecessor.
    If the text has no such position for long, a part is longer.
    """
    waiting: list[str] = []
    size, wanted = 0, part_characters
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size < wanted:
            continue
        text = "".join(waiting)
        cut = _last_boundary(text)
        if cut:
            yield text[:cut]
        waiting, size = [text[cut:]], len(text) - cut
        # without a boundary for long, checking after each part would copy the whole text again and again
        wanted = max(part_characters, 2 * size)
    if size:
        yield "".join(waiting)


_BORDER = re.compile(r"[^\W_](?=[\x00-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f])")


def _last_boundary(text: str) -> int:
    """The last position at which `text` may be cut; 0 if there is none in its last 2^20 characters."""
    for width in (1 << 10, 1 << 20):
        begin = max(len(text) - width, 0)
        ends = [match.end() for match in _BORDER.finditer(text, begin)]
        if ends:
            return ends[-1]
    return 0


# --- parquet ----------------------------------------------------------------------------------------------------------


def _rows(
    split: Split, form: RecordForm, advance: Callable[[int], None], pass_over: Callable[[], None]
) -> Iterator[Document | Reject]:
    for row, record in read_rows(split, form.fields, advance):
        where = f"{split.file.path}: row {row}"
        if isinstance(record, str):
            yield Reject(where, record)
        else:
            text = form.text_of(where, record)
            yield from _of_record(row, (text, record) if isinstance(text, str) else text, pass_over)
