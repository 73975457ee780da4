"""CPU stand-ins for the kernels that fill and read Transformer Engine's FP8 tensors.

Quantisers, tensors, layouts and their conversions are Transformer Engine's own Python code. The values come from
hunyuan_pretrain.model.fp8.quantise, which tests/reference/fp8_reference.py verifies: this module only requests the
blocks that each quantiser uses, and lays the results out as the kernels do. Import it only after
`transformer_engine_stub.install()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage
from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

from hunyuan_pretrain.config.recipe import RECIPES, Operand, Recipe, RecipeName
from hunyuan_pretrain.model.fp8 import quantise as fp8
from tests.helpers.transformer_engine_stub import calls

STORAGES = {
    Float8Quantizer: Float8TensorStorage,
    Float8CurrentScalingQuantizer: Float8TensorStorage,
    Float8BlockQuantizer: Float8BlockwiseQTensorStorage,
    MXFP8Quantizer: MXFP8TensorStorage,
}
BUFFERS = {
    Float8TensorStorage: ("_data", "_transpose", "_scale_inv"),
    Float8BlockwiseQTensorStorage: ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv"),
    MXFP8TensorStorage: ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv"),
}


# --- to FP8 -----------------------------------------------------------------------------------------------------------


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Quantise the tensor, into `output` if given. Each usage of the quantiser is computed from the tensor itself."""
    assert not isinstance(tensor, QuantizedTensorStorage), "the kernel takes numbers of a higher precision"
    if noop is not None and noop.item():
        return output
    calls.append(("quantize", type(quantizer).__name__, tuple(tensor.shape)))
    is_square = isinstance(quantizer, Float8BlockQuantizer) and quantizer.block_scaling_dim == 2
    assert not is_square or quantizer.rowwise_usage, (
        "the kernel makes the data along rows of a square from that along columns"
    )
    empty = quantizer.make_empty(tuple(tensor.shape), dtype=tensor.dtype)
    storage = STORAGES[type(quantizer)]
    if storage is Float8TensorStorage and is_non_tn_fp8_gemm_supported():  # its GEMMs read the data in either direction
        empty._data, empty._transpose, empty._transpose_invalid = (
            torch.empty(tensor.shape, dtype=torch.uint8),
            None,
            True,
        )
    if output is None:
        output = storage(**empty.get_metadata()) if quantizer.internal else empty
    else:
        # usages that the quantiser does not request are dropped; existing ones are written in place
        for name in BUFFERS[storage]:
            wanted, held = getattr(empty, name), getattr(output, name)
            if wanted is None or held is None:
                setattr(output, name, wanted)
        output._fp8_dtype = quantizer.dtype
        if storage is Float8TensorStorage:
            output._transpose_invalid = output._transpose is None
    rows_RC = tensor.detach().reshape(-1, tensor.shape[-1])
    if storage is Float8TensorStorage:
        _fill_whole(output, rows_RC, quantizer)
    elif storage is Float8BlockwiseQTensorStorage:
        _fill_blocks(output, rows_RC, quantizer)
    else:
        _fill_mx_blocks(output, rows_RC, quantizer)
    return output


def create_empty(quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: Any, is_pinned: bool) -> Any:
    """An uninitialised tensor of this shape as the quantiser makes it; versions that describe such tensors ask for
    it."""
    # of two quantisers that make the same tensors, one is described
    described = Float8CurrentScalingQuantizer if type(quantizer) is Float8Quantizer else type(quantizer)
    made = described.storage_metadata(quantizer, dtype) | {"is_tensor": not quantizer.internal, "requires_grad": False}
    buffers = {
        name: torch.empty(size, dtype=number, device=device)
        for name, (size, number) in described.inner_tensor_specs(quantizer, shape).items()
    }
    return made["cls"].__tensor_unflatten__(buffers, made, shape, None)


def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    """(A, B, ...) -> (B, A, ...)."""
    swapped = tensor.transpose(0, 1)
    return swapped.contiguous() if out is None else out.copy_(swapped)


def split_quantize(tensor: Tensor, splits: Sequence[int], quantizers: Sequence[Any], **options: Any) -> list[Any]:
    """Quantise each expert's rows with its own quantiser."""
    calls.append(("split_quantize", tuple(splits)))
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(list(splits)), quantizers, strict=True)]


def update_scales(
    largest: Tensor, histories: Sequence[Tensor], scales: Sequence[Tensor], algorithm: str, dtype: Any, margin: int
) -> None:
    """Update the delayed scales from the reduced amaxes of a step. A history without an amax in a step is left
    unchanged."""
    calls.append(("update_scales", dtype.name, largest.numel()))
    top = torch.finfo(TE_DType_To_Torch[dtype]).max * 2.0**-margin
    for last, history, scale in zip(largest.split([scale.numel() for scale in scales]), histories, scales, strict=True):
        rolled = torch.cat([torch.zeros_like(history[:1]), history[2:], last[None]])[: len(history)]
        chosen = torch.maximum(history[1:].amax(0), last) if algorithm == "max" and len(history) > 1 else last
        is_seen = last != 0
        history.copy_(torch.where(is_seen, rolled, history))
        scale.copy_(torch.where(is_seen & chosen.isfinite(), fp8.scale_from_amax(chosen, top), scale))


def _fill_whole(output: Any, rows_RC: Tensor, quantizer: Any) -> None:
    """One scale for the whole tensor: from earlier steps, or from the current amax."""
    amax = rows_RC.abs().max().float().view(1) if rows_RC.numel() else torch.zeros(1)
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        assert quantizer.amax_epsilon == 0.0
        assert not getattr(quantizer, "use_existing_amax", False)  # removed in 2.20
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group())
        largest = torch.finfo(TE_DType_To_Torch[quantizer.dtype]).max
        scale = fp8.scale_from_amax(amax, largest, power_of_two=quantizer.force_pow_2_scales)
    else:
        scale = quantizer.scale
        if quantizer.amax.numel():  # a weight that is cast in shards gets its amax from elsewhere
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    codes_RC, inverse = _quantised(rows_RC, quantizer.dtype, "delayed", scale=scale)
    output._scale_inv.copy_(inverse.view_as(output._scale_inv))
    _write(output._data, codes_RC)
    _write(output._transpose, codes_RC.t())


def _fill_blocks(output: Any, rows_RC: Tensor, quantizer: Any) -> None:
    """Blocks of 1 x 128 along rows and along columns, or of 128 x 128. Scales of 1 x 128 blocks are stored column by
    column, except for gathering."""
    assert quantizer.force_pow_2_scales
    assert quantizer.amax_epsilon == 0.0
    is_square = quantizer.block_scaling_dim == 2
    is_compact = getattr(quantizer, "all_gather_usage", False)  # 2.20 gathers what its GEMMs read
    operand: Operand = "w" if is_square else "x"
    if output._rowwise_data is not None:
        codes_RC, inverse = _quantised(rows_RC, quantizer.dtype, "blockwise", operand)
        _write(output._rowwise_data, codes_RC)
        _write_padded(output._rowwise_scale_inv, inverse if is_square or is_compact else inverse.t())
    if output._columnwise_data is not None:
        codes_RC, inverse = _quantised(rows_RC, quantizer.dtype, "blockwise", operand, along_rows=True)
        _write(output._columnwise_data, codes_RC if is_compact and not is_square else codes_RC.t())
        _write_padded(output._columnwise_scale_inv, inverse.t() if is_square else inverse)


def _fill_mx_blocks(output: Any, rows_RC: Tensor, quantizer: Any) -> None:
    """Blocks of 1 x 32 along rows and along columns, neither transposed; scales are biased exponents."""
    for name, along_rows in (("rowwise", False), ("columnwise", True)):
        data = getattr(output, f"_{name}_data")
        if data is not None:
            codes_RC, inverse = _quantised(rows_RC, quantizer.dtype, "mxfp8", along_rows=along_rows)
            _write(data, codes_RC)
            exponent = torch.frexp(inverse.double())[1] - 1 + 127  # of a power of two
            _write_padded(
                getattr(output, f"_{name}_scale_inv"), exponent.masked_fill(inverse.isnan(), 255).to(torch.uint8)
            )


def _in_format(name: RecipeName, dtype: torch.dtype) -> Recipe:
    """The recipe with all operands in one format."""
    number_format = {dtype: name for name, dtype in fp8.DTYPES.items()}[dtype]
    return replace(RECIPES[name], forward_format=number_format, backward_format=number_format)


def _quantised(
    rows_RC: Tensor,
    dtype: Any,
    kind: Any,
    operand: Operand = "x",
    along_rows: bool = False,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """FP8 codes (R, C) as bytes, and the inverse scales of their blocks (row blocks, column blocks)."""
    number = TE_DType_To_Torch[dtype]
    _, values, inverse = fp8.quantize(rows_RC[None], _in_format(kind, number), operand, along_rows, scale)
    _, num_r, r, num_c, c = values.shape
    codes = values.view(torch.uint8).reshape(num_r * r, num_c * c)[: rows_RC.shape[0], : rows_RC.shape[1]]
    return codes, inverse.view(inverse.shape[1], inverse.shape[3])


def _write(target: Tensor | None, codes: Tensor) -> None:
    if target is not None:
        target.copy_(codes.reshape(target.shape))


def _write_padded(target: Tensor, values: Tensor) -> None:
    """Write to the first rows and columns. The kernels' padding is never read as a number, so it is nan here to expose
    a reader of it."""
    target.fill_(255 if target.dtype == torch.uint8 else torch.nan)
    target[: values.shape[0], : values.shape[1]] = values


# --- from FP8 ---------------------------------------------------------------------------------------------------------


def numbers(tensor: Any, is_rowwise: bool) -> Tensor:
    """What a GEMM reads: plain numbers unchanged; for FP8, the fp32 values (R, C) of the data for sums over columns, or
    over rows."""
    if not isinstance(tensor, QuantizedTensorStorage):
        return tensor
    if isinstance(tensor, Float8TensorStorage):
        if is_rowwise or is_non_tn_fp8_gemm_supported():
            return _rows(_fp8(tensor._data, tensor)) * tensor._scale_inv
        assert not tensor._transpose_invalid, "a stale transpose"
        return (_fp8(tensor._transpose, tensor).flatten(1) * tensor._scale_inv).t()
    data, scale_inv = (tensor._rowwise_data, tensor._rowwise_scale_inv)
    if not is_rowwise:
        data, scale_inv = (tensor._columnwise_data, tensor._columnwise_scale_inv)
    values = _fp8(data, tensor)
    if isinstance(tensor, MXFP8TensorStorage):
        values = _rows(values)
        inverse = torch.exp2(scale_inv.double() - 127).masked_fill(scale_inv == 255, torch.nan).float()
        return values * _spread(inverse, values.shape, (1, 32) if is_rowwise else (32, 1))
    is_ready = getattr(tensor, "_is_gemm_ready_format", lambda: True)()
    assert is_ready, "a product of data that is only laid out for gathering"
    values = _rows(values) if is_rowwise else values.flatten(1)  # (R, C), or (C, R)
    if tensor._is_2D_scaled:
        found = values * _spread(scale_inv, values.shape, (128, 128))
    else:
        found = values * _spread(scale_inv.t(), values.shape, (1, 128))
    return found if is_rowwise else found.t()


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """The values of the data for sums over columns."""
    return numbers(tensor, is_rowwise=True).to(TE_DType_To_Torch[dtype]).view(tensor.size())


def _fp8(data: Tensor | None, tensor: Any) -> Tensor:
    assert data is not None, f"a {type(tensor).__name__} has no data for this product"
    return fp8.to_fp32(data.view(TE_DType_To_Torch[tensor._fp8_dtype]))


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _spread(scales: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Expand block scales to one scale per element of a matrix of this shape."""
    return scales.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def fp8_transpose(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    """(..., C) -> (C, ...)."""
    transposed = data.movedim(-1, 0).contiguous()
    return transposed if out is None else out.copy_(transposed)


# --- weights that are FP8 parameters, each rank casting its share -----------------------------------------------------


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """The largest absolute value."""
    amax.copy_(tensor.abs().max().float().view(1))


def compute_scales(
    chunk: int, noop: Tensor, lists: Sequence[Sequence[Tensor]], largest: float, power_of_two: bool, epsilon: float
) -> None:
    """Scales and their inverses from amaxes."""
    assert epsilon == 0.0
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(fp8.scale_from_amax(amax, largest, power_of_two=power_of_two))
        inverse.copy_(scale.reciprocal())


def partial_block_amax(share: Tensor, amax: Tensor, height: int, width: int, start: int, block: int) -> None:
    """Amaxes of the blocks of a (height, width) weight, of which `share` holds the elements from `start` on."""
    rows, columns = -(-height // block), -(-width // block)
    whole = torch.zeros(rows * block, columns * block)
    flat = torch.zeros(height * width)
    flat[start : start + share.numel()] = share.detach().abs().flatten().float()
    whole[:height, :width] = flat.view(height, width)
    amax[:rows, :columns] = whole.view(rows, block, columns, block).amax((1, 3))


def partial_block_cast(
    share: Tensor, codes: Tensor, scale: Tensor, height: int, width: int, start: int, block: int, dtype: Any
) -> None:
    """Write the FP8 codes of these elements."""
    scales = _spread(scale, torch.Size((height, width)), (block, block)).flatten()[start : start + share.numel()]
    number = TE_DType_To_Torch[dtype]
    _, values, _ = fp8.quantize(share.detach().view(-1, 1, 1), _in_format("delayed", number), "x", False, scales)
    codes.copy_(values.view(torch.uint8).flatten())
