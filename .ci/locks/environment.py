"""The environment of `make demo` and `make test`: exactly the versions that the locks beside this file name, checked by
their SHA-256.

    python .ci/locks/environment.py set-up FOLDER             a virtual environment of this interpreter, from the locks
    python .ci/locks/environment.py set-up FOLDER --latest    the same from the newest that pyproject.toml allows
    python .ci/locks/environment.py lock                      write the locks anew; needs uv and packaging

py311.txt and py312.txt hold everything but torch. torch-cpu.txt is its CPU build, taken where this machine offers one
(PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL), and written by hand, because PyPI does not have that build; torch-pypi.txt is
PyPI's build of the same version, with the packages of CUDA that it needs on Linux. transformer-engine.txt is
Transformer Engine's Python part, 1 MB, in a folder that only its tests see: megatron-core changes its ways where it can
import it; transformer-engine-newest.txt the newest that megatron-core works with from Python 3.12 on, of which only the
construction is tested. Only the standard library is needed to set up.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

LOCKS = Path(__file__).resolve().parent
ROOT = LOCKS.parents[1]
PYTHONS = ("3.11", "3.12")
PLATFORMS = (("linux", "x86_64", "Linux"), ("linux", "aarch64", "Linux"), ("darwin", "arm64", "Darwin"))
CUDA = re.compile(r"(nvidia|cuda)-|triton=|torch=")
"""Packages that only a CUDA build of torch needs, and torch."""

LOCKED = ("--no-deps", "--require-hashes", "--no-compile")
"""Compiling all of torch, ray and transformers takes longer than compiling what is imported of them, when it is."""

MARKER = "made-by-make.txt"
FROM_WHERE = (
    "CACHE_DIR CERT CLIENT_CERT CONFIG_FILE DEFAULT_TIMEOUT DISABLE_PIP_VERSION_CHECK EXTRA_INDEX_URL FIND_LINKS "
    "INDEX_URL "
    "KEYRING_PROVIDER NO_CACHE_DIR NO_INDEX PROXY RETRIES TIMEOUT TRUSTED_HOST USE_DEPRECATED USE_FEATURE"
)
"""PIP_* that say where packages come from. Others (PIP_TARGET, PIP_USER, PIP_CONSTRAINT...) would change what is
installed, or where."""


class SetUpError(Exception):
    """The environment cannot be made; the message says why."""


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="environment.py", description="The environment of `make demo` and `make test`."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    set_up_parser = commands.add_parser("set-up", help="make or mend a virtual environment")
    set_up_parser.add_argument("folder", type=Path)
    set_up_parser.add_argument(
        "--latest", action="store_true", help="the newest versions that pyproject.toml allows; heeds PIP_CONSTRAINT"
    )
    commands.add_parser("lock", help="write the locks anew")
    options = parser.parse_args()
    try:
        if options.command == "lock":
            write_locks()
        else:
            set_up(options.folder, options.latest)
    except SetUpError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(
            f"{' '.join(map(str, error.cmd[:6]))}... ended with status {error.returncode}; what it said is above",
            file=sys.stderr,
        )
        return 1
    return 0


# --- setting up -------------------------------------------------------------------------------------------------------


def set_up(folder: Path, latest: bool) -> None:
    """Make a virtual environment, or bring one that was made here to the state of the locks. Raises SetUpError,
    CalledProcessError."""
    make_folder(folder, latest)
    python = folder / "bin/python"
    if latest:
        pip(python, "install", "--upgrade", "--upgrade-strategy", "eager", "-e", f"{ROOT}[dev]", keep=("CONSTRAINT",))
        engine = [line for line in gpu_extra() if line]
        pip(python, "install", "--upgrade", "--no-deps", "--target", fresh(folder / "transformer_engine"), *engine)
    else:
        pip(python, "install", *LOCKED, "-r", lock_of_this_python())
        install_torch(python)
        pip(python, "install", "--no-deps", "--no-build-isolation", "-e", ROOT)
        pip(
            python,
            "install",
            *LOCKED,
            "--target",
            fresh(folder / "transformer_engine"),
            "-r",
            LOCKS / "transformer-engine.txt",
        )
        if sys.version_info >= (3, 12):  # where megatron-core works with it
            newest = LOCKS / "transformer-engine-newest.txt"
            pip(python, "install", *LOCKED, "--target", fresh(folder / "transformer_engine_newest"), "-r", newest)
    pip(python, "check")


def make_folder(folder: Path, latest: bool) -> None:
    """A virtual environment of this interpreter with nothing in it but pip; one that make made, of the same Python,
    stays as it is."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version not in PYTHONS and (not latest or sys.version_info < (3, 11)):
        raise SetUpError(
            f"{sys.executable} is Python {version}, and there are locks for {' and '.join(PYTHONS)}: PYTHON=python3.12"
        )
    found = re.search(r"^version(?:_info)? *= *(\d+\.\d+)", read(folder / "pyvenv.cfg"), re.MULTILINE)
    if not folder.exists() or not any(folder.iterdir()):
        venv.create(folder, with_pip=True, symlinks=True)
        (folder / MARKER).write_text(
            "`make` installs into this environment, and removes from it, without asking.\n", encoding="utf-8"
        )
    elif found is None or not ((folder / MARKER).is_file() or (folder / ".installed").is_file()):
        raise SetUpError(
            f"{folder}: there already, and not made by make: remove it, or choose another with VENV=folder"
        )
    elif found[1] != version:
        raise SetUpError(
            f"{folder} is of Python {found[1]}, and {sys.executable} is {version}: remove it, or choose another "
            "with VENV=folder"
        )


def lock_of_this_python() -> Path:
    """The lock for the interpreter that runs this."""
    return LOCKS / f"py{sys.version_info.major}{sys.version_info.minor}.txt"


def install_torch(python: Path) -> None:
    """torch's CPU build where this machine offers one, else PyPI's."""
    arguments = ("install", *LOCKED, "-r")
    command = [python, "-I", "-m", "pip", "--quiet", *arguments, LOCKS / "torch-cpu.txt"]
    attempt = subprocess.run(command, env=pip_environment(), capture_output=True, text=True)
    if attempt.returncode == 0:
        return
    if "No matching distribution found" not in attempt.stderr:
        print(attempt.stderr, file=sys.stderr)
        raise subprocess.CalledProcessError(attempt.returncode, command)
    print(
        "torch: no CPU build is offered here, so PyPI's; on Linux that is some GB of CUDA (docs/guide/installation.md)",
        flush=True,
    )
    pip(python, *arguments, LOCKS / "torch-pypi.txt")


def pip(python: Path, *arguments: str | Path, keep: Sequence[str] = ()) -> None:
    """Run pip in the environment, as quietly as it can. Raises CalledProcessError."""
    # -I: neither PYTHONPATH nor the user's own packages count as installed
    subprocess.run([python, "-I", "-m", "pip", "--quiet", *arguments], env=pip_environment(keep), check=True)


def pip_environment(keep: Sequence[str] = ()) -> dict[str, str]:
    """The environment variables that pip may see."""
    kept = {f"PIP_{name}" for name in (*FROM_WHERE.split(), *keep)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name in kept}
    if "CONSTRAINT" not in keep:
        environment["PIP_CONSTRAINT"] = (
            os.devnull
        )  # a constraint in a configuration file counts no more than one in the environment
    return environment | {"PIP_USER": "0"}


def fresh(folder: Path) -> Path:
    """The folder, with nothing in it: pip leaves the records of an older version in a target."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def gpu_extra() -> list[str]:
    """The extra `gpu` without the compiled parts of Transformer Engine."""
    return [re.sub(r"\[.*?\]", "", line) for line in read_project()["optional-dependencies"]["gpu"]]


# --- locking ----------------------------------------------------------------------------------------------------------


def write_locks() -> None:
    """Resolve pyproject.toml's extra `dev` for each Python, newest first, and write the locks; torch stays at
    torch-cpu.txt's version."""
    version = re.search(r"^torch==([\d.]+)\+cpu", read(LOCKS / "torch-cpu.txt"), re.MULTILINE)
    if version is None:
        raise SetUpError(f"{LOCKS / 'torch-cpu.txt'}: no line torch==VERSION+cpu")
    torch_lines: list[str] = []
    for python in PYTHONS:
        lines = resolve([ROOT / "pyproject.toml", "--extra", "dev"], python, f"torch=={version[1]}\n")
        torch_lines += [line for line in lines if CUDA.match(line) and line not in torch_lines]
        write(f"py{python.replace('.', '')}.txt", [line for line in lines if not CUDA.match(line)])
    write("torch-pypi.txt", torch_lines)
    extra = "\n".join(gpu_extra())
    # the version that all megatron-cores work with, and whose kernels the stand-ins of the tests imitate
    write("transformer-engine.txt", resolve(["-"], PYTHONS[0], "", extra, "--no-deps"))
    write("transformer-engine-newest.txt", resolve(["-"], PYTHONS[-1], "", extra, "--no-deps"))


def resolve(sources: Sequence[str | Path], python: str, constraint: str, text: str = "", *options: str) -> list[str]:
    """Pinned requirements with their digests, one string for each, that count under this Python on one of PLATFORMS.
    Raises SetUpError."""
    if shutil.which("uv") is None:
        raise SetUpError("uv is not on the PATH: pip install uv")
    constraints = LOCKS / ".constraints.txt"
    constraints.write_text(constraint, encoding="utf-8")
    try:
        command = [
            "uv",
            "pip",
            "compile",
            *sources,
            "--python-version",
            python,
            "--universal",
            "--generate-hashes",
            "--constraints",
            constraints,
        ]
        command += ["--no-annotate", "--no-header", "--no-config", "--quiet", *options]
        output = subprocess.run(command, input=text, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    finally:
        constraints.unlink()
    return [line for block in re.split(r"\n(?=\S)", output.strip()) if (line := for_python(block, python))]


def for_python(block: str, python: str) -> str | None:
    """One requirement with a marker only where it depends on the platform; None where it never counts."""
    from packaging.markers import Marker

    requirement, _, hashes = block.partition(" \\\n")
    pin, _, marker = requirement.partition(" ; ")
    counts = [not marker or Marker(marker).evaluate(environment) for environment in environments(python)]
    if not any(counts):
        return None
    return f"{pin if all(counts) else requirement} \\\n{hashes}"


def environments(python: str) -> Iterator[dict[str, str]]:
    """What markers see on each of PLATFORMS."""
    for sys_platform, machine, system in PLATFORMS:
        names = {
            "sys_platform": sys_platform,
            "platform_machine": machine,
            "platform_system": system,
            "os_name": "posix",
        }
        versions = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "implementation_version": f"{python}.0",
        }
        yield names | versions | {"implementation_name": "cpython", "platform_python_implementation": "CPython"}


def write(name: str, lines: Sequence[str]) -> None:
    """A lock."""
    head = "# Written by `make lock`.\n"
    (LOCKS / name).write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def read_project() -> dict[str, dict[str, list[str]]]:
    """The table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: Path) -> str:
    """A file's text; "" where there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
