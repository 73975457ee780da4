"""Arguments shared by several commands, and their checks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from hunyuan_pretrain.data.errors import DataFormatError


class Executor(StrEnum):
    """datatrove's executors."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


def path_of(given: Any) -> Any:
    """Expand ~ in a path or a list of paths; refuse an empty path or a shell variable that was not expanded. Raises
    DataFormatError."""
    if isinstance(given, list | tuple):
        return [path_of(path) for path in given]
    if given is None or os.path.exists(given):
        return given
    if not given.strip():
        raise DataFormatError(f"path {given!r}: is empty; a shell variable may have no value")
    if re.search(r"\$\{?\w", given):
        raise DataFormatError(
            f"{given}: holds a variable that the shell did not expand; use double quotes or no quotes"
        )
    return os.path.expanduser(given)


Inputs = Annotated[
    list[str],
    typer.Argument(
        callback=path_of,
        metavar="INPUT...",
        help="Files of text, of JSON lines or arrays (each also as .gz, .zst, .bz2, .xz) or of parquet; folders of "
        "them, links followed; "
        "patterns; or URLs that fsspec opens. The format of a file is detected from its content.",
    ),
]
TextField = Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")]
Extensions = Annotated[
    list[str] | None,
    typer.Option(
        "--extension",
        help="File endings to read in folders instead of the default; repeatable; default: .txt .md .py .jsonl .ndjson "
        ".jsonlines .json .parquet. "
        "Other files are counted but not read.",
    ),
]
TextEndings = Annotated[
    list[str] | None,
    typer.Option(
        "--text-ending",
        help="Additional ending whose files are read as plain text, such as .rst; repeatable; 'none': no ending.",
    ),
]
MaxRejects = Annotated[
    str,
    typer.Option(help="Unreadable documents to skip before the command fails: a number, or a share such as 0.1%."),
]
Template = Annotated[
    str | None,
    typer.Option(
        help=r"Text made of several fields instead of --text-field, in single quotes: '{title}\n\n{text}'. {NAME} is "
        r"a field; "
        r"\n, \t and \\ are a line break, a tab and a backslash; {{ and }} are braces. Text files have no fields "
        r"and are read as they are.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="FIELD=VALUE",
        help="Only read records with this value, as JSON writes it (lang=zh, good=true); repeatable, any of the "
        "values given for a field matches. "
        "Records left out are counted; text files have no fields and are left out.",
    ),
]
ExecutorOptions = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE for datatrove's executor, such as partition=cpu; repeatable.")
]
Logs = Annotated[
    str | None, typer.Option(callback=path_of, help="Folder for the logs of --executor; default: OUTPUT.logs.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace earlier output of this command.")]


def extensions_of(given: list[str] | None) -> list[str]:
    """The normalised endings of --extension, or the default. Raises DataFormatError for an invalid one."""
    from data_tools.corpus import DEFAULT_EXTENSIONS

    return [_ending("--extension", extension) for extension in given or DEFAULT_EXTENSIONS]


def text_endings_of(given: list[str] | None) -> list[str]:
    """The normalised endings of --text-ending, "" for no ending. Raises DataFormatError for an invalid one."""
    return ["" if ending == "none" else _ending("--text-ending", ending) for ending in given or []]


def refuse_without_executor(options: Mapping[str, object]) -> None:
    """Raise DataFormatError if one of `options`, by name, is given; for commands run without --executor."""
    for option, value in options.items():
        if value is not None:
            raise DataFormatError(f"{option}: has no effect without --executor; give both or neither")


def _ending(option: str, given: str) -> str:
    from data_tools.formats import COMPRESSED_ENDINGS

    ending = given.lower() if given.startswith(".") else f".{given.lower()}"
    if ending in COMPRESSED_ENDINGS or any(ending.endswith(compressed) for compressed in COMPRESSED_ENDINGS):
        raise DataFormatError(
            f"{option} {given}: give the ending without the compression suffix, such as {ending.split('.')[1]}"
        )
    if not re.fullmatch(r"\.[^\s./*?\[\],;]+", ending):
        raise DataFormatError(f"{option} {given}: not an ending; give one such as .rst, and repeat {option} for more")
    return ending
