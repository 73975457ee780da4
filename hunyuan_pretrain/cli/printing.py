"""Printing that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hunyuan_pretrain.config.errors import Problem


def print_table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of text under a title. Consecutive rows with the same first column show it only once."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    previous = None
    for row in rows:
        table.add_row("" if row[0] == previous else row[0], *row[1:])
        previous = row[0]
    # A pipe or a log has no width: do not cut or wrap there.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print()


def print_warnings(warnings: list[Problem]) -> None:
    """Print warnings about settings that are only partly effective, to stderr."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
