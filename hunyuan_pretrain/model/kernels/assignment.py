"""Assignment of choices to experts and rows within the capacity, as two Triton kernels: the numbers of
model.recycle_routing.assign_within_capacity, bit by bit.

`_list_free_slots` sorts each group's free slots by priority, `_place_choices` gives every choice its slot. Programs of
a launch share nothing: each counts again what it needs of its group, which is a few thousand numbers. So both launches
have many programs, and results do not depend on their order.

Free slots are sorted by rank: a slot's position is the number of the group's free slots with a smaller (priority, slot)
pair. That takes S^2 comparisons of a group, in tiles spread over its programs, 17 million at 4,096 slots. Triton's own
sort returns keys without their positions, would need the whole group in one program, padded to a power of two, and is
not stable.

Shapes: T tokens of this rank, n routing groups, g tokens of a group, K top-k, c = K * g choices of a group (all first
choices, then all second ones), E experts, S slots of a group (those of an expert are consecutive), R rows. In kernels:
P slots of this program, Q slots compared with them, B choices of a block, X experts padded to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hunyuan_pretrain.config.derived import expert_capacity
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.recycle_routing import Assignment, is_permutation, key_of, num_dropped
from hunyuan_pretrain.model.routing import TrainingRouting

# splitmix64's constants, as the int64 with the same bits
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_FACTOR_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_FACTOR_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))

SLOT_BLOCK = 64
"""Slots of a program, and slots compared with them at a time: 4,096 comparisons, 32 for each of 128 threads."""
TILE = 8192
"""Elements of a tile (choices, experts): at 16 experts 512 choices at a time."""


@torch.no_grad()
def assign_within_capacity(
    chosen_TK: Tensor, config: HunyuanConfig, layer: int, routing: TrainingRouting
) -> Assignment:
    """As model.recycle_routing.assign_within_capacity, in two launches; chosen_TK may have any strides.

    Per choice it must read 8 bytes (the expert) and write 16 (expert and row), and per row write 8 (the token). It
    reads the experts of a group once per 64 slots and once per block of choices, from cache, and in addition writes 8
    bytes and 4 per row (the list of free slots, and rows marked as empty) and reads 4 per recycled choice. Raises
    ValueError if chosen_TK is no int64 or does not hold whole routing groups.
    """
    (T, K), E, g = chosen_TK.shape, config.num_moe_experts, config.model.moe_routing_group_tokens
    capacity, recycles, device = expert_capacity(config.model), config.model.recycle_routing, chosen_TK.device
    group_n, n = routing.group_n, T // g
    if chosen_TK.dtype != torch.int64 or group_n.dtype != torch.int64:
        raise ValueError(f"assignment: experts are {chosen_TK.dtype}, group numbers {group_n.dtype}; must be int64")
    if T % g or group_n.shape != (n,):
        raise ValueError(f"assignment: {T} tokens and {len(group_n)} group numbers are no whole groups of {g} tokens")
    S, R, experts_padded = E * capacity, n * E * capacity, triton.next_power_of_2(E)
    block = max(16, min(triton.next_power_of_2(K * g), TILE // experts_padded))
    expert_TK, row_TK = (torch.empty(T, K, dtype=torch.int64, device=device) for _ in range(2))
    token_R = torch.empty(R, dtype=torch.int64, device=device)
    chosen_nE, slot_nS = (torch.empty(n, width, dtype=torch.int32, device=device) for width in (E, S))
    choices: dict[str, Any] = {
        "chosen": chosen_TK, "stride_t": chosen_TK.stride(0), "stride_k": chosen_TK.stride(1), "num_tokens": T,
        "g": g, "K": K, "E": E, "capacity": capacity, "num_groups": n, "recycles": recycles,
        "B": block, "X": experts_padded, "num_warps": 4,
    }  # fmt: skip
    if n:
        key = key_of(routing, layer)
        _list_free_slots[(n, triton.cdiv(S, SLOT_BLOCK))](
            group_n, group_n.stride(0), key, chosen_nE, slot_nS, token_R,
            key_is_in_memory=isinstance(key, Tensor), P=SLOT_BLOCK, **choices,
        )  # fmt: skip
        _place_choices[(n, triton.cdiv(K * g, block))](slot_nS, expert_TK, row_TK, token_R, **choices)
    whole, dropped = is_permutation(config.model, K), num_dropped(config.model, K, n)
    return Assignment(row_TK, token_R, None, whole, expert_TK, chosen_nE, dropped)


# --- choices ----------------------------------------------------------------------------------------------------------


@triton.jit
def _choices(  # type: ignore[no-untyped-def]
    chosen, stride_t, stride_k, group, block, g: tl.constexpr, K: tl.constexpr, B: tl.constexpr
):
    """(B,) experts of one block of a group's choices, -1 past its end; their tokens and which choice of the token."""
    choice_B = block * B + tl.arange(0, B)
    k_B = choice_B // g
    token_B = group.to(tl.int64) * g + choice_B % g
    expert_B = tl.load(chosen + token_B * stride_t + k_B * stride_k, mask=choice_B < K * g, other=-1)
    return expert_B.to(tl.int32), token_B, k_B


@triton.jit
def _counts(  # type: ignore[no-untyped-def]
    chosen, stride_t, stride_k, group, num_blocks,
    g: tl.constexpr, K: tl.constexpr, B: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """(X,) choices of each expert in the first `num_blocks` blocks of a group."""
    count_X = tl.zeros((X,), tl.int32)
    for block in range(num_blocks):
        expert_B, _, _ = _choices(chosen, stride_t, stride_k, group, block, g, K, B)
        count_X += tl.sum((expert_B[:, None] == tl.arange(0, X)[None, :]).to(tl.int32), 0)
    return count_X


# --- free slots -------------------------------------------------------------------------------------------------------


@triton.jit
def _mix(key):  # type: ignore[no-untyped-def]
    """splitmix64's finaliser; `>>` of an int64 copies the sign, which the masks remove."""
    key = (key ^ ((key >> 30) & ((1 << 34) - 1))) * _FACTOR_1
    key = (key ^ ((key >> 27) & ((1 << 37) - 1))) * _FACTOR_2
    return key ^ ((key >> 31) & ((1 << 33) - 1))


@triton.jit
def _slots(  # type: ignore[no-untyped-def]
    group_key, count_X, first, E: tl.constexpr, capacity: tl.constexpr, P: tl.constexpr, X: tl.constexpr
):
    """P slots from `first` on: their numbers, priorities, and whether they are free."""
    slot_P = first + tl.arange(0, P)
    priority_P = _mix(group_key + (slot_P + 1).to(tl.int64) * _GOLDEN) & ((1 << 63) - 1)
    is_of_PX = (slot_P // capacity)[:, None] == tl.arange(0, X)[None, :]
    count_P = tl.sum(tl.where(is_of_PX, count_X[None, :], 0), 1)
    return slot_P, priority_P, (slot_P % capacity >= count_P) & (slot_P < E * capacity)


@triton.jit(do_not_specialize=["key"])
def _list_free_slots(  # type: ignore[no-untyped-def]
    group_number, stride_n, key, chosen_nE, slot_nS, token_R,
    chosen, stride_t, stride_k, num_tokens, num_groups, recycles: tl.constexpr,
    g: tl.constexpr, K: tl.constexpr, E: tl.constexpr, capacity: tl.constexpr,
    B: tl.constexpr, X: tl.constexpr, P: tl.constexpr, key_is_in_memory: tl.constexpr,
):  # fmt: skip
    """slot_nS: a group's free slots in the order of their priorities, then -1. chosen_nE: choices of each expert.
    token_R: no token, for every row. Program (group, tile of P slots)."""
    group, tile = tl.program_id(0), tl.program_id(1)
    S: tl.constexpr = E * capacity
    count_X = _counts(chosen, stride_t, stride_k, group, (K * g + B - 1) // B, g, K, B, X)
    expert_X = tl.arange(0, X)
    if tile == 0:
        tl.store(chosen_nE + group * E + expert_X, count_X, mask=expert_X < E)
    position_P = tile * P + tl.arange(0, P)
    first = group.to(tl.int64) * S
    # rows are sorted by expert, then group; here the order does not matter, only that each is written once
    tl.store(token_R + first + position_P, num_tokens, mask=position_P < S)
    if recycles:
        if key_is_in_memory:
            key = tl.load(key)
        group_key = _mix(tl.load(group_number + group * stride_n) * _GOLDEN + key)
        slot_P, priority_P, is_free_P = _slots(group_key, count_X, tile * P, E, capacity, P, X)
        rank_P = tl.zeros((P,), tl.int32)
        for other in range((S + P - 1) // P):
            slot_Q, priority_Q, is_free_Q = _slots(group_key, count_X, other * P, E, capacity, P, X)
            is_smaller_PQ = priority_Q[None, :] < priority_P[:, None]
            is_tied_PQ = (priority_Q[None, :] == priority_P[:, None]) & (slot_Q[None, :] < slot_P[:, None])
            rank_P += tl.sum((is_free_Q[None, :] & (is_smaller_PQ | is_tied_PQ)).to(tl.int32), 1)
        num_free = tl.sum(tl.where(expert_X < E, tl.maximum(capacity - count_X, 0), 0), 0)
        tl.store(slot_nS + first + rank_P, slot_P, mask=is_free_P)
        tl.store(slot_nS + first + position_P, -1, mask=(position_P >= num_free) & (position_P < S))


# --- places -----------------------------------------------------------------------------------------------------------


@triton.jit
def _place_choices(  # type: ignore[no-untyped-def]
    slot_nS, expert_TK, row_TK, token_R,
    chosen, stride_t, stride_k, num_tokens, num_groups, recycles: tl.constexpr,
    g: tl.constexpr, K: tl.constexpr, E: tl.constexpr, capacity: tl.constexpr,
    B: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Expert and row of each choice, and the token of each of these rows. Program (group, block of B choices)."""
    group, block = tl.program_id(0), tl.program_id(1)
    S: tl.constexpr = E * capacity
    before_X = _counts(chosen, stride_t, stride_k, group, block, g, K, B, X)
    chosen_B, token_B, k_B = _choices(chosen, stride_t, stride_k, group, block, g, K, B)
    is_of_BX = chosen_B[:, None] == tl.arange(0, X)[None, :]
    number_BX = tl.cumsum(is_of_BX.to(tl.int32), 0) + before_X[None, :]
    number_B = tl.sum(tl.where(is_of_BX, number_BX, 0), 1) - 1  # of the choice among those of its expert
    slot_B = tl.where(number_B < capacity, chosen_B * capacity + number_B, -1)
    if recycles:
        overflows_B = number_B >= capacity
        turn_B = tl.cumsum(overflows_B.to(tl.int32), 0) - 1 + tl.sum(tl.maximum(before_X - capacity, 0), 0)
        drawn_B = tl.load(slot_nS + group.to(tl.int64) * S + turn_B, mask=overflows_B & (turn_B < S), other=-1)
        slot_B = tl.where(overflows_B, drawn_B, slot_B)
    is_choice_B = chosen_B >= 0
    has_slot_B = is_choice_B & (slot_B >= 0)
    expert_B = tl.where(has_slot_B, slot_B // capacity, chosen_B)
    # rows are sorted by expert, then group
    row_B = (expert_B.to(tl.int64) * num_groups + group) * capacity + slot_B % capacity
    row_B = tl.where(has_slot_B, row_B, num_groups * S)
    place_B = token_B * K + k_B
    tl.store(expert_TK + place_B, expert_B.to(tl.int64), mask=is_choice_B)
    tl.store(row_TK + place_B, row_B, mask=is_choice_B)
    tl.store(token_R + row_B, token_B, mask=has_slot_B)
