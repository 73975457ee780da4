"""RMSNorm, and RoPE followed by per-head RMSNorm, as autograd functions that keep only their input and one number a row.

Shapes: T tokens, D channels of a norm, N heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """fp32 1 / sqrt(mean(x^2) + eps) over the last dim, kept as a dim of size 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        rstd_T1 = _reciprocal_rms(x_TD, eps)
        ctx.save_for_backward(x_TD, weight_D, rstd_T1)
        return (x_TD.float() * rstd_T1).mul_(weight_D.float()).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_D, rstd_T1 = ctx.saved_tensors
        grad_TD, normed_TD = grad_TD.float(), x_TD.float() * rstd_T1
        product_TD = grad_TD * normed_TD
        grad_weight_D = product_TD.sum(0).to(weight_D.dtype)
        weight_D = weight_D.float()
        mean_T1 = (product_TD @ weight_D).div_(x_TD.shape[-1])[:, None]
        grad_x_TD = (grad_TD * weight_D).sub_(normed_TD.mul_(mean_T1)).mul_(rstd_T1)
        return grad_x_TD.to(x_TD.dtype), grad_weight_D, None


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dim, computed in fp32, returned in x's dtype.

    Core's own local norm refuses sequence parallelism; this one marks its weight so that core sums its gradient over the
    tensor-parallel ranks.
    """

    def __init__(self, config: HunyuanConfig, size: int) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=weight_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_TD: Tensor) -> Tensor:
        return _RMSNormFunction.apply(x_TD, self.weight, self.eps)


def rope_table(positions_T: Tensor, base: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """fp32 (cos, sin), each (T, 1, H/2), of positions under the given RoPE base (NTK-alpha already applied).

    Frequencies are computed on the CPU by the expression of the exported model code: at position 262,143 their last bit shows.
    """
    frequency_h = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim))
    angle_Th = positions_T.float()[:, None] * frequency_h.to(positions_T.device)
    return angle_Th.cos()[:, None], angle_Th.sin()[:, None]


def _rotate(x_TNH: Tensor, cos_T1h: Tensor, sin_T1h: Tensor) -> Tensor:
    """Rotate-half (neox) rotation in fp32; a negative sine rotates back. Laid out head by head, as attention reads it."""
    first, second = x_TNH.float().chunk(2, dim=-1)
    T, N, H = x_TNH.shape
    out = torch.empty(N, T, H, dtype=torch.float32, device=x_TNH.device).transpose(0, 1)
    low, high = out.chunk(2, dim=-1)
    torch.mul(first, cos_T1h, out=low).addcmul_(second, sin_T1h, value=-1)
    torch.mul(second, cos_T1h, out=high).addcmul_(first, sin_T1h)
    return out


class _RopeNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, cos_T1h: Tensor, sin_T1h: Tensor, weight_H: Tensor | None, eps: float | None) -> Tensor:
        rstd = None if eps is None else _reciprocal_rms(x_TNH, eps)
        ctx.save_for_backward(x_TNH, cos_T1h, sin_T1h, weight_H, rstd)
        y_TNH = _rotate(x_TNH, cos_T1h, sin_T1h)
        if rstd is not None:
            y_TNH.mul_(rstd)
        if weight_H is not None:
            y_TNH.mul_(weight_H.float())
        return y_TNH.to(x_TNH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        x_TNH, cos_T1h, sin_T1h, weight_H, rstd = ctx.saved_tensors
        grad_TNH, grad_weight_H = grad_TNH.float(), None
        if rstd is not None:
            normed_TNH = _rotate(x_TNH, cos_T1h, sin_T1h).mul_(rstd)
            if weight_H is not None:
                grad_weight_H = (grad_TNH * normed_TNH).flatten(0, 1).sum(0).to(weight_H.dtype)
                grad_TNH = grad_TNH * weight_H.float()
            mean_TN1 = torch.linalg.vecdot(grad_TNH, normed_TNH)[..., None].div_(x_TNH.shape[-1])
            grad_TNH = (grad_TNH - normed_TNH.mul_(mean_TN1)).mul_(rstd)
        return _rotate(grad_TNH, cos_T1h, -sin_T1h).to(x_TNH.dtype), None, None, grad_weight_H, None


def rope_norm(x_TNH: Tensor, table: tuple[Tensor, Tensor], weight_H: Tensor | None, eps: float | None) -> Tensor:
    """RoPE, then RMSNorm of each head with `eps` (None: no norm), then `weight_H` (None: no weight).

    The statistic is taken before the rotation, which keeps the norm of a head. Returns (T, N, H) in x's dtype.
    """
    return _RopeNormFunction.apply(x_TNH, *table, weight_H, eps)
