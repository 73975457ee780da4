"""Packs tokenized folders into a packed dataset."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from data_tools.progress import ProgressReport
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import new_folder
from hunyuan_pretrain.data.indexed import TokenizedDataset
from hunyuan_pretrain.data.packed_format import MAX_SEQUENCE_LENGTH, PACKED_FILES, check_sources, write_packed
from hunyuan_pretrain.data.packing import PackingMethod, pack_documents


def pack(
    tokenized: Sequence[str],
    sequence_length: int,
    output: str,
    *,
    seed: int,
    method: PackingMethod = "best_fit",
    min_fragment_tokens: int = 1,
    min_document_tokens: int = 1,
    max_document_tokens: int | None = None,
    materialize: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Pack the documents of tokenized folders into sequences of `sequence_length` tokens; returns the manifest.

    Documents shorter than `min_document_tokens` or longer than `max_document_tokens` are left out, so that long
    documents can be packed separately and mixed by weight. `materialize` copies the tokens, so that each sequence is
    one contiguous read. The same folders and options give identical bytes. Raises DataFormatError for an invalid
    option, if a folder is damaged, if two were tokenized differently, or if no document is left to pack.
    """
    if sequence_length < 2:
        raise DataFormatError(f"--sequence-length {sequence_length}: must be at least 2, for a token and its label")
    if sequence_length > MAX_SEQUENCE_LENGTH:
        raise DataFormatError(f"--sequence-length {sequence_length}: must be at most {MAX_SEQUENCE_LENGTH}")
    if max_document_tokens is not None and max_document_tokens < min_document_tokens:
        raise DataFormatError(
            f"--max-document-tokens {max_document_tokens}: less than --min-document-tokens {min_document_tokens}"
        )
    sources = [TokenizedDataset(folder) for folder in tokenized]
    check_sources(sources)
    for source in sources:
        for shard in source.shards:
            shard.check_index()
    lengths = np.concatenate([source.lengths for source in sources])
    is_wanted = lengths >= min_document_tokens
    if max_document_tokens is not None:
        is_wanted &= lengths <= max_document_tokens
    if not is_wanted.any():
        raise DataFormatError(
            f"{', '.join(map(str, tokenized))}: no document has {min_document_tokens} "
            f"{f'to {max_document_tokens}' if max_document_tokens else 'or more'} tokens; they have "
            f"{lengths.min()} to {lengths.max()}"
        )
    lengths[~is_wanted] = 0  # empty documents are not packed
    with new_folder(output, files=PACKED_FILES, overwrite=overwrite) as folder:
        packing = pack_documents(lengths, sequence_length, seed, method, min_fragment_tokens)
        options = {
            "method": method,
            "min_fragment_tokens": min_fragment_tokens,
            "min_document_tokens": min_document_tokens,
            "max_document_tokens": max_document_tokens,
            "left_out_documents": int(len(lengths) - is_wanted.sum()),
        }
        num_tokens = int(packing.piece_length.sum(dtype=np.int64))
        with ProgressReport("copying tokens", num_tokens) as progress:
            advance = partial(progress.advance, note=f"{num_tokens:,} tokens")
            return write_packed(folder, packing, sources, seed, options, materialize=materialize, advance=advance)
