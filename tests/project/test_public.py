"""The public interface: documented names, types, and a version that is defined once."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hunyuan_pretrain

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = (
    "config.errors",
    "config.load",
    "config.schema",
    "checkpoint.export_run",
    "checkpoint.generate",
    "checkpoint.hf_export",
    "data.packed_dataset",
    "data.tokenizer",
)


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_documented(name: str) -> None:
    module = importlib.import_module(f"hunyuan_pretrain.{name}")
    assert module.__all__
    for public in module.__all__:
        assert inspect.getdoc(getattr(module, public)), public


def test_the_version_is_defined_once() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hunyuan_pretrain.__version__"}
    assert hunyuan_pretrain.__version__.count(".") == 2
    text = (ROOT / "hunyuan_pretrain/__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{hunyuan_pretrain.__version__}"' in text, "a literal: setup reads it without importing"


def test_types_ship_with_the_packages() -> None:
    for package in ("hunyuan_pretrain", "data_tools"):
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]


def test_the_package_alone_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import hunyuan_pretrain; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['hunyuan_pretrain']\n"
