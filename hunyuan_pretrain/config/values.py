"""Expansion of values in YAML files and overrides: token counts with a suffix, and paths.

Token counts: a number followed, without a space, by k or K (1,000), M, B (1,000 million), T, or Ki and Mi (1,024 and
1,048,576, for sequence lengths): 10B, 1.5T, 4k, 4Ki. Paths: `~`, `~user`, $NAME and ${NAME} are expanded ($$ is a
dollar). Relative paths, also in a base file, are relative to the working directory of the command. A run records only
absolute paths (`with_absolute_paths`), so its records are valid from any directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, get_args

from pydantic import BaseModel

from hunyuan_pretrain.config.errors import NUMBER, Problem
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.yaml_tree import Keys, Tree, dotted

SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20}
SUFFIX_RULE = "10B, 1.5T, 300M and 4k are 1e10, 1.5e12, 3e8 and 4000; 4Ki is 4096"
COUNT_PATTERN = r"^(\d[\d_]*(\.\d+)?|\.\d+)([eE][-+]?\d+)?(k|K|M|B|T|Ki|Mi)$"
"""A legal token count with a suffix, as a regular expression that JSON schemas can hold."""
_COUNT = re.compile(r"([-+]?(?:\d[\d_]*)?(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*([A-Za-z]+)")
_MEANT = {
    "m": "M",
    "mio": "M",
    "million": "M",
    "mt": "M",
    "b": "B",
    "g": "B",
    "bn": "B",
    "bil": "B",
    "billion": "B",
    "bt": "B",
}
_MEANT |= {
    "t": "T",
    "tn": "T",
    "trillion": "T",
    "kt": "k",
    "thousand": "k",
    "ki": "Ki",
    "kib": "Ki",
    "mi": "Mi",
    "mib": "Mi",
}
_MEANT |= {"tokens": "", "tok": ""}
_VARIABLE = re.compile(r"\$(?:\$|\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def token_count(text: str) -> int | float | None:
    """The number of tokens in a text with a suffix: 1.5T is 1500000000000. None if the text is not such a number."""
    found = _COUNT.fullmatch(text)
    if not found or found[2] not in SUFFIXES or text != found[1] + found[2] or not re.search(r"\d", found[1]):
        return None
    exact = Fraction(found[1].replace("_", "")) * SUFFIXES[found[2]]
    return int(exact) if exact.denominator == 1 else float(exact)


def number_hint(text: str, is_tokens: bool) -> str:
    """A hint for a user who wrote `text` instead of a number; "" if there is none."""
    text = text.strip()
    found = _COUNT.fullmatch(text)
    if found and re.search(r"\d", found[1]):
        number, suffix = found[1], found[2] if found[2] in SUFFIXES else _MEANT.get(found[2].lower())
        if suffix is not None and is_tokens:
            return f"write {number}{suffix}: {SUFFIX_RULE}"
        if suffix is not None:
            whole = token_count(number + suffix) if suffix else number
            return f"write {whole}; suffixes are for counts of tokens"
    if re.fullmatch(r"[-+]?0\d+", text):
        return f"write {int(text)}; a leading zero means octal to some readers of YAML"
    if NUMBER.fullmatch(text):
        return "without quotes"
    if re.fullmatch(r"[-+]?\d{1,3}([, ]\d{3})+", text):
        return f"write {re.sub('[, ]', '_', text)}"
    if re.fullmatch(r"\d+(:\d+)+", text):
        return "a number without colons"
    return ""


def expand(text: str) -> str:
    """A path with `~` and variables expanded. Raises ValueError if a variable or user is not defined (the message names
    it), or if the result is empty."""

    def filled(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name = found[1] if found[1] is not None else found[2]
        if name not in os.environ:
            raise ValueError(f"the environment has no variable {name or found[0]}")
        return os.environ[name]

    expanded = _VARIABLE.sub(filled, text)
    if expanded.startswith("~"):
        at_home = os.path.expanduser(expanded)
        if at_home.startswith("~"):
            raise ValueError(
                f"there is no user {at_home.partition('/')[0][1:]}, whose home {at_home.partition('/')[0]} would be"
            )
        expanded = at_home
    if not expanded.strip():
        raise ValueError("is empty, and would be the working directory (write . for that)")
    return expanded


def fill_in(section: type[BaseModel], tree: Tree) -> list[Problem]:
    """Expand token counts and paths in the tree; returns the paths that cannot be expanded, as problems."""
    return list(_fill_in(section, tree.data, (), tree))


def _fill_in(section: type[BaseModel], data: dict[str, Any], keys: Keys, tree: Tree) -> Iterator[Problem]:
    for name, field in section.model_fields.items():
        value, here = data.get(name), (*keys, name)
        inner = section_of(field.annotation)
        if inner is not None:
            parts = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for index, part in parts:
                if isinstance(part, dict):
                    yield from _fill_in(inner, part, here if index is None else (*here, index), tree)
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if isinstance(value, str) and extra.get("unit") == "tokens":
            count = token_count(value)
            data[name] = value if count is None else count
        elif isinstance(value, str) and extra.get("is_path"):
            try:
                data[name] = expand(value)
            except ValueError as error:
                hint = "set it, or write $$ for a dollar" if "variable" in str(error) else ""
                yield Problem(dotted(here), value, str(error), hint, tree.position(here))


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """The experiment with every path setting made absolute, relative to the working directory of this process."""
    return Experiment.model_validate(change_paths(Experiment, experiment.model_dump(), os.path.abspath))


def change_paths(section: type[BaseModel], data: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The dump of a section with `change` applied to every path setting."""
    made = dict(data)
    for name, field in section.model_fields.items():
        value, inner = data[name], section_of(field.annotation)
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if inner is not None and isinstance(value, dict):
            made[name] = change_paths(inner, value, change)
        elif inner is not None and value is not None:
            made[name] = [change_paths(inner, part, change) for part in value]
        elif extra.get("is_path") and isinstance(value, str):
            made[name] = change(value)
    return made


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in a field's type: Section, tuple[Section, ...] or Section | None. None if there is none."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
