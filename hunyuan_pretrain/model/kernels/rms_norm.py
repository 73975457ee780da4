"""RMSNorm in one kernel each way.

Bytes per number of b bytes:

    forward   reads the input, writes the output: 2 b
    backward  reads the input and the gradient, writes the input's gradient: 3 b

That is the minimum. A row is held in registers, so its sum of squares costs no second read. The weight's gradient is a
sum over all rows: each of at most PARTS programs sums the rows it computes, and another launch adds the parts, so the
order is fixed by the number of rows. The parts add 8 PARTS bytes per channel, whatever the number of rows.

Shapes: T tokens, D channels, P parts. In kernels: B channels, padded to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hunyuan_pretrain.model.kernels.rows import check_layout, check_rows, sum_of_parts
from hunyuan_pretrain.runtime.handover import handed_over

PARTS = 264
"""Two for each multiprocessor of an H200. At 6,400 channels one runs at a time: a row fills its registers."""


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, weight, output, reciprocal_rms, x_row, eps, D: tl.constexpr, B: tl.constexpr
):
    """A program computes one row of the output, which is contiguous, and its fp32 1 / rms."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    mask = column < D
    x_B = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x_B * x_B, 0) / D + eps)
    weight_B = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * D + column, x_B * factor * weight_B, mask=mask)
    tl.store(reciprocal_rms + row, factor)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, weight, reciprocal_rms, grad_x, parts, num_rows, grad_row, x_row, D: tl.constexpr, B: tl.constexpr
):
    """A program computes the gradients of every num_programs-th row, which are contiguous, and sums the weight's."""
    part, column = tl.program_id(0), tl.arange(0, B)
    mask = column < D
    weight_B = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    total_B = tl.zeros((B,), tl.float32)
    for number in range((num_rows - part + tl.num_programs(0) - 1) // tl.num_programs(0)):
        row = (part + number * tl.num_programs(0)).to(tl.int64)
        x_B = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
        grad_B = tl.load(grad + row * grad_row + column, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(reciprocal_rms + row)
        normed_B, grad_normed_B = x_B * factor, grad_B * weight_B
        total_B += grad_B * normed_B
        # d rstd / d x = -rstd^3 x / D
        mean = tl.sum(grad_normed_B * normed_B, 0) / D
        tl.store(grad_x + row * D + column, (grad_normed_B - normed_B * mean) * factor, mask=mask)
    tl.store(parts + part * D + column, total_B, mask=mask)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        T, D = x_TD.shape
        output_TD = x_TD.new_empty(T, D)
        factor_T = torch.empty(T, dtype=torch.float32, device=x_TD.device)
        if T:
            _forward_kernel[(T,)](x_TD, weight_D, output_TD, factor_T, x_TD.stride(0), eps, **_row(D, 32))
        ctx.save_for_backward(x_TD, weight_D, factor_T)
        return output_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_D, factor_T = ctx.saved_tensors
        (grad_TD,) = handed_over("the RMSNorm kernel", grad_TD, dtype=x_TD.dtype, knows_strides=True)
        T, D = x_TD.shape
        if not T:
            return grad_TD, torch.zeros_like(weight_D), None
        grad_x_TD = x_TD.new_empty(T, D)
        parts_PD = torch.empty(min(T, PARTS), D, dtype=torch.float32, device=x_TD.device)
        _backward_kernel[(len(parts_PD),)](
            grad_TD,
            x_TD,
            weight_D,
            factor_T,
            grad_x_TD,
            parts_PD,
            T,
            grad_TD.stride(0),
            x_TD.stride(0),
            **_row(D, 16),
        )
        return grad_x_TD, sum_of_parts(parts_PD, weight_D.dtype)[0], None


def _row(D: int, numbers: int) -> dict[str, int]:
    """Compile-time arguments, with `numbers` of a row in a thread, or more in 16 warps."""
    B = triton.next_power_of_2(D)
    return {"D": D, "B": B, "num_warps": min(max(B // (32 * numbers), 1), 16)}


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As model.norm.rms_norm, rounded once. Raises ValueError if rows are not contiguous."""
    check_rows("the RMSNorm kernel", x=x_TD)
    check_layout("the RMSNorm kernel", "weight", weight_D, x_TD.device)
    return _RMSNorm.apply(x_TD, weight_D, eps)
