"""The list of runs on disk: right about each, whatever is in the folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hunyuan_pretrain.cli import reporting
from hunyuan_pretrain.cli.program import app
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.report.runs import runs_below
from hunyuan_pretrain.runtime.lock import RunLock
from tests.helpers.checkpoint_folders import write_checkpoint
from tests.helpers.written_run import write_run


def add_event(run_dir: Path, **event: Any) -> None:
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": "2026-01-02T00:00:00Z", "step": None, "text": "", **event}) + "\n")


def words_of(folder: Path) -> dict[str, str]:
    return {str(line.folder.relative_to(folder)): line.state.word for line in runs_below(folder)}


def test_the_state_of_a_run_is_that_of_its_lock_its_last_event_or_its_checkpoints(tmp_path: Path) -> None:
    for name in ("killed", "stopped", "failed", "running", "finished"):
        write_run(tmp_path / "deep" / name, 8, of=10 if name != "finished" else 8)
    add_event(tmp_path / "deep/stopped", kind="stopped", step=8, text="told to stop: saved after step 8")
    add_event(tmp_path / "deep/failed", kind="failed", text="TrainingError: step 9: loss nan")
    write_checkpoint(tmp_path / "deep/finished", 8)
    (tmp_path / "deep/finished/events.jsonl").unlink()
    lock = RunLock.take(tmp_path / "deep/running")
    try:
        found = {line.folder.name: line for line in runs_below(tmp_path)}
    finally:
        lock.release()
    assert {name: line.state.word for name, line in found.items()} == {
        "killed": "ended",
        "stopped": "stopped",
        "failed": "failed",
        "running": "running",
        "finished": "finished",
    }
    assert found["failed"].state.reason == "TrainingError: step 9: loss nan"
    assert f"process {os.getpid()} on " in found["running"].state.reason
    assert (found["finished"].checkpoint, found["killed"].checkpoint) == (8, None)
    killed = found["killed"]
    assert (killed.name, killed.stage, killed.step, killed.num_steps) == ("written", "decay", 8, 10)
    assert killed.loss is not None
    assert killed.tokens_per_s is not None


def test_foreign_and_half_written_folders_harm_nothing(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "good", 5)
    shutil.copytree(run_dir, run_dir / "abandoned/001")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/metrics.txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    shutil.copytree(run_dir, tmp_path / ".hidden/run")
    for name, file, content in (
        ("cut", "metrics.jsonl", b'{"step": 3, "loss": 2.0, "tokens_per_s": 7}\n{"step": 4, "lo'),
        ("binary", "metrics.jsonl", os.urandom(5000)),
        ("no history", "segments.json", b"{"),
        ("other yaml", "resolved.yaml", b"- 1\n"),
        ("strange", "metrics.jsonl", b'{"step": "x", "loss": "y"}\n[]\n'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(content)
    (tmp_path / "submitted/jobs/001").mkdir(parents=True)
    (tmp_path / "submitted/jobs/001/submitted.json").write_text('{"jobs": ["17", "18"]}')
    (tmp_path / "loop").symlink_to(tmp_path)
    found = {str(line.folder.relative_to(tmp_path)): line for line in runs_below(tmp_path)}
    assert sorted(found) == ["binary", "cut", "good", "no history", "other yaml", "strange", "submitted"]
    assert (found["cut"].step, found["cut"].loss, found["cut"].tokens_per_s) == (3, 2.0, 7.0)
    assert (found["submitted"].job, found["submitted"].state.word) == ("17 18", "not started")
    assert found["binary"].step == 0


def test_the_commands_print_one_message_for_a_mistake_and_json_when_asked(tmp_path: Path, monkeypatch) -> None:
    run_dir = write_run(tmp_path / "run", 5)
    runner = CliRunner()
    listed = json.loads(runner.invoke(app, ["runs", str(tmp_path), "--json"]).stdout)
    assert [(one["folder"], one["step"], one["state"], one["checkpoint"]) for one in listed] == [
        (str(run_dir), 5, "ended", None)
    ]
    assert "written  decay  5 of 5" in runner.invoke(app, ["runs", str(tmp_path)]).stdout
    assert runner.invoke(app, ["runs", str(tmp_path / "run/segments")]).stdout == f"{tmp_path}/run/segments: no runs\n"
    done = runner.invoke(app, ["report", str(run_dir)])
    assert done.stdout == f"{run_dir}/report.html: written\n"
    assert runner.invoke(app, ["report", str(run_dir)]).exit_code == 0, "a report may be replaced"
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "mine.html").write_text("mine")
    for arguments, message in (
        (["runs", str(tmp_path / "none")], "no such folder"),
        (["report", str(tmp_path)], "no run: it has neither resolved.yaml nor metrics.jsonl"),
        (["report", str(run_dir), "--out", str(tmp_path / "mine.html")], "exists and is no page of a report"),
        (["report", str(run_dir), "--out", str(tmp_path / "no/x.html")], "its folder does not exist"),
        (["report", str(run_dir), "--hardware", "H99"], "unknown hardware"),
    ):
        with pytest.raises(ConfigError, match=message):
            runner.invoke(app, arguments, catch_exceptions=False)
    (tmp_path / "mine.html").unlink()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(reporting.time, "sleep", wait)
    watched = runner.invoke(app, ["report", str(run_dir), "--watch", "7"])
    assert (waits, watched.exit_code) == ([7, 7, 7], 130)
    assert '<meta http-equiv="refresh" content="7">' in (run_dir / "report.html").read_text()
    assert sorted(tmp_path.rglob("*")) == before, "nothing is half-written"
    assert runner.invoke(app, ["report", str(run_dir), "--watch", "0"]).exit_code == 2
