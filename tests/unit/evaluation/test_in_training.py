"""evaluation.tasks without lm-eval: what is refused, and with which system prompt a run is asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hunyuan_pretrain.config.history import SourceFacts
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.evaluation import EvaluationError, in_training
from hunyuan_pretrain.evaluation.catalogue import known_rows
from hunyuan_pretrain.evaluation.in_training import TasksOfRun
from tests.helpers.runs import experiment_fields

JUDGED = next(row for row in known_rows() if row.judged is not None)


def experiment_with(folder: Path, *tasks: str) -> Experiment:
    fields = experiment_fields(folder, folder / "run", evaluation={"tasks": list(tasks)})
    fields["stages"] = [fields["stages"][0] | {"task": "sft", "data": [{"path": str(folder / "chats")}]}]
    return Experiment.model_validate(fields)


def test_a_group_is_run_without_the_rows_that_another_model_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_training, "find_spec", lambda name: None)  # as far as a machine without lm-eval gets
    group = experiment_with(tmp_path, "hunyuan-instruct")
    assert JUDGED in in_training.Request(["hunyuan-instruct"]).judged
    assert str(TasksOfRun().obstacle(group)).startswith("lm-eval is not installed")
    named = experiment_with(tmp_path, "hunyuan-instruct", JUDGED.task)
    assert str(TasksOfRun().obstacle(named)).startswith(f"{JUDGED.name}: judged by another model")


def test_a_run_is_asked_with_the_system_prompt_of_its_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def of_run(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        raise EvaluationError("nobody answers")

    monkeypatch.setattr(in_training, "of_run", of_run)
    monkeypatch.setattr(TasksOfRun, "_harness", lambda self: None)
    experiment = experiment_with(tmp_path, "piqa")
    facts = SourceFacts(sequences=9, tokens=90, sequence_length=10, system_prompt="Be brief.")
    order = SimpleNamespace(facts={str(tmp_path / "chats"): facts})
    run: Any = SimpleNamespace(experiment=experiment, run_dir=tmp_path / "run", loader=SimpleNamespace(order=order))
    scorer: Any = SimpleNamespace(is_followed=True, release=lambda: asked.append("released"))
    tasks = TasksOfRun()
    tasks._chosen = object()  # type: ignore[assignment]
    found = tasks._lead(run, experiment.stages[0], scorer)
    assert found.failure == "EvaluationError: nobody answers"
    assert asked == ["Be brief.", "released"]
