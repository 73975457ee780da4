"""Packages that a plain installation does not bring, and the extra of this project that brings each."""

from __future__ import annotations

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
    """What to tell a user about an import that failed: one line for a package that an extra brings, None for every
    other error."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if not any(module in names for names in EXTRAS.values()):
        return None
    if not isinstance(error, ModuleNotFoundError) or error.name != module:  # it is there, and broken
        return None
    return f"{module} is not installed: {install_hint(module)}"
