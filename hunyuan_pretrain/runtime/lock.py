"""Lets only one process at a time train in a run directory: a lock that survives crashes and works across nodes.

<run_dir>/lock.json is created exclusively and names its holder. The holder renews its modification time every
HEARTBEAT_S seconds as a sign of life. The age of the lock is measured against a newly created file, so only the file
server's clock counts. Operating system locks are not used: not every network file system supports them.

- The holder ran on this machine and is gone: the lock is taken over at once.
- The holder runs elsewhere: it is watched. A sign of life refuses the start; none for STALE_S seconds ends the lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from hunyuan_pretrain.config.errors import ConfigError, Problem

LOCK = "lock.json"
ASIDE = f"{LOCK}.aside."
"""Beginning of the name of a lock that a process has moved away to look at."""
HEARTBEAT_S = 10.0
STALE_S = 60.0
EXIT_TAKEN_OVER = 2

_held: dict[Path, RunLock] = {}


class RunLock:
    """The lock of a run directory, held by rank 0 from `take` to `release`."""

    def __init__(self, run_dir: Path, token: str, made: list[Path], notes: list[str]) -> None:
        self.path = run_dir / LOCK
        self.notes = notes
        """Lines for the log: whose lock was taken over."""
        self._token, self._made = token, made
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run lock")
        self._thread.start()

    @classmethod
    def take(cls, run_dir: Path, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S) -> RunLock:
        """Lock a run directory and create it if necessary.

        May wait up to `stale_s` for a process on another machine. Raises ConfigError, naming the holder, if the lock is
        held, and OSError if the folder cannot be written.
        """
        path = (run_dir / LOCK).absolute()
        if path in _held:  # held by this process for a run that it has left
            _held[path].release()
        made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        token, notes = uuid.uuid4().hex, []
        while not (_created(path, token, made) and _stays(path, token, stale_s)):
            holder = _read(path)
            if holder is None:
                continue  # just released
            why = _why_gone(holder, path, stale_s) or _watch(holder, path, heartbeat_s, stale_s)
            if why is None:
                raise _refusal(run_dir, holder)
            if _set_aside(path, holder.get("token")):
                notes.append(f"the lock of {_who(holder)} was left over ({why}): taken over")
        lock = cls(run_dir, token, made, notes)
        _held[path] = lock
        return lock

    def release(self, began: bool = True) -> None:
        """Release the lock. If the run never `began`, also remove the empty folders created for it."""
        self._end.set()
        _held.pop(self.path.absolute(), None)
        if (_read(self.path) or {}).get("token") == self._token:
            self.path.unlink(missing_ok=True)
        _remove_empty([] if began else self._made)

    def is_held(self) -> bool:
        """Whether the run directory is still this process's. A lock file that somebody has removed is put back. Raises
        OSError."""
        if self._end.is_set():
            return False
        holder = _read(self.path)
        return _create(self.path, self._token) if holder is None else holder.get("token") == self._token

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            try:
                holder = _read(self.path)
                if holder is not None and holder.get("token") not in (self._token, None) and not self._end.is_set():
                    why = f"taken over by {_who(holder)} while this process gave no sign of life; exiting"
                    print(f"{self.path}: {why}", file=sys.stderr, flush=True)
                    os._exit(EXIT_TAKEN_OVER)  # further writes would mix with the other process's
                if holder is None:
                    _create(self.path, self._token)
                else:
                    os.utime(self.path)
            except OSError:
                continue  # full disk or unreachable file system; the next beat may work


def holder_of(run_dir: Path) -> str | None:
    """Who trains in a run directory, in words; None if nobody does. Waits for nothing: a process on another machine
    counts until it has given no sign of life for STALE_S seconds."""
    path = run_dir / LOCK
    holder = _read(path)
    if holder is None:
        return None
    try:
        return None if _why_gone(holder, path, STALE_S) is not None else _who(holder)
    except OSError:  # the age cannot be measured in a folder that cannot be written
        return _who(holder)


def _created(path: Path, token: str, made: list[Path]) -> bool:
    """`_create`, which on failure also removes the folders in `made`. Raises OSError."""
    try:
        return _create(path, token)
    except OSError:
        _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _create(path: Path, token: str) -> bool:
    """Create the lock file; returns False if it exists. On error raises OSError and leaves no files behind."""
    beside = path.with_name(f"{LOCK}.{token}")
    text = json.dumps(_me() | {"token": token}, indent=1) + "\n"
    try:
        beside.write_text(text, encoding="utf-8")
        try:
            os.link(beside, path)  # exclusive, and never half-written
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return _create_exclusively(path, text)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    return True


def _create_exclusively(path: Path, text: str) -> bool:
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except OSError:  # others would wait for an unreadable lock
        path.unlink(missing_ok=True)
        raise
    return True


def _me() -> dict[str, Any]:
    """Fields that identify this process on any machine."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _link("/proc/self/ns/pid"),
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _read(path: Path) -> dict[str, Any] | None:
    """Content of a lock file; {} if it is invalid, None if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) and isinstance(content.get("pid"), int) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _why_gone(holder: dict[str, Any], path: Path, stale_s: float) -> str | None:
    """Why the holder cannot be running; None if it may be."""
    me = _me()
    if holder.get("host") == me["host"] and holder.get("pid_namespace") == me["pid_namespace"]:
        if holder.get("boot") != me["boot"]:
            return "this machine has rebooted since"
        if _process_start(int(holder.get("pid", 0))) != holder.get("process_start"):
            return "the process is gone"
        return None
    age = _age(path)
    return f"no sign of life for {age:.0f} s" if age > stale_s else None


def _watch(holder: dict[str, Any], path: Path, heartbeat_s: float, stale_s: float) -> str | None:
    """Wait for a sign of life from a process on another machine. Returns None if there is one, else why it is presumed
    gone."""
    if holder.get("pid_namespace") == _me()["pid_namespace"] and holder.get("host") == _me()["host"]:
        return None  # it was seen running
    print(f"{path}: waiting for a sign of life of {_who(holder)}, at most {stale_s:.0f} s", file=sys.stderr, flush=True)
    seen = path.stat().st_mtime_ns if path.exists() else 0
    while (age := _age(path)) <= stale_s:
        time.sleep(min(heartbeat_s / 4, 1.0))
        now = path.stat().st_mtime_ns if path.exists() else 0
        if now == 0:
            return "it has ended"
        if now != seen:
            return None
    return f"no sign of life for {age:.0f} s"


def _age(path: Path) -> float:
    """Seconds since the lock was renewed, by the file server's clock; infinite if it is gone."""
    probe = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def _set_aside(path: Path, token: str | None) -> bool:
    """Remove a leftover lock. Returns False if it has been removed or taken by another process in the meantime."""
    aside = path.with_name(f"{ASIDE}{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    is_it = (_read(aside) or {}).get("token") == token
    if is_it:
        aside.unlink()
    else:  # the lock of a process that was faster: it goes back, also over one created while it was gone (see _stays)
        aside.replace(path)
    return is_it


def _stays(path: Path, token: str, longest_s: float) -> bool:
    """Whether the lock just created is still this process's once no lock is set aside: the path may have been free only
    because another process was looking at the lock of a third one, which it then puts back."""
    end = time.monotonic() + longest_s
    while found := list(path.parent.glob(f"{ASIDE}*")):
        if time.monotonic() > end:  # left by a process that was killed, which will not put it back
            for aside in found:
                aside.unlink(missing_ok=True)
        time.sleep(0.01)
    return (_read(path) or {}).get("token") == token


def _refusal(run_dir: Path, holder: dict[str, Any]) -> ConfigError:
    rule = f"{_who(holder)} is training in it"
    hint = (
        f"wait for it to end, stop it, or choose another run_dir; if there is no such process, remove {run_dir / LOCK}"
    )
    return ConfigError(str(run_dir), [Problem("run_dir", Problem.NO_VALUE, rule, hint)])


def _who(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "an unknown process (the lock cannot be read)"
    job = f", job {holder['job']}" if holder.get("job") not in (None, "none") else ""
    return f"process {holder['pid']} on {holder.get('host')}{job}, since {holder.get('since')},"


def _process_start(pid: int) -> int | None:
    """Start time of a process on this machine, in ticks since boot; None if it does not exist or has ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return str(Path(path).readlink())
    except OSError:
        return None
