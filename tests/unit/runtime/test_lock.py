"""The lock of a run directory: one process at a time, whatever happened to the others."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.runtime import lock
from hunyuan_pretrain.runtime.lock import ASIDE, LOCK, RunLock

HOLD = """
import sys, time
from pathlib import Path
from hunyuan_pretrain.runtime.lock import RunLock
RunLock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def holder(run_dir: Path) -> subprocess.Popen[str]:
    """Start another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def change(run_dir: Path, **fields: Any) -> None:
    path = run_dir / LOCK
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "other"} | fields))


def test_a_lock_is_held_until_it_is_another_process_s_or_released(tmp_path: Path) -> None:
    held = RunLock.take(tmp_path / "run")
    assert held.is_held()
    held.path.unlink()
    assert held.is_held(), "somebody has removed the file, and nobody has taken the run over"
    assert held.path.exists()
    change(tmp_path / "run")
    assert not held.is_held()
    held.path.unlink()
    held.release()
    assert not held.is_held()
    assert not held.path.exists()


def test_a_second_process_is_told_who_holds_the_run_and_what_to_do(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    try:
        with pytest.raises(ConfigError) as refused:
            RunLock.take(tmp_path / "run")
    finally:
        process.kill()
        process.wait()
    text = str(refused.value)
    assert f"run_dir: process {process.pid} on " in text
    assert "since 20" in text
    assert f"choose another run_dir; if there is no such process, remove {tmp_path}/run/{LOCK}" in text


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists()
    started = time.monotonic()
    taken = RunLock.take(tmp_path)
    assert time.monotonic() - started < 1
    assert taken.notes[0].startswith(f"the lock of process {process.pid} on ")
    assert taken.notes[0].endswith(", was left over (the process is gone): taken over")
    taken.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "why"), [("process_start", "the process is gone"), ("boot", "this machine has rebooted since")]
)
def test_a_process_with_a_reused_pid_is_not_the_holder(tmp_path: Path, field: str, why: str) -> None:
    first = RunLock.take(tmp_path)
    change(tmp_path, **{field: 1})
    lock._held.clear()
    assert why in RunLock.take(tmp_path).notes[0]
    first.release()


def test_a_live_process_on_another_machine_keeps_its_lock(tmp_path: Path) -> None:
    first = RunLock.take(tmp_path)
    change(tmp_path, host="node7")
    lock._held.clear()
    alive = multiprocessing.get_context("fork").Process(target=_touch, args=(tmp_path / LOCK,))
    alive.start()
    with pytest.raises(ConfigError, match="on node7"):
        RunLock.take(tmp_path, heartbeat_s=0.2, stale_s=20)
    alive.join()
    first._end.set()


def _touch(path: Path) -> None:
    time.sleep(0.5)
    os.utime(path)


def test_a_silent_process_on_another_machine_loses_the_lock_after_the_stated_time(tmp_path: Path) -> None:
    first = RunLock.take(tmp_path)
    change(tmp_path, host="node7")
    lock._held.clear()
    second = RunLock.take(tmp_path, heartbeat_s=0.2, stale_s=1.0)
    assert "on node7" in second.notes[0]
    assert "no sign of life for 1 s" in second.notes[0]
    first.release()
    assert (tmp_path / LOCK).exists(), "the first does not take the second's away"
    second.release()


def test_a_refused_start_leaves_nothing_behind(tmp_path: Path) -> None:
    RunLock.take(tmp_path / "a/b").release(began=False)
    assert list(tmp_path.iterdir()) == []
    RunLock.take(tmp_path / "a/b").release()
    assert list((tmp_path / "a/b").iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_full_disk_leaves_no_lock_that_the_next_start_would_wait_for(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(lock, "_me", lambda: {"text": "x" * 100_000})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # what is written beyond it fails, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            RunLock.take(tmp_path / "a/b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_without_a_valid_pid_is_unreadable(tmp_path: Path) -> None:
    RunLock.take(tmp_path).release()
    (tmp_path / LOCK).write_text(json.dumps(lock._me() | {"token": "other", "pid": "abc"}))
    taken = RunLock.take(tmp_path, heartbeat_s=0.1, stale_s=0.3)
    assert "an unknown process" in taken.notes[0]
    taken.release()


def test_an_unreadable_lock_expires_like_one_of_another_machine(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{")
    taken = RunLock.take(tmp_path, heartbeat_s=0.1, stale_s=0.5)
    assert "an unknown process" in taken.notes[0]
    taken.release()


def test_of_many_simultaneous_starts_exactly_one_takes_over_a_stale_lock(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.kill()
    process.wait()
    context = multiprocessing.get_context("fork")
    together, results = context.Barrier(4), context.Queue()
    starts = [context.Process(target=_try, args=(tmp_path, together, results)) for _ in range(4)]
    for start in starts:
        start.start()
    took = [results.get(timeout=60) for _ in starts]
    for start in starts:
        start.kill()  # only now: a process that has ended would be taken over in turn
        start.join()
    assert sum(took) == 1


def _try(run_dir: Path, together: Any, results: Any) -> None:
    together.wait()
    try:
        RunLock.take(run_dir)
        results.put(True)
    except ConfigError:
        results.put(False)
    time.sleep(60)


def test_a_lock_created_while_another_is_looked_at_does_not_count(tmp_path: Path) -> None:
    """A slow process takes the lock of a faster one for the leftover one, moves it away, and puts it back."""
    process = holder(tmp_path)
    aside = tmp_path / f"{ASIDE}of a slow process"
    (tmp_path / LOCK).rename(aside)
    refused: list[ConfigError] = []

    def start() -> None:
        try:
            RunLock.take(tmp_path)
        except ConfigError as error:
            refused.append(error)

    thread = threading.Thread(target=start)
    try:
        thread.start()
        while not (tmp_path / LOCK).exists():
            time.sleep(0.01)
        thread.join(0.1)
        assert thread.is_alive(), "it waits until no lock is set aside"
        aside.replace(tmp_path / LOCK)
        thread.join(20)
    finally:
        process.kill()
        process.wait()
    assert [f"process {process.pid} on" in str(error) for error in refused] == [True]


def test_a_live_lock_that_was_mistaken_for_the_leftover_one_is_put_back(tmp_path: Path) -> None:
    taken = RunLock.take(tmp_path)
    before = (tmp_path / LOCK).read_bytes()
    assert not lock._set_aside(tmp_path / LOCK, "the leftover one")
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert (tmp_path / LOCK).read_bytes() == before
    taken.release()


def test_a_lock_set_aside_by_a_killed_process_delays_a_start_once(tmp_path: Path) -> None:
    (tmp_path / f"{ASIDE}of a killed process").write_text("{}")
    RunLock.take(tmp_path, stale_s=0.2).release()
    assert not list(tmp_path.iterdir())
