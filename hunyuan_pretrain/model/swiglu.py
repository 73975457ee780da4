"""SwiGLU, the activation of every expert.

Shapes: T tokens or rows of experts, F twice an expert's FFN size (gate and up).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _SwigluFunction(torch.autograd.Function):
    """silu(gate) * up of [gate, up] along the last dim; saves only its input."""

    @staticmethod
    def forward(ctx: Any, x_TF: Tensor) -> Tensor:
        ctx.save_for_backward(x_TF)
        gate, up = x_TF.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> Tensor:
        (x_TF,) = ctx.saved_tensors
        gate, up = x_TF.chunk(2, dim=-1)
        grad = torch.empty_like(x_TF)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), grad_TF, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_TF * up, gate, grad_input=grad_gate)
        return grad


def swiglu(x_TF: Tensor) -> Tensor:
    """silu(gate) * up, (T, F / 2), of [gate, up] along the last dim."""
    return _SwigluFunction.apply(x_TF)
