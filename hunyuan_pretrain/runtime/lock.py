"""One process at a time trains in a run directory: a lock that survives crashes and is understood on every node.

<run_dir>/lock.json is created exclusively and says who has it. Its time of change is the sign of life, renewed every
HEARTBEAT_S seconds. It is compared with that of a file made at the same moment, so that only the file server's clock
counts. Locks of the operating system are not used: not every network file system has them.

- the process ran on this machine and is gone: the lock is taken over at once;
- it runs elsewhere: watched until it gives a sign of life, which refuses the start, or none for STALE_S seconds, which
  ends the lock.
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
HEARTBEAT_S = 10.0
STALE_S = 60.0
EXIT_TAKEN_OVER = 2

_held: dict[Path, RunLock] = {}


class RunLock:
    """The lock of a run directory, held from `take` to `release`; on rank 0 only."""

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
        """Lock a run directory, which is made if need be.

        May wait `stale_s` for the process of another machine. Raises ConfigError that names the process which has the
        lock, OSError if the folder cannot be written.
        """
        path = (run_dir / LOCK).absolute()
        if path in _held:  # by this process, which has left that run
            _held[path].release()
        made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        token, notes = uuid.uuid4().hex, []
        while not _created(path, token, made):
            holder = _read(path)
            if holder is None:
                continue  # it has just gone
            why = _why_gone(holder, path, stale_s) or _watch(holder, path, heartbeat_s, stale_s)
            if why is None:
                raise _refusal(run_dir, holder)
            if _set_aside(path, holder.get("token")):
                notes.append(f"the lock of {_who(holder)} was left over ({why}): taken over")
        lock = cls(run_dir, token, made, notes)
        _held[path] = lock
        return lock

    def release(self, began: bool = True) -> None:
        """Give the lock back; if the run never `began`, folders that were made for it go too."""
        self._end.set()
        _held.pop(self.path.absolute(), None)
        if (_read(self.path) or {}).get("token") == self._token:
            self.path.unlink(missing_ok=True)
        _remove_empty([] if began else self._made)

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            try:
                holder = _read(self.path)
                if holder is not None and holder.get("token") not in (self._token, None) and not self._end.is_set():
                    why = f"taken over by {_who(holder)} while this process gave no sign of life; it ends"
                    print(f"{self.path}: {why}", file=sys.stderr, flush=True)
                    os._exit(EXIT_TAKEN_OVER)  # whatever it still wrote would be mixed with the other's
                if holder is None:
                    _create(self.path, self._token)
                else:
                    os.utime(self.path)
            except OSError:
                continue  # a full disk or a file system that is away; the next beat may work


def _created(path: Path, token: str, made: list[Path]) -> bool:
    """`_create`; where it fails, folders that were made for the lock go too. Raises OSError."""
    try:
        return _create(path, token)
    except OSError:
        _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()


def _create(path: Path, token: str) -> bool:
    """Make the lock file, False where there is one. Raises OSError, and leaves nothing behind."""
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
    except OSError:  # a lock that nobody can read would be waited for
        path.unlink(missing_ok=True)
        raise
    return True


def _me() -> dict[str, Any]:
    """What identifies this process, on its machine and elsewhere."""
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
    """Content of a lock file; {} where it cannot be understood, None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) and isinstance(content.get("pid"), int) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _why_gone(holder: dict[str, Any], path: Path, stale_s: float) -> str | None:
    """Why the holder cannot be running, None where it may be."""
    me = _me()
    if holder.get("host") == me["host"] and holder.get("pid_namespace") == me["pid_namespace"]:
        if holder.get("boot") != me["boot"]:
            return "this machine was started since"
        if _process_start(int(holder.get("pid", 0))) != holder.get("process_start"):
            return "the process is gone"
        return None
    age = _age(path)
    return f"no sign of life for {age:.0f} s" if age > stale_s else None


def _watch(holder: dict[str, Any], path: Path, heartbeat_s: float, stale_s: float) -> str | None:
    """Wait for a sign of life of a process on another machine; None if there is one, else why it is taken to be
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
    """Seconds since the lock was renewed, by the clock of the file server; infinite where it is gone."""
    probe = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def _set_aside(path: Path, token: str | None) -> bool:
    """Remove a lock that was found left over, unless it has become somebody else's; False where it has."""
    aside = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    is_it = (_read(aside) or {}).get("token") == token
    if not is_it:
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    return is_it


def _refusal(run_dir: Path, holder: dict[str, Any]) -> ConfigError:
    rule = f"{_who(holder)} trains in it"
    hint = (
        "wait for it to end or stop it, choose another run_dir, or if there is no such process, remove "
        f"{run_dir / LOCK}"
    )
    return ConfigError(str(run_dir), [Problem("run_dir", Problem.NO_VALUE, rule, hint)])


def _who(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "an unknown process (the lock cannot be read)"
    job = f", job {holder['job']}" if holder.get("job") not in (None, "none") else ""
    return f"process {holder['pid']} on {holder.get('host')}{job}, since {holder.get('since')},"


def _process_start(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did; None where there is none, or it has
    ended."""
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
