"""Compares two layouts in bf16 or FP8, where summation order changes the numbers: is a difference larger than rounding
noise?

In fp32 a difference is a handful of roundings, and one bound fits all (parity.TOLERANCE). In lower precision each
matmul output is rounded to 8 bits, and a bound that holds for every model would hide faults. So the noise is measured:
the reference runs again with other legal roundings (diagnostics.rounding), once for each of NOISE_SEEDS. How far a
quantity moves is the effect of rounding on it.

A token whose two likeliest experts are nearly tied may go to the other one, and everything computed from it changes. So
all runs route tokens as the reference did. The experts that they would have chosen are compared separately (`choice`),
and the result of capacity and recycling must be bitwise identical (`routing`).

A layout passes if it differs from the reference by at most MARGIN times the noise. The noise is 0.7 units in the last
place at every matmul. A layout adds one rounding per rank, of partial sums sqrt(ranks) times smaller, 0.29 units in
all, and one for each of the log2(ranks) sums of a reduction in bf16: 0.58 units for up to 8 ranks. Another engine also
rounds inside a layer where this one does not (attention probabilities, the norm before a matmul): some 0.29 units each,
a handful per layer. MARGIN, 4, is 2.8 units, some 90 roundings; a fault that drops or doubles a gradient is many times
that. A fault that scales a tensor by one or two per cent is not, but roundings do not scale: of n of them, a share of
1/sqrt(n) lies along the tensor. So this component of activations and gradients gets no margin: it may be as large as
the noise, if that is below SMALL. Squares of larger errors, as in FP8, lie along the tensor too.

Quantities of one kind in one step share one noise value, the largest over all layers and seeds: changed choices are
rare and may fall in any layer. Differences are |actual - reference| / |reference| over all elements, or the scaling
component if that is further from its tolerance; for choices, the share that differs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np

from hunyuan_pretrain.diagnostics.parity import TOLERANCE, Difference, StepTrace, compare

NOISE_SEEDS = (1, 2, 3)
MARGIN = 4.0
SMALL = 2.0**-5
"""Relative noise below which it is a sum of many roundings that do not scale a tensor."""
UNIT = 2.0**-7
"""One unit in the last place of bf16: main weights that differ in one bit may round to neighbouring values. The main
weights themselves are compared among the moments."""
FLIPS = 3
"""Expert choices allowed to differ on top of the margin: with few tokens the noise runs may have flipped none."""


def compare_rounded(
    actual: list[StepTrace], reference: list[StepTrace], noisy: list[list[StepTrace]]
) -> list[Difference]:
    """`parity.compare` by length, with MARGIN times the measured noise as the tolerance of each difference.

    Copies and routing must be bitwise identical. `actual` and `noisy` must be routed by the reference's choices.
    """
    noise: dict[tuple[int, str, str], float] = defaultdict(float)
    for trace in noisy:
        for difference in compare(trace, reference, _length):
            noise[_like(difference)] = max(noise[_like(difference)], difference.relative)
    found = []
    for difference, scaling in zip(*(compare(actual, reference, by) for by in (_length, _scaling)), strict=True):
        if difference.kind not in ("copies", "routing"):
            like, floor = noise[_like(difference)], UNIT if difference.kind == "parameter" else TOLERANCE
            tolerance = max(MARGIN * like, floor)
            if difference.kind == "choice":
                tolerance += FLIPS / reference[difference.step].choices[difference.name].size
            difference = replace(difference, tolerance=0.0 if difference.name == "target_tokens" else tolerance)
            if difference.kind in ("activation", "gradient") and like < SMALL:  # moments and weights follow these
                scaling = replace(scaling, tolerance=max(like, floor))
                difference = max(difference, scaling, key=lambda one: one.relative / one.tolerance)
        found.append(difference)
    return found


def _like(difference: Difference) -> tuple[int, str, str]:
    """Key of quantities that share their noise: step, kind, and name without the layer; all scalars share one name."""
    name = "" if difference.kind == "scalar" else re.sub(r"layers\.\d+", "layers", difference.name)
    return difference.step, difference.kind, name


def _length(kind: str, actual: Any, reference: Any) -> float:
    if actual is None or np.shape(actual) != np.shape(reference):
        return float("inf")
    if kind in ("choice", "routing"):
        return float((np.asarray(actual) != reference).mean())
    mine, theirs = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    difference, length = float(np.linalg.norm(mine - theirs)), float(np.linalg.norm(theirs))
    if not np.isfinite(difference):
        return float("inf")
    return difference / length if length else (float("inf") if difference else 0.0)


def _scaling(kind: str, actual: Any, reference: Any) -> float:
    """The component of the difference along the reference: by how much `actual` is scaled up or down overall."""
    length = _length(kind, actual, reference)
    if kind in ("choice", "routing") or not 0 < length < float("inf"):
        return length
    mine, theirs = (np.asarray(x, np.float64).ravel() for x in (actual, reference))
    return abs(float((mine - theirs) @ theirs) / float(theirs @ theirs))
