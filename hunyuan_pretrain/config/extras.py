"""Packages of other people: what a plain installation brings, and what an extra of this project does."""

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
"""Name under which a package is imported -> the package, as pyproject.toml asks for it; absent after
`pip install --no-deps`, which leaves a container's torch as it is."""

EXTRAS = {
    "data": ("fsspec", "gigatoken", "pyarrow", "regex", "tokenizers", "zstandard"),
    "hf": ("tokenizers", "transformers"),
    "logging": ("matplotlib", "tensorboard", "wandb"),
    "cluster": ("datatrove", "orjson", "ray", "xxhash"),
    "curation": ("fasteners", "fasttext", "spacy"),
    "gpu": ("transformer_engine",),
}
"""Extra -> names under which its packages are imported."""


def install_hint(module: str) -> str:
    """The command that brings an optional package, and whatever else its extras hold. Raises ValueError for any other
    package."""
    found = [extra for extra, names in EXTRAS.items() if module in names]
    if not found:
        raise ValueError(f"{module} is in no extra")
    return f'pip install "hunyuan-pretrain[{",".join(found)}]"'


def missing_package(error: BaseException) -> str | None:
    """What to tell a user about an import that failed: one line for a package that the project or an extra brings, None
    for every other error."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    # megatron-core shares the name megatron with other packages, so that only its own part of it may be absent
    if isinstance(error, ModuleNotFoundError) and module in REQUIRED and error.name in (module, "megatron.core"):
        package = REQUIRED[module]
        return f'{package.partition(">")[0]} is not installed: pip install "{package}"'
    if not any(module in names for names in EXTRAS.values()):
        return None
    if not isinstance(error, ModuleNotFoundError) or error.name != module:  # it is there, and broken
        return None
    return f"{module} is not installed: {install_hint(module)}"


def end_without(error: ModuleNotFoundError) -> NoReturn:
    """End a command that lacks what all of it needs, in one line with the status of a mistake; raises any other error
    again."""
    if (missing := missing_package(error)) is None:
        raise error
    print(missing, file=sys.stderr)
    sys.exit(EXIT_MISTAKE)
