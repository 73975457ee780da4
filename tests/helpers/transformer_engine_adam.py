"""CPU stand-ins for Transformer Engine's Adam kernels (transformer_engine/common/multi_tensor/adam.cu, 2.11 to 2.20).

They store what the kernels store: fp32 numbers are computed from fp32, bf16 or int16 numbers and rounded once, to
nearest. Factors are fp32, as in the kernels' arguments. A GPU may contract a product and a sum into one operation, so
the last bit of a result can differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

launches: list[tuple[str, list[list[Tensor]]]] = []
"""(kernel, its lists of tensors) of every launch since the list was last cleared."""


def adam(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], *numbers: Any) -> None:
    """AdamW update from lists of gradients, weights, first and second moments."""
    launches.append(("multi_tensor_adam", [list(tensors) for tensors in lists]))
    for grad, weight, first, second in zip(*lists, strict=True):
        main = weight.numpy() if weight.dtype == torch.float32 else weight.float().numpy()
        weight.copy_(torch.from_numpy(_update(grad, main, first, second, *numbers)))


def adam_with_remainder(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], *numbers: Any) -> None:
    """The same for bf16 weights whose lower halves are a fifth list, of int16: a negative one means that the weight was
    rounded up."""
    launches.append(("multi_tensor_adam_param_remainder", [list(tensors) for tensors in lists]))
    for grad, weight, first, second, remainder in zip(*lists, strict=True):
        upper, lower = weight.view(torch.int16).numpy(), remainder.numpy()
        halves = np.stack([lower, np.where(lower < 0, upper - np.int16(1), upper)], axis=-1).astype("<i2")
        main = _update(grad, np.ascontiguousarray(halves).view("<f4")[..., 0], first, second, *numbers)
        halves = np.ascontiguousarray(main[..., None]).view("<i2")
        lower[...] = halves[..., 0]
        upper[...] = np.where(lower < 0, halves[..., 1] + np.int16(1), halves[..., 1])


def _update(
    grad: Tensor,
    main: np.ndarray,
    first: Tensor,
    second: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> np.ndarray:
    """The new main weights; stores the moments."""
    assert (mode, bias_correction) == (1, 1)
    one, b1, b2 = np.float32(1), np.float32(beta1), np.float32(beta2)
    g = grad.float().numpy()
    m = b1 * first.float().numpy() + (one - b1) * g
    v = b2 * second.float().numpy() + (one - b2) * g * g
    unbiased_m, unbiased_v = m / np.float32(1 - float(b1) ** step), v / np.float32(1 - float(b2) ** step)
    update = unbiased_m / (np.sqrt(unbiased_v) + np.float32(eps)) + np.float32(weight_decay) * main
    first.copy_(torch.from_numpy(m))
    second.copy_(torch.from_numpy(v))
    return main - np.float32(lr) * update
