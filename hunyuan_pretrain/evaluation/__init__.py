"""Evaluation: benchmarks, long context, and what a model predicts token by token."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


class EvaluationError(ValueError):
    """An evaluation that cannot be done as asked: what is missing or wrong, and what to do."""


class ScoringStoppedError(Exception):
    """Raised on all ranks if a stop is asked for while they score."""


def unwritable(files: Mapping[str, Path | None]) -> list[str]:
    """What is wrong with output files, by option: an evaluation may take hours before it writes them."""
    problems = []
    for option, path in files.items():
        if path is None:
            continue
        folder = path.absolute().parent
        if path.is_dir():
            problems.append(f"{option} {path}: is a folder")
        elif not folder.is_dir():
            problems.append(f"{option} {path}: its folder does not exist")
        elif not os.access(path if path.exists() else folder, os.W_OK):
            problems.append(f"{option} {path}: cannot be written")
    return problems


def refuse_unwritable(files: Mapping[str, Path | None]) -> None:
    """Raise EvaluationError with all of `unwritable`."""
    if problems := unwritable(files):
        raise EvaluationError("\n".join(problems))
