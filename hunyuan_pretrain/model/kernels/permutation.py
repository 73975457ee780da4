"""Permutation of tokens into rows of experts, and the sum that ends a layer, in one kernel each way.

Bytes per token and channel of b bytes, with K rows for each token:

    permute   forward   reads the token for each row, writes K rows: 2 K b
              backward  reads K rows and the gradient of what reads the tokens next, writes the token: (K + 2) b
    combine   forward   reads K rows, shared expert and residual, writes the token: (K + 3) b
              backward  reads the gradient and K rows, writes K rows: (2 K + 1) b

That is the minimum, but for permute's forward pass if K > 1, (K + 1) b: the rows of a token are far apart. combine's
backward pass reads a gradient again for each further choice, which neighbouring programs do at the same time, so the
cache has it. An empty slot adds b, for the zero that is written. Index maps and weights add 8 to 24 bytes per choice,
whatever the number of channels. combine saves the rows by reference; the gradients of shared expert and residual are
the incoming gradient itself.

Shapes: T tokens of this rank, D hidden, K top-k, R rows (slots of experts).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hunyuan_pretrain.model.kernels.rows import COUNTS, check_layout, check_rows, num_tiles, place_of_tile, tile_of
from hunyuan_pretrain.model.routing import RoutingPlan
from hunyuan_pretrain.runtime.handover import handed_over

# --- kernels ----------------------------------------------------------------------------------------------------------
# Results are contiguous. `x_row` is the stride of x over its rows or tokens.


@triton.jit(do_not_specialize=COUNTS)
def _permute_kernel(
    hidden: tl.tensor,
    token_of_row: tl.tensor,
    rows: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    hidden_row: tl.tensor,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """A program writes one tile of rows: the token's numbers, or zeros where the slot is empty."""
    row, column = place_of_tile(COLUMNS, ROWS, WIDTH)
    token = tl.load(token_of_row + row, mask=row < num_rows, other=num_tokens).to(tl.int64)[:, None]
    row = row[:, None]
    mask = (row < num_rows) & (column < COLUMNS)
    tile = tl.load(hidden + token * hidden_row + column, mask=mask & (token < num_tokens), other=0.0)
    tl.store(rows + row * COLUMNS + column, tile, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _sum_kernel(
    rows: tl.tensor,
    row_of_choice: tl.tensor,
    weight: tl.tensor,
    shared: tl.tensor,
    residual: tl.tensor,
    output: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    rows_row: tl.tensor,
    choice_row: tl.tensor,
    weight_row: tl.tensor,
    shared_row: tl.tensor,
    residual_row: tl.tensor,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """A program sums one tile of tokens over their rows, weighted if there is a weight, and adds what there is of
    `shared` and `residual`. A dropped choice adds nothing."""
    token, column = place_of_tile(COLUMNS, ROWS, WIDTH)
    is_token = token < num_tokens
    mask = is_token[:, None] & (column < COLUMNS)
    total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of_choice + token * choice_row + k, mask=is_token, other=num_rows).to(tl.int64)[:, None]
        tile = tl.load(rows + row * rows_row + column, mask=mask & (row < num_rows), other=0.0).to(tl.float32)
        if weight is not None:
            tile *= tl.load(weight + token * weight_row + k, mask=is_token, other=0.0).to(tl.float32)[:, None]
        total += tile
    token = token[:, None]
    if shared is not None:
        total += tl.load(shared + token * shared_row + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + token * residual_row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + token * COLUMNS + column, total, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _combine_backward_kernel(
    grad: tl.tensor,
    rows: tl.tensor,
    row_of_choice: tl.tensor,
    token_of_row: tl.tensor,
    weight: tl.tensor,
    grad_rows: tl.tensor,
    grad_weight: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    grad_row: tl.tensor,
    rows_row: tl.tensor,
    choice_row: tl.tensor,
    weight_row: tl.tensor,
    K: tl.constexpr,
    HAS_GAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """A program takes ROWS consecutive choices, over all columns. It writes the gradients of their rows and of their
    weights; then zeros into those of the ROWS rows of the same numbers that are empty, which no choice reaches."""
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, k = number // K, number % K
    is_choice = token < num_tokens
    row = tl.load(row_of_choice + token * choice_row + k, mask=is_choice, other=num_rows).to(tl.int64)[:, None]
    factor = tl.load(weight + token * weight_row + k, mask=is_choice, other=0.0).to(tl.float32)[:, None]
    token = token[:, None]
    products = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for first in range(0, COLUMNS, WIDTH):
        column = first + tl.arange(0, WIDTH)[None, :]
        mask = (row < num_rows) & (column < COLUMNS)
        grad_tile = tl.load(grad + token * grad_row + column, mask=mask, other=0.0).to(tl.float32)
        products += grad_tile * tl.load(rows + row * rows_row + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_rows + row * COLUMNS + column, grad_tile * factor, mask=mask)
    tl.store(grad_weight + number, tl.sum(products, axis=1), mask=is_choice)
    if HAS_GAPS:
        is_empty = tl.load(token_of_row + number, mask=number < num_rows, other=-1) >= num_tokens
        if tl.max(is_empty.to(tl.int32)) > 0:
            for first in range(0, COLUMNS, WIDTH):
                column = first + tl.arange(0, WIDTH)[None, :]
                zeros = tl.zeros([ROWS, WIDTH], dtype=grad_rows.dtype.element_ty)
                mask = is_empty[:, None] & (column < COLUMNS)
                tl.store(grad_rows + number[:, None] * COLUMNS + column, zeros, mask=mask)


# --- functions --------------------------------------------------------------------------------------------------------


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        (T, D), R = hidden_TD.shape, plan.num_rows
        rows_RD, tile = hidden_TD.new_empty(R, D), tile_of(D)
        if programs := num_tiles(R, tile):
            _permute_kernel[(programs,)](hidden_TD, plan.token_R, rows_RD, T, R, hidden_TD.stride(0), **tile)
        return rows_RD, hidden_TD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor | None, grad_TD: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_RD is None:
            return grad_TD, None
        (grad_RD,) = handed_over("the permute kernel", grad_RD, knows_strides=True)
        if grad_TD is not None:
            (grad_TD,) = handed_over("the permute kernel", grad_TD, dtype=grad_RD.dtype, knows_strides=True)
        return _summed(grad_RD, ctx.plan.row_TK, residual_TD=grad_TD), None


class _Combine(Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weight_TK: Tensor, plan: RoutingPlan, shared_TD: Tensor, residual_TD: Tensor
    ) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows_RD, weight_TK)
        return _summed(rows_RD, plan.row_TK, weight_TK, shared_TD, residual_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weight_TK = ctx.saved_tensors
        plan: RoutingPlan = ctx.plan
        (read_TD,) = handed_over("the combine kernel", grad_TD, dtype=rows_RD.dtype, knows_strides=True)
        (R, D), (T, K) = rows_RD.shape, weight_TK.shape
        grad_RD, tile = rows_RD.new_empty(R, D), tile_of(D)
        grad_TK = torch.empty(T, K, dtype=weight_TK.dtype, device=weight_TK.device)
        if programs := triton.cdiv(max(T * K, R), tile["ROWS"]):
            _combine_backward_kernel[(programs,)](
                read_TD,
                rows_RD,
                plan.row_TK,
                plan.token_R,
                weight_TK,
                grad_RD,
                grad_TK,
                T,
                R,
                *(x.stride(0) for x in (read_TD, rows_RD, plan.row_TK, weight_TK)),
                K=K,
                HAS_GAPS=not plan.is_permutation,
                **tile,
            )
        return grad_RD, grad_TK, None, grad_TD, grad_TD


def _summed(
    rows_RD: Tensor,
    row_TK: Tensor,
    weight_TK: Tensor | None = None,
    shared_TD: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """(T, D): the sum of a token's rows, times weight_TK, plus shared_TD and residual_TD; None: without."""
    (R, D), (T, K) = rows_RD.shape, row_TK.shape
    output_TD, tile = rows_RD.new_empty(T, D), tile_of(D)
    others = weight_TK, shared_TD, residual_TD
    if programs := num_tiles(T, tile):
        _sum_kernel[(programs,)](
            rows_RD,
            row_TK,
            *others,
            output_TD,
            T,
            R,
            rows_RD.stride(0),
            row_TK.stride(0),
            *(0 if x is None else x.stride(0) for x in others),
            K=K,
            **tile,
        )
    return output_TD


def permute(hidden_TD: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
    """As model.permutation.permute. Raises ValueError if the last dim is not contiguous."""
    _check("the permute kernel", plan, hidden=hidden_TD)
    return _Permute.apply(hidden_TD, plan)


def combine(rows_RD: Tensor, weight_TK: Tensor, plan: RoutingPlan, shared_TD: Tensor, residual_TD: Tensor) -> Tensor:
    """As model.permutation.combine, rounded once; the weights stay in fp32. Raises ValueError if a last dim is not
    contiguous, or for inputs of several dtypes."""
    kernel = "the combine kernel"
    _check(kernel, plan, rows=rows_RD, shared=shared_TD, residual=residual_TD)
    check_layout(kernel, "weight", weight_TK, rows_RD.device)
    return _Combine.apply(rows_RD, weight_TK, plan, shared_TD, residual_TD)


def _check(kernel: str, plan: RoutingPlan, **tensors: Tensor) -> None:
    check_rows(kernel, **tensors)
    (first, *_) = tensors.values()
    check_layout(kernel, "plan.row_TK", plan.row_TK, first.device)
    check_layout(kernel, "plan.token_R", plan.token_R, first.device)
