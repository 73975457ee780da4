"""Answers that `evaluate --samples` wrote, and the scores of programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import hunyuan_pretrain.evaluation


def samples_of(path: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Items by task, number and filter of the answer."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {(row["task"], row["doc_id"], row["filter"]): row for row in rows}


def code_tasks() -> ModuleType:
    """The file that lm-eval loads by its path."""
    sys.path.insert(0, str(Path(hunyuan_pretrain.evaluation.__file__).parent / "tasks"))
    try:
        import code_tasks  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    return code_tasks
