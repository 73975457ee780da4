"""What the menus of both commands share: -h as well as --help, --version, and help text that the terminal wraps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

HELP = {"help_option_names": ["-h", "--help"]}
"""Context settings of a Typer app."""


def add_commands(app: typer.Typer, *commands: Callable[..., Any], name: str | None = None) -> None:
    """Add functions to `app` as commands under their own names, or a single one under `name`.

    Their docstrings become the help, with each paragraph joined into one line: typer keeps the line breaks of the
    source, which do not fit the reader's terminal.
    """
    for command in commands:
        paragraphs = (inspect.getdoc(command) or "").split("\n\n")
        app.command(name, help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))(command)


def add_version(app: typer.Typer) -> None:
    """Give `app` the option --version."""
    app.callback()(_options)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"hunyuan-pretrain {version('hunyuan-pretrain')}")
        raise typer.Exit


def _options(
    asked: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
