"""Trains a byte-level BPE vocabulary with Hunyuan's split pattern, from scratch or as an extension of a base."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from data_tools.compression import measure
from data_tools.corpus import survey
from data_tools.progress import ProgressReport, describe_skipped
from data_tools.records import parse_conditions
from data_tools.training_text import MEASURED_BYTES, TrainingText
from data_tools.vocabulary import (
    MAX_RANKS,
    MAX_WORD_TOKENS,
    BaseVocabulary,
    LongWords,
    byte_vocabulary,
    extend,
    load_base,
)
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import is_inside, new_folder
from hunyuan_pretrain.data.tokenizer import (
    HF_FILES,
    RANKS_FILE,
    SPECIAL_TOKENS,
    Tokenizer,
    format_ranks,
    write_hf_tokenizer,
)

REPORT_FILE = "report.json"
DEFAULT_HOLDOUT_EVERY = 100
"""Default with a base; without one, nothing is held out by default."""


def train_tokenizer(
    inputs: Sequence[str],
    vocab_size: int,
    output: str,
    *,
    text_field: str,
    extensions: Sequence[str],
    text_endings: Sequence[str] = (),
    sample_fraction: float = 1.0,
    max_rejects: int = 0,
    overwrite: bool = False,
    base: str | None = None,
    base_size: int | None = None,
    where: Sequence[str] = (),
    holdout_every: int | None = None,
    report_by: str = "lang",
) -> tuple[Tokenizer, dict[str, Any]]:
    """Train a tokenizer of `vocab_size` ids, including special tokens, and write its folder: ranks, Hugging Face files,
    report.json. Returns the tokenizer and the report.

    Trains on an evenly spread `sample_fraction` of the documents that are not held out and whose JSON fields match
    `where`. Measures on the held-out documents or, if there are none, on those trained on. With `base`, a ranks file or
    tokenizer folder, its first `base_size` ranks are kept unchanged and the new tokens follow. The same input gives the
    same files.

    Raises DataFormatError if the vocabulary is too small for the base and the special tokens or larger than the text
    can fill, and if the base, the selection of documents or the corpus is invalid. Nothing is written then.
    """
    if base is None and base_size is not None:
        raise DataFormatError(f"--base-size {base_size}: has no effect without --base")
    if not 0 < sample_fraction <= 1:
        raise DataFormatError(f"--sample-fraction {sample_fraction:g}: must be above 0 and at most 1")
    if holdout_every is None:
        holdout_every = 0 if base is None else DEFAULT_HOLDOUT_EVERY
    if holdout_every < 0 or holdout_every == 1:
        raise DataFormatError(f"--holdout-every {holdout_every}: must be 2 or more, or 0 to hold out nothing")
    continued = None if base is None else load_base(base, base_size)
    if base is not None and is_inside(base, output):
        raise DataFormatError(f"--output {output}: holds the base; choose another output")
    ranks = continued.kept if continued else byte_vocabulary()
    if vocab_size < len(ranks) + len(SPECIAL_TOKENS):
        held = f"{len(ranks)} ranks of the base" if continued else "256 bytes"
        raise DataFormatError(
            f"--vocab-size {vocab_size}: {held} and {len(SPECIAL_TOKENS)} special tokens need at least "
            f"{len(ranks) + len(SPECIAL_TOKENS)}"
        )
    if vocab_size > MAX_RANKS:
        raise DataFormatError(f"--vocab-size {vocab_size}: must be at most {MAX_RANKS}")
    found = survey(inputs, extensions, text_endings)
    if found.skipped:
        print(describe_skipped(found.skipped, found.examples), file=sys.stderr)
    text = TrainingText(
        inputs, found.files, text_field, sample_fraction, max_rejects, parse_conditions(where), holdout_every, report_by
    )
    with new_folder(output, files=(RANKS_FILE, REPORT_FILE, *HF_FILES), overwrite=overwrite) as folder:
        long_words = LongWords()
        tokenizer = Tokenizer(extend(ranks, _with_progress(text), vocab_size - len(SPECIAL_TOKENS), long_words))
        if tokenizer.vocab_size < vocab_size:
            raise DataFormatError(
                f"--vocab-size {vocab_size}: the text yields only {tokenizer.vocab_size} ids, after which no pair "
                "occurs twice; use at most "
                f"{tokenizer.vocab_size}, or give more text"
            )
        (folder / RANKS_FILE).write_bytes(format_ranks(tokenizer.ranks))
        write_hf_tokenizer(tokenizer, folder)
        report = _report(tokenizer, continued, text, found.skipped, long_words)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return tokenizer, report


def _with_progress(text: TrainingText) -> Iterator[str]:
    total = sum(file.size for file in text.files)
    with ProgressReport("reading", total) as progress:
        for content, size in text.read():
            # For compressed files this exceeds the file size, for selected documents it falls short: the bar then
            # reaches its end early or never.
            progress.advance(size, f"{text.utf8_bytes / 1e6:,.0f} MB of text; merging follows")
            yield content


def _report(
    tokenizer: Tokenizer,
    base: BaseVocabulary | None,
    text: TrainingText,
    skipped: dict[str, int],
    long_words: LongWords,
) -> dict[str, Any]:
    groups, measured_on = text.held_out.groups(), "documents held out"
    if not groups:
        groups, measured_on = text.trained_on.groups(), "documents trained on"
    encoding = base.encoding() if base else None
    measured = measure(groups, tokenizer.encode, encoding.encode_ordinary if encoding else None)
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_digest": tokenizer.digest,
        "base": base
        and {
            "name": base.name,
            "sha256": base.sha256,
            "ranks": len(base.ranks),
            "kept": len(base.kept),
            "split_pattern": base.split_pattern,
        },
        "trained_on": {
            "documents": text.documents,
            "bytes": text.utf8_bytes,
            "where": {name: sorted(values) for name, values in text.where.items()},
            "sample_fraction": text.sample_fraction,
            "long_words_cut": long_words.cut,
            "long_word_tokens": MAX_WORD_TOKENS,
        },
        "left_out": {"files": skipped, "rejects": text.rejects, "by_where": text.passed_over},
        "measured_on": measured_on,
        "holdout_every": text.holdout_every,
        "at_most_bytes_a_group": MEASURED_BYTES,
        "by": text.group_by,
        "groups": {group: compression.as_json() for group, compression in measured.items()},
    }
