"""Reads consecutive JSON objects, or an array of them, as records, over any number of lines. A broken record does not
affect the others.

Complete values are parsed in C. Only a value that fails to parse, or extends past the text read so far, is scanned for
its end.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from data_tools.formats import BYTE_ORDER_MARK, DamagedError

MAX_CHARACTERS = 1 << 28
"""Longest record here; there is no limit for a record on its own line."""

_BETWEEN = re.compile(r"[ \t\r\n,]*+")
_MARK = re.compile(r'["{}\[\]]')
_STRING_REST = re.compile(r'(?:[^"\\\n]|\\.)*+', re.DOTALL)
_RECORD_BEGIN = re.compile(r"\n[ \t]*+\{|\}\s*+,\s*+\{")
_decode = json.JSONDecoder().raw_decode


def json_values(path: str, blocks: Iterable[bytes]) -> Iterator[tuple[int, Any, str]]:
    """Yield (byte offset, value, first characters) for each value of a file, in an array or at top level.

    Invalid JSON comes as a ValueError in place of the value. Raises DamagedError if the start of the next record cannot
    be found.
    """
    yield from _Reader(path, blocks).values()


class _Reader:
    """Buffers the text of some values. Bytes that are not UTF-8 become surrogates, so they spoil only their record."""

    def __init__(self, path: str, blocks: Iterable[bytes]) -> None:
        self._path, self._blocks = path, iter(blocks)
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._begin, self._position, self._is_whole = "", 0, 0, False
        self._first_key: str | None = None

    def values(self) -> Iterator[tuple[int, Any, str]]:
        self._read_more()
        if self._text.startswith(BYTE_ORDER_MARK.decode()):
            self._pass_to(1)
        is_in_array = False
        while following := self._next_character():
            if following in "[]" and (following == "]") == is_in_array:
                is_in_array = not is_in_array
                self._pass_to(self._begin + 1)
                continue
            position, begin = self._position, self._text[self._begin : self._begin + 200]
            yield position, self._value(), begin
        if is_in_array:
            yield self._position, ValueError("the array is never closed; the file is truncated"), ""

    def _value(self) -> Any:
        """Parse the next value and advance past it; returns the value or a ValueError."""
        begin = self._begin
        try:
            value, end = _decode(self._text, begin)
            if end == len(self._text) and self._read_more():  # a number may continue
                value, end = _decode(self._text, begin)
        except (ValueError, RecursionError) as error:
            value, end = error, self._end_of_broken()
            if isinstance(error, json.JSONDecodeError):
                try:
                    value = json.loads(self._text[begin:end].rstrip(",\r\n\t "))  # it was only read incompletely
                except (ValueError, RecursionError) as again:
                    value = again
        piece = self._text[begin:end]
        self._pass_to(end)
        if not isinstance(value, Exception) and not piece.isascii() and (bad := _NOT_UTF8.search(piece)):
            return ValueError(
                f"not UTF-8 (byte 0x{ord(bad.group()) - 0xDC00:02x} at position {len(piece[: bad.start()].encode())})"
            )
        if isinstance(value, dict) and self._first_key is None:
            self._first_key = next(iter(value), None)
        if isinstance(value, json.JSONDecodeError):
            return ValueError(f"invalid JSON ({value.msg} at character {value.pos + 1} of the record)")
        return ValueError(f"JSON that cannot be read ({value})") if isinstance(value, Exception) else value

    def _end_of_broken(self) -> int:
        """End of the next value, found by its brackets, or else the start of the next record."""
        depth, at = 0, self._begin
        if self._text[at] not in "{[":
            return self._next_record()
        while True:
            match = _MARK.search(self._text, at)
            if match is None:
                at = len(self._text)
                if not self._read_more():
                    return self._next_record()
            elif match.group() == '"':
                end = self._end_of_string(match.end())
                if end is None:  # the line or the file ends inside the string
                    return self._next_record()
                at = end
            else:
                depth += 1 if match.group() in "{[" else -1
                at = match.end()
                if depth == 0:
                    return at

    def _end_of_string(self, at: int) -> int | None:
        while True:
            match = _STRING_REST.match(self._text, at)
            assert match
            at = match.end()
            if at < len(self._text) and self._text[at] != "\\":
                return at + 1 if self._text[at] == '"' else None
            if not self._read_more():
                return None

    def _next_record(self) -> int:
        """Start of the next record with the same first key as the first record of the file; the end of the file if
        nothing else looks like a record.

        Raises DamagedError if more than MAX_CHARACTERS would have to be read, or if only records with another first key
        follow.
        """
        at, is_doubtful = self._begin + 1, False
        while True:
            for match in _RECORD_BEGIN.finditer(self._text, at):
                try:
                    value, _ = _decode(self._text, match.end() - 1)
                except (ValueError, RecursionError):
                    continue
                if isinstance(value, dict) and self._first_key in (None, next(iter(value), None)):
                    return match.end() - 1
                is_doubtful |= isinstance(value, dict)
            at = max(len(self._text) - (1 << 20), at)
            if not self._read_more():
                if is_doubtful:
                    break
                return len(self._text)
        raise DamagedError(
            f"{self._path}: byte {self._position:,}: broken JSON, and it is not clear where the next "
            "record begins "
            f"({self._text[self._begin : self._begin + 60]!r}...); fix it, or write one object per line"
        )

    def _next_character(self) -> str:
        """The next character that is neither white space nor a comma; "" at the end."""
        if self._begin > len(self._text) // 2:  # not for every value: that would copy the rest each time
            self._text, self._begin = self._text[self._begin :], 0
        while True:
            match = _BETWEEN.match(self._text, self._begin)
            assert match
            self._pass_to(match.end())
            if self._begin < len(self._text) or not self._read_more():
                return self._text[self._begin : self._begin + 1]

    def _pass_to(self, end: int) -> None:
        self._position += len(self._text[self._begin : end].encode("utf-8", "surrogateescape"))
        self._begin = end

    def _read_more(self) -> bool:
        """Read as much again as is buffered, so that a long value is copied only a few times. False at the end."""
        if len(self._text) - self._begin > MAX_CHARACTERS and not self._is_whole:
            raise DamagedError(
                f"{self._path}: byte {self._position:,}: a record of more than {MAX_CHARACTERS:,} characters; write "
                "one per line"
            )
        parts, size = [self._text], 0
        while not self._is_whole and size <= len(self._text) - self._begin:
            block = next(self._blocks, None)
            self._is_whole = block is None
            parts.append(self._decoder.decode(block or b"", self._is_whole))
            size += len(parts[-1])
        self._text = "".join(parts)
        return size > 0


_NOT_UTF8 = re.compile("[\udc80-\udcff]")
