"""Position in tokens: steps, data positions and learning rate of runs that resume with another configuration."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import StageConfig

LENGTH = 8


def stage(name: str = "s", sequences: int = 160, batch: int = 8, **fields: Any) -> StageConfig:
    given_fields = {
        "name": name,
        "tokens": sequences * LENGTH,
        "sequence_length": LENGTH,
        "global_batch_sequences": batch,
    }
    return StageConfig.model_validate({**given_fields, "lr_end": 0.1, "data": [{"path": "a"}], **fields})


def positions(schedule: Schedule, lane: int) -> list[int]:
    """The sequences of a stage's data that the steps take, in order."""
    return [
        int(piece.position_of(number))
        for piece in schedule.pieces
        if piece.lane == lane
        for number in range(piece.num_steps * piece.stage.global_batch_sequences)
    ]


def formula(stages: list[StageConfig], step: int) -> float:
    """The learning rate by step of a run that never changes."""
    start = 0.0
    for one in stages:
        if step < one.num_steps:
            progress = (step + 1) / one.num_steps
            if one.lr_shape == "constant":
                return one.lr_end
            if one.lr_shape == "linear":
                return start + (one.lr_end - start) * progress
            return one.lr_end + (start - one.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))
        step, start = step - one.num_steps, one.lr_end
    raise AssertionError


some_stages = st.lists(
    st.tuples(
        st.integers(1, 60),
        st.integers(1, 9),
        st.sampled_from(["linear", "cosine", "constant"]),
        st.sampled_from([1.0, 0.3, 0.1]),
    ),
    min_size=1,
    max_size=3,
).map(lambda found: [stage(f"s{i}", n, b, lr_shape=shape, lr_end=end) for i, (n, b, shape, end) in enumerate(found)])


@given(stages=some_stages, stops=st.lists(st.integers(1, 100), max_size=3))
@settings(max_examples=60, deadline=None)
def test_an_unchanged_run_keeps_its_rates_and_positions_however_often_it_stops(
    stages: list[StageConfig], stops: list[int]
) -> None:
    whole = Schedule.of(stages)
    steps = sorted({stop for stop in stops if stop <= whole.num_steps})
    stopped = Schedule.of_segments([(0, stages), *((step, stages) for step in steps)])
    assert stopped.num_steps == whole.num_steps == sum(one.num_steps for one in stages)
    for step in range(whole.num_steps):
        assert stopped.lr_fraction(step) == whole.lr_fraction(step) == formula(stages, step), "bitwise"
        assert stopped.stage(step) == whole.stage(step)
        assert stopped.position(step + 1) == whole.position(step + 1)
    for lane in range(len(stages)):
        assert (
            positions(stopped, lane)
            == positions(whole, lane)
            == list(range(stages[lane].num_steps * stages[lane].global_batch_sequences))
        )


@given(
    sequences=st.integers(20, 200),
    batches=st.lists(st.integers(1, 24), min_size=2, max_size=5),
    shares=st.lists(st.floats(0.05, 0.95), min_size=4, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_any_sequence_of_batch_sizes_takes_each_position_of_a_stage_once(
    sequences: int, batches: list[int], shares: list[float]
) -> None:
    segments = [(0, [stage("a", sequences, batches[0]), stage("b", 50, 5)])]
    for batch, share in zip(batches[1:], shares, strict=False):
        before = Schedule.of_segments(segments)
        first = segments[-1][0]
        of_stage = [piece for piece in before.pieces if piece.lane == 0 and piece.end_step > first]
        step = first + max(int((of_stage[-1].end_step - first) * share), 1) if of_stage else first
        if step in (first, before.num_steps):
            continue
        segments.append((step, [stage("a", sequences, batch), stage("b", 50, 5)]))
    schedule = Schedule.of_segments(segments)
    taken = positions(schedule, 0)
    assert taken == list(range(len(taken)))
    assert sequences <= len(taken) < sequences + max(batches), "nothing is left out, and no more than a batch is added"
    assert positions(schedule, 1) == list(range(50))
    assert schedule.tokens_after(schedule.num_steps) == (len(taken) + 50) * LENGTH
    assert [piece.first_step for piece in schedule.pieces[1:]] == [piece.end_step for piece in schedule.pieces[:-1]]


@pytest.mark.parametrize(("batch", "steps"), [(16, 15), (4, 30), (24, 14)])
def test_a_new_batch_size_continues_at_the_current_token(batch: int, steps: int) -> None:
    """Stopped at step 10 of 20 with 8 sequences per step: 80 of 160 sequences remain."""
    schedule = Schedule.of_segments([(0, [stage()]), (10, [stage(batch=batch)])])
    assert schedule.num_steps == steps
    assert positions(schedule, 0)[:160] == list(range(160))
    by_token = {schedule.tokens_after(step + 1): schedule.lr_fraction(step) for step in range(steps)}
    whole = Schedule.of([stage()])
    for step in range(20):
        tokens = whole.tokens_after(step + 1)
        if tokens in by_token and batch != 24:  # 14 steps of this size end 32 sequences later
            assert by_token[tokens] == pytest.approx(whole.lr_fraction(step), rel=1e-12), (
                "the rate is a function of tokens"
            )
    assert schedule.lr_fraction(steps - 1) == 0.1


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("sequences", [320, 120])
def test_a_new_length_continues_from_the_current_rate(shape: str, sequences: int) -> None:
    stages, others = [stage(lr_shape=shape, lr_end=1.0)], [stage(lr_shape=shape, sequences=sequences, lr_end=1.0)]
    before, after = Schedule.of(stages), Schedule.of_segments([(0, stages), (10, others)])
    assert after.num_steps == sequences // 8
    rates = [after.lr_fraction(step) for step in range(after.num_steps)]
    assert rates[:10] == [before.lr_fraction(step) for step in range(10)]
    largest = max(abs(b - a) for a, b in pairwise(rates))
    assert largest < 2.5 / len(rates[10:]), "no jump"
    assert rates == sorted(rates)
    assert rates[-1] == 1.0


def test_an_extended_run_continues_at_its_last_rate() -> None:
    stages = [stage("warmup", 8, lr_end=1.0), stage("decay", 152)]
    longer = [stages[0], stage("decay", 304)]
    schedule = Schedule.of_segments([(0, stages), (20, longer)])
    assert schedule.num_steps == 39
    assert [schedule.lr_fraction(step) for step in range(19, 39)] == pytest.approx([0.1] * 20)


def test_a_stage_added_to_a_finished_run_starts_where_it_ended() -> None:
    schedule = Schedule.of_segments(
        [(0, [stage("a", 16)]), (2, [stage("a", 16), stage("b", 32, lr_end=1.0, lr_shape="linear")])]
    )
    assert [schedule.lr_fraction(step) for step in range(2, 6)] == pytest.approx([0.325, 0.55, 0.775, 1.0])
    assert positions(schedule, 1) == list(range(32))


def test_a_stage_cannot_end_before_its_last_trained_token() -> None:
    with pytest.raises(
        ConfigError, match=r"stages\.1\.tokens=320: 640 tokens of stage s are trained after step 11, .*use at least 640"
    ):
        Schedule.of_segments([(0, [stage("w", 8), stage()]), (11, [stage("w", 8), stage(sequences=40)])])
    assert Schedule.of_segments([(0, [stage(sequences=157)]), (20, [stage(sequences=157, batch=3)])]).num_steps == 20, (
        "160 were trained"
    )


def test_the_current_stage_is_found_by_name_or_else_by_number() -> None:
    stages = [stage("a", 16), stage("b", 32)]
    assert Schedule.of_segments([(0, stages), (3, [stage("b", 32)])]).num_steps == 6, (
        "a stage that is over may be left out"
    )
    assert Schedule.of_segments([(0, stages), (3, [stages[0], stage("c", 32)])]).num_steps == 6
    with pytest.raises(ConfigError, match="taken in stage b, number 1, and the configuration has no such stage"):
        Schedule.of_segments([(0, stages), (3, [stage("a", 16)])])


def test_skipped_data_stays_skipped_after_a_change_of_batch_size() -> None:
    skipping = stage(sequences=32, batch=4, skip_data_steps=[[6, 7]])
    schedule = Schedule.of_segments([(0, [stage(sequences=32)]), (1, [skipping])])
    assert positions(schedule, 0) == [*range(20), *range(28, 40)], "steps 6 and 7 of 4 sequences are 20 to 27"
    assert schedule.pieces[-1].end_position == 40
