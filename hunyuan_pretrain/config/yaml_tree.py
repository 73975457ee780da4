"""YAML text -> plain data, with the file and line of every value.

Uses PyYAML's safe loader with the scalar types of YAML 1.2, because those of 1.1 surprise users: only true and false
are booleans (yes, no, on and off are text), 1e-4 and 7e12 are numbers, 010, 1:30 and 2024-01-01 are text. A duplicate
key is an error; `<<` merges sections.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from hunyuan_pretrain.config.errors import ConfigError, Problem

Keys = tuple[str | int, ...]


@dataclasses.dataclass
class Tree:
    """Plain data of one or several YAML files, and the place where each value was written."""

    source: str
    data: dict[str, Any]
    where: dict[Keys, str]

    def merge(self, other: Tree) -> None:
        """Merge `other`, which wins: mappings merge, everything else is replaced together with its positions. Where
        this tree has a list of named sections and `other` a mapping, it maps names to changes. Raises ConfigError if no
        section has such a name."""
        self._merge(self.data, other.data, other, ())

    def _merge(self, mine: dict[str, Any], theirs: dict[str, Any], other: Tree, keys: Keys) -> None:
        for name, value in theirs.items():
            here = (*keys, name)
            if isinstance(value, dict) and isinstance(mine.get(name), dict):
                self._merge(mine[name], value, other, here)
            elif isinstance(value, dict) and (names := names_of(mine.get(name))):
                self._merge_named(mine[name], names, value, other, here)
            else:
                self.put(
                    mine, name, value, here, {at: text for at, text in other.where.items() if at[: len(here)] == here}
                )

    def _merge_named(self, mine: list[Any], names: list[Any], theirs: dict[str, Any], other: Tree, keys: Keys) -> None:
        """Merge changes of named sections into the list that holds them."""
        for name, changes in theirs.items():
            here = (*keys, name)
            if name not in names or not isinstance(changes, dict):
                rule = "the base has none of this name" if name not in names else "must hold `key: value` lines"
                hint = f"it has {', '.join(map(str, names))}; a list would replace them all"
                raise ConfigError(
                    other.source, [Problem(dotted(here), Problem.NO_VALUE, rule, hint, other.where[here])]
                )
            at = (*keys, names.index(name))
            moved = {(*at, *key[len(here) :]): text for key, text in other.where.items() if key[: len(here)] == here}
            self._merge(mine[names.index(name)], changes, Tree(other.source, {}, moved), at)

    def put(self, container: Any, name: str | int, value: Any, keys: Keys, where: Mapping[Keys, str]) -> None:
        """Replace one value and the positions of everything under it."""
        container[name] = value
        self.where = {at: text for at, text in self.where.items() if at[: len(keys)] != keys} | dict(where)

    def position(self, keys: Keys) -> str:
        """Where a value was written; for a missing key, where the section around it was written."""
        return next((self.where[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.where), "")


def names_of(value: Any) -> list[Any]:
    """The names in a list of named sections; [] for anything else."""
    is_named = isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value)
    return [item["name"] for item in value] if is_named else []


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalar types of YAML 1.2, and `1_000`."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's way, copied by add_implicit_resolver


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; it quotes text that YAML 1.1 or 1.2 would read as another type."""


_MERGE = "tag:yaml.org,2002:merge"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?(?:0|[1-9][0-9_]*)[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    _letters = [letter if letter != "\0" else "" for letter in _first]
    for _reader in (Loader, Dumper):
        _reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _letters)


def parse(text: str, source: str) -> Tree:
    """YAML text of a mapping -> tree with positions. Raises ConfigError for anything else."""
    tree = Tree(source, {}, {})
    problems: list[Problem] = []
    try:
        data = yaml_value(text, tree, problems)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise file_error(
            source, f"is not valid YAML: {reason_of(error)}", where=f"{source}:{mark.line + 1}" if mark else ""
        ) from None
    if problems:
        raise ConfigError(source, problems)
    if data is None:
        raise file_error(source, "is empty", "the repository has an example: configs/dev/demo_cpu.yaml")
    if not isinstance(data, dict):
        raise file_error(source, "must hold `key: value` lines")
    tree.data = data
    return tree


def yaml_value(text: str, tree: Tree, problems: list[Problem]) -> Any:
    """One YAML document as plain data, None if the text is empty; adds positions to the tree. Raises yaml.YAMLError."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else convert(loader, node, (), tree, problems)
    except RecursionError:
        raise yaml.YAMLError("a value contains itself, or is hundreds of levels deep") from None
    finally:
        loader.dispose()


def text_or_value(text: str, tree: Tree, problems: list[Problem]) -> Any:
    """The value of an override: YAML, except that ` #` does not start a comment: `runs/a #3` is that text. Raises
    yaml.YAMLError."""
    value = yaml_value(text, tree, problems)
    loader = Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    rest = text[max((leaf.end_mark.index for leaf in leaves(node)), default=0) :] if node is not None else text
    if "#" not in rest:
        return value
    if node is None or (isinstance(node, yaml.ScalarNode) and node.style is None):
        return text.strip()
    raise yaml.YAMLError("something follows the value")


def leaves(node: yaml.Node) -> Iterator[yaml.Node]:
    """The scalars of a node."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    for part in [] if isinstance(node, yaml.ScalarNode) else node.value:
        for child in part if isinstance(part, tuple) else (part,):
            yield from leaves(child)


def convert(loader: Loader, node: yaml.Node, keys: Keys, tree: Tree, problems: list[Problem]) -> Any:
    """A YAML node as plain data. Records the position of each value and reports duplicate keys."""
    if keys:
        tree.where.setdefault(keys, f"{tree.source}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [convert(loader, item, (*keys, index), tree, problems) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        try:
            value = loader.construct_object(node)
        except ValueError:
            return node.value  # 2024-99-99 looks like a date but is not one.
        # 7e12 tokens is an integer, although YAML calls it a float.
        return int(value) if isinstance(value, float) and "e" in node.value.lower() and value.is_integer() else value
    assert isinstance(node, yaml.MappingNode)
    return convert_section(loader, node, keys, tree, problems)


def convert_section(
    loader: Loader, node: yaml.MappingNode, keys: Keys, tree: Tree, problems: list[Problem]
) -> dict[str, Any]:
    """A mapping, with the sections that `<<` merges into it. Its own keys win; among merged sections, the first that
    has the key wins."""
    found: dict[str, Any] = {}
    merged: list[yaml.Node] = []
    written: dict[str, str] = {}
    for key_node, value_node in node.value:
        is_merge = key_node.tag == _MERGE
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        here, where = (*keys, name), f"{tree.source}:{key_node.start_mark.line + 1}"
        if name in written:
            rule = f"written twice; the first is on line {written[name].rpartition(':')[2]}"
            hint = "give it a list: <<: [*first, *second]" if is_merge else "keep one"
            problems.append(Problem(dotted(here), Problem.NO_VALUE, rule, hint, where))
            continue
        written[name] = where
        if is_merge:
            merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            if not all(isinstance(one, yaml.MappingNode) for one in merged):
                rule, hint = "merges a section, or a list of sections", "such as <<: *name of a section marked &name"
                problems.append(Problem(dotted(here), Problem.NO_VALUE, rule, hint, where))
                merged = []
            continue
        tree.where[here] = where
        found[name] = convert(loader, value_node, here, tree, problems)
    for one in merged:
        other = Tree(tree.source, {}, {})
        for name, value in convert(loader, one, keys, other, problems).items():
            if name not in found:
                found[name] = value
                tree.where |= {at: text for at, text in other.where.items() if at[: len(keys) + 1] == (*keys, name)}
    return found


def file_error(source: str, rule: str, hint: str = "", where: str = "") -> ConfigError:
    """The error for a file that cannot be used at all."""
    return ConfigError(source, [Problem("file", Problem.NO_VALUE, rule, hint, where)])


def reason_of(error: yaml.YAMLError) -> str:
    """PyYAML's error message on one line."""
    reason = getattr(error, "problem", None) or " ".join(str(error).split())
    return "a tab where YAML wants spaces" if "'\\t'" in reason else reason


def dotted(keys: Keys) -> str:
    """("stages", 0, "tokens") -> "stages.0.tokens"."""
    return ".".join(str(key) for key in keys)
