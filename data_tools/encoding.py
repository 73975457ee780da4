"""Encodes documents with gigatoken, a fast engine, if it is installed, else with tiktoken; the ids are the same.

gigatoken reads a tokenizer in Hugging Face's format. The merges written here list every pair of tokens that forms a
token, ordered by the rank of the result. This reproduces tiktoken's rule, which merges the neighbours that form the
token of lowest rank, without searching for the one pair behind each token. Tokens that no merges reach are matched as
whole words (`ignore_merges`), as in tiktoken. Text is normalised to NFC before it reaches an engine.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from codecs import charmap_decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hunyuan_pretrain.data.arrays import IS_TARGET, OF_REJECTED
from hunyuan_pretrain.data.tokenizer import END_OF_USER, SPLIT_PATTERN, Tokenizer, byte_letters, chat_parts

_ENGINE_CHARACTERS = 1 << 27
"""The engine caches every word that it has seen, without bound; after this many characters it is rebuilt."""


@dataclass(frozen=True)
class EncoderSource:
    """What a process needs to build its encoder; cheap to pickle, unlike a tokenizer."""

    tokenizer_path: str
    engine_json: str | None
    """None if gigatoken is not installed."""
    start_id: int
    end_id: int
    special_ids: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer_path: str, tokenizer: Tokenizer) -> EncoderSource:
        """The source for a loaded tokenizer; warns on stderr if encoding will be slow."""
        try:
            import gigatoken  # noqa: F401
        except ImportError:
            print(
                "warning: gigatoken is not installed; tiktoken encodes instead, about 3 times slower", file=sys.stderr
            )
            return cls(tokenizer_path, None, tokenizer.start_id, tokenizer.end_id, tokenizer.special_ids)
        engine = engine_json(tokenizer.ranks)
        return cls(tokenizer_path, engine, tokenizer.start_id, tokenizer.end_id, tokenizer.special_ids)


class DocumentEncoder:
    """Encodes documents as <|startoftext|> ... <|endoftext|>, as `Tokenizer.encode_document` does.

    One difference: gigatoken accepts white space of any length; tiktoken raises DataFormatError on runs of about
    900,000 characters.
    """

    def __init__(self, source: EncoderSource) -> None:
        self._start = np.array([source.start_id], dtype=np.uint32)
        self._end = np.array([source.end_id], dtype=np.uint32)
        self._special_ids = source.special_ids
        self._encode: Callable[[str], np.ndarray]
        if source.engine_json is None:
            tokenizer = Tokenizer.load(source.tokenizer_path)
            self._encode = lambda text: tokenizer.encode_document(text)[1:-1]
        else:
            self._engine_json = source.engine_json
            self._left = 0
            self._encode = self._encode_by_engine

    def _encode_by_engine(self, text: str) -> np.ndarray:
        from gigatoken.gigatoken_rs import load_hf_json

        if self._left <= 0:
            self._engine = load_hf_json(self._engine_json)
            self._left = _ENGINE_CHARACTERS
        self._left -= len(text)
        ids: np.ndarray = self._engine.encode(text)
        return ids

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(concatenated ids (tokens,), lengths (documents,) int64)."""
        parts: list[np.ndarray] = []
        lengths = np.empty(len(texts), dtype=np.int64)
        for number, text in enumerate(texts):
            ids = self._encode(_normalized(text))
            parts += (self._start, ids, self._end)
            lengths[number] = len(ids) + 2
        return np.concatenate(parts), lengths

    def encode_chats(
        self, chats: Sequence[Sequence[Mapping[str, str]]], train_end_of_user: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(concatenated ids (tokens,), lengths (conversations,) int64, targets (tokens,) bool) of conversations, laid
        out by `tokenizer.chat_parts`. Names of special tokens in messages are ordinary characters.

        Targets are the tokens of the answers, each with its <|eos|>; with `train_end_of_user` also the <|extra_0|>
        before each.
        """
        ids: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        lengths = np.empty(len(chats), dtype=np.int64)
        for number, messages in enumerate(chats):
            lengths[number] = 0
            for part in chat_parts(messages):
                special = self._special_ids.get(part.text) if part.is_special else None
                tokens = self._encode(_normalized(part.text)) if special is None else np.array([special], np.uint32)
                is_target = part.is_answer or (train_end_of_user and part.is_special and part.text == END_OF_USER)
                ids.append(tokens)
                targets.append(np.full(len(tokens), is_target))
                lengths[number] += len(tokens)
        return np.concatenate(ids), lengths, np.concatenate(targets)

    def encode_pairs(
        self, pairs: Sequence[Sequence[Sequence[Mapping[str, str]]]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(concatenated ids (tokens,), lengths (pairs,) int64, targets (tokens,) uint8) of pairs of conversations, one
        after the other.

        Targets have the bit IS_TARGET for the tokens of the last answer of each, with its <|eos|>, and OF_REJECTED for
        all tokens of the second conversation.
        """
        ids, lengths, is_answer = self.encode_chats([chat for pair in pairs for chat in pair], False)
        targets = is_answer.astype(np.uint8) * np.uint8(IS_TARGET)
        ends = np.cumsum(lengths)
        for number, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
            read = np.flatnonzero(~is_answer[start:end])
            targets[start : start + read[-1]] = 0  # answers of the prompt
            if number % 2:
                targets[start:end] |= OF_REJECTED
        return ids, lengths.reshape(-1, 2).sum(1), targets

    def encode_parts(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of one document whose text comes in parts, cut between tokens (see `cut_between_words`)."""
        yield self._start
        for part in parts:
            yield self._encode(_normalized(part))
        yield self._end


def engine_json(ranks: Mapping[bytes, int]) -> str:
    """The tokenizer of `ranks` with Hunyuan's split pattern and without special tokens, in Hugging Face's format."""
    letters = "".join(byte_letters())
    names = {token: charmap_decode(token, "strict", letters)[0] for token in sorted(ranks, key=ranks.__getitem__)}
    vocab = {name: rank for rank, name in enumerate(names.values())}
    # "left right": no letter that stands for a byte is a space, and strings are written and read faster than pairs;
    # splits are looked up in bytes because that is faster
    merges = [
        f"{name[:i]} {name[i:]}"
        for token, name in names.items()
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE",
        "ignore_merges": True,
        "byte_fallback": False,
        "fuse_unk": False,
        "vocab": vocab,
        "merges": merges,
    }
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": model,
        },
        ensure_ascii=False,
    )


def _normalized(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)
