"""Tokenized folders to a packed dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import MANIFEST, new_folder
from hunyuan_pretrain.data.indexed import TokenizedDataset
from hunyuan_pretrain.data.packed_format import check_sources, write_packed
from hunyuan_pretrain.data.packing import pack_documents


def pack(tokenized: Sequence[str], sequence_length: int, output: str, *, seed: int, overwrite: bool = False) -> dict[str, Any]:
    """Pack the documents of tokenized folders into sequences of `sequence_length` tokens; returns the manifest.

    The same folders and seed give the same bytes. Raises DataFormatError if a folder is damaged, or if two were tokenized differently.
    """
    if sequence_length < 2:
        raise DataFormatError(f"--sequence-length {sequence_length}: must be at least 2, a token and the one it predicts")
    sources = [TokenizedDataset(folder) for folder in tokenized]
    check_sources(sources)
    for source in sources:
        for shard in source.shards:
            shard.check_index()
    with new_folder(output, marker=MANIFEST, overwrite=overwrite) as folder:
        packing = pack_documents(np.concatenate([source.lengths for source in sources]), sequence_length, seed)
        return write_packed(folder, packing, sources, seed)
