"""YAML file + `base:` parents + dotted overrides -> frozen, checked `Experiment`.

All problems of a file are reported at once, each with its dotted path, file, line and the nearest legal spelling.
yaml_tree.py reads the YAML; values.py expands values such as 10B and ~/runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.errors import ConfigError, Problem, show_value
from hunyuan_pretrain.config.schema import Experiment, ModelConfig, Section
from hunyuan_pretrain.config.stage_lengths import with_tokens
from hunyuan_pretrain.config.values import SUFFIX_RULE, change_paths, expand, fill_in, number_hint, section_of
from hunyuan_pretrain.config.yaml_tree import (
    Dumper,
    Keys,
    Tree,
    dotted,
    file_error,
    names_of,
    parse,
    reason_of,
    text_or_value,
)

__all__ = ["dump_resolved", "load_experiment", "load_model"]

SectionT = TypeVar("SectionT", bound=Section)


QUOTED = r"'([^']*)'"


class ArchitectureFile(Section):
    """A YAML file that describes only a model, like those in configs/model/."""

    model: ModelConfig


def load_experiment(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Experiment:
    """Read an experiment file and check it.

    `overrides`: dotted assignments such as "optimizer.lr=3e-4" or "stages.decay.tokens=1000"; the values are YAML. They
    win over the file, the file over its `base` files (later ones over earlier ones), and those over theirs. Mappings
    merge; lists are replaced, except that a mapping over a list of named sections changes those that it names.
    `world_size`: ranks of the job if known, for the rules that need them. A stage's epochs become tokens, for which the
    manifests of its data are read.
    Raises ConfigError with every problem: a missing file, invalid YAML, unknown keys, wrong types, violated rules.
    """
    tree = read(path, overrides)
    if set(tree.data) == {"model"}:
        hint = "make it the `base:` of an experiment, as configs/dev/demo_cpu.yaml does"
        raise file_error(tree.source, "holds only an architecture (model:)", hint)
    experiment, without_length = with_tokens(validate(Experiment, tree))
    with_positions(tree, without_length or rules.find_problems(experiment, world_size))
    return experiment


def load_model(path: str | Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """Read the architecture of an architecture file (only `model:`) or of an experiment file; raises ConfigError."""
    tree = read(path, overrides)
    if set(tree.data) - {"model"}:
        return load_experiment(path, overrides).model
    model = validate(ArchitectureFile, tree).model
    with_positions(tree, [problem for rule in rules.MODEL_RULES for problem in rule(model)])
    return model


def dump_resolved(experiment: Experiment) -> str:
    """The experiment as YAML with every default filled in and without `base`; loading it returns an equal one."""
    fields = change_paths(Experiment, experiment.model_dump(mode="json"), lambda path: path.replace("$", "$$"))
    text: str = yaml.dump(fields, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=140)
    return text


def read(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """File, bases and overrides as one tree, not yet validated; raises ConfigError."""
    tree = read_file(Path(path), ())
    problems = [problem for override in overrides for problem in apply_override(tree, override)]
    if problems:
        raise ConfigError(tree.source, problems)
    return tree


def read_file(path: Path, chain: tuple[Path, ...]) -> Tree:
    """One file merged with its bases, recursively. `chain`: the files that led here through `base`. Raises
    ConfigError."""
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise file_error(source, f"cannot be read: {error.strerror}", nearest_file(path)) from None
    except UnicodeDecodeError as error:
        raise file_error(source, f"is not UTF-8 text: {error.reason}") from None
    tree = parse(text, source)
    if "base" not in tree.data:
        return tree
    base, line = tree.data.pop("base"), tree.where[("base",)]
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            source, [Problem("base", base, "must be a path or a list of paths, relative to this file", where=line)]
        )
    merged = Tree(source, {}, {})
    for name in names:
        merged.merge(read_file(base_path(path, name, (*chain, path), line), (*chain, path)))
    merged.merge(tree)
    return merged


def base_path(path: Path, name: str, chain: tuple[Path, ...], line: str) -> Path:
    """The file that `base: name` in `path` refers to. Raises ConfigError if it does not exist, or if it is already in
    the chain."""
    try:
        parent = path.parent / expand(name)
    except ValueError as error:
        raise ConfigError(
            str(path), [Problem("base", name, str(error), "set it, or write $$ for a dollar", line)]
        ) from None
    if not parent.is_file():
        raise ConfigError(str(path), [Problem("base", name, f"{parent} does not exist", nearest_file(parent), line)])
    known = [one.resolve() for one in chain]
    if parent.resolve() in known:
        circle = " -> ".join(map(str, [*chain[known.index(parent.resolve()) :], parent]))
        raise ConfigError(str(path), [Problem("base", name, f"is circular: {circle}", "remove one of them", line)])
    return parent


def apply_override(tree: Tree, override: str) -> Iterator[Problem]:
    """Apply "a.b.0.c=value" to the tree; yields the problem if that is not possible."""
    path, equals, text = override.partition("=")
    path, where = path.strip(), f"override {override!r}"
    if not equals or "" in path.split("."):
        yield Problem(
            override, Problem.NO_VALUE, "is not an override", "write dotted.path=value, such as optimizer.lr=3e-4"
        )
        return
    problems: list[Problem] = []
    try:
        value = text_or_value(text, Tree(where, {}, {}), problems)
    except yaml.YAMLError as error:
        yield Problem(path, text, f"is not valid YAML: {reason_of(error)}", "quote the value", where)
        return
    if problems:
        yield from (dataclasses.replace(problem, where=where) for problem in problems)
        return
    container: Any = tree.data
    keys: Keys = ()
    *parents, last = path.split(".")
    for name in [*parents, last]:
        key: str | int = name
        if isinstance(container, list):
            names = names_of(container)
            if name not in names and (not name.isdecimal() or int(name) >= len(container)):
                hint = f"use 0 to {len(container) - 1}" if len(container) > 1 else "use 0"
                hint += f", or {', '.join(map(str, names))}" if names else ""
                yield Problem(
                    path, value, f"{dotted(keys)} is a list of {len(container)}, {name!r} is not in it", hint, where
                )
                return
            key = names.index(name) if name in names else int(name)
        elif not isinstance(container, dict):
            yield Problem(path, value, f"{dotted(keys)} is {show_value(container)}, not a section", where=where)
            return
        keys = (*keys, key)
        if len(keys) > len(parents):
            tree.put(container, key, value, keys, {keys: where})
            return
        if isinstance(container, dict) and container.get(name) is None:
            tree.put(container, name, {}, keys, {keys: where})
        container = container[key]


def validate(section: type[SectionT], tree: Tree) -> SectionT:
    """Plain data -> frozen section. Raises ConfigError with all unknown keys, missing keys, wrong types and paths that
    cannot be expanded."""
    problems = fill_in(section, tree)
    # Through JSON in pydantic's strict mode: it accepts a YAML list as a tuple and 1 as a float, but not "64" or true
    # as an integer.
    try:
        made = section.model_validate_json(json.dumps(tree.data, default=str), strict=True)
    except ValidationError as error:
        items = error.errors(include_url=False)
        # pydantic also reports a list with wrong items as too short; only an empty list is.
        items = [item for item in items if not (item["type"] == "too_short" and item["input"])]
        raise ConfigError(
            tree.source, [*(problem_of(item, section, tree) for item in one_for_each_value(items)), *problems]
        ) from None
    if problems:
        raise ConfigError(tree.source, problems)
    return made


def one_for_each_value(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """pydantic's errors, of a number that may also be a word only one: it reports every member of a union, with the
    name of the member behind the key."""
    found: dict[Keys, dict[str, Any]] = {}
    for item in items:
        keys: Keys = item["loc"]
        is_member = item["type"] != "extra_forbidden" and bool(keys) and re.search(r"[\[-]", str(keys[-1]))
        keys = keys[:-1] if is_member else keys
        if keys not in found:
            found[keys] = {**item, "loc": keys}
        elif item["type"] == "literal_error":
            found[keys]["msg"] += f" or {' or '.join(re.findall(QUOTED, item['ctx']['expected']))}"
    return list(found.values())


def problem_of(item: Mapping[str, Any], section: type[Section], tree: Tree) -> Problem:
    """One pydantic error in this project's words."""
    keys: Keys = item["loc"]
    path, where = dotted(keys), tree.position(keys)
    field = field_at(section, keys)
    if item["type"] == "extra_forbidden":
        return Problem(path, item["input"], "unknown key", nearest_name(section, keys), where)
    typical = (field.json_schema_extra or {}).get("typical") if field is not None else ""
    hints = [f"typical: {typical}"] if typical else []
    if item["type"] == "missing":
        meaning = field.description.split(". ")[0].rstrip(".") if field is not None and field.description else ""
        return Problem(path, Problem.NO_VALUE, "missing", "; ".join([meaning] * bool(meaning) + hints), where)
    if item["type"] == "literal_error":
        legal = re.findall(QUOTED, item["ctx"]["expected"])
        near = difflib.get_close_matches(str(item["input"]), legal, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else ""
        return Problem(path, item["input"], f"must be {' or '.join(legal)}", hint, where)
    if isinstance(item["input"], str) and item["type"] in (
        "int_type",
        "int_parsing",
        "float_type",
        "float_parsing",
        "bool_type",
    ):
        is_tokens = field is not None and (field.json_schema_extra or {}).get("unit") == "tokens"
        meant = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}.get(
            item["input"].lower()
        )
        hint = (
            (f"write {meant}" if meant else "")
            if item["type"] == "bool_type"
            else number_hint(item["input"], is_tokens)
        )
        hints = [hint] if hint else [*hints, *([SUFFIX_RULE] if is_tokens else [])]
    if item["type"] == "int_type" and isinstance(item["input"], float) and item["input"].is_integer():
        hints = [f"write {item['input']:.0f}, without a decimal point"]
    if item["type"] == "tuple_type" and isinstance(item["input"], dict):
        hints = ["a mapping changes a list that a base has, and no base has this one"]
    if item["type"] == "string_type" and isinstance(item["input"], (int, float)):
        hints = [f'quote it: "{show_value(item["input"])}"']
    known = {
        "model_type": "must be a section of `key: value` lines",
        "tuple_type": "must be a list",
        "too_short": "must not be empty",
    }
    rule = known.get(item["type"]) or re.sub(r"^Input should be", "must be", item["msg"])
    return Problem(path, item["input"], rule, "; ".join(hints), where)


def with_positions(tree: Tree, problems: Sequence[Problem]) -> None:
    """Raise ConfigError for violated rules, if any, with the line of each value."""
    if not problems:
        return
    placed = []
    for problem in problems:
        keys: Keys = tuple(int(name) if name.isdecimal() else name for name in problem.path.split("."))
        placed.append(dataclasses.replace(problem, where=tree.where.get(keys, "")))
    raise ConfigError(tree.source, placed)


def field_at(section: type[BaseModel], keys: Keys) -> Any:
    """The pydantic field of a dotted path, or None; list indices are skipped."""
    field, inside = None, section
    for name in [key for key in keys if isinstance(key, str)]:
        if inside is None or name not in inside.model_fields:
            return None
        field = inside.model_fields[name]
        inside = section_of(field.annotation)  # type: ignore[assignment]
    return field


def all_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted path of the schema, sections before their fields, without list indices."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = section_of(field.annotation)
        if inner is not None:
            yield from all_paths(inner, f"{prefix}{name}.")


def nearest_name(section: type[BaseModel], keys: Keys) -> str:
    """A hint that names the setting which an unknown key most likely meant."""
    *outer, last = [key for key in keys if isinstance(key, str)]
    parent = field_at(section, tuple(outer)) if outer else None
    siblings = list((section_of(parent.annotation) if parent is not None else section).model_fields)  # type: ignore[union-attr]
    prefix = "".join(f"{key}." for key in keys[:-1])
    paths = list(all_paths(section))
    elsewhere = [path for path in paths if path.rpartition(".")[2] == last]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    containing = [name for name in siblings if last in name.split("_")]
    near = containing or difflib.get_close_matches(last, siblings, 1)
    if near:
        return f"did you mean {' or '.join(prefix + name for name in near[:3])}?"
    anywhere = difflib.get_close_matches(last, [path.rpartition(".")[2] for path in paths], 1)
    if anywhere:
        return f"did you mean {next(path for path in paths if path.rpartition('.')[2] == anywhere[0])}?"
    return f"known here: {', '.join(siblings)}"


def nearest_file(path: Path) -> str:
    """A hint that names a YAML file with a similar name in the same folder."""
    names = sorted(item.name for item in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return f"did you mean {path.parent / near[0]}?" if near else ""
