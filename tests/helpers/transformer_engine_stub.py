"""Transformer Engine's Python part on a machine without a GPU: a stand-in for its compiled module, kernels included.

`install()` must run before anything imports megatron or torch's users of it. The package's folder (tests of this
project find it in TE_FOLDER) is kept out of the normal environment, because megatron-core behaves differently where it
can import Transformer Engine.

What the stand-ins verify: that modules are constructed, wired and called correctly; and, together with
transformer_engine_quantization.py, that FP8 operations receive the right values. They do not verify the arithmetic of
any kernel.
"""

from __future__ import annotations

import enum
import gc
import importlib.abc
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.helpers.transformer_engine_adam import adam, adam_with_remainder

TE_FOLDER = Path(os.environ.get("TRANSFORMER_ENGINE_FOLDER", Path(sys.prefix) / "transformer_engine"))
"""Where the Makefile installs the package, without its dependencies."""

TE_VERSION = next(
    (
        tuple(map(int, path.name.split("-")[1].split(".")[:2]))
        for path in TE_FOLDER.glob("transformer_engine-*.dist-info")
    ),
    (0, 0),
)
"""Major and minor version of the installed package."""

calls: list[tuple[Any, ...]] = []
"""Calls of the quantisation stand-ins, in order."""

ENUMS = {
    "FP8FwdTensors": "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT "
    "GEMM3_WEIGHT "
    "GEMM3_OUTPUT",
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
    "Float8BlockScaleTensorFormat": "GEMM_READY COMPACT INVALID",
    "NVTERoutingMapFormat": "BYTEMAP BITMAP_U8",
    "NVTEQBHistogramMode": "TWO_KERNEL FUSED_ATOMIC",
    "NVTEScalingMode": "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING",
    "CommOverlapType": "RS AG",
    "CommOverlapAlgo": "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS "
    "SPLIT_PIPELINED_RS_P2P "
    "ATOMIC_GEMM_RS",
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK "
    "NVTE_CAUSAL_BOTTOM_RIGHT_MASK "
    "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8"
    + " NVTE_F16_max512_seqlen" * (TE_VERSION < (2, 20)),
    "NVTE_QKV_Format": "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_SBHD_2BSHD NVTE_BSHD_2SBHD NVTE_THD_2BSHD NVTE_THD_2SBHD "
    "NVTE_BHSD NVTE_QKV_Format_NOT_SET",
}


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """Make `import transformer_engine` work in this process as on a GPU of this compute capability, and megatron-core
    work on the CPU."""
    from hunyuan_pretrain.runtime import cpu_megatron, handover

    cpu_megatron.install(leave_out=["gpu_packages"])
    sys.path.insert(0, str(TE_FOLDER))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    torch.version.cuda = "13.0"
    gpu = types.SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    torch.cuda.get_device_properties = lambda *device: gpu
    torch.cuda.is_current_stream_capturing = handover.is_recording
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    sys.modules["transformer_engine_torch"] = _compiled_module()
    with _absent_packages(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its first attempt to load the compiled module fails
        import transformer_engine.common

        transformer_engine.common.load_framework_extension = lambda framework: None
        import transformer_engine.pytorch
    _count_cpu_tensors_as_cuda()
    _gather_one_by_one()
    # what is imported stays; jobs collect the cycles of each case, and would search it all every time
    gc.collect()
    gc.freeze()


# --- the compiled module ----------------------------------------------------------------------------------------------


def _compiled_module() -> types.ModuleType:
    module = types.ModuleType("transformer_engine_torch")
    names: dict[str, Any] = {name: enum.IntEnum(name, values.split(), start=0) for name, values in ENUMS.items()}
    layouts = (
        "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD T3HD TH3D "
        "THD_T2HD "
    )
    layouts += "THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD "
    layouts += "Paged_KV_BSHD_BSHD_BSHD Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD "
    layouts += "Paged_KV_THD_BSHD_BSHD Paged_KV_THD_SBHD_SBHD BHSD_BHSD_BHSD QKV_Layout_NOT_SET"
    # only the part of the C++ enumeration that the bindings expose: newer versions compare it with their own list
    numbers = {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    }
    names["DType"] = enum.IntEnum("DType", numbers)
    names["NVTE_QKV_Layout"] = enum.IntEnum("NVTE_QKV_Layout", [f"NVTE_{name}" for name in layouts.split()], start=0)
    backend = names["NVTE_Fused_Attn_Backend"].NVTE_F16_arbitrary_seqlen
    for name in ("CommOverlap", "CommOverlapP2P", "CommOverlapHelper", "CommOverlapBase", "FP8TensorMeta"):
        names[name] = type(name, (), {})
    names |= {
        "get_num_cublas_streams": lambda: 4,
        "get_cublasLt_version": lambda: 130000,
        "get_cudnn_version": lambda: 91300,
        "device_supports_multicast": lambda *args: False,
        "get_stream_priority_range": lambda *args: (0, 0),
        "ubuf_built_with_mpi": lambda: False,
        "generic_gemm": generic_gemm,
        "te_general_grouped_gemm": grouped_gemm,
        "rmsnorm_fwd": rmsnorm_forward,
        "rmsnorm_bwd": rmsnorm_backward,
        "layernorm_fwd": _missing("layernorm_fwd"),
        "layernorm_bwd": _missing("layernorm_bwd"),
        "quantize": _late("quantize"),
        "split_quantize": _late("split_quantize"),
        "dequantize": _late("dequantize"),
        "create_empty_quantized_tensor": _late("create_empty"),
        "fp8_transpose": _late("fp8_transpose"),
        "swap_first_dims": _late("swap_first_dims"),
        "compute_amax": _late("compute_amax"),
        "multi_tensor_compute_scale_and_scale_inv": _late("compute_scales"),
        "fp8_block_scaling_compute_partial_amax": _late("partial_block_amax"),
        "fp8_block_scaling_partial_cast": _late("partial_block_cast"),
        "fused_amax_and_scale_update_after_reduction": _late("update_scales"),
        "get_fused_attn_backend": lambda *args: backend if TE_VERSION < (2, 20) else (backend, ""),
        "fused_attn_fwd": attention_forward,
        "fused_attn_bwd": attention_backward,
        "multi_tensor_adam": adam,
        "multi_tensor_adam_param_remainder": adam_with_remainder,
        "multi_tensor_scale": scale_all,
        "multi_tensor_l2norm": norm_of_all,
    }
    by_pointer = {
        "generic_gemm",
        "te_general_grouped_gemm",
        "rmsnorm_fwd",
        "rmsnorm_bwd",
        "fp8_transpose",
        "compute_amax",
    }
    by_pointer |= {name for name in names if name.startswith(("multi_tensor_", "fp8_block_scaling_"))}
    module.__dict__.update(names | {name: _read_by_pointer(name, names[name]) for name in by_pointer})
    module.__getattr__ = _missing  # type: ignore[method-assign]
    return module


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in")

    return call


def _read_by_pointer(name: str, kernel: Any) -> Any:
    """A stand-in that refuses what its kernel would misread: the kernel gets a pointer and a shape and does not check
    strides."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for tensor in _plain_tensors([*args, *kwargs.values()]):
            strides = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            assert tensor.is_contiguous(), (
                f"transformer_engine_torch.{name} reads its tensors as contiguous, and one is not: {strides}"
            )
        return kernel(*args, **kwargs)

    return call


def _plain_tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if type(value) in (Tensor, torch.nn.Parameter):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _plain_tensors(value)


def _late(name: str) -> Any:
    """A stand-in that is imported at the first call, because its module imports Transformer Engine, which imports this
    module."""

    def call(*args: Any, **kwargs: Any) -> Any:
        from tests.helpers import transformer_engine_quantization

        return getattr(transformer_engine_quantization, name)(*args, **kwargs)

    return call


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None, None, None]:
    """Column-major GEMM: op(B) op(A) in row-major terms."""
    accumulate = args[7]
    product = _product(A, transa, B, transb)
    product = product if transb else product.view(*B.size()[:-1], -1)
    if out is None:
        return product.to(getattr(torch, out_dtype.name[1:].lower())), None, None, None
    out.copy_(out + product if accumulate else product)
    return out, None, None, None


def grouped_gemm(
    A: Sequence[Any], transa: bool, B: Sequence[Any], transb: bool, out: Sequence[Tensor], *args: Any
) -> list[Tensor]:
    """One `generic_gemm` per member; a single output holds the results one after the other."""
    splits, bias, single, accumulate = args[1], args[2], args[4], args[9]
    parts = out[0].split(splits) if single else out
    for a, b, part in zip(A, B, parts, strict=True):
        product = _product(a, transa, b, transb)
        part.copy_(part + product if accumulate else product)
    return bias


def _product(A: Any, transa: bool, B: Any, transb: bool) -> Tensor:
    """The matmul: in fp32 for FP8 operands, otherwise in the operands' own format. The kernels read FP8 along the
    summed dimension; on Hopper that requires the transposed data of an operand that is not summed over its last
    dimension."""
    from tests.helpers.transformer_engine_quantization import numbers

    rows_A, rows_B = (x.flatten(0, -2) for x in (numbers(A, is_rowwise=transa), numbers(B, is_rowwise=not transb)))
    return (rows_B.t() if transb else rows_B) @ (rows_A.t() if transa else rows_A)


def rmsnorm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:
    """The arithmetic of the local norm, so that no difference between the specs comes from the norm."""
    from hunyuan_pretrain.model.norm import _RMSNormFunction

    saved: list[Tensor] = []
    y = _RMSNormFunction.forward(
        types.SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors)), x, weight, eps
    )
    return (y if quantizer is None else _late("quantize")(y, quantizer)), None, saved[2][:, 0]


def rmsnorm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Any, Any]:
    """Gradients of x and the weight."""
    from hunyuan_pretrain.model.norm import _RMSNormFunction

    return _RMSNormFunction.backward(types.SimpleNamespace(saved_tensors=(x, weight, rstd[:, None])), grad)[:2]


def attention_forward(longest_q: int, longest_k: int, is_training: bool, scale: float, *args: Any) -> list[Tensor]:
    """Attention of packed documents (THD), or of sequences of equal length (SBHD, BSHD)."""
    layout, mask, cu_seqlens_q, cu_seqlens_k, *tensors = _attention_arguments(args)
    out = _attention(layout, *_as_read(layout, *tensors[:3]), cu_seqlens_q, cu_seqlens_k, mask, scale)
    return [out.detach(), torch.zeros(1), torch.zeros(2)]


def attention_backward(longest_q: int, longest_k: int, scale: float, *args: Any) -> list[Tensor]:
    """Backward pass of attention, by autograd through the forward pass."""
    layout, mask, cu_seqlens_q, cu_seqlens_k, q, k, v, _, grad, *_ = _attention_arguments(args)
    leaves = [x.detach().requires_grad_() for x in _as_read(layout, q, k, v)]
    output_format = layout.name.removeprefix("NVTE_").split("_")[0].translate(NO_NUMBERS)
    with torch.enable_grad():
        out = _attention(layout, *leaves, cu_seqlens_q, cu_seqlens_k, mask, scale)
        return list(torch.autograd.grad(out, leaves, _read_by(output_format, grad)))


def _attention_arguments(args: Sequence[Any]) -> list[Any]:
    """Layout of q, k and v, the mask, and the tensors: cu_seqlens of q and k, then q, k, v, the output and its
    gradient.

    Recognised by type: versions differ in the arguments between them, but not in this order.
    """
    first = [next(x for x in args if type(x).__name__ == name) for name in ("NVTE_QKV_Layout", "NVTE_Mask_Type")]
    return [*first, *(x for x in args if isinstance(x, Tensor))]


NO_NUMBERS = str.maketrans("", "", "23")


def _as_read(layout: Any, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """q, k and v as the kernel reads them: it gets a pointer and a shape of each, and assumes the strides that the
    layout's name implies."""
    parts = layout.name.removeprefix("NVTE_").split("_")
    parts = {1: parts * 3, 2: [parts[0], parts[1], parts[1]], 3: parts}[len(parts)]
    return [_read_by(part, x) for part, x in zip(parts, (q, k, v), strict=True)]


def _read_by(part: str, x: Tensor) -> Tensor:
    """`part` is THD, T3HD, TH2D, SBHD ...: the tensor's dims, outermost first, and where tensors that share a buffer
    are interleaved."""
    strides: list[int] = []
    stride, sizes = 1, list(x.shape)
    for letter in reversed(part):
        if letter.isdigit():
            stride *= int(letter)
        else:
            strides.append(stride)
            stride *= sizes.pop()
    assert not sizes, f"{part} has other dims than a tensor of shape {tuple(x.shape)}"
    return x.detach().as_strided(x.shape, strides[::-1])


def _attention(
    layout: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Any,
    scale: float,
) -> Tensor:
    if q.ndim == 4:  # all sequences have the same length
        is_sbhd = layout.name.startswith("NVTE_S")
        batch = [x.transpose(0, 1) if is_sbhd else x for x in (q, k, v)]
        sequences, length = batch[0].shape[:2]
        cu_seqlens = torch.arange(0, sequences * length + 1, length)
        rows = [x.flatten(0, 1) for x in batch]
        out = _attention(layout, *rows, cu_seqlens, cu_seqlens, mask, scale).unflatten(0, (sequences, length))
        return (out.transpose(0, 1) if is_sbhd else out).contiguous()
    calls.append(("attention", mask.name))
    outs = []
    q_rows, k_rows = (list(pairwise(cu_seqlens.tolist())) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
    for (q_start, q_end), (k_start, k_end) in zip(q_rows, k_rows, strict=True):
        n, P = q_end - q_start, k_end - k_start
        is_hidden = torch.ones(n, P, dtype=torch.bool).triu(1 + (P - n if "BOTTOM_RIGHT" in mask.name else 0))
        keys, values = (x[k_start:k_end].float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("tnh,snh->nts", q[q_start:q_end].float(), keys) * scale
        weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("nts,snh->tnh", weights, values))
    return torch.cat(outs).to(q.dtype)


def scale_all(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    """out = in * factor."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def norm_of_all(
    chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors together."""
    squares = torch.stack([tensor.float().square().sum() for tensor in lists[0]])
    return squares.sum().sqrt().reshape(1), squares.sqrt()


# --- the surroundings -------------------------------------------------------------------------------------------------


class _Anything(types.ModuleType):
    """A module from which anything can be imported, called and used as a decorator."""

    __path__: ClassVar[list[str]] = []
    __version__ = "3.5.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    packages = ("triton", "onnxscript", "onnx", "einops")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.packages else None
        )

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def _absent_packages() -> Iterator[None]:
    """Let Transformer Engine import packages of parts that are not used here, and remove them afterwards."""
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Anything)]:
            del sys.modules[name]


def _count_cpu_tensors_as_cuda() -> None:
    """Transformer Engine's modules check for CUDA in their constructors and at the start of a forward pass."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    construct = TransformerEngineBaseModule.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        available = torch.cuda.is_available
        torch.cuda.is_available = lambda: True
        try:
            construct(self, *args, **kwargs)
        finally:
            torch.cuda.is_available = available

    TransformerEngineBaseModule.__init__ = init
    torch.Tensor.is_cuda = True  # type: ignore[misc,assignment]


def _gather_one_by_one() -> None:
    """Gloo cannot coalesce several gathers, as for FP8 data and scales: issue each one at once."""
    coalesce = torch.distributed._coalescing_manager
    finished = types.SimpleNamespace(wait=lambda: None)

    def manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
        return coalesce(group, device, async_ops) if device is None else nullcontext(finished)

    torch.distributed._coalescing_manager = manager
