"""The JSON schema of an experiment file, with which editors complete and check YAML while it is written.

It describes files as they are written, before bases are merged and values expanded: nothing is required outside lists,
because a base may have it; token counts may have a suffix; a list of named sections may be a mapping that changes those
of a base. Rules over several settings are not in it: `hunyuan-pretrain plan` checks them. Draft 7, which every editor
knows.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from hunyuan_pretrain.config.describe import property_of
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import COUNT_PATTERN, SUFFIX_RULE, section_of

__all__ = ["json_schema"]

_BASE = {
    "description": "Parent file, or a list of them, later ones winning; relative to this file. This file wins over it: "
    "mappings merge, lists are replaced. A mapping of names to changes changes single sections of a list, such as "
    "stages.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
}


def json_schema() -> dict[str, Any]:
    """The schema of a file that `config.load` reads: an experiment, an architecture, or a base of one."""
    root = _section(Experiment, is_whole=False)
    root["properties"] = {"base": _BASE, **root["properties"]}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "hunyuan-pretrain experiment",
        "$comment": "Written by `hunyuan-pretrain config schema`.",
        **root,
    }


def _section(section: type[BaseModel], *, is_whole: bool) -> dict[str, Any]:
    """A section; `is_whole`: with everything that it requires, since no base can supply it."""
    written = section.model_json_schema()
    properties = {name: _setting(section, written, name) for name in section.model_fields}
    made = {"type": "object", "description": written["description"], "additionalProperties": False}
    return {**made, "properties": properties} | ({"required": written["required"]} if is_whole else {})


def _setting(section: type[BaseModel], written: dict[str, Any], name: str) -> dict[str, Any]:
    """One setting, or the section or list of sections that it holds."""
    inner = section_of(section.model_fields[name].annotation)
    found = property_of(written, (name,))
    if inner is None:
        return {"description": _described(found), **_value(found)}
    if any(choice.get("type") == "null" for choice in found.get("anyOf", ())):
        choices = [_section(inner, is_whole=False), {"type": "null"}]
        return {"description": found["description"], "anyOf": choices, "default": None}
    if found.get("type") != "array":
        return _section(inner, is_whole=False)
    items = {"type": "array", "items": _section(inner, is_whole=True)}
    choices = [items | {key: found[key] for key in ("minItems",) if key in found}]
    if "name" in inner.model_fields:
        choices.append({"type": "object", "additionalProperties": _section(inner, is_whole=False)})
    return {"description": found["description"], "anyOf": choices} if len(choices) > 1 else choices[0]


def _described(found: dict[str, Any]) -> str:
    """The meaning of a setting with its unit and a typical value."""
    unit = f" Unit: {found['unit']}." if found.get("unit") else ""
    typical = f" Typical: {found['typical']}." if found.get("typical") else ""
    suffixes = f" {SUFFIX_RULE}." if _is_count(found) else ""
    paths = " ~ and $NAME are expanded; relative to the working directory." if found.get("is_path") else ""
    return found["description"] + unit + typical + suffixes + paths


def _value(found: dict[str, Any]) -> dict[str, Any]:
    """The legal values of a setting, and its default."""
    kept = {key: value for key, value in found.items() if key not in ("description", "title", "unit", "typical")}
    kept.pop("is_path", None)
    default = {"default": kept.pop("default")} if "default" in kept else {}
    if "prefixItems" in kept.get("items", {}):  # draft 7 spells it `items`
        pair = dict(kept["items"])
        kept["items"] = {**pair, "items": pair.pop("prefixItems")}
        kept["items"].pop("prefixItems")
    if _is_count(found):
        kept = {"anyOf": [*kept.get("anyOf", [kept]), {"type": "string", "pattern": COUNT_PATTERN}]}
    return kept | default


def _is_count(found: dict[str, Any]) -> bool:
    return bool(found.get("unit") == "tokens")
