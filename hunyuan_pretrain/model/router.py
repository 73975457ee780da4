"""The router of a layer: each token's chosen experts, combine weights, balance loss and z-loss.

model/recycle_routing.py assigns the choices to experts and rows, within the capacity; model/kernels/assignment.py does
the same on a GPU.

Shapes: T tokens of this rank, n routing groups, D hidden, E experts, K top-k, R rows (slots of experts).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.model.functions import Functions, plain_functions
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.model.recycle_routing import Assignment, assign_without_capacity
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
    hidden_TD: Tensor
    """The router's input, for what reads it next (model.permutation says why)."""


class Router(torch.nn.Module):
    """Router of one layer. Weight (E, D) and logits are fp32 in every precision."""

    def __init__(self, config: HunyuanConfig, layer: int, functions: Functions | None = None) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.functions = functions or plain_functions()
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
        logits_TE, hidden_TD = self.functions.router_logits(hidden_TD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        chosen_TK = self.choose(probs_TE, routing)
        assigned = self._assign(chosen_TK, routing)
        weight_TK = _combine_weights(probs_TE, assigned)
        plan = RoutingPlan(weight_TK, assigned.row_TK, assigned.token_R, assigned.rows_E, assigned.is_permutation)
        if isinstance(routing, EvaluationRouting):
            return Routed(plan, None, _statistics(chosen_TK, assigned, routing.is_counted_T), hidden_TD)
        balance = _balance_loss(probs_TE, assigned.chosen_nE, config.moe_router_topk)
        loss = config.moe_aux_loss_coeff * balance
        statistics = _statistics(chosen_TK, assigned)._replace(balance_loss=balance.detach())
        if config.moe_z_loss_coeff:
            z = z_loss(logits_TE, config.model.moe_routing_group_tokens)
            loss = loss + config.moe_z_loss_coeff * z
            statistics = statistics._replace(z_loss=z.detach())
        return Routed(plan, loss / routing.num_global_groups, statistics, hidden_TD)

    def _assign(self, chosen_TK: Tensor, routing: Routing) -> Assignment:
        if isinstance(routing, EvaluationRouting):
            return assign_without_capacity(chosen_TK, self.config.num_moe_experts)
        if self.config.moe_expert_capacity_factor is None:
            return assign_without_capacity(chosen_TK, self.config.num_moe_experts, routing.group_n.shape[0])
        return self.functions.assign(chosen_TK, self.config, self.layer, routing)

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
        if grad_TK.shape[1] == 1:
            return torch.where(marked(ctx.expert_TK, ctx.num_experts), grad_TK, 0.0), None
        is_of_TKE = marked(ctx.expert_TK[..., None], ctx.num_experts)
        return torch.where(is_of_TKE, grad_TK[..., None], 0.0).sum(1), None


def _combine_weights(probs_TE: Tensor, assigned: Assignment) -> Tensor:
    """(T, K) probability of the expert that computes each choice, divided by a token's sum if K > 1; 0 for a dropped
    choice."""
    weight_TK = _ProbabilitiesOf.apply(probs_TE, assigned.expert_TK)
    if weight_TK.shape[1] > 1:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    if assigned.num_dropped == 0:
        return weight_TK
    return weight_TK.masked_fill(assigned.row_TK == assigned.token_R.shape[0], 0.0)


# --- losses -----------------------------------------------------------------------------------------------------------


def balance_loss(probs_TE: Tensor, chosen_TK: Tensor, group_tokens: int) -> Tensor:
    """(): E * sum_e mean(p_e) * mean(chosen_e), with means within a routing group of `group_tokens` tokens, summed over
    the groups. `chosen_TK`: before recycling. Source: Switch Transformer, arXiv 2101.03961, equation 4."""
    E, topk = probs_TE.shape[1], chosen_TK.shape[1]
    return _balance_loss(probs_TE, marked(chosen_TK, E).view(-1, group_tokens, E).sum(1), topk)


def _balance_loss(probs_TE: Tensor, chosen_nE: Tensor, topk: int) -> Tensor:
    """The same from the number of choices of each expert in each group."""
    n, E = chosen_nE.shape
    probs_ngE = probs_TE.view(n, -1, E)
    return E * (probs_ngE.mean(1) * (chosen_nE / (topk * probs_ngE.shape[1]))).sum()


def z_loss(logits_TE: Tensor, group_tokens: int) -> Tensor:
    """(): the mean of logsumexp(logits)^2 within a routing group of `group_tokens` tokens, summed over the groups."""
    n = logits_TE.shape[0] // group_tokens
    return logits_TE.logsumexp(-1).square().view(n, -1).mean(1).sum()


# --- statistics -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _statistics(chosen_TK: Tensor, assigned: Assignment, is_counted_T: Tensor | None = None) -> RouterStatistics:
    """Statistics of the tokens in is_counted_T (None: all), with zero losses."""
    zero = torch.zeros((), device=chosen_TK.device)
    chosen_nE, overflow, dropped = assigned.chosen_nE, zero, zero
    if is_counted_T is not None:
        chosen_nE = marked(chosen_TK, chosen_nE.shape[1]) & is_counted_T[:, None]
    if assigned.rows_E is None:
        capacity = assigned.token_R.shape[0] // chosen_nE.numel()
        overflow = (chosen_nE - capacity).clamp_(min=0).sum(dtype=torch.float32)
        # an expert that overflows has no free slot, so every overflowing choice that has a slot has it elsewhere
        dropped = overflow if assigned.num_dropped is None else zero + assigned.num_dropped
    return RouterStatistics(
        chosen_E=chosen_nE.sum(0, dtype=torch.float32),
        overflow=overflow,
        recycled=overflow - dropped,
        dropped=dropped,
        balance_loss=zero,
        z_loss=zero,
        tokens=zero + chosen_TK.shape[0] if is_counted_T is None else is_counted_T.sum(dtype=torch.float32),
    )
