"""fp32 main weights stored as the bf16 weights that the model uses anyway, and 16 more bits each.

As integers, bits of the main weight = 65536 * bits of the weight + remainder, where the remainder is a signed int16.
The weight is therefore the main weight rounded to nearest; the two differ from torch's rounding only where a main
weight is exactly halfway between two bf16 numbers: then it is rounded away from zero, not to an even number. The format
is that of Transformer Engine's FusedAdam with store_param_remainders (its kernel AdamFunctorMasterParamRemainder).
"""

from __future__ import annotations

import torch
from torch import Tensor

REMAINDER = "master_param"
"""Key of the remainder in the optimizer's state."""


def join(weight: Tensor, remainder: Tensor | None, main: Tensor) -> None:
    """Write the main weights into `main` (fp32). weight: bf16; remainder: int16, None for zeros; all of one shape."""
    bits = main.view(torch.int32)
    bits.copy_(weight.view(torch.int16)).bitwise_left_shift_(16)
    if remainder is not None:
        bits.add_(remainder)


def remainder_of(main: Tensor) -> Tensor:
    """The remainders (int16) of main weights (fp32)."""
    return main.view(torch.int32).to(torch.int16)


def round_into(weight: Tensor, main: Tensor) -> None:
    """Write the weights (bf16) that go with `remainder_of(main)`. Uses `main` as scratch memory."""
    bits = main.view(torch.int32)
    weight.view(torch.int16).copy_(bits.add_(1 << 15).bitwise_right_shift_(16))
