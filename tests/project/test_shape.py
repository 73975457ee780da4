"""Limits for readability: no function over 60 lines, no file over 400."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FUNCTION = 60
"""Lines from the first statement after the docstring: a command's options are a list, and docstrings are for
reading."""
LONGEST_FILE = 400

LONG_FUNCTIONS: dict[str, int] = {}
LONG_FILES = {
    "hunyuan_pretrain/checkpoint/modeling_hunyuan.py": 600,  # an export's model code is one file
    "hunyuan_pretrain/config/schema.py": 900,  # every setting there is, in one place; it grows with them
}
"""Exceptions and their maximum lengths; no file may join them."""


def source_files() -> list[str]:
    packages = ("hunyuan_pretrain", "data_tools", "launch")
    return [path.relative_to(ROOT).as_posix() for name in packages for path in sorted((ROOT / name).rglob("*.py"))]


def functions(text: str) -> dict[str, int]:
    """Name -> lines of code of every function; of two with the same name, the longer."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            begin = (first.end_lineno or 0) + 1 if ast.get_docstring(node) is not None else first.lineno
            found[node.name] = max(found.get(node.name, 0), (node.end_lineno or 0) - begin + 1)
    return found


def check(place: str, lines: int, limit: int, exceptions: dict[str, int]) -> None:
    allowed = exceptions.get(place, limit)
    assert lines <= allowed, f"{place}: {lines} lines, at most {allowed}; split it by meaning"
    assert place not in exceptions or lines > limit, f"{place}: no exception any more; take it off the list"


@pytest.mark.parametrize("path", source_files())
def test_files_and_functions_are_short(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    check(path, len(text.splitlines()), LONGEST_FILE, LONG_FILES)
    for name, lines in functions(text).items():
        check(f"{path} {name}", lines, LONGEST_FUNCTION, LONG_FUNCTIONS)


def test_every_exception_names_an_existing_file() -> None:
    paths = source_files()
    assert set(LONG_FILES) <= set(paths)
    assert {place.split()[0] for place in LONG_FUNCTIONS} <= set(paths)


def test_only_the_code_of_a_function_counts_towards_its_length() -> None:
    with_docstring = 'def f(\n    a,\n    b,\n):\n    """Doc.\n\n    More.\n    """\n    x = 1\n    return x\n'
    text = f"{with_docstring}class C:\n    def g(self):\n        pass\n"
    assert functions(text) == {"f": 2, "g": 1}


def test_a_long_function_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"x\.py f: 61 lines, at most 60"):
        check("x.py f", 61, 60, {})
    with pytest.raises(AssertionError, match=r"x\.py f: 63 lines, at most 62"):
        check("x.py f", 63, 60, {"x.py f": 62})
    with pytest.raises(AssertionError, match="no exception any more"):
        check("x.py f", 60, 60, {"x.py f": 62})
    check("x.py f", 62, 60, {"x.py f": 62})
