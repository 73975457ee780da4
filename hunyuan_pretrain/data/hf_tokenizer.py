"""Reads the tokenizer of a Hugging Face folder as one of this project: from hy.tiktoken, or from tokenizer.json if that
is all there is and it says the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import (
    RANKS_FILE,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Tokenizer,
    byte_letters,
    recover_merges,
)

__all__ = ["read_hf_tokenizer"]

FAST = "tokenizer.json"


def read_hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises DataFormatError if there is none, or if it has other special tokens,
    another split pattern or another kind of vocabulary: this project could not compute the same ids."""
    if (folder / RANKS_FILE).is_file():
        tokenizer = Tokenizer.load(folder)
        _refuse_other_ids(folder / "tokenizer_config.json", tokenizer)
        return tokenizer
    if not (folder / FAST).is_file():
        raise DataFormatError(f"{folder}: no tokenizer: neither {RANKS_FILE} nor {FAST} is there; copy it there")
    path = folder / FAST
    fields = _object(path)
    try:
        return _from_fast(path, fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataFormatError):
            raise
        raise DataFormatError(f"{path}: not a tokenizer of the package tokenizers: {error!r}") from None


def _from_fast(path: Path, fields: dict[str, Any]) -> Tokenizer:
    model = fields["model"]
    if model["type"] != "BPE":
        raise _other(path, f"its model is {model['type']}, not byte-level BPE")
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    ordinary = {name: rank for name, rank in model["vocab"].items() if name not in SPECIAL_TOKENS}
    strange = next((name for name in ordinary if any(letter not in bytes_of for letter in name)), None)
    if strange is not None:
        raise _other(path, f"its token {strange!r} is not written in byte letters")
    ranks = {bytes(bytes_of[letter] for letter in name): rank for name, rank in ordinary.items()}
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise _other(path, f"its {len(ranks)} tokens do not have the ids 0 to {len(ranks) - 1}, all bytes among them")
    tokenizer = Tokenizer(dict(sorted(ranks.items(), key=lambda item: item[1])))
    added = {token["content"]: token["id"] for token in fields["added_tokens"]}
    if added != tokenizer.special_ids:
        raise _other(
            path, f"its special tokens are not Hunyuan's {len(SPECIAL_TOKENS)}: {_first_other(added, tokenizer)}"
        )
    if not _splits_like_ours(fields):
        raise _other(path, "it does not normalise to NFC and split by Hunyuan's pattern")
    letters = byte_letters()
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    expected = [
        ("".join(letters[byte] for byte in left), "".join(letters[byte] for byte in right))
        for left, right in recover_merges(tokenizer.ranks)
    ]
    if merges != expected or not model.get("ignore_merges"):
        raise _other(path, "its merges are not those that the ranks of its tokens give")
    return tokenizer


def _splits_like_ours(fields: dict[str, Any]) -> bool:
    parts = list(_parts(fields["normalizer"])) + list(_parts(fields["pre_tokenizer"]))
    kinds = [part["type"] for part in parts if part["type"] != "Sequence"]
    patterns = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    to_bytes = [part for part in parts if part["type"] == "ByteLevel"]
    # Replace: our exports remove the guards of their chat template
    known = [kind for kind in kinds if kind != "Replace"] == ["NFC", "Split", "ByteLevel"]
    is_plain = all(not part["use_regex"] and not part["add_prefix_space"] for part in to_bytes)
    return known and is_plain and patterns == [SPLIT_PATTERN]


def _parts(section: Any) -> Iterator[dict[str, Any]]:
    """A normaliser or pre-tokenizer and what it is made of."""
    if section is not None:
        yield section
        for key in ("normalizers", "pretokenizers"):
            for part in section.get(key, ()):
                yield from _parts(part)


def _refuse_other_ids(path: Path, tokenizer: Tokenizer) -> None:
    """Raise DataFormatError if tokenizer_config.json gives special tokens other ids than their ranks file does."""
    entries = _object(path).get("added_tokens_decoder", {}) if path.is_file() else {}
    try:
        ids = {entry["content"]: int(number) for number, entry in entries.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataFormatError(f"{path}: added_tokens_decoder: {error!r}") from None
    if any(tokenizer.special_ids.get(name) != number for name, number in ids.items()):
        raise _other(path, f"other special tokens: {_first_other(ids, tokenizer)}")


def _first_other(ids: dict[str, int], tokenizer: Tokenizer) -> str:
    for name, number in ids.items():
        if (ours := tokenizer.special_ids.get(name)) != number:
            return f"{name} is {number}, " + ("which is unknown here" if ours is None else f"not {ours}")
    return f"{next(name for name in tokenizer.special_ids if name not in ids)} is missing"


def _object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataFormatError(f"{path}: cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise DataFormatError(f"{path}: a JSON object is expected")
    return fields


def _other(path: Path, what: str) -> DataFormatError:
    return DataFormatError(f"{path}: {what}; this project could not compute the same ids, so it is another vocabulary")
