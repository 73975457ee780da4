"""Detects the format of a file from its content: its compression, and whether it holds text, JSON lines, JSON values or
parquet. Also decompresses it.

The name decides only what the content leaves open. Exception: .txt, .md, .py and the endings of --text-ending are read
as text whatever their content looks like, unless it is parquet.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import PurePath
from typing import Any, BinaryIO

import zstandard

from hunyuan_pretrain.data.errors import DataFormatError

TEXT_ENDINGS = (".txt", ".md", ".py")
RECORD_ENDINGS = (".jsonl", ".ndjson", ".jsonlines", ".json")
PARQUET_ENDING = ".parquet"
COMPRESSED_ENDINGS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
HEAD_BYTES = 1 << 16
MAX_WINDOW_BYTES = 1 << 31
"""Largest window of a zstd frame, as for `zstd --long=31`: 2 GiB of memory per reading process. xz has the same
limit."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_PIECE_BYTES = 1 << 12
"""Compressed bytes that are decompressed at once: they hold at most 128 MB of text, where a megabyte could hold 32
GB."""
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_TABLE_ENDINGS = (".csv", ".tsv")
_JSON_SPACE = " \t\r\n"
_RECORD_BEGINS = re.compile(r'\{\s*"[^"\\]{1,200}"\s*:')
_OTHERS = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!\x1a\x07": "a rar archive; unpack it",
    b"ARROW1\x00\x00": "an Arrow file; write it as parquet",
    b"Obj\x01": "an Avro file; write it as parquet",
    b"ORC": "an ORC file; write it as parquet",
    b"%PDF-": "a PDF; extract its text",
    b"SQLite format 3\x00": "an SQLite database; export its rows as JSON lines",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file; export its rows as JSON lines",
}
_DAMAGE = (EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError)


class DamagedError(DataFormatError):
    """A file that cannot be read any further, so that everything after the damage is lost too."""


def extension_of(path: str) -> str:
    """The last extension in lower case; of a compressed file the one before the compression suffix."""
    suffixes = [suffix.lower() for suffix in PurePath(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_ENDINGS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def format_of(
    path: str, head: bytes, text_endings: Collection[str] = (), is_parquet_end: Callable[[], bool] = lambda: True
) -> tuple[str, str]:
    """(kind, compression) of a file that begins with `head`, which has HEAD_BYTES or more, or the whole file.

    Kinds: text (one document), jsonl (one JSON object per line), json (consecutive JSON objects, or an array of them),
    object (one JSON object over several lines), no records (a .json that does not begin like JSON), parquet.
    Compressions: "", gzip, zstd, bz2, xz. `is_parquet_end` says whether the file ends with parquet's magic bytes.
    Raises DataFormatError for any other format, and for UTF-16 or UTF-32 where records are expected.
    """
    ending = extension_of(path)
    compression = _compression(path, head)
    if compression == "zstd":
        _refuse_dictionary(path, head)
    content = _beginning(head, compression) if compression else head
    is_text = ending in TEXT_ENDINGS or ending in text_endings
    if compression and content is not None and _compression("", content):
        raise DataFormatError(
            f"{path}: compressed twice ({compression} around {_compression('', content)}); decompress it once"
        )
    if (content or b"").startswith(b"PAR1") and (ending == PARQUET_ENDING or is_parquet_end()):
        if compression:
            raise DataFormatError(
                f"{path}: parquet inside {compression}; decompress it, parquet compresses its columns itself"
            )
        return "parquet", ""
    if ending == PARQUET_ENDING:
        return "parquet", ""  # the reader reports what is wrong with it
    if is_text:
        return "text", compression
    if ending in _TABLE_ENDINGS:
        raise DataFormatError(
            f"{path}: a table, which is not supported; write its rows as JSON lines, or read it as one text with "
            f"--text-ending {ending}"
        )
    _refuse_others(path, content or b"")
    kind = _kind_of_records(content or b"", is_expected=ending in RECORD_ENDINGS)
    if (
        ending == ".json"
        and kind == "jsonl"
        and (content or b"").removeprefix(BYTE_ORDER_MARK).strip()[:1] not in (b"{", b"[", b"")
    ):
        return "no records", compression
    return kind, compression


def _compression(path: str, head: bytes) -> str:
    name = PurePath(path).suffix.lower()
    expected = COMPRESSED_ENDINGS.get(name, "")
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(_ZSTD_MAGIC):
        return "zstd"
    if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:  # a skippable frame
        after = 8 + int.from_bytes(head[4:8], "little")
        if expected == "zstd" or head[after : after + 4] == _ZSTD_MAGIC:
            return "zstd"
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bz2"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    if expected and head:
        raise DamagedError(
            f"{path}: damaged or truncated, or not {expected} despite its name (it begins with "
            f"{head[:8]!r}); compress it again, or "
            "rename it to match its format"
        )
    return expected


def _refuse_dictionary(path: str, head: bytes) -> None:
    try:
        dictionary = zstandard.get_frame_parameters(head).dict_id
    except zstandard.ZstdError:
        return
    if dictionary:
        raise DataFormatError(
            f"{path}: compressed with zstd dictionary {dictionary}, which is not available; compress it without -D"
        )


def _beginning(head: bytes, compression: str) -> bytes | None:
    """The first decompressed bytes of `head`; None if the damage is before the first of them."""
    content = b""
    try:
        for block in _blocks_of(io.BytesIO(head), compression, lambda size: None, HEAD_BYTES):
            content += block
            if len(content) >= HEAD_BYTES:
                break
    except _DAMAGE:
        return content or None
    return content


def _refuse_others(path: str, content: bytes) -> None:
    marks = {
        b"\xff\xfe\x00\x00": "UTF-32",
        b"\x00\x00\xfe\xff": "UTF-32",
        b"\xff\xfe": "UTF-16",
        b"\xfe\xff": "UTF-16",
        b"{\x00": "UTF-16",
        b"\x00{": "UTF-16",
    }
    for mark, name in marks.items():
        if content.startswith(mark):
            raise DataFormatError(f"{path}: {name}, but only UTF-8 is supported; convert it: iconv -f {name} -t UTF-8")
    for magic, what in _OTHERS.items():
        if content.startswith(magic):
            raise DataFormatError(f"{path}: {what}")
    if content[257:262] == b"ustar":
        raise DataFormatError(f"{path}: a tar archive; unpack it")


def other_encoding(content: bytes) -> str:
    """The name of the encoding if a text begins with the byte order mark of UTF-16 or UTF-32, else ""."""
    if content.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "UTF-32"
    return "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ""


def _kind_of_records(content: bytes, *, is_expected: bool) -> str:
    """jsonl, json, object or, unless records are expected, text."""
    text = content.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "replace").lstrip(_JSON_SPACE)
    is_cut = len(content) >= HEAD_BYTES
    first_line, newline, rest = text.partition("\n")
    if text.startswith("[") and text[1:].lstrip(_JSON_SPACE)[:1] in ("{", "]", ""):
        return "json" if is_expected or _end_of_object(text[1:].lstrip(_JSON_SPACE)) is not None else "text"
    if text.startswith("{"):
        value_end = _end_of_object(text)
        if value_end is not None and value_end > len(first_line):
            return "json" if text[value_end:].strip() else "object" if is_expected else "text"
        if value_end is not None and first_line[value_end:].strip() == ",":
            return "json"  # lines of an array without its brackets
        if value_end is None and is_cut and first_line.strip() == "{" and is_expected:
            return "object"
        is_line = value_end is not None or (is_cut and not newline and _RECORD_BEGINS.match(text))
        is_like_it = is_line and rest.lstrip(_JSON_SPACE)[:1] in ("", "{")
        return "jsonl" if is_expected or is_like_it else "text"
    return "jsonl" if is_expected else "text"


def _end_of_object(text: str) -> int | None:
    """End of the JSON object at the start of `text`; None if there is none, or if `text` does not hold all of it."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return end if isinstance(value, dict) else None


# --- plain bytes ------------------------------------------------------------------------------------------------------


def plain_blocks(
    path: str, raw: BinaryIO, compression: str, advance: Callable[[int], None], block_bytes: int = 1 << 20
) -> Iterator[bytes]:
    """Yield the bytes of a file from the position of `raw` on, decompressed, in blocks. `advance` is called with the
    number of bytes read from `raw`.

    Consecutive members, frames or streams are read as one. Raises DamagedError if the data is damaged or truncated, and
    DataFormatError if there is not enough memory to decompress it.
    """
    try:
        yield from _blocks_of(raw, compression, advance, block_bytes)
    except _DAMAGE as error:
        if not compression or (isinstance(error, OSError) and error.errno is not None):
            raise  # the disk failed, not the format
        if "memory" in str(error).lower():
            raise DataFormatError(
                f"{path}: not enough memory to decompress it, which takes up to 2 GiB per process ({error}); "
                "use fewer --workers, or "
                "compress it with a smaller window"
            ) from None
        raise DamagedError(f"{path}: damaged or truncated ({error}); compress it again") from None


def _blocks_of(raw: BinaryIO, compression: str, advance: Callable[[int], None], block_bytes: int) -> Iterator[bytes]:
    if compression in ("", "gzip"):
        stream: Any = gzip.GzipFile(fileobj=raw) if compression else raw
        position = raw.tell()
        while block := stream.read(block_bytes):
            advance(raw.tell() - position)
            position = raw.tell()
            yield block
        return
    # The stream readers of these libraries take a truncated file for a complete one, or hold everything that a block
    # expands to.
    new: dict[str, Callable[[], Any]] = {
        "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj(),
        "bz2": bz2.BZ2Decompressor,
        "xz": lambda: lzma.LZMADecompressor(memlimit=MAX_WINDOW_BYTES),
    }
    frame = None
    while block := raw.read(_PIECE_BYTES):
        advance(len(block))
        while block:
            if frame is None and compression == "xz":
                block = block.lstrip(b"\x00")  # padding between streams
                if not block:
                    break
            frame = frame or new[compression]()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame is incomplete")
