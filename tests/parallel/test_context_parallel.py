"""Attention over context-parallel gloo ranks equals one rank, with the stated communication."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_pretrain.model.packed_attention import context_blocks, document_blocks, packed_attention
from hunyuan_pretrain.parallel.context_parallel import (
    ContextSlice,
    context_slice,
    gather_keys_values,
    heads_to_sequence,
    keys_values_to_heads,
    sequence_to_heads,
)
from tests.helpers.ranks import fork_ranks

BORDERS = [0, 1, 100, 128, 130, 190, 250, 256]
NUM_SEQUENCES, GRANULE_TOKENS, NUM_HEADS, NUM_GROUPS, HEAD_DIM = 2, 8, 8, 4, 16
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}
"""Largest difference relative to the largest entry; bf16 rounds the parts of a document, and their gradients before the
sum over ranks."""
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
EXPECTED = {
    "all_gather": ({"all_gather_into_tensor": 1}, {"reduce_scatter_tensor": 1}),
    # keys and values once, queries and outputs of two layers
    "all_to_all": ({"all_to_all_single": 5}, {"all_to_all_single": 5}),
}


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, q of a second layer that shares keys and values, k, v, the two output gradients; all rows."""
    generator = torch.Generator().manual_seed(0)
    heads = (NUM_HEADS, NUM_HEADS, NUM_GROUPS, NUM_GROUPS, NUM_HEADS, NUM_HEADS)
    return [torch.randn(BORDERS[-1], number, HEAD_DIM, generator=generator).to(dtype) for number in heads]


def attend(queries: list[Tensor], k: Tensor, v: Tensor, context: ContextSlice | None) -> list[Tensor]:
    """Two layers of one CLA group."""
    if context is None:
        return [packed_attention(q, k, v, document_blocks(BORDERS)) for q in queries]
    if context.method == "all_gather":
        k, v = gather_keys_values(k, v, context)
        return [packed_attention(q, k, v, context_blocks(BORDERS, context.ranges)) for q in queries]
    k, v = keys_values_to_heads(k, v, context)
    blocks = document_blocks(BORDERS)
    return [heads_to_sequence(packed_attention(sequence_to_heads(q, context), k, v, blocks), context) for q in queries]


def outputs_and_gradients(
    tensors: list[Tensor], context: ContextSlice | None, calls: Counter[str]
) -> tuple[list[Tensor], Any]:
    leaves = [x.clone().requires_grad_() for x in tensors[:4]]
    outputs = attend(leaves[:2], *leaves[2:], context)
    forward = dict(calls)
    calls.clear()
    torch.autograd.backward(outputs, tensors[4:])
    return [x.detach() for x in outputs] + [leaf.grad for leaf in leaves], (forward, dict(calls))


def compare_with_one_rank(cases: list[tuple[int, str, torch.dtype]]) -> list[Any]:
    """For each case: the calls of this rank, the largest error of each tensor relative to its largest entry, and the
    rank's rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    pairs = [dist.new_group([first, first + 1]) for first in range(0, dist.get_world_size(), 2)]
    group_of_size = {dist.get_world_size(): dist.group.WORLD, 2: pairs[dist.get_rank() // 2]}
    calls: Counter[str] = Counter()
    for name in COLLECTIVES:
        setattr(dist, name, counted(getattr(dist, name), name, calls))
    found = []
    for cp_size, method, dtype in cases:
        tensors = inputs(dtype)
        expected, _ = outputs_and_gradients([x.float() for x in tensors], None, calls)
        context = context_slice(group_of_size[cp_size], method, BORDERS, NUM_SEQUENCES, GRANULE_TOKENS, "cpu")
        actual, counts = outputs_and_gradients([x[context.rows_T] for x in tensors], context, calls)
        calls.clear()
        assert [x.dtype for x in actual] == [dtype] * 6
        errors = [
            ((x - y[context.rows_T]).abs().max() / y.abs().max()).item() for x, y in zip(actual, expected, strict=True)
        ]
        found.append((counts, errors, context.rows_T.tolist()))
    dist.destroy_process_group()
    return found


def counted(function: Any, name: str, calls: Counter[str]) -> Any:
    def call(*arguments: Any, **keywords: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **keywords)

    return call


CASES = [(cp_size, method, dtype) for cp_size in (2, 4) for method in EXPECTED for dtype in RELATIVE]


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    """One group of four ranks, or two groups of two working at the same time."""
    return fork_ranks(4, compare_with_one_rank, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_context_ranks_equals_one_rank(ranks, case):
    names = (
        "first output",
        "second output",
        "gradient of the first q",
        "gradient of the second q",
        "gradient of k",
        "gradient of v",
    )
    for rank in ranks:
        _, errors, _ = rank[CASES.index(case)]
        for name, error in zip(names, errors, strict=True):
            assert error <= RELATIVE[case[2]], f"{name} differs by {error:.1e} of its largest entry"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_that_share_keys_and_values_communicate_them_once(ranks, case):
    assert [rank[CASES.index(case)][0] for rank in ranks] == [EXPECTED[case[1]]] * 4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_ranks_of_a_group_hold_all_rows(ranks, case):
    rows = [rank[CASES.index(case)][2] for rank in ranks]
    for first in range(0, 4, case[0]):
        assert sorted(row for held in rows[first : first + case[0]] for row in held) == list(range(BORDERS[-1]))
