"""The tokenizer of a Hugging Face folder: read if this project computes the same ids, refused otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.hf_tokenizer import read_hf_tokenizer
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, Tokenizer, format_ranks, write_hf_tokenizer

TOKENS = (b"he", b"ll", b"hell", b"hello", b" w", "é".encode(), b"or", b" wor")
RANKS = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(TOKENS)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tokenizer.json and tokenizer_config.json without hy.tiktoken."""
    write_hf_tokenizer(Tokenizer(RANKS), tmp_path)
    return tmp_path


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def test_tokenizer_json_gives_the_same_tokenizer(folder: Path) -> None:
    read = read_hf_tokenizer(folder)
    assert read.digest == Tokenizer(RANKS).digest
    assert list(read.ranks) == list(RANKS)


def test_merges_may_be_written_as_text(folder: Path) -> None:
    change_json(
        folder / "tokenizer.json", lambda t: t["model"].update(merges=[" ".join(m) for m in t["model"]["merges"]])
    )
    assert read_hf_tokenizer(folder).digest == Tokenizer(RANKS).digest


def test_the_ranks_file_is_preferred(folder: Path) -> None:
    (folder / RANKS_FILE).write_bytes(format_ranks({bytes([byte]): byte for byte in range(256)}))
    assert read_hf_tokenizer(folder).vocab_size == 256 + 209


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(type="Unigram"), "its model is Unigram"),
        (lambda t: t["model"]["vocab"].update({"\u4e2d": 264}), "not written in byte letters"),
        (lambda t: t["model"]["vocab"].update({"xyz": 999}), "do not have the ids 0 to 264"),
        (lambda t: t["added_tokens"].pop(), r"special tokens are not Hunyuan's 209: <\|extra_203\|> is missing"),
        (lambda t: t["added_tokens"][0].update(content="<eos>"), "<eos> is 264, which is unknown here"),
        (lambda t: t["model"]["merges"].reverse(), "its merges are not those"),
        (lambda t: t["model"].update(ignore_merges=False), "its merges are not those"),
        (lambda t: t.update(normalizer=None), "does not normalise to NFC"),
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{N}{1,3}"),
            "split by Hunyuan's pattern",
        ),
        (lambda t: t.pop("pre_tokenizer"), "not a tokenizer of the package tokenizers"),
    ],
)
def test_another_tokenizer_is_refused(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    change_json(folder / "tokenizer.json", change)
    with pytest.raises(DataFormatError, match=message):
        read_hf_tokenizer(folder)


def test_ids_of_tokenizer_config_that_contradict_the_ranks_file_are_refused(folder: Path) -> None:
    (folder / RANKS_FILE).write_bytes(format_ranks(RANKS))
    right = Tokenizer(RANKS).special_ids["<|eos|>"]
    entries: dict[str, Any] = {str(right): {"content": "<|eos|>"}}
    change_json(folder / "tokenizer_config.json", lambda t: t.update(added_tokens_decoder=entries))
    assert read_hf_tokenizer(folder).eos_id == right
    change_json(
        folder / "tokenizer_config.json", lambda t: t.update(added_tokens_decoder={"7": {"content": "<|eos|>"}})
    )
    with pytest.raises(DataFormatError, match=rf"<\|eos\|> is 7, not {right}"):
        read_hf_tokenizer(folder)
