"""The run directory: log.txt, metrics.jsonl, the optional sinks, and the effect of a resume on them."""

from __future__ import annotations

import builtins
import json
import math
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.schema import LoggingConfig
from hunyuan_pretrain.runtime.logging import RunLog, record_environment

QUIET = LoggingConfig(tensorboard=False, wandb="disabled")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    log = RunLog(tmp_path, QUIET, "name", is_writer=True)
    log.open_sinks({})
    return log


def test_metrics_are_one_object_per_line_and_on_disk_at_once(log, tmp_path):
    log.metrics({"step": 1, "loss": 2.5, "expert_load": [[0.5, 0.5]], "stage": "warmup"})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5, "expert_load": [[0.5, 0.5]], "stage": "warmup"}
    ]
    log.metrics({"step": 2, "loss": 2.0})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_values_that_json_cannot_hold_become_null_in_lists_too(log, tmp_path):
    log.metrics({"step": 1, "loss": math.nan, "grad_norm": math.inf, "load": [[0.5, math.nan], [-math.inf]]})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "load": [[0.5, None], [None]],
    }


def test_truncate_after_drops_later_steps_and_a_partial_line(log, tmp_path):
    for step in (1, 2, 3):
        log.metrics({"step": step})
    log.metrics({"step": 2, "validation_loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    again = RunLog(tmp_path, QUIET, "name", is_writer=True)
    again.truncate_after(2)
    again.open_sinks({})
    again.metrics({"step": 3})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1},
        {"step": 2},
        {"step": 2, "validation_loss": 1.0},
        {"step": 3},
    ]


ENDS = {
    "no line end": '{"step": 2}',
    "no records": '{"step": 2}\n12\nnull',
    "a hole": '{"step": 2}\n\0\0\0',
    "half a record": '{"step": 2}\n{"step": 1',
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_the_next_line_is_not_glued_to_a_partial_one(tmp_path, end):
    """A kill or a machine crash can leave this at the end of metrics.jsonl."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + end)
    log = RunLog(tmp_path, QUIET, "name", is_writer=True)
    log.truncate_after(2)
    log.open_sinks({})
    log.metrics({"step": 3})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_full_disk_at_the_start_keeps_what_an_earlier_start_recorded(tmp_path):
    record_environment(tmp_path, "name: x\n", {"torch": "1"})
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with no_room_beyond(5), pytest.raises(OSError, match="File too large"):
        record_environment(tmp_path, "name: another\n", {"torch": "1"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_fresh_run_has_nothing_to_truncate(log, tmp_path):
    RunLog(tmp_path / "other", QUIET, "name", is_writer=True).truncate_after(0)
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def test_lines_go_to_console_and_log_txt_unchanged(tmp_path, capsys):
    """Brackets are not markup, and long lines are not wrapped."""
    log = RunLog(tmp_path, QUIET, "name", is_writer=True)
    text = "step 1/2 [decay] " + "x" * 300
    log.line(text)
    assert capsys.readouterr().out == text + "\n"
    assert (tmp_path / "log.txt").read_text().endswith(f" {text}\n")


def test_without_a_terminal_the_caller_prints_plain_lines(log, capsys):
    log.start_progress(10, 0)
    assert log.progress(1, "loss 2.5") is False
    assert capsys.readouterr().out == ""


def test_only_the_writer_writes(tmp_path, capsys):
    log = RunLog(tmp_path / "run", LoggingConfig(), "name", is_writer=False)
    log.open_sinks({})
    log.line("hello")
    log.metrics({"step": 1})
    log.truncate_after(0)
    log.start_progress(1, 0)
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_tensorboard_gets_every_scalar(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, LoggingConfig(tensorboard=True, wandb="disabled"), "name", is_writer=True)
    log.open_sinks({})
    log.metrics({"step": 3, "loss": 2.5, "stage": "warmup", "expert_load": [[1.0]]})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]


def test_wandb_offline_writes_a_run_and_sends_nothing(tmp_path, capfd):
    pytest.importorskip("wandb")
    log = RunLog(tmp_path, LoggingConfig(tensorboard=False, wandb="offline"), "name", is_writer=True)
    log.open_sinks({"optimizer": {"lr": 1.0}})
    log.metrics({"step": 1, "loss": 2.5})
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("package", "words"), [("wandb", "no Weights & Biases run"), ("tensorboard", "no TensorBoard events")]
)
def test_a_missing_package_is_one_line_and_not_an_error(tmp_path, monkeypatch, capsys, package, words):
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == package or name.startswith((package + ".", f"torch.utils.{package}")):
            raise ImportError(name)
        return real(name, *rest)

    log = RunLog(
        tmp_path,
        LoggingConfig(tensorboard=package == "tensorboard", wandb="offline" if package == "wandb" else "disabled"),
        "n",
        True,
    )
    monkeypatch.setattr(builtins, "__import__", without)
    log.open_sinks({})
    monkeypatch.undo()
    log.metrics({"step": 1, "loss": 2.5})
    log.close()
    assert capsys.readouterr().out == f"{package} is not installed: {words}\n"
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


def test_the_environment_is_recorded(tmp_path):
    record_environment(tmp_path / "run", "name: x\n", {"torch": "1"})
    assert (tmp_path / "run" / "resolved.yaml").read_text() == "name: x\n"
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found["torch"] == "1"
    assert found.keys() >= {"command", "commit", "python"}


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """Prevent files of this process from growing beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_neither_ends_a_run_nor_loses_a_line(log, tmp_path, capsys):
    """Lines wait in memory; no line is written partially; one warning when the disk fills up, one line when there is
    room again."""
    log.metrics({"step": 1, "loss": 2.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with no_room_beyond(size + 5):
        for step in (2, 3, 4):
            log.metrics({"step": step, "loss": 2.5})
        log.line("step 4")
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
    warnings = capsys.readouterr().out.splitlines()
    assert [line for line in warnings if "metrics.jsonl" in line] == [
        f"WARNING: {tmp_path}/metrics.jsonl: File too large; its lines wait in memory until it can be written"
    ]
    assert f"WARNING: {tmp_path}/log.txt: File too large; its lines wait in memory until it can be written" in warnings
    log.metrics({"step": 5})
    assert f"{tmp_path}/metrics.jsonl: can be written again; nothing was lost" in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines() if line.endswith(" step 4")] == [
        "step 4"
    ]


def test_a_full_disk_at_the_end_reports_how_much_is_lost(log, tmp_path, capsys):
    with no_room_beyond(0):
        log.metrics({"step": 1})
        log.metrics({"step": 2})
        log.close()
    assert f"WARNING: {tmp_path}/metrics.jsonl: 2 lines could not be written and are lost" in capsys.readouterr().out


def test_dropping_later_steps_on_a_full_disk_loses_nothing(log, tmp_path):
    log.metrics({"step": 1})
    log.metrics({"step": 2})
    with no_room_beyond(0), pytest.raises(OSError, match="File too large"):
        log.truncate_after(1)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_closed_console_does_not_end_a_run(tmp_path):
    program = (
        "import sys; from pathlib import Path; from hunyuan_pretrain.config.schema import LoggingConfig\n"
        "from hunyuan_pretrain.runtime.logging import RunLog\n"
        "log = RunLog(Path(sys.argv[1]), LoggingConfig(tensorboard=False, wandb='disabled'), 'n', True)\n"
        "for step in range(20000): log.line(f'step {step}')\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "step 0\n"
    run.stdout.close()
    assert (run.wait(timeout=60), run.stderr.read()) == (0, "")
    assert (tmp_path / "log.txt").read_text().endswith(" step 19999\n")


def test_a_machine_without_git_records_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    record_environment(tmp_path / "run", "name: x\n", {})
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["commit"] is None
