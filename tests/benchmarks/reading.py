"""Samples per processor second of packed sequences against megatron-core's GPTDataset on the same shards, plain and
with positions reset.

    python tests/benchmarks/reading.py TOKENIZED PACKED...

TOKENIZED is a folder of `hunyuan-data tokenize`, each PACKED a folder of `hunyuan-data pack` over it. GPTDataset reads
the largest shard. It concatenates documents and cuts, so it has no document boundaries to return; with
reset_position_ids it restarts positions after each end of a document. Both sides read the same number of sequences in
random order, alternating, twice; the second turn counts. Also printed: seconds to open.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from hunyuan_pretrain.data.indexed import TokenizedDataset
from hunyuan_pretrain.data.packed_dataset import PackedDataset

SECONDS = 4.0


def peer(dataset: TokenizedDataset, sequence_length: int, reset: bool, cache: str) -> GPTDataset:
    """megatron-core's dataset over the largest shard."""
    shard = max(dataset.shards, key=lambda shard: shard.num_tokens)
    end = int(shard.tokens[int(shard.lengths[0]) - 1])
    tokenizer: Any = SimpleNamespace(
        eod=end, pad=dataset.pad_id, unique_identifiers={"class": "ids"}, vocab_size=dataset.vocab_size
    )
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        blend=([str(dataset.folder / shard.name)], None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=reset,
        reset_attention_mask=False,
        eod_mask_loss=reset,
        create_attention_mask=False,
        mmap_bin_files=True,
    )
    indexed = IndexedDataset(str(dataset.folder / shard.name), mmap=True)
    return GPTDataset(
        indexed,
        str(dataset.folder / shard.name),
        np.arange(shard.num_documents, dtype=np.int32),
        None,
        Split.train,
        config,
    )


def rate(read: Callable[[int], object], size: int) -> float:
    """Samples per processor second of random reads."""
    order = np.random.default_rng(0).permutation(size)
    started, count = time.process_time(), 0
    while time.process_time() - started < SECONDS:
        read(int(order[count % size]))
        count += 1
    return count / (time.process_time() - started)


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    tokenized = TokenizedDataset(sys.argv[1])
    print(
        f"{'tokens':>8} {'open s':>8} {'packed/s':>10} {'GPTDataset':>11} {'ratio':>6} {'with reset':>11} {'ratio':>6}"
    )
    with tempfile.TemporaryDirectory() as cache:
        for folder in sys.argv[2:]:
            started = time.perf_counter()
            packed = PackedDataset(folder)
            opening = time.perf_counter() - started
            readers = [packed, *(peer(tokenized, packed.sequence_length, reset, cache) for reset in (False, True))]
            rates = [[rate(reader.__getitem__, len(reader)) for reader in readers] for _ in range(2)][-1]
            print(
                f"{packed.sequence_length:>8,} {opening:>8.3f} {rates[0]:>10,.0f} {rates[1]:>11,.0f} "
                f"{rates[0] / rates[1]:>6.2f} "
                f"{rates[2]:>11,.0f} {rates[0] / rates[2]:>6.2f}"
            )


if __name__ == "__main__":
    main()
