"""What a router computes after the assignment: combine weights, balance loss, z-loss and statistics.

Shapes: T tokens of this rank, n routing groups, g tokens of a group, E experts, K top-k, R rows (slots of experts), X
numbers of packed statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.model.recycle_routing import Assignment
from hunyuan_pretrain.model.routing import RouterStatistics, marked


class Gating(NamedTuple):
    """Of the tokens of one rank in training."""

    weight_TK: Tensor
    """fp32, as `combine_weights`."""
    loss: Tensor
    """(): the router losses times their coefficients, this rank's part of the mean over the routing groups of the
    global batch."""
    statistics_X: Tensor
    """model.routing.RouterStatistics, packed."""


GatingFunction = Callable[[Tensor, Tensor, Assignment, HunyuanConfig, int], Gating]
"""gating, or a function with its result."""


def gating(
    logits_TE: Tensor, probs_TE: Tensor, assigned: Assignment, config: HunyuanConfig, num_global_groups: int
) -> Gating:
    """Combine weights, losses and statistics of training. probs_TE: the softmax of logits_TE; a gradient goes to both.

    num_global_groups: routing groups of the step's global batch.
    """
    weight_TK = combine_weights(probs_TE, assigned)
    balance = _balance_loss(probs_TE, assigned.chosen_nE, config.moe_router_topk)
    loss = config.moe_aux_loss_coeff * balance
    entropy = torch.special.entr(probs_TE.detach()).sum()
    counted = statistics(assigned)._replace(balance_loss=balance.detach(), entropy=entropy)
    if config.moe_z_loss_coeff:
        z = z_loss(logits_TE, config.model.moe_routing_group_tokens)
        loss = loss + config.moe_z_loss_coeff * z
        counted = counted._replace(z_loss=z.detach())
    return Gating(weight_TK, loss / num_global_groups, counted.packed())


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


def combine_weights(probs_TE: Tensor, assigned: Assignment) -> Tensor:
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
def statistics(assigned: Assignment, is_counted_T: Tensor | None = None) -> RouterStatistics:
    """Statistics of the tokens in is_counted_T (None: all; only without a capacity), with zero losses and entropy."""
    chosen_TK = assigned.expert_TK
    zero = torch.zeros((), device=chosen_TK.device)
    chosen_nE, overflow, dropped = assigned.chosen_nE, zero, zero
    if is_counted_T is not None:  # without a capacity, the expert that computes a choice is the chosen one
        chosen_nE = marked(chosen_TK, chosen_nE.shape[1]) & is_counted_T[:, None]
    if assigned.rows_E is None:
        capacity = capacity_of(assigned)
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
        entropy=zero,
        tokens=zero + chosen_TK.shape[0] if is_counted_T is None else is_counted_T.sum(dtype=torch.float32),
    )


def capacity_of(assigned: Assignment) -> int:
    """Slots of an expert in each routing group; only under a capacity."""
    return assigned.token_R.shape[0] // assigned.chosen_nE.numel()
