"""What a setting means, and how two experiments differ: the text behind `explain` and `config diff`."""

from __future__ import annotations

import difflib
from typing import Any

from hunyuan_pretrain.config.load import all_paths, field_at, nearest_name
from hunyuan_pretrain.config.schema import ConfigError, Experiment, Problem, show_value
from hunyuan_pretrain.config.values import section_of


def explain(path: str = "") -> str:
    """Meaning, unit, type, default and a typical value of a setting; of a section, one line for each of its fields.

    `path`: dotted, list indices optional (stages.0.tokens and stages.tokens are the same); "" lists the whole experiment.
    Raises ConfigError for an unknown path, naming the nearest one.
    """
    keys = tuple(name for name in path.split(".") if name and not name.isdecimal())
    if not keys:
        return "\n".join([first_line(Experiment.__doc__), *field_lines(Experiment)])
    field = field_at(Experiment, keys)
    if field is None:
        raise ConfigError("explain", [Problem(path, Problem.NO_VALUE, "unknown setting", nearest_path(keys))])
    schema = Experiment.model_json_schema()
    inner = section_of(field.annotation)
    if inner is not None:
        kind = "a list of sections" if type_of(property_of(schema, keys)).startswith("list") else "a section"
        meaning = field.description or first_line(inner.__doc__)
        return "\n".join([f"{'.'.join(keys)}: {kind}", f"  {meaning}", *field_lines(inner)])
    found = property_of(schema, keys)
    lines = [".".join(keys), f"  meaning   {found.get('description', '')}", f"  type      {type_of(found)}"]
    if found.get("unit"):
        lines.append(f"  unit      {found['unit']}")
    lines.append(f"  default   {show_value(found['default']) if 'default' in found else 'none: must be given'}")
    if found.get("typical"):
        lines.append(f"  typical   {found['typical']}")
    return "\n".join(lines)


def diff(a: Experiment, b: Experiment) -> list[str]:
    """The settings in which two resolved experiments differ, "dotted.path: a -> b" each; empty where they are equal."""
    left, right = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    lines = []
    for path in [*left, *(path for path in right if path not in left)]:
        old = show_value(left[path]) if path in left else "(absent)"
        new = show_value(right[path]) if path in right else "(absent)"
        if old != new or left.get(path) != right.get(path):
            lines.append(f"{path}: {old} -> {new}")
    return lines


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
        reference = node.get("$ref")
        node = schema["$defs"][reference.rpartition("/")[2]] if reference else node
        node = node["properties"][name]
    return node


def type_of(node: dict[str, Any]) -> str:
    """A JSON schema in words: "integer > 0 or null"."""
    if "anyOf" in node:
        return " or ".join(type_of(choice) for choice in node["anyOf"])
    if "enum" in node:
        return " or ".join(show_value(choice) for choice in node["enum"])
    if "$ref" in node:
        return "section"
    if node.get("type") == "array":
        return f"list of {type_of(node.get('items', {}))}s"
    word = {"string": "text", "boolean": "true or false"}.get(node.get("type", ""), node.get("type", "any"))
    bounds = [f"> {node['exclusiveMinimum']:g}"] if "exclusiveMinimum" in node else []
    bounds += [f">= {node['minimum']:g}"] if "minimum" in node else []
    return " ".join([word, *bounds])


def field_lines(section: Any) -> list[str]:
    """One line for each field of a section: name, type, default, the first sentence of its meaning."""
    schema = section.model_json_schema()
    rows = []
    for name, field in section.model_fields.items():
        node = property_of(schema, (name,))
        inner = section_of(field.annotation)
        kind = "section" if inner is not None else type_of(node)
        default = f", default {show_value(node['default'])}" if "default" in node and inner is None else ""
        meaning = field.description or (first_line(inner.__doc__) if inner is not None else "")
        rows.append((name, f"{meaning.split('. ')[0].rstrip('.')} ({kind}{default})"))
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def first_line(docstring: str | None) -> str:
    """The first line of a docstring."""
    return (docstring or "").strip().splitlines()[0]


def nearest_path(keys: tuple[str, ...]) -> str:
    """The known path that an unknown one most likely meant, as a hint."""
    near = difflib.get_close_matches(".".join(keys), list(all_paths(Experiment)), 1, 0.8)
    known = next((n for n in range(len(keys), 0, -1) if field_at(Experiment, keys[:n]) is not None), 0)
    return f"did you mean {near[0]}?" if near else nearest_name(Experiment, keys[: known + 1])
