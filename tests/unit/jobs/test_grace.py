"""A job that is told to stop has the time to save."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.jobs.grace import limit_s, needed_s, settle
from hunyuan_pretrain.jobs.request import Request


def request(place: str = "slurm", *options: str, time: str = "", is_doctor: bool = False) -> Request:
    return Request(Path("x.yaml"), (), place, 1, 8, options=options, time=time, is_doctor=is_doctor)


def test_a_long_save_gets_twice_its_time_and_a_short_one_what_every_job_gets() -> None:
    assert (needed_s(200.0), needed_s(601.0)) == (420, 1260)
    for place, shortest in (("slurm", 300), ("kubernetes", 600)):
        assert settle(request(place), None) == (shortest, None)
        assert settle(request(place), 100.0) == (shortest, None)
        assert settle(request(place), 601.0) == (
            1260,
            f"note: the job gets 1260 s to stop, instead of {shortest} s: by the plan, stopping and saving take up to "
            "601 s",
        )
        assert settle(request(place, is_doctor=True), 601.0) == (shortest, None)
    for place in ("local", "ssh"):
        assert settle(request(place), 601.0) == (0, None)


@pytest.mark.parametrize(
    ("signal", "seconds", "enough"),
    [("TERM", 60, "TERM@420"), ("TERM@419", 419, "TERM@420"), ("B:USR1@90", 90, "B:USR1@420"), ("TERM@420", 420, None)],
)
def test_a_signal_that_comes_too_late_is_a_warning_with_one_in_time(
    signal: str, seconds: int, enough: str | None
) -> None:
    granted, told = settle(request("slurm", "exclusive", f"signal={signal}"), 200.0)
    assert granted == seconds
    if enough is None:
        assert told is None
    else:
        assert told == (
            f"warning: --option signal={signal}: by the plan, stopping and saving take up to 200 s, so the job may be "
            f"killed before it has saved (--option signal={enough})"
        )
    assert settle(request("slurm", f"signal={signal}"), None) == (seconds, None), "nothing to compare it with"


def test_a_time_limit_within_the_grace_period_is_refused() -> None:
    message = (
        '--time="5": the ranks are told to stop 300 s before the limit, so they would stop at once (more than 300 s)'
    )
    with pytest.raises(ConfigError) as refused:
        settle(request(time="5"), None)
    assert message in str(refused.value)
    assert settle(request(time="5:01"), None) == (300, None)
    assert settle(request(time="5", is_doctor=True), None) == (300, None)
    assert settle(request("slurm", "signal=TERM@60", time="5"), None) == (60, None)
    with pytest.raises(ConfigError, match="told to stop 1260 s before"):
        settle(request(time="00:21:00"), 601.0)
    with pytest.raises(ConfigError, match='--time="2": '):
        settle(request("slurm", "time=2", time="24:00:00"), None)


def test_time_limits_are_read_as_slurm_reads_them() -> None:
    texts = ["90", "1:30", "24:00:00", "2-12", "2-12:30", "2-12:30:15", "0", "UNLIMITED", ""]
    hours = 2 * 86400 + 12 * 3600
    assert [limit_s(text) for text in texts] == [
        5400,
        90,
        86400,
        hours,
        hours + 1800,
        hours + 1815,
        None,
        None,
        None,
    ]
