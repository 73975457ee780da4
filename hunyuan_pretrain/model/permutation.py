"""Permutation of tokens into rows of experts, and the sum that ends a layer: residual, shared expert, routed experts.

Both are gathers, forward and backward, by the index maps of the RoutingPlan.

Of several functions that read the same hidden states, each but the last returns them again for the next one. So its
backward pass gets the gradient of what follows and writes the sum; autograd would read both once more to add them.

Shapes: T tokens of this rank, D hidden, K top-k, R rows (slots of experts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.model.expert_rows import taken
from hunyuan_pretrain.model.routing import RoutingPlan


def permute(hidden_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
    """((R, D) the token of each row, zeros for an empty slot; hidden_TD for what reads it next)."""
    return _Permute.apply(hidden_TD, plan)


def combine(rows_RD: Tensor, weight_TK: Tensor, plan: RoutingPlan, shared_TD: Tensor, residual_TD: Tensor) -> Tensor:
    """(T, D): residual_TD + shared_TD + the sum of a token's rows, weighted by weight_TK."""
    return residual_TD + (_Combine.apply(rows_RD, weight_TK, plan) + shared_TD)


def sum_of_rows(rows_RD: Tensor, plan: RoutingPlan) -> Tensor:
    """(T, D): the sum of a token's rows, not weighted."""
    row_TK = plan.row_TK
    taken_TKD = taken(rows_RD, row_TK.reshape(-1), not plan.is_permutation).view(*row_TK.shape, -1)
    return taken_TKD.squeeze(1) if row_TK.shape[1] == 1 else taken_TKD.sum(1)


class _Permute(torch.autograd.Function):
    """(T, D) -> (R, D), rows of zeros for empty slots; the gradient of a token is the sum over its rows, added to that
    of what reads hidden_TD next."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return taken(hidden_TD, plan.token_R, not plan.is_permutation), hidden_TD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor | None, grad_TD: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_RD is None:
            return grad_TD, None
        of_rows_TD = sum_of_rows(grad_RD, ctx.plan)
        return of_rows_TD if grad_TD is None else of_rows_TD.add_(grad_TD), None


class _Combine(torch.autograd.Function):
    """(R, D) -> (T, D), the sum of a token's rows, weighted by the combine weights."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_TK: Tensor, plan: RoutingPlan) -> Tensor:
        taken_TKD = taken(rows_RD, plan.row_TK.reshape(-1), not plan.is_permutation).view(*weight_TK.shape, -1)
        ctx.plan = plan
        ctx.save_for_backward(taken_TKD, weight_TK)
        output_TKD = taken_TKD * weight_TK[..., None].to(rows_RD.dtype)
        return output_TKD.squeeze(1) if weight_TK.shape[1] == 1 else output_TKD.sum(1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        taken_TKD, weight_TK = ctx.saved_tensors
        T, K = weight_TK.shape
        grad_weight_TK = torch.matmul(taken_TKD.float(), grad_TD.float()[..., None]).squeeze(-1)
        grad_TKD = grad_TD[:, None] * weight_TK[..., None].to(grad_TD.dtype)
        choice_R = choice_of_row(ctx.plan, T, K)
        return taken(grad_TKD.view(T * K, -1), choice_R, not ctx.plan.is_permutation), grad_weight_TK, None


def choice_of_row(plan: RoutingPlan, T: int, K: int) -> Tensor:
    """(R,) which of the T * K choices each row serves; T * K for an empty row."""
    if K == 1:
        return plan.token_R
    choice_R = torch.full((plan.num_rows + 1,), T * K, dtype=torch.int64, device=plan.token_R.device)
    choice_R[plan.row_TK.reshape(-1)] = torch.arange(T * K, device=plan.token_R.device)
    return choice_R[:-1]
