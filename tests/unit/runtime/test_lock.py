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
import time
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.runtime import lock
from hunyuan_pretrain.runtime.lock import LOCK, RunLock

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
    with context.Pool(4) as pool:
        assert sum(pool.map(_try, [tmp_path] * 4, chunksize=1)) == 1


def _try(run_dir: Path) -> int:
    try:
        RunLock.take(run_dir)
    except ConfigError:
        time.sleep(1)
        return 0
    time.sleep(1)  # long enough for the others to find this one alive
    return 1
