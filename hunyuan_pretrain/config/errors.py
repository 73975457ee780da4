"""Configuration errors that are clear without a traceback. Cheap to import: no torch, no pydantic."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

__all__ = ["ConfigError", "Problem"]


class _Nothing(Enum):
    """A sentinel that keeps its identity when an error is pickled to another process."""

    NO_VALUE = "no value"


@dataclass(frozen=True)
class Problem:
    """One problem in a configuration: the setting, its value, the rule it breaks, and a fix."""

    path: str
    """Dotted path of the field, such as parallel.expert_model_parallel_size."""
    value: Any
    """The offending value; `Problem.NO_VALUE` if there is none."""
    rule: str
    hint: str = ""
    """What to write instead: the nearest legal values, or the nearest known name."""
    where: str = ""
    """File and line, or the override, that the value came from."""

    NO_VALUE = _Nothing.NO_VALUE

    def __str__(self) -> str:
        value = "" if self.value is Problem.NO_VALUE else f"={show_value(self.value)}"
        hint = f" ({self.hint})" if self.hint else ""
        where = f" [{self.where}]" if self.where else ""
        return f"{self.path}{value}: {self.rule}{hint}{where}"


class ConfigError(ValueError):
    """A configuration that cannot be used. The message lists every problem and needs no traceback."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        """`source`: the file, or what was being configured; the message begins with it."""
        self.source = source
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, tuple[Problem, ...]]]:
        """Picklable, because ranks that run as processes of this machine send their errors to the command."""
        return ConfigError, (self.source, self.problems)


NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
"""Texts that YAML reads as a number unless they are quoted."""


def show_value(value: Any, longest: int = 60) -> str:
    """A value as YAML would spell it, on one line, cut after `longest` characters."""
    if isinstance(value, float):
        text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    elif isinstance(value, str):
        # Quoted if YAML needs quotes, so that "3" does not look like the number 3 in a message about its type.
        text = f'"{value}"' if value in ("", "true", "false", "null") or NUMBER.fullmatch(value) else value
    else:
        text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= longest else text[: longest - 3] + "..."
