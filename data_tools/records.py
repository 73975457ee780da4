"""Records of a corpus, JSON objects or parquet rows: which of them are read, and how they become text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hunyuan_pretrain.data.errors import DataFormatError


@dataclass(frozen=True)
class Reject:
    """Something that is not a document: where, why, and how it begins."""

    where: str
    reason: str
    sample: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class RecordForm:
    """How a record, a JSON object or a parquet row, becomes text: one field, or a template (see `parse_template`).

    Records in which a field of `where` has none of the given values are passed over. Raises DataFormatError for a
    template that is not one.
    """

    text_field: str = "text"
    template: str | None = None
    where: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.text_field:
            raise DataFormatError("--text-field: is empty; give the name of a field, such as text")
        self._parts  # noqa: B018 - a template that is none is refused before anything is read

    @cached_property
    def _parts(self) -> list[tuple[str, str | None]]:
        return [] if self.template is None else parse_template(self.template)

    @cached_property
    def text_fields(self) -> list[str]:
        """Fields that make up the text."""
        if self.template is None:
            return [self.text_field]
        return list(dict.fromkeys(name for _, name in self._parts if name is not None))

    @cached_property
    def fields(self) -> list[str]:
        """All fields that are read."""
        return list(dict.fromkeys([*self.text_fields, *self.where]))

    def as_json(self) -> dict[str, Any]:
        """For manifests."""
        return {
            "field": self.text_field,
            "template": self.template,
            "where": {name: sorted(self.where[name]) for name in self.where},
        }

    def text_of(self, where: str, record: Mapping[str, Any]) -> str | Reject | None:
        """The text of a record, or None if `self.where` passes it over."""
        for name in self.fields:
            if name not in record:
                fields = ", ".join(map(shown_value, list(record)[:8])) or "none"
                return Reject(where, f"no field {name!r} (fields: {fields}); choose with --text-field or --template")
        if any(shown_value(record[name]) not in values for name, values in self.where.items()):
            return None
        texts = {name: "" if record[name] is None else record[name] for name in self.text_fields}
        for name, text in texts.items():
            if not isinstance(text, str):
                return Reject(where, f"field {name!r} holds {type(text).__name__}, text is expected")
        if self.template is None:
            return texts[self.text_field]
        return "".join([literal + (texts[name] if name is not None else "") for literal, name in self._parts])


_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
_TEMPLATE_TOKEN = re.compile(r"\{\{|\}\}|\\.?|\{[^{}]*\}?|\}|[^\\{}]+", re.DOTALL)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """A template as (literal text, name of the field that follows it, None at the end) one after the other.

    {NAME} stands for the field NAME, {{ and }} for braces, and \\n, \\t and \\\\ for a line break, a tab and a
    backslash, so that a shell's single quotes need no care. Raises DataFormatError, with the position, for anything
    else.
    """

    shown = f"'{template}'" if template.isprintable() else repr(template)

    def refuse(at: int, reason: str) -> DataFormatError:
        return DataFormatError(f"--template {shown}: character {at + 1}: {reason}")

    parts: list[tuple[str, str | None]] = []
    literal = ""
    for match in _TEMPLATE_TOKEN.finditer(template):
        token, at = match.group(), match.start()
        if token in ("{{", "}}"):
            literal += token[0]
        elif token.startswith("\\"):
            if token[1:] not in _ESCAPES:
                raise refuse(
                    at,
                    f"{token} is no escape; there are \\n, \\t and \\\\, and a backslash of the text itself is "
                    "written \\\\",
                )
            literal += _ESCAPES[token[1:]]
        elif token == "}":
            raise refuse(at, "a } that closes nothing; write a brace of the text itself twice, }}")
        elif token.startswith("{"):
            parts.append((literal, _field_name(token, at, refuse)))
            literal = ""
        else:
            literal += token
    if not parts:
        raise DataFormatError(f"--template {shown}: names no field; write it like '{{title}}\\n\\n{{text}}'")
    return [*parts, (literal, None)] if literal else parts


def _field_name(token: str, at: int, refuse: Callable[[int, str], DataFormatError]) -> str:
    if not token.endswith("}"):
        raise refuse(at, "this { is never closed; write {NAME}, or write a brace of the text itself twice, {{")
    inside = token[1:-1]
    name = re.split(r"[!:.\[\]]", inside, maxsplit=1)[0].strip()
    if not name or name.isdecimal():
        raise refuse(at, f"{token} names no field; write its name, such as {{text}}")
    if re.search(r"[.\[\]]", inside):
        raise refuse(at, f"{token} reaches into a field; only whole fields are read, such as {{{name}}}")
    if inside != name:
        raise refuse(at, f"{token} is more than the name of a field; write {{{name}}}")
    return name


def parse_conditions(conditions: Sequence[str]) -> dict[str, frozenset[str]]:
    """`--where FIELD=VALUE` options as field -> allowed values. Raises DataFormatError for one that is not of this
    form."""
    allowed: dict[str, frozenset[str]] = {}
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not (name.strip() and equals):
            raise DataFormatError(f"--where {condition}: is not FIELD=VALUE; for example --where lang=zh")
        if name[-1] in "!<>~^" or value.startswith(("=", "~")):
            raise DataFormatError(
                f"--where {condition}: only FIELD=VALUE is known, with the value as it stands; for several "
                "values repeat --where"
            )
        if name != name.strip() or value != value.strip():
            raise DataFormatError(
                f"--where {condition}: has spaces around the =; write --where {name.strip()}={value.strip()}"
            )
        allowed[name] = allowed.get(name, frozenset()) | {value}
    return allowed


def shown_value(value: Any) -> str:
    """A value of a JSON field as --where and reports have it; half of a surrogate pair, which cannot be written, as a
    question mark."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode(errors="replace").decode()
