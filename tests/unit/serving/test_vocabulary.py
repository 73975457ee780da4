"""Text in whole characters and up to a stop string, and the check of a chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import Tokenizer
from hunyuan_pretrain.serving.errors import ServingError
from hunyuan_pretrain.serving.vocabulary import StreamedText, Vocabulary


def streamed(vocabulary: Vocabulary, tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    text = StreamedText(vocabulary, stop)
    parts = []
    for token in tokens:
        parts.append(text.add(token))
        if text.is_stopped:
            break
    return [*parts, text.finish()]


def test_characters_come_whole(vocabulary: Vocabulary) -> None:
    """A token of the tiny tokenizer is one byte."""
    assert streamed(vocabulary, list("é你🙂a".encode())) == ["", "é", "", "", "你", "", "", "", "🙂", "a", ""]


def test_text_that_would_take_for_ever_to_normalise_is_refused(vocabulary: Vocabulary) -> None:
    """Sorting these marks takes N^2 swaps, and no other thread runs meanwhile."""
    endless = "a" + "\u0301" * 200_000 + "\u0316" * 200_000
    with pytest.raises(DataFormatError, match="more than 100 combining marks in a row"):
        vocabulary.encode(endless)
    with pytest.raises(DataFormatError, match="more than 100 combining marks in a row"):
        vocabulary.encode_chat([{"role": "user", "content": endless}])
    assert vocabulary.encode("e\u0301 " * 200)[1:] == list(("é " * 200).encode())


def test_a_character_that_is_cut_off_is_replaced_once(vocabulary: Vocabulary) -> None:
    assert "".join(streamed(vocabulary, [*b"a", *"你".encode()[:2]])) == "a�"


def test_control_tokens_have_no_text_and_a_name(vocabulary: Vocabulary, export: Path) -> None:
    eos = Tokenizer.load(export).eos_id
    assert "".join(streamed(vocabulary, [*b"a", eos, *b"b"])) == "ab"
    assert vocabulary.name_of(eos) == "<|eos|>"
    assert [vocabulary.name_of(token) for token in (*b"a", 0xE4)] == ["a", "bytes:\\xe4"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("aab", ["ab"], "a"),
        ("abab!", ["aba!"], "abab!"),
        ("END", ["END"], ""),
        ("a你好b", ["好"], "a你"),
        ("one two", ["two", "ne"], "o"),
        ("almost EN", ["END"], "almost EN"),
    ],
)
def test_text_ends_before_the_first_stop_string(
    text: str, stop: list[str], expected: str, vocabulary: Vocabulary
) -> None:
    assert "".join(streamed(vocabulary, list(text.encode()), stop)) == expected


@settings(max_examples=200)
@given(text=st.text("ab你", max_size=20), stops=st.lists(st.text("ab你", min_size=1, max_size=4), max_size=3))
def test_streaming_shows_nothing_that_a_stop_string_takes_back(
    text: str, stops: list[str], vocabulary: Vocabulary
) -> None:
    """The text is that of searching after each character, and what was shown is never taken back."""
    ends = [
        (index, place) for stop in stops for index in range(len(text) + 1) if (place := text[:index].find(stop)) >= 0
    ]
    first = min(ends, default=None)
    assert "".join(streamed(vocabulary, list(text.encode()), stops)) == (text if first is None else text[: first[1]])


def changed(export: Path, folder: Path, **fields: object) -> Path:
    """A copy of an export's tokenizer with other fields in tokenizer_config.json."""
    folder.mkdir()
    for name in ("hy.tiktoken", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copy(export / name, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat_template, so no chat can be served"),
        ("{% for m in messages %}{{ m.content }}<|eos|>{% endfor %}", "does not give the ids in which chats"),
        ("{{ messages[9].content }}", "fails on a conversation of two turns"),
    ],
)
def test_another_chat_template_is_refused(template: str | None, message: str, export: Path, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=message):
        Vocabulary(changed(export, tmp_path / "x", chat_template=template))


def test_a_template_that_lets_text_become_control_tokens_is_refused(export: Path, tmp_path: Path) -> None:
    template = json.loads((export / "tokenizer_config.json").read_text())["chat_template"]
    unguarded = template.replace(" | replace('<\ufdd0', '<\ufdd0\ufdd0') | replace('<|', '<\ufdd0|')", "")
    assert unguarded != template
    with pytest.raises(ServingError, match="turns text of a message into control tokens"):
        Vocabulary(changed(export, tmp_path / "x", chat_template=unguarded))


def test_a_folder_without_a_tokenizer_is_refused(export: Path, tmp_path: Path) -> None:
    shutil.copy(export / "config.json", tmp_path)
    with pytest.raises(DataFormatError, match=r"no tokenizer: neither hy\.tiktoken nor tokenizer\.json is there"):
        Vocabulary(tmp_path)
