"""The tokenizer: tiktoken over a ranks file, with Hunyuan-Large's split pattern and 209 special tokens.

A tokenizer folder needs one file, `hy.tiktoken`, with one line per token: its bytes in base64, a space, its rank. The
id of an ordinary token is its rank. The special tokens follow in the order of the Hunyuan-Large release, so their ids
depend on the number of ranks. `write_hf_tokenizer` adds the same tokenizer in Hugging Face format.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from hunyuan_pretrain.data.chat_template import GUARD, chat_fields
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import write_file

__all__ = ["Tokenizer", "UnknownIdError", "write_hf_tokenizer"]

RANKS_FILE = "hy.tiktoken"
HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
START, END, BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"
END_OF_USER, END_OF_SYSTEM = "<|extra_0|>", "<|extra_4|>"
SPECIAL_TOKENS = (END, START, BOS, EOS, PAD, *(f"<|extra_{i}|>" for i in range(204)))


class UnknownIdError(DataFormatError):
    """A token id outside the vocabulary."""


class Tokenizer:
    """Text to ids and back. Text is normalised to NFC first. Names of special tokens in text are ordinary characters.

    `ranks` maps the bytes of each ordinary token to its id. It must contain every single byte and the ids 0..n-1.
    """

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        self.ranks = dict(ranks)
        self.special_ids = {name: len(self.ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        # built on first use: it is the slowest part, and not every user of a tokenizer encodes
        return tiktoken.Encoding(
            "hunyuan", pat_str=SPLIT_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special_ids
        )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load from a folder with hy.tiktoken, or from a ranks file. Raises DataFormatError if it is missing or
        malformed."""
        path = Path(path)
        file = path / RANKS_FILE if path.is_dir() else path
        if not file.is_file():
            raise DataFormatError(
                f"{file}: no such file; a tokenizer is a folder with {RANKS_FILE} (`hunyuan-data train-tokenizer`)"
            )
        return cls(read_ranks(file))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.ranks) + len(SPECIAL_TOKENS)

    @property
    def start_id(self) -> int:
        """Id of <|startoftext|>, the first token of a document."""
        return self.special_ids[START]

    @property
    def end_id(self) -> int:
        """Id of <|endoftext|>, the last token of a document."""
        return self.special_ids[END]

    @property
    def eos_id(self) -> int:
        """Id of <|eos|>, the last token of an answer in a chat."""
        return self.special_ids[EOS]

    @property
    def pad_id(self) -> int:
        """Id of <|pad|>."""
        return self.special_ids[PAD]

    @property
    def token_bytes(self) -> np.ndarray:
        """(V,) int64: number of bytes of NFC text that each id stands for; 0 for special tokens."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self.ranks.items():
            sizes[rank] = len(token)
        return sizes

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that determines ids: ranks, split pattern, special tokens, normalisation."""
        digest = hashlib.sha256(format_ranks(self.ranks))
        digest.update("\n".join(["NFC", SPLIT_PATTERN, *SPECIAL_TOKENS]).encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without <|startoftext|> or <|endoftext|>."""
        ids: list[int] = self._encode(text).tolist()
        return ids

    def encode_document(self, text: str) -> np.ndarray:
        """<|startoftext|>, the ids of `text`, <|endoftext|>: int32, shape (tokens,)."""
        body = self._encode(text)
        ids = np.empty(len(body) + 2, dtype=np.int32)
        ids[0], ids[1:-1], ids[-1] = self.start_id, body, self.end_id
        return ids

    def _encode(self, text: str) -> np.ndarray:
        text = unicodedata.normalize("NFC", text)
        try:
            ids: np.ndarray = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError as error:
            raise DataFormatError(
                f"half of a surrogate pair (character {error.start} of the text), which is not valid Unicode"
            ) from None
        except ValueError:
            # The split pattern backtracks over white space, on a stack for a little under a million characters.
            raise DataFormatError(
                "a run of white space is too long to split (limit: about 900,000 characters); shorten it"
            ) from None
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`, special tokens by name. Bytes that are not UTF-8 (a character cut in two) become U+FFFD.

        Raises UnknownIdError for an id outside the vocabulary.
        """
        unknown = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if unknown is not None:
            raise UnknownIdError(f"token id {unknown} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        return self._encoding.decode([int(i) for i in ids])

    def apply_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation in Hunyuan's layout. If the last message is the user's, they end with <|extra_0|>,
        ready for an answer.

        `messages` are {"role", "content"}: an optional system message, then user and assistant in turn. An empty system
        message is ignored, as in the release's template. Raises DataFormatError for other roles or another order.
        """
        ids: list[int] = []
        for part in chat_parts(messages):
            ids += [self.special_ids[part.text]] if part.is_special else self.encode(part.text)
        return ids


class ChatPart(NamedTuple):
    """A run of tokens of a conversation."""

    text: str
    """Content, or the name of one special token."""
    is_special: bool
    is_answer: bool
    """Of an assistant's message: its content, or the <|eos|> that ends it."""


def chat_parts(messages: Sequence[Mapping[str, str]]) -> list[ChatPart]:
    """A conversation in Hunyuan's layout, as `Tokenizer.apply_chat` encodes it, with what the assistant wrote marked.

    Raises DataFormatError as `apply_chat`.
    """
    has_system = bool(messages) and messages[0].get("role") == "system"
    parts = [ChatPart(START, True, False)]
    if has_system and messages[0]["content"]:
        parts += [ChatPart(messages[0]["content"], False, False), ChatPart(END_OF_SYSTEM, True, False)]
    turns = messages[1:] if has_system else messages
    if not turns:
        raise DataFormatError(
            "chat: no user message; expected an optional system message, then user and assistant in turn"
        )
    for number, message in enumerate(turns):
        role = ("user", "assistant")[number % 2]
        if message.get("role") != role:
            where = number + 1 + has_system
            raise DataFormatError(f"chat: message {where} has role {message.get('role')!r}, expected {role!r}")
        if role == "user" and number > 0:
            parts.append(ChatPart(START, True, False))
        is_answer = role == "assistant"
        parts.append(ChatPart(message["content"], False, is_answer))
        parts.append(ChatPart(EOS if is_answer else END_OF_USER, True, is_answer))
    return parts


def read_ranks(file: Path) -> dict[bytes, int]:
    """The ranks of a tiktoken file, ordered by id.

    Raises DataFormatError with the line number for a malformed line, or a token or rank that occurs twice; also for a
    byte without a token or a gap in the ranks.
    """
    lines = file.read_bytes().splitlines()
    filled = list(filter(bytes.strip, lines))
    try:
        ranks = {a2b_base64(token, strict_mode=True): int(rank) for token, rank in map(bytes.split, filled)}
    except ValueError:
        ranks = {}
    # A valid file is in order. If this one is not, lines are checked one by one, which takes twice as long as reading.
    if b"" in ranks or list(ranks.values()) != list(range(len(filled))):
        _refuse_wrong_line(file, lines)
        ranks = dict(sorted(ranks.items(), key=itemgetter(1)))
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataFormatError(
            f"{file}: no token for {len(missing)} of 256 single bytes, the first 0x{missing[0]:02x}; text could "
            "not be encoded"
        )
    gap = next((place for place, rank in enumerate(ranks.values()) if rank != place), None)
    if gap is not None:
        raise DataFormatError(
            f"{file}: no token has rank {gap}; {len(ranks)} tokens must have the ranks 0 to {len(ranks) - 1}"
        )
    return ranks


def _refuse_wrong_line(file: Path, lines: Sequence[bytes]) -> None:
    """Raise DataFormatError for the first malformed line, or repeated token or rank, if there is one."""
    line_of_token: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = a2b_base64(encoded, strict_mode=True), int(rank_text)
        except ValueError:
            token, rank = b"", -1
        if not token or rank < 0:
            raise DataFormatError(
                f"{file}: line {number}: {line[:60]!r} is not base64 of a token, a space and its rank"
            )
        if token in line_of_token:
            raise DataFormatError(
                f"{file}: line {number}: token {token!r} occurs twice (first on line {line_of_token[token]})"
            )
        if rank in line_of_rank:
            raise DataFormatError(
                f"{file}: line {number}: rank {rank} occurs twice (first on line {line_of_rank[rank]})"
            )
        line_of_token[token], line_of_rank[rank] = number, number


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy into `folder` what `Tokenizer.load` reads from the folder `source`, and none of its other files.

    The write is atomic. A file with the same content, such as the source itself, is not touched. Raises OSError.
    """
    content = (Path(source) / RANKS_FILE).read_bytes()
    target = folder / RANKS_FILE
    if not (target.is_file() and target.read_bytes() == content):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(target, content)


def format_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """The content of a tiktoken file: one line per token, by rank."""
    by_rank = sorted(ranks, key=ranks.__getitem__)
    return b"".join([b"%s %d\n" % (b2a_base64(token, newline=False), ranks[token]) for token in by_rank])


def write_hf_tokenizer(
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    model_max_length: int | None = None,
    system_prompt: str | None = None,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, which transformers loads without remote
    code.

    `tokenizer(text)` returns <|startoftext|> and the ids of `Tokenizer.encode`, because every training document began
    so. It adds no <|endoftext|>: the model generates that. `add_special_tokens=False` returns the ids alone. Names of
    special tokens in such a text become special tokens, as everywhere in Hugging Face, unless
    `split_special_tokens=True`. In the messages of `apply_chat_template` they never do, so its ids are those of
    `Tokenizer.apply_chat`. Needs the package `tokenizers`.
    model_max_length: positions of the model; transformers warns and truncates by it. system_prompt: of a model that was
    fine-tuned on conversations (see `chat_fields`); None: the end-of-sequence token is <|endoftext|>, which a
    pretrained model emits.
    """
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as HFTokenizer

    folder = Path(folder)
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in tokenizer.ranks}
    vocab = {names[token]: rank for token, rank in tokenizer.ranks.items()}
    merges = [(names[left], names[right]) for left, right in recover_merges(tokenizer.ranks)]
    fast = HFTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    fast.normalizer = normalizers.Sequence([normalizers.Replace(Regex(f"(?<=<){GUARD}"), ""), normalizers.NFC()])
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    # Not normalised: matched before the guards are removed, never after.
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B:1", special_tokens=[(START, tokenizer.start_id)]
    )
    chat = chat_fields(system_prompt)
    roles = {"bos_token": START, "eos_token": chat["eos_token"], "pad_token": PAD}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        # Rows of a batch must end together, where generation continues.
        "padding_side": "left",
        **chat,
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    contents = (fast.to_str(pretty=False), json.dumps(config, indent=2) + "\n", json.dumps(roles, indent=2) + "\n")
    for name, content in zip(HF_FILES, contents, strict=True):
        write_file(folder / name, content.encode())


def recover_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair of tokens that tiktoken joins to make each token, ordered by the rank of the result.

    tiktoken always joins the neighbours that form the token of lowest rank. As long as no join crosses the ends of a
    byte range, the joins inside it are the same as for that range alone. So a token is always made from the same two
    parts: those that its own bytes reduce to. A token whose bytes never reduce to two parts is found only by whole-word
    lookup: it has no pair, and needs `ignore_merges`.
    """
    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        pair = last_pair(token, ranks)
        if pair is not None:
            merges.append(pair)
    return merges


def last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that tiktoken's joins reduce `token` to before the last join. None for a single byte, or if they
    never reduce it to two."""
    if len(token) < 2:
        return None
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        known = [
            (rank, i)
            for i, (left, right) in enumerate(pairwise(parts))
            if (rank := ranks.get(left + right)) is not None
        ]
        if not known:
            return None
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]
