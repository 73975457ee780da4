"""What the command `evaluate` is asked, and what is refused before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hunyuan_pretrain.evaluation import EvaluationError, unwritable
from hunyuan_pretrain.evaluation.catalogue import Row, rows_of


@dataclass(frozen=True)
class Request:
    """The options of the command."""

    names: list[str]
    data: Path | None = None
    limit: int | None = None
    chat: bool | None = None
    """None: for the instruct table only."""
    unsafe_code: bool = False
    out: Path | None = None
    samples: Path | None = None
    answers: Path | None = None

    @property
    def judged(self) -> list[Row]:
        """Rows whose answers another model judges."""
        return list(dict.fromkeys(row for name in self.names for row in rows_of(name) if row.judged is not None))

    @property
    def scored(self) -> list[str]:
        """Tasks that are scored here: of rows, and other names as they are."""
        names = [
            [row.task for row in rows_of(name) if row.judged is None] if rows_of(name) else [name]
            for name in self.names
        ]
        return list(dict.fromkeys(task for each in names for task in each))

    @property
    def table(self) -> str:
        """Which published table is beside the result."""
        return "instruct" if "hunyuan-instruct" in self.names or self.chat else "base"

    @property
    def is_chat(self) -> bool:
        """Whether texts are turns of the chat template."""
        return self.chat if self.chat is not None else "hunyuan-instruct" in self.names


def check(request: Request) -> None:
    """Raise EvaluationError for what needs no model to see."""
    problems = []
    if not request.names:
        problems.append("--tasks: name at least one, such as hunyuan-base")
    if {"hunyuan-base", "hunyuan-instruct"} <= set(request.names) and request.chat is None:
        problems.append("hunyuan-base is without the chat template, hunyuan-instruct with it: evaluate one at a time")
    if request.data is not None and not request.data.is_dir():
        problems.append(f"--data {request.data}: not a folder")
    problems += unwritable({"--out": request.out, "--samples": request.samples})
    if request.judged and request.answers is None:
        names = ", ".join(row.name for row in request.judged)
        problems.append(f"{names}: judged by another model; --answers DIR writes the answers, for its own judge")
    if request.answers is not None and not request.judged:
        problems.append("--answers: no task is judged by another model")
    if problems:
        raise EvaluationError("\n".join(problems))
