"""What .github/ and the hooks call exists, and has read-only permissions."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def load(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_read_only_and_runs_make_targets(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert not [job for job in workflow["jobs"].values() if "permissions" in job or "timeout-minutes" not in job]
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), "an action by its major version"
        else:
            program, target, *_ = shlex.split(step["run"])
            assert program == "make"
            assert target in TARGETS
            assert "${{" not in step["run"], "names from outside reach a command by its environment only"


def test_every_locked_python_is_tested() -> None:
    locked = {f"3.{path.stem.removeprefix('py3')}" for path in (ROOT / ".ci/locks").glob("py3*.txt")}
    assert set(load(ROOT / ".github/workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]) == locked


def test_the_gpu_job_is_started_by_hand() -> None:
    workflow = load(ROOT / ".github/workflows/gpu.yml")
    assert set(workflow[True]) == {"workflow_dispatch"}  # YAML 1.1 takes the key `on` for true
    assert [step["run"].split()[:2] for step in steps(workflow) if "run" in step] == [["make", "test-gpu"]]


def test_hooks_fetch_nothing_and_call_what_exists() -> None:
    for repository in load(ROOT / ".pre-commit-config.yaml")["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            assert hook["language"] == "system"
            program, *arguments = shlex.split(hook["entry"])
            if program == "make":
                assert set(arguments) <= TARGETS
            missing = [word for word in arguments if word.startswith("tests/") and not (ROOT / word).exists()]
            assert not missing


def test_templates_are_forms_with_a_title() -> None:
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        if path.name != "config.yml":
            form = load(path)
            assert form["name"]
            assert form["description"]
            assert [part["type"] for part in form["body"]]


@pytest.mark.parametrize("name", ["QUICK", "BORDERS"])
def test_the_tests_that_the_makefile_names_exist(name: str) -> None:
    named = re.search(rf"^{name} := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert named is not None
    missing = [word for word in named[1].replace("\\\n", " ").split() if not (ROOT / word).exists()]
    assert not missing
