"""Small tokenized and packed folders, and experiments over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_tools.packed_output import pack
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.folders import write_manifest
from hunyuan_pretrain.data.indexed import (
    TOKENIZED_FORMAT,
    TOKENIZED_VERSION,
    ShardWriter,
    token_dtype,
)

PAD = 999
VOCAB = 1000


@pytest.fixture
def tokenized(tmp_path: Path) -> Callable[..., Path]:
    """tokenized(name, documents): a tokenized folder of the given lists of ids, with a given number of documents per
    shard (default: one shard)."""

    def write(
        name: str,
        documents: Sequence[Sequence[int]],
        digest: str = "d" * 64,
        vocab_size: int = VOCAB,
        documents_per_shard: int | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        entries = []
        step = documents_per_shard or len(documents)
        for first in range(0, len(documents), step):
            writer = ShardWriter(folder, f"shard_{len(entries):05d}", vocab_size)
            for number, ids in enumerate(documents[first : first + step], start=first):
                writer.add(np.array(ids, dtype=token_dtype(vocab_size)), np.array([len(ids)]), np.array([[0, number]]))
            entries.append(writer.finish())
        manifest = {
            "format": TOKENIZED_FORMAT,
            "version": TOKENIZED_VERSION,
            "documents": sum(entry["documents"] for entry in entries),
            "tokens": sum(entry["tokens"] for entry in entries),
            "vocab_size": vocab_size,
            "pad_id": PAD,
            "tokenizer_digest": digest,
            "files": ["corpus.jsonl"],
            "shards": entries,
        }
        write_manifest(folder, manifest)
        return folder

    return write


@pytest.fixture
def packed(tmp_path: Path, tokenized: Callable[..., Path]) -> Callable[..., Path]:
    """packed(name, documents, sequence_length): a packed folder over its own tokenized folder."""

    def write(
        name: str,
        documents: Sequence[Sequence[int]],
        sequence_length: int,
        seed: int = 1,
        materialize: bool = False,
        **of_tokenized: object,
    ) -> Path:
        source = tokenized(f"{name}_tokens", documents, **of_tokenized)
        pack([str(source)], sequence_length, str(tmp_path / name), seed=seed, materialize=materialize)
        return tmp_path / name

    return write


@pytest.fixture
def numbered_documents() -> Callable[..., list[list[int]]]:
    """numbered_documents(count, seed): documents of 2 to 40 random ids below 900."""

    def make(count: int, seed: int = 0) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [rng.integers(0, 900, rng.integers(2, 41)).tolist() for _ in range(count)]

    return make


@pytest.fixture
def experiment() -> Callable[..., Experiment]:
    """experiment(stages, evaluation): a small model; each stage is a dict of what differs from the defaults here."""

    def make(
        stages: Sequence[dict], evaluation: dict | None = None, padded_vocab_size: int = 1024, seed: int = 5
    ) -> Experiment:
        model = {
            "num_layers": 2,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_query_groups": 1,
            "ffn_hidden_size": 8,
            "num_moe_experts": 2,
        }
        defaults = {
            "name": "s",
            "tokens": 16 * 8 * 5,
            "sequence_length": 16,
            "global_batch_sequences": 8,
            "lr_end": 1.0,
        }
        return Experiment.model_validate(
            {
                "name": "test",
                "run_dir": "run",
                "seed": seed,
                "tokenizer": "tok",
                "model": {**model, "padded_vocab_size": padded_vocab_size},
                "optimizer": {"lr": 1e-3},
                "stages": [{**defaults, **stage} for stage in stages],
                "evaluation": evaluation or {},
            }
        )

    return make
