"""Compiles kernels for a GPU on a machine without one: the interpreter, which runs them there, accepts much that the
compiler does not. `python -m tests.helpers.compiled` compiles what `launches` launches and prints a line each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


def type_of(value: Any) -> str | None:
    """As a launch types an argument; None: a constant of the compiled kernel."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, bool) or not isinstance(value, int) or value == 1:
        return None
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(kernel: Any, arguments: dict[str, Any]) -> None:
    """Compile `kernel` for an H200, as a launch with these arguments would."""
    names = list(inspect.signature(kernel.fn).parameters)
    constant = {name for name, parameter in zip(names, kernel.params, strict=True) if parameter.is_constexpr}
    types = {name: None if name in constant else type_of(arguments[name]) for name in names}
    source = ASTSource(
        kernel,
        signature={name: kind or "constexpr" for name, kind in types.items()},
        constexprs={(names.index(name),): arguments[name] for name, kind in types.items() if kind is None},
    )
    options = {name: value for name, value in arguments.items() if name in ("num_warps", "num_stages")}
    binary = triton.compile(source, target=HOPPER, options=options)
    print(
        f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}: {len(binary.asm['cubin'])} bytes, {binary.metadata.shared} bytes of shared memory"
    )


@contextmanager
def only_compiled() -> Iterator[None]:
    """Inside, a launch compiles its kernel and runs nothing: what it would write keeps its old values."""

    def run(kernel: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = inspect.signature(kernel.fn).parameters
        compile_launch(kernel, dict(zip(names, values, strict=False)) | named)

    with patch.object(JITFunction, "run", run):
        yield


def launches() -> list[Callable[[], Any]]:
    """Calls that launch every kernel, with shapes of a real model and with odd ones."""
    from hunyuan_pretrain.model.kernels.assignment import assign_within_capacity
    from hunyuan_pretrain.model.kernels.permutation import combine, permute
    from hunyuan_pretrain.model.kernels.swiglu import swiglu
    from tests.helpers.assignments import case
    from tests.helpers.kernels import random_plan

    def both_ways(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
        output = function(*(x.requires_grad_() for x in inputs))
        output.backward(torch.ones_like(output))

    def hidden(rows: int, width: int) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=torch.bfloat16)

    hunyuan = {"num_moe_experts": 16, "moe_routing_group_tokens": 1024}
    odd: dict[str, Any] = {"num_moe_experts": 5, "moe_routing_group_tokens": 30, "moe_router_topk": 2}
    return [
        lambda: assign_within_capacity(*case(0, 2, **hunyuan)),
        lambda: assign_within_capacity(*case(0, 1, moe_expert_capacity_factor=0.7, recycle_routing=False, **odd)),
        lambda: both_ways(swiglu, hidden(4, 2 * 18304)),
        lambda: both_ways(lambda x: permute(x, random_plan(8, 1, 8, 0, "cpu")), hidden(8, 6400)),
        lambda: both_ways(
            lambda rows, weight, *others: combine(rows, weight, random_plan(8, 2, 20, 3, "cpu"), *others),
            hidden(20, 6400), random_plan(8, 2, 20, 3, "cpu").weight_TK, hidden(8, 6400), hidden(8, 6400),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    with only_compiled():
        for launch in launches():
            launch()
