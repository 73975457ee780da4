"""Read a packed dataset: its sequences, the documents in them, and what counts in the loss.

python examples/load_data.py demo_out/packed/train demo_out/tokenizer
"""

from __future__ import annotations

import sys
from itertools import pairwise

from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.tokenizer import Tokenizer


def main(data: str, tokenizer_folder: str, number: str = "0") -> None:
    """Print one sequence, a line for each piece of a document in it."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    # The digest of the tokenizer is in the data: another one is refused here, not noticed in the loss.
    dataset = PackedDataset(data, tokenizer.digest)
    sequence = dataset[int(number)]
    print(
        f"sequence {number} of {len(dataset)}: {dataset.sequence_length} positions, "
        f"{int(sequence.loss_mask.sum())} of them predict a token"
    )
    # Attention stays between the borders; behind the last document there may be padding.
    for begin, end in pairwise(sequence.cu_seqlens.tolist()):
        if sequence.loss_mask[begin:end].any():
            text = tokenizer.decode(sequence.tokens[begin:end])
            print(f"  {begin:>6} to {end:>6}: {text[:60]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
