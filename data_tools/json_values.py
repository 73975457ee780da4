"""JSON objects one after the other or in an array, over as many lines as they like, as records; a broken one costs
itself alone.

Whole values are parsed in C. Only what fails, or crosses the end of what has been read, is looked through for its end.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from data_tools.formats import BYTE_ORDER_MARK, DamagedError

MAX_CHARACTERS = 1 << 28
"""What a record may have here; on a line of its own it may be as long as it likes."""

_BETWEEN = re.compile(r"[ \t\r\n,]*+")
_MARK = re.compile(r'["{}\[\]]')
_STRING_REST = re.compile(r'(?:[^"\\\n]|\\.)*+', re.DOTALL)
_RECORD_BEGIN = re.compile(r"\n[ \t]*+\{|\}\s*+,\s*+\{")
_decode = json.JSONDecoder().raw_decode


def json_values(path: str, blocks: Iterable[bytes]) -> Iterator[tuple[int, Any, str]]:
    """(byte offset, value, how it begins) of each value of a file: those in an array, or at its top.

    What is not JSON comes as a ValueError in place of the value. Raises DamagedError where it cannot be found how the
    file goes on.
    """
    yield from _Reader(path, blocks).values()


class _Reader:
    """Holds the text of some values. Bytes that are not UTF-8 are surrogates in it, so they cost no other record."""

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
            yield self._position, ValueError("the array has no end; the file is cut short"), ""

    def _value(self) -> Any:
        """The value that stands next, or a ValueError; what stands next is then what follows it."""
        begin = self._begin
        try:
            value, end = _decode(self._text, begin)
            if end == len(self._text) and self._read_more():  # a number may go on
                value, end = _decode(self._text, begin)
        except (ValueError, RecursionError) as error:
            value, end = error, self._end_of_broken()
            if isinstance(error, json.JSONDecodeError):
                try:
                    value = json.loads(self._text[begin:end].rstrip(",\r\n\t "))  # it was only not read to its end
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
        """Where the value that stands next ends by its brackets, or else where the next record begins."""
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
                if end is None:  # a line ends inside it, or the file
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
        """Where a record begins that is like the first of the file; the end of the file where nothing looks like a
        record any more.

        Raises DamagedError where that is far, or something looks like a record of another kind.
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
            f"{self._path}: byte {self._position:,}: JSON that is broken so that it is not clear where the next "
            "record begins "
            f"({self._text[self._begin : self._begin + 60]!r}...); put it right, or write one object a line"
        )

    def _next_character(self) -> str:
        """What is neither white space nor a comma and stands next; "" at the end."""
        if self._begin > len(self._text) // 2:  # not for every value: that would copy the rest again and again
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
        """Read on: as much as is held, so that a long value is not copied again and again. False at the end."""
        if len(self._text) - self._begin > MAX_CHARACTERS and not self._is_whole:
            raise DamagedError(
                f"{self._path}: byte {self._position:,}: a record of more than {MAX_CHARACTERS:,} characters; write "
                "one a line"
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
