"""Training a byte-level BPE vocabulary under Hunyuan's split pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from data_tools.corpus import CorpusFile, find_files
from data_tools.documents import RecordForm, read_documents
from data_tools.progress import ProgressReport
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import new_folder
from hunyuan_pretrain.data.tokenizer import (
    RANKS_FILE,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Tokenizer,
    byte_letters,
    format_ranks,
    write_hf_tokenizer,
)

_MEASURED_BYTES = 32 << 20


@dataclass(frozen=True)
class Compression:
    """How much text a token holds, on a sample of what the tokenizer was trained on."""

    characters: int
    utf8_bytes: int
    tokens: int


def train_tokenizer(
    inputs: Sequence[str],
    vocab_size: int,
    output: str,
    *,
    text_field: str,
    extensions: Sequence[str],
    sample_fraction: float = 1.0,
    max_rejects: int = 0,
    overwrite: bool = False,
) -> tuple[Tokenizer, Compression]:
    """Train a tokenizer of `vocab_size` ids, special tokens included, and write its folder, Hugging Face files included.

    Trains on a `sample_fraction` of the documents, spread evenly. The same input gives the same tokenizer. Raises DataFormatError if the
    vocabulary is too small for the bytes and special tokens, or larger than the text can fill.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataFormatError(f"--vocab-size {vocab_size}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need at least {smallest}")
    if not 0 < sample_fraction <= 1:
        raise DataFormatError(f"--sample-fraction {sample_fraction:g}: must be above 0 and at most 1")
    files = find_files(inputs, extensions)
    with new_folder(output, marker=RANKS_FILE, overwrite=overwrite) as folder:
        sampled_bytes, ranks = _train(files, vocab_size - len(SPECIAL_TOKENS), text_field, sample_fraction, max_rejects)
        if sampled_bytes == 0:
            raise DataFormatError(f"{', '.join(map(str, inputs))}: no document with text in {len(files)} files")
        tokenizer = Tokenizer(ranks)
        if tokenizer.vocab_size < vocab_size:
            raise DataFormatError(
                f"--vocab-size {vocab_size}: the text gives only {tokenizer.vocab_size} ids before no pair occurs twice; use at most "
                f"{tokenizer.vocab_size}, or give more text"
            )
        (folder / RANKS_FILE).write_bytes(format_ranks(ranks))
        write_hf_tokenizer(tokenizer, folder)
        measured_fraction = sample_fraction * min(1.0, _MEASURED_BYTES / sampled_bytes)
        compression = _measure(tokenizer, files, text_field, measured_fraction, max_rejects)
    return tokenizer, compression


def _train(files: Sequence[CorpusFile], num_ranks: int, text_field: str, fraction: float, max_rejects: int) -> tuple[int, dict[bytes, int]]:
    """(bytes of text trained on, ranks): the 256 bytes in their order, then the merges in theirs."""
    model = HFTokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    sampled_bytes = 0
    with ProgressReport("reading", sum(file.size for file in files)) as progress:

        def texts() -> Iterator[str]:
            nonlocal sampled_bytes
            for text, size in _sample(files, text_field, fraction, max_rejects):
                sampled_bytes += size
                # Of compressed files this is more than their size; the bar then ends early.
                progress.advance(size, f"{sampled_bytes / 1e6:,.0f} MB of text; merging follows")
                yield text

        model.train_from_iterator(texts(), trainer)
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    ranks = {bytes([byte]): byte for byte in range(256)}
    vocab = model.get_vocab()
    for name in sorted(vocab, key=lambda name: vocab[name]):
        ranks.setdefault(bytes(letters[letter] for letter in name), len(ranks))
    return sampled_bytes, ranks


def _measure(tokenizer: Tokenizer, files: Sequence[CorpusFile], text_field: str, fraction: float, max_rejects: int) -> Compression:
    characters = utf8_bytes = tokens = 0
    for text, size in _sample(files, text_field, fraction, max_rejects):
        characters += len(text)
        utf8_bytes += size
        tokens += len(tokenizer.encode(text))
    return Compression(characters, utf8_bytes, tokens)


def _sample(files: Sequence[CorpusFile], text_field: str, fraction: float, max_rejects: int) -> Iterator[tuple[str, int]]:
    """(text, bytes) of an even sample of the documents; the first document is always in it."""
    due = 1.0
    for document in read_documents(files, RecordForm(text_field), max_rejects):
        is_chosen = due >= 1.0
        due += fraction - is_chosen
        for text in document.parts or (document.text,):
            if is_chosen and text:
                yield text, len(text.encode())
