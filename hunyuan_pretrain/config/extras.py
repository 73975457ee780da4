"""Third-party packages: those of a plain installation, and those of each extra."""

from __future__ import annotations

import sys
from typing import NoReturn

from hunyuan_pretrain.config.exit_status import EXIT_MISTAKE

REQUIRED = {
    "torch": "torch>=2.9,<3",
    "megatron": "megatron-core>=0.16.1,<0.20",
    "numpy": "numpy>=1.26",
    "psutil": "psutil>=5.9",
    "pydantic": "pydantic>=2.8,<3",
    "yaml": "pyyaml>=6.0",
    "rich": "rich>=13.7",
    "safetensors": "safetensors>=0.5",
    "tiktoken": "tiktoken>=0.9",
    "typer": "typer>=0.15",
}
"""Import name -> requirement, as in pyproject.toml. They may be missing after `pip install --no-deps`, which is used to
keep a container's torch."""

EXTRAS = {
    "data": ("fsspec", "gigatoken", "pyarrow", "regex", "tokenizers", "zstandard"),
    "hf": ("tokenizers", "transformers"),
    "serve": ("fastapi", "httpx", "starlette", "uvicorn"),
    "logging": ("matplotlib", "tensorboard", "wandb"),
    "cluster": ("datatrove", "orjson", "ray", "xxhash"),
    "curation": ("fasteners", "fasttext", "spacy"),
    "eval": ("accelerate", "datasets", "lm_eval"),
    "gpu": ("transformer_engine",),
}
"""Extra -> import names of its packages."""


def install_hint(module: str) -> str:
    """The pip command that installs the extras with an optional package. Raises ValueError if the package is in no
    extra."""
    found = [extra for extra, names in EXTRAS.items() if module in names]
    if not found:
        raise ValueError(f"{module} is in no extra")
    return f'pip install "hunyuan-pretrain[{",".join(found)}]"'


def missing_package(error: BaseException) -> str | None:
    """One line for the user if an import failed because a package of this project or of an extra is not installed; None
    for every other error."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    # megatron-core shares the name megatron with other packages, so only its own part of it may be missing
    if isinstance(error, ModuleNotFoundError) and module in REQUIRED and error.name in (module, "megatron.core"):
        package = REQUIRED[module]
        return f'{package.partition(">")[0]} is not installed: pip install "{package}"'
    if not any(module in names for names in EXTRAS.values()):
        return None
    if not isinstance(error, ModuleNotFoundError) or error.name != module:  # installed, but broken
        return None
    return f"{module} is not installed: {install_hint(module)}"


def end_without(error: ModuleNotFoundError) -> NoReturn:
    """End a command that lacks a package it always needs: print one line and exit with EXIT_MISTAKE. Any other error is
    raised again."""
    if (missing := missing_package(error)) is None:
        raise error
    print(missing, file=sys.stderr)
    sys.exit(EXIT_MISTAKE)
