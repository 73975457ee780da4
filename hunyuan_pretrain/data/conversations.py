"""Conversations longer than a sequence. They are never cut anywhere: without its end a question has no answer, and
without its beginning an answer has no question. Instead they are refused, left out, or lose whole turns at their end.
A pair counts as one conversation, and is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from hunyuan_pretrain.data.arrays import IS_TARGET
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.indexed import TokenizedShard

Overlong = Literal["error", "drop", "cut_turns"]
"""What happens to conversations longer than a sequence."""


def fitted(
    shards: Sequence[TokenizedShard],
    lengths: np.ndarray,
    sequence_length: int,
    overlong: Overlong,
    is_pairs: bool = False,
) -> tuple[np.ndarray, dict[str, int]]:
    """(tokens to pack of each conversation, (conversations,) int32; the counts of packed_groups.GroupReport).

    `lengths` (conversations,): tokens of all conversations of the shards, 0 for those that are not wanted. With
    "cut_turns" the packed tokens end with the last answer that ends within the sequence; a conversation whose first
    answer does not is left out. Raises DataFormatError with "error", if one is too long; if a shard has no mask.
    """
    assert overlong in get_args(Overlong), overlong
    too_long = np.flatnonzero(lengths > sequence_length)
    if len(too_long) and overlong == "error":
        what, choices = ("pair", "drop") if is_pairs else ("conversation", "drop or cut_turns")
        raise DataFormatError(
            f"{shards[0].folder}: {len(too_long):,} {what}s have more than --sequence-length {sequence_length:,} "
            f"tokens, the first is {what} {too_long[0]:,}, the longest has {int(lengths.max()):,}; pack to "
            f"longer sequences, or choose --overlong {choices}"
        )
    kept = lengths.astype(np.int32)
    counts = dict.fromkeys(
        ("overlong_dropped", "overlong_dropped_tokens", "overlong_cut", "overlong_cut_tokens", "target_tokens"), 0
    )
    first = 0
    for shard in shards:
        targets = shard.targets
        if targets is None:
            raise DataFormatError(f"{shard.folder}: shard {shard.name} has no mask of conversations; tokenize again")
        own = range(first, first + shard.num_documents)
        for number in too_long[np.searchsorted(too_long, own.start) : np.searchsorted(too_long, own.stop)].tolist():
            start = shard.start(number - first)
            end = _last_answer(targets[start : start + sequence_length + 1]) if overlong == "cut_turns" else 0
            kept[number] = end
            what = "overlong_cut" if end else "overlong_dropped"
            counts[what] += 1
            counts[f"{what}_tokens"] += int(lengths[number]) - end
        counts["target_tokens"] += _num_targets(shard, targets, kept[own.start : own.stop])
        first = own.stop
    return kept, counts


def _last_answer(targets: np.ndarray) -> int:
    """Tokens up to the end of the last answer that ends before the last of these tokens; 0 if none does."""
    ends = np.flatnonzero((targets[:-1] != 0) & (targets[1:] == 0))
    return int(ends[-1]) + 1 if len(ends) else 0


def _num_targets(shard: TokenizedShard, targets: np.ndarray, kept: np.ndarray) -> int:
    """Targets among the first `kept` tokens of each conversation of a shard."""
    before = np.concatenate([[0], np.cumsum(targets & IS_TARGET, dtype=np.int64)])
    starts = np.array([shard.start(number) for number in range(shard.num_documents)], dtype=np.int64)
    return int((before[starts + kept] - before[starts]).sum())
