"""A tokenized corpus on disk: shards in Megatron's indexed format, one document per sequence, and a manifest.

A tokenized folder holds `manifest.json` and, for each shard, `shard_00000.bin` (all ids concatenated),
`shard_00000.idx` (where each document is) and `shard_00000.origin.npy` (where each document comes from). The first two
are byte-identical to what megatron-core's IndexedDatasetBuilder writes, so its tools read them as they are. Layout of
the .idx, little endian: "MMIDIDX\\0\\0", version 1 (u64), code of the id type (u8), number of sequences n (u64), number
of document boundaries (u64), lengths in tokens (i32 x n), byte offsets in the .bin (i64 x n), document boundaries 0..n
(i64 x n+1). Shards of conversations also have `shard_00000.targets`: a byte for each token, 1 if it is trained on.

Documents are numbered over the shards in shard order, which is the order of the corpus.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import reprlib
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_pretrain.data.arrays import PAIRS, check_pad_id, flush_and_close, load_array, load_targets
from hunyuan_pretrain.data.digests import check_digest, check_size, digest_of, file_digest
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import MANIFEST, manifest_field, read_manifest

TOKENIZED_FORMAT, TOKENIZED_VERSION = "hunyuan-tokenized", 2
MAX_DOCUMENT_TOKENS = 2**31 - 1
MAX_MAPPED_SHARDS = 256
"""Shards whose files a process keeps mapped, over all folders: two file handles each."""

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = len(_MAGIC) + 8 + 1 + 8 + 8
_DTYPE_CODES: dict[np.dtype, int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype:
    """The id type of a vocabulary: uint16 below 65,500 ids, else int32 (megatron's rule)."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def shard_files(name: str) -> tuple[str, str, str]:
    """Names of the three files of a shard: ids, index, origins."""
    return f"{name}.bin", f"{name}.idx", f"{name}.origin.npy"


def targets_file(name: str) -> str:
    """Name of the mask of a shard of conversations."""
    return f"{name}.targets"


class ShardWriter:
    """Writes the ids of a shard as documents come, and everything else at the end. Memory: 20 bytes per document.

    has_targets: the documents are conversations, and `add` gets their targets too.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int, has_targets: bool = False) -> None:
        self.dtype = token_dtype(vocab_size)
        self.name = name
        self.num_tokens = 0
        self._folder = folder
        self._lengths = array("i")
        self._origins = array("q")
        self._bin = (folder / shard_files(name)[0]).open("wb")
        self._bin_digest = hashlib.sha256()
        self._targets = (folder / targets_file(name)).open("wb") if has_targets else None

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def add(
        self, tokens: np.ndarray, lengths: np.ndarray, origins: np.ndarray, targets: np.ndarray | None = None
    ) -> None:
        """Append documents.

        `tokens` (sum(lengths),): their ids, concatenated. `lengths` (documents,): their lengths. `origins` (documents,
        2): for each, its file as an index into the manifest's `files`, and its position there (byte offset of a line,
        or row). `targets` (sum(lengths),): whether each token is trained on, for conversations.
        """
        assert int(lengths.sum()) == len(tokens), "lengths do not add up to the tokens"
        if self._targets is not None:
            assert targets is not None, "conversations need targets"
            self._targets.write(np.ascontiguousarray(targets, dtype=np.uint8).data)
        self._write(tokens)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._origins.frombytes(origins.astype(np.int64).tobytes())
        self.num_tokens += len(tokens)

    def add_in_parts(self, parts: Iterable[np.ndarray], origin: tuple[int, int]) -> int:
        """Append one document whose ids come in parts, and return its length in tokens. If `parts` raises, the document
        is undone.

        Raises DataFormatError if the document is longer than the format allows.
        """
        begin, digest, length = self._bin.tell(), self._bin_digest.copy(), 0
        try:
            for tokens in parts:
                length += len(tokens)
                if length > MAX_DOCUMENT_TOKENS:
                    raise DataFormatError(
                        f"a document of more than {MAX_DOCUMENT_TOKENS:,} tokens, the limit of the format"
                    )
                self._write(tokens)
        except BaseException:
            self._bin.truncate(begin)
            self._bin.seek(begin)
            self._bin_digest = digest
            raise
        self._lengths.append(length)
        self._origins.extend(origin)
        self.num_tokens += length
        return length

    def finish(self) -> dict[str, Any]:
        """Write the index and the origins, flush everything to disk, and return the shard's manifest entry."""
        bin_name, idx_name, origin_name = shard_files(self.name)
        flush_and_close(self._bin)
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:], dtype=np.int64)
        offsets *= self.dtype.itemsize
        boundaries = np.arange(len(lengths) + 1, dtype=np.int64)
        header = _MAGIC + struct.pack("<QBQQ", 1, _DTYPE_CODES[self.dtype], len(lengths), len(boundaries))
        idx = (self._folder / idx_name).open("wb")
        for part in (header, lengths.data, offsets.data, boundaries.data):
            idx.write(part)
        flush_and_close(idx)
        origins = (self._folder / origin_name).open("wb")
        np.save(origins, np.frombuffer(self._origins, dtype=np.int64).reshape(-1, 2))
        flush_and_close(origins)
        written = [idx_name, origin_name]
        if self._targets is not None:
            flush_and_close(self._targets)
            written.append(targets_file(self.name))
        digests = {name: file_digest(self._folder / name) for name in written}
        return {
            "name": self.name,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "sha256": {bin_name: self._bin_digest.hexdigest(), **digests},
        }

    def close(self) -> None:
        """Close the file without finishing; harmless after `finish`."""
        self._bin.close()
        if self._targets is not None:
            self._targets.close()

    def _write(self, tokens: np.ndarray) -> None:
        # the encoder's ids are uint32; none is 2^31 or more, so as int32 they have the same bytes
        same_bytes = tokens.dtype == np.uint32 and self.dtype == np.int32
        content = np.ascontiguousarray(
            tokens.view(np.int32) if same_bytes else tokens.astype(self.dtype, copy=False)
        ).data
        self._bin.write(content)
        self._bin_digest.update(content)


class TokenizedShard:
    """Documents of one shard. Its files are mapped and checked on first use, or by `check`; until then none is opened.

    A process keeps only the `MAX_MAPPED_SHARDS` used last mapped, because a map holds a file handle. Raises
    DataFormatError, when the files are mapped, if one is missing, cut short or does not belong to the others.
    """

    def __init__(self, folder: Path, entry: dict[str, Any], vocab_size: int) -> None:
        self.folder, self.name = folder, str(manifest_field(folder, entry, "name", str))
        if not re.fullmatch(r"[\w-]{1,100}", self.name):
            raise DataFormatError(
                f"{folder / MANIFEST}: {reprlib.repr(self.name)} is not the name of a shard; tokenize again"
            )
        self.num_documents: int = manifest_field(folder, entry, "documents", int)
        self.num_tokens: int = manifest_field(folder, entry, "tokens", int)
        self.file_digests: dict[str, str] = manifest_field(folder, entry, "sha256", dict)
        self._bin_name, self._idx_name, self._origin_name = shard_files(self.name)
        self.has_targets = targets_file(self.name) in self.file_digests
        self.dtype, self._vocab_size = token_dtype(vocab_size), vocab_size

    @property
    def tokens(self) -> np.ndarray:
        """(tokens,) all ids, in the id type of the vocabulary."""
        return _mapped(self).tokens

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) int32, tokens of each document."""
        return _mapped(self).lengths

    @property
    def targets(self) -> np.ndarray | None:
        """(tokens,) uint8, 1 for each token that is trained on; None unless the documents are conversations."""
        return _mapped(self).targets

    def check(self) -> None:
        """Map the files, which checks their sizes and the header of the index."""
        _mapped(self)

    def start(self, document: int) -> int:
        """Position of a document's first token in `tokens`."""
        return int(_mapped(self).offsets[document]) // self.dtype.itemsize

    def document(self, number: int) -> np.ndarray:
        """Ids of one document: (tokens,), a read-only view. Raises DataFormatError if the index points beyond it."""
        start, length = self.start(number), int(self.lengths[number])
        if not 0 <= start <= start + length <= self.num_tokens:
            raise DataFormatError(
                f"{self.folder / self._idx_name}: document {number} would be tokens {start} to {start + length} "
                f"of {self.num_tokens}; the file changed after it was written"
            )
        return self.tokens[start : start + length]

    def origin(self, document: int) -> tuple[int, int]:
        """Where a document comes from: (index into the manifest's `files`, byte offset of a line or row there)."""
        origins = load_array(self.folder / self._origin_name, (self.num_documents, 2), np.int64)
        return tuple(origins[document].tolist())

    def check_index(self) -> None:
        """Compare the index with its SHA-256. Raises DataFormatError if it differs."""
        check_digest(self.folder / self._idx_name, self.file_digests.get(self._idx_name))

    def digests(self) -> dict[Path, str | None]:
        """SHA-256 of the shard's files, as recorded in the manifest."""
        names = (*shard_files(self.name), *((targets_file(self.name),) if self.has_targets else ()))
        return {self.folder / name: self.file_digests.get(name) for name in names}

    def map_files(self) -> _MappedShard:
        """Map the files, after checks. Use `tokens`, `lengths` and `start`, which keep maps."""
        lengths, offsets = self._open_idx()
        path = self.folder / self._bin_name
        last_byte = int(offsets[-1]) + int(lengths[-1]) * self.dtype.itemsize if self.num_documents else 0
        check_size(path, last_byte, f"the end of the last document in {self._idx_name}")
        if last_byte != self.num_tokens * self.dtype.itemsize:
            raise DataFormatError(
                f"{self.folder / self._idx_name}: describes {last_byte // self.dtype.itemsize} tokens, the manifest "
                f"{self.num_tokens}; the two do not belong together"
            )
        targets = load_targets(self.folder / targets_file(self.name), self.num_tokens) if self.has_targets else None
        tokens = np.frombuffer(_map(path) if last_byte else b"", dtype=self.dtype)
        return _MappedShard(tokens, lengths, offsets, targets)

    def _open_idx(self) -> tuple[np.ndarray, np.ndarray]:
        path = self.folder / self._idx_name
        check_size(
            path,
            _HEADER_BYTES + 12 * self.num_documents + 8 * (self.num_documents + 1),
            f"{self.num_documents} documents",
        )
        content = _map(path)
        version, code, num_sequences, num_boundaries = struct.unpack_from("<QBQQ", content, len(_MAGIC))
        dtype: np.dtype | None = next((dtype for dtype, known in _DTYPE_CODES.items() if known == code), None)
        if content[: len(_MAGIC)] != _MAGIC or version != 1 or dtype is None:
            raise DataFormatError(f"{path}: not an index of version 1 with uint16 or int32 ids")
        if (num_sequences, num_boundaries) != (self.num_documents, self.num_documents + 1):
            raise DataFormatError(
                f"{path}: describes {num_sequences} sequences in {num_boundaries - 1} documents, the manifest "
                f"{self.num_documents} documents of one sequence each; the two do not belong together"
            )
        if dtype != self.dtype:
            raise DataFormatError(
                f"{path}: {dtype} ids, expected {self.dtype} for a vocabulary of {self._vocab_size}; tokenize again"
            )
        lengths = np.frombuffer(content, dtype=np.int32, count=num_sequences, offset=_HEADER_BYTES)
        offsets = np.frombuffer(content, dtype=np.int64, count=num_sequences, offset=_HEADER_BYTES + lengths.nbytes)
        return lengths, offsets


@dataclass(frozen=True)
class _MappedShard:
    """Views of a shard's files, valid for as long as anyone holds them: tokens; lengths; offsets in bytes, int64;
    targets, if it has them."""

    tokens: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray | None


@lru_cache(maxsize=MAX_MAPPED_SHARDS)
def _mapped(shard: TokenizedShard) -> _MappedShard:
    # by object, not by path: a folder that was written again is opened as new shards
    return shard.map_files()


@dataclass(frozen=True)
class Origin:
    """Where a document comes from."""

    path: str
    """File of the corpus."""
    position: int
    """Byte offset of its line in a JSON lines file (before compression), row in a parquet file, else 0."""


class TokenizedDataset:
    """The shards of a tokenized folder.

    Raises DataFormatError if a file is missing, cut short or does not belong to the others: at opening, or with
    `check_shards=False` when a shard is first used. Opening then reads the manifest only.
    """

    def __init__(self, folder: str | Path, *, check_shards: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, TOKENIZED_FORMAT, TOKENIZED_VERSION, "hunyuan-data tokenize")
        self.num_documents: int = self._field("documents", int)
        self.num_tokens: int = self._field("tokens", int)
        self.vocab_size: int = self._field("vocab_size", int)
        self.pad_id: int = self._field("pad_id", int)
        self.tokenizer_digest: str = self._field("tokenizer_digest", str)
        self.chat: dict[str, Any] | None = self.manifest.get("chat")
        """How conversations were encoded; None if the documents are texts."""
        self.is_pairs = bool((self.chat or {}).get(PAIRS))
        if self.num_documents == 0:
            raise DataFormatError(f"{self.folder}: holds no document; tokenize a corpus that is not empty")
        check_pad_id(self.folder, self.pad_id, self.vocab_size)
        self.shards = [TokenizedShard(self.folder, entry, self.vocab_size) for entry in self._field("shards", list)]
        self.first_documents = np.cumsum([0] + [shard.num_documents for shard in self.shards])
        """(shards + 1,) int64, number of each shard's first document."""
        for shard in self.shards if check_shards else []:
            shard.check()
        found = int(self.first_documents[-1]), sum(shard.num_tokens for shard in self.shards)
        if found != (self.num_documents, self.num_tokens):
            raise DataFormatError(
                f"{self.folder}: its shards hold {found[0]} documents and {found[1]} tokens, its manifest says "
                f"{self.num_documents} and {self.num_tokens}; tokenize again"
            )

    @property
    def dtype(self) -> np.dtype:
        """Type of the ids on disk."""
        return token_dtype(self.vocab_size)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(documents,) int32, tokens of every document."""
        return lengths_of(self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the digests of all shards. It identifies the tokenized corpus."""
        return digest_of([shard.file_digests for shard in self.shards])

    def locate(self, document: int) -> tuple[TokenizedShard, int]:
        """(shard, number within it) of a document."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        shard = int(np.searchsorted(self.first_documents, document, side="right")) - 1
        return self.shards[shard], document - int(self.first_documents[shard])

    def document(self, number: int) -> np.ndarray:
        """Ids of one document: (tokens,), a read-only view of the file."""
        shard, within = self.locate(number)
        return shard.document(within)

    def origin(self, document: int) -> Origin:
        """Where a document comes from."""
        shard, within = self.locate(document)
        file, position = shard.origin(within)
        files = self._field("files", list)
        if not 0 <= file < len(files):
            raise DataFormatError(
                f"{self.folder}: document {document} comes from file {file}, but the manifest lists {len(files)}"
            )
        return Origin(str(files[file]), position)

    def digests(self) -> dict[Path, str | None]:
        """SHA-256 of every file, as recorded in the manifest."""
        return {file: digest for shard in self.shards for file, digest in shard.digests().items()}

    def verify(self) -> None:
        """Read every file and compare it with its SHA-256. Raises DataFormatError if one differs."""
        for file, digest in self.digests().items():
            check_digest(file, digest)

    def _field(self, name: str, kind: type) -> Any:
        return manifest_field(self.folder, self.manifest, name, kind)


def lengths_of(shards: Sequence[TokenizedShard]) -> np.ndarray:
    """(documents,) int32, tokens of every document of the shards: a copy, made shard by shard."""
    lengths = np.empty(sum(shard.num_documents for shard in shards), dtype=np.int32)
    filled = 0
    for shard in shards:  # a list of views would keep all of them mapped
        lengths[filled : filled + shard.num_documents] = shard.lengths
        filled += shard.num_documents
    return lengths


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
