"""A tokenized corpus on disk: Megatron's indexed format, one document a sequence, and a manifest.

A tokenized folder holds `tokens.bin` (all ids, one after the other), `tokens.idx` (where each document is) and `manifest.json`. The
first two are byte for byte what megatron-core's IndexedDatasetBuilder writes, so its tools read them as they are. Layout of the .idx,
little endian: "MMIDIDX\\0\\0", version 1 (u64), code of the id type (u8), number of sequences n (u64), number of document borders (u64),
lengths in tokens (i32 x n), byte offsets in the .bin (i64 x n), document borders 0..n (i64 x n+1).
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import manifest_field, read_manifest

TOKENIZED_FORMAT, TOKENIZED_VERSION = "hunyuan-tokenized", 1
TOKENS_BIN, TOKENS_IDX = "tokens.bin", "tokens.idx"
MAX_DOCUMENT_TOKENS = 2**31 - 1

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = len(_MAGIC) + 8 + 1 + 8 + 8
_DTYPE_CODES: dict[np.dtype, int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype:
    """The id type of a vocabulary: uint16 below 65,500 ids, else int32 (megatron's rule)."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class IndexedWriter:
    """Writes tokens.bin as documents come, and tokens.idx at the end. Memory: 4 bytes a document."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self._folder = folder
        self._lengths = array("i")
        self._bin = (folder / TOKENS_BIN).open("wb")
        self._bin_digest = hashlib.sha256()

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: `tokens` are their ids one after the other (sum(lengths),), `lengths` (documents,) their lengths."""
        assert tokens.dtype == self.dtype, f"{tokens.dtype} ids given to a writer of {self.dtype}"
        assert int(lengths.sum()) == len(tokens), "lengths do not add up to the tokens"
        content = tokens.tobytes()
        self._bin.write(content)
        self._bin_digest.update(content)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.num_tokens += len(tokens)

    def finish(self) -> dict[str, str]:
        """Write tokens.idx and close; returns the SHA-256 of both files by name."""
        self._bin.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:], dtype=np.int64)
        offsets *= self.dtype.itemsize
        borders = np.arange(len(lengths) + 1, dtype=np.int64)
        header = _MAGIC + struct.pack("<QBQQ", 1, _DTYPE_CODES[self.dtype], len(lengths), len(borders))
        idx_digest = hashlib.sha256()
        with (self._folder / TOKENS_IDX).open("wb") as idx:
            for part in (header, lengths.data, offsets.data, borders.data):
                idx.write(part)
                idx_digest.update(part)
        return {TOKENS_BIN: self._bin_digest.hexdigest(), TOKENS_IDX: idx_digest.hexdigest()}

    def close(self) -> None:
        """Close the file without finishing; harmless after `finish`."""
        self._bin.close()


class TokenizedDataset:
    """Documents of a tokenized folder, memory-mapped: opening costs the same for every size.

    `tokens` (all ids of the folder, in its id type), `lengths` (documents,) int32 in tokens, `starts` (documents,) int64, the position of
    each document in `tokens`. Raises DataFormatError if a file is missing, cut short or does not belong to the others.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, TOKENIZED_FORMAT, TOKENIZED_VERSION, "hunyuan-data tokenize")
        self.num_documents: int = self._field("documents", int)
        self.num_tokens: int = self._field("tokens", int)
        self.vocab_size: int = self._field("vocab_size", int)
        self.pad_id: int = self._field("pad_id", int)
        self.tokenizer_digest: str = self._field("tokenizer_digest", str)
        self.file_digests: dict[str, str] = self._field("sha256", dict)
        if self.num_documents == 0:
            raise DataFormatError(f"{self.folder}: holds no document; tokenize a corpus that is not empty")
        self.dtype, self.lengths, offsets = self._open_idx()
        last_byte = int(offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        bin_path = self.folder / TOKENS_BIN
        _check_size(bin_path, last_byte, f"the end of the last document in {TOKENS_IDX}")
        if last_byte != self.num_tokens * self.dtype.itemsize:
            raise DataFormatError(
                f"{self.folder / TOKENS_IDX}: describes {last_byte // self.dtype.itemsize} tokens, the manifest {self.num_tokens}; "
                "the two do not belong together"
            )
        self.tokens = np.frombuffer(_map(bin_path), dtype=self.dtype)
        self._offsets = offsets

    def start(self, document: int) -> int:
        """Position of a document's first token in `tokens`."""
        return int(self._offsets[document]) // self.dtype.itemsize

    def starts(self, documents: np.ndarray) -> np.ndarray:
        """Positions in `tokens` of the first tokens of several documents: int64, same shape."""
        starts: np.ndarray = self._offsets[documents] // self.dtype.itemsize
        return starts

    def document(self, number: int) -> np.ndarray:
        """Ids of one document: (tokens,), a read-only view of the file."""
        start = self.start(number)
        return self.tokens[start : start + int(self.lengths[number])]

    def verify(self) -> None:
        """Read both files whole and compare them with the manifest's SHA-256. Raises DataFormatError if one differs."""
        for name in (TOKENS_BIN, TOKENS_IDX):
            check_digest(self.folder / name, self.file_digests.get(name))

    def _field(self, name: str, kind: type) -> Any:
        return manifest_field(self.folder, self.manifest, name, kind)

    def _open_idx(self) -> tuple[np.dtype, np.ndarray, np.ndarray]:
        path = self.folder / TOKENS_IDX
        _check_size(path, _HEADER_BYTES + 12 * self.num_documents + 8 * (self.num_documents + 1), f"{self.num_documents} documents")
        content = _map(path)
        version, code, num_sequences, num_borders = struct.unpack_from("<QBQQ", content, len(_MAGIC))
        dtype: np.dtype | None = next((dtype for dtype, known in _DTYPE_CODES.items() if known == code), None)
        if content[: len(_MAGIC)] != _MAGIC or version != 1 or dtype is None:
            raise DataFormatError(f"{path}: not an index of version 1 with uint16 or int32 ids")
        if (num_sequences, num_borders) != (self.num_documents, self.num_documents + 1):
            raise DataFormatError(
                f"{path}: describes {num_sequences} sequences in {num_borders - 1} documents, the manifest {self.num_documents} documents "
                "of one sequence each; the two do not belong together"
            )
        if dtype != token_dtype(self.vocab_size):
            raise DataFormatError(f"{path}: {dtype} ids, expected {token_dtype(self.vocab_size)} for a vocabulary of {self.vocab_size}")
        lengths = np.frombuffer(content, dtype=np.int32, count=num_sequences, offset=_HEADER_BYTES)
        offsets = np.frombuffer(content, dtype=np.int64, count=num_sequences, offset=_HEADER_BYTES + lengths.nbytes)
        return dtype, lengths, offsets


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, expected: str | None) -> None:
    """Raise DataFormatError unless the SHA-256 of the file is `expected`."""
    if not path.is_file():
        raise DataFormatError(f"{path}: missing; write the folder again")
    found = file_digest(path)
    if found != expected:
        raise DataFormatError(
            f"{path}: SHA-256 {found[:12]}..., the manifest says {str(expected)[:12]}...; the file changed after it was written"
        )


def _check_size(path: Path, expected: int, described_by: str) -> None:
    if not path.is_file():
        raise DataFormatError(f"{path}: missing; tokenize again")
    size = path.stat().st_size
    if size != expected:
        state = "cut short" if size < expected else "too long"
        raise DataFormatError(f"{path}: {state}, {size:,} bytes where {expected:,} are expected for {described_by}")


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
