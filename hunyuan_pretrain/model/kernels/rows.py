"""What kernels on matrices of rows share: the tile of a program, the sum of what programs summed, and the check of what
they read.

Shapes: R rows, D columns, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Elements of a tile. With 4 warps, 8 elements per thread: 16 bytes of bf16, the widest load."""


COUNTS = ["num_rows", "num_tokens"]
"""Arguments that Triton compiles no variants for: without a capacity their values change from step to step."""


def tile_of(columns: int) -> dict[str, int]:
    """A tile's compile-time arguments: part of one row, or several whole rows where a row is shorter than TILE."""
    width = min(TILE, triton.next_power_of_2(columns))
    return {"COLUMNS": columns, "ROWS": TILE // width, "WIDTH": width, "num_warps": 4}


def num_tiles(rows: int, tile: dict[str, int]) -> int:
    """Tiles of a matrix. One dim of programs: the other dims of a launch have at most 65,535."""
    return triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(tile["COLUMNS"], tile["WIDTH"])


@triton.jit
def place_of_tile(COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tuple:
    """(row numbers (ROWS,), column numbers (1, WIDTH)) of this program. Rows are int64, as rows times stride may pass
    2^31. Programs of one row are neighbours."""
    across: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)[None, :]
    return row, column


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    parts, output, factor, other_output, other_factor, num_parts, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A program sums WIDTH columns; with factors, the output is the sum times the factor, for both."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    is_column = column < D
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, num_parts, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < num_parts)[:, None] & is_column[None, :]
        total += tl.sum(tl.load(parts + row[:, None] * D + column[None, :], mask=mask, other=0.0), 0)
    if factor is None:
        tl.store(output + column, total, mask=is_column)
    else:
        factor_tile = tl.load(factor + column, mask=is_column, other=0.0).to(tl.float32)
        other_tile = tl.load(other_factor + column, mask=is_column, other=0.0).to(tl.float32)
        tl.store(output + column, total * factor_tile, mask=is_column)
        tl.store(other_output + column, total * other_tile, mask=is_column)


def sum_of_parts(
    parts_PD: Tensor, dtype: torch.dtype, factors: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """(D,) the sum over the first dim of contiguous fp32 numbers, in an order that P fixes, rounded once to `dtype`;
    and None. With two factors (D,): the sum times each."""
    P, D = parts_PD.shape
    outputs = [torch.empty(D, dtype=dtype, device=parts_PD.device) for _ in factors or (None,)]
    first, second = factors or (None, None)
    width = 16 if D <= TILE else 64  # 64 bytes of a row at least, and many programs
    _sum_kernel[(triton.cdiv(D, width),)](
        parts_PD, outputs[0], first, outputs[1] if factors else None, second, P, D=D, ROWS=2 * TILE // width,
        WIDTH=width, num_warps=4,
    )  # fmt: skip
    return outputs[0], outputs[1] if factors else None


def check_rows(kernel: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have the dtype and device of the first, and last dims that are contiguous."""
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise ValueError(f"{kernel}: {name} is {tensor.dtype}, but {first_name} is {first.dtype}")
        check_layout(kernel, name, tensor, first.device)


def check_layout(kernel: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless the tensor is on `device` and its last dim is contiguous."""
    if tensor.device != device:
        raise ValueError(f"{kernel}: {name} is on {tensor.device}, but must be on {device}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        layout = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise ValueError(f"{kernel}: {name} has {layout}; the last dim must be contiguous")
