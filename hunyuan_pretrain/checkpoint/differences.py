"""How far two models may differ that should compute the same: measures of logits, and tolerances with their reasons.

A position's difference is rms(difference) / rms(reference), both over the vocabulary after subtracting their means.

Shapes: T positions, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError

__all__ = ["TOLERANCES", "compare_logits", "judge_layers", "judge_logits"]

# `median` bounds the median over positions; `position` bounds each one, and `outliers` is the share of positions that
# may exceed it. Measured on random models of up to 24 layers: 1e-6 (fp32), 0.01 (fp16) and 0.07 (bf16) for correct
# exports; 0.4 and more if every layer is wrong in the same way.
# `layer_median` bounds, for each layer on the same input, the median over positions of norm(difference) / norm(what the
# layer adds). Measured on the same models: at most 6e-7 (fp32), 5e-4 (fp16) and 4e-3 (bf16); at least 0.2 with two
# experts of the layer exchanged, 0.03 with ones in the place of its key norm.
FLIPS = "a router choice may flip where two experts are close"
HALF = f"{FLIPS}; errors add up over the layers, each of which is checked alone more strictly"
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {
        "median": 1e-4,
        "position": 1e-3,
        "outliers": 0.02,
        "layer_median": 1e-4,
        "reason": f"only the order of summation differs; {FLIPS}",
    },
    torch.float16: {
        "median": 0.03,
        "position": 0.2,
        "outliers": 0.25,
        "layer_median": 0.003,
        "reason": f"11 significant bits; {HALF}",
    },
    torch.bfloat16: {
        "median": 0.15,
        "position": 0.4,
        "outliers": 0.25,
        "layer_median": 0.02,
        "reason": f"8 significant bits; {HALF}",
    },
}

AT_ONCE = 32
"""Positions whose logits are compared at a time: in fp64, V of them take megabytes each."""


def compare_logits(expected_TV: Tensor, actual_TV: Tensor, vocab_size: int) -> dict[str, Any]:
    """Figures over all positions, and `per_position`, (T,). Raises CheckpointError if the shapes differ."""
    if expected_TV.shape != actual_TV.shape or expected_TV.shape[-1] != vocab_size:
        raise CheckpointError(
            f"logits of the model have shape {tuple(expected_TV.shape)}, those of the export {tuple(actual_TV.shape)}"
        )
    largest, kl, same, per_position = [], [], [], []
    for expected, actual in zip(expected_TV.split(AT_ONCE), actual_TV.split(AT_ONCE), strict=True):
        expected, actual = expected.detach().cpu().double(), actual.detach().cpu().double()
        expected_log, actual_log = expected.log_softmax(-1), actual.log_softmax(-1)
        centred = expected - expected.mean(-1, keepdim=True)
        difference = (actual - actual.mean(-1, keepdim=True)) - centred
        largest.append((actual - expected).abs().amax(-1))
        kl.append((expected_log.exp() * (expected_log - actual_log)).sum(-1))
        same.append((expected.argmax(-1) == actual.argmax(-1)).double())
        per_position.append(difference.norm(dim=-1) / centred.norm(dim=-1).clamp_min(1e-30))
    return {
        "positions": len(expected_TV),
        "max_abs_difference": torch.cat(largest).max().item(),
        "mean_kl_nats": torch.cat(kl).mean().item(),
        "same_likeliest_token": torch.cat(same).mean().item(),
        "per_position": torch.cat(per_position),
    }


def judge_logits(checks: dict[str, dict[str, Any]], tolerance: dict[str, Any], what: str) -> dict[str, float]:
    """Median relative difference and share of outliers over all positions of all checks, out of which `per_position` is
    taken. Raises CheckpointError, beginning with `what`, if they exceed the tolerance."""
    difference = torch.cat([check.pop("per_position") for check in checks.values()])
    median, outliers = difference.median().item(), (difference > tolerance["position"]).double().mean().item()
    # `not <=` instead of `>`, because NaN must fail.
    if not (median <= tolerance["median"] and outliers <= tolerance["outliers"] and bool(difference.isfinite().all())):
        raise CheckpointError(
            f"{what}: relative difference of the logits {median:.2e} at the median "
            f"position (at most {tolerance['median']:.0e}), {outliers:.0%} of positions above "
            f"{tolerance['position']:.0e} (at most "
            f"{tolerance['outliers']:.0%}), {int((~difference.isfinite()).sum())} positions not finite"
        )
    return {"median_relative_difference": median, "positions_above_tolerance": outliers}


def judge_layers(layers: Sequence[dict[str, Any]], tolerance: dict[str, Any], what: str) -> dict[str, float]:
    """The largest of the layers' median differences (`layerwise.compare_layers`). Raises CheckpointError, beginning
    with `what`, that names the first layer which exceeds the tolerance."""
    for layer in layers:
        if not (layer["median"] <= tolerance["layer_median"] and layer["above"] <= tolerance["outliers"]):  # NaN fails
            raise CheckpointError(
                f"{what}: layer {layer['layer']}, given the same input, adds something else: relative difference "
                f"{layer['median']:.2e} at the median position (at most {tolerance['layer_median']:.0e}), "
                f"{layer['above']:.0%} of positions above {tolerance['position']:.0e} (at most "
                f"{tolerance['outliers']:.0%})"
            )
    return {"median_relative_difference": max(layer["median"] for layer in layers)}
