"""The wheel, which has no repository around it: what it holds, and that its commands need nothing else."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hunyuan_pretrain

ROOT = Path(__file__).parents[2]
PACKAGES = ("hunyuan_pretrain", "data_tools", "launch")
DATA = {"hunyuan_pretrain/py.typed", "data_tools/py.typed", "launch/train.sh", "launch/interpreter.sh"}
FOLDERS = ("plan/profiles", "evaluation/tasks")
DATA |= {
    path.relative_to(ROOT).as_posix() for at in FOLDERS for path in (ROOT / "hunyuan_pretrain" / at).glob("*.yaml")
}
DATA |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "hunyuan_pretrain/serving/page").iterdir()}
DATA.add("hunyuan_pretrain/report/zoom.js")
"""Files other than modules. An export's own code consists of modules: checkpoint/modeling_hunyuan.py and its like."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools writes into the folder that it builds, by the environment's own setuptools:
    nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", capture_output=True, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder for PYTHONPATH."""
    folder = wheel.parent / "installed"
    shutil.unpack_archive(wheel, folder, "zip")
    return folder


def python(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the wheel before everything else, outside the repository."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=installed.parent, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_every_module_and_no_test(wheel: Path) -> None:
    expected = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")} | DATA
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == expected
        assert archive.getinfo("launch/train.sh").external_attr >> 16 & stat.S_IXUSR


def test_commands_work_from_the_wheel(installed: Path) -> None:
    shutil.copytree(ROOT / "configs", installed.parent / "my")
    where = python(installed, "-c", "import hunyuan_pretrain, data_tools; print(hunyuan_pretrain.__file__)")
    assert where.stdout.startswith(str(installed))
    planned = python(installed, "-m", "hunyuan_pretrain", "plan", "my/dev/demo_cpu.yaml", "--world-size", "2")
    assert planned.returncode == 0, planned.stderr
    version = python(installed, "-m", "data_tools.cli", "--version")
    assert version.stdout == f"hunyuan-pretrain {hunyuan_pretrain.__version__}\n"


def test_what_needs_a_checkout_says_so_in_one_line(installed: Path) -> None:
    demo = python(installed, "-m", "launch.demo")
    config = installed / "configs/dev/demo_cpu.yaml"
    assert demo.stderr == f"demo: {config}: no such file; the demo runs in a checkout of the repository\n"
    assert demo.returncode == 2


def test_the_launcher_of_the_wheel_explains_itself(installed: Path) -> None:
    shown = python(installed, "-m", "launch.node", "--help")
    assert shown.stdout.startswith("Usage: launch/train.sh CONFIG")
    assert shown.returncode == 0
