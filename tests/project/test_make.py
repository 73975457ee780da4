"""Environment variables have one meaning: make takes its settings from its command line, and passes none of them on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTILE = {
    "PYTHON": "/bin/false",
    "VENV": "/opt/my venv",
    "VLLM_PYTHON": "/bin/false",
    "TEXT": "a b",
    "WORK": "/",
    "CORPUS": "$(rm -rf /)",
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "MASTER_PORT": "1",
    "MASTER_ADDR": "nowhere",
}


def make(*arguments: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", *HOSTILE)
    }
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("target", ["demo", "test", "lint", "test-latest", "test-vllm", "data-bench"])
def test_make_ignores_settings_in_the_environment(target: str) -> None:
    arguments = ("-n", "-B", target)
    plain, hostile = make(*arguments), make(*arguments, **HOSTILE)
    said = [line for line in hostile.stdout.splitlines() if not line.startswith("make: ")]
    assert plain.returncode == hostile.returncode == 0, plain.stderr + hostile.stderr
    assert said == plain.stdout.splitlines()
    assert "make: PYTHON in the environment is ignored; to set it: make PYTHON=..." in hostile.stdout


def test_another_interpreter_for_the_gpu_tests_needs_no_environment() -> None:
    for target, command in (("test-gpu", "-m pytest -m gpu tests"), ("bench-gpu", "-m tests.benchmarks.gpu_step")):
        assert "environment.py" in make("-n", "-B", target).stdout
        with_its_own = make("-n", "-B", target, "PY=/opt/gpu/bin/python").stdout
        assert "environment.py" not in with_its_own
        assert f"/opt/gpu/bin/python {command}" in with_its_own


def test_another_vllm_needs_no_environment_of_its_own() -> None:
    assert "environment.py set-up-vllm .venv-vllm" in make("-n", "-B", "test-vllm").stdout
    with_its_own = make("-n", "-B", "test-vllm", "VLLM_PYTHON=/opt/vllm/bin/python").stdout
    assert "set-up-vllm" not in with_its_own
    assert "VLLM_PYTHON='/opt/vllm/bin/python'" in with_its_own


def test_programs_that_make_starts_do_not_see_its_settings(tmp_path: Path) -> None:
    """The real recipes, with an interpreter and an environment that record how they were called."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    for name in ("setter", "env/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(
            f"#!/bin/sh\nenv > {tmp_path}/seen.$(basename $0)\nprintf '%s\\n' \"$@\" > "
            f"{tmp_path}/arguments.$(basename $0)\n"
        )
        (tmp_path / name).chmod(0o755)
    text = 'it\'s "my" $HOME `text`; exit 3'
    done = make(
        "demo", f"PYTHON={tmp_path}/setter", "VENV=env", f"TEXT={text}", folder=tmp_path, PYTHONDONTWRITEBYTECODE="1"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "arguments.setter").read_text().splitlines() == [".ci/locks/environment.py", "set-up", "env"]
    assert (tmp_path / "arguments.python").read_text().splitlines() == ["-m", "launch.demo", "--text", text]
    for name in ("setter", "python"):
        seen = {line.partition("=")[0] for line in (tmp_path / f"seen.{name}").read_text().splitlines()}
        assert not seen & {"PYTHON", "VENV", "TEXT", "CORPUS", "WORK", "PYTHONDONTWRITEBYTECODE"}


def test_an_environment_folder_with_spaces_is_refused() -> None:
    done = make("-n", "demo", "VENV=my env")
    assert done.returncode == 2
    assert 'VENV: a folder without spaces in its name, not "my env"' in done.stderr
