"""Routing of tokens to experts: top-k, capacity, recycle routing, balance loss and z-loss.

Source: arXiv 2411.02265 section 2.3.1 and the released model code, which holds recycle routing as code that never
triggers. Capacity and the random draw are those of a *routing group*: `moe_routing_group_tokens` consecutive tokens of
one sequence. The draw is a hash of (seed, step, layer, group, slot), so it is the same when a layer is recomputed and
under every parallel layout that keeps groups whole.

Shapes: T tokens of this rank, n routing groups, g tokens of a group, D hidden, E experts, K top-k, C slots of an expert
for one group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device

DROPPED = -1
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix(keys: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser over int64 tensors, whose products wrap as unsigned ones do; any shape."""
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return keys ^ ((keys >> 31) & ((1 << 33) - 1))


def slot_priorities(seed: int, step: int, layer: int, group_n: torch.Tensor, num_slots: int) -> torch.Tensor:
    """(n, num_slots) non-negative int64 random numbers, a pure function of (seed, step, layer, group, slot)."""
    key = torch.zeros((), dtype=torch.int64, device=group_n.device)
    for part in (seed, step, layer):
        key = _mix(key + _signed((part + 1) * _GOLDEN))
    group_keys = _mix(key + (group_n.to(torch.int64) + 1) * _signed(_GOLDEN))
    slots = torch.arange(1, num_slots + 1, dtype=torch.int64, device=group_n.device) * _signed(_GOLDEN)
    return _mix(group_keys[:, None] + slots) & ((1 << 63) - 1)


def marked(choice: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(..., C) expert numbers -> (..., E) bool, whether an expert is among them.

    torch's one_hot and bincount look at the numbers first, for which the host waits on a GPU or for the whole tensor on
    a CPU.
    """
    return torch.zeros(*choice.shape[:-1], num_experts, dtype=torch.bool, device=choice.device).scatter_(
        -1, choice, True
    )


class _ProbabilitiesOf(torch.autograd.Function):
    """probs_TE[t, expert_TK[t, k]]; torch's own gradient of it adds at places that it sorts first, where it must be the
    same every time."""

    @staticmethod
    def forward(ctx: Any, probs_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
        ctx.expert_TK, ctx.num_experts = expert_TK, probs_TE.shape[1]
        return probs_TE.gather(1, expert_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: torch.Tensor) -> tuple[torch.Tensor, None]:
        is_of_TKE = marked(ctx.expert_TK[..., None], ctx.num_experts)
        return torch.where(is_of_TKE, grad_TK[..., None], 0.0).sum(1), None


def assign_slots(
    chosen_nKg: torch.Tensor, num_experts: int, capacity: int, priority_nS: torch.Tensor | None
) -> torch.Tensor:
    """Give each choice of an expert a slot, S = num_experts * capacity slots a group; slot s belongs to expert s //
    capacity.

    chosen_nKg holds expert numbers. The first `capacity` choices of an expert keep it, all first choices of a group
    before all second ones, tokens in order. With `priority_nS`, choices that found their expert full take, in order,
    the group's free slots sorted by priority: uniform over free slots if the priorities are random. Returns slots_nKg
    with DROPPED where no slot was left (or, without priorities, where the expert was full).
    """
    n, K, g = chosen_nKg.shape
    choice_nc = chosen_nKg.reshape(n, K * g)
    one_hot_ncE = marked(choice_nc[..., None], num_experts)
    place_nc = one_hot_ncE.cumsum(1, dtype=torch.int32).gather(2, choice_nc[..., None]).squeeze(2) - 1
    is_kept_nc = place_nc < capacity
    slots_nc = torch.where(is_kept_nc, choice_nc * capacity + place_nc, DROPPED)
    if priority_nS is not None:
        used_nE = one_hot_ncE.sum(1).clamp_(max=capacity)
        place_C = torch.arange(capacity, device=chosen_nKg.device)
        is_free_nS = (place_C >= used_nE[..., None]).reshape(n, -1)
        num_free_n = is_free_nS.sum(1, keepdim=True)
        never = torch.iinfo(torch.int64).max
        free_slots_nS = torch.where(is_free_nS, priority_nS, never).argsort(dim=1, stable=True)
        turn_nc = (~is_kept_nc).cumsum(1) - 1
        takes_nc = ~is_kept_nc & (turn_nc < num_free_n)
        drawn_nc = free_slots_nS.gather(1, turn_nc.clamp(0, free_slots_nS.shape[1] - 1))
        slots_nc = torch.where(takes_nc, drawn_nc, slots_nc)
    return slots_nc.reshape(n, K, g)


class RoutingKey(NamedTuple):
    """What the random draw and the losses of one micro-batch are keyed and scaled by."""

    seed: int
    step: int
    group_n: torch.Tensor  # (n,) number of each routing group within the step's global batch
    num_global_groups: int  # routing groups of the step's global batch

    def share(self, rank: int, size: int) -> RoutingKey:
        """The key of one of `size` ranks that divide the tokens evenly, in order."""
        return self._replace(group_n=self.group_n.view(size, -1)[rank])


class CountedTokens(NamedTuple):
    """Routing of a validation: every token goes where it chose, and the statistics count some of the tokens only."""

    is_counted_T: torch.Tensor  # bool

    def share(self, rank: int, size: int) -> CountedTokens:
        """Those of one of `size` ranks that divide the tokens evenly, in order."""
        return CountedTokens(self.is_counted_T.view(size, -1)[rank])


Routing = RoutingKey | CountedTokens | None
"""RoutingKey: training, with capacity, recycling and losses. Otherwise every token goes where it chose; None: and all
are counted."""


class RoutingPlan(NamedTuple):
    """Where each token goes. Rows are the experts' input, expert after expert, on this rank before any exchange."""

    weight_TK: torch.Tensor  # fp32 combine weights, 0 where dropped
    row_TK: torch.Tensor  # row of each choice, or num_rows where dropped
    token_R: torch.Tensor  # token of each row, or T where the slot stayed empty
    rows_E: torch.Tensor | int  # rows of each expert: one number for all under a capacity, else int64 (E,)
    is_permutation: bool  # no choice dropped and no slot empty, by construction

    def experts_TK(self, num_experts: int) -> torch.Tensor:
        """The expert that computes each choice, DROPPED where none does; int64, on the CPU."""
        rows_E = torch.full((num_experts,), self.rows_E) if isinstance(self.rows_E, int) else self.rows_E.cpu()
        # rows beyond the last expert's are those of dropped choices
        expert_TK = torch.bucketize(self.row_TK.cpu(), rows_E.cumsum(0), right=True)
        return expert_TK.masked_fill(expert_TK == num_experts, DROPPED)


@torch.no_grad()
def _plan_with_capacity(
    chosen_TK: torch.Tensor, config: HunyuanConfig, layer: int, key: RoutingKey
) -> tuple[torch.Tensor, ...]:
    """(expert_TK, row_TK, token_R, rows per expert) under the capacity of each routing group."""
    T, K = chosen_TK.shape
    E, g = config.num_moe_experts, config.moe_routing_group_tokens
    n = T // g
    capacity = expert_capacity(config)
    chosen_nKg = chosen_TK.view(n, g, K).transpose(1, 2)
    priority_nS = (
        slot_priorities(key.seed, key.step, layer, key.group_n, E * capacity) if config.recycle_routing else None
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
    return expert_TK, row_TK, token_R[:num_rows], is_dropped_nKg


@torch.no_grad()
def _plan_dropless(chosen_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    """(row_TK, token_R, rows_E): rows sorted by expert, tokens of an expert in order."""
    T, K = chosen_TK.shape
    choice_c = chosen_TK.reshape(-1)
    order_R = choice_c.argsort(stable=True)
    row_c = torch.empty_like(order_R)
    row_c[order_R] = torch.arange(T * K, device=chosen_TK.device)
    return row_c.view(T, K), order_R.div(K, rounding_mode="floor"), marked(chosen_TK, num_experts).sum(0)


def expert_capacity(config: HunyuanConfig) -> int:
    """Slots of one expert for one routing group: ceil(factor * tokens * topk / experts)."""
    slots = (
        config.moe_expert_capacity_factor
        * config.moe_routing_group_tokens
        * config.moe_router_topk
        / config.num_moe_experts
    )
    return -int(-slots // 1)


STATISTICS = ("overflow", "recycled", "dropped", "balance_loss", "z_loss", "tokens")


class Router(torch.nn.Module):
    """Router of one layer. Weight (E, D) and logits are fp32 in every precision."""

    def __init__(self, config: HunyuanConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        shape = (config.num_moe_experts, config.hidden_size)
        weight: Any = torch.nn.Parameter(torch.empty(shape, dtype=torch.float32, device=weight_device(config)))
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, hidden_TD: torch.Tensor, key: Routing) -> tuple[RoutingPlan, torch.Tensor]:
        """Route this rank's tokens, whole routing groups in order.

        With a RoutingKey (training) the capacity, recycling and losses of the config apply; otherwise (evaluation,
        export) every token goes where it chose. Returns the plan and detached statistics (E + len(STATISTICS),): chosen
        tokens of each expert before recycling, then sums over this rank's counted tokens or groups. Communicates
        nothing.
        """
        config, T = self.config, hidden_TD.shape[0]
        E, K = config.num_moe_experts, config.moe_router_topk
        logits_TE = F.linear(hidden_TD.float(), self.weight)
        probs_TE = logits_TE.softmax(-1)
        chosen_TK = self.choose(probs_TE, key)
        statistics = torch.zeros(E + len(STATISTICS), device=hidden_TD.device)
        is_chosen_TE = marked(chosen_TK, E)
        if isinstance(key, CountedTokens):
            is_chosen_TE = is_chosen_TE & key.is_counted_T[:, None]
            statistics[-1] = key.is_counted_T.sum()
        else:
            statistics[-1:].fill_(T)
        statistics[:E] = is_chosen_TE.sum(0)

        if not isinstance(key, RoutingKey) or config.moe_expert_capacity_factor is None:
            row_TK, token_R, counted_E = _plan_dropless(chosen_TK, E)
            rows_E: torch.Tensor | int = counted_E
            expert_TK, is_permutation, is_dropped = chosen_TK, K == 1, None
        else:
            expert_TK, row_TK, token_R, is_dropped = _plan_with_capacity(chosen_TK, config, self.layer, key)
            capacity = expert_capacity(config)
            rows_E = capacity * (T // config.moe_routing_group_tokens)
            is_permutation = K == 1 and config.recycle_routing and capacity * E == config.moe_routing_group_tokens
            recycled = (expert_TK != chosen_TK).sum()
            num_dropped = is_dropped.sum()
            statistics[E : E + 3] = torch.stack((recycled + num_dropped, recycled, num_dropped))

        weight_TK = _ProbabilitiesOf.apply(probs_TE, expert_TK)
        if K > 1:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        if is_dropped is not None and not is_permutation:
            weight_TK = weight_TK.masked_fill(row_TK == rows_E * E, 0.0)
        if isinstance(key, RoutingKey):
            balance_loss, z_loss = self.losses(logits_TE, probs_TE, chosen_TK)
            loss = config.moe_aux_loss_coeff * balance_loss + (config.moe_z_loss_coeff or 0.0) * z_loss
            if torch.is_grad_enabled():
                weight_TK = MoEAuxLossAutoScaler.apply(weight_TK, loss / key.num_global_groups)
            statistics[E + 3 : E + 5] = torch.stack((balance_loss.detach(), z_loss.detach()))
        return RoutingPlan(weight_TK, row_TK, token_R, rows_E, is_permutation), statistics

    def choose(self, probs_TE: torch.Tensor, key: Routing) -> torch.Tensor:
        """The K experts of the highest probability of each token; a comparison of roundings puts those of another run
        in their place."""
        return probs_TE.topk(self.config.moe_router_topk, dim=-1).indices

    def losses(
        self, logits_TE: torch.Tensor, probs_TE: torch.Tensor, chosen_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Balance loss E * sum_e mean(p_e) * mean(chosen_e) and z-loss, each a mean within a routing group, summed over
        the groups."""
        E = probs_TE.shape[1]
        n = chosen_TK.shape[0] // self.config.moe_routing_group_tokens
        with torch.no_grad():
            chosen_nE = marked(chosen_TK.view(n, -1, 1), E).float().mean(1)
        balance_loss = E * (probs_TE.view(n, -1, E).mean(1) * chosen_nE).sum()
        if not self.config.moe_z_loss_coeff:
            return balance_loss, balance_loss.new_zeros(())
        return balance_loss, logits_TE.logsumexp(-1).square().view(n, -1).mean(1).sum()
