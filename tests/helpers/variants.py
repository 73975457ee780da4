"""Counts the variants of a kernel that Triton would compile, on a machine without a GPU.

`python -m tests.helpers.variants` launches the kernels on rows of experts with several numbers of rows, and prints a
line each: the variants, and how many there would be without `do_not_specialize`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from hunyuan_pretrain.runtime import cpu_megatron
from tests.helpers.compiled import TARGETS

ROWS = (1, 16, 17, 32, 33, 100, 1024, 1040)
"""Triton compiles an integer argument anew if it is 1, and if it is a multiple of 16."""


def variant(kernel: Any, values: tuple[Any, ...], named: dict[str, Any]) -> str:
    """What Triton looks a compiled kernel up by, in a launch with these arguments."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS[0]))
    _, specialised, options = bind(*values, **named)
    return f"{specialised} {options}"


def variants(launch: Callable[[int], object]) -> dict[str, tuple[int, int]]:
    """Kernel -> its variants over all numbers of ROWS; and those of a kernel that specialises all its arguments."""
    found: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))

    def run(kernel: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        for seen, one in zip(found[kernel.fn.__name__], (kernel, triton.jit(kernel.fn)), strict=True):
            seen.add(variant(one, values, named))

    with patch.object(JITFunction, "run", run):
        for rows in ROWS:
            launch(rows)
    return {name: (len(ours), len(others)) for name, (ours, others) in found.items()}


def launches() -> dict[str, Callable[[int], object]]:
    """Name -> a function that launches kernels forward and backward for a number of rows."""
    from hunyuan_pretrain.model.kernels import kernel_functions
    from hunyuan_pretrain.model.routing import RoutingPlan

    kernels, K, D = kernel_functions(), 2, 64

    def numbers(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)

    def plan(tokens: int) -> RoutingPlan:
        """One row more than choices."""
        row_TK = torch.arange(tokens * K).view(tokens, K)
        token_R = torch.arange(tokens * K + 1) // K
        return RoutingPlan(torch.zeros(tokens, K, requires_grad=True), row_TK, token_R, torch.tensor([0]), False)

    def swiglu(rows: int) -> None:
        kernels.swiglu(numbers(rows, 2 * D)).backward(numbers(rows, D))

    def permute(rows: int) -> None:
        rows_RD, hidden_TD = kernels.permute(numbers(rows, D), plan(rows))
        (rows_RD.sum() + hidden_TD.sum()).backward()

    def combine(rows: int) -> None:
        places = plan(rows)
        tokens = [numbers(rows, D) for _ in range(2)]
        kernels.combine(numbers(rows * K + 1, D), places.weight_TK, places, *tokens).backward(numbers(rows, D))

    return {"swiglu": swiglu, "permute": permute, "combine": combine}


if __name__ == "__main__":
    cpu_megatron.install()
    for function, launch in launches().items():
        for name, (ours, others) in variants(launch).items():
            print(f"{function} {name}: {ours} of {others}")
