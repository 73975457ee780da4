"""What kernels on matrices of rows share: the tile of a program, and the check of what they read.

Shapes: R rows, D columns.
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
