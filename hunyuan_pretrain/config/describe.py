"""The output of `explain` (what a setting means), `config show --value` and `config diff`."""

from __future__ import annotations

import difflib
import json
from typing import Any

from hunyuan_pretrain.config.errors import ConfigError, Problem, show_value
from hunyuan_pretrain.config.load import all_paths, field_at, nearest_name
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import SUFFIX_RULE, section_of

NOTES = (
    "`explain KEY` describes one setting in full, such as stages.tokens; `explain model` lists a section.",
    f"If the unit is tokens, suffixes are allowed: {SUFFIX_RULE}.",
    "In paths, ~ and $NAME are expanded ($$ is a dollar); relative paths are relative to the working directory.",
)


def explain(path: str = "") -> str:
    """Describe a setting: meaning, type, unit, default and a typical value. For a section: one line per setting,
    including those of nested sections.

    `path`: dotted, list indices optional (stages.0.tokens and stages.tokens are the same); "" lists every setting.
    Raises ConfigError for an unknown path, naming the nearest one.
    """
    keys = tuple(name for name in path.split(".") if name and not name.isdecimal())
    if not keys:
        return "\n".join([first_line(Experiment.__doc__), *field_lines(Experiment), "", *NOTES])
    field = field_at(Experiment, keys)
    if field is None:
        raise ConfigError("explain", [Problem(path, Problem.NO_VALUE, "unknown setting", nearest_path(keys))])
    schema = Experiment.model_json_schema()
    inner = section_of(field.annotation)
    if inner is not None:
        kind = "a list of sections" if is_list(property_of(schema, keys)) else "a section"
        meaning = field.description or first_line(inner.__doc__)
        return "\n".join([f"{'.'.join(keys)}: {kind}", f"  {meaning}", *field_lines(inner)])
    found = property_of(schema, keys)
    lines = [
        ".".join(keys),
        f"  meaning   {found.get('description', '')}",
        f"  type      {type_of(found)}{more_of_type(found)}",
    ]
    if found.get("unit"):
        lines.append(f"  unit      {found['unit']}")
    lines.append(f"  default   {show_value(found['default']) if 'default' in found else 'none: must be given'}")
    if found.get("typical"):
        lines.append(f"  typical   {found['typical']}")
    return "\n".join(lines)


def diff(a: Experiment, b: Experiment) -> list[str]:
    """Settings in which two resolved experiments differ, one "dotted.path: a -> b" each; empty if they are equal."""
    left, right = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    lines = []
    for path in [*left, *(path for path in right if path not in left)]:
        old = show_value(left[path]) if path in left else "(absent)"
        new = show_value(right[path]) if path in right else "(absent)"
        if old != new or left.get(path) != right.get(path):
            lines.append(f"{path}: {old} -> {new}")
    return lines


def value_of(experiment: Experiment, path: str) -> str:
    """The value of one setting as plain text: paths have ~ and $NAME expanded, null is "null", lists are JSON.

    `path`: dotted path of a setting, not of a section. Raises ConfigError for an unknown path, naming the nearest one.
    """
    values = flatten(experiment.model_dump(mode="json"))
    if path not in values:
        near = difflib.get_close_matches(path, values, 1)
        hint = f"did you mean {near[0]}?" if near else ""
        raise ConfigError("config show --value", [Problem(path, Problem.NO_VALUE, "not a setting", hint)])
    value = values[path]
    return value if isinstance(value, str) else json.dumps(value)


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists -> dotted path of each leaf."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {path: value}
    return {at: leaf for name, item in items for at, leaf in flatten(item, f"{path}.{name}" if path else name).items()}


def property_of(schema: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The JSON schema of one field."""
    node = schema
    for name in keys:
        node = node.get("items", node)
        choices = node.get("anyOf", [node])  # of a section that may be null
        reference = next((choice["$ref"] for choice in choices if "$ref" in choice), None)
        node = schema["$defs"][reference.rpartition("/")[2]] if reference else node
        node = node["properties"][name]
    return node


def type_of(node: dict[str, Any], is_plural: bool = False) -> str:
    """A JSON schema in words: "integer > 0 or null", "list of integers > 0"; `is_plural`: in the plural."""
    if "anyOf" in node:
        kept = {key: node[key] for key in ("is_path",) if key in node}
        return " or ".join(type_of({**choice, **kept}, is_plural) for choice in node["anyOf"])
    if "enum" in node:
        return " or ".join(show_value(choice) for choice in node["enum"])
    if "const" in node:
        return show_value(node["const"])
    s = "s" if is_plural else ""
    kind = node.get("type", "section")
    if kind == "array":
        parts = node.get("prefixItems")
        if parts:
            inner = [type_of(part) for part in parts]
            return f"pair{s} [{', '.join(inner)}]" if len(inner) == 2 else f"list{s} [{', '.join(inner)}]"
        return f"list{s} of {type_of(node['items'], is_plural=True)}"
    if kind == "object":
        return f"mapping{s} of names to {type_of(node['additionalProperties'], is_plural=True)}"
    word = {"string": "path" if node.get("is_path") else "text", "boolean": "true or false"}.get(kind, kind)
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {show_value(node[name])}" for name, sign in signs.items() if name in node]
    return " ".join(
        [word if kind in ("boolean", "null") or (word == "text" and is_plural) else word + s, " and ".join(bounds)]
    ).strip()


def more_of_type(node: dict[str, Any]) -> str:
    """Other ways to write a value, appended to its type."""
    if node.get("unit") == "tokens":
        return f", also with a suffix: {SUFFIX_RULE}"
    return "; ~ and $NAME are expanded, and it is relative to the working directory" if node.get("is_path") else ""


def is_list(node: dict[str, Any]) -> bool:
    """Whether a property is a list of sections."""
    return any(choice.get("type") == "array" for choice in node.get("anyOf", [node]))


def field_lines(section: Any, indent: str = "  ") -> list[str]:
    """A tree: one line per field of a section, with the first sentence of its meaning, its type, unit and default. The
    fields of a nested section follow, indented."""
    schema = section.model_json_schema()
    rows: list[tuple[str, str, Any]] = []
    for name, field in section.model_fields.items():
        node = property_of(schema, (name,))
        inner = section_of(field.annotation)
        meaning = field.description or (first_line(inner.__doc__) if inner is not None else "")
        kind = ("list of sections" if is_list(node) else "section") if inner is not None else type_of(node)
        unit = f", unit {node['unit']}" if node.get("unit") else ""
        default = f", default {show_value(node['default'])}" if "default" in node and inner is None else ""
        rows.append((name, f"{first_sentence(meaning)} ({kind}{unit}{default})", inner))
    width = max(len(name) for name, _, _ in rows)
    lines = []
    for name, text, inner in rows:
        lines.append(f"{indent}{name:<{width}}  {text}")
        lines += field_lines(inner, indent + "  ") if inner is not None else []
    return lines


def first_sentence(text: str) -> str:
    """The text up to its first full stop."""
    return text.split(". ")[0].rstrip(".")


def first_line(docstring: str | None) -> str:
    """The first line of a docstring."""
    return (docstring or "").strip().splitlines()[0]


def nearest_path(keys: tuple[str, ...]) -> str:
    """A hint that names the known path which an unknown one most likely meant."""
    near = difflib.get_close_matches(".".join(keys), list(all_paths(Experiment)), 1, 0.8)
    words = set(keys[-1].split("_"))
    saying = (
        [path for path in all_paths(Experiment) if words <= set(path.rpartition(".")[2].split("_"))]
        if len(words) > 1
        else []
    )
    if not near and 0 < len(saying) <= 3:
        return f"did you mean {' or '.join(saying)}?"
    known = next((n for n in range(len(keys), 0, -1) if field_at(Experiment, keys[:n]) is not None), 0)
    return f"did you mean {near[0]}?" if near else nearest_name(Experiment, keys[: known + 1])
