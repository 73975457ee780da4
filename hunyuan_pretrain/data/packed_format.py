"""The packed dataset on disk: an index over tokenized folders. No token is copied, so packing again to another length
is cheap.

Beside manifest.json, a packed folder holds numpy arrays: `sequence_offsets` (sequences + 1,); per piece,
`piece_document`, `piece_start` and `piece_length` (see `packing.Packing`); and per sequence, `squared_lengths` and
`cost_order` (see `balance`). Documents are numbered over the tokenized folders in the order of the manifest's
`sources`, as uint32, or as int64 from 2^32 documents on. Their paths are relative to the packed folder, and they are
identified by their digests. How the folder is written, in groups that are packed one by one: `packed_groups`.

A materialized folder also holds the tokens in `tokens.bin`: the pieces concatenated in the order of the sequences,
without padding. `sequence_starts` (sequences + 1,) is where each sequence begins in it. `next_tokens` is, per piece,
the document's token after the piece, -1 if there is none. A sequence is then one contiguous read, and the sources are
needed only to say where a document comes from. A materialized folder of conversations has their masks in `targets.bin`,
a byte for each token of `tokens.bin`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_pretrain.data.arrays import PAIRS, check_pad_id, load_array, load_targets
from hunyuan_pretrain.data.digests import check_digest, check_size
from hunyuan_pretrain.data.epochs import NO_LIMIT, Selection
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import MANIFEST, manifest_field, read_manifest
from hunyuan_pretrain.data.indexed import TokenizedDataset, TokenizedShard, token_dtype

TOKENS, TARGETS = "tokens.bin", "targets.bin"
_PIECES_AT_A_TIME = 1 << 16
PACKED_FORMAT, PACKED_VERSION = "hunyuan-packed", 3
ARRAYS = ("sequence_offsets", "piece_document", "piece_start", "piece_length")
ARRAYS_OF_COSTS = ("squared_lengths", "cost_order")
ARRAYS_OF_TOKENS = ("sequence_starts", "next_tokens")
PACKED_FILES = (MANIFEST, TOKENS, TARGETS, *(f"{name}.npy" for name in (*ARRAYS, *ARRAYS_OF_COSTS, *ARRAYS_OF_TOKENS)))
"""Names of all files that a packed folder can contain."""
MAX_SEQUENCE_LENGTH = 1 << 24


def check_sources(sources: Sequence[TokenizedDataset]) -> None:
    """Raise DataFormatError unless all sources were tokenized with the same tokenizer, conversations with the same
    system prompt, and none is given twice, not even as a copy."""
    first = sources[0]
    seen: dict[str, Path] = {}
    for source in sources:
        if source.tokenizer_digest != first.tokenizer_digest:
            raise DataFormatError(
                f"{source.folder}: tokenizer {source.tokenizer_digest[:12]}..., but {first.folder} has "
                f"{first.tokenizer_digest[:12]}...; "
                "all sources of a packed dataset must be tokenized with one tokenizer"
            )
        if source.digest in seen:
            other = seen[source.digest]
            copy = (
                "given twice"
                if source.folder.resolve() == other.resolve()
                else f"given twice ({other} has the same documents)"
            )
            raise DataFormatError(
                f"{source.folder}: {copy}; its documents would be trained on twice as often (use a weight for that)"
            )
        seen[source.digest] = source.folder
        if (source.chat is None) != (first.chat is None):
            chats, texts = (source, first) if source.chat is not None else (first, source)
            raise DataFormatError(
                f"{chats.folder} holds conversations, {texts.folder} texts; pack them apart, as two sources of a stage"
            )
        if source.is_pairs != first.is_pairs:
            pairs, chats = (source, first) if source.is_pairs else (first, source)
            raise DataFormatError(
                f"{pairs.folder} holds pairs, {chats.folder} conversations; pack them apart, for stages of two runs"
            )
        if source.chat != first.chat:
            raise DataFormatError(
                f"{source.folder}: conversations tokenized with {source.chat}, those of {first.folder} with "
                f"{first.chat}; tokenize them alike, or pack them apart, as two sources of a stage"
            )


def packed_manifest(
    folder: Path,
    sources: Sequence[TokenizedDataset],
    packed: Mapping[str, Any],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a packed folder, which must lie where it will stay, or beside it.

    `packed`: its entries about how it was packed and what it holds. `digests`: SHA-256 of its files by name.
    """
    return {
        "format": PACKED_FORMAT,
        "version": PACKED_VERSION,
        **packed,
        "vocab_size": sources[0].vocab_size,
        "pad_id": sources[0].pad_id,
        "tokenizer_digest": sources[0].tokenizer_digest,
        **({"chat": sources[0].chat} if sources[0].chat is not None else {}),
        "sources": [
            {
                "path": Path(os.path.relpath(source.folder.resolve(), folder.resolve())).as_posix(),
                "documents": source.num_documents,
                "tokens": source.num_tokens,
                "digest": source.digest,
            }
            for source in sources
        ],
        "sha256": dict(digests),
    }


class PackedIndex:
    """A packed folder, memory-mapped, with its sources. Opening reads manifests only, whatever the number of documents;
    shards are mapped when they are read.

    Raises DataFormatError if a file of the folder is missing, cut short or of another kind, or if a source is not the
    one that was packed; on first use, if a shard is damaged (see `TokenizedShard`).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, PACKED_FORMAT, PACKED_VERSION, "hunyuan-data pack")
        self.sequence_length: int = self._field("sequence_length", int)
        self.num_sequences: int = self._field("sequences", int)
        self.num_tokens: int = self._field("tokens", int)
        self.vocab_size: int = self._field("vocab_size", int)
        self.pad_id: int = self._field("pad_id", int)
        self.tokenizer_digest: str = self._field("tokenizer_digest", str)
        num_pieces: int = self._field("pieces", int)
        self.num_documents: int = self._field("documents", int)
        """Documents of all sources."""
        options = {"left_out_documents": 0, **self._field("options", dict)}
        self.packed_documents: int = self.num_documents - manifest_field(
            self.folder, options, "left_out_documents", int
        )
        """Documents of the sources that were packed."""
        self.cut_documents: int = self._field("cut_documents", int)
        """Packed documents that are not in one piece."""
        self.padding_tokens: int = self._field("padding_tokens", int)
        self.is_chat = "chat" in self.manifest
        """Whether the documents are conversations, of which only marked tokens are trained on."""
        self.is_pairs = self.is_chat and bool(manifest_field(self.folder, self.manifest, "chat", dict).get(PAIRS))
        """Whether each piece is a pair of conversations, the chosen and then the rejected one."""
        self._check_counts()
        self.sequence_offsets = self._array("sequence_offsets", self.num_sequences + 1, np.int64)
        self.piece_document = self._array("piece_document", num_pieces, np.uint32, np.int64)
        self.piece_start = self._array("piece_start", num_pieces, np.uint16, np.int32)
        self.piece_length = self._array("piece_length", num_pieces, np.uint16, np.int32)
        self.squared_lengths = self._array("squared_lengths", self.num_sequences, np.int64)
        self.cost_order = self._array("cost_order", self.num_sequences, np.uint32)
        self.is_materialized: bool = bool(self.manifest.get("materialized"))
        if self.is_materialized:
            self.sequence_starts = self._array("sequence_starts", self.num_sequences + 1, np.int64)
            self.next_tokens = self._array("next_tokens", num_pieces, np.int32)
            dtype = token_dtype(self.vocab_size)
            check_size(self.folder / TOKENS, self.num_tokens * dtype.itemsize, f"{self.num_tokens:,} tokens")
            self.tokens = np.memmap(self.folder / TOKENS, dtype=dtype, mode="r").view(np.ndarray)
            self.targets = load_targets(self.folder / TARGETS, self.num_tokens) if self.is_chat else None
        if self.sequence_offsets[0] != 0 or self.sequence_offsets[-1] != num_pieces:
            raise DataFormatError(
                f"{self.folder / 'sequence_offsets.npy'}: does not belong to the other files; pack again"
            )
        if not self.is_materialized and not self.sources:
            raise DataFormatError(f"{self.folder / MANIFEST}: names no source; pack again")

    @property
    def system_prompt(self) -> str | None:
        """Of conversations without a system message, "" for none; None for texts. Raises DataFormatError."""
        if not self.is_chat:
            return None
        return str(manifest_field(self.folder, self._field("chat", dict), "system_prompt", str))

    @cached_property
    def most_pieces(self) -> int:
        """Pieces of the sequence that has most of them. Counted if the manifest is older than the entry."""
        if "most_pieces" in self.manifest:
            return int(self._field("most_pieces", int))
        offsets, step = self.sequence_offsets, _PIECES_AT_A_TIME
        return max(int(np.diff(offsets[start : start + step + 1]).max()) for start in range(0, len(offsets) - 1, step))

    @cached_property
    def sources(self) -> list[TokenizedDataset]:
        """The tokenized folders. Those of a materialized folder are opened only on access, and may be missing."""
        return [self._open_source(entry) for entry in self._field("sources", list)]

    @cached_property
    def shards(self) -> list[TokenizedShard]:
        """The shards of all sources."""
        return [shard for source in self.sources for shard in source.shards]

    @property
    def read_shards(self) -> list[TokenizedShard]:
        """The shards that sequences are read from: none if the tokens were copied."""
        return [] if self.is_materialized else self.shards

    @cached_property
    def first_documents(self) -> np.ndarray:
        """(shards + 1,) int64, number of each shard's first document, over all sources."""
        return np.cumsum([0] + [shard.num_documents for shard in self.shards])

    @cached_property
    def selections(self) -> tuple[Selection, ...]:
        """Which documents of which tokenized folders were packed, as recorded in the manifest."""
        options = {"min_document_tokens": 1, **self._field("options", dict)}
        shortest, longest = manifest_field(self.folder, options, "min_document_tokens", int), NO_LIMIT
        if options.get("max_document_tokens") is not None:
            longest = manifest_field(self.folder, options, "max_document_tokens", int)
        found = []
        for entry in self._field("sources", list):
            digest = manifest_field(self.folder, entry, "digest", str)
            folder = os.path.normpath(self.folder.resolve() / manifest_field(self.folder, entry, "path", str))
            found.append(Selection(digest, folder, shortest, longest))
        return tuple(found)

    def holds(self, selection: Selection) -> bool:
        """Whether `selection`, a part of `selections`, contains a packed document. True if the lengths are no longer
        available, for a materialized folder."""
        try:
            shards = next((source.shards for source in self.sources if source.digest == selection.corpus), [])
        except DataFormatError:
            if not self.is_materialized:
                raise
            return True
        return any(
            ((selection.shortest <= shard.lengths) & (shard.lengths <= selection.longest)).any() for shard in shards
        )

    def locate(self, document: int) -> tuple[TokenizedDataset, int]:
        """(tokenized folder, number within it) of a document, numbered over all sources as in the pieces."""
        for source in self.sources:
            if document < source.num_documents:
                return source, document
            document -= source.num_documents
        raise DataFormatError(f"{self.folder / 'piece_document.npy'}: names a document beyond the last one; pack again")

    def digests(self) -> dict[Path, str | None]:
        """SHA-256 of every file of the folder and, unless it is materialized, of its sources, as recorded in the
        manifests."""
        arrays = (*ARRAYS, *ARRAYS_OF_COSTS, *(ARRAYS_OF_TOKENS if self.is_materialized else ()))
        known: dict[str, str] = self._field("sha256", dict)
        copied = [TOKENS, *([TARGETS] if self.is_chat else [])] if self.is_materialized else []
        names = [*copied, *(f"{name}.npy" for name in arrays)]
        digests = {self.folder / name: known.get(name) for name in names}
        for source in [] if self.is_materialized else self.sources:
            digests |= source.digests()
        return digests

    def verify(self) -> None:
        """Compare every file of `digests` with its SHA-256. Raises DataFormatError if one differs."""
        for file, digest in self.digests().items():
            check_digest(file, digest)

    def _field(self, name: str, kind: type) -> Any:
        return manifest_field(self.folder, self.manifest, name, kind)

    def _array(self, name: str, size: int, *dtypes: type[np.integer]) -> np.ndarray:
        return load_array(self.folder / f"{name}.npy", (size,), *dtypes)

    def _check_counts(self) -> None:
        if not self.num_documents >= self.packed_documents >= max(self.cut_documents, 1):
            raise DataFormatError(
                f"{self.folder / MANIFEST}: of {self.num_documents} documents {self.packed_documents} packed and "
                f"{self.cut_documents} cut; "
                "pack again"
            )
        if not (self.num_sequences and self.num_tokens and 0 < self.sequence_length <= MAX_SEQUENCE_LENGTH):
            raise DataFormatError(
                f"{self.folder / MANIFEST}: {self.num_tokens} tokens in {self.num_sequences} sequences of "
                f"{self.sequence_length} tokens "
                f"each, which must be 1 to {MAX_SEQUENCE_LENGTH}; pack again"
            )
        check_pad_id(self.folder, self.pad_id, self.vocab_size)

    def _open_source(self, entry: Any) -> TokenizedDataset:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise DataFormatError(f"{self.folder / MANIFEST}: a source without a path; pack again")
        # a folder has the same name, whichever packed folder refers to it
        folder = os.path.normpath(self.folder.resolve() / entry["path"])
        if not os.path.isdir(folder):
            raise DataFormatError(
                f"{self.folder}: packed from the tokenized folder {entry['path']}, but {folder} does not exist; move a "
                "packed folder "
                "together with what it was packed from, or pack it with --materialize"
            )
        source = TokenizedDataset(folder, check_shards=False)
        if source.digest != entry.get("digest"):
            raise DataFormatError(
                f"{source.folder}: was tokenized again after {self.folder} was packed from it; pack again"
            )
        return source
