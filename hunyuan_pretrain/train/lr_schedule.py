"""The phases of a run as functions of the step: which stage, and what learning rate. Pure functions, no state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hunyuan_pretrain.config.schema import StageConfig


def stage_of_step(stages: Sequence[StageConfig], step: int) -> tuple[int, int]:
    """(stage, step within the stage) of global step `step`, both from 0. Raises IndexError past the end."""
    for index, stage in enumerate(stages):
        if step < stage.num_steps:
            return index, step
        step -= stage.num_steps
    raise IndexError(f"the stages end {step} steps before the step asked for")


def lr_fraction(stages: Sequence[StageConfig], step: int) -> float:
    """Learning rate of step `step` as a fraction of optimizer.lr; the last step of a stage has exactly its lr_end."""
    index, local = stage_of_step(stages, step)
    stage = stages[index]
    start, end = (stages[index - 1].lr_end if index else 0.0), stage.lr_end
    progress = (local + 1) / stage.num_steps
    match stage.lr_shape:
        case "constant":
            return end
        case "linear":
            return start + (end - start) * progress
        case "cosine":
            return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
