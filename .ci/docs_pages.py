"""Pages that `make docs` generates from the source: the table of all settings, and docstrings as Markdown.

.ci/mkdocs.yml registers the functions `on_...` as MkDocs hooks, and `PlainDocstrings` as an extension of griffe, which
reads the source without importing it. Only config/ is imported, for the settings; it does not need torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

from hunyuan_pretrain.config.describe import first_line, is_list, more_of_type, property_of, type_of
from hunyuan_pretrain.config.errors import show_value
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import section_of

SETTINGS = "<!-- settings -->"
"""Placeholder for the tables of settings."""


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Replace the placeholder in a page with the tables of all settings. A search lists API pages and the log after
    the others."""
    if "\n::: " in markdown or page.file.src_uri == "log.md":
        page.meta["search"] = {"boost": 0.1}
    return markdown.replace(SETTINGS, "\n".join(settings(Experiment))) if SETTINGS in markdown else markdown


def on_page_content(html: str, **kwargs: Any) -> str:
    """Leave source code out of the search."""
    source = '<details class="mkdocstrings-source"'
    return html.replace(f"{source}>", f"{source} data-search-exclude>")


def settings(section: Any, path: str = "") -> Iterator[str]:
    """Yield a heading and a table for a section, then the same for each nested section."""
    schema = section.model_json_schema()
    rows, inner_sections = [], []
    for name, field in section.model_fields.items():
        node = property_of(schema, (name,))
        inner = section_of(field.annotation)
        if inner is None:
            default = show_value(node["default"]) if "default" in node else "must be given"
            meaning = f"{field.description} Typical: {node['typical']}." if node.get("typical") else field.description
            rows.append((f"`{name}`", type_of(node) + more_of_type(node), node.get("unit", ""), default, meaning))
        else:
            inner_sections.append((f"{path}{name}.{'N.' if is_list(node) else ''}", inner))
    yield f"\n## {f'`{path[:-1]}`' if path else 'The experiment'}\n\n{escaped(first_line(section.__doc__))}\n"
    yield '<div class="settings" markdown>\n\n| setting | type | unit | default | meaning |\n|---|---|---|---|---|'
    yield from (f"| {' | '.join(escaped(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    yield "\n</div>"
    for inner_path, inner in inner_sections:
        yield from settings(inner, inner_path)


class PlainDocstrings(griffe.Extension):
    """Treats docstrings as plain text: HTML and Markdown characters are shown literally, and columns stay aligned."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite every docstring of a package that griffe has read."""
        for thing in everything_in(pkg):
            if thing.docstring is not None:
                thing.docstring.value = as_markdown(thing.docstring.value)


def everything_in(module: Any) -> Iterator[Any]:
    """Yield a module or class and everything it defines, at any depth."""
    yield module
    for member in module.members.values():
        if not member.is_alias:
            yield from everything_in(member)


def as_markdown(text: str) -> str:
    """A docstring as Markdown: indented lines and lines with columns become code blocks, except in a list of `- `."""
    lines: list[str] = []
    is_code = is_list = False
    for line in text.splitlines():
        starts_item = line.startswith("- ")
        if starts_item and not is_list:
            lines.append("")  # Markdown starts a list only after a blank line
        is_list = starts_item or (is_list and line.startswith("  "))
        is_laid_out = not is_list and bool(re.match(r"\s{2,}\S", line) or re.search(r"\S {3,}\S", line))
        if is_laid_out != is_code:
            lines += ["", "```text"] if is_laid_out else ["```", ""]
        is_code = is_laid_out
        lines.append(line if is_code else escaped(line))
    return "\n".join([*lines, "```"] if is_code else lines)


def escaped(line: str) -> str:
    """Escape all Markdown in a line except `code`."""
    parts = line.split("`")
    if len(parts) % 2 == 0:  # an unpaired backtick
        return re.sub(r"([`*_<|\\])", r"\\\1", line).replace(r"\<", "&lt;")
    plain = (re.sub(r"([*_\\])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2])
    return "`".join(piece for pair in zip(plain, [*parts[1::2], ""], strict=True) for piece in pair)[:-1]
