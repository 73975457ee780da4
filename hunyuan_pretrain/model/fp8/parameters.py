"""Parameters that exist in FP8 only: Transformer Engine's quantised tensors, without a bf16 copy.

Their fp32 main weights belong to the optimizer. After every update megatron-core rounds those to bf16, quantises the
result, and all-gathers FP8 values over the data-parallel ranks. So the numbers are those of a bf16 weight that is
quantised in every step. Use these functions to read or write parameters of either kind.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor


def unquantised(parameter: Tensor) -> Tensor:
    """The values of a parameter in FP8, dequantised to bf16; any other parameter itself."""
    return parameter.detach().dequantize() if is_float8tensor(parameter) else parameter


@torch.no_grad()
def write(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter to values of its shape. A parameter in FP8 quantises them, and keeps the exact ones until the
    optimizer's first update."""
    if not is_float8tensor(parameter):
        parameter.copy_(values)
        return
    quantised: Any = parameter
    exact = values.to(parameter.dtype)
    amax = getattr(quantised._get_quantizer(), "amax", None)
    if amax is not None:  # of the old values
        amax.zero_()
    quantised.copy_(exact)
    # megatron-core reads the initial main weights under these names, and then clears them itself
    quantised.exact_values = exact.to("cpu", copy=True)  # the caller may reuse the memory of the values
    quantised.get_high_precision_init_val = MethodType(_exact_values, quantised)
    quantised.clear_high_precision_init_val = MethodType(_forget_exact_values, quantised)


def written_values(parameter: Tensor) -> Tensor:
    """The values last written to a parameter, in its shape; for one in FP8, before quantisation. Valid until the first
    update."""
    exact = getattr(parameter, "exact_values", None)
    return parameter if exact is None else exact


def _exact_values(parameter: Any) -> Tensor:
    return parameter.exact_values


def _forget_exact_values(parameter: Any) -> None:
    if hasattr(parameter, "exact_values"):
        del parameter.exact_values
