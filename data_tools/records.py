"""Records of a corpus (JSON objects or parquet rows): which of them are read, and how they become text."""

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
    """A record that is not a document: its location, the reason, and its first characters."""

    where: str
    reason: str
    sample: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class RecordForm:
    """How a record (a JSON object or parquet row) becomes text: from one field or a template (see `parse_template`).

    Records in which a field of `where` has none of the given values are left out. The constructor raises
    DataFormatError for an empty field name or an invalid template.
    """

    text_field: str = "text"
    template: str | None = None
    where: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.text_field:
            raise DataFormatError("--text-field: is empty; give the name of a field, such as text")
        self._parts  # noqa: B018 - refuses an invalid template before anything is read

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

    @property
    def needs_whole_record(self) -> bool:
        """Whether a very long record cannot be read in parts."""
        return self.template is not None or bool(self.where)

    def as_json(self) -> dict[str, Any]:
        """The form as JSON for manifests."""
        return {
            "field": self.text_field,
            "template": self.template,
            "where": {name: sorted(self.where[name]) for name in self.where},
        }

    def text_of(self, where: str, record: Mapping[str, Any]) -> str | Reject | None:
        """The text of a record, None if `self.where` leaves it out, or a Reject if a field is missing or not text."""
        for name in self.fields:
            if name not in record:
                fields = ", ".join(map(shown_value, list(record)[:8])) or "none"
                return Reject(where, f"no field {name!r} (fields: {fields}); choose with --text-field or --template")
        if any(shown_value(record[name]) not in values for name, values in self.where.items()):
            return None
        texts = {name: "" if record[name] is None else record[name] for name in self.text_fields}
        for name, text in texts.items():
            if not isinstance(text, str):
                return Reject(where, f"field {name!r} holds {type(text).__name__}, expected text")
        if self.template is None:
            return texts[self.text_field]
        return "".join([literal + (texts[name] if name is not None else "") for literal, name in self._parts])


_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
_TEMPLATE_TOKEN = re.compile(r"\{\{|\}\}|\\.?|\{[^{}]*\}?|\}|[^\\{}]+", re.DOTALL)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Parse a template into a list of (literal text, name of the field after it, or None at the end).

    {NAME} stands for the field NAME, {{ and }} for braces, and \\n, \\t and \\\\ for a line break, a tab and a
    backslash, so that a template works in a shell's single quotes. Raises DataFormatError with the position for any
    other use of these characters, and for a template without a field.
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
                    f"{token} is not an escape; the escapes are \\n, \\t and \\\\, and a literal backslash is "
                    "written \\\\",
                )
            literal += _ESCAPES[token[1:]]
        elif token == "}":
            raise refuse(at, "an unmatched }; write a literal brace twice, }}")
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
        raise refuse(at, "this { is never closed; write {NAME}, or write a literal brace twice, {{")
    inside = token[1:-1]
    name = re.split(r"[!:.\[\]]", inside, maxsplit=1)[0].strip()
    if not name or name.isdecimal():
        raise refuse(at, f"{token} names no field; write its name, such as {{text}}")
    if re.search(r"[.\[\]]", inside):
        raise refuse(at, f"{token} accesses part of a field; only whole fields are supported, such as {{{name}}}")
    if inside != name:
        raise refuse(at, f"{token} is more than the name of a field; write {{{name}}}")
    return name


def parse_conditions(conditions: Sequence[str]) -> dict[str, frozenset[str]]:
    """Parse `--where FIELD=VALUE` options into field -> allowed values. Raises DataFormatError for an option of another
    form."""
    allowed: dict[str, frozenset[str]] = {}
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not (name.strip() and equals):
            raise DataFormatError(f"--where {condition}: is not FIELD=VALUE; for example --where lang=zh")
        if name[-1] in "!<>~^" or value.startswith(("=", "~")):
            raise DataFormatError(
                f"--where {condition}: only FIELD=VALUE is supported, with a literal value; for several "
                "values repeat --where"
            )
        if name != name.strip() or value != value.strip():
            raise DataFormatError(
                f"--where {condition}: has spaces around the =; write --where {name.strip()}={value.strip()}"
            )
        allowed[name] = allowed.get(name, frozenset()) | {value}
    return allowed


def shown_value(value: Any) -> str:
    """A JSON value as text, for --where and reports. An unpaired surrogate, which cannot be encoded, becomes a question
    mark."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode(errors="replace").decode()
