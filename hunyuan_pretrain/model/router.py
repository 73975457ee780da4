"""The router of a layer: each token's chosen experts, combine weights, balance loss and z-loss.

model/recycle_routing.py assigns the choices to experts and rows, within the capacity.

Shapes: T tokens of this rank, n routing groups, D hidden, E experts, K top-k, R rows (slots of experts).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.model.recycle_routing import Assignment, assign_within_capacity, assign_without_capacity
from hunyuan_pretrain.model.routing import (
    EvaluationRouting,
    RouterStatistics,
    Routing,
    RoutingPlan,
    marked,
)


class Routed(NamedTuple):
    """What a router returns for this rank's tokens."""

    plan: RoutingPlan
    loss: Tensor | None
    """(): the router losses times their coefficients, this rank's part of the mean over the routing groups of the
    global batch; None in evaluation."""
    statistics: RouterStatistics


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

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Routed:
        """Route this rank's tokens, whole routing groups in order. The caller has to apply the returned loss.

        In training the config's capacity, recycling and losses apply; in evaluation every token goes to the experts it
        chose. Communicates nothing.
        """
        config = self.config
        logits_TE = F.linear(hidden_TD.float(), self.weight)
        probs_TE = logits_TE.softmax(-1)
        chosen_TK = self.choose(probs_TE, routing)
        assigned = self._assign(chosen_TK, routing)
        plan = RoutingPlan(_combine_weights(probs_TE, assigned), *assigned[1:])
        if isinstance(routing, EvaluationRouting):
            return Routed(plan, None, _statistics(chosen_TK, assigned, config.num_moe_experts, routing.is_counted_T))
        group_tokens = config.model.moe_routing_group_tokens
        balance = balance_loss(probs_TE, chosen_TK, group_tokens)
        z = z_loss(logits_TE, group_tokens) if config.moe_z_loss_coeff else balance.new_zeros(())
        loss = config.moe_aux_loss_coeff * balance + (config.moe_z_loss_coeff or 0.0) * z
        statistics = _statistics(chosen_TK, assigned, config.num_moe_experts)
        statistics = statistics._replace(balance_loss=balance.detach(), z_loss=z.detach())
        return Routed(plan, loss / routing.num_global_groups, statistics)

    def _assign(self, chosen_TK: Tensor, routing: Routing) -> Assignment:
        if isinstance(routing, EvaluationRouting) or self.config.moe_expert_capacity_factor is None:
            return assign_without_capacity(chosen_TK, self.config.num_moe_experts)
        return assign_within_capacity(chosen_TK, self.config, self.layer, routing)

    def choose(self, probs_TE: Tensor, routing: Routing) -> Tensor:
        """(T, K) the most probable experts of each token. A comparison of two runs (diagnostics/parity.py) replaces
        this method by the other run's choices."""
        return probs_TE.topk(self.config.moe_router_topk, dim=-1).indices


# --- combine weights --------------------------------------------------------------------------------------------------


class _ProbabilitiesOf(torch.autograd.Function):
    """probs_TE[t, expert_TK[t, k]]. torch's own gradient adds by index, and has to sort the index first to be
    deterministic."""

    @staticmethod
    def forward(ctx: Any, probs_TE: Tensor, expert_TK: Tensor) -> Tensor:
        ctx.expert_TK, ctx.num_experts = expert_TK, probs_TE.shape[1]
        return probs_TE.gather(1, expert_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None]:
        is_of_TKE = marked(ctx.expert_TK[..., None], ctx.num_experts)
        return torch.where(is_of_TKE, grad_TK[..., None], 0.0).sum(1), None


def _combine_weights(probs_TE: Tensor, assigned: Assignment) -> Tensor:
    """(T, K) probability of the expert that computes each choice, divided by a token's sum if K > 1; 0 for a dropped
    choice."""
    weight_TK = _ProbabilitiesOf.apply(probs_TE, assigned.expert_TK)
    if weight_TK.shape[1] > 1:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    can_drop = assigned.rows_E is None and not assigned.is_permutation
    return weight_TK.masked_fill(_is_dropped(assigned), 0.0) if can_drop else weight_TK


def _is_dropped(assigned: Assignment) -> Tensor:
    return assigned.row_TK == assigned.token_R.shape[0]


# --- losses -----------------------------------------------------------------------------------------------------------


def balance_loss(probs_TE: Tensor, chosen_TK: Tensor, group_tokens: int) -> Tensor:
    """(): E * sum_e mean(p_e) * mean(chosen_e), with means within a routing group of `group_tokens` tokens, summed over
    the groups. `chosen_TK`: before recycling. Source: Switch Transformer, arXiv 2101.03961, equation 4."""
    E = probs_TE.shape[1]
    n = chosen_TK.shape[0] // group_tokens
    with torch.no_grad():
        chosen_nE = marked(chosen_TK.view(n, -1, 1), E).float().mean(1)
    return E * (probs_TE.view(n, -1, E).mean(1) * chosen_nE).sum()


def z_loss(logits_TE: Tensor, group_tokens: int) -> Tensor:
    """(): the mean of logsumexp(logits)^2 within a routing group of `group_tokens` tokens, summed over the groups."""
    n = logits_TE.shape[0] // group_tokens
    return logits_TE.logsumexp(-1).square().view(n, -1).mean(1).sum()


# --- statistics -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _statistics(
    chosen_TK: Tensor, assigned: Assignment, num_experts: int, is_counted_T: Tensor | None = None
) -> RouterStatistics:
    """Statistics of the tokens in is_counted_T (None: all), with zero losses."""
    zero = torch.zeros((), device=chosen_TK.device)
    is_chosen_TE = marked(chosen_TK, num_experts)
    if is_counted_T is not None:
        is_chosen_TE = is_chosen_TE & is_counted_T[:, None]
    recycled = dropped = zero
    if assigned.rows_E is None:
        recycled, dropped = (assigned.expert_TK != chosen_TK).sum().float(), _is_dropped(assigned).sum().float()
    return RouterStatistics(
        chosen_E=is_chosen_TE.sum(0).float(),
        overflow=recycled + dropped,
        recycled=recycled,
        dropped=dropped,
        balance_loss=zero,
        z_loss=zero,
        tokens=zero + chosen_TK.shape[0] if is_counted_T is None else is_counted_T.sum().float(),
    )
