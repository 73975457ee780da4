"""Other engines give tiktoken's ids: Hugging Face's tokenizers, and gigatoken and quicktok if installed."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from data_tools.vocabulary import byte_vocabulary, extend
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import SPLIT_PATTERN, Tokenizer, format_ranks, recover_merges, write_hf_tokenizer

LIBRARY = Path(os.__file__).parent
CHINESE = "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。白日依山盡，黃河入海流。欲窮千里目，更上一層樓。"
EMOJI = "👩‍👩‍👧 🇨🇳 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿"
TEXTS = [(LIBRARY / name).read_text(encoding="utf-8") for name in ("textwrap.py", "calendar.py")] + [
    CHINESE * 4,
    EMOJI * 4,
    "  \n\n\t " * 9,
]
WHOLE_WORDS = ["xylophonic", " zyzzyva", "黃河入海流矣", "!?!?!?!", " \u0950\u0950\u0950\u0950"]
Encode = Callable[[str], list[int]]


def vocabulary(folder: Path, whole_words: list[str]) -> Path:
    """A tokenizer's folder; `whole_words` are tokens that no merges produce."""
    ranks = extend(byte_vocabulary(), TEXTS, 1500)
    for word in whole_words:
        ranks[word.encode()] = len(ranks)
    made = {left + right for left, right in recover_merges(ranks)}
    assert [token for token in ranks if len(token) > 1 and token not in made] == [word.encode() for word in whole_words]
    folder.mkdir()
    (folder / "hy.tiktoken").write_bytes(format_ranks(ranks))
    write_hf_tokenizer(Tokenizer(ranks), folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engines")
    return {"joined": vocabulary(root / "joined", []), "whole words": vocabulary(root / "whole", WHOLE_WORDS)}


def hugging_face(folder: Path) -> Encode:
    from tokenizers import Tokenizer as HFTokenizer

    fast = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: fast.encode(text, add_special_tokens=False).ids


def gigatoken(folder: Path) -> Encode:
    rust = pytest.importorskip("gigatoken.gigatoken_rs")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    # Names of special tokens in text are text; NFC is applied first, with the same Unicode tables for all.
    content.update(added_tokens=[], normalizer=None)
    engine = rust.load_hf_json(json.dumps(content))
    return lambda text: engine.encode(unicodedata.normalize("NFC", text)).tolist()


def quicktok(folder: Path) -> Encode:
    core = pytest.importorskip(
        "quicktok._import_core", reason="the package is quicktok-v1; quicktok on PyPI is another one"
    )
    import quicktok

    data = folder / "quicktok"
    data.mkdir(exist_ok=True)
    core.write_files(str(data), "hy", Tokenizer.load(folder).ranks, {}, core.KNOWN_PATTERNS[SPLIT_PATTERN], False)
    core.ensure_tables(str(data), str(Path(quicktok.__file__).parent / "data"), "qwen", False)
    engine = quicktok.Tokenizer("hy", str(data))
    return lambda text: engine.encode_ordinary(unicodedata.normalize("NFC", text))


# quicktok uses a token that no merges produce wherever its bytes occur, not only as a whole word.
ENGINES = [(hugging_face, "whole words"), (gigatoken, "whole words"), (quicktok, "joined")]


@pytest.fixture(scope="module", params=ENGINES, ids=[f"{engine.__name__}, {kind}" for engine, kind in ENGINES])
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Tokenizer, Encode]:
    """Our tokenizer and another engine on the same vocabulary."""
    make, kind = request.param
    return Tokenizer.load(folders[kind]), make(folders[kind])


CODE = [
    "def f(x):\n    return x**2",
    "/* ",
    "//----",
    "\t\tif (a != b) {\r\n",
    "0x1F",
    "'ll",
    "I'M",
    "'\u017f",
    "#!/bin/sh\n",
    "<br/>\n\n",
]
MARKS = ["e\u0301", "\u0301\u0323a", "\u1100\u1161\u11a8", "क्षि", "\u0958", "ﬁ", "\u212b", "ｶﾞ", "\u200d", "\ufe0f"]
SPACES = ["   ", "\n \n", "\r\n\r\n", "\t", "\u00a0", "\u3000", "\x85", "\x1c", " \u2028", "\ufeff", "\0"]
WORDS = st.sampled_from(
    [*CODE, *MARKS, *SPACES, *EMOJI.split(), *WHOLE_WORDS, "明月", "一二三", "١٢3", "2026", "！？", "<|endoftext|>"[:6]]
)
IDEOGRAPHS = st.text(alphabet=st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5), max_size=12)
LETTERS = st.text(alphabet="abctheinglopyx' \n1", max_size=20)
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=8)


@given(text=st.lists(WORDS | IDEOGRAPHS | LETTERS | ANY, max_size=14).map("".join))
@settings(max_examples=200, deadline=None)
def test_every_engine_gives_the_same_ids_as_tiktoken(text: str, pair: tuple[Tokenizer, Encode]) -> None:
    # names of special tokens: hypothesis draws strings of the source code too, and tokenizers reads them as tokens
    assume("|>" not in text)
    tokenizer, encode = pair
    assert encode(text) == tokenizer.encode(text)


RUNS = ["a", " ", "\n", "\r\n", " \n", "明月", "!", "7", "👍", "\u3000", "e\u0301"]


@pytest.mark.parametrize("unit", RUNS, ids=[unit.encode("unicode_escape").decode() for unit in RUNS])
def test_a_run_of_a_hundred_thousand_characters_is_encoded_alike(unit: str, pair: tuple[Tokenizer, Encode]) -> None:
    tokenizer, encode = pair
    text = "x" + unit * 100_000 + "y"
    ids = encode(text)
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_a_whole_word_token_is_used_only_for_the_whole_word(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(folders["whole words"])
    for word, longer in zip(
        WHOLE_WORDS,
        ("xylophonics", " zyzzyvas", "見黃河入海流矣", "!?!?!?!!", " \u0950\u0950\u0950\u0950\u0950"),
        strict=True,
    ):
        token = tokenizer.ranks[word.encode()]
        assert tokenizer.encode(word) == [token]
        assert token not in tokenizer.encode(longer)


def test_half_of_a_surrogate_pair_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(DataFormatError, match=r"half of a surrogate pair \(character 2 of the text\)"):
        Tokenizer.load(folders["joined"]).encode("ab\ud83d")


def test_bytes_that_are_not_utf8_decode_to_replacement_characters(folders: dict[str, Path]) -> None:
    assert Tokenizer.load(folders["joined"]).decode([0xE6, 0x98, ord("a"), 0xFF]) == "\ufffda\ufffd"


def released_layout() -> dict[bytes, int]:
    """As many ranks as the release, in its structure: bytes, merged tokens, and finally three that no merges
    produce."""
    ranks = byte_vocabulary()
    pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
    for token in pairs + [pair + bytes([last]) for pair in pairs[0x6161 : 0x6161 + 243] for last in range(256)]:
        if len(ranks) < 127_954:
            ranks[token] = len(ranks)
    for word in ("incomprehensibilities", " 不可達到的詞語", "？！？！？！？！"):
        ranks[word.encode()] = len(ranks)
    return ranks


def test_the_released_layout_loads_unchanged(tmp_path: Path) -> None:
    ranks = released_layout()
    (tmp_path / "release").mkdir()
    file = tmp_path / "release" / "hy.tiktoken"
    file.write_bytes(format_ranks(ranks))
    tokenizer = Tokenizer.load(tmp_path / "release")
    assert len(tokenizer.ranks) == 127_957
    assert tokenizer.vocab_size == 128_166
    assert (tokenizer.end_id, tokenizer.start_id, tokenizer.special_ids["<|extra_203|>"]) == (127_957, 127_958, 128_165)
    oracle = tiktoken.Encoding(
        "release", pat_str=SPLIT_PATTERN, mergeable_ranks=load_tiktoken_bpe(str(file)), special_tokens={}
    )
    whole = ["incomprehensibilities", " 不可達到的詞語", "？！？！？！？！"]
    assert [tokenizer.encode(word) for word in whole] == [[127_954], [127_955], [127_956]]
    for text in [TEXTS[0], "".join(whole), "，".join(whole) * 3, EMOJI, CHINESE]:
        assert tokenizer.encode(text) == oracle.encode_ordinary(unicodedata.normalize("NFC", text))
    shutil.rmtree(tmp_path / "release")
