"""The tokenizer of an export: prompts to ids, and ids to text as they come.

Text of a user is never read as control tokens: names such as <|eos|> in it are ordinary characters.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hunyuan_pretrain.data.chat_template import default_system_prompt
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.hf_tokenizer import read_hf_tokenizer
from hunyuan_pretrain.data.tokenizer import Tokenizer
from hunyuan_pretrain.serving.errors import ServingError

if TYPE_CHECKING:
    import regex

MOST_MARKS = 100

__all__ = ["StreamedText", "Vocabulary"]

PROBE = [
    {"role": "system", "content": "Be <|eos|> brief."},
    {"role": "user", "content": "<|startoftext|>What is <|extra_0|>?"},
    {"role": "assistant", "content": "A name.<|eos|>"},
    {"role": "user", "content": "你好"},
]
"""A conversation whose text contains the names of control tokens."""


class Vocabulary:
    """The tokenizer of an export and its layout of a chat."""

    def __init__(self, folder: Path) -> None:
        """Raises DataFormatError without a tokenizer, or with one whose ids this project cannot compute; ServingError
        without a chat template, or with one that gives other ids than the layout in which chats are trained."""
        self._tokenizer = read_hf_tokenizer(folder)
        self.system_prompt = default_system_prompt(folder) or ""
        """That with which the export was fine-tuned, of chats without a system message; "" for none."""
        _check_template(folder, self._tokenizer, self.system_prompt)
        self._bytes = [b""] * self._tokenizer.vocab_size
        for token, rank in self._tokenizer.ranks.items():
            self._bytes[rank] = token
        self._names = {number: name for name, number in self._tokenizer.special_ids.items()}
        self._longest = max(map(len, self._tokenizer.ranks))
        self.size = self._tokenizer.vocab_size
        self.stop_ids = frozenset((self._tokenizer.eos_id, self._tokenizer.end_id))
        """An answer ends with <|eos|>, a document with <|endoftext|>."""

    def encode(self, text: str) -> list[int]:
        """The beginning of a document: <|startoftext|> and the ids of the text. Raises DataFormatError."""
        _refuse_endless_marks(text)
        return [self._tokenizer.start_id, *self._tokenizer.encode(text)]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation that ends with the user's message, ready for an answer. Raises DataFormatError."""
        for message in messages:
            _refuse_endless_marks(message["content"])
        return self._tokenizer.apply_chat(messages)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens of a text, without computing them."""
        return len(text) // self._longest  # a character has at least one byte

    def bytes_of(self, token: int) -> bytes:
        """The text of a token; nothing for a control token."""
        return self._bytes[token]

    def name_of(self, token: int) -> str:
        """A token as logprobs name it, so that different tokens have different names: its text, the name of a control
        token, or bytes:\\xe4\\xbd for a part of a character."""
        if token in self._names:
            return self._names[token]
        try:
            return self._bytes[token].decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._bytes[token])


def _check_template(folder: Path, ours: Tokenizer, system_prompt: str) -> None:
    """With a system message, with an empty one, and without."""
    from hunyuan_pretrain.checkpoint.generate import load_tokenizer

    path = folder / "tokenizer_config.json"
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ServingError(f"{folder}: transformers cannot read its tokenizer: {error}") from None
    if not tokenizer.chat_template:
        raise ServingError(f"{path}: no chat_template, so no chat can be served; export again, or copy it there")
    turns = PROBE[1:]
    empty, default = ([{"role": "system", "content": text}, *turns] for text in ("", system_prompt))
    for given, meant in ((PROBE, PROBE), (empty, turns), (turns, default)):
        try:
            rendered = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a program, and may fail in any way
            raise ServingError(f"{path}: its chat_template fails on a conversation of two turns: {error}") from None
        if list(rendered) != ours.apply_chat(meant):
            raise ServingError(
                f"{path}: its chat_template does not give the ids in which chats are trained here, or turns text of a "
                "message into control tokens; take the tokenizer files of an export of this version"
            )


class StreamedText:
    """The text of a sequence of tokens, in whole characters, up to the first stop string.

    Text that may be the beginning of a stop string is held back until it is known not to be one.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str]) -> None:
        """stop: strings that are not empty."""
        self._vocabulary, self._stop = vocabulary, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.decoded = 0
        """Characters so far, those held back included."""
        self.is_stopped = False
        """A stop string was found; the text ends before it."""

    def add(self, token: int) -> str:
        """The text that is final now and was not before."""
        return self._take(self._decoder.decode(self._vocabulary.bytes_of(token)))

    def finish(self) -> str:
        """The rest. The bytes of a character that is cut off become U+FFFD."""
        rest = "" if self.is_stopped else self._take(self._decoder.decode(b"", final=True))
        rest, self._held = rest + self._held, ""
        return rest

    def _take(self, text: str) -> str:
        self._held += text
        self.decoded += len(text)
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            ready, self._held = self._held[: min(found)], ""
            return ready
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        ready, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return ready


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _refuse_endless_marks(text: str) -> None:
    """Raise DataFormatError for a text whose normalisation would take for ever: Python sorts the combining marks of a
    character by insertion, and no other thread runs meanwhile."""
    if not text.isascii() and _endless_marks().search(text):
        raise DataFormatError(f"more than {MOST_MARKS} combining marks in a row")


@functools.cache
def _endless_marks() -> regex.Pattern[str]:
    import regex  # comes with transformers; read here, so that `serve` without its extra names that extra

    return regex.compile(rf"\p{{M}}{{{MOST_MARKS + 1}}}")
