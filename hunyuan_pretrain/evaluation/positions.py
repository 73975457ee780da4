"""Bits per byte of texts by position: does the model predict better the more it has read?

The later part of a text may be easier by itself. So the same tokens are scored once more with little context: the
difference is what the longer context is worth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_pretrain.config.history import write_whole
from hunyuan_pretrain.evaluation import EvaluationError
from hunyuan_pretrain.evaluation.opened import Opened
from hunyuan_pretrain.evaluation.scoring import Item, sequence_item

FIRST_BUCKET = 64


def read_texts(path: Path) -> list[str]:
    """The texts of a file: of each line of .jsonl its field `text`, else the whole file. Raises EvaluationError."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            texts = [content]
        else:
            texts = [str(json.loads(line)["text"]) for line in content.splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: cannot be read as text, or as lines with a field text: {error!r}") from error
    if not any(texts):
        raise EvaluationError(f"{path}: has no text")
    return texts


def bounds(max_length: int) -> list[int]:
    """Positions between which bits are counted: 0, 64, 128, 256, ... up to the model's."""
    found = [0, FIRST_BUCKET]
    while found[-1] < max_length:
        found.append(min(2 * found[-1], max_length))
    return found if max_length > FIRST_BUCKET else [0, max_length]


def run(
    opened: Opened, texts: Sequence[str], short_context: int, max_tokens: int | None = None
) -> list[dict[str, Any]]:
    """One record for each range of positions: `begin`, `end`, `bytes`, `bits_per_byte`, and `with_short_context`, of
    the same tokens with between `short_context` and twice as many tokens before them (null before that position).

    Longer texts are read in pieces of the model's length, each from its beginning. max_tokens: of all texts.
    """
    length = opened.scorer.max_length
    pieces = list(_pieces(opened, texts, length, max_tokens))
    whole = [sequence_item(piece, 1) for piece in pieces]
    short = [(number, *window) for number, piece in enumerate(pieces) for window in _windows(piece, short_context)]
    reads = opened.scorer.score([*whole, *(item for _, _, item in short)])
    short_of = [np.full(len(piece), np.nan) for piece in pieces]
    for (number, begin, item), read in zip(short, reads[len(whole) :], strict=True):
        short_of[number][begin : begin + len(item.targets)] = -read.logprob_n.numpy() / math.log(2)
    sums = np.zeros((len(bounds(length)) - 1, 3))
    short_bytes = np.zeros(len(sums))
    for piece, read, by_short in zip(pieces, reads, short_of, strict=False):
        num_bytes = opened.token_bytes[piece]
        bits = np.concatenate([[0.0], -read.logprob_n.numpy() / math.log(2)])
        for place, (begin, end) in enumerate(pairwise(bounds(length))):
            part = slice(max(begin, 1), end)
            sums[place, 0] += bits[part].sum()
            sums[place, 1] += num_bytes[part].sum()
            known = ~np.isnan(by_short[part])
            sums[place, 2] += by_short[part][known].sum()
            short_bytes[place] += num_bytes[part][known].sum()
    return [
        {
            "begin": begin,
            "end": end,
            "bytes": int(sums[place, 1]),
            "bits_per_byte": sums[place, 0] / sums[place, 1],
            # of the same tokens, or it would compare different texts
            "with_short_context": sums[place, 2] / short_bytes[place] if short_bytes[place] == sums[place, 1] else None,
        }
        for place, (begin, end) in enumerate(pairwise(bounds(length)))
        if sums[place, 1]
    ]


def _pieces(opened: Opened, texts: Sequence[str], length: int, max_tokens: int | None) -> Iterator[list[int]]:
    left = max_tokens if max_tokens is not None else math.inf
    for text in texts:
        tokens = opened.lm.tok_encode(text, add_special_tokens=False)
        for start in range(0, len(tokens), length - 1):
            piece = [opened.lm.prefix_token_id, *tokens[start : start + length - 1]]
            piece = piece[: int(min(len(piece), left))]
            if len(piece) < 2:
                return
            left -= len(piece)
            yield piece


def _windows(piece: list[int], short: int) -> Iterator[tuple[int, Item]]:
    """(first position, item) that reads `short` tokens each, with the `short` tokens before them."""
    for begin in range(short, len(piece), short):
        window = piece[begin - short : begin + short]
        yield begin, sequence_item(window, short)


def as_table(records: Sequence[dict[str, Any]], short_context: int) -> list[tuple[str, ...]]:
    """Rows to print."""
    rows: list[tuple[str, ...]] = [
        ("positions", "bytes", "bits per byte", f"with {short_context} to {2 * short_context} tokens before")
    ]
    for record in records:
        short = record["with_short_context"]
        shown = "" if short is None else f"{short:.4f}"
        rows.append(
            (
                f"{record['begin']:,}-{record['end'] - 1:,}",
                f"{record['bytes']:,}",
                f"{record['bits_per_byte']:.4f}",
                shown,
            )
        )
    return rows


def write(records: Sequence[dict[str, Any]], opened: Opened, texts: Path, short_context: int, out: Path | None) -> None:
    """Write the records as JSON, if `out` is given."""
    if out is not None:
        content = {**opened.facts, "texts": str(texts), "short_context": short_context, "positions": list(records)}
        write_whole(out, json.dumps(content, indent=1) + "\n")
