"""Images: what they are built on is pinned, they need no privileges, the image's torch stays. None is built here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILE, DEFINITION, INSTALL = (
    ROOT / "launch" / name for name in ("Dockerfile", "apptainer.def", "install_in_image.sh")
)
PINNED = r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3"


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each instruction of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, arguments.strip()) for name, _, arguments in found]


def sections() -> dict[str, list[str]]:
    """Lines of each section of the definition; "" for those before the first."""
    found: dict[str, list[str]] = {"": []}
    for line in DEFINITION.read_text().splitlines():
        if line.startswith("%"):
            found[line[1:].strip()] = []
        elif line.strip() and not line.startswith("#"):
            found[list(found)[-1]].append(line.strip())
    return found


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip('hadolint is not installed: pip install "hunyuan-pretrain[dev]"')
    done = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_dockerfile_is_pinned_and_unprivileged() -> None:
    found = instructions()
    names = [name for name, _ in found]
    assert set(names) <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "CMD"}, "no ADD, no VOLUME, no EXPOSE"
    assert [arguments for name, arguments in found if name == "FROM"] == ["${IMAGE}"]
    image = next(arguments for name, arguments in found if name == "ARG")
    assert re.fullmatch(f"IMAGE={PINNED}", image)
    users = [arguments for name, arguments in found if name == "USER"]
    assert users[-1] not in ("root", "0")
    assert names.index("USER") > len(names) - 1 - names[::-1].index("RUN"), "what is installed belongs to root"
    for name, arguments in found:
        if name == "COPY":
            *sources, _ = arguments.split()
            assert all((ROOT / source).exists() for source in sources), arguments
        assert not re.search("password|secret|token|api_key", arguments, re.IGNORECASE)


def test_both_images_are_the_same() -> None:
    found, arguments = instructions(), [line for line in sections()["arguments"]]
    assert sections()[""] == ["Bootstrap: docker", "From: {{ IMAGE }}"]
    assert arguments == [value for name, value in found if name == "ARG"]
    copied = {source for name, value in found if name == "COPY" for source in value.split()[:-1]}
    assert {line.split()[0] for line in sections()["files"]} == copied
    for line in sections()["files"]:
        source, target = line.split()
        assert target == f"/opt/hunyuan-pretrain/{source}"
    for name in ("post", "runscript"):
        assert subprocess.run(["bash", "-n"], input="\n".join(sections()[name]), text=True).returncode == 0


@pytest.mark.parametrize(
    ("before", "pip", "status", "message"),
    [
        ("torch==2.10.0a0+b4.nv25.12", "true", 0, ""),
        ("torch==2.10.0a0+b4.nv25.12", "echo torch==2.13.0 > {state}", 1, "pip has replaced a package of the image"),
        ("numpy==2.0", "true", 2, "the image has no torch"),
    ],
)
def test_the_images_own_torch_is_kept_or_the_build_fails(
    tmp_path: Path, before: str, pip: str, status: int, message: str
) -> None:
    """python3 is a stand-in that lists the packages of the image, and whose pip does as told."""
    state, calls = tmp_path / "packages", tmp_path / "calls"
    state.write_text(f"{before}\n")
    python = tmp_path / "python3"
    listed = f'[[ $1 == -c ]] && exec cat {state}\necho "$*" > {calls}\n'
    listed += 'for file in $PIP_CONSTRAINT; do cat "$file"; done >> ' + str(calls)
    python.write_text(f"#!/usr/bin/env bash\n{listed}\n{pip.format(state=state)}\n")
    python.chmod(0o755)
    own = tmp_path / "constraint.txt"
    own.write_text("numpy==1.26\n")
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PIP_CONSTRAINT": str(own)}
    done = subprocess.run(["bash", str(INSTALL), "/src"], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    if status < 2:
        said = calls.read_text().splitlines()
        assert said[0] == "-m pip install --no-cache-dir /src[data,hf,logging] megatron-core==0.16.1"
        assert said[1:] == [before, "numpy==1.26"], "what pip must not change"
