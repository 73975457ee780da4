"""The arithmetic of the demo's figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_tools.packed_output import pack
from data_tools.tokenization import tokenize
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, Tokenizer, format_ranks
from launch.demo import CONFIG
from launch.demo_report import (
    HeldOut,
    Metrics,
    measure_heldout,
    plot_losses,
    print_tables,
    token_bytes,
    unigram_log_probabilities,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer with every byte as a token, and two tokens of several bytes."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return Tokenizer(ranks | {b"th": 256, b"the": 257})


@pytest.fixture
def heldout_folders(tmp_path: Path, tokenizer: Tokenizer) -> tuple[Path, list[str]]:
    """Tokenizer, tokens/train and packed/heldout in a folder; the held-out texts."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / RANKS_FILE).write_bytes(format_ranks(tokenizer.ranks))
    held = ["the theme, then é\n", "x" * 50]
    for name, texts in (("train", ["the cat", "a dog"]), ("heldout", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenize([str(tmp_path / f"{name}.jsonl")], str(tmp_path / "tokenizer"), str(tmp_path / "tokens" / name))
        pack([str(tmp_path / "tokens" / name)], 16, str(tmp_path / "packed" / name), seed=0)
    return tmp_path, held


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_8() -> None:
    assert HeldOut(1000, 1000, 0.0).bits_per_byte(math.log(256)) == pytest.approx(8)
    assert HeldOut(500, 1000, 0.0).bits_per_byte(math.log(256)) == pytest.approx(4)
    assert HeldOut(1, 10, 10 * math.log(2)).unigram_bits_per_byte == pytest.approx(1)


def test_token_bytes(tokenizer: Tokenizer) -> None:
    sizes = token_bytes(tokenizer)
    ids = tokenizer.encode_document("the é")
    assert sizes[ids].tolist() == [0, 3, 1, 1, 1, 0]
    assert sizes[ids].sum() == len("the é".encode())


def test_unigram_is_smoothed_and_sums_to_one(tokenizer: Tokenizer) -> None:
    log_probabilities = unigram_log_probabilities([tokenizer.encode_document("aab")], tokenizer)
    V = tokenizer.vocab_size
    assert np.exp(log_probabilities).sum() == pytest.approx(1)
    assert math.exp(log_probabilities[ord("a")]) == pytest.approx(
        3 / (4 + V)
    )  # a, a, b and the end are counted, the start is not
    assert math.exp(log_probabilities[tokenizer.start_id]) == pytest.approx(1 / (4 + V))


def test_heldout_covers_every_byte_of_the_text(heldout_folders: tuple[Path, list[str]], tokenizer: Tokenizer) -> None:
    folder, texts = heldout_folders
    overrides = [
        f"tokenizer={folder}/tokenizer",
        f"evaluation.data={folder}/packed/heldout",
        "evaluation.max_sequences=null",
    ]
    found = measure_heldout(load_experiment(CONFIG, overrides), folder / "tokens/train")
    assert found.utf8_bytes == sum(len(text.encode()) for text in texts)
    documents = [tokenizer.encode_document(text) for text in texts]
    assert found.target_tokens == sum(len(ids) - 1 for ids in documents)
    train = np.concatenate([tokenizer.encode_document(text) for text in ("the cat", "a dog")])
    log_probabilities = unigram_log_probabilities([train], tokenizer)
    assert found.unigram_nats == pytest.approx(-sum(log_probabilities[ids[1:]].sum() for ids in documents))


def test_heldout_counts_only_the_sequences_that_validation_sees(heldout_folders: tuple[Path, list[str]]) -> None:
    folder, _ = heldout_folders
    overrides = [
        f"tokenizer={folder}/tokenizer",
        f"evaluation.data={folder}/packed/heldout",
        "evaluation.max_sequences=1",
    ]
    found = measure_heldout(load_experiment(CONFIG, overrides), folder / "tokens/train")
    assert found.target_tokens == int(PackedDataset(folder / "packed/heldout")[0].loss_mask.sum())


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    records = []
    for step in range(1, 21):
        load = [[0.5, 0.25, 0.25, 0.0], [0.25] * 4] if step > 18 else [[1.0, 0, 0, 0]] * 2
        shares = {"recycled_share": [0.25, 0.0], "dropped_share": [0.0, 0.0]}
        records.append(
            {"step": step, "loss": 8.0 - step / 10, "tokens_per_s": 100.0 * step, "expert_load": load, **shares}
        )
    records.append({"step": 20, "validation_loss": 6.0, "validation_target_tokens": 10})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Metrics.read(tmp_path)


def test_routing_by_layer_is_taken_at_the_end(metrics: Metrics) -> None:
    assert metrics.layers() == [(2.0, 0.25, 0.0), (1.0, 0.0, 0.0)]
    assert metrics.tokens_per_s == 1050


def test_the_table_and_the_curve(metrics: Metrics, tmp_path: Path) -> None:
    console = Console(record=True, width=120, force_terminal=False)
    heldout = HeldOut(10, 40, 70.0)
    print_tables(console, metrics, heldout, 8, [("train", 12.0), ("export", 3.0)])
    text = console.export_text()
    for expected in (
        "7.900 nats",
        "6.000 nats",
        "2.164",
        "2.525 bits per byte",
        "after step 8",
        "1,050 tokens/s",
        "25.0%",
        "15",
    ):
        assert expected in text
    plot_losses(tmp_path / "loss.png", metrics, load_experiment(CONFIG), heldout, 8)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
