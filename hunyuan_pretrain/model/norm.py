"""RMSNorm, and RoPE followed by per-head RMSNorm, as autograd functions that save one activation and one number per
row.

Shapes: T tokens, D channels of a norm, N heads, H head dim, h = H / 2; in a tensor of queries, keys and values G
key/value heads, R query heads of each, X = R + 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.runtime.handover import to_device


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
        saved_TD, weight_D, rstd_T1 = ctx.saved_tensors
        grad_TD, x_TD = grad_TD.float(), saved_TD.float()
        product_TD = grad_TD * x_TD
        grad_weight_D = (rstd_T1.t() @ product_TD).squeeze(0).to(weight_D.dtype)
        # d rstd / d x = -rstd^3 x / D
        shift_T1 = (product_TD @ weight_D.float())[:, None].mul_(rstd_T1**3).div_(-x_TD.shape[-1])
        grad_x_TD = torch.mul(grad_TD, weight_D.float(), out=product_TD).mul_(rstd_T1).addcmul_(x_TD, shift_T1)
        return grad_x_TD.to(saved_TD.dtype), grad_weight_D, None


def add_rms_norm(x_TD: Tensor, branch_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(the norm of the sum, the sum x_TD + branch_TD, for what reads it next, as model.permutation says); without a
    branch the sum is x_TD. The norm is sum / rms(sum) * weight over the last dim, computed in fp32, in x's dtype."""
    sum_TD = x_TD if branch_TD is None else x_TD + branch_TD
    return _RMSNormFunction.apply(sum_TD, weight_D, eps), sum_TD


RMSNormFunction = Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
"""add_rms_norm, or a function with its result."""


class RMSNorm(torch.nn.Module):
    """`add_rms_norm` with a weight.

    Core's local norm rejects sequence parallelism. This one marks its weight so that core sums the weight's gradient
    over the tensor-parallel ranks.
    """

    def __init__(self, config: HunyuanConfig, size: int, function: RMSNormFunction = add_rms_norm) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = _norm_weight(config, size)
        self.function = function

    def forward(self, x_TD: Tensor, branch_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum); as `add_rms_norm`."""
        return self.function(x_TD, branch_TD, self.weight, self.eps)


class HeadNorm(torch.nn.Module):
    """The weight (H,) of a per-head RMSNorm, which the queries of attention carry.

    Call it to read the weight: when the all-gather of updated weights overlaps the forward pass, core waits for a
    module's weights when that module is called.
    """

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.weight = _norm_weight(config, config.kv_channels)

    def forward(self) -> Tensor:
        return self.weight


def _norm_weight(config: HunyuanConfig, size: int) -> torch.nn.Parameter:
    weight: Any = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=weight_device(config)))
    weight.sequence_parallel = config.sequence_parallel
    return weight


def rope_table(positions_T: Tensor, base: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """fp32 (cos, sin), each (T, 1, H/2), of positions under the given RoPE base (NTK-alpha already applied).

    Frequencies are computed on the CPU with the same expression as in the exported model code: at position 262,143
    their last bit matters.
    """
    angle_Th = positions_T.float()[:, None] * _frequencies(base, head_dim, positions_T.device)
    return angle_Th.cos()[:, None], angle_Th.sin()[:, None]


@cache  # a recorded step reads it: it must not be freed
def _frequencies(base: float, head_dim: int, device: torch.device) -> Tensor:
    return to_device(
        1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)), device
    )


def _rotate(x_TNH: Tensor, cos_T1h: Tensor, sin_T1h: Tensor) -> Tensor:
    """Rotate-half (neox) rotation in fp32; a negative sine rotates back.

    The memory layout is what attention reads: head-major on a CPU; token-major elsewhere, for kernels that ignore
    strides.
    """
    first, second = x_TNH.float().chunk(2, dim=-1)
    T, N, H = x_TNH.shape
    is_by_head = x_TNH.device.type == "cpu"
    out = x_TNH.new_empty((N, T, H) if is_by_head else (T, N, H), dtype=torch.float32)
    out = out.transpose(0, 1) if is_by_head else out
    low, high = out.chunk(2, dim=-1)
    torch.mul(first, cos_T1h, out=low).addcmul_(second, sin_T1h, value=-1)
    torch.mul(second, cos_T1h, out=high).addcmul_(first, sin_T1h)
    return out


class _RopeNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TNH: Tensor, cos_T1h: Tensor, sin_T1h: Tensor, weight_H: Tensor | None, eps: float | None
    ) -> Tensor:
        y_TNH = _rotate(x_TNH, cos_T1h, sin_T1h)
        rstd_TN1 = None
        if eps is not None:
            rstd_TN1 = _reciprocal_rms(x_TNH, eps)
            y_TNH.mul_(rstd_TN1)
        y_hat_TNH = y_TNH.to(x_TNH.dtype)
        # saved instead of the input, which nothing else needs
        ctx.save_for_backward(y_hat_TNH if eps is not None else None, cos_T1h, sin_T1h, weight_H, rstd_TN1)
        return y_hat_TNH if weight_H is None else (y_TNH * weight_H).to(x_TNH.dtype)

    @staticmethod
    def backward(ctx: Any, output_grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        y_hat_TNH, cos_T1h, sin_T1h, weight_H, rstd_TN1 = ctx.saved_tensors
        grad_TNH, grad_weight_H = output_grad_TNH.float(), None
        if rstd_TN1 is not None:
            y_hat_TNH = y_hat_TNH.float()
            product_TNH = grad_TNH * y_hat_TNH
            if weight_H is None:
                dot_TN1 = product_TNH.sum(-1, keepdim=True)
            else:
                grad_weight_H = product_TNH.sum((0, 1))
                dot_TN1 = (product_TNH @ weight_H)[..., None]
                grad_TNH = torch.mul(grad_TNH, weight_H, out=product_TNH)
            grad_TNH = torch.addcmul(grad_TNH, y_hat_TNH, dot_TN1.div_(-y_hat_TNH.shape[-1])).mul_(rstd_TN1)
        return _rotate(grad_TNH, cos_T1h, -sin_T1h).to(output_grad_TNH.dtype), None, None, grad_weight_H, None


HeadWeights = tuple[Tensor, Tensor] | None
"""(H,) each: the weights of the norms of queries and of keys; the queries carry both, multiplied in fp32."""


def rope_norm(x_TNH: Tensor, table: tuple[Tensor, Tensor], weights: HeadWeights, eps: float | None) -> Tensor:
    """RoPE, then RMSNorm of each head with `eps` (None: no norm), then the product of the weights (None: no weight;
    only with a norm).

    The RMS is computed before the rotation, which preserves it. Returns (T, N, H) in x's dtype.
    """
    weight_H = None if weights is None else weights[0].float() * weights[1].float()
    return _RopeNormFunction.apply(x_TNH, *table, weight_H, eps)


def qkv_rope_norm(
    qkv_TGXH: Tensor, table: tuple[Tensor, Tensor], weights: HeadWeights, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(q (T, N, H), k_hat (T, G, H), v (T, G, H)) of megatron's interleaving: per key/value head, its query heads, then
    its key and value.

    `rope_norm` of the queries with `weights`, and of the keys without; values are unchanged, and may be a view.
    """
    T, G, X, H = qkv_TGXH.shape
    q_TGRH, k_TG1H, v_TG1H = qkv_TGXH.split((X - 2, 1, 1), dim=2)
    k_hat_TGH = rope_norm(k_TG1H.squeeze(2), table, None, eps)
    return rope_norm(q_TGRH.reshape(T, G * (X - 2), H), table, weights, eps), k_hat_TGH, v_TG1H.squeeze(2)
