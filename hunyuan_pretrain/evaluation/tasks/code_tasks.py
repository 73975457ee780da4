"""Scores of tasks whose answers are programs: each runs in the sandbox. lm-eval loads this file by its path."""

from __future__ import annotations

from typing import Any

from hunyuan_pretrain.evaluation.sandbox import run_program

MBPP_EXAMPLES = (2, 3, 4)
"""Few-shot examples of the paper (arXiv 2108.07732), by task_id."""


def mbpp_examples(dataset: Any) -> Any:
    """The examples of MBPP's prompt."""
    return dataset.filter(lambda row: row["task_id"] in MBPP_EXAMPLES)


def humaneval(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the completed function passes its tests."""
    return _score(f"{doc['prompt']}{results[0]}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n")


def mbpp(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The same for a program with assertions."""
    return _score("\n".join([results[0], doc.get("test_setup_code") or "", *doc["test_list"]]))


def _score(program: str) -> dict[str, float]:
    return {"pass@1": float(run_program(program).passed)}
