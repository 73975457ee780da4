"""SwiGLU in one kernel each way.

Bytes per number of the output, of b bytes:

    forward   reads gate and up, writes the output: 3 b
    backward  reads gate, up and the gradient, writes both gradients into one tensor: 5 b

That is the minimum: each input is read once, each result written once. Only the input is saved, by reference.

Shapes: T tokens or rows of experts, F twice an expert's FFN size (gate and up).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hunyuan_pretrain.model.kernels.rows import COUNTS, check_rows, num_tiles, place_of_tile, tile_of
from hunyuan_pretrain.runtime.handover import handed_over


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    x: tl.tensor,
    output: tl.tensor,
    num_rows: tl.tensor,
    x_row: tl.tensor,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """A program computes one tile of the output, which is contiguous; `x_row` is the stride of x over rows."""
    row, column = place_of_tile(COLUMNS, ROWS, WIDTH)
    row = row[:, None]
    mask = (row < num_rows) & (column < COLUMNS)
    source = x + row * x_row + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + COLUMNS, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * COLUMNS + column, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    x: tl.tensor,
    grad: tl.tensor,
    grad_x: tl.tensor,
    num_rows: tl.tensor,
    x_row: tl.tensor,
    grad_row: tl.tensor,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """A program computes one tile of both gradients; grad_x is contiguous."""
    row, column = place_of_tile(COLUMNS, ROWS, WIDTH)
    row = row[:, None]
    mask = (row < num_rows) & (column < COLUMNS)
    source = x + row * x_row + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + COLUMNS, mask=mask, other=0.0).to(tl.float32)
    grad_tile = tl.load(grad + row * grad_row + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    # d silu(gate) / d gate = sigmoid (1 + gate (1 - sigmoid))
    grad_gate = grad_tile * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    target = grad_x + row * (2 * COLUMNS) + column
    tl.store(target, grad_gate, mask=mask)
    tl.store(target + COLUMNS, grad_tile * gate * sigmoid, mask=mask)


class _Swiglu(Function):
    @staticmethod
    def forward(ctx: Any, x_TF: Tensor) -> Tensor:
        ctx.save_for_backward(x_TF)
        T, F = x_TF.shape
        output, tile = x_TF.new_empty(T, F // 2), tile_of(F // 2)
        if programs := num_tiles(T, tile):
            _forward_kernel[(programs,)](x_TF, output, T, x_TF.stride(0), **tile)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x_TF,) = ctx.saved_tensors
        (grad,) = handed_over("the SwiGLU kernel", grad, dtype=x_TF.dtype, knows_strides=True)
        T, F = x_TF.shape
        grad_TF, tile = x_TF.new_empty(T, F), tile_of(F // 2)
        if programs := num_tiles(T, tile):
            _backward_kernel[(programs,)](x_TF, grad, grad_TF, T, x_TF.stride(0), grad.stride(0), **tile)
        return grad_TF


def swiglu(x_TF: Tensor) -> Tensor:
    """As model.swiglu.swiglu, rounded once. Raises ValueError if rows are not contiguous."""
    check_rows("the SwiGLU kernel", input=x_TF)
    return _Swiglu.apply(x_TF)
