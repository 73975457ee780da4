"""Parameters that exist in FP8 only: Transformer Engine's quantised tensors, without a copy in bf16.

Their fp32 main weights are the optimizer's. After every update megatron-core rounds those to bf16, quantises that, and
gathers FP8 values over the data-parallel ranks; so the numbers are those of a weight in bf16 that is quantised in every
step. Whoever reads or writes parameters of either kind does so by these functions.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor


def unquantised(parameter: Tensor) -> Tensor:
    """The values that a parameter in FP8 stands for, in bf16; any other parameter itself."""
    return parameter.detach().dequantize() if is_float8tensor(parameter) else parameter


@torch.no_grad()
def write(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter new values, of its shape; one in FP8 quantises them, and remembers them until the optimizer's
    first update."""
    if not is_float8tensor(parameter):
        parameter.copy_(values)
        return
    quantised: Any = parameter
    exact = values.to(parameter.dtype)
    amax = getattr(quantised._get_quantizer(), "amax", None)
    if amax is not None:  # of the values that are no more
        amax.zero_()
    quantised.copy_(exact)
    # the names under which megatron-core looks for what main weights start from; it forgets them itself
    quantised.exact_values = exact.to("cpu", copy=True)  # whoever gave the values may use their memory again
    quantised.get_high_precision_init_val = MethodType(_exact_values, quantised)
    quantised.clear_high_precision_init_val = MethodType(_forget_exact_values, quantised)


def written_values(parameter: Tensor) -> Tensor:
    """What was last written to a parameter, in its shape; of one in FP8 before it was quantised. Until the first update
    only."""
    exact = getattr(parameter, "exact_values", None)
    return parameter if exact is None else exact


def _exact_values(parameter: Any) -> Tensor:
    return parameter.exact_values


def _forget_exact_values(parameter: Any) -> None:
    if hasattr(parameter, "exact_values"):
        del parameter.exact_values
