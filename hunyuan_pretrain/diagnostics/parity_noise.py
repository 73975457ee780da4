"""Two layouts compared in bf16 or FP8, where a sum in another order is another number: is a difference larger than such
noise?

In fp32 a difference is a handful of roundings and has one bound (parity.TOLERANCE). Below, each product is rounded to 8
bits, and a bound that holds for every model would hide faults. So the noise is measured: the reference runs again with
other legal roundings (diagnostics.rounding), once for each of NOISE_SEEDS, and what a quantity moves by is what
rounding does to it here.

A token whose two likeliest experts are nearly equal may go to the other one, and everything that it touches is then
another number. So in all runs tokens go where they went in the reference; what they would have chosen is compared by
itself (`choice`), and what becomes of the choices, capacity and recycling, is bitwise equal (`routing`).

A layout passes where it differs from the reference by at most MARGIN times that. The noise has 0.7 units in the last
place at every product. A layout has one rounding for each of its ranks, of a part sqrt(ranks) times smaller, 0.29 units
in all, and one for each of the log2(ranks) sums of a reduction in bf16: up to 8 ranks 0.58 units. Another engine rounds
inside a layer too, where this one does not (probabilities of the attention, the norm before a product): some 0.29 units
each, a handful in a layer. MARGIN, 4, is 2.8 units, some 90 roundings; a fault that drops or doubles a gradient is many
times that. One that scales a tensor by a per cent or two is not, but roundings do not scale: of n of them a part of
1/sqrt(n) has the tensor's own direction. So that part of activations and gradients has no margin: it may be as large as
the noise, where that is SMALL. Squares of larger ones, as FP8 makes them, have a direction too.

Quantities of one kind in one step share their noise, the largest of all layers and seeds: changed choices are few, and
fall in one layer or another. Differences here are lengths: |actual - reference| / |reference| over all elements, or the
part that scales, where that is further from its tolerance; of choices, the share.
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
"""Noise, relative, up to which it is a sum of many roundings that do not scale a tensor."""
UNIT = 2.0**-7
"""One unit in the last place of bf16: of two main weights that differ in a bit, the rounded ones may be neighbours. The
main weights themselves are compared among the moments."""
FLIPS = 3
"""Choices of experts by which two counts of rare flips may differ beside the margin: with few tokens the noise may have
had none."""


def compare_rounded(
    actual: list[StepTrace], reference: list[StepTrace], noisy: list[list[StepTrace]]
) -> list[Difference]:
    """`parity.compare` by length, each difference with MARGIN times the noise of its like as its tolerance.

    Copies and routing are bitwise equal; `actual` and `noisy` took the reference's choices.
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
    """Step, kind, and the name without its layer; all scalars are like each other."""
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
    """Of the length the part in the direction of the reference: by how much `actual` is larger or smaller in all."""
    length = _length(kind, actual, reference)
    if kind in ("choice", "routing") or not 0 < length < float("inf"):
        return length
    mine, theirs = (np.asarray(x, np.float64).ravel() for x in (actual, reference))
    return abs(float((mine - theirs) @ theirs) / float(theirs @ theirs))
