"""Every kernel compiles for a GPU, also where the other tests interpret it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[4]
FOLDER = ROOT / "hunyuan_pretrain/model/kernels"
LAUNCH = re.compile(r"^ +(?:\w+ = )?(\w+)\[\(.*\)\]\(", re.MULTILINE)
"""kernel[(programs,)](...)."""


def compiled(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.helpers.compiled"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_kernels_compile(tmp_path: Path) -> None:
    result = compiled(tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    shared = [int(number) for number in re.findall(r", (\d+) bytes of shared memory$", result.stdout, re.MULTILINE)]
    assert 0 < max(shared) <= 101_376, "more than a program may have on a GPU of compute capability 8.6 or 8.9"
    found = set(re.findall(r"^(\w+)\.(\w+): \d+ bytes", result.stdout, re.MULTILINE))
    launched = {(path.stem, name) for path in FOLDER.glob("*.py") for name in LAUNCH.findall(path.read_text())}
    assert found == launched, "tests/helpers/compiled.py has to launch every kernel"
