"""README.md and docs/ name only what exists: files, functions, settings, commands with their options, and each other.

docs/log.md is history: its links are checked, but not the files and commands of its day.
"""

from __future__ import annotations

import ast
import doctest
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

import data_tools.cli
import hunyuan_pretrain.cli
from hunyuan_pretrain.config.load import field_at
from hunyuan_pretrain.config.schema import Experiment

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LOG = DOCS / "log.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs/README.md", *sorted(DOCS.rglob("*.md"))]
PRESENT = [page for page in PAGES if page != LOG]
USE = [ROOT / "README.md", *sorted((DOCS / "guide").glob("*.md"))]
PACKAGES = ("hunyuan_pretrain", "data_tools", "launch")
GROUPS: dict[str, Any] = {
    "hunyuan-pretrain": typer.main.get_command(hunyuan_pretrain.cli.app),
    "hunyuan-data": typer.main.get_command(data_tools.cli.app),
}
OTHER_PROGRAMS = (
    "apptainer",
    "docker",
    "make",
    "pip",
    "python",
    "python3.12",
    "curl",
    "install",
    "sbatch",
    "scancel",
    "source",
    "tensorboard",
    "torchrun",
)
FILE = r"(?:hunyuan_pretrain|data_tools|launch|configs|examples|tests|docs|\.ci)/[\w./-]+"
SECTIONS = tuple(
    name for name, field in Experiment.model_fields.items() if name not in ("name", "run_dir", "seed", "tokenizer")
)
STAGE_NAMES = ("warmup", "decay", "anneal")
README_LINES = 120


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without fenced blocks."""
    return re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def test_readme_is_short() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= README_LINES


# --- the tree of docs/architecture.md ---------------------------------------------------------------------------------


def tree_paths() -> list[str]:
    """Paths of the tree: two spaces of indentation per level; folders end in /; the description follows after two
    spaces."""
    block = re.search(r"^## The tree\n+```\n(.*?)```", read(DOCS / "architecture.md"), re.MULTILINE | re.DOTALL)
    assert block
    paths: list[str] = []
    parents: list[str] = []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        for name in line.split("  #")[0].split():
            paths.append("".join(parents[:depth]) + name)
            if name.endswith("/"):
                parents[depth:] = [name]
    return paths


def test_every_path_of_the_tree_exists() -> None:
    missing = [path for path in tree_paths() if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_a_package_is_in_the_tree(package: str) -> None:
    named = set(tree_paths())
    files = [
        path
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".sh", ".sbatch") and path.name != "__init__.py"
    ]
    missing = [name for path in files if (name := path.relative_to(ROOT).as_posix()) not in named]
    assert not missing


# --- commands ---------------------------------------------------------------------------------------------------------


def command_lines(pages: list[Path]) -> Iterator[tuple[str, str]]:
    """(page, command line) of the bash blocks, with continuations joined and `a && b` split in two."""
    for page in pages:
        for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield from ((name_of(page), part) for part in line.split(" && "))


def inline_commands(pages: list[Path]) -> Iterator[tuple[str, str]]:
    """(page, command) of inline code that calls one of the programs with a subcommand, or make with a target."""
    for page in pages:
        for span in spans(page):
            if re.match(r"(hunyuan-pretrain|hunyuan-data|make) [a-z]", span):
                yield name_of(page), span


@pytest.mark.parametrize(("page", "line"), [*command_lines(PRESENT), *inline_commands(PRESENT)])
def test_every_shown_command_exists_with_its_options(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    while "=" in words[0] and not words[0].startswith("-"):  # VAR=value command
        words = words[1:]
    name, *rest = words
    for word in rest:
        if word.startswith(("configs/", "examples/", "launch/", "tests/")):
            assert (ROOT / word).exists(), word
    if name not in GROUPS:
        assert name in OTHER_PROGRAMS or (ROOT / name).exists(), name
        if name == "make":
            assert re.search(rf"^{rest[0]}:", read(ROOT / "Makefile"), re.MULTILINE), f"make has no target {rest[0]}"
        return
    command: click.Command = GROUPS[name]
    context = click.Context(command, info_name=name)
    while isinstance(getattr(command, "commands", None), dict) and rest:
        sub = command.commands.get(rest[0])  # type: ignore[attr-defined]
        assert sub is not None, f"{name} has no command {rest[0]}"
        command, rest = sub, rest[1:]
        context = command.make_context(command.name, list(rest), parent=context, resilient_parsing=True)
    known = {option for parameter in command.params for option in parameter.opts}
    rest = rest[: rest.index("--")] if "--" in rest else rest  # what follows is for another program
    assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known


def test_the_guide_shows_every_command() -> None:
    """Every subcommand of both programs occurs in README.md or the guide."""
    text = "\n".join(map(read, USE))
    for name, group in GROUPS.items():
        for sub in group.commands:
            assert f"{name} {sub}" in text, f"{name} {sub}"


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_every_named_file_exists(page: Path) -> None:
    named = {found for span in spans(page) for found in re.findall(rf"(?<![\w/]){FILE}", span) if "NAME" not in found}
    missing = sorted(path for path in named if not (ROOT / path.rstrip(".,:")).exists())
    assert not missing


def names_in(path: Path) -> set[str]:
    """Functions, classes, methods (Class.method) and constants that a module defines."""
    found: set[str] = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_every_named_function_is_in_its_file(page: Path) -> None:
    """Wherever a page says `name` in `file.py`, or `name` (`file.py`)."""
    pairs = re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?` (?:in |\()`([\w./]+\.py)`", re.sub(r"\s+", " ", prose(page)))
    missing = [
        f"{file}: {name}" for name, file in pairs if not (ROOT / file).exists() or name not in names_in(ROOT / file)
    ]
    assert not missing


def settings_named_in(page: Path) -> set[str]:
    """Dotted settings in inline code, and the keys of YAML blocks that are parts of an experiment."""
    pattern = rf"(?<![\w./])(?:{'|'.join(SECTIONS)})(?:\.[a-z0-9_]+)+(?![\w./(])"
    return {found for span in spans(page) for found in re.findall(pattern, span)}


def keys_in(path: str) -> tuple[str | int, ...]:
    """The keys of a dotted path. The name of a stage stands for its number."""
    keys = [int(key) if key.isdecimal() else key for key in path.split(".")]
    if keys[0] == "stages" and keys[1:2] and keys[1] in STAGE_NAMES:
        keys[1] = STAGE_NAMES.index(keys[1])
    return tuple(keys)


def keys_of(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of a tree; items of lists are numbered."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if not isinstance(value, list):
            yield f"{prefix}{key}"
        yield from keys_of(inner, f"{prefix}{key}.")


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_every_named_setting_exists(page: Path) -> None:
    named = settings_named_in(page)
    for block in blocks(page, "yaml"):
        named |= {key for key in keys_of(yaml.safe_load(block)) if key != "base"}
    unknown = sorted(key for key in named if field_at(Experiment, keys_in(key)) is None)
    assert not unknown


@pytest.mark.parametrize("page", [page for page in PRESENT if "\n::: " in read(page)], ids=name_of)
def test_every_module_of_the_reference_exists(page: Path) -> None:
    modules = re.findall(r"^::: ([\w.]+)$", read(page), re.MULTILINE)
    paths = {module: ROOT / module.replace(".", "/") for module in modules}
    assert not [
        name
        for name, path in paths.items()
        if not path.with_suffix(".py").exists() and not (path / "__init__.py").exists()
    ]


@pytest.mark.parametrize("page", [page for page in PRESENT if blocks(page, "pycon")], ids=name_of)
def test_examples_print_what_the_page_shows(page: Path) -> None:
    lines = "".join(blocks(page, "pycon"))
    example = doctest.DocTestParser().get_doctest(lines, {}, name_of(page), str(page), 0)
    assert doctest.DocTestRunner().run(example).failed == 0


# --- links ------------------------------------------------------------------------------------------------------------


def slugs(page: Path) -> set[str]:
    """Anchors of the headings of a page, as Markdown's toc makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[`*]", "", title).lower() for title in titles)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip()) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_resolves(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+://", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        if not found.exists() or (anchor and found.suffix == ".md" and anchor not in slugs(found)):
            broken.append(target)
    assert not broken
