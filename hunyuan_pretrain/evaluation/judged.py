"""Benchmarks that another model judges: the answers, as each benchmark's own judge reads them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_pretrain.evaluation import EvaluationError
from hunyuan_pretrain.evaluation.catalogue import Row

MAX_NEW_TOKENS = 2048


@dataclass(frozen=True)
class Benchmark:
    """Where its questions are, what is asked, and what an answer looks like."""

    files: tuple[str, ...]
    """Names of its file under the data folder."""
    source: str
    """Where it comes from."""
    turns: Callable[[dict[str, Any]], list[str]]
    """The user's turns of a question."""
    answer: Callable[[dict[str, Any], list[str], str], dict[str, Any]]
    """(question, answers, name of the model) -> what its judge reads."""
    output: str


def _lmsys(question: dict[str, Any], answers: list[str], name: str) -> dict[str, Any]:
    made = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([question["question_id"], answers])).hex
    choices = [{"index": 0, "turns": answers}]
    return {
        "question_id": question["question_id"],
        "answer_id": made,
        "model_id": name,
        "choices": choices,
        "tstamp": 0,
    }


def _align_bench(question: dict[str, Any], answers: list[str], name: str) -> dict[str, Any]:
    return {**question, "answer": answers[0], "model_id": name}


def _alpaca(question: dict[str, Any], answers: list[str], name: str) -> dict[str, Any]:
    kept: dict[str, Any] = {key: question[key] for key in ("instruction", "dataset") if key in question}
    return {**kept, "output": answers[0], "generator": name}


def _texts(question: dict[str, Any]) -> list[str]:
    return [turn["content"] if isinstance(turn, dict) else str(turn) for turn in question["turns"]]


BENCHMARKS = {
    "align_bench": Benchmark(
        ("align_bench/data_v1.1_release.jsonl", "align_bench/data_release.jsonl"),
        "data/data_v1.1_release.jsonl of the repository THUDM/AlignBench",
        lambda question: [question["question"]],
        _align_bench,
        "align_bench.jsonl",
    ),
    "mt_bench": Benchmark(
        ("mt_bench/question.jsonl",),
        "fastchat/llm_judge/data/mt_bench/question.jsonl of the repository lm-sys/FastChat",
        _texts,
        _lmsys,
        "mt_bench.jsonl",
    ),
    "arena_hard": Benchmark(
        ("arena_hard/question.jsonl",),
        "data/arena-hard-v0.1/question.jsonl of the repository lmarena/arena-hard-auto",
        _texts,
        _lmsys,
        "arena_hard.jsonl",
    ),
    "alpaca_eval": Benchmark(
        ("alpaca_eval/alpaca_eval.json",),
        "alpaca_eval.json of the data set tatsu-lab/alpaca_eval on the Hugging Face hub",
        lambda question: [question["instruction"]],
        _alpaca,
        "alpaca_eval.json",
    ),
}


def read_questions(rows: Sequence[Row], data: Path | None) -> dict[str, list[dict[str, Any]]]:
    """The questions of each benchmark. Raises EvaluationError with every file that is missing, or one that cannot be
    read."""
    found: dict[str, list[dict[str, Any]]] = {}
    missing = []
    for row in rows:
        benchmark = BENCHMARKS[str(row.judged)]
        paths = [data / name for name in benchmark.files] if data is not None else []
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            place = paths[0] if paths else f"DIR/{benchmark.files[0]} with --data DIR"
            missing.append(f"{row.name}: not at {place}; it is {benchmark.source}")
            continue
        found[row.task] = _read(path, benchmark)
    if missing:
        raise EvaluationError("what these benchmarks need is missing:\n" + "\n".join(f"  {line}" for line in missing))
    return found


def _read(path: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
        for number, row in enumerate(rows, start=1):
            turns = benchmark.turns(row)
            if not turns or not all(isinstance(turn, str) and turn for turn in turns):
                raise ValueError(f"question {number} has an empty turn")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{path}: not the questions of this benchmark: {error!r}") from error
    return list(rows)


def answer(lm: Any, benchmark: Benchmark, questions: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The answers of a model (an LM of lm-eval): each turn with the turns and answers before it as its conversation,
    the likeliest text."""
    from lm_eval.api.instance import Instance

    turns = [benchmark.turns(question) for question in questions]
    answers: list[list[str]] = [[] for _ in questions]
    new_tokens = min(MAX_NEW_TOKENS, lm.max_length // 2)
    for turn in range(max(map(len, turns), default=0)):
        asked = [number for number, of_one in enumerate(turns) if turn < len(of_one)]
        requests = []
        for number in asked:
            pairs = zip(turns[number], [*answers[number], None], strict=False)
            said = [
                {"role": role, "content": text}
                for user, assistant in pairs
                for role, text in (("user", user), ("assistant", assistant))
                if text is not None
            ]
            options = {"until": [], "max_gen_toks": new_tokens, "do_sample": False}
            prompt = lm.apply_chat_template(said)
            requests.append(Instance("generate_until", {}, (prompt, options), 0))
        for number, text in zip(asked, lm.generate_until(requests), strict=True):
            answers[number].append(text)
    return [benchmark.answer(question, of_one, name) for question, of_one in zip(questions, answers, strict=True)]


def as_file(benchmark: Benchmark, answers: Sequence[dict[str, Any]]) -> str:
    """The content of the file that the judge reads."""
    if benchmark.output.endswith(".json"):
        return json.dumps(list(answers), ensure_ascii=False, indent=1) + "\n"
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in answers)
