"""Capacity and recycle routing: which expert computes each choice, and in which slot.

Source: arXiv 2411.02265 section 2.3.1 and the released model code, whose recycle routing never triggers. Capacity and
the random draw are per *routing group*: `moe_routing_group_tokens` consecutive tokens of one sequence. The draw is a
hash of (seed, step, layer, group, slot), so it is the same when a layer is recomputed and under every parallel layout
that keeps groups whole.

Shapes: T tokens of this rank, n routing groups, g tokens of a group, E experts, K top-k, c choices (K * g of a group,
or all T * K), C slots of an expert for one group, S = E * C slots of a group, R rows (slots of all groups).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.config.derived import expert_capacity
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.routing import DROPPED, TrainingRouting, marked

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


# --- the draw ---------------------------------------------------------------------------------------------------------


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix(keys: Tensor) -> Tensor:
    """splitmix64's finaliser for int64 tensors of any shape; int64 multiplication wraps as unsigned does."""
    for shift, factor in _MIX:
        keys = (keys >> shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(keys).mul_(_signed(factor))
    return (keys >> _LAST_SHIFT).bitwise_and_((1 << (64 - _LAST_SHIFT)) - 1).bitwise_xor_(keys)


def draw_key(seed: int, step: int, layer: int) -> int:
    """The part of the draw's key that all groups and slots share, as an int64; the increment for the group is already
    added. In Python's integers: on a GPU each operation on one number would be a launch."""
    key = 0
    for part in (seed, step, layer):
        key = (key + (part + 1) * _GOLDEN) & _MASK64
        for shift, factor in _MIX:
            key = (key ^ (key >> shift)) * factor & _MASK64
        key ^= key >> _LAST_SHIFT
    return _signed(key + _GOLDEN)


def draw_keys(seed: int, step: int, num_layers: int) -> Tensor:
    """(L,) int64 on the CPU: the keys of all layers."""
    return torch.tensor([draw_key(seed, step, layer) for layer in range(num_layers)], dtype=torch.int64)


def key_of(routing: TrainingRouting, layer: int) -> int | Tensor:
    """The key of a layer: an int64 () tensor if the routing has keys in memory."""
    return draw_key(routing.seed, routing.step, layer) if routing.key_L is None else routing.key_L[layer]


def draws(key: int | Tensor, group_n: Tensor, slots: range) -> Tensor:
    """(n, slots) int64 of 64 random bits, a pure function of (seed, step, layer, group, slot). key: of the first
    three."""
    group_keys = _mix(group_n.to(torch.int64) * _signed(_GOLDEN) + key)
    numbers = torch.arange(slots.start + 1, slots.stop + 1, dtype=torch.int64, device=group_n.device)
    return _mix(group_keys[:, None] + numbers * _signed(_GOLDEN))


def slot_priorities(key: int | Tensor, group_n: Tensor, num_slots: int) -> Tensor:
    """(n, num_slots) non-negative int64 random numbers; `draws` without the sign."""
    return draws(key, group_n, range(num_slots)) & ((1 << 63) - 1)


# --- slots of a routing group -----------------------------------------------------------------------------------------


def assign_slots(
    chosen_nKg: Tensor, num_experts: int, capacity: int, priority_nS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Assign each choice a slot; a group has S = num_experts * capacity slots, and slot s belongs to expert s //
    capacity.

    chosen_nKg holds expert numbers. The first `capacity` choices of an expert keep it, where all first choices of a
    group come before all second ones, and tokens are in order. With `priority_nS`, choices whose expert is full are
    recycled. Returns slots_nKg, DROPPED where no slot was left (or, without priorities, where the expert was full), and
    the number of choices of each expert (n, E), int32.
    """
    n, K, g = chosen_nKg.shape
    choice_nc = chosen_nKg.reshape(n, K * g)
    # the scan runs along contiguous memory: along any other axis torch's kernel for GPUs is many times slower
    is_chosen_nEc = torch.zeros(n, num_experts, K * g, dtype=torch.int32, device=choice_nc.device)
    number_nEc = is_chosen_nEc.scatter_(1, choice_nc[:, None], 1).cumsum(2, dtype=torch.int32)
    number_nc = number_nEc.gather(1, choice_nc[:, None]).squeeze(1)  # of the choice among those of its expert, from 1
    overflows_nc = number_nc > capacity
    slots_nc = torch.add(number_nc - 1, choice_nc, alpha=capacity)
    if priority_nS is None:
        slots_nc = slots_nc.masked_fill_(overflows_nc, DROPPED)
    else:
        slots_nc = _recycle(slots_nc, overflows_nc, number_nEc[..., -1], priority_nS)
    return slots_nc.view(n, K, g), number_nEc[..., -1]


def _recycle(slots_nc: Tensor, overflows_nc: Tensor, chosen_nE: Tensor, priority_nS: Tensor) -> Tensor:
    """Recycle routing: choices that overflow take, in order, the group's free slots sorted by priority. The draw is
    uniform over free slots if the priorities are random. Returns slots_nc with those filled in, DROPPED where none was
    left."""
    num_choices, num_slots = slots_nc.shape[1], priority_nS.shape[1]
    slot_C = torch.arange(num_slots // chosen_nE.shape[1], device=slots_nc.device)
    is_used_nS = (slot_C < chosen_nE[..., None]).flatten(1)
    free_slots_nS = priority_nS.masked_fill(is_used_nS, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    turn_nc = overflows_nc.cumsum(1) - 1
    drawn_nc = free_slots_nS.gather(1, turn_nc.clamp(0, num_slots - 1))
    slots_nc = torch.where(overflows_nc, drawn_nc, slots_nc)
    excess = num_choices - num_slots  # overflowing choices minus free slots, whatever was chosen
    if excess > 0:
        slots_nc.masked_fill_(overflows_nc & (turn_nc >= turn_nc[:, -1:] + 1 - excess), DROPPED)
    return slots_nc


# --- rows of the experts ----------------------------------------------------------------------------------------------


class Assignment(NamedTuple):
    """The fields of model.routing.RoutingPlan other than the combine weights, and what was chosen and assigned."""

    row_TK: Tensor
    token_R: Tensor
    rows_E: Tensor | None
    is_permutation: bool
    expert_TK: Tensor  # that computes the choice; the chosen one if the choice is dropped
    chosen_nE: Tensor  # choices of each expert in each group, before recycling; integers
    num_dropped: int | None  # choices that no expert computes, known by construction; None: all that overflow


Assign = Callable[[Tensor, HunyuanConfig, int, TrainingRouting], Assignment]
"""assign_within_capacity, or a function with its result."""


def num_dropped(model: ModelConfig, topk: int, num_groups: int) -> int | None:
    """Choices without a slot: recycling fills all slots first, so their number does not depend on the choices. None:
    without recycling it does."""
    if not model.recycle_routing:
        return None
    return num_groups * max(0, topk * model.moe_routing_group_tokens - model.num_moe_experts * expert_capacity(model))


def is_permutation(model: ModelConfig, topk: int) -> bool:
    """Whether under a capacity every row is exactly one token."""
    num_slots = model.num_moe_experts * expert_capacity(model)
    return topk == 1 and model.recycle_routing and num_slots == model.moe_routing_group_tokens


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
        slot_priorities(key_of(routing, layer), routing.group_n, E * capacity) if config.model.recycle_routing else None
    )
    slots_nKg, chosen_nE = assign_slots(chosen_nKg, E, capacity, priority_nS)
    expert_nKg = slots_nKg.div(capacity, rounding_mode="floor")
    dropped, num_rows = num_dropped(config.model, K, n), E * n * capacity
    # from the slot in the group: rows of the same expert in other groups lie between those of this group's experts
    row_n11 = torch.arange(0, n * capacity, capacity, device=chosen_TK.device)[:, None, None]
    row_nKg = torch.add(slots_nKg + row_n11, expert_nKg, alpha=(n - 1) * capacity)
    if dropped != 0:
        is_dropped_nKg = slots_nKg == DROPPED
        expert_nKg = torch.where(is_dropped_nKg, chosen_nKg, expert_nKg)
        row_nKg.masked_fill_(is_dropped_nKg, num_rows)
    expert_TK, row_TK = (x.transpose(1, 2).contiguous().view(T, K) for x in (expert_nKg, row_nKg))
    token_R = torch.full((num_rows + 1,), T, dtype=torch.int64, device=chosen_TK.device)
    token_R[row_TK] = torch.arange(T, device=chosen_TK.device)[:, None].expand(T, K)
    whole = is_permutation(config.model, K)
    return Assignment(row_TK, token_R[:num_rows], None, whole, expert_TK, chosen_nE, dropped)


@torch.no_grad()
def assign_without_capacity(chosen_TK: Tensor, num_experts: int, num_groups: int = 1) -> Assignment:
    """Assign every choice to the expert it chose (dropless); rows are sorted by expert, then by token."""
    T, K = chosen_TK.shape
    choice_c = chosen_TK.reshape(-1)
    order_R = choice_c.argsort(stable=True)
    row_c = torch.empty_like(order_R)
    row_c[order_R] = torch.arange(T * K, device=chosen_TK.device)
    chosen_nE = marked(chosen_TK, num_experts).view(num_groups, -1, num_experts).sum(1)
    rows_E = chosen_nE[0] if num_groups == 1 else chosen_nE.sum(0)
    token_R = order_R.div(K, rounding_mode="floor") if K > 1 else order_R
    return Assignment(row_c.view(T, K), token_R, rows_E, K == 1, chosen_TK, chosen_nE, 0)
