"""Logits of the router: a matmul in fp32, of hidden states of any dtype.

Shapes: T tokens of this rank, D hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def router_logits(hidden_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """((T, E) fp32 logits; hidden_TD for what reads it next, as model.permutation says). weight_ED is fp32."""
    return _Logits.apply(hidden_TD, weight_ED)


class _Logits(torch.autograd.Function):
    """hidden_TD.float() @ weight_ED.t(). Keeps hidden_TD as it came, which other layers keep as well, and converts it
    once more in the backward pass; autograd would keep the fp32 copy, twice the size of bf16."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_TD, weight_ED)
        ctx.set_materialize_grads(False)
        return F.linear(hidden_TD.float(), weight_ED), hidden_TD

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor | None, grad_TD: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        hidden_TD, weight_ED = ctx.saved_tensors
        if grad_TE is None:
            return grad_TD, None
        if ctx.needs_input_grad[0]:
            of_logits_TD = grad_TE.mm(weight_ED).to(hidden_TD.dtype)
            grad_TD = of_logits_TD if grad_TD is None else of_logits_TD.add_(grad_TD)
        return grad_TD, grad_TE.t().mm(hidden_TD.float()) if ctx.needs_input_grad[1] else None
