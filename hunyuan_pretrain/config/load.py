"""YAML file + `base:` parents + dotted overrides -> frozen, checked `Experiment`.

Every problem of a file is reported at once, with its dotted path, the file and line it came from, and the nearest legal
spelling. YAML is read by PyYAML's safe loader, with two differences: a key written twice is an error, and 1e-4 is a number
(YAML 1.1 reads it as text).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.schema import ConfigError, Experiment, ModelConfig, Problem, Section, show_value

Keys = tuple[str | int, ...]
SectionT = TypeVar("SectionT", bound=Section)


class ArchitectureFile(Section):
    """A YAML file that describes a model and no run: what configs/model/ holds."""

    model: ModelConfig


def load_experiment(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Experiment:
    """Read an experiment file and check it.

    `overrides`: dotted assignments such as "optimizer.lr=3e-4" or "stages.0.tokens=1000"; the values are YAML. They win over
    the file, which wins over its `base` files (later ones over earlier ones); mappings merge, lists are replaced.
    `world_size`: ranks of the job where they are known, for the rules that need them.
    Raises ConfigError with every problem: a missing file, invalid YAML, unknown keys, wrong types, violated rules.
    """
    tree = read(path, overrides)
    if set(tree.data) == {"model"}:
        hint = "make it the `base:` of an experiment, as configs/dev/demo_cpu.yaml does"
        raise file_error(tree.source, "holds only an architecture (model:)", hint)
    experiment = validate(Experiment, tree)
    with_positions(tree, rules.find_problems(experiment, world_size))
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
    """The experiment as YAML, every default filled in and no `base`; it loads back equal."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=140)


@dataclasses.dataclass
class Tree:
    """Plain data of one or several YAML files, and where each value of it was written."""

    source: str
    data: dict[str, Any]
    where: dict[Keys, str]

    def merge(self, other: Tree) -> None:
        """Let `other` win: mappings merge, everything else is replaced together with its positions."""
        self._merge(self.data, other.data, other, ())

    def _merge(self, mine: dict[str, Any], theirs: dict[str, Any], other: Tree, keys: Keys) -> None:
        for name, value in theirs.items():
            here = (*keys, name)
            if isinstance(value, dict) and isinstance(mine.get(name), dict):
                self._merge(mine[name], value, other, here)
            else:
                self.put(mine, name, value, here, {at: text for at, text in other.where.items() if at[: len(here)] == here})

    def put(self, container: Any, name: str | int, value: Any, keys: Keys, where: Mapping[Keys, str]) -> None:
        """Replace one value and the positions of everything under it."""
        container[name] = value
        self.where = {at: text for at, text in self.where.items() if at[: len(keys)] != keys} | dict(where)

    def position(self, keys: Keys) -> str:
        """Where the value was written; for a missing key, where the section around it was."""
        return next((self.where[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.where), "")


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, that also reads 1e-4 and 7e12 as numbers."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """File, bases and overrides as one tree, not yet validated; raises ConfigError."""
    tree = read_file(Path(path), bases_allowed=True)
    problems = [problem for override in overrides for problem in apply_override(tree, override)]
    if problems:
        raise ConfigError(tree.source, problems)
    return tree


def read_file(path: Path, bases_allowed: bool) -> Tree:
    """One file and, where they are allowed, its bases; raises ConfigError."""
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
    if not bases_allowed:
        rule = "a base file cannot have a base of its own"
        raise ConfigError(source, [Problem("base", base, rule, "list both in the experiment file", line)])
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(source, [Problem("base", base, "must be a path or a list of paths, relative to this file", where=line)])
    merged = Tree(source, {}, {})
    for name in names:
        parent = path.parent / name
        if not parent.is_file():
            raise ConfigError(source, [Problem("base", name, f"{parent} does not exist", nearest_file(parent), line)])
        merged.merge(read_file(parent, bases_allowed=False))
    merged.merge(tree)
    return merged


def parse(text: str, source: str) -> Tree:
    """YAML text of a mapping -> tree with positions; raises ConfigError for anything else."""
    tree = Tree(source, {}, {})
    problems: list[Problem] = []
    try:
        data = yaml_value(text, tree, problems)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise file_error(source, f"is not valid YAML: {reason_of(error)}", where=f"{source}:{mark.line + 1}" if mark else "") from None
    if problems:
        raise ConfigError(source, problems)
    if data is None:
        raise file_error(source, "is empty", "see configs/dev/demo_cpu.yaml for an example")
    if not isinstance(data, dict):
        raise file_error(source, "must hold `key: value` lines")
    tree.data = data
    return tree


def yaml_value(text: str, tree: Tree, problems: list[Problem]) -> Any:
    """One YAML document as plain data, None where there is none; positions go into the tree. Raises yaml.YAMLError."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else convert(loader, node, (), tree, problems)
    except RecursionError:
        raise yaml.YAMLError("a value contains itself") from None
    finally:
        loader.dispose()


def convert(loader: Loader, node: yaml.Node, keys: Keys, tree: Tree, problems: list[Problem]) -> Any:
    """A YAML node as plain data; notes the position of each value and reports keys written twice."""
    if keys:
        tree.where.setdefault(keys, f"{tree.source}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [convert(loader, item, (*keys, index), tree, problems) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        try:
            value = loader.construct_object(node)
        except ValueError:
            return node.value  # 2024-99-99 looks like a date and is none.
        # 7e12 tokens is a whole number however it is written.
        return int(value) if isinstance(value, float) and "e" in node.value.lower() and value.is_integer() else value
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        here, where = (*keys, name), f"{tree.source}:{key_node.start_mark.line + 1}"
        if name in found:
            rule = f"written twice; the first is in line {tree.where[here].rpartition(':')[2]}"
            problems.append(Problem(dotted(here), Problem.NO_VALUE, rule, "keep one", where))
            continue
        tree.where[here] = where
        found[name] = convert(loader, value_node, here, tree, problems)
    return found


def apply_override(tree: Tree, override: str) -> Iterator[Problem]:
    """Put "a.b.0.c=value" into the tree; yields the problem where it cannot be put."""
    path, equals, text = override.partition("=")
    path, where = path.strip(), f"override {override!r}"
    if not equals or "" in path.split("."):
        yield Problem(override, Problem.NO_VALUE, "is not an override", "write dotted.path=value, such as optimizer.lr=3e-4")
        return
    problems: list[Problem] = []
    try:
        value = yaml_value(text, Tree(where, {}, {}), problems)
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
            if not name.isdecimal() or int(name) >= len(container):
                indices = f"use 0 to {len(container) - 1}" if len(container) > 1 else "use 0"
                yield Problem(path, value, f"{dotted(keys)} is a list of {len(container)}, {name!r} is not in it", indices, where)
                return
            key = int(name)
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


def file_error(source: str, rule: str, hint: str = "", where: str = "") -> ConfigError:
    """The error of a file that cannot be used at all."""
    return ConfigError(source, [Problem("file", Problem.NO_VALUE, rule, hint, where)])


def reason_of(error: yaml.YAMLError) -> str:
    """What PyYAML found wrong, on one line."""
    return getattr(error, "problem", None) or " ".join(str(error).split())


def validate(section: type[SectionT], tree: Tree) -> SectionT:
    """Plain data -> frozen section; raises ConfigError with unknown keys, missing keys and wrong types."""
    # Through JSON, in pydantic's strict mode: a YAML list is a tuple there and 1 a float, but "64" and true are not integers.
    try:
        return section.model_validate_json(json.dumps(tree.data, default=str), strict=True)
    except ValidationError as error:
        items = error.errors(include_url=False)
    # A list whose items are wrong is also reported as too short; only an empty list really is.
    items = [item for item in items if not (item["type"] == "too_short" and item["input"])]
    problems = [problem_of(item, section, tree) for item in items]
    raise ConfigError(tree.source, problems)


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
        legal = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        near = difflib.get_close_matches(str(item["input"]), legal, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else ""
        return Problem(path, item["input"], f"must be {' or '.join(legal)}", hint, where)
    if item["type"] == "string_type" and isinstance(item["input"], (int, float)):
        hints = [f'quote it: "{show_value(item["input"])}"']
    known = {"model_type": "must be a section of `key: value` lines", "tuple_type": "must be a list", "too_short": "must not be empty"}
    rule = known.get(item["type"]) or re.sub(r"^Input should be", "must be", item["msg"])
    return Problem(path, item["input"], rule, "; ".join(hints), where)


def with_positions(tree: Tree, problems: Sequence[Problem]) -> None:
    """Raise violated rules as one ConfigError that names the line of each value."""
    if not problems:
        return
    placed = []
    for problem in problems:
        keys: Keys = tuple(int(name) if name.isdecimal() else name for name in problem.path.split("."))
        placed.append(dataclasses.replace(problem, where=tree.where.get(keys, "")))
    raise ConfigError(tree.source, placed)


def dotted(keys: Keys) -> str:
    """("stages", 0, "tokens") -> "stages.0.tokens"."""
    return ".".join(str(key) for key in keys)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's type holds: Section itself, tuple[Section, ...] or Section | None."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def field_at(section: type[BaseModel], keys: Keys) -> Any:
    """The pydantic field of a dotted path, None where there is none; list indices are skipped."""
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
    """The known name that an unknown key most likely meant, as a hint."""
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
    """A file of the same folder with a similar name, as a hint."""
    names = sorted(item.name for item in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return f"did you mean {path.parent / near[0]}?" if near else ""
