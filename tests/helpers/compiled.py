"""Compiles kernels for a GPU on a machine without one: the interpreter, which runs them there, accepts much that the
compiler does not. `python -m tests.helpers.compiled` compiles what `launch_all` launches and prints a line each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
from hunyuan_pretrain.runtime import cpu_megatron

TARGETS = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 89, 32)
"""An H200, and a GPU with less shared memory for a program: 101,376 bytes."""
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


def type_of(value: Any, is_specialised: bool = True) -> str | None:
    """As a launch types an argument; None: a constant of the compiled kernel."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, bool) or not isinstance(value, int) or (value == 1 and is_specialised):
        return None
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(kernel: Any, arguments: dict[str, Any]) -> None:
    """Compile `kernel` for each target, as a launch with these arguments would."""
    names = list(inspect.signature(kernel.fn).parameters)
    constant = {name for name, parameter in zip(names, kernel.params, strict=True) if parameter.is_constexpr}
    plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    types = {name: None if name in constant else type_of(arguments[name], name not in plain) for name in names}
    source = ASTSource(
        kernel,
        signature={name: kind or "constexpr" for name, kind in types.items()},
        constexprs={(names.index(name),): arguments[name] for name, kind in types.items() if kind is None},
        # what a launch knows of its arguments changes the loads, and the shared memory that they pass through
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in types.items()
            if kind and name not in plain and (kind.startswith("*") or (kind != "fp32" and arguments[name] % 16 == 0))
        },
    )
    options = {name: value for name, value in arguments.items() if name in ("num_warps", "num_stages")}
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
    for target in TARGETS:
        binary = triton.compile(source, target=target, options=options)
        print(f"{name}: {len(binary.asm['cubin'])} bytes, {binary.metadata.shared} bytes of shared memory")


@contextmanager
def only_compiled() -> Iterator[None]:
    """Inside, a launch compiles its kernel and runs nothing: what it would write keeps its old values."""

    def run(kernel: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = inspect.signature(kernel.fn).parameters
        compile_launch(kernel, dict(zip(names, values, strict=False)) | named)

    with patch.object(JITFunction, "run", run):
        yield


def launch_all() -> None:
    """Launch every kernel at Hunyuan-Large's widths and with other sizes, and the assignment with its real groups."""
    cpu_megatron.install()

    from hunyuan_pretrain.model.functions import Functions
    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from hunyuan_pretrain.model.kernels import kernel_functions
    from hunyuan_pretrain.train.kernel_probe import Inputs, _results, compared
    from tests.helpers.assignments import case
    from tests.helpers.tiny import tiny_model

    large = {"hidden_size": 6400, "num_attention_heads": 80, "num_query_groups": 8, "moe_ffn_hidden_size": 18304}
    drops = {"moe_router_topk": 2, "moe_expert_capacity_factor": 0.7, "recycle_routing": False, "num_moe_experts": 5}
    for changes, dtype in ((large, "bf16"), (drops, "bf16"), (drops, "fp32")):
        config = transformer_config(tiny_model(**changes), ParallelConfig(), PrecisionConfig(dtype=dtype))
        inputs = Inputs(config, 32, torch.device("cpu"), 1)
        for name in Functions._fields:
            _results(compared(kernel_functions(), name), inputs.of(name) or (), config.params_dtype, 1)
    for experts in (64, 256):
        hidden_TD, weight_ED = torch.zeros(32, 6400, dtype=torch.bfloat16), torch.zeros(experts, 6400)
        _results(kernel_functions().router_logits, (hidden_TD, weight_ED), torch.bfloat16, 1)
    kernel_functions().assign(*case(0, 2, num_moe_experts=16, moe_routing_group_tokens=1024))
    for experts, topk in ((16, 1), (256, 8)):
        sizes = {"num_moe_experts": experts, "moe_router_topk": topk, "moe_routing_group_tokens": 4096}
        model = tiny_model(moe_z_loss_coeff=0.1, moe_expert_capacity_factor=None, recycle_routing=False, **sizes)
        config = transformer_config(model, ParallelConfig(), PrecisionConfig(dtype="bf16"))
        arguments = Inputs(config, 4096, torch.device("cpu"), 1).gating()
        _results(compared(kernel_functions(), "gating"), arguments, torch.float32, 1)


if __name__ == "__main__":
    with only_compiled():
        launch_all()
