"""Context parallelism: which rows of a micro-batch a rank holds, and the communication that lets it attend to all rows.

A micro-batch is packed sequences of equal length, concatenated and split into documents that attend only to themselves.
Each rank holds the same number of rows of every sequence, in chunks chosen so that all ranks have about the same number
of query-key pairs; for one document that fills its sequence this is the zigzag of Llama 3 (arXiv 2407.21783, section
3.3.2). There are two methods: `all_gather` gives every rank the keys and values of all rows, once for all layers that
share them; `all_to_all` gives it all rows of some heads (DeepSpeed-Ulysses, arXiv 2309.14509). The backward pass of
each is its transpose.

Shapes: T rows of this rank, S = T * cp rows of the micro-batch, N query heads, G key/value heads (both of this
tensor-parallel rank), H head dim.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_pretrain.parallel.collectives import all_gather_rows, exchange_rows, reduce_scatter_rows
from hunyuan_pretrain.runtime.handover import to_device

Ranges = list[tuple[int, int]]
"""(start, end) of rows, ascending, not adjacent."""
Method = Literal["all_gather", "all_to_all"]

MAX_CHUNKS = 8
"""Maximum number of chunks of a sequence per rank: more chunks split more documents, and each later piece of a document
takes two kernel calls."""
EVEN_ENOUGH = 1.05
"""Imbalance at or below which more chunks are not tried."""


def rows_of_ranks(cu_seqlens: Sequence[int], num_sequences: int, cp_size: int, unit_tokens: int) -> list[Ranges]:
    """The row ranges of each context-parallel rank: whole units, and the same number of rows of every sequence.

    `cu_seqlens` are the document boundaries of a micro-batch of `num_sequences` sequences; every end of a sequence
    is one of them. A pure function, so all ranks compute the same. Takes the smallest number of chunks per rank
    that is even enough, else the most even one, or one run of each sequence if that is more even. Raises ValueError
    if a sequence is not a multiple of cp_size * unit_tokens tokens.
    """
    tokens, rest = divmod(cu_seqlens[-1], num_sequences)
    units, odd_tokens = divmod(tokens, cp_size * unit_tokens)
    if rest or odd_tokens or not units:
        sizes = (
            f"{cu_seqlens[-1]} tokens in {num_sequences} sequences, context_parallel_size {cp_size}, units of "
            f"{unit_tokens} tokens"
        )
        raise ValueError(f"{sizes}: every rank needs the same whole number of units of each sequence")
    if cp_size == 1:
        return [[(0, cu_seqlens[-1])]]
    chunks = [number for number in range(1, units + 1) if units % number == 0]
    # one chunk per rank is the worst choice for long documents, so a prime number of units may exceed the limit
    chunks = [number for number in chunks if number <= max([MAX_CHUNKS, *chunks[1:2]])]
    best: list[Ranges] = []
    least = float("inf")
    for number in chunks:
        found = _assign_chunks(cu_seqlens, num_sequences, cp_size, tokens // (cp_size * number))
        found_imbalance = imbalance(cu_seqlens, found)
        if found_imbalance < least:
            best, least = found, found_imbalance
        if least <= EVEN_ENOUGH:
            return best
    run = tokens // cp_size
    runs = [[(s * tokens + r * run, s * tokens + (r + 1) * run) for s in range(num_sequences)] for r in range(cp_size)]
    return runs if imbalance(cu_seqlens, runs) < least else best


def imbalance(cu_seqlens: Sequence[int], ranges_of_ranks: Sequence[Ranges]) -> float:
    """The most query-key pairs of any rank, divided by their mean over ranks; 1 is even."""
    pairs_before = _pairs_before(cu_seqlens)
    pairs = [sum(pairs_before(end) - pairs_before(start) for start, end in ranges) for ranges in ranges_of_ranks]
    return max(pairs) * len(pairs) / sum(pairs)


def _pairs_before(cu_seqlens: Sequence[int]) -> Callable[[int], int]:
    """Returns a function: row -> query-key pairs of all queries before it."""
    before_document = list(accumulate((_triangle(end - start) for start, end in pairwise(cu_seqlens)), initial=0))

    def pairs_before(row: int) -> int:
        document = bisect_right(cu_seqlens, row) - 1
        return before_document[document] + _triangle(row - cu_seqlens[document])

    return pairs_before


def _triangle(queries: int) -> int:
    return queries * (queries + 1) // 2


def _assign_chunks(cu_seqlens: Sequence[int], num_sequences: int, cp_size: int, chunk_tokens: int) -> list[Ranges]:
    """Assign chunks sequence by sequence, in rounds: of the cp_size costliest chunks left, the costliest goes to the
    least loaded rank, the next to the next."""
    pairs_before = _pairs_before(cu_seqlens)
    ranges: list[Ranges] = [[] for _ in range(cp_size)]
    load = [0] * cp_size
    tokens = cu_seqlens[-1] // num_sequences
    for sequence in range(num_sequences):
        starts = range(sequence * tokens, (sequence + 1) * tokens, chunk_tokens)
        cost = {start: pairs_before(start + chunk_tokens) - pairs_before(start) for start in starts}
        costliest_first = sorted(starts, key=lambda start: -cost[start])
        for first in range(0, len(starts), cp_size):
            least_busy_first = sorted(range(cp_size), key=lambda rank: load[rank])
            for rank, start in zip(least_busy_first, costliest_first[first : first + cp_size], strict=True):
                ranges[rank].append((start, start + chunk_tokens))
                load[rank] += cost[start]
    return [_merged(sorted(chunks)) for chunks in ranges]


def _merged(chunks: Ranges) -> Ranges:
    merged: Ranges = []
    for start, end in chunks:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return merged


class ContextSlice(NamedTuple):
    """What one context-parallel rank holds of a micro-batch, and how to put the rows of all ranks in order."""

    group: dist.ProcessGroup
    method: Method
    ranges: Ranges
    """Of this rank."""
    rows_T: Tensor
    """int64 rows of the micro-batch on this rank, ascending: the index into tokens, labels, positions."""
    rows_S: Tensor
    """int64 rows of all ranks, in rank order."""
    position_S: Tensor
    """int64 position in rows_S of each row of the micro-batch."""


def context_slice(
    group: dist.ProcessGroup,
    method: Method,
    cu_seqlens: Sequence[int],
    num_sequences: int,
    unit_tokens: int,
    device: torch.device | str,
) -> ContextSlice:
    """This rank's slice of a micro-batch, for all layers. Arguments and errors as in rows_of_ranks. Communicates
    nothing."""
    ranges_of_ranks = rows_of_ranks(cu_seqlens, num_sequences, group.size(), unit_tokens)
    rows_S = torch.cat([torch.arange(start, end) for ranges in ranges_of_ranks for start, end in ranges])
    position_S = torch.empty_like(rows_S)
    position_S[rows_S] = torch.arange(len(rows_S))
    rank = group.rank()
    rows_T = rows_S.chunk(group.size())[rank]
    return ContextSlice(
        group, method, ranges_of_ranks[rank], *(to_device(rows, device) for rows in (rows_T, rows_S, position_S))
    )


def gather_keys_values(k_TGH: Tensor, v_TGH: Tensor, context: ContextSlice) -> tuple[Tensor, Tensor]:
    """(S, G, H) keys and values of all rows, in micro-batch order; call it once for all layers that share them.

    Communicates: context-parallel group, one all-gather; backward one reduce-scatter, a sum in the gradient's dtype.
    """
    kv_SGH = _GatherRows.apply(torch.cat((k_TGH, v_TGH), dim=-1), context)
    k_SGH, v_SGH = kv_SGH.chunk(2, dim=-1)
    return k_SGH, v_SGH


def sequence_to_heads(x_TNH: Tensor, context: ContextSlice) -> Tensor:
    """(T, N, H), this rank's rows, to (S, N / cp, H): all rows in micro-batch order, for the rank-th block of heads.

    N must be a multiple of cp. Query heads are ordered by their key/value heads, so with both split this way a rank
    gets the queries of its keys. Communicates: context-parallel group, one all-to-all, and one in the backward pass.
    """
    return _SequenceToHeads.apply(x_TNH, context)


def heads_to_sequence(x_SNH: Tensor, context: ContextSlice) -> Tensor:
    """The inverse of sequence_to_heads: (S, N / cp, H) to (T, N, H). Communicates: the same."""
    return _HeadsToSequence.apply(x_SNH, context)


def keys_values_to_heads(k_TGH: Tensor, v_TGH: Tensor, context: ContextSlice) -> tuple[Tensor, Tensor]:
    """sequence_to_heads of keys and values, (S, G / cp, H) each, in one all-to-all; call it once for all layers that
    share them."""
    k_SGH, v_SGH = sequence_to_heads(torch.cat((k_TGH, v_TGH), dim=-1), context).chunk(2, dim=-1)
    return k_SGH, v_SGH


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TGH: Tensor, context: ContextSlice) -> Tensor:
        ctx.context = context
        return all_gather_rows(x_TGH, context.group).index_select(0, context.position_S)

    @staticmethod
    def backward(ctx: Any, grad_SGH: Tensor) -> tuple[Tensor, None]:
        context = ctx.context
        return reduce_scatter_rows(grad_SGH.index_select(0, context.rows_S), context.group), None


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, context: ContextSlice) -> Tensor:
        ctx.context = context
        return _to_heads(x_TNH, context)

    @staticmethod
    def backward(ctx: Any, grad_SNH: Tensor) -> tuple[Tensor, None]:
        return _to_sequence(grad_SNH, ctx.context), None


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SNH: Tensor, context: ContextSlice) -> Tensor:
        ctx.context = context
        return _to_sequence(x_SNH, context)

    @staticmethod
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grad_TNH, ctx.context), None


def _to_heads(x_TNH: Tensor, context: ContextSlice) -> Tensor:
    by_receiver = x_TNH.unflatten(1, (context.group.size(), -1)).transpose(0, 1)
    return exchange_rows(by_receiver, context.group).flatten(0, 1).index_select(0, context.position_S)


def _to_sequence(x_SNH: Tensor, context: ContextSlice) -> Tensor:
    by_receiver = x_SNH.index_select(0, context.rows_S).unflatten(0, (context.group.size(), -1))
    return exchange_rows(by_receiver, context.group).transpose(0, 1).flatten(1, 2)
