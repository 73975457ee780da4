"""Arguments that several commands take, and what is wrong with those given."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

import typer

from hunyuan_pretrain.data.errors import DataFormatError


def path_of(given: Any) -> Any:
    """A path, or several, with ~ for the home folder; what a shell would have replaced and did not is refused."""
    if isinstance(given, list | tuple):
        return [path_of(path) for path in given]
    if given is None or os.path.exists(given):
        return given
    if not given.strip():
        raise DataFormatError(f"path {given!r}: is empty; a variable of the shell may have no value")
    if re.search(r"\$\{?\w", given):
        raise DataFormatError(
            f"{given}: holds a variable that the shell did not replace; write it in double quotes or without any"
        )
    return os.path.expanduser(given)


Inputs = Annotated[
    list[str],
    typer.Argument(
        callback=path_of,
        metavar="INPUT...",
        help="Files of text, of JSON lines or arrays (each also as .gz, .zst, .bz2, .xz) or of parquet; folders of "
        "them, links followed; "
        "patterns; or URLs that fsspec opens. What a file holds is told by its content.",
    ),
]
TextField = Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")]
Extensions = Annotated[
    list[str] | None,
    typer.Option(
        "--extension",
        help="Endings read in folders in place of the default, repeatable; default .txt .md .py .jsonl .ndjson "
        ".jsonlines .json .parquet. "
        "Others are counted and not read.",
    ),
]
TextEndings = Annotated[
    list[str] | None,
    typer.Option(
        "--text-ending",
        help="One more ending whose files are read as plain text, such as .rst; repeatable; 'none': no ending.",
    ),
]
MaxRejects = Annotated[
    str,
    typer.Option(help="Unreadable documents to leave out before the command fails: a number, or a share such as 0.1%."),
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
        help="Only records with this value, as JSON writes it (lang=zh, good=true); repeatable, any of a field's "
        "values will do. What it "
        "leaves out is counted; text files have no fields and are left out.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")]


def extensions_of(given: list[str] | None) -> list[str]:
    """What --extension says, in the form that the corpus is searched by."""
    from data_tools.corpus import DEFAULT_EXTENSIONS

    return [_ending("--extension", extension) for extension in given or DEFAULT_EXTENSIONS]


def text_endings_of(given: list[str] | None) -> list[str]:
    """The same of --text-ending."""
    return ["" if ending == "none" else _ending("--text-ending", ending) for ending in given or []]


def _ending(option: str, given: str) -> str:
    from data_tools.formats import COMPRESSED_ENDINGS

    ending = given.lower() if given.startswith(".") else f".{given.lower()}"
    if ending in COMPRESSED_ENDINGS or any(ending.endswith(compressed) for compressed in COMPRESSED_ENDINGS):
        raise DataFormatError(
            f"{option} {given}: compressed files go by the ending before it; give {ending.split('.')[1]} or the like"
        )
    if not re.fullmatch(r"\.[^\s./*?\[\],;]+", ending):
        raise DataFormatError(f"{option} {given}: not an ending; write one such as .rst, and repeat {option} for more")
    return ending
