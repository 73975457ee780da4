"""Training as a user starts it: resume after kill -9 and SIGTERM, a full disk, metrics on disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from hunyuan_pretrain.runtime.logging import CLOCK_FIELDS
from tests.helpers.commands import run_data
from tests.helpers.runs import (
    ROOT,
    experiment_fields,
    kill_all,
    kill_when,
    metrics,
    run,
    run_forked,
    start,
    write_experiment,
)

pytestmark = pytest.mark.slow
EXPERT_PARALLEL = {"world_size": 2, "expert_model_parallel_size": 2}


def write(tmp_path: Path, corpus: Path, name: str, steps: int, **changes: Any) -> tuple[Path, Path]:
    """(experiment file, run directory)."""
    run_dir = tmp_path / name
    return write_experiment(tmp_path / f"{name}.yaml", experiment_fields(corpus, run_dir, steps, **changes)), run_dir


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights and both moments."""
    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    entries = {key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    found = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    load_tensors(found, storage_reader=reader, no_dist=True)
    return found


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the measured times."""
    return [{key: value for key, value in record.items() if key not in CLOCK_FIELDS} for record in metrics(run_dir)]


def complete(run_dir: Path) -> list[str]:
    return sorted(
        folder.parent.name
        for folder in (run_dir / "checkpoints").glob("step_*/complete.json")
        if folder.parent.suffix == ""
    )


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in metrics(run_dir)), default=0)


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool], timeout_s: float = 180) -> None:
    """Wait until `condition` holds; fails if the process ends before that."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of 20 uninterrupted steps on two ranks, saved only at the end."""
    config, run_dir = write(tmp_path_factory.mktemp("straight"), corpus, "run", 20, parallel=EXPERT_PARALLEL)
    code, out, err = run_forked("train", config, ranks=2)
    assert code == 0, out + err
    return run_dir


def assert_bitwise_identical(run_dir: Path, other: Path) -> None:
    assert numbers(run_dir) == numbers(other)
    mine, theirs = (tensors(folder / "checkpoints" / "step_0000020") for folder in (run_dir, other))
    assert mine.keys() == theirs.keys()
    assert (
        sum(key.startswith("optimizer.exp_avg_sq.") for key in mine)
        == sum(not key.startswith("optimizer.") for key in mine)
        > 30
    )
    for key, tensor in theirs.items():
        assert torch.equal(mine[key], tensor), key


def test_resume_is_bitwise_identical(straight, corpus, tmp_path):
    """20 steps = 10 steps + kill -9 some steps later + resume: losses of every step, weights, both moments."""
    config, run_dir = write(tmp_path, corpus, "run", 20, parallel=EXPERT_PARALLEL, checkpoint={"save_every_steps": 10})
    kill_when(start("train", config, ranks=2), lambda: last_step(run_dir) >= 13)
    assert complete(run_dir) == ["step_0000010"]
    code, out, err = run("train", config, ranks=2)
    assert code == 0, out + err
    assert "steps 11 to 20" in out
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 21)), "each step once"
    assert_bitwise_identical(run_dir, straight)


def test_a_run_killed_while_writing_a_checkpoint_resumes_from_the_older_one(straight, corpus, tmp_path):
    config, run_dir = write(tmp_path, corpus, "run", 20, parallel=EXPERT_PARALLEL, checkpoint={"save_every_steps": 5})

    def is_half_written() -> bool:
        return any(run_dir.glob("checkpoints/step_0000015.*.partial"))

    kill_when(start("train", config, ranks=2), is_half_written)
    assert is_half_written()
    assert complete(run_dir) == ["step_0000005", "step_0000010"]
    code, out, err = run_forked("train", config, ranks=2)
    assert code == 0, out + err
    assert "steps 11 to 20" in out
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        f"step_{step:07d}" for step in (5, 10, 15, 20)
    ]
    assert_bitwise_identical(run_dir, straight)


def test_metrics_and_log_of_a_run(straight):
    records = metrics(straight)
    assert [record["step"] for record in records] == list(range(1, 21))
    promised = (
        "loss balance_loss grad_norm learning_rate expert_learning_rate tokens_per_s model_flops_per_s expert_load"
    )
    promised += " cumulative_tokens time run_seconds process_seconds eta_seconds host_rss_bytes"
    shares = "overflow_share recycled_share dropped_share"
    assert all(record.keys() >= {*promised.split(), *shares.split()} for record in records)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5, "it learns"
    assert all(record["expert_learning_rate"] == pytest.approx(0.31 * record["learning_rate"]) for record in records)
    log = (straight / "log.txt").read_text()
    assert log.count("step 20/20 [decay]") == 1
    assert log.count("routed experts: ") == 1
    assert log.count(" as planned: parameters of this rank ") == 1
    assert "not as planned" not in log
    assert (straight / "resolved.yaml").exists()
    events = [json.loads(line) for line in (straight / "events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["step"]) for event in events] == [("started", 0), ("saved", 20), ("finished", 20)]
    assert events[0]["text"] == "2 ranks on CPU"


def test_a_finished_run_is_listed_and_reported(straight):
    code, out, err = run_forked("runs", straight, "--json")
    assert code == 0, err
    (listed,) = json.loads(out)
    assert (listed["state"], listed["step"], listed["num_steps"], listed["checkpoint"]) == ("finished", 20, 20, 20)
    code, out, err = run_forked("report", straight, "--out", straight.parent / "report.html")
    assert (code, err) == (0, "")
    text = (straight.parent / "report.html").read_text()
    assert all(f"<h2>{title}</h2>" in text for title in ("Loss", "Experts", "Tokens by source", "Events"))
    assert "are no records" not in text
    assert "cannot be read" not in text


def test_sigterm_saves_and_exits_75_and_the_same_command_finishes(corpus, tmp_path):
    config, run_dir = write(tmp_path, corpus, "run", 400)
    process = start("train", config)
    try:
        while last_step(run_dir) < 3:
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        kill_all(process)
    assert process.returncode == 75, err
    stopped = last_step(run_dir)
    assert 3 <= stopped < 400
    assert complete(run_dir) == [f"step_{stopped:07d}"]
    assert f"told to stop: saved after step {stopped}; the same command resumes from there" in out
    assert '"kind": "stopped"' in (run_dir / "events.jsonl").read_text().splitlines()[-1]
    process = start("train", config)
    kill_when(process, lambda: last_step(run_dir) > stopped)
    assert [record["step"] for record in metrics(run_dir)][: stopped + 1] == list(range(1, stopped + 2))


def test_a_run_with_relative_paths_is_found_from_another_folder(corpus, tmp_path, monkeypatch, capsys):
    """The resolved experiment has absolute paths: for the data that step 1 read, and for the validation of the next
    start."""
    run_dir = tmp_path / "run"
    fields = experiment_fields(
        Path(os.path.relpath(corpus, ROOT)), Path(os.path.relpath(run_dir, ROOT)), 2, model__num_layers=2
    )
    code, out, err = run_forked("train", write_experiment(tmp_path / "run.yaml", fields))
    assert code == 0, out + err
    monkeypatch.chdir(tmp_path)
    assert run_data("where", run_dir, "--step", 1, "--place", 0, "--json") == 0
    assert str(corpus / "tokenized") in capsys.readouterr().out
    assert run_data("verify", run_dir) == 0


@contextmanager
def disk_of(folder: Path, kib: int) -> Iterator[Path]:
    """A separate file system; skips if mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path, straight: Path) -> Iterator[Path]:
    """Room for one and a half checkpoints of the run `straight`."""
    checkpoint, rest = (
        sum(file.stat().st_size for file in (straight / name).rglob("*")) for name in ("checkpoints", "tokenizer")
    )
    with disk_of(tmp_path / "disk", (3 * checkpoint // 2 + rest) // 1024 + 128) as disk:
        yield disk


def fill(disk: Path) -> Path:
    """Fill the disk with one file."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        for block in (1 << 16, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(block))
    return path


def test_a_temporarily_full_disk_costs_a_run_nothing(corpus, tmp_path):
    """Only checkpoints need disk space: metrics and log lines wait in memory, and are written when there is space
    again."""
    steps, waits = 100, "metrics.jsonl: No space left on device; its lines wait in memory until it can be written"
    with disk_of(tmp_path / "disk", 8 * 1024) as disk:
        fields = experiment_fields(corpus, disk / "run", steps, model__num_layers=2, runtime__probes=False)
        process = start("train", write_experiment(tmp_path / "run.yaml", fields))
        assert process.stdout is not None
        try:
            wait_until(process, lambda: last_step(disk / "run") >= 2)
            filler = fill(disk)
            lines = []
            while not lines or (lines[-1] and waits not in lines[-1]):
                lines.append(process.stdout.readline())
            written = last_step(disk / "run")
            filler.unlink()
            out = "".join(lines) + process.stdout.read()
            code = process.wait(timeout=60)
        finally:
            kill_all(process)
        assert (code, out.count(waits)) == (0, 1), out
        assert written < steps, "the disk was full while it trained"
        assert out.count("metrics.jsonl: can be written again; nothing was lost") == 1
        assert [record["step"] for record in metrics(disk / "run")] == list(range(1, steps + 1))
        log = (disk / "run/log.txt").read_text()
        assert all(log.count(f" step {step}/{steps} ") == 1 for step in range(1, steps + 1))


def test_a_full_disk_is_survived_mid_run_and_refused_at_the_end(corpus, tmp_path, small_disk):
    """The disk has room for the first checkpoint only; with more room, the same command resumes from it."""
    fields = experiment_fields(
        corpus, small_disk / "run", 6, parallel=EXPERT_PARALLEL, checkpoint={"save_every_steps": 2}
    )
    config, run_dir = write_experiment(tmp_path / "run.yaml", fields), small_disk / "run"
    code, out, err = run("train", config, ranks=2)
    assert code != 0
    words = "the checkpoint could not be written: No space left on device; older checkpoints are untouched"
    assert out.count(f"WARNING: {run_dir}/checkpoints/step_0000004: {words}") == 1, out + err
    assert err.count(f"{run_dir}/checkpoints/step_0000006: {words}") == 1, err
    assert "hunyuan_pretrain/checkpoint" not in err, "no traceback of ours"
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_0000002"]
    assert last_step(run_dir) == 6, "the run went on"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, out, err = run_forked("train", config, ranks=2)
    assert code == 0, err
    assert "steps 3 to 6" in out
    assert complete(run_dir) == ["step_0000002", "step_0000004", "step_0000006"]
    shutil.rmtree(run_dir)
