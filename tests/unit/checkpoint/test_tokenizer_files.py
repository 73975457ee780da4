"""The tokenizer of an export: tokenizer.json, which transformers loads without remote code, and the release's class
give the training tokenizer's ids."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_tools.vocabulary import byte_vocabulary, extend
from hunyuan_pretrain.checkpoint.generate import load_tokenizer
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import SPECIAL_TOKENS, Tokenizer, format_ranks
from tests.helpers.tiny_export import export_tiny, own_module_cache, tiny_model

LIBRARY = Path(os.__file__).parent
DOCS = Path(__file__).parents[3] / "docs"
CHINESE = "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。白日依山盡，黃河入海流。欲窮千里目，更上一層樓。"
RANKS = 1500


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose vocabulary was trained on code, English and Chinese."""
    root = tmp_path_factory.mktemp("tokenizer_files")
    texts = [(LIBRARY / "textwrap.py").read_text(encoding="utf-8"), (DOCS / "glossary.md").read_text(), CHINESE * 4]
    (root / "hy.tiktoken").write_bytes(format_ranks(extend(byte_vocabulary(), texts, RANKS)))
    export_tiny(tiny_model(padded_vocab_size=RANKS + 256), root, root / "export")
    return root / "export"


@pytest.fixture(scope="module")
def ours(exported: Path) -> Tokenizer:
    return Tokenizer.load(exported)


@pytest.fixture(scope="module")
def fast(exported: Path) -> Any:
    return AutoTokenizer.from_pretrained(exported, trust_remote_code=False)


@pytest.fixture(scope="module")
def released(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The class of the release's scripts, in their folder."""
    with pytest.MonkeyPatch.context() as patch:
        own_module_cache(patch, tmp_path_factory.mktemp("modules"))
        return AutoTokenizer.from_pretrained(exported / "release_tokenizer", trust_remote_code=True)


def corpus() -> list[str]:
    """Real text: this project's documentation and tests, and modules of Python's standard library; over 3 MB."""
    files = [*sorted(DOCS.rglob("*.md")), *sorted(Path(__file__).parents[2].rglob("*.py"))]
    files += [LIBRARY / "pydoc_data" / "topics.py", *sorted(LIBRARY.glob("*.py"))[:60]]
    return [file.read_text(encoding="utf-8") for file in files]


def test_ids_of_a_corpus_are_those_of_training(ours: Tokenizer, fast: Any) -> None:
    texts = corpus()
    assert sum(map(len, texts)) > 3_000_000
    # names of special tokens in a text are tokens for Hugging Face and text for training
    ids = fast(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    different = [text[:80] for text, row in zip(texts, ids, strict=True) if row != ours.encode(text)]
    assert different == []
    assert max(max(row) for row in ids if row) < ours.end_id


def test_every_special_token_has_its_id_by_name(ours: Tokenizer, fast: Any, released: Any) -> None:
    for name in SPECIAL_TOKENS:
        expected = ours.special_ids[name]
        for loaded in (fast, released):
            assert loaded.convert_tokens_to_ids(name) == expected
            assert loaded(f"a{name}b", add_special_tokens=False)["input_ids"] == [
                *ours.encode("a"),
                expected,
                *ours.encode("b"),
            ]
            assert loaded.decode([expected]) == name
        assert fast.decode([expected], skip_special_tokens=True) == ""
    assert len(fast) == len(released) == ours.vocab_size


def test_a_saved_tokenizer_is_the_same(ours: Tokenizer, fast: Any, tmp_path: Path) -> None:
    fast.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    chat = [{"role": "user", "content": "he <|eos|> 明月"}]
    assert again.apply_chat_template(chat, return_dict=False) == ours.apply_chat(chat)
    assert again(CHINESE)["input_ids"] == [ours.start_id, *ours.encode(CHINESE)]
    assert again.padding_side == "left"


WHITE = ["   ", "\n \n", "\r\n\r\n", "\t", "\u00a0", "\u3000", "\x85", "\x1c", " \u2028", "\ufeff", "\u200b", "\r"]
CONTROL = [chr(code) for code in (*range(32), *range(127, 160))]
OTHER = [
    "e\u0301",
    "\u0301\u0323a",
    "👩‍👩‍👧",
    "🇨🇳",
    "١٢3",
    "'ll",
    "'\u017f",
    "\ufdd0",
    "\uffff",
    "\U0010ffff",
    "<|",
    "|>",
    "明月",
]
TEXT = st.lists(
    st.sampled_from([*WHITE, *CONTROL, *OTHER]) | st.text(max_size=8) | st.text(alphabet="abcthe' \n1", max_size=20),
    max_size=14,
).map("".join)


@given(text=TEXT)
@settings(max_examples=300)
def test_every_tokenizer_gives_the_same_ids(text: str, ours: Tokenizer, fast: Any, released: Any) -> None:
    """Control characters, runs of white space, unassigned code points, combining marks. A guard after "<" is removed by
    tokenizer.json alone, which no text for interchange contains."""
    assume("<\ufdd0" not in unicodedata.normalize("NFC", text) and not any(name in text for name in SPECIAL_TOKENS))
    ids = ours.encode(text)
    assert fast(text, add_special_tokens=False)["input_ids"] == ids
    assert released(text, add_special_tokens=False)["input_ids"] == ids
    assert fast.decode(ids) == ours.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", ["a\ud83d", "\ude42b", "\ud83d\ude42"])
def test_half_of_a_surrogate_pair_is_refused(text: str, ours: Tokenizer, fast: Any) -> None:
    """Never encoded as something else: a text with one was cut or decoded wrongly."""
    with pytest.raises(DataFormatError, match="half of a surrogate pair"):
        ours.encode(text)
    with pytest.raises((UnicodeEncodeError, TypeError)):
        fast(text)


def test_the_tokenizer_of_the_export_never_runs_its_code(exported: Path, ours: Tokenizer) -> None:
    assert load_tokenizer(exported)("he")["input_ids"] == [ours.start_id, *ours.encode("he")]
    assert type(load_tokenizer(exported)).__module__.startswith("transformers.")
