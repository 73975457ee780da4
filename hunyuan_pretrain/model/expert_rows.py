"""Rows of the experts of a rank: how many each has, rows of zeros between them, and gathers that move rows.

A gather goes by an index map forward and by the inverse map backward; no scatter adds into a row, so the result does
not depend on the order of threads.

Shapes: R rows of experts, P rows with padding, D hidden, e experts of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.runtime.handover import to_device


@dataclass(frozen=True)
class RowSplits:
    """Rows of each expert of this rank; they lie expert after expert."""

    rows_e: tuple[int, ...]
    are_equal: bool = False
    """By construction, as under a capacity: all experts can be computed together. Numbers that are equal by chance do
    not count, so that where tokens went never decides which kernel computes them."""

    @classmethod
    def equal(cls, num_experts: int, rows: int) -> RowSplits:
        """`rows` rows for each expert."""
        return cls((rows,) * num_experts, are_equal=True)

    @property
    def num_rows(self) -> int:
        """R: of all experts together."""
        return sum(self.rows_e)


# --- gathers ----------------------------------------------------------------------------------------------------------


def taken(rows_RD: Tensor, index_P: Tensor, has_gaps: bool) -> Tensor:
    """rows_RD[index_P]; with gaps, an index of R means a row of zeros."""
    if not has_gaps:
        return rows_RD.index_select(0, index_P)
    taken_PD = rows_RD.index_select(0, index_P.clamp(max=rows_RD.shape[0] - 1))
    return taken_PD.masked_fill_((index_P == rows_RD.shape[0])[:, None], 0)


def inverse(index_P: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) the place of each row in an index without repetitions; len(index_P) for a row that is not in it."""
    back_R = index_P.new_full((num_rows,), index_P.shape[0])
    back_R[index_P] = torch.arange(index_P.shape[0], device=index_P.device)
    return back_R


class _Moved(torch.autograd.Function):
    """torch's own gradient of a gather adds into rows, in an order that it has to sort for where it must be the same
    every time."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, index_P: Tensor, back_R: Tensor, has_gaps: bool) -> Tensor:
        ctx.back_R, ctx.has_gaps = back_R, has_gaps
        return taken(rows_RD, index_P, has_gaps)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None, None]:
        return taken(grad_PD, ctx.back_R, ctx.has_gaps), None, None, None


def moved(rows_RD: Tensor, index_P: Tensor, back_R: Tensor, has_gaps: bool) -> Tensor:
    """rows_RD[index_P], differentiable; `back_R` is the inverse map, by which the gradient is gathered. With gaps, an
    index of one past the end of either map is a row of zeros."""
    return _Moved.apply(rows_RD, index_P, back_R, has_gaps)


# --- padding ----------------------------------------------------------------------------------------------------------


class RowPadding(NamedTuple):
    """Rows of zeros after those of each expert."""

    splits: RowSplits  # with them
    row_P: Tensor  # row at each place, R where it is a row of zeros
    position_R: Tensor  # place of each row


def row_padding(splits: RowSplits, multiple: int, device: torch.device) -> RowPadding:
    """Each expert's rows filled up to a multiple of `multiple`."""
    rows_e, num_rows = splits.rows_e, splits.num_rows
    padded_e = tuple(-(-rows // multiple) * multiple for rows in rows_e)
    shifts_e = [sum(padded_e[:expert]) - sum(rows_e[:expert]) for expert in range(len(rows_e))]
    shift_R = to_device(torch.tensor(shifts_e, dtype=torch.int64).repeat_interleave(torch.tensor(rows_e)), device)
    position_R = torch.arange(num_rows, device=device) + shift_R
    row_P = torch.full((sum(padded_e),), num_rows, dtype=torch.int64, device=device)
    row_P[position_R] = torch.arange(num_rows, device=device)
    return RowPadding(RowSplits(padded_e, splits.are_equal), row_P, position_R)
