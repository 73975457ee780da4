"""What .ci/docs_pages.py makes of docstrings, and lists that the site's Markdown does not take for lists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / ".ci/docs_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_list_in_a_docstring_stays_a_list(pages: ModuleType) -> None:
    text = "Kept apart:\n- one, which\n  goes on;\n- two_x.\n\nThen:\n    code"
    assert pages.as_markdown(text) == (
        "Kept apart:\n\n- one, which\n  goes on;\n- two\\_x.\n\nThen:\n\n```text\n    code\n```"
    )


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_list_follows_a_blank_line(page: Path) -> None:
    """GitHub starts a list after any line, the site only after a blank one."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    previous, run_on = "", []
    for line in text.splitlines():
        if re.match(r"(-|\d+\.) ", line) and previous.strip() and not re.match(r"((-|\d+\.) | {1,3}\S)", previous):
            run_on.append(line)
        previous = line
    assert not run_on
