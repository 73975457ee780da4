"""Rows of a rank's experts: how many each expert has, zero rows that pad them, and gathers that move rows.

A gather uses an index map in the forward pass and its inverse in the backward pass. No scatter adds into a row, so the
result does not depend on the order of threads.

Shapes: R rows of experts, P rows after a gather (with padding, where there is some), D hidden, e experts of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.runtime.handover import to_device


@dataclass(frozen=True)
class RowSplits:
    """Row count of each expert of this rank; rows are sorted by expert."""

    rows_e: tuple[int, ...]
    are_equal: bool = False
    """By construction, as under a capacity: all experts can be computed together. Counts that are equal by chance do
    not qualify, so the choice of kernel never depends on where tokens went."""

    @classmethod
    def equal(cls, num_experts: int, rows: int) -> RowSplits:
        """`rows` rows for each expert."""
        return cls((rows,) * num_experts, are_equal=True)

    @property
    def num_rows(self) -> int:
        """R, over all experts."""
        return sum(self.rows_e)


# --- gathers ----------------------------------------------------------------------------------------------------------


def taken(rows_RD: Tensor, index_P: Tensor, has_gaps: bool) -> Tensor:
    """rows_RD[index_P]; with gaps, an index of R gives a row of zeros."""
    if not has_gaps:
        return rows_RD.index_select(0, index_P)
    taken_PD = rows_RD.index_select(0, index_P.clamp(max=rows_RD.shape[0] - 1))
    return taken_PD.masked_fill_((index_P == rows_RD.shape[0])[:, None], 0)


def inverse(index_P: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) the position of each row in index_P, which has no repeats; len(index_P) for a row that is not in
    it."""
    back_R = index_P.new_full((num_rows,), index_P.shape[0])
    back_R[index_P] = torch.arange(index_P.shape[0], device=index_P.device)
    return back_R


class _Moved(torch.autograd.Function):
    """A gather whose gradient is a gather. torch's own gradient adds into rows, and has to sort them first to be
    deterministic."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, index_P: Tensor, back_R: Tensor, has_gaps: bool) -> Tensor:
        ctx.back_R, ctx.has_gaps = back_R, has_gaps
        return taken(rows_RD, index_P, has_gaps)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None, None]:
        return taken(grad_PD, ctx.back_R, ctx.has_gaps), None, None, None


def moved(rows_RD: Tensor, index_P: Tensor, back_R: Tensor, has_gaps: bool) -> Tensor:
    """rows_RD[index_P], differentiable; the inverse map `back_R` gathers the gradient. With gaps, R in index_P and P in
    back_R stand for a row of zeros."""
    return _Moved.apply(rows_RD, index_P, back_R, has_gaps)


# --- padding ----------------------------------------------------------------------------------------------------------


class RowPadding(NamedTuple):
    """Zero rows after the rows of each expert."""

    splits: RowSplits  # padding included
    row_P: Tensor  # row at each padded position, R for a zero row
    position_R: Tensor  # padded position of each row


def row_padding(splits: RowSplits, multiple: int, device: torch.device) -> RowPadding:
    """Pad each expert's rows to a multiple of `multiple`. Counts under a capacity are always the same, so their padding
    is computed once."""
    return (_same_padding if splits.are_equal else _padding)(splits, multiple, device)


def _padding(splits: RowSplits, multiple: int, device: torch.device) -> RowPadding:
    rows_e, num_rows = splits.rows_e, splits.num_rows
    padded_e = tuple(-(-rows // multiple) * multiple for rows in rows_e)
    shifts_e = [sum(padded_e[:expert]) - sum(rows_e[:expert]) for expert in range(len(rows_e))]
    shift_R = to_device(torch.tensor(shifts_e, dtype=torch.int64).repeat_interleave(torch.tensor(rows_e)), device)
    position_R = torch.arange(num_rows, device=device) + shift_R
    row_P = torch.full((sum(padded_e),), num_rows, dtype=torch.int64, device=device)
    row_P[position_R] = torch.arange(num_rows, device=device)
    return RowPadding(RowSplits(padded_e, splits.are_equal), row_P, position_R)


_same_padding = cache(_padding)  # a recorded step reads it: it must not be freed
