"""Streams one string field of a JSON object that is too long to be parsed at once.

Skipped values are only checked for balanced brackets and quotes; json.loads, which parses all shorter lines, is
stricter.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator

# Matches complete units of a string only, so that a match never ends inside an escape or a surrogate pair.
_STRING = re.compile(
    r'(?:[^"\\]++|\\["\\/bfnrt]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4})*+'
)
_LONGEST_UNIT = len(r"\ud83d\ude00")
_MAX_KEY_CHARACTERS = 1 << 16
_SPACE = re.compile(r"[ \t\r\n]*+")
_PLAIN = re.compile(r"[-+.\w]*+")
_OPEN, _CLOSE = "{[", "}]"


class InvalidJson(ValueError):
    """Not a JSON object with the field as a string."""


def stream_fields(blocks: Iterable[bytes], name: str) -> Iterator[str]:
    """Yield the string under the key `name` of the single JSON object in `blocks`, in parts.

    Raises InvalidJson if there is no such object, key or string; the parts yielded so far must then be discarded.
    """
    scanner = _Scanner(blocks)
    scanner.expect("{")
    is_found = False
    keys: list[str] = []
    while keys or not scanner.take("}"):
        key = scanner.read_key()
        scanner.expect(":")
        if key != name:
            scanner.skip_value()
        elif is_found:
            raise InvalidJson(f"field {name!r} occurs twice")
        elif scanner.skip_to_next() != '"':
            raise InvalidJson(f"field {name!r} does not hold text")
        else:
            is_found = True
            yield from scanner.string_parts()
        keys.append(key)
        if scanner.take("}"):
            break
        scanner.expect(",")
    if scanner.skip_to_next():
        raise InvalidJson("more than one JSON object on a line")
    if not is_found:
        raise InvalidJson(f"no field {name!r} (fields: {', '.join(keys[:8]) or 'none'}); choose with --text-field")


class _Scanner:
    """Reads JSON from blocks of UTF-8, holding one or two blocks at a time."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._is_whole = "", 0, False

    def skip_to_next(self) -> str:
        """Skip white space; returns the next character, or "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def take(self, character: str) -> bool:
        """Consume the next character if it is this one; returns whether it was."""
        if self.skip_to_next() != character:
            return False
        self._at += 1
        return True

    def expect(self, character: str) -> None:
        """Consume the next character. Raises InvalidJson if it is another one."""
        if not self.take(character):
            found = self.skip_to_next()
            raise InvalidJson(
                f"invalid JSON (expected {character!r}, found {found!r})" if found else "invalid JSON (unexpected end)"
            )

    def read_key(self) -> str:
        """Read a string of at most _MAX_KEY_CHARACTERS."""
        key = ""
        if self.skip_to_next() != '"':
            self.expect('"')
        for part in self.string_parts():
            key += part
            if len(key) > _MAX_KEY_CHARACTERS:
                raise InvalidJson(f"a field name of more than {_MAX_KEY_CHARACTERS:,} characters")
        return key

    def string_parts(self) -> Iterator[str]:
        """Yield the string that starts here, in parts."""
        self.expect('"')
        while True:
            match = _STRING.match(self._text, self._at)
            assert match
            if match.end() > self._at:
                try:
                    yield json.loads(f'"{match.group()}"')
                except json.JSONDecodeError as error:
                    raise InvalidJson(f"invalid JSON ({error.msg} in a string)") from None
                self._at = match.end()
            elif self._text[self._at : self._at + 1] == '"':
                self._at += 1
                return
            elif len(self._text) - self._at >= _LONGEST_UNIT or not self._read_more():
                begin = self._text[self._at : self._at + _LONGEST_UNIT]
                raise InvalidJson(
                    f"invalid JSON (escape {begin!r} in a string)" if begin else "invalid JSON (an unterminated string)"
                )

    def skip_value(self) -> None:
        """Skip a value of any type."""
        closing: list[str] = []
        while True:
            character = self.skip_to_next()
            if character == '"':
                for _ in self.string_parts():
                    pass
            elif character and character in _OPEN:
                closing.append(_CLOSE[_OPEN.index(character)])
                self._at += 1
                continue
            elif closing and character and character in _CLOSE:
                self.expect(closing.pop())
            elif closing and character and character in ",:":
                self._at += 1
                continue
            elif not self._skip_plain():
                self.expect("a value")
            if not closing:
                return

    def _skip_plain(self) -> bool:
        """Skip a number or a literal; returns whether there was one."""
        is_any = False
        while True:
            match = _PLAIN.match(self._text, self._at)
            assert match
            is_any |= match.end() > self._at
            self._at = match.end()
            if self._at < len(self._text) or not self._read_more():
                return is_any

    def _read_more(self) -> bool:
        """Append the next block; False at the end."""
        if self._is_whole:
            return False
        block = next(self._blocks, None)
        self._is_whole = block is None
        try:
            more = self._decoder.decode(block or b"", self._is_whole)
        except UnicodeDecodeError as error:
            raise InvalidJson(f"not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more) or not self._is_whole
