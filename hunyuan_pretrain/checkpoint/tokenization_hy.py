"""The tokenizer, with the class name and attributes that the scripts of Tencent's Hunyuan-Large release expect.

Exports contain this file for those scripts only: the folder `release_tokenizer` names this class; everything else uses
tokenizer.json. It needs tiktoken and transformers 4.41 or later (the release runs on 4.41 to 4.48) and nothing else.
hy.tiktoken lies beside it.
"""

from __future__ import annotations

import base64
import os
import shutil
import unicodedata
from typing import Any

import tiktoken
from transformers import PreTrainedTokenizer

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (END, START, "<|bos|>", "<|eos|>", PAD, *(f"<|extra_{i}|>" for i in range(204)))


class HYTokenizer(PreTrainedTokenizer):
    """Ids of hy.tiktoken and the 209 special tokens after them, as in training.

    Like the release's class and unlike tokenizer.json, `tokenizer(text)` adds <|startoftext|> and <|endoftext|>,
    because the release's scripts train on whole documents. Names of special tokens in a text become special tokens. A
    token string is the token's bytes, each as the character with that code point (Latin-1).

    Attributes: bod_id, eod_id, bos_id, eos_id, pad_id.
    """

    vocab_files_names = {"vocab_file": "hy.tiktoken"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, add_bod_token: bool = True, add_eod_token: bool = True, **kwargs: Any) -> None:
        self.vocab_file, self.add_bod_token, self.add_eod_token = vocab_file, add_bod_token, add_eod_token
        with open(vocab_file, "rb") as file:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file.read().splitlines())}
        self._special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "hunyuan", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self._special
        )
        self._ids = {token.decode("latin-1"): rank for token, rank in ranks.items()} | self._special
        self._names = {rank: token for token, rank in self._ids.items()}
        self.bod_id = self.bos_id = self._special[START]
        self.eod_id = self.eos_id = self._special[END]
        self.pad_id = self._special[PAD]
        roles = {"bos_token": START, "eos_token": END, "pad_token": PAD}
        super().__init__(**(roles | kwargs))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        """Id of each token."""
        return dict(self._ids)

    def tokenize(self, text: str, **_: Any) -> list[str]:
        """Tokens of a text. Ignores transformers' options for splitting off special tokens: tiktoken does that."""
        return [
            self._names[i] for i in self._encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        ]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Each text between <|startoftext|> and <|endoftext|>, unless add_bod_token or add_eod_token is false."""
        begin, end = [self.bod_id] * self.add_bod_token, [self.eod_id] * self.add_eod_token
        return [*begin, *token_ids_0, *end, *([*begin, *token_ids_1, *end] if token_ids_1 is not None else [])]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD."""
        parts = (token.encode() if token in self._special else token.encode("latin-1") for token in tokens)
        return b"".join(parts).decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy hy.tiktoken; returns its new path."""
        path = os.path.join(save_directory, (filename_prefix + "-" if filename_prefix else "") + "hy.tiktoken")
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str | None:
        return self._names.get(index)
