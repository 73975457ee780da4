"""The learning rate over the stages."""

from __future__ import annotations

import itertools
import math

import pytest

from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import StageConfig


def stage(name: str, steps: int, lr_end: float, shape: str) -> StageConfig:
    sizes = {"tokens": steps * 64 - 1, "sequence_length": 16, "global_batch_sequences": 4}
    return StageConfig(name=name, lr_end=lr_end, lr_shape=shape, data=({"path": "x"},), **sizes)


STAGES = (stage("warmup", 10, 1.0, "linear"), stage("decay", 50, 0.3, "cosine"), stage("anneal", 5, 0.1, "linear"))
SCHEDULE = Schedule.of(STAGES)


def test_warmup_rises_from_zero_in_equal_steps():
    assert [SCHEDULE.lr_fraction(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_the_last_step_of_each_stage_has_exactly_its_lr_end():
    assert [SCHEDULE.lr_fraction(step) for step in (9, 59, 64)] == [1.0, 0.3, 0.1]


def test_cosine_falls_slowly_at_both_ends_and_passes_the_middle():
    values = [SCHEDULE.lr_fraction(step) for step in range(9, 60)]
    falls = [a - b for a, b in itertools.pairwise(values)]
    assert all(fall > 0 for fall in falls)
    assert values[25] == pytest.approx(0.65)
    assert falls[25] == pytest.approx(max(falls), rel=0.01)
    assert falls[0] == pytest.approx(0.35 * (1 - math.cos(math.pi / 50)))
    assert falls[0] == pytest.approx(falls[-1])


def test_stages_join_without_a_jump():
    """No step changes the rate by more than the steepest stage does on its own."""
    values = [SCHEDULE.lr_fraction(step) for step in range(65)]
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) <= 0.1 + 1e-12


def test_a_constant_rate_is_its_lr_end_from_the_first_step():
    stages = (stage("a", 4, 0.5, "constant"), stage("b", 4, 0.25, "constant"))
    assert [Schedule.of(stages).lr_fraction(step) for step in range(8)] == [0.5] * 4 + [0.25] * 4


def test_stage_of_step():
    assert [SCHEDULE.stage_of_step(step) for step in (0, 9, 10, 59, 60, 64)] == [
        (0, 0),
        (0, 9),
        (1, 0),
        (1, 49),
        (2, 0),
        (2, 4),
    ]
    with pytest.raises(IndexError):
        SCHEDULE.stage_of_step(65)
