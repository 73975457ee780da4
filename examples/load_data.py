"""Read a packed dataset: its sequences, the documents in them, and what counts in the loss.

python examples/load_data.py demo_out/packed/train demo_out/tokenizer
"""

from __future__ import annotations

import sys
from itertools import pairwise

from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.tokenizer import Tokenizer


def main(data: str, tokenizer_folder: str, number: str = "0") -> None:
    """Print one sequence, one line per piece of a document."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    # The data records its tokenizer's digest: a wrong tokenizer is refused here instead of showing up in the loss.
    dataset = PackedDataset(data, tokenizer.digest)
    sequence = dataset[int(number)]
    print(
        f"sequence {number} of {len(dataset)}: {dataset.sequence_length} positions, "
        f"{int(sequence.loss_mask.sum())} of them predict a token"
    )
    # Attention does not cross cu_seqlens; padding may follow the last document.
    for begin, end in pairwise(sequence.cu_seqlens.tolist()):
        if sequence.loss_mask[begin:end].any():
            text = tokenizer.decode(sequence.tokens[begin:end])
            print(f"  {begin:>6} to {end:>6}: {text[:60]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
