"""Alarms: what lasts is reported once, and once more when it ends."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.rules import check
from hunyuan_pretrain.config.schema import AlarmsConfig
from hunyuan_pretrain.train.alarms import Alarms
from tests.helpers.planned import hunyuan_large

EVEN = [[0.25] * 4, [0.25] * 4]


class Events:
    """A log that keeps events."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, int | None, str]] = []

    def event(self, kind: str, text: str, step: int | None = None) -> None:
        self.kept.append((kind, step, text))


def record(step: int, **changes: Any) -> dict[str, Any]:
    fields = {"loss": 2.0, "seconds": 1.0, "data_wait_seconds": 0.0, "dead_experts": 0, "max_expert_load": 1.0}
    fields |= {"max_launch_seconds": 0.3, "max_launch_rank": 0, "median_launch_seconds": 0.2}
    return {"step": step, **fields, "expert_load": EVEN, **changes}


def events_of(records: list[dict[str, Any]], **settings: Any) -> list[tuple[str, int | None, str]]:
    log = Events()
    alarms = Alarms(AlarmsConfig(after_steps=10, **settings), 4, log)
    for one in records:
        alarms.after(one)
    return log.kept


def lasting(bad: dict[str, Any], steps: int = 40) -> list[dict[str, Any]]:
    """Good, but bad from step 5 on and in a few steps before, and good again from step 30 on."""
    return [record(step, **(bad if step in (2, 3) or 5 <= step < 30 else {})) for step in range(1, steps)]


@pytest.mark.parametrize(
    ("bad", "settings", "text", "end"),
    [
        (
            {"dead_experts": 2, "expert_load": [[0.5, 0.5, 0.0, 0.0], [0.25] * 4]},
            {},
            "2 dead experts (layer 0: 2, 3), since step 5",
            "no expert is dead any more",
        ),
        (
            {"max_expert_load": 3.5},
            {"expert_load_above": 3.0},
            "the busiest expert is chosen 3.5 times as often as an even share (limit 3), since step 5",
            "no expert is above 3 times an even share any more",
        ),
        (
            {"data_wait_seconds": 0.3},
            {},
            "rank 0 waited 0.3 s for the batch of a step of 1 s (limit 10%), since step 5",
            "batches are there in time again",
        ),
        (
            {"max_data_wait_seconds": 0.4, "max_data_wait_rank": 7},
            {},
            "rank 7 waited 0.4 s for the batch of a step of 1 s (limit 10%), since step 5",
            "batches are there in time again",
        ),
        (
            {"max_launch_seconds": 0.9, "max_launch_rank": 3, "median_launch_seconds": 0.3},
            {},
            "rank 3 is slow: its host takes 0.9 s to launch a step, the median 0.3 s, since step 5",
            "no rank is slower than the others any more",
        ),
    ],
)
def test_what_lasts_is_reported_once_and_once_more_when_it_ends(bad, settings, text, end) -> None:
    assert events_of(lasting(bad), **settings) == [("alarm", 15, text), ("alarm over", 30, end)]
    assert events_of(lasting(bad)[:13], **settings) == [], "it has not lasted long enough"


def test_each_alarm_can_be_switched_off_and_small_delays_are_none() -> None:
    bad = {"dead_experts": 2, "max_expert_load": 9.0, "data_wait_seconds": 0.9}
    off = {"dead_experts": False, "data_wait_share_above": None, "slow_rank_above": None, "loss_jump_above": None}
    late = {"max_launch_seconds": 0.9, "max_launch_rank": 3, "median_launch_seconds": 0.3}
    assert events_of(lasting(bad | late), **off) == []
    assert events_of(lasting({**late, "max_launch_seconds": 0.05, "median_launch_seconds": 0.01})) == []


def test_after_a_roll_back_alarms_are_heard_again() -> None:
    log = Events()
    alarms = Alarms(AlarmsConfig(after_steps=10), 4, log)
    for step in range(1990, 2000):
        alarms.after(record(step, dead_experts=1))
    alarms.go_back(1000)
    for step in range(1001, 1020):
        alarms.after(record(step, dead_experts=1))
    assert [(kind, step) for kind, step, _ in log.kept] == [("alarm", 1010)]


def test_a_jump_of_the_loss_is_reported_at_once_and_not_again_soon() -> None:
    draw = random.Random(0)
    losses = [5.0 - step / 50 + draw.gauss(0, 0.02) for step in range(100)]
    losses[20] = 9.0  # too early to know
    for at in (80, 82, 86, 95):
        losses[at] += 3.0
    found = events_of([record(step, loss=loss) for step, loss in enumerate(losses, start=1)])
    assert [(kind, step) for kind, step, _ in found] == [("alarm", 81), ("alarm", 96)]
    assert "times the usual distance above its mean" in found[0][2]
    assert events_of([record(step, loss=5.0 - step / 50) for step in range(1, 100)]) == []
    assert events_of([record(step, loss=float("nan")) for step in range(1, 100)]) == []


@pytest.mark.parametrize(
    ("logging", "message"),
    [
        (
            {"webhook_url_env": "https://host/secret"},
            "logging.webhook_url_env: is not the name of an environment variable",
        ),
        ({"alarms": {"expert_load_above": 0.5}}, "expert_load_above=0.5: some expert always has an even share (from 1"),
        ({"alarms": {"expert_load_above": 16}}, "no load is above 16 experts / top-k (from 1 to below 16, or null)"),
        ({"alarms": {"data_wait_share_above": 1}}, "data_wait_share_above=1: a share of the time of a step (below 1"),
        ({"alarms": {"slow_rank_above": 1}}, "slow_rank_above=1: times the median of all ranks, which half of them"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(logging: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(hunyuan_large(logging=logging))
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
