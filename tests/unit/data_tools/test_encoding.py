"""The fast engine gives tiktoken's ids for any vocabulary, including tokens that no merges produce."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.encoding import DocumentEncoder, EncoderSource
from hunyuan_pretrain.data.tokenizer import Tokenizer

LETTERS = [
    "a",
    "b",
    "A",
    " ",
    "  ",
    "\n",
    "\r\n",
    "'s",
    "'S",
    ".",
    ",.",
    "1",
    "²",
    "é",
    "e\u0301",
    "中",
    "文",
    "😀",
    "👩‍👩‍👧",
    "\u3000",
    "\u200b",
    "ﬁ",
    "가",
]
TEXTS = st.lists(st.sampled_from(LETTERS) | st.characters(exclude_categories=["Cs"]), max_size=80).map("".join)


def random_vocabulary(seed: int) -> Tokenizer:
    """Random merges, as from training, and words that no merges produce."""
    rng = random.Random(seed)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for letter in LETTERS:
        content = letter.encode()
        for end in range(2, len(content) + 1):
            ranks.setdefault(content[:end], len(ranks))
    tokens = [token for token in ranks if token.decode("utf-8", "ignore")]
    for _ in range(200):
        if rng.random() < 0.9:
            ranks.setdefault(rng.choice(tokens) + rng.choice(tokens), len(ranks))
        else:
            ranks.setdefault("".join(rng.choices(LETTERS, k=rng.randint(2, 5))).encode(), len(ranks))
        tokens.append(list(ranks)[-1])
    return Tokenizer(ranks)


@pytest.fixture(scope="module", params=range(4))
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, DocumentEncoder]:
    pytest.importorskip("gigatoken", reason="no wheel of gigatoken for this platform")
    tokenizer = random_vocabulary(request.param)
    return tokenizer, DocumentEncoder(EncoderSource.of("", tokenizer))


@settings(deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_any_text(pair: tuple[Tokenizer, DocumentEncoder], texts: list[str]) -> None:
    tokenizer, encoder = pair
    ids, lengths = encoder.encode(texts)
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    assert [document.tolist() for document in documents] == [tokenizer.encode_document(text).tolist() for text in texts]
    assert np.concatenate(list(encoder.encode_parts(texts[:1]))).tolist() == documents[0].tolist()


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        " " * 200_000,
        "\n" * 100_000 + "a",
        "中" * 100_000,
        "1" * 100_000,
        ".,-" * 50_000,
        "ab \n" * 50_000,
    ],
)
def test_very_long_runs(pair: tuple[Tokenizer, DocumentEncoder], text: str) -> None:
    tokenizer, encoder = pair
    assert encoder.encode([text])[0].tolist() == tokenizer.encode_document(text).tolist()


def test_every_character_alone_and_between_others(pair: tuple[Tokenizer, DocumentEncoder]) -> None:
    tokenizer, encoder = pair
    characters = [
        chr(code)
        for code in range(1, 0x30000)
        if not 0xD800 <= code < 0xE000 and unicodedata.category(chr(code)) != "Cn"
    ]
    for before, after in (("", " "), ("a", "b"), (" ", "1")):
        text = "".join(before + character + after for character in characters)
        assert np.array_equal(encoder.encode([text])[0], tokenizer.encode_document(text))


def test_without_the_engine_tiktoken_encodes_and_says_so(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from hunyuan_pretrain.data.tokenizer import RANKS_FILE, format_ranks

    folder, tokenizer = tmp_path_factory.mktemp("tok"), random_vocabulary(9)
    (folder / RANKS_FILE).write_bytes(format_ranks(tokenizer.ranks))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    source = EncoderSource.of(str(folder), tokenizer)
    assert "gigatoken is not installed; tiktoken encodes" in capsys.readouterr().err
    assert DocumentEncoder(source).encode(["a 中"])[0].tolist() == tokenizer.encode_document("a 中").tolist()
