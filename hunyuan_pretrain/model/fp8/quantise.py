"""Numbers to FP8 and back: the arithmetic of the recipes, as in the kernels of Transformer Engine 2.11 and the
references in its tests.

  scale        fp8_max / amax in fp32; 1 where amax is 0, infinite or nan; blockwise rounds it down to a power of two
  rounding     nearest even of float(x) * scale, saturating at fp8_max (448, and 57344 in E5M2); nan stays nan
  delayed      the scale of a tensor comes from its largest values in earlier steps
  tensorwise   from the tensor (of one expert) itself
  blockwise    x and dY in 1 x 128, along the summed dimension of each matmul; w in 128 x 128
  mxfp8        1 x 32 along the summed dimension, the inverse scale a power of two (E8M0), amax / fp8_max rounded up

Shapes: b independent matrices (experts; 1 for a linear layer), R rows, C columns, e experts of this rank, H steps of
history.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.config.recipe import NumberFormat, Operand, Recipe

DTYPES: dict[NumberFormat, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def dtype_of(recipe: Recipe, operand: Operand) -> torch.dtype:
    """The torch dtype of an operand's FP8 values."""
    return DTYPES[recipe.number_format(operand)]


class Scales(NamedTuple):
    """fp32 factors to apply before rounding, and their inverses to apply after it."""

    scale: Tensor
    inverse: Tensor


def scale_from_amax(
    amax: Tensor, fp8_max: float, largest: float = torch.finfo(torch.float32).max, power_of_two: bool = False
) -> Tensor:
    """fp32 scale, in the shape of amax; `largest` replaces a scale that overflows."""
    # a Python number over a tensor would be computed as a multiplication by its reciprocal
    scale = torch.full((), fp8_max, device=amax.device) / amax
    scale = torch.where(scale.isinf(), largest, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)


def e8m0_scales(amax: Tensor, fp8_max: float) -> Scales:
    """Scales of MXFP8: the inverse is the power of two at or above amax / fp8_max, 2^-127 to 2^127, which is a biased
    exponent of 8 bits."""
    bits = (amax * torch.full((), 1.0 / fp8_max, dtype=torch.float32, device=amax.device)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & ((1 << 23) - 1)
    # a subnormal quotient up to 2^-127 is rounded up to that, not to 2^-126
    rounds_up = (mantissa > 0) & ~((exponent == 0) & (mantissa <= 1 << 22))
    exponent = (exponent + rounds_up).clamp(max=254).double()  # infinity: 254
    scale = torch.where(exponent == 0, 1.0, torch.exp2(127 - exponent)).float()
    inverse = torch.where(amax.isnan(), torch.nan, torch.exp2(exponent - 127)).float()
    return Scales(scale, inverse)


def quantize(
    x_bRC: Tensor, recipe: Recipe, operand: Operand, along_rows: bool, scale_b: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x_bRC as FP8: (scaled values, FP8 values, inverse scales), all in blocks (b, R / r, r, C / c, c), the last ones
    padded with zeros.

    `scale_b`: scales from earlier steps, for the delayed recipe.
    """
    b, R, C = x_bRC.shape
    rows, columns = recipe.block_shape(operand, along_rows) or (max(R, 1), max(C, 1))
    x = x_bRC.float()
    if R % rows or C % columns:
        x = torch.nn.functional.pad(x, (0, -C % columns, 0, -R % rows))
    x = x.view(b, -(-R // rows), rows, -(-C // columns), columns)
    dtype = dtype_of(recipe, operand)
    fp8_max = torch.finfo(dtype).max
    if scale_b is not None:
        scale = scale_b.view(b, 1, 1, 1, 1)
        scales = Scales(scale, scale.reciprocal())
    else:
        amax = x.abs().amax((2, 4), keepdim=True) if x.numel() else x.new_zeros(b, 1, 1, 1, 1)
        largest = min(torch.finfo(x_bRC.dtype).max, torch.finfo(torch.float32).max)
        scales = scales_of(amax, recipe, fp8_max, largest)
    scaled = x * scales.scale
    return scaled, scaled.clamp(-fp8_max, fp8_max).to(dtype), scales.inverse


def to_fp32(values: Tensor) -> Tensor:
    """FP8 values as fp32; torch's own conversion of E4M3 takes three times as long on a CPU."""
    if values.dtype != torch.float8_e4m3fn:
        return values.float()
    codes = values.view(torch.int8)
    # the exponent's four bits go where fp32 has its lowest four, the mantissa's after them; the conversion extends the
    # sign
    bits = codes.to(torch.int32).bitwise_left_shift_(20).bitwise_and_(-0x80000000 | 0x07F00000)
    result = bits.view(torch.float32).mul_(2.0 ** (127 - 7))
    return result.masked_fill_(codes.bitwise_and(127) == 127, torch.nan)


def scales_of(amax: Tensor, recipe: Recipe, fp8_max: float, largest: float) -> Scales:
    """Scales, in the form of the recipe, for blocks with largest values `amax`, of any shape; `largest` replaces a
    power of two that overflows."""
    if recipe.scale_form == "e8m0":
        return e8m0_scales(amax, fp8_max)
    scale = (
        scale_from_amax(amax, fp8_max, largest, power_of_two=True)
        if recipe.scale_form == "fp32 power of two"
        else scale_from_amax(amax, fp8_max)
    )
    return Scales(scale, scale.reciprocal())


class DelayedScale(torch.nn.Module):
    """The scale of one operand for each expert, and the history of largest values that it comes from."""

    history_He: Tensor
    scale_e: Tensor

    def __init__(self, recipe: Recipe, operand: Operand, num_experts: int, device: torch.device | str) -> None:
        super().__init__()
        self.recipe, self.fp8_max = recipe, torch.finfo(dtype_of(recipe, operand)).max
        self.register_buffer(
            "history_He", torch.zeros(recipe.history_steps, num_experts, device=device), persistent=False
        )
        self.register_buffer("scale_e", torch.ones(num_experts, device=device), persistent=False)

    def observe(self, x_bRC: Tensor, experts: slice) -> None:
        """Record the largest of these values for the current step."""
        if x_bRC.shape[1]:
            current = self.history_He[0, experts]
            torch.maximum(current, x_bRC.abs().amax((1, 2)).float(), out=current)

    def update(self) -> None:
        """Compute the scale of the next step, and shift the history by one. A step without values (an expert without
        tokens) changes nothing."""
        last_e = self.history_He[0].clone()
        is_seen_e = last_e != 0
        moved_He = self.history_He.roll(-1, 0)
        amax_e = moved_He.nan_to_num(nan=0.0, posinf=torch.inf).amax(0) if self.recipe.takes_max else last_e
        is_usable_e = is_seen_e & amax_e.isfinite() & (amax_e > 0)
        scale_e = scale_from_amax(amax_e, self.fp8_max * 2.0**-self.recipe.margin)
        self.scale_e.copy_(torch.where(is_usable_e, scale_e, self.scale_e))
        moved_He[0] = 0
        self.history_He.copy_(torch.where(is_seen_e, moved_He, self.history_He))
