"""The README names what is there: files of the tree, commands and their options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

import data_tools.cli
import hunyuan_pretrain.cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("hunyuan_pretrain", "data_tools", "launch")
GROUPS = {
    "hunyuan-pretrain": typer.main.get_command(hunyuan_pretrain.cli.app),
    "hunyuan-data": typer.main.get_command(data_tools.cli.app),
}


def section(title: str) -> str:
    """Text of a `## title` section."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def tree_paths() -> list[str]:
    """Paths of the tree: two spaces of indentation a level, folders end in /, then two spaces and what it is."""
    block = re.search(r"```\n(.*?)```", section("The tree"), re.DOTALL)
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


def shown_commands() -> list[str]:
    """Command lines of the `Use` section, one string each, backslash continuations joined, comments removed."""
    blocks = re.findall(r"```bash\n(.*?)```", section("Use"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


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


@pytest.mark.parametrize("line", shown_commands())
def test_every_shown_command_exists_with_its_options(line: str) -> None:
    words = shlex.split(line, comments=True)
    while "=" in words[0] and not words[0].startswith("-"):  # VAR=value command
        words = words[1:]
    name, *rest = words
    if name not in GROUPS:
        assert name in ("make", "sbatch", "tensorboard", "kill", "scancel", "torchrun") or (ROOT / name).exists(), name
        if name == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in rest:
            if word.startswith(("configs/", "launch/")):
                assert (ROOT / word).exists(), word
        return
    command: click.Command = GROUPS[name]
    context = click.Context(command, info_name=name)
    while isinstance(getattr(command, "commands", None), dict):
        sub = command.commands.get(rest[0])
        assert sub is not None, f"{name} has no command {rest[0]}"
        command, rest = sub, rest[1:]
        context = command.make_context(command.name, list(rest), parent=context, resilient_parsing=True)
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known
    for word in rest:
        if word.startswith("configs/"):
            assert (ROOT / word).exists(), word


def test_use_shows_every_command() -> None:
    """Every subcommand of both programs is shown once at least."""
    text = section("Use")
    for name, group in GROUPS.items():
        for sub in group.commands:  # type: ignore[attr-defined]
            assert f"{name} {sub}" in text, f"{name} {sub}"
