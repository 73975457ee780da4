"""Stage and learning rate of the steps of a run that never changes; `config.schedule` has the rules, and those of runs
that do."""

from __future__ import annotations

from collections.abc import Sequence

from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import StageConfig


def stage_of_step(stages: Sequence[StageConfig], step: int) -> tuple[int, int]:
    """(stage, step within the stage) of global step `step`, both from 0. Raises IndexError past the end."""
    piece = Schedule.of(stages).piece_of_step(step)
    return piece.index, step - piece.first_step


def lr_fraction(stages: Sequence[StageConfig], step: int) -> float:
    """Learning rate of step `step` as a fraction of optimizer.lr; the last step of a stage has exactly its lr_end."""
    return Schedule.of(stages).lr_fraction(step)
