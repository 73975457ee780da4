"""Lets megatron-core run on a machine without a CUDA device.

Core's training paths compute nothing that needs a GPU. On CPU only names stop them: factory calls with device="cuda",
torch.cuda functions, and checks of tensor type names. `install()` provides the CPU under those names. It must run
before megatron is imported and patches nothing where CUDA exists. No other module of this project patches a library.
Each patch states its reason; tests/unit/runtime/test_cpu_megatron.py leaves each one out in turn and shows that
training then fails.

Importing this project patches nothing: entry points call `install()` (the commands, spawned ranks, examples, tests).
Core decides on import which optimizers, extensions and compiled functions it has, so a call that comes later is too
late. The packages that import megatron therefore refuse to be imported without it (`require`).
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from importlib import metadata
from typing import Any

import torch
from torch.utils._device import _device_constructors

from hunyuan_pretrain.runtime.quiet import quieten

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Patch:
    """A patch for something that megatron-core uses and a machine without CUDA lacks."""

    name: str
    reason: str
    apply: Callable[[], None]
    since: tuple[int, int] = (0, 16)
    """First megatron-core version that needs the patch."""


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


def _factories_on_cpu() -> None:
    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return make

    # `with torch.device("meta")` recognises factories by identity, in a set that torch fills on first use: fill it now,
    # with the functions that the wrappers call
    _device_constructors()
    for name in ("empty", "zeros", "ones", "tensor", "empty_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _tensor_type_names() -> None:
    plain_type = torch.Tensor.type

    @wraps(plain_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_type(self, *args, **kwargs)
        # a subclass of Tensor may get here twice
        return (
            result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) and "cuda" not in result else result
        )

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


def _current_device() -> None:
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]


class _Event:
    """An event on a `_Stream`."""

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Stream:
    """A stream whose work is always complete: a CPU operation is done when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def record_event(self) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        pass


def _streams() -> None:
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: _Stream()  # type: ignore[assignment,return-value]
    torch.cuda.default_stream = lambda device=None: _Stream()  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment,return-value]


class _HostCopy(torch.Tensor):
    """A tensor returned by pin_memory(), or computed from one."""

    is_cuda = False


def _pinned_memory() -> None:
    empty = torch.empty

    @wraps(empty)
    def pageable_empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs)

    torch.empty = pageable_empty  # type: ignore[assignment]
    torch.Tensor.pin_memory = lambda self, device=None: self.clone().as_subclass(_HostCopy)  # type: ignore[method-assign]


@contextmanager
def weights_count_as_on_a_device() -> Iterator[None]:
    """Without CUDA, make `is_cuda` true inside this context, except on host copies (results of pin_memory()).

    For constructing core's offloaded optimizer, which splits weights by this property and fails in its first step if no
    weight has it. Not for longer, because torch reads it too.
    """
    if not _installed:
        yield
        return
    torch.Tensor.is_cuda = True
    try:
        yield
    finally:
        del torch.Tensor.is_cuda  # restores the inherited attribute


def _wgrad_accumulation() -> None:
    module = types.ModuleType("fused_weight_gradient_mlp_cuda")

    def accumulate(input_TI: torch.Tensor, grad_output_TO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
        if input_TI.dtype == main_grad_OI.dtype:
            main_grad_OI.addmm_(grad_output_TO.t(), input_TI)
        else:
            main_grad_OI += grad_output_TO.t() @ input_TI

    module.wgrad_gemm_accum_fp32 = accumulate  # type: ignore[attr-defined]
    module.wgrad_gemm_accum_fp16 = accumulate  # type: ignore[attr-defined]
    sys.modules["fused_weight_gradient_mlp_cuda"] = module


def _compile_on_first_call() -> None:
    compile_now = torch.compile

    @wraps(compile_now)
    def compile_(model: Any = None, **kwargs: Any) -> Any:
        if not isinstance(model, types.FunctionType):
            return compile_now(model, **kwargs)
        compiled: list[Any] = []

        @wraps(model)
        def call(*args: Any, **call_kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(model, **kwargs))
            return compiled[0](*args, **call_kwargs)

        return call

    torch.compile = compile_


GPU_PACKAGES = ("transformer_engine", "amp_C", "apex")
"""GPU-only packages whose optimizers, norms and copies core uses wherever it can import them."""


def _no_gpu_packages() -> None:
    loaded = [name for name in sys.modules if name.partition(".")[0] in GPU_PACKAGES]
    for name in (*GPU_PACKAGES, *loaded):
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ImportError, core's sign that it is not installed


PATCHES = (
    Patch(
        "gpu_packages",
        "core uses the optimizers and norms of an installed Transformer Engine or Apex even on CPU",
        _no_gpu_packages,
    ),
    Patch(
        "factories", 'core makes tensors with device="cuda" (schedules, gradient norm, optimizer)', _factories_on_cpu
    ),
    Patch(
        "tensor_type",
        "the mixed-precision optimizers sort parameters by type names such as torch.cuda.FloatTensor",
        _tensor_type_names,
    ),
    Patch(
        "current_device",
        "gradient buffers and pipeline messages are allocated on torch.cuda.current_device()",
        _current_device,
    ),
    Patch(
        "streams",
        "the offloaded optimizer, and from 0.17 on gradient reduction, use CUDA streams to order their work",
        _streams,
    ),
    Patch(
        "pinned_memory", "the offloaded optimizer pins its copies of weights and gradients on the host", _pinned_memory
    ),
    Patch(
        "wgrad_accumulation",
        "core accumulates weight gradients into main_grad in the GEMM only with Apex's extension, and fails without it",
        _wgrad_accumulation,
    ),
    Patch(
        "compile",
        "core compiles its fusions on import, which loads torch's compiler: seconds in every process, for "
        "functions that are not called here",
        _compile_on_first_call,
    ),
)

_installed = False


def needed_patches() -> tuple[Patch, ...]:
    """Patches that the installed megatron-core version needs."""
    major, minor = metadata.version("megatron-core").split(".")[:2]
    return tuple(patch for patch in PATCHES if patch.since <= (int(major), int(minor)))


def install(leave_out: Collection[str] = ()) -> bool:
    """Apply the patches and return True; return False without patching where CUDA exists.

    `leave_out` names patches to skip, for the test that each one is still needed. Raises RuntimeError if megatron.core
    was imported before, because it would keep the unpatched names.
    """
    global _installed
    quieten()
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    if "megatron.core" in sys.modules:
        raise RuntimeError("cpu_megatron.install() must run before megatron.core is imported")
    for patch in needed_patches():
        if patch.name not in leave_out:
            patch.apply()
    _installed = True
    return True


def require(package: str) -> None:
    """Import megatron.core for `package`, which needs it. Raises RuntimeError if it cannot work in this process because
    there is no CUDA device and `install()` has not been called."""
    if not _installed and not torch.cuda.is_available():
        raise RuntimeError(
            f"{package} needs a CUDA device, or, to run on the CPU, this call before it is imported: "
            "hunyuan_pretrain.runtime.cpu_megatron.install()"
        )
    if "megatron.core" in sys.modules:
        return
    with _hidden("wandb"):
        importlib.import_module("megatron.core")


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Inside the context, importing `package` fails, as where it is not installed.

    Core imports wandb for timers and an inference engine that are not used here: half a second of every process,
    whether the run logs there or not.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
