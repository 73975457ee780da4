"""Writes a packed folder group by group, in bounded memory.

A group is a run of consecutive shards that is packed on its own (see `split_into_groups`). Each step writes into one
folder, and may be killed and repeated:

1. `write_group`, in any order and in any process: the group's arrays as group_00000.NAME.npy, documents, pieces and
   sequences numbered from 0, and last its report, group_00000.json. A group without a report is not finished.
2. `join_groups`: concatenates them into the arrays of a packed folder (see `packed_format`). An array gets its name
   when it is complete, and then the groups' parts of it are removed.

The sequences of a group are neighbours in the packed folder. `Mixture` draws sequences from all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from hunyuan_pretrain.data.balance import cost_order, squared_lengths
from hunyuan_pretrain.data.digests import file_digest
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import flush_to_disk, write_file
from hunyuan_pretrain.data.indexed import TokenizedShard
from hunyuan_pretrain.data.packed_format import ARRAYS, ARRAYS_OF_COSTS, ARRAYS_OF_TOKENS, TARGETS, TOKENS
from hunyuan_pretrain.data.packing import MAX_DOCUMENTS, Packing
from hunyuan_pretrain.data.permutation import mixed_key

_PIECES_AT_A_TIME = 1 << 16
_JOINED_AT_A_TIME = 1 << 22
_SORTED_COSTS = "sorted_costs.npy"
"""Of each group, for the merge of `cost_order`; not kept."""


@dataclass(frozen=True)
class GroupReport:
    """The counts of a finished group."""

    documents: int
    """Of its shards, whether packed or left out."""
    left_out_documents: int
    shortest: int
    """Tokens of its shortest document, and of its longest."""
    longest: int
    sequences: int
    pieces: int
    most_pieces: int
    """Pieces of the sequence that has most of them."""
    tokens: int
    cut_documents: int
    dropped_fragments: int
    dropped_tokens: int
    target_tokens: int = 0
    """Of conversations: tokens that are trained on."""
    overlong_dropped: int = 0
    """Conversations longer than a sequence that were left out, and below those without their last turns; and tokens."""
    overlong_dropped_tokens: int = 0
    overlong_cut: int = 0
    overlong_cut_tokens: int = 0


def split_into_groups(shards: Sequence[TokenizedShard], group_tokens: int) -> list[int]:
    """The first shard of each group. A group has at most `group_tokens` tokens, unless its only shard has more, and
    fewer documents than 32 bits can number."""
    first_shards, tokens, documents = [0], 0, 0
    for number, shard in enumerate(shards):
        tokens, documents = tokens + shard.num_tokens, documents + shard.num_documents
        if number > first_shards[-1] and (tokens > group_tokens or documents > MAX_DOCUMENTS):
            first_shards.append(number)
            tokens, documents = shard.num_tokens, shard.num_documents
    return first_shards


def seed_of_group(seed: int, number: int) -> int:
    """The seed that a group is packed with. That of the first is `seed`, so one group is as if there were none."""
    return seed if number == 0 else mixed_key(seed, number)


def report_file(folder: Path, number: int) -> Path:
    """The file that exists if a group is finished."""
    return _part(folder, number, "json")


def read_report(folder: Path, number: int) -> GroupReport:
    """The report of a finished group."""
    return GroupReport(**json.loads(report_file(folder, number).read_bytes()))


def remove_group(folder: Path, number: int) -> None:
    """Remove what a failed group has left."""
    for file in folder.glob(f"group_{number:05}.*"):
        file.unlink(missing_ok=True)


def write_group(
    folder: Path,
    number: int,
    packing: Packing,
    lengths: np.ndarray,
    left_out_documents: int,
    copied_from: Sequence[TokenizedShard] | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
    of_chats: Mapping[str, int] | None = None,
) -> GroupReport:
    """Write a group and return its report, with the counts `of_chats` in it.

    `packing`: of the group's documents, numbered from 0. `lengths` (documents,): of all of them, in tokens, those of
    documents that were left out too. `copied_from`: the group's shards, to copy the tokens of a folder that has one
    group; `advance` is called with each number of tokens copied.
    """
    squares = squared_lengths(packing)
    order = cost_order(squares)
    arrays = {f"{name}.npy": getattr(packing, name) for name in ARRAYS}
    arrays |= {"squared_lengths.npy": squares, "cost_order.npy": order, _SORTED_COSTS: squares[order]}
    if copied_from is not None:
        file = _part(folder, number, TOKENS)
        masks = _part(folder, number, TARGETS) if copied_from[0].has_targets else None
        copied = _copy_tokens(file, masks, packing, copied_from, advance)
        for copy in (file, *([masks] if masks else [])):
            flush_to_disk(copy)
        arrays |= {f"{name}.npy": array for name, array in copied.items()}
    for name, array in arrays.items():
        file = _part(folder, number, name)
        np.save(file, array)
        flush_to_disk(file)
    report = GroupReport(
        documents=len(lengths),
        left_out_documents=left_out_documents,
        shortest=int(lengths.min(initial=2**31 - 1)),
        longest=int(lengths.max(initial=0)),
        sequences=packing.num_sequences,
        pieces=len(packing.piece_document),
        most_pieces=int(np.diff(packing.sequence_offsets).max(initial=0)),
        tokens=int(packing.piece_length.sum(dtype=np.int64)),
        cut_documents=packing.cut_documents,
        dropped_fragments=packing.dropped_fragments,
        dropped_tokens=packing.dropped_tokens,
        **(of_chats or {}),
    )
    write_file(report_file(folder, number), json.dumps(asdict(report)).encode())
    return report


def join_groups(folder: Path, reports: Sequence[GroupReport]) -> dict[str, str]:
    """Make the arrays of a packed folder of those of its finished groups; returns the SHA-256 of each file by name.

    Raises DataFormatError if there are more sequences than 32 bits can number.
    """
    num_sequences = sum(report.sequences for report in reports)
    if num_sequences > 2**32:
        raise DataFormatError(
            f"{num_sequences:,} sequences: a packed folder has at most {2**32:,}; pack to longer sequences, or pack "
            "parts of the folders, each as a separate source"
        )
    digests = {}
    # cost_order is the last of the arrays that every folder has: its merge needs what only it reads
    names = [TOKENS, TARGETS, *(f"{name}.npy" for name in (*ARRAYS, *ARRAYS_OF_COSTS, *ARRAYS_OF_TOKENS))]
    for name in names:
        parts = [_part(folder, number, name) for number in range(len(reports))]
        if not (folder / name).exists() and parts[0].exists():
            if len(parts) > 1:
                _join(folder, name, reports)
            else:
                parts[0].replace(folder / name)
        if (folder / name).exists():
            digests[name] = file_digest(folder / name)
            for part in parts:
                part.unlink(missing_ok=True)
    for number in range(len(reports)):
        _part(folder, number, _SORTED_COSTS).unlink(missing_ok=True)
    return digests


def _join(folder: Path, name: str, reports: Sequence[GroupReport]) -> None:
    """Concatenate an array of the groups, in parts that fit into memory."""
    numbers = range(len(reports))
    headers = [_load(folder, number, name) for number in numbers]
    dtype, size = np.result_type(*(array.dtype for array in headers)), sum(map(len, headers))
    shifts = [0] * len(reports)
    if name == "sequence_offsets.npy":
        shifts, size = [0, *accumulate(report.pieces for report in reports)], size - len(reports) + 1
    elif name == "piece_document.npy":
        shifts = [0, *accumulate(report.documents for report in reports)]
        dtype = np.dtype(np.uint32 if shifts[-1] <= MAX_DOCUMENTS else np.int64)
    if name == "cost_order.npy":
        parts = _merged(headers, [_load(folder, number, _SORTED_COSTS) for number in numbers])
    else:
        # the end of a group is the beginning of the next
        ends = [-1 if name == "sequence_offsets.npy" and number != numbers[-1] else None for number in numbers]
        parts = (
            part for number in numbers for part in _shifted(_load(folder, number, name)[: ends[number]], shifts[number])
        )
    del headers
    temporary = folder / f".{name}"
    with temporary.open("wb") as file:
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(file, description)
        for part in parts:
            file.write(part.astype(dtype, copy=False).data)
            size -= len(part)
    assert size == 0, f"{name}: {size} elements missing"
    flush_to_disk(temporary)
    temporary.replace(folder / name)


def _shifted(array: np.ndarray, shift: int) -> Iterator[np.ndarray]:
    """The array in parts, with `shift` added."""
    for begin in range(0, len(array), _JOINED_AT_A_TIME):
        part = array[begin : begin + _JOINED_AT_A_TIME]
        yield part.astype(np.int64) + shift if shift else part


def _merged(orders: Sequence[np.ndarray], costs: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """What `cost_order` gives for the sequences of all groups, in parts.

    `orders`: the cost_order of each group. `costs`: the costs in that order. Ranges of costs are halved until one has
    few sequences, or a single cost: ties go by number, which is the order of the groups.
    """
    first_sequences = [0, *accumulate(map(len, orders))]
    ranges = [[(0, len(order)) for order in orders]]
    while ranges:
        spans = ranges.pop()
        filled = [number for number, (begin, end) in enumerate(spans) if begin < end]
        if not filled:
            continue
        low = min(int(costs[number][spans[number][0]]) for number in filled)
        high = max(int(costs[number][spans[number][1] - 1]) for number in filled)
        if low == high:
            for number in filled:
                yield from _shifted(orders[number][slice(*spans[number])], first_sequences[number])
        elif sum(end - begin for begin, end in spans) <= _JOINED_AT_A_TIME:
            at = [slice(*spans[number]) for number in filled]
            found = [orders[n][part].astype(np.int64) + first_sequences[n] for n, part in zip(filled, at, strict=True)]
            of_costs = np.concatenate([costs[n][part] for n, part in zip(filled, at, strict=True)])
            yield np.concatenate(found)[np.argsort(of_costs, kind="stable")]
        else:
            middle = (low + high) // 2
            cuts = [int(np.searchsorted(array, middle, side="right")) for array in costs]
            cuts = [min(max(cut, begin), end) for cut, (begin, end) in zip(cuts, spans, strict=True)]
            ranges.append([(cut, end) for cut, (_, end) in zip(cuts, spans, strict=True)])
            ranges.append([(begin, cut) for cut, (begin, _) in zip(cuts, spans, strict=True)])


def _part(folder: Path, number: int, name: str) -> Path:
    return folder / f"group_{number:05}.{name}"


def _load(folder: Path, number: int, name: str) -> np.ndarray:
    return np.asarray(np.load(_part(folder, number, name), mmap_mode="r", allow_pickle=False))


def _copy_tokens(
    file: Path,
    masks: Path | None,
    packing: Packing,
    shards: Sequence[TokenizedShard],
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Write the tokens of all pieces in the order of the sequences, and to `masks` their targets; returns
    `sequence_starts` and `next_tokens`."""
    first_documents = np.cumsum([0] + [shard.num_documents for shard in shards])
    next_tokens = np.full(len(packing.piece_document), -1, dtype=np.int32)
    piece = 0
    with file.open("wb") as output, masks.open("wb") if masks else nullcontext() as mask_output:
        for begin in range(0, len(next_tokens), _PIECES_AT_A_TIME):
            part = slice(begin, begin + _PIECES_AT_A_TIME)
            documents = packing.piece_document[part].astype(np.int64)
            numbers = np.searchsorted(first_documents, documents, side="right") - 1
            columns = (
                numbers,
                documents - first_documents[numbers],
                packing.piece_start[part],
                packing.piece_length[part],
            )
            for number, document, start, length in zip(*(column.tolist() for column in columns), strict=True):
                shard = shards[number]
                first = shard.start(document) + start
                output.write(shard.tokens[first : first + length].data)
                if mask_output is not None and shard.targets is not None:
                    mask_output.write(shard.targets[first : first + length].data)
                if start + length < shard.lengths[document]:
                    next_tokens[piece] = shard.tokens[first + length]
                piece += 1
            advance(int(packing.piece_length[part].sum(dtype=np.int64)))
    ends = np.concatenate([[0], np.cumsum(packing.piece_length, dtype=np.int64)])
    return {"sequence_starts": ends[packing.sequence_offsets], "next_tokens": next_tokens}
