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


def compiled(folder: Path, program: str = "tests.helpers.compiled") -> subprocess.CompletedProcess[str]:
    """What a program prints that compiles kernels instead of interpreting them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", program]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_kernels_compile(tmp_path: Path) -> None:
    result = compiled(tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    shared = [int(number) for number in re.findall(r", (\d+) bytes of shared memory$", result.stdout, re.MULTILINE)]
    assert 0 < max(shared) <= 101_376, "more than a program may have on a GPU of compute capability 8.6 or 8.9"
    found = set(re.findall(r"^(\w+)\.(\w+): \d+ bytes", result.stdout, re.MULTILINE))
    launched = {(path.stem, name) for path in FOLDER.glob("*.py") for name in LAUNCH.findall(path.read_text())}
    assert found == launched, "tests/helpers/compiled.py has to launch every kernel"


def test_kernels_on_rows_of_experts_are_compiled_once_for_all_numbers_of_rows(tmp_path: Path) -> None:
    """Without a capacity the number changes from step to step. Triton would compile anew for 1 and for multiples of
    16."""
    result = compiled(tmp_path, "tests.helpers.variants")
    assert result.returncode == 0, result.stderr[-3000:]
    found = re.findall(r"^(\w+ \w+): (\d+) of (\d+)$", result.stdout, re.MULTILINE)
    assert {name for name, _, _ in found} == {
        "swiglu _forward_kernel", "swiglu _backward_kernel", "permute _permute_kernel", "permute _sum_kernel",
        "combine _sum_kernel", "combine _combine_backward_kernel",
    }  # fmt: skip
    assert {ours for _, ours, _ in found} == {"1"}
    assert {others for _, _, others in found} == {"3"}, "the numbers of rows tell no variants apart"
