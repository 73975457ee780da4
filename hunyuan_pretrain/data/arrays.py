"""Checks of what a data folder holds: numpy arrays, the mask of targets, the pad id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hunyuan_pretrain.data.digests import check_size
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import MANIFEST


def load_array(path: Path, shape: tuple[int, ...], *dtypes: type[np.integer]) -> np.ndarray:
    """A memory-mapped .npy. Raises DataFormatError if it is missing, unreadable, or has another shape or none of
    `dtypes`."""
    if not path.is_file():
        raise DataFormatError(f"{path}: missing; write the folder again")
    try:
        array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # numpy parses the header as Python, which can fail in many ways
        raise DataFormatError(f"{path}: not readable as a numpy array ({error}); write the folder again") from None
    if array.shape != shape or array.dtype not in dtypes:
        expected = " x ".join(f"{size:,}" for size in shape)
        types = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise DataFormatError(
            f"{path}: {array.dtype} of shape {array.shape}, the manifest describes {expected} integers "
            f"({types}); write the folder again"
        )
    return array


def check_pad_id(folder: Path, pad_id: int, vocab_size: int) -> None:
    """Raise DataFormatError unless the pad id is one of the vocabulary."""
    if pad_id >= vocab_size:
        raise DataFormatError(
            f"{folder / MANIFEST}: pad_id is {pad_id}, but the vocabulary has the ids 0 to {vocab_size - 1}; "
            "write it again"
        )


PAIRS = "pairs"
"""Entry of a manifest's `chat`: each document is a pair of conversations, one after the other."""
IS_TARGET, OF_REJECTED = 1, 2
"""Bits of a token's byte in a mask of targets: it is trained on; it belongs to the second conversation of a pair."""


def load_targets(path: Path, num_tokens: int) -> np.ndarray:
    """A memory-mapped mask of targets, (tokens,) uint8: IS_TARGET for each token that is trained on, in pairs also
    OF_REJECTED. Raises DataFormatError if it is missing or cut short."""
    check_size(path, num_tokens, f"a byte for each of {num_tokens:,} tokens")
    return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray) if num_tokens else np.zeros(0, dtype=np.uint8)


def flush_and_close(file: BinaryIO) -> None:
    """Close a file whose content is on disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
