"""The command `evaluate`: tasks chosen, run, and reported beside the published table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hunyuan_pretrain.checkpoint.outputs import new_folder, refuse_existing
from hunyuan_pretrain.config.history import write_whole
from hunyuan_pretrain.evaluation import EvaluationError, harness, judged, sandbox
from hunyuan_pretrain.evaluation.opened import Opened
from hunyuan_pretrain.evaluation.requests import Request

CODE_TASKS = ("hunyuan_humaneval", "hunyuan_mbpp")


@dataclass(frozen=True)
class Prepared:
    """Everything that a request needs but the model."""

    request: Request
    chosen: harness.Chosen
    questions: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Report:
    """A result, as the command prints it."""

    content: dict[str, Any]
    rows: list[tuple[str, ...]]
    notes: list[str]


@contextmanager
def prepared(request: Request) -> Iterator[Prepared]:
    """Load tasks and questions. Raises EvaluationError with everything that is unknown, missing or refused."""
    if request.answers is not None:
        refuse_existing(request.answers)
    refuse_code_without_sandbox(request)
    with harness.scratch_folder() as scratch, sandbox.unsafe_code_allowed(request.unsafe_code):
        problems, questions, chosen = list[str](), dict[str, list[dict[str, Any]]](), harness.Chosen([])
        try:
            questions = judged.read_questions(request.judged, request.data)
        except EvaluationError as error:
            problems.append(str(error))
        try:
            chosen = harness.choose(request.scored, request.data, scratch, may_run_code=request.unsafe_code)
        except EvaluationError as error:
            problems.append(str(error))
        if problems:
            raise EvaluationError("\n".join(problems))
        yield Prepared(request, chosen, questions)


def refuse_code_without_sandbox(request: Request) -> None:
    """Raise EvaluationError for tasks that run the model's programs where they would not be confined."""
    code = [name for name in request.scored if name in CODE_TASKS]
    if code and not request.unsafe_code and (why := sandbox.obstacle()) is not None:
        raise EvaluationError(
            f"{', '.join(code)}: the model's programs run in a sandbox only, and there is none here ({why}); "
            "`evaluate --unsafe-code` runs them with your rights"
        )


def run(opened: Opened, wanted: Prepared) -> Report:
    """Evaluate, write what the request asks for, and return the report."""
    request, results, records = wanted.request, dict[str, Any](), list[dict[str, Any]]()
    if wanted.chosen.rows:
        keeps = request.samples is not None
        results = harness.run(opened.lm, wanted.chosen, limit=request.limit, chat=request.is_chat, samples=keeps)
        records = harness.table(wanted.chosen, results)
    content = {
        **opened.facts,
        "chat_template": request.is_chat,
        "limit": request.limit,
        "versions": {name: version(name) for name in ("hunyuan-pretrain", "lm-eval", "transformers", "torch")},
        "rows": records,
        "results": results.get("results", {}),
        "groups": results.get("groups", {}),
    }
    notes = _write(content, results, request)
    notes += _write_answers(opened, wanted)
    return Report(content, _as_table(records, request.table), notes)


def _write(content: dict[str, Any], results: dict[str, Any], request: Request) -> list[str]:
    if request.out is not None:
        write_whole(request.out, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
    if request.samples is not None:
        lines = [
            json.dumps({"task": task, **sample}, ensure_ascii=False, default=str)
            for task, samples in results.get("samples", {}).items()
            for sample in samples
        ]
        write_whole(request.samples, "".join(f"{line}\n" for line in lines))
    return [f"written: {path}" for path in (request.out, request.samples) if path is not None]


def _write_answers(opened: Opened, wanted: Prepared) -> list[str]:
    folder, notes = wanted.request.answers, list[str]()
    if folder is None:
        return notes
    with new_folder(folder) as beside:
        for task, questions in wanted.questions.items():
            benchmark = judged.BENCHMARKS[task]
            name = Path(str(opened.facts["model"])).resolve().name
            answers = judged.answer(opened.lm, benchmark, questions[: wanted.request.limit], name)
            (beside / benchmark.output).write_text(judged.as_file(benchmark, answers), encoding="utf-8")
            notes.append(f"written: {folder / benchmark.output}, {len(answers)} answers for the benchmark's own judge")
    return notes


def _as_table(records: list[dict[str, Any]], which: str) -> list[tuple[str, ...]]:
    if not records:
        return []
    rows: list[tuple[str, ...]] = [("", "task", "shots", "items", "metric", "result", f"published ({which})")]
    for record in records:
        published = record["published"].get(which)
        value = f"{100 * record['value']:.2f}" if 0 <= record["value"] <= 1 else f"{record['value']:.6g}"
        metric = record["metric"].removesuffix(",none")
        beside = "" if published is None else f"{published:g}"
        rows.append((record["row"], record["task"], str(record["shots"]), str(record["items"]), metric, value, beside))
    return rows
