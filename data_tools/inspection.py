"""Prints the content of a tokenized or packed folder in readable form."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools.progress import describe_skipped
from hunyuan_pretrain.data.arrays import IS_TARGET, OF_REJECTED, PAIRS
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import MANIFEST, manifest_field, manifest_format
from hunyuan_pretrain.data.indexed import TOKENIZED_FORMAT, TokenizedDataset
from hunyuan_pretrain.data.packed_dataset import PackedDataset, PackedSequence
from hunyuan_pretrain.data.packed_format import PACKED_FORMAT
from hunyuan_pretrain.data.tokenizer import Tokenizer, UnknownIdError

_SHOWN_CHARACTERS = 240
_SHOWN_PIECES = 6
_LENGTHS_AT_A_TIME = 1 << 22


def inspect(
    folder: str,
    console: Console,
    *,
    num_samples: int,
    tokenizer_path: str | None,
    verify: bool,
    num_positions: int = 0,
) -> None:
    """Print counts, a histogram of lengths and `num_samples` samples of a tokenized or packed folder. Samples are
    decoded if a tokenizer is given.

    num_positions: of each packed sample, the token, the label and whether it is trained on are printed position by
    position, this many from the first label on.

    `verify` also reads every file and compares it with its SHA-256. Raises DataFormatError if the folder is neither
    kind, if it is damaged, or if it was written with another tokenizer.
    """
    kind = manifest_format(folder)
    if kind not in (TOKENIZED_FORMAT, PACKED_FORMAT):
        raise DataFormatError(
            f"{Path(folder) / MANIFEST}: not written by `hunyuan-data tokenize` or `pack`; give a folder that is"
        )
    tokenizer = Tokenizer.load(tokenizer_path) if tokenizer_path else None
    packed = PackedDataset(folder) if kind == PACKED_FORMAT else None
    tokenized = TokenizedDataset(folder) if packed is None else None
    found = packed.index.tokenizer_digest if packed else tokenized.tokenizer_digest if tokenized else ""
    if tokenizer and tokenizer.digest != found:
        raise DataFormatError(
            f"{folder}: written with tokenizer {found[:12]}..., but {tokenizer_path} is {tokenizer.digest[:12]}...; "
            "give the tokenizer of the data"
        )
    if packed:
        _print_packed(packed, console)
    elif tokenized:
        _print_tokenized(tokenized, console)
    if verify:
        (packed.index if packed else tokenized).verify()  # type: ignore[union-attr]
        console.print("every file has the SHA-256 of its manifest")
    try:
        if packed:
            for number in _spread(len(packed), num_samples):
                _print_sequence(packed, number, tokenizer, console)
                if num_positions:
                    _print_positions(packed[number], num_positions, tokenizer, console)
        elif tokenized:
            for number in _spread(tokenized.num_documents, num_samples):
                what = "pair" if tokenized.is_pairs else "document"
                console.rule(f"{what} {number}, {len(tokenized.document(number)):,} tokens", align="left")
                if tokenized.is_pairs:
                    _print_tokenized_pair(tokenized, number, tokenizer, console)
                else:
                    console.print(_text(tokenized.document(number), tokenizer))
    except UnknownIdError as error:
        raise DataFormatError(f"{folder}: {error}; a file changed after it was written, --verify says which") from None


def _print_tokenized(dataset: TokenizedDataset, console: Console) -> None:
    counts = {
        name: manifest_field(dataset.folder, dataset.manifest, name, int)
        for name in ("bytes", "empty_documents", "rejects")
    }
    manifest = {"passed_over": 0, "skipped": {}, **dataset.manifest}  # older manifests lack these
    passed_over = manifest_field(dataset.folder, manifest, "passed_over", int)
    passed_over = f", {passed_over:,} by --where" if passed_over else ""
    skipped = manifest_field(dataset.folder, manifest, "skipped", dict)
    skipped = {str(reason): manifest_field(dataset.folder, skipped, reason, int) for reason in skipped}
    rows = [
        ("documents", f"{dataset.num_documents:,}"),
        ("tokens", f"{dataset.num_tokens:,} ({dataset.dtype})"),
        ("bytes of text", f"{counts['bytes']:,} ({counts['bytes'] / dataset.num_tokens:.2f} per token)"),
        ("left out", f"{counts['empty_documents']:,} empty, {counts['rejects']:,} rejected{passed_over}"),
        *([("files", describe_skipped(skipped))] if skipped else []),
        ("shards", f"{len(dataset.shards):,}"),
        *_chat_rows(dataset.folder, dataset.manifest, dataset.num_tokens),
        ("vocabulary", f"{dataset.vocab_size:,} ids, tokenizer {dataset.tokenizer_digest[:12]}"),
        *_source_rows(dataset.folder, dataset.manifest),
    ]
    _print_rows(f"{dataset.folder}: tokenized", rows, console)
    _print_histogram("documents by length", (shard.lengths for shard in dataset.shards), console)


def _print_packed(dataset: PackedDataset, console: Console) -> None:
    index = dataset.index
    room = index.num_sequences * index.sequence_length
    num_pieces, most_pieces = len(index.piece_length), index.most_pieces
    rows = [
        ("sequences", f"{index.num_sequences:,} of {index.sequence_length:,} tokens"),
        ("tokens", f"{index.num_tokens:,}"),
        ("padding", f"{index.padding_tokens:,} tokens ({index.padding_tokens / room:.4%})"),
        ("documents", f"{index.num_documents:,}"),
        ("documents cut", f"{index.cut_documents:,} ({index.cut_documents / index.num_documents:.2%})"),
        ("pieces per sequence", f"{num_pieces / index.num_sequences:.1f} on average, {most_pieces:,} at most"),
        ("vocabulary", f"{index.vocab_size:,} ids, tokenizer {index.tokenizer_digest[:12]}"),
        *_chat_rows(index.folder, index.manifest, index.num_tokens),
        ("seed", f"{manifest_field(index.folder, index.manifest, 'seed', int)}"),
        *_source_rows(index.folder, index.manifest),
    ]
    _print_rows(f"{index.folder}: packed", rows, console)
    starts = range(0, num_pieces, _LENGTHS_AT_A_TIME)
    parts = (index.piece_length[start : start + _LENGTHS_AT_A_TIME] for start in starts)
    _print_histogram("pieces by length", parts, console)


def _chat_rows(folder: Path, manifest: dict[str, Any], num_tokens: int) -> list[tuple[str, str]]:
    """Of conversations: what is trained on, and those that were too long for a sequence."""
    if "chat" not in manifest:
        return []
    chat = manifest_field(folder, manifest, "chat", dict)
    targets = manifest_field(folder, manifest, "target_tokens", int)
    also = ", and the <|extra_0|> before them" if chat.get("train_end_of_user") else ""
    rows = [("pairs", "each document is two conversations: with the chosen, and with the rejected answer")]
    rows = [
        *(rows if chat.get(PAIRS) else []),
        ("trained on", f"{targets:,} tokens ({targets / num_tokens:.1%}): answers with their <|eos|>{also}"),
        ("system prompt", str(chat.get("system_prompt")) or "none"),
    ]
    if "overlong" in manifest:
        lost = manifest_field(folder, manifest, "overlong", dict)
        dropped, dropped_tokens, cut, cut_tokens = (
            manifest_field(folder, lost, name, int) for name in ("dropped", "dropped_tokens", "cut", "cut_tokens")
        )
        left_out = f"{dropped:,} left out ({dropped_tokens:,} tokens)"
        rows.append(("too long", f"{left_out}, {cut:,} without their last turns ({cut_tokens:,} tokens)"))
    return rows


def _source_rows(folder: Path, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for source in manifest_field(folder, manifest, "sources", list):
        path, documents, tokens = (
            manifest_field(folder, source, name, kind)
            for name, kind in (("path", str), ("documents", int), ("tokens", int))
        )
        rows.append(("from", f"{path}: {documents:,} documents, {tokens:,} tokens"))
    return rows


def _print_rows(title: str, rows: list[tuple[str, str]], console: Console) -> None:
    table = Table(title=escape(title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table)


def _print_histogram(title: str, lengths: Iterable[np.ndarray], console: Console) -> None:
    table = Table("tokens", "number", "share", "share of tokens", title=title, title_justify="left")
    numbers, tokens = np.zeros(32, dtype=np.int64), np.zeros(32)
    for part in lengths:
        doubling = np.floor(np.log2(np.maximum(part, 1))).astype(np.int64)
        numbers += np.bincount(doubling, minlength=32)
        tokens += np.bincount(doubling, weights=part.astype(np.float64), minlength=32)
    for power in np.flatnonzero(numbers).tolist():
        span = f"{2**power:,} to {2 ** (power + 1) - 1:,}"
        table.add_row(
            span, f"{numbers[power]:,}", f"{numbers[power] / numbers.sum():.1%}", f"{tokens[power] / tokens.sum():.1%}"
        )
    console.print(table)


def _print_sequence(dataset: PackedDataset, number: int, tokenizer: Tokenizer | None, console: Console) -> None:
    sequence = dataset[number]
    pieces = dataset.documents(number)
    console.rule(f"sequence {number}: {len(pieces)} pieces, {int(sequence.loss_mask.sum()):,} labels", align="left")
    begin = 0
    for place, (document, start, length) in enumerate(pieces[:_SHOWN_PIECES]):
        what, ids = "pair" if dataset.index.is_pairs else "document", sequence.tokens[begin : begin + length]
        console.print(f"[bold]── {what} {document}, tokens {start:,} to {start + length - 1:,}[/bold]")
        if dataset.index.is_pairs:
            is_target = np.concatenate([[False], sequence.loss_mask[begin : begin + length - 1]])
            _print_pair(ids, is_target, int(sequence.cu_seqlens[2 * place + 1]) - begin, tokenizer, console)
        else:
            console.print(_text(ids, tokenizer))
        begin += length
    if len(pieces) > _SHOWN_PIECES:
        console.print(f"[bold]── {len(pieces) - _SHOWN_PIECES} more pieces[/bold]")
    padding = dataset.sequence_length - sum(length for _, _, length in pieces)
    if padding:
        console.print(f"[bold]── padding, {padding:,} tokens[/bold]")


def _print_tokenized_pair(
    dataset: TokenizedDataset, number: int, tokenizer: Tokenizer | None, console: Console
) -> None:
    shard, within = dataset.locate(number)
    ids, first = shard.document(within), shard.start(within)
    if shard.targets is None:
        raise DataFormatError(f"{shard.folder}: {shard.name} has no targets, so it holds no pairs; tokenize again")
    targets = shard.targets[first : first + len(ids)]
    split = int(np.argmax((targets & OF_REJECTED) != 0))
    _print_pair(ids, (targets & IS_TARGET) != 0, split, tokenizer, console)


def _print_pair(
    ids: np.ndarray, is_target: np.ndarray, split: int, tokenizer: Tokenizer | None, console: Console
) -> None:
    """What both conversations begin with, and the two answers. split: where the second conversation begins."""
    answers = [int(np.argmax(is_target[:split])), split + int(np.argmax(is_target[split:]))]
    for name, begin, end in (
        ("both", 0, answers[0]),
        ("chosen", answers[0], split),
        ("rejected", answers[1], len(ids)),
    ):
        console.print(f"[bold]{name}:[/bold] {_text(ids[begin:end], tokenizer)}")


def _print_positions(
    sequence: PackedSequence, num_positions: int, tokenizer: Tokenizer | None, console: Console
) -> None:
    """A table of positions: from a little before the first label that is trained on."""
    table = Table("position", "token", "label", "trained on", title_justify="left")
    trained = np.flatnonzero(sequence.loss_mask)
    first = max(int(trained[0]) - 4, 0) if len(trained) else 0
    for position in range(first, min(first + num_positions, len(sequence.tokens))):
        found = [int(ids[position]) for ids in (sequence.tokens, sequence.labels)]
        shown = [f"{one}" if tokenizer is None else f"{one} {tokenizer.decode([one])!r}" for one in found]
        table.add_row(str(position), *map(escape, shown), "yes" if sequence.loss_mask[position] else "")
    console.print(table)


def _text(ids: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """A piece as text, shortened in the middle, or its first ids if there is no tokenizer."""
    if tokenizer is None:
        shown = [str(token) for token in ids[:16].tolist()]
        return " ".join([*shown, "..."] if len(ids) > 16 else shown)
    if len(ids) <= 2 * _SHOWN_CHARACTERS:
        text = tokenizer.decode(ids)
    else:
        # Enough ids for the characters shown at both ends; a long piece is not decoded completely.
        text = tokenizer.decode(ids[:_SHOWN_CHARACTERS]) + tokenizer.decode(ids[-_SHOWN_CHARACTERS:])
    if len(text) > _SHOWN_CHARACTERS or len(ids) > 2 * _SHOWN_CHARACTERS:
        text = f"{text[: _SHOWN_CHARACTERS // 2]} [...] {text[-_SHOWN_CHARACTERS // 2 :]}"
    return escape(text)


def _spread(total: int, wanted: int) -> list[int]:
    """Up to `wanted` evenly spaced numbers below `total`."""
    wanted = min(total, wanted)
    return [i * total // wanted for i in range(wanted)]
