"""The locks match pyproject.toml, are complete, and name no host; an environment is made from them, or refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from hunyuan_pretrain.runtime.policy import transformer_engine_versions

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / ".ci" / "locks"
SCRIPT = LOCKS / "environment.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
PYTHONS = ("3.11", "3.12")


def environment(python: str) -> dict[str, str]:
    """Values of the environment markers on Linux."""
    names = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
    return names | {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}


def pins(file: str, python: str) -> dict[str, Version]:
    """Package -> version, from the lines of a lock that apply to a Python version."""
    found = {}
    for line in (LOCKS / file).read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "# ":
            requirement = Requirement(line.rstrip("\\"))
            if requirement.marker is None or requirement.marker.evaluate(environment(python)):
                (specifier,) = requirement.specifier
                assert specifier.operator == "==", line
                found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def lock(python: str) -> dict[str, Version]:
    return pins(f"py{python.replace('.', '')}.txt", python)


def wanted(lines: list[str], python: str) -> list[Requirement]:
    """Requirements that apply to a Python version, including those of named extras of this project."""
    found = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate(environment(python)):
            continue
        if requirement.name == PROJECT["project"]["name"]:
            found += [each for extra in requirement.extras for each in wanted(EXTRAS[extra], python)]
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_locks_satisfy_the_ranges_and_cover_every_extra_of_dev(python: str) -> None:
    locked = pins("torch-pypi.txt", python) | lock(python)
    project = PROJECT["project"]["dependencies"] + EXTRAS["dev"] + PROJECT["build-system"]["requires"]
    outside = [
        str(each)
        for each in wanted(project, python)
        if not each.specifier.contains(str(locked.get(canonicalize_name(each.name), "0")))
    ]
    assert outside == []
    engine = pins("transformer-engine.txt", python)["transformer-engine"]
    newest = pins("transformer-engine-newest.txt", python)["transformer-engine"] if python != "3.11" else engine
    first, last = transformer_engine_versions(str(locked["megatron-core"]))
    assert first <= (engine.major, engine.minor) <= (newest.major, newest.minor) == last
    (extra,) = wanted(EXTRAS["gpu"], python)
    assert extra.specifier == SpecifierSet(f">={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"), (
        "the extra takes what the code takes"
    )
    assert extra.specifier.contains(engine)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_packages_of_folders_of_their_own_are_those_that_tests_claim(python: str) -> None:
    """The oldest transformers that is allowed, and every package of the extra `peers`."""
    (transformers,) = (each for each in wanted(EXTRAS["hf"], python) if each.name == "transformers")
    oldest = pins("transformers-oldest.txt", python)["transformers"]
    assert SpecifierSet(f"=={oldest}").contains(min(Version(each.version) for each in transformers.specifier))
    peers = pins("peers.txt", python)
    assert set(peers) == {each.name for each in wanted(EXTRAS["peers"], python)}
    outside = [each for each in wanted(EXTRAS["peers"], python) if not each.specifier.contains(peers[each.name])]
    assert outside == []
    evaluation = pins("evaluation.txt", python)
    (harness,) = (each for each in wanted(EXTRAS["eval"], python) if each.name == "lm-eval")
    assert harness.specifier.contains(evaluation["lm-eval"])
    assert not (set(peers) | set(evaluation)) & set(lock(python)), "the environment has it"
    assert not set(peers) & set(evaluation), "peers has it, and tests of lm-eval see both"


@pytest.mark.parametrize("python", PYTHONS)
def test_both_builds_of_torch_are_the_same_version(python: str) -> None:
    assert pins("torch-cpu.txt", python)["torch"].public == str(pins("torch-pypi.txt", python)["torch"])
    assert "torch" not in lock(python)


def test_the_dependencies_of_a_locked_package_are_locked() -> None:
    """According to the metadata of the packages installed here, if they have the locked versions."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    locked = lock(python) | {"torch": pins("torch-cpu.txt", python)["torch"]}
    missing = []
    for name, version in locked.items():
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(package.version) != version:
            continue
        for requirement in map(Requirement, package.requires or []):
            is_counted = requirement.marker is None or requirement.marker.evaluate(environment(python))
            found = locked.get(canonicalize_name(requirement.name))
            if (
                is_counted
                and not CUDA.match(requirement.name)
                and (found is None or not requirement.specifier.contains(found, prereleases=True))
            ):
                missing.append(f"{name} needs {requirement}, and the lock has {found}")
    assert missing == []


CUDA = re.compile("nvidia-|cuda-")


@pytest.mark.parametrize("file", sorted(path.name for path in LOCKS.glob("*.txt")))
def test_a_lock_has_digests_and_names_no_host(file: str) -> None:
    text = (LOCKS / file).read_text(encoding="utf-8")
    assert "://" not in text
    assert "--index" not in text
    for requirement in re.split(r"\n(?=[a-z])", text)[1:]:
        assert "--hash=sha256:" in requirement, requirement


# --- making an environment --------------------------------------------------------------------------------------------


def set_up(folder: Path, python: Path | str = sys.executable, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up. Nothing can be downloaded here: refusals happen before pip runs."""
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull} | variables
    return subprocess.run(
        [python, SCRIPT, "set-up", folder], env=environment, capture_output=True, text=True, timeout=120
    )


def test_an_environment_of_another_python_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "env"
    folder.mkdir()
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.9.1\n")
    (folder / "made-by-make.txt").touch()
    done = set_up(folder)
    assert done.returncode == 2
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (
        f"{folder} uses Python 3.9, but {sys.executable} is {here}: remove it, or choose another with VENV=folder"
        in done.stderr
    )


@pytest.mark.parametrize("file", ["pyvenv.cfg", "thesis.tex"])
def test_a_folder_that_make_did_not_create_is_left_alone(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(f"version = {sys.version_info.major}.{sys.version_info.minor}.1\n")
    done = set_up(tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"{tmp_path}: already exists, and was not created by make: remove it, or choose another with VENV=folder\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_pip_sees_settings_for_package_sources_but_none_that_change_what_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(LOCKS))
    from environment import pip_environment  # type: ignore[import-not-found]

    for name in ("FIND_LINKS", "INDEX_URL", "CONSTRAINT", "TARGET", "USER", "REQUIRE_HASHES", "NO_DEPS"):
        monkeypatch.setenv(f"PIP_{name}", "x")
    seen = {name: value for name, value in pip_environment().items() if name.startswith("PIP_")}
    assert seen["PIP_FIND_LINKS"] == seen["PIP_INDEX_URL"] == "x"
    assert (seen["PIP_CONSTRAINT"], seen["PIP_USER"]) == (os.devnull, "0")
    assert not {"PIP_TARGET", "PIP_REQUIRE_HASHES", "PIP_NO_DEPS"} & set(seen)
    assert pip_environment(keep=["CONSTRAINT"])["PIP_CONSTRAINT"] == "x"
