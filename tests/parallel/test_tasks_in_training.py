"""evaluation.tasks: a run that stops for benchmarks trains as without them, and they are those of `evaluate RUN`.

Runs where lm-eval is, in processes that tests/reference/test_versions.py starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.benchmark_data import write_small_benchmarks
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields, metrics

pytest.importorskip("lm_eval", reason="runs in the processes of test_versions.py")

STEPS = 5
TASKS = ["piqa", "hunyuan_c3", "mmlu_anatomy"]
TRIES = ("plain", "tasks", "failing", "stopped")
FP8: dict[str, Any] = {"dtype": "bf16", "fp8_recipe": "delayed"}
ATTENTION = {"trainable": ["*.self_attention.*"]}


def fields_of(corpus: Path, data: Path, run_dir: Path, with_tasks: bool, **changes: Any) -> Experiment:
    tasks = {"tasks": TASKS, "tasks_every_steps": 2, "tasks_data": str(data), "tasks_limit": 3}
    fields = experiment_fields(corpus, run_dir, STEPS, model__num_layers=2, evaluation=tasks if with_tasks else {})
    fields["checkpoint"] = {"save_every_steps": 2}
    for section, values in changes.items():
        fields[section] = fields.get(section, {}) | values
    return Experiment.model_validate(fields)


def train_here(experiment: Experiment) -> int:
    """Status of a run, whose ranks stay in the job."""
    from hunyuan_pretrain.evaluation.in_training import TasksOfRun
    from hunyuan_pretrain.parallel.groups import leave_layout
    from hunyuan_pretrain.runtime.stop import listen
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.loop import _train

    stop = listen()
    stop.is_asked = False
    run = setup.prepare(experiment, stop, (), TasksOfRun())
    with setup.left_at_the_end(run, leave_layout):
        status = _train(run, stop)
        assert all(model.training for model in run.wrapped)
        return status


def all_tries(corpus: Path, data: Path, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """On one of the ranks."""
    from hunyuan_pretrain.evaluation import EvaluationError, harness, in_training, layout_scorer
    from hunyuan_pretrain.runtime.stop import listen

    def experiment(name: str) -> Experiment:
        return fields_of(corpus, data, folder / name, name != "plain", **changes)

    statuses = {"plain": [train_here(experiment("plain"))]}
    with answers_kept() as answers:
        statuses["tasks"] = [train_here(experiment("tasks"))]

    with pytest.MonkeyPatch.context() as patch:
        calls = list[int]()
        original: Callable[..., Any] = layout_scorer.LayoutScorer._answers

        def fail_everywhere(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise EvaluationError("no numbers")
            return original(*arguments)

        def fail_between(chosen: Any, results: Any) -> Any:
            raise LookupError("no such metric")

        patch.setattr(layout_scorer.LayoutScorer, "_answers", fail_everywhere)
        patch.setattr(harness, "table", fail_between)
        statuses["failing"] = [train_here(experiment("failing"))]

    with pytest.MonkeyPatch.context() as patch:
        original = layout_scorer.LayoutScorer._pass

        def stop_the_last_rank(*arguments: Any) -> Any:
            if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                listen().is_asked = True
            return original(*arguments)

        patch.setattr(layout_scorer.LayoutScorer, "_pass", stop_the_last_rank)
        patch.setattr(layout_scorer, "PACKS_AT_ONCE", 1)
        patch.setattr(in_training, "TASKS_BATCH_TOKENS", 64)
        statuses["stopped"] = [train_here(experiment("stopped"))]
    statuses["stopped"].append(train_here(experiment("stopped")))
    with answers_kept() as of_evaluate:
        evaluated = {step: evaluate_run(folder / "tasks", data, step) for step in (2, 4, STEPS)}
    return statuses | {"evaluated": evaluated, "answers": (answers, of_evaluate)}


@contextmanager
def answers_kept() -> Iterator[list[list[float]]]:
    """The log-probabilities and likeliest tokens of every item, by pause."""
    from hunyuan_pretrain.evaluation.layout_scorer import LayoutScorer

    kept = list[list[float]]()
    original: Callable[..., Any] = LayoutScorer._answers

    def keep(*arguments: Any) -> Any:
        answers = original(*arguments)
        kept.append([number for read in answers for numbers in read for number in numbers.tolist()])
        return answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayoutScorer, "_answers", keep)
        yield kept


def evaluate_run(run_dir: Path, data: Path, step: int) -> dict[str, float] | None:
    """What `evaluate RUN --step` gives, on rank 0."""
    from hunyuan_pretrain.evaluation.benchmarks import prepared, run
    from hunyuan_pretrain.evaluation.in_training import metric_name
    from hunyuan_pretrain.evaluation.opened import open_run
    from hunyuan_pretrain.evaluation.requests import Request
    from hunyuan_pretrain.parallel import groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "destroy_groups", groups.leave_layout)
        with (
            prepared(Request(TASKS, data, 3)) as wanted,
            open_run(run_dir, step=step, layout=None, batch_tokens=4096) as opened,
        ):
            if opened is None:
                return None
            rows = run(opened, wanted).content["rows"]
    return {f"tasks/{row['task']}/{metric_name(row['metric'])}": row["value"] for row in rows}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_benchmarks(tmp_path_factory.mktemp("benchmarks"))


CASES = {
    "one rank, FP8": (
        1,
        {"model": {"moe_ffn_hidden_size": 48}, "precision": FP8, "runtime": {"transformer_engine": "never"}},
    ),
    "tp=2, attention only": (
        2,
        {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "tuning": ATTENTION},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_trains_as_without_tasks_and_they_are_those_of_evaluate(
    case: str, corpus: Path, data: Path, tmp_path: Path
) -> None:
    ranks, changes = CASES[case]
    found = fork_ranks(ranks, all_tries, corpus, data, tmp_path, changes, timeout_s=400)
    for of_rank in found:
        assert [of_rank[name] for name in TRIES] == [[0], [0], [0], [75, 0]]

    steps = {name: [one for one in metrics(tmp_path / name) if "loss" in one] for name in TRIES}
    for name in TRIES:
        losses = [(one["step"], one["loss"], one["grad_norm"], one.get("expert_load")) for one in steps[name]]
        assert losses == [(o["step"], o["loss"], o["grad_norm"], o.get("expert_load")) for o in steps["plain"]], name
        for step in (2, 4, STEPS):
            assert same_files(tmp_path / "plain", tmp_path / name, step), (name, step)

    measured = {
        name: {
            one["step"]: {key: value for key, value in one.items() if key.startswith("tasks/")}
            for one in metrics(tmp_path / name)
            if any(key.startswith("tasks/") for key in one)
        }
        for name in TRIES
    }
    expected, (answers, of_evaluate) = found[0]["evaluated"], found[0]["answers"]
    assert len(answers) == 3
    assert answers[0] != answers[1] != answers[2], "the model has learned"
    assert answers == of_evaluate, "to the last item, bitwise: the same packs in the same layout"
    assert {key.split("/")[1] for key in expected[2]} == set(TASKS)
    assert measured["tasks"] == measured["stopped"] == expected
    assert measured["failing"] == measured["plain"] == {}

    assert failures(tmp_path / "failing") == [
        (2, "EvaluationError: no numbers"),
        (4, "LookupError: no such metric"),
        (STEPS, "LookupError: no such metric"),
    ]
    assert "told to stop; the next start repeats these benchmarks" in (tmp_path / "stopped/log.txt").read_text()


def failures(run_dir: Path) -> list[tuple[int, str]]:
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [(event["step"], event["text"]) for event in events if event["kind"] == "benchmarks failed"]


def same_files(one: Path, other: Path, step: int) -> bool:
    """Whether two runs have the same checkpoint, by the digests of its files: weights, optimizer, FP8 scales,
    generators."""
    digests = [
        json.loads((run_dir / "checkpoints" / f"step_{step:07d}" / "complete.json").read_text())["files"]
        for run_dir in (one, other)
    ]
    assert len(digests[0]) > 1
    return bool(digests[0] == digests[1])
