"""Reading a run that goes on, and reducing it without losing what matters."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.report.records import HEAT_COLUMNS, MOST_NAMES, RunFiles
from hunyuan_pretrain.report.series import MOST, Series
from tests.helpers.written_run import write_run


def test_a_long_series_keeps_its_peaks_means_and_counts_in_bounded_memory() -> None:
    series, steps, peak = Series(), 100_000, 54_321
    for first in range(1, steps + 1, 1000):
        part = range(first, first + 1000)
        series.add(part, [50.0 if step == peak else step / steps for step in part])
    series.add([77, 78], [math.nan, math.inf])
    stretches = list(series)
    assert MOST / 2 <= len(stretches) <= MOST
    assert series.num_missing == 2
    assert series.num_values == steps
    assert series.mean == pytest.approx((sum(range(1, steps + 1)) / steps - peak / steps + 50.0) / steps)
    (of_peak,) = [one for one in stretches if one.high == 50.0]
    assert of_peak.first <= peak <= of_peak.last
    assert [(one.first, one.last) for one in stretches] == [
        (first, min(first + 255, steps)) for first in range(1, steps + 1, 256)
    ]
    others = [one for one in stretches if one is not of_peak]
    assert all((one.low, one.high) == (one.first / steps, one.last / steps) for one in others)
    assert all(one.mean == pytest.approx((one.low + one.high) / 2) for one in others)


def test_a_short_series_keeps_every_value() -> None:
    series = Series()
    for step in (4, 2, 512):
        series.add([step], [float(step)])
    assert [tuple(one) for one in series] == [(step, step, step, step, step) for step in (2, 4, 512)]
    assert series.last == 512.0


def test_a_run_that_goes_on_is_read_from_where_the_reading_stopped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20, of=40)
    files, path = RunFiles(run), run / "metrics.jsonl"
    files.read()
    assert (files.metrics.last_step, files.metrics.num_records, files.problems) == (20, 30, [])
    line = json.dumps({"step": 21, "stage": "decay", "loss": 1.5}).encode()
    with path.open("ab") as file:
        file.write(line[:10])
    files.read()
    assert files.metrics.last_step == 20, "half of a line is not read"
    with path.open("ab") as file:
        file.write(line[10:] + b"\n")
    files.read()
    assert (files.metrics.last_step, files.metrics.last["loss"], files.metrics.num_bad) == (21, 1.5, 0)
    assert files.metrics.series["loss"].num_values == 21
    kept = path.read_bytes().splitlines(keepends=True)[:5]
    (run / "other").write_bytes(b"".join(kept))
    os.replace(run / "other", path)  # as a resume does, after which steps are trained again
    files.read()
    assert (files.metrics.last_step, files.metrics.series["loss"].num_values) == (4, 4)


def test_lines_that_are_no_records_are_counted_and_change_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5)
    bad = [b"", b"{", b"[1]", b'"x"', b'{"loss": 1}', b'{"step": "2"}', b'{"step": true}', b'{"step": 0}', b"\xff\xfe"]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(
            b"\n".join([*bad, b'{"step": 6, "loss": null, "stage": 7, "expert_load": [[1, "x"]], "y": {"z": 1}}', b""])
        )
    (run / "events.jsonl").write_bytes(b'{"kind": 3}\n{broken\n[]\n{"kind": "saved", "step": "x", "time": null}\n')
    (run / "segments.json").write_text('{"segments": [{}]}')
    files = RunFiles(run)
    files.read()
    assert files.metrics.num_bad == len(bad)
    assert (files.metrics.last_step, files.metrics.series["loss"].num_missing) == (6, 1)
    assert [(event.kind, event.step) for event in files.events] == [("3", None), ("saved", None)]
    assert len(files.problems) == 2
    assert f"{len(bad)} lines are no records" in files.problems[0]
    assert "its history cannot be read" in files.problems[1]
    assert files.name == "run"


def test_values_by_layer_are_kept_of_some_records_and_cost_nothing_in_the_others(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 300, layers=3, experts=5)
    files = RunFiles(run)
    files.read()
    samples = files.metrics.samples
    assert HEAT_COLUMNS <= len(samples) <= 2 * HEAT_COLUMNS
    assert samples[0].step == 1
    assert samples[-1].step > 290
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {record["step"]: record for record in written if "loss" in record}
    assert all(sample.lists["expert_load"] == by_step[sample.step]["expert_load"] for sample in samples)
    assert "expert_load" not in files.metrics.series
    assert {name: series.num_values for name, series in files.metrics.series.items()}["balance_loss"] == 300
    last = by_step[300]
    assert files.metrics.last == {name: value for name, value in last.items() if name not in samples[0].lists}


def test_a_run_with_endless_names_stays_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2)
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(3, 1000):
            file.write(json.dumps({"step": step, f"name {step}": 1.0}) + "\n")
    files = RunFiles(run)
    files.read()
    assert len(files.metrics.series) == MOST_NAMES


def test_decisions_are_among_the_events_in_order_of_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5)
    decision = {"time": "2026-01-01T01:10:00Z", "kind": "rollback", "cause": "spike", "step": 4, "to_step": 2}
    decision |= {"values": {"loss": "nan"}, "thresholds": {"loss": 5.5}, "data": [["decay", 8, 16]]}
    (run / "decisions.jsonl").write_text(json.dumps(decision) + "\n")
    files = RunFiles(run)
    files.read()
    assert [event.kind for event in files.events] == ["started", "saved", "rollback", "alarm", "stopped", "started"]
    text = 'spike; values loss nan; thresholds loss 5.5; back to step 2; data [["decay", 8, 16]]'
    assert files.events[2].text == text


@pytest.mark.parametrize(("name", "words"), [("none", "no such folder"), ("empty", "no run: it has neither")])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=words):
        RunFiles(tmp_path / name)
