"""The residual plus a branch, and RMSNorm of their sum, in one kernel each way.

Bytes per number of b bytes, without a branch and with one:

    forward   reads the input (and the branch), writes the output (and the sum): 2 b, 4 b
    backward  reads the sum, its own gradient and that of the output, writes the input's gradient: 4 b

That is the minimum. Without kernels the sum is read once more by the norm, and its two gradients are added in a pass of
their own: 4 b more for each norm with a branch, 2 b for one without. The gradients of input and branch are one tensor.

A row is held in registers, so its sum of squares costs no second read. The weight's gradient is a sum over all rows:
each of at most PARTS programs sums the rows it computes, and another launch adds the parts, so the order is fixed by
the number of rows. The parts add 8 PARTS bytes per channel, whatever the number of rows.

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
    x, branch, weight, sums, output, reciprocal_rms, x_row, branch_row, eps, D: tl.constexpr, B: tl.constexpr
):
    """A program computes one row of the output and of the sums, which are contiguous, and its fp32 1 / rms. The norm is
    that of the rounded sum, which the backward pass reads."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    mask = column < D
    x_B = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if branch is not None:
        x_B += tl.load(branch + row * branch_row + column, mask=mask, other=0.0).to(tl.float32)
        rounded_B = x_B.to(sums.dtype.element_ty)
        tl.store(sums + row * D + column, rounded_B, mask=mask)
        x_B = rounded_B.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x_B * x_B, 0) / D + eps)
    weight_B = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * D + column, x_B * factor * weight_B, mask=mask)
    tl.store(reciprocal_rms + row, factor)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad, grad_sum, x, weight, reciprocal_rms, grad_x, parts, num_rows, grad_row, grad_sum_row, x_row,
    D: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A program computes the gradients of every num_programs-th row, which are contiguous, and sums the weight's. x:
    what was normalised; grad_sum: its gradient from elsewhere."""
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
        grad_x_B = (grad_normed_B - normed_B * mean) * factor
        if grad_sum is not None:
            grad_x_B += tl.load(grad_sum + row * grad_sum_row + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + row * D + column, grad_x_B, mask=mask)
    tl.store(parts + part * D + column, total_B, mask=mask)


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, branch_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        T, D = x_TD.shape
        ctx.set_materialize_grads(False)
        ctx.has_branch = branch_TD is not None
        output_TD, sum_TD = x_TD.new_empty(T, D), x_TD.new_empty(T, D) if ctx.has_branch else x_TD
        factor_T = torch.empty(T, dtype=torch.float32, device=x_TD.device)
        if T:
            _forward_kernel[(T,)](
                x_TD, branch_TD, weight_D, sum_TD if ctx.has_branch else None, output_TD, factor_T, x_TD.stride(0),
                0 if branch_TD is None else branch_TD.stride(0), eps, **_row(D, 32),
            )  # fmt: skip
        ctx.save_for_backward(sum_TD, weight_D, factor_T)
        return output_TD, sum_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor | None, grad_sum_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_TD, weight_D, factor_T = ctx.saved_tensors
        if grad_TD is None:
            return grad_sum_TD, grad_sum_TD if ctx.has_branch else None, None, None
        kernel = "the RMSNorm kernel"
        (grad_TD,) = handed_over(kernel, grad_TD, dtype=sum_TD.dtype, knows_strides=True)
        if grad_sum_TD is not None:
            (grad_sum_TD,) = handed_over(kernel, grad_sum_TD, dtype=sum_TD.dtype, knows_strides=True)
        T, D = sum_TD.shape
        grad_x_TD = sum_TD.new_empty(T, D)
        parts_PD = torch.empty(min(T, PARTS), D, dtype=torch.float32, device=sum_TD.device)
        if T:
            _backward_kernel[(len(parts_PD),)](
                grad_TD, grad_sum_TD, sum_TD, weight_D, factor_T, grad_x_TD, parts_PD, T, grad_TD.stride(0),
                0 if grad_sum_TD is None else grad_sum_TD.stride(0), sum_TD.stride(0), **_row(D, 16),
            )  # fmt: skip
        grad_weight_D, _ = sum_of_parts(parts_PD, weight_D.dtype)
        return grad_x_TD, grad_x_TD if ctx.has_branch else None, grad_weight_D, None


def _row(D: int, numbers: int) -> dict[str, int]:
    """Compile-time arguments, with `numbers` of a row in a thread, or more in 16 warps."""
    B = triton.next_power_of_2(D)
    return {"D": D, "B": B, "num_warps": min(max(B // (32 * numbers), 1), 16)}


def add_rms_norm(x_TD: Tensor, branch_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As model.norm.add_rms_norm; sum and norm are rounded once each. Raises ValueError if rows are not contiguous."""
    check_rows("the RMSNorm kernel", x=x_TD, **({} if branch_TD is None else {"branch": branch_TD}))
    check_layout("the RMSNorm kernel", "weight", weight_D, x_TD.device)
    return _AddRMSNorm.apply(x_TD, branch_TD, weight_D, eps)
