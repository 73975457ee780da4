"""Capacity and recycle routing: which expert computes each choice, and in which slot.

Source: arXiv 2411.02265 section 2.3.1 and the released model code, whose recycle routing never triggers. Capacity and
the random draw are per *routing group*: `moe_routing_group_tokens` consecutive tokens of one sequence. The draw is a
hash of (seed, step, layer, group, slot), so it is the same when a layer is recomputed and under every parallel layout
that keeps groups whole.

Shapes: T tokens of this rank, n routing groups, g tokens of a group, E experts, K top-k, c choices (K * g of a group,
or all T * K), C slots of an expert for one group, S = E * C slots of a group, R rows (slots of all groups).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.config.derived import expert_capacity
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.routing import DROPPED, TrainingRouting, marked

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


# --- the draw ---------------------------------------------------------------------------------------------------------


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix(keys: Tensor) -> Tensor:
    """splitmix64's finaliser for int64 tensors of any shape; int64 multiplication wraps as unsigned does."""
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return keys ^ ((keys >> 31) & ((1 << 33) - 1))


def slot_priorities(seed: int, step: int, layer: int, group_n: Tensor, num_slots: int) -> Tensor:
    """(n, num_slots) non-negative int64 random numbers, a pure function of (seed, step, layer, group, slot)."""
    key = torch.zeros((), dtype=torch.int64, device=group_n.device)
    for part in (seed, step, layer):
        key = _mix(key + _signed((part + 1) * _GOLDEN))
    group_keys = _mix(key + (group_n.to(torch.int64) + 1) * _signed(_GOLDEN))
    slots = torch.arange(1, num_slots + 1, dtype=torch.int64, device=group_n.device) * _signed(_GOLDEN)
    return _mix(group_keys[:, None] + slots) & ((1 << 63) - 1)


# --- slots of a routing group -----------------------------------------------------------------------------------------


def assign_slots(chosen_nKg: Tensor, num_experts: int, capacity: int, priority_nS: Tensor | None) -> Tensor:
    """Assign each choice a slot; a group has S = num_experts * capacity slots, and slot s belongs to expert s //
    capacity.

    chosen_nKg holds expert numbers. The first `capacity` choices of an expert keep it, where all first choices of a
    group come before all second ones, and tokens are in order. With `priority_nS`, choices whose expert is full are
    recycled. Returns slots_nKg, DROPPED where no slot was left (or, without priorities, where the expert was full).
    """
    n, K, g = chosen_nKg.shape
    choice_nc = chosen_nKg.reshape(n, K * g)
    is_chosen_ncE = marked(choice_nc[..., None], num_experts)
    slots_nc = _keep_within_capacity(choice_nc, is_chosen_ncE, capacity)
    if priority_nS is not None:
        slots_nc = _recycle(slots_nc, is_chosen_ncE.sum(1), capacity, priority_nS)
    return slots_nc.reshape(n, K, g)


def _keep_within_capacity(choice_nc: Tensor, is_chosen_ncE: Tensor, capacity: int) -> Tensor:
    """(n, c) slots of the choices among the first `capacity` of their expert; DROPPED for all others."""
    slot_nc = is_chosen_ncE.cumsum(1, dtype=torch.int32).gather(2, choice_nc[..., None]).squeeze(2) - 1
    return torch.where(slot_nc < capacity, choice_nc * capacity + slot_nc, DROPPED)


def _recycle(slots_nc: Tensor, num_chosen_nE: Tensor, capacity: int, priority_nS: Tensor) -> Tensor:
    """Recycle routing: choices without a slot take, in order, the group's free slots sorted by priority. The draw is
    uniform over free slots if the priorities are random. Returns slots_nc with those filled in; DROPPED remains where
    none was left."""
    used_nE = num_chosen_nE.clamp(max=capacity)
    slot_C = torch.arange(capacity, device=slots_nc.device)
    is_free_nS = (slot_C >= used_nE[..., None]).flatten(1)
    num_free_n = is_free_nS.sum(1, keepdim=True)
    never = torch.iinfo(torch.int64).max
    free_slots_nS = torch.where(is_free_nS, priority_nS, never).argsort(dim=1, stable=True)
    overflows_nc = slots_nc == DROPPED
    turn_nc = overflows_nc.cumsum(1) - 1
    takes_nc = overflows_nc & (turn_nc < num_free_n)
    drawn_nc = free_slots_nS.gather(1, turn_nc.clamp(0, free_slots_nS.shape[1] - 1))
    return torch.where(takes_nc, drawn_nc, slots_nc)


# --- rows of the experts ----------------------------------------------------------------------------------------------


class Assignment(NamedTuple):
    """The expert of each choice, and the fields of model.routing.RoutingPlan other than the combine weights."""

    expert_TK: Tensor  # that computes the choice; the chosen one if the choice is dropped
    row_TK: Tensor
    token_R: Tensor
    rows_E: Tensor | None
    is_permutation: bool


@torch.no_grad()
def assign_within_capacity(
    chosen_TK: Tensor, config: HunyuanConfig, layer: int, routing: TrainingRouting
) -> Assignment:
    """Assign choices to experts of limited capacity: expert_capacity rows per expert and routing group, sorted by
    expert, then group. Overflowing choices are recycled, or dropped if config.model.recycle_routing is off."""
    T, K = chosen_TK.shape
    E, g = config.num_moe_experts, config.model.moe_routing_group_tokens
    n, capacity = T // g, expert_capacity(config.model)
    chosen_nKg = chosen_TK.view(n, g, K).transpose(1, 2)
    priority_nS = (
        slot_priorities(routing.seed, routing.step, layer, routing.group_n, E * capacity)
        if config.model.recycle_routing
        else None
    )
    slots_nKg = assign_slots(chosen_nKg, E, capacity, priority_nS)
    is_dropped_nKg = slots_nKg == DROPPED
    expert_nKg = torch.where(is_dropped_nKg, chosen_nKg, slots_nKg.div(capacity, rounding_mode="floor"))
    group_n11 = torch.arange(n, device=chosen_TK.device)[:, None, None]
    num_rows = E * n * capacity
    row_nKg = torch.where(
        is_dropped_nKg, num_rows, expert_nKg * (n * capacity) + group_n11 * capacity + slots_nKg % capacity
    )
    expert_TK, row_TK = (x.transpose(1, 2).reshape(T, K) for x in (expert_nKg, row_nKg))
    token_R = torch.full((num_rows + 1,), T, dtype=torch.int64, device=chosen_TK.device)
    token_R[row_TK] = torch.arange(T, device=chosen_TK.device)[:, None].expand(T, K)
    is_permutation = K == 1 and config.model.recycle_routing and capacity * E == g
    return Assignment(expert_TK, row_TK, token_R[:num_rows], None, is_permutation)


@torch.no_grad()
def assign_without_capacity(chosen_TK: Tensor, num_experts: int) -> Assignment:
    """Assign every choice to the expert it chose (dropless); rows are sorted by expert, then by token."""
    T, K = chosen_TK.shape
    choice_c = chosen_TK.reshape(-1)
    order_R = choice_c.argsort(stable=True)
    row_c = torch.empty_like(order_R)
    row_c[order_R] = torch.arange(T * K, device=chosen_TK.device)
    rows_E = marked(chosen_TK, num_experts).sum(0)
    return Assignment(chosen_TK, row_c.view(T, K), order_R.div(K, rounding_mode="floor"), rows_E, K == 1)
