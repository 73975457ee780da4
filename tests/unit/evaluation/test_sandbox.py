"""Hostile programs in the sandbox: none reaches the network, the host's files or processes, or more than its limits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.evaluation import EvaluationError, sandbox
from hunyuan_pretrain.evaluation.sandbox import Outcome, run_program


@pytest.fixture(autouse=True)
def _needs_a_sandbox() -> None:
    if (why := sandbox.obstacle()) is not None:
        pytest.skip(f"no sandbox here: {why}")


def refused(source: str, **limits: int) -> None:
    """The program wants what it must not have, and says so with an assertion if it gets it."""
    outcome = run_program(source, **limits)
    assert outcome == Outcome(True, ""), f"{outcome.reason}:\n{source}"


def test_a_program_that_ends_has_passed() -> None:
    assert run_program("import collections, hashlib, itertools, math, re\nassert math.sqrt(4) == 2").passed


@pytest.mark.parametrize(
    "source",
    [
        "assert False",
        "raise SystemExit(0)",
        "raise SystemExit(99)",
        "import os; os._exit(0)",
        "import os; os.write(3, b'passed'); os._exit(0)",
        "import os; os.close(3)",
        "def f(:",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_one_that_ends_early_has_not(source: str) -> None:
    outcome = run_program(source)
    assert not outcome.passed
    assert "before its end" in outcome.reason


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(
            f"import socket\ntry:\n    socket.create_connection(('127.0.0.1', {port}), 2)\nexcept OSError:\n    pass\n"
            "else:\n    assert False\n"
        )


def test_no_process_and_no_thread() -> None:
    refused(
        "import os, threading, subprocess\n"
        "for attempt in (os.fork, threading.Thread(target=print).start, lambda: subprocess.run(['/bin/true'])):\n"
        "    try:\n        attempt()\n    except (OSError, RuntimeError):\n        continue\n"
        "    assert False, attempt\n"
    )


def test_no_file_of_the_host_is_read_or_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    paths = [str(secret), "/etc/passwd", "/etc/shadow", "/proc/1/environ", "/sys", os.path.expanduser("~/.ssh")]
    refused(
        f"import os, sys\nfor path in {paths}:\n    assert not os.path.exists(path), path\n"
        "for path in ('/here', '/usr/here', sys.executable, os.__file__):\n"
        "    try:\n        open(path, 'a')\n    except OSError:\n        continue\n    assert False, path\n"
        "open('/tmp/mine', 'w').write('x')\n"
    )
    assert secret.read_text() == "secret"
    assert not Path("/tmp/mine").exists()


def test_no_way_out_of_its_root() -> None:
    refused(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for name, *arguments in (('chroot', b'/tmp'), ('unshare', 0x10000000), ('umount2', b'/usr', 2),\n"
        "                         ('mount', b'none', b'/tmp', b'tmpfs', 0, 0), ('ptrace', 16, 1, 0, 0)):\n"
        "    assert getattr(libc, name)(*arguments) != 0, name\n"
        f"others = {{'home', 'root', 'etc', 'proc', 'var'}} - set({sys.base_prefix!r}.split('/'))\n"
        "assert not others & set(os.listdir('/'))\n"
    )


def test_nothing_outlives_or_is_left_uncounted() -> None:
    """prctl would let the program live on after its parent; memory that is not mapped is not in its limit."""
    refused(
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for name, *arguments in (('prctl', 1, 0, 0, 0, 0), ('shmget', 0, 1 << 20, 0o1600), ('msgget', 0, 0o1600),\n"
        "                         ('memfd_create', b'x', 0)):\n"
        "    assert getattr(libc, name)(*arguments) == -1, name\n"
    )


def test_limits_of_memory_and_of_files() -> None:
    refused("try:\n    bytearray(3 << 30)\nexcept MemoryError:\n    pass\nelse:\n    assert False\n")
    outcome = run_program(
        "with open('/tmp/big', 'wb') as file:\n    for _ in range(100):\n        file.write(bytes(1 << 20))"
    )
    assert not outcome.passed


def test_the_first_process_of_its_namespace_cannot_raise_or_outlive_its_limits() -> None:
    """Process 1 ignores signals of its own namespace; the kernel's at a hard limit it does not."""
    refused(
        "import os, resource, signal\nassert os.getpid() == 1\nos.kill(1, signal.SIGKILL)\n"
        "for name in ('AS', 'CPU', 'FSIZE', 'NOFILE', 'CORE', 'STACK'):\n"
        "    which = getattr(resource, f'RLIMIT_{name}')\n    soft, hard = resource.getrlimit(which)\n"
        "    assert soft == hard >= 0, name\n"
        "    for more in (hard + 1, resource.RLIM_INFINITY):\n"
        "        try:\n            resource.setrlimit(which, (more, more))\n"
        "        except (ValueError, OSError):\n            continue\n        assert False, name\n"
    )

    def a_second_of_cpu(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
        return sandbox._in_sandbox(wanted | {"seconds": 1}, folder)

    source = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass"
    outcome = sandbox._run(source, a_second_of_cpu, 100, sandbox.MEMORY_BYTES)
    assert outcome == Outcome(False, f"ended with status {-signal.SIGKILL & 0xFF} before its end")


def test_an_endless_loop_ends_and_leaves_nothing() -> None:
    began = time.monotonic()
    assert run_program("while True:\n    pass", seconds=1) == Outcome(False, "not done after 1 s")
    assert time.monotonic() - began < 30
    deadline = time.monotonic() + 10
    while "hunyuan_sandbox_" in (left := _command_lines()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "hunyuan_sandbox_" not in left


def _command_lines() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_no_signal_reaches_the_host() -> None:
    refused(
        "import os, signal\nfor target in (os.getppid(), -1):\n"
        "    try:\n        os.kill(target, signal.SIGKILL) if target else None\n    except OSError:\n        pass\n"
    )


def test_a_flood_of_output_is_thrown_away() -> None:
    refused("import sys\nfor _ in range(2000):\n    print('x' * 10000)\n    print('x' * 100, file=sys.stderr)\n")


def test_programs_may_run_side_by_side() -> None:
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(run_program("x = 1"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.passed for outcome in outcomes] == [True] * 4


def test_without_a_sandbox_nothing_runs_unless_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "child.py"
    broken.write_text(
        sandbox.CHILD.read_text().replace("enter_namespaces()\n    except", "raise OSError('closed')\n    except")
    )
    monkeypatch.setattr(sandbox, "CHILD", broken)
    with pytest.raises(EvaluationError, match="no sandbox on this machine: closed"):
        run_program("x = 1")
    assert sandbox.obstacle() == "no sandbox on this machine: closed"
    with sandbox.unsafe_code_allowed(True):
        assert run_program("x = 1").passed
        assert run_program("while True:\n    pass", seconds=1) == Outcome(False, "not done after 1 s")
    assert sys.executable
