"""Records of a corpus, JSON objects or parquet rows: which of them are read, and how they become text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
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
    """How a record, a JSON object or a parquet row, becomes text: one field, or a template such as "{title}\\n\\n{body}".

    Records in which a field of `where` has none of the given values are passed over. Raises DataFormatError for a template without a field.
    """

    text_field: str = "text"
    template: str | None = None
    where: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.template is not None and not self.text_fields:
            raise DataFormatError(f"--template {self.template!r}: names no field; write it like {{title}}\\n\\n{{text}}")

    @property
    def text_fields(self) -> list[str]:
        """Fields that make up the text."""
        if self.template is None:
            return [self.text_field]
        try:
            return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(self.template) if name))
        except ValueError as error:
            raise DataFormatError(f"--template {self.template!r}: {error}; write a brace of the text itself twice") from None

    @property
    def fields(self) -> list[str]:
        """All fields that are read."""
        return list(dict.fromkeys([*self.text_fields, *self.where]))

    def as_json(self) -> dict[str, Any]:
        """For manifests."""
        return {"field": self.text_field, "template": self.template, "where": {name: sorted(self.where[name]) for name in self.where}}

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
        return texts[self.text_field] if self.template is None else Formatter().vformat(self.template, (), texts)


def parse_conditions(conditions: Sequence[str]) -> dict[str, frozenset[str]]:
    """`--where FIELD=VALUE` options as field -> allowed values. Raises DataFormatError for one that is not of this form."""
    allowed: dict[str, frozenset[str]] = {}
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not (name and equals):
            raise DataFormatError(f"--where {condition}: is not FIELD=VALUE; for example --where lang=zh")
        allowed[name] = allowed.get(name, frozenset()) | {value}
    return allowed


def shown_value(value: Any) -> str:
    """A value of a JSON field as --where and reports have it; half of a surrogate pair, which cannot be written, as a question mark."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode(errors="replace").decode()
