"""A second, independent implementation of FP8 quantisation, from the definition of the formats: integers, float64 and a
table of all codes.

It shares nothing with hunyuan_pretrain.model.fp8. Products and quotients of fp32 numbers are computed in float64 and
rounded once to fp32: a product is exact there, and a quotient has enough digits that the second rounding does not
matter.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import numpy as np


class Fp8(NamedTuple):
    """A format: exponent and mantissa bits, bias, and the finite values of the codes 0 to 127."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    values: np.ndarray

    @property
    def largest(self) -> float:
        return float(self.values[-1])


def _format(exponent_bits: int, mantissa_bits: int, bias: int, num_finite: int) -> Fp8:
    values = []
    for code in range(num_finite):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        if exponent == 0:
            values.append(math.ldexp(mantissa, 1 - bias - mantissa_bits))
        else:
            values.append(math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits))
    return Fp8(exponent_bits, mantissa_bits, bias, np.array(values))


E4M3 = _format(4, 3, 7, 127)  # code 127 is nan
E5M2 = _format(5, 2, 15, 124)  # code 124 is infinity, 125 to 127 are nan


def round_to_fp8(value: float, fp8: Fp8) -> float:
    """Nearest value of the format, ties to the even code; values beyond the largest saturate; nan stays nan."""
    if math.isnan(value):
        return value
    size = abs(value)
    if size >= fp8.largest:
        code = len(fp8.values) - 1
    else:
        low = int(np.searchsorted(fp8.values, size, side="right")) - 1
        below, above = size - fp8.values[low], fp8.values[low + 1] - size  # exact: fp32 numbers of like size in float64
        code = low if below < above or (below == above and low % 2 == 0) else low + 1
    return math.copysign(float(fp8.values[code]), value)


def _fp32(value: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(value))


def tensor_scale(amax: float, fp8: Fp8, margin: int = 0) -> float:
    """Scale of a whole tensor."""
    if amax == 0 or not math.isfinite(amax):
        return 1.0
    scale = _fp32(fp8.largest * 2.0**-margin / amax)
    return float(np.finfo(np.float32).max) if math.isinf(scale) else scale


def block_scale(amax: float, fp8: Fp8, largest: float) -> float:
    """Scale of a block: the power of two at or below fp8.largest / amax."""
    if amax == 0 or not math.isfinite(amax):
        return 1.0
    scale = _fp32(fp8.largest / amax)
    scale = largest if math.isinf(scale) else scale
    return math.ldexp(1.0, math.frexp(scale)[1] - 1)


def mx_exponent(amax: float, fp8: Fp8) -> int:
    """Biased exponent (E8M0) of the inverse scale of an MXFP8 block; -1 for nan."""
    if math.isnan(amax):
        return -1
    quotient = _fp32(amax * _fp32(1.0 / fp8.largest))
    if math.isinf(quotient):
        return 254
    if quotient == 0:
        return 0
    mantissa, exponent = math.frexp(quotient)  # quotient = mantissa * 2^exponent, mantissa in [0.5, 1)
    power = exponent - 1 if mantissa == 0.5 else exponent
    return min(max(power, -127) + 127, 254)


def quantize(x: np.ndarray, recipe: str, fp8: Fp8, block: tuple[int, int], largest: float) -> np.ndarray:
    """The fp32 values that the FP8 form of a matrix represents; `largest`: the largest number of its dtype."""
    out = np.empty(x.shape, dtype=np.float32)
    rows, columns = block
    for top, left in product(range(0, x.shape[0], rows), range(0, x.shape[1], columns)):
        part = x[top : top + rows, left : left + columns].astype(np.float64)
        amax = math.nan if np.isnan(part).any() else float(np.abs(part).max())
        if recipe == "mxfp8":
            exponent = mx_exponent(amax, fp8)
            scale, inverse = (
                (math.ldexp(1.0, 127 - exponent), math.ldexp(1.0, exponent - 127)) if exponent > 0 else (1.0, 2.0**-127)
            )
            inverse = math.nan if exponent < 0 else inverse
            scale = math.ldexp(1.0, -127) if exponent == 254 else scale
        else:
            scale = tensor_scale(amax, fp8) if recipe == "tensorwise" else block_scale(amax, fp8, largest)
            inverse = _fp32(1.0 / scale)
        for row, column in product(range(part.shape[0]), range(part.shape[1])):
            rounded = round_to_fp8(_fp32(part[row, column] * scale), fp8)
            out[top + row, left + column] = _fp32(rounded * inverse)
    return out
