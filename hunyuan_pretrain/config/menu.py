"""What the menus of both commands have alike: -h beside --help, --version, and help that the terminal wraps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

HELP = {"help_option_names": ["-h", "--help"]}
"""Settings of a command line's context."""


def add_commands(app: typer.Typer, *commands: Callable[..., Any], name: str | None = None) -> None:
    """Make functions commands of `app`, under their own names, or one under `name`.

    Their docstrings are their help, each paragraph in one line: typer keeps breaks of a line, which are those of the
    source and not of the reader's terminal.
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
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say the version and exit.")
    ] = False,
) -> None:
    pass
